"""Writing a container: tensors are made, hashed and written a few at a time, the file appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import closing

from lbc_cli.checkpoint.ahead import ahead
from lbc_cli.checkpoint.container import MAX_HEADER_BYTES, TensorInfo, check_name, encode_header, in_file_order
from lbc_cli.checkpoint.files import Buffer, atomic_write_bytes
from lbc_cli.errors import UsageError


def write_digested(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorInfo],
    metadata: Callable[[Mapping[str, str]], Mapping[str, str]],
    data: Callable[[str], Buffer],
) -> None:
    """Write a container whose metadata hold a digest of every tensor, atomically and without holding its tensors.

    The header comes first in the file and is known last: it is written over one of the same length.

    Args:
        path: the file to write or replace.
        tensors: dtype and shape of each tensor, in any order.
        metadata: makes the metadata from name -> SHA-256 in hex; called twice, and as long for any digests.
        data: makes the bytes of one tensor; called for each, a few at once from several threads.

    Raises:
        OutputError: if the file cannot be written.
        UsageError: for a name that a file may not hold, or a header above 32 MiB.
    """
    digests = dict.fromkeys(tensors, "0" * 64)
    blank = _writable_header(path, tensors, metadata(digests))

    def made(name: str) -> tuple[str, Buffer, str]:
        content = data(name)
        assert memoryview(content).nbytes == tensors[name].num_bytes, name
        return name, content, hashlib.sha256(content).hexdigest()

    def pieces() -> Generator[Buffer]:
        yield blank
        for name, content, digest in ahead(made, in_file_order(tensors), lambda name: tensors[name].num_bytes):
            digests[name] = digest
            yield content

    def header() -> bytes:
        final = encode_header(tensors, metadata(digests))
        assert len(final) == len(blank), "the length of the metadata depends on the digests"
        return final

    with closing(pieces()) as content:
        atomic_write_bytes(path, content, head=header)


def _writable_header(
    path: str | os.PathLike[str], tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> bytes:
    for name in tensors:
        check_name(name)
    header = encode_header(tensors, metadata)
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise UsageError(f"{path}: the header would take {len(header)} bytes: at most {MAX_HEADER_BYTES} are allowed")
    return header
