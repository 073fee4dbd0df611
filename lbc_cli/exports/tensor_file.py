"""A safetensors file in canonical form, written tensor by tensor in any order, so that one is in memory at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lbc_cli.checkpoint.container import MAX_HEADER_BYTES, TensorInfo, encode_header, in_file_order
from lbc_cli.checkpoint.files import Buffer
from lbc_cli.errors import UsageError

NO_DIGEST = "0" * 64


class TensorFile:
    """A file under construction; see `tensor_file`."""

    def __init__(self, descriptor: int, infos: Mapping[str, TensorInfo], start: int) -> None:
        self._descriptor = descriptor
        self._infos = infos
        self._at: dict[str, int] = {}
        for name in in_file_order(infos):
            self._at[name] = start
            start += infos[name].num_bytes
        self.digests: dict[str, str] = dict.fromkeys(infos, NO_DIGEST)

    def put(self, name: str, data: Buffer) -> None:
        """Write the bytes of a tensor."""
        rest, at = memoryview(data).cast("B") if len(data) else memoryview(b""), self._at.pop(name)
        assert rest.nbytes == self._infos[name].num_bytes, name
        self.digests[name] = hashlib.sha256(rest).hexdigest()
        while rest:
            written = os.pwrite(self._descriptor, rest[: 1 << 24], at)
            rest, at = rest[written:], at + written

    @property
    def missing(self) -> list[str]:
        """Tensors that were not put yet."""
        return list(self._at)


@contextmanager
def tensor_file(
    path: Path, infos: Mapping[str, TensorInfo], metadata: Callable[[Mapping[str, str]], Mapping[str, str]]
) -> Iterator[TensorFile]:
    """Write a new safetensors file.

    Args:
        path: where; nothing may be there.
        infos: dtype and shape of every tensor.
        metadata: the `__metadata__` for given SHA-256 digests of the tensors. Its length must not depend on them: the
            header stands in front of the data, yet is written last.

    Raises:
        UsageError: if the header would be larger than readers take.
    """
    length = len(encode_header(infos, metadata(dict.fromkeys(infos, NO_DIGEST))))
    if length - 8 > MAX_HEADER_BYTES:
        raise UsageError(f"{path.name}: the header would take {length} bytes: at most {MAX_HEADER_BYTES} are allowed")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        file = TensorFile(descriptor, infos, length)
        yield file
        assert not file.missing, file.missing
        header = encode_header(infos, metadata(file.digests))
        assert len(header) == length
        os.pwrite(descriptor, header, 0)
    finally:
        os.close(descriptor)
