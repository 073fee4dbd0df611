"""Any safetensors file, whoever wrote it.

The rules are those of the format's specification: a header of JSON, known dtypes, tensors that cover the data without
gap or overlap up to the end of the file. The order, the spelling and the metadata are free, unlike in our own files.
Plain file reads, no memory map: a file that shrinks meanwhile is an error, not a signal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from lbc_cli.checkpoint.container import TensorInfo, check_dtype, check_shape, parse_json
from lbc_cli.checkpoint.tensors import from_bytes
from lbc_cli.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # as safetensors itself


@dataclass(frozen=True, slots=True)
class PlainHeader:
    """What stands in front of the data."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    """In the order of the data."""
    data_start: int


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: a length, then a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_plain(file: BinaryIO, header: PlainHeader) -> dict[str, Tensor]:
    """Read every tensor, each once.

    Raises:
        CheckpointError: if the file ends early.
    """
    file.seek(header.data_start)
    return {
        name: from_bytes(_read(file, info.num_bytes, f"tensor {name}"), info) for name, info in header.tensors.items()
    }


def read_plain_header(file: BinaryIO) -> PlainHeader:
    """Parse and check the header.

    Raises:
        CheckpointError: if it is not that of a sound safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"claims a header of {length} bytes in a file of {size}: damaged, or not safetensors")
    parsed = parse_json(bytes(_read(file, length, "the header")), "the header")
    if not isinstance(parsed, dict):
        raise CheckpointError("the header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("the header's __metadata__ is not an object of strings")
    return PlainHeader(metadata, _in_data_order(parsed, size - 8 - length), 8 + length)


def _in_data_order(entries: Mapping[str, Any], data_size: int) -> dict[str, TensorInfo]:
    """The tensors in the order of their data, which must follow one another to the end of the file."""
    places = [(_offsets(name, entry), name, entry) for name, entry in entries.items()]
    tensors: dict[str, TensorInfo] = {}
    at = 0
    for (begin, end), name, entry in sorted(places, key=lambda place: place[0]):
        info = TensorInfo(check_dtype(entry["dtype"], name), check_shape(entry["shape"], name))
        if (begin, end) != (at, at + info.num_bytes):
            raise CheckpointError(
                f"tensor {name} is {info.dtype} {list(info.shape)} at bytes {begin} to {end}: {at} to "
                f"{at + info.num_bytes} are due, without gap or overlap"
            )
        tensors[name] = info
        at = end
    if at != data_size:
        raise CheckpointError(f"has {data_size} bytes of data where the header describes {at}: cut off or extended")
    return tensors


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name[:80]!r}: the header needs exactly dtype, shape and data_offsets")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int and at >= 0 for at in offsets):
        raise CheckpointError(f"tensor {name[:80]!r} has the offsets {str(offsets)[:80]}: two positions are needed")
    return offsets[0], offsets[1]


def _read(file: BinaryIO, size: int, what: str) -> bytearray:
    buffer = bytearray(size)
    rest = memoryview(buffer)
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{what} is cut off: {len(rest)} of {size} bytes are missing")
        rest = rest[count:]
    return buffer
