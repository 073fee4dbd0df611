"""The file under verification: an own reading of the safetensors container, which shares no code with the writer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.bits import FORMATS

HEADER_LIMIT = 32 * 1024 * 1024
NESTED_LIMIT = 1 << 20
ELEMENT_LIMIT = 1 << 36
_BLOCK = 1 << 20
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # the same in every Python; isprintable is not


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int

    @property
    def described(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape."""
        return self.dtype, self.shape


@dataclass(frozen=True, slots=True)
class Source:
    """An open file and its header."""

    file: BinaryIO
    raw: bytes
    """The header as it stands in the file."""
    parsed: dict[str, Any]
    metadata: dict[str, str]
    entries: dict[str, Entry]
    """In the order of the data."""
    hasher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    """One thread that hashes what was read while it is being looked at."""


class Stream:
    """The bytes of one tensor, read once from front to back and hashed on the way.

    Args:
        source: the file.
        entry: the tensor.
        hashed: False if nobody will ask for the digest.
    """

    def __init__(self, source: Source, entry: Entry, *, hashed: bool = True) -> None:
        self._file = source.file
        self._at = entry.begin
        self._entry = entry
        self._hash = hashlib.sha256()
        self._hasher = source.hasher if hashed else None
        self._hashing: Future[None] | None = None

    def read(self, size: int) -> bytes:
        """The next bytes.

        Raises:
            CheckpointError: if the file ends before.
        """
        self._file.seek(self._at)
        data = self._file.read(size)
        if len(data) != size or self._at + size > self._entry.end:
            raise CheckpointError(f"tensor {self._entry.name} is cut off")
        self._at += size
        if self._hasher is not None:
            self._wait()
            self._hashing = self._hasher.submit(self._hash.update, data)
        return data

    def digest(self) -> str:
        """SHA-256 of the whole tensor; what was not read yet is read now."""
        while self._at < self._entry.end:
            self.read(min(_BLOCK, self._entry.end - self._at))
        self._wait()
        return self._hash.hexdigest()

    def _wait(self) -> None:
        """One piece at a time, so that no more than two are held."""
        if self._hashing is not None:
            self._hashing.result()


def strict_json(text: str) -> Any:
    """Parse JSON; a repeated key or a number that JSON does not know is a ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key is repeated")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def read_source(file: BinaryIO) -> Source:
    """Parse and check the container.

    Raises:
        CheckpointError: if it is not a sound safetensors file: sizes, JSON, dtypes, shapes, offsets without gap or
            overlap up to the end of the file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= size - 8:
        raise CheckpointError(f"the header claims {length} bytes in a file of {size}: damaged, or not safetensors")
    if length > HEADER_LIMIT:
        raise CheckpointError(f"the header claims {length} bytes: at most {HEADER_LIMIT} are read")
    raw = file.read(length)
    if raw.count(b"{") + raw.count(b"[") > NESTED_LIMIT:
        raise CheckpointError(f"the header holds more than {NESTED_LIMIT} lists and objects: no real file does")
    try:
        parsed = strict_json(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError("the header is not a JSON object")
    metadata = parsed.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ is not an object of strings")
    found = [_entry(name, value, 8 + length) for name, value in parsed.items() if name != "__metadata__"]
    entries = {entry.name: entry for entry in sorted(found, key=lambda entry: (entry.begin, entry.end))}
    _check_offsets(entries, 8 + length, size)
    return Source(file, raw, parsed, metadata, entries)


def _entry(name: str, value: Any, start: int) -> Entry:
    if not name or _UNPRINTABLE.search(name) or ".." in name.replace("\\", "/").split("/") or name[0] in "/\\":
        raise CheckpointError(f"the tensor name {name[:80]!r} is a path or unprintable")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"the header's entry of {name} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FORMATS:
        raise CheckpointError(f"tensor {name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or len(shape) > 16 or math.prod(size or 1 for size in shape) > ELEMENT_LIMIT:
        raise CheckpointError(f"tensor {name} has the impossible shape {str(shape)[:80]}")
    if not _sizes(offsets) or len(offsets) != 2 or max(offsets) >> 63:
        raise CheckpointError(f"tensor {name} has the impossible offsets {str(offsets)[:80]}")
    if offsets[1] - offsets[0] != math.prod(shape) * FORMATS[dtype].size:
        raise CheckpointError(f"tensor {name} is {dtype} {shape}, but its offsets are {offsets}")
    return Entry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_offsets(entries: dict[str, Entry], start: int, size: int) -> None:
    at = start
    for entry in entries.values():
        if entry.begin != at:
            raise CheckpointError(f"tensor {entry.name} begins at byte {entry.begin}, not at {at}: overlap or gap")
        at = entry.end
    if at != size:
        raise CheckpointError(f"the tensors end at byte {at} of a file of {size}: cut off or extended")


def row_blocks(rows: int, row_elements: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each a multiple of `step` rows and about a quarter of a million elements."""
    block = max(1, (1 << 18) // max(1, row_elements * step)) * step
    for first in range(0, rows, block):
        yield first, min(first + block, rows)
