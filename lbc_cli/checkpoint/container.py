"""The container: a safetensors file in its one canonical form.

    8 bytes    length of the header, little-endian
    header     compact JSON in UTF-8, padded with spaces to a multiple of 8 bytes:
               {"__metadata__": {key: string, ...}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    data       the tensors' bytes, row-major, little-endian, one after the other without gaps, to the end of the file

Metadata keys are sorted; tensors come in safetensors' own order, the dtype of `DTYPES` descending, then the name. Every
safetensors reader opens such a file. This reader is stricter: it accepts these bytes only and no other spelling of
them, reads with plain file reads (a file that shrinks meanwhile is an error, not a signal), and never needs more memory
than the header and the tensor at hand. On request it also takes the headers of other writers. Nothing here imports
torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from lbc_cli.errors import CheckpointError, UsageError

MAX_HEADER_BYTES = 1 << 25  # 32 MiB: some 100,000 tensors; safetensors itself stops at 100 MB
MAX_NESTED = 1 << 20  # lists and objects in a header, five for a tensor: each costs far more memory than its two bytes
MAX_ELEMENTS = 1 << 36  # of a shape whose zeros count as ones: an empty tensor may not claim a huge one
MAX_DIMENSIONS = 16
_READ_BYTES = 1 << 30  # in one call; systems take no more than 2 GiB

# Bytes per element. The order is safetensors' own (its Dtype enumeration), on which the order of tensors rests.
DTYPES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
_UNSAFE_NAME = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|(?:^|[/\\])\.\.(?:[/\\]|$)|^[/\\]|^$|^__metadata__$"
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor."""

    dtype: str
    """In safetensors' spelling."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    """In the order of the data."""
    data_start: int
    """Where the data begin in the file, in bytes."""

    @property
    def begins(self) -> dict[str, int]:
        """Where each tensor begins in the file, in bytes."""
        sizes = (info.num_bytes for info in self.tensors.values())
        return dict(zip(self.tensors, accumulate(sizes, initial=self.data_start), strict=False))


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys, text as it is; the spelling of every JSON in our files.

    Raises:
        ValueError: for a number that is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse JSON that comes from a file, refusing repeated keys, NaN, and what cannot be handled.

    Args:
        text: the JSON; bytes must be UTF-8.
        what: how to call it in the message.

    Raises:
        CheckpointError: if it is not plain JSON.
    """
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key[:80]!r} appears twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def in_file_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names in the order in which safetensors stores them."""
    return sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The canonical header, with its length in front and its padding behind."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in in_file_order(tensors):
        info = tensors[name]
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [begin, begin + info.num_bytes],
        }
        begin += info.num_bytes
    # Half a surrogate pair can be spelled in JSON but not in UTF-8: what holds one equals no file.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def opened(path: str | os.PathLike[str], *, canonical: bool = True) -> Iterator[tuple[BinaryIO, Header]]:
    """Open a container and parse its header; the data can then be had from `tensor_data`.

    Args:
        path: the file.
        canonical: False: take any sound safetensors header, whatever its spelling, order and metadata.

    Raises:
        UsageError: if there is no such file, or it cannot be opened.
        CheckpointError: if the header is damaged or not canonical; errors inside the block get the path in front.
    """
    target = Path(path)
    if not target.is_file():
        raise UsageError(f"{target}: {'is not a file' if target.exists() else 'no such file'}")
    try:
        with target.open("rb") as file:
            yield file, _read_header(file, canonical)
    except OSError as error:
        raise UsageError(f"{target}: cannot be read: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{target}: {error}") from error


def tensor_data(file: BinaryIO, header: Header) -> Iterator[tuple[str, TensorInfo, bytearray]]:
    """Read the tensors one by one, in file order.

    Raises:
        CheckpointError: if the file ends early.
    """
    begins = header.begins
    for name, info in header.tensors.items():
        yield name, info, read_at(file, begins[name], info.num_bytes, f"tensor {name}")


def read_at(file: BinaryIO, begin: int, size: int, what: str) -> bytearray:
    """Read part of a file; several threads may do so at once.

    Args:
        file: from `opened`.
        begin: first byte.
        size: number of bytes.
        what: how to call them in the message.

    Raises:
        CheckpointError: if the file ends before.
    """
    buffer = bytearray(size)
    rest = memoryview(buffer)
    while rest:
        count = os.preadv(file.fileno(), [rest[:_READ_BYTES]], begin + size - len(rest))
        if not count:
            raise CheckpointError(f"{what} is cut off: {len(rest)} of {size} bytes are missing")
        rest = rest[count:]
    return buffer


def _read_header(file: BinaryIO, canonical: bool) -> Header:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(f"has {size} bytes: too short for a safetensors file")
    length = int.from_bytes(read_at(file, 0, 8, "the header's length"), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"claims a header of {length} bytes: the file has {size}, and at most {MAX_HEADER_BYTES} are read"
        )
    raw = bytes(read_at(file, 8, length, "the header"))
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTED:
        raise CheckpointError(f"the header holds more than {MAX_NESTED} lists and objects")
    parsed = parse_json(raw, "the header")
    header = _parse_header(parsed, 8 + length, canonical)
    if not canonical:
        _check_offsets(header, parsed)
    elif encode_header(header.tensors, header.metadata)[8:] != raw:
        raise CheckpointError("the header is not in canonical form (order, spacing, offsets or padding)")
    end = header.data_start + sum(info.num_bytes for info in header.tensors.values())
    if end != size:
        raise CheckpointError(f"has {size} bytes where the header describes {end}: cut off or extended")
    return header


def _parse_header(parsed: Any, data_start: int, canonical: bool) -> Header:
    if not isinstance(parsed, dict):
        raise CheckpointError("the header is not a JSON object")
    entries = dict(parsed)
    metadata = entries.pop("__metadata__", None if canonical else {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("the header has no __metadata__ of strings: not a file of lbc")
    tensors = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    if not canonical:
        tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: _offsets(name, entries[name]))}
    return Header(metadata, tensors, data_start)


def _offsets(name: str, entry: Mapping[str, Any]) -> list[int]:
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        raise CheckpointError(f"tensor {name}: data_offsets are not two numbers")
    return offsets


def _check_offsets(header: Header, entries: Mapping[str, Any]) -> None:
    """Tensors must follow one another without gaps and be as long as dtype and shape say."""
    for name, begin in header.begins.items():
        expected = [begin - header.data_start, begin - header.data_start + header.tensors[name].num_bytes]
        if entries[name]["data_offsets"] != expected:
            raise CheckpointError(f"tensor {name} has the offsets {entries[name]['data_offsets']}: needs {expected}")


def _parse_entry(name: str, entry: Any) -> TensorInfo:
    """Dtype and shape of one tensor; its offsets are checked by writing the header again."""
    if _UNSAFE_NAME.search(name):
        raise CheckpointError(f"the tensor name {name[:80]!r} holds a path or control characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name}: the header needs exactly dtype, shape and data_offsets")
    return TensorInfo(check_dtype(entry["dtype"], name), check_shape(entry["shape"], name))


def check_name(name: str) -> None:
    """Check a tensor's name that is about to be written.

    Raises:
        UsageError: if a file may not hold it.
    """
    if _UNSAFE_NAME.search(name):
        raise UsageError(f"a tensor cannot be called {name!r}: names hold no control characters and no paths")


def check_dtype(dtype: Any, name: str) -> str:
    """A dtype that comes from a file.

    Raises:
        CheckpointError: if it is unknown.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"tensor {name}: unknown dtype {str(dtype)[:40]!r}")
    return dtype


def check_shape(shape: Any, name: str) -> tuple[int, ...]:
    """A shape that comes from a file.

    Raises:
        CheckpointError: if it is not a list of sizes, or beyond what any tensor can have.
    """
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"tensor {name}: the shape is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise CheckpointError(f"tensor {name}: the shape {str(shape)[:80]} is beyond {MAX_ELEMENTS} elements")
    return tuple(shape)


def check_metadata_keys(metadata: Mapping[str, str], expected: Iterable[str], what: str) -> None:
    """Check that the metadata has these keys and no others, with "pt" as the format.

    Raises:
        CheckpointError: if not.
    """
    wanted = sorted(expected)
    if sorted(metadata) != wanted or metadata.get("format") != "pt":
        raise CheckpointError(f"is not {what}: its metadata has {sorted(metadata)[:8]}, where {wanted} are expected")
