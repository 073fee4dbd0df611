"""The wire format of protobuf, read in place: what is large is skipped in the file, never loaded.

Readers that build one object per field can be made to need a hundred times the file's size. Here a budget bounds the
number of fields, and bytes are only read when they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbc_cli.errors import CheckpointError

FIELD_LIMIT = 1 << 22
_BUFFER = 1 << 16
_TEXT_LIMIT = 1 << 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """One field of a message."""

    number: int
    kind: int
    """Wire type: 0 a varint, 1 and 5 eight and four bytes, 2 a length and that many bytes."""
    value: int
    """Of a varint, unsigned; 0 for the others."""
    begin: int
    """Offset in the file of its first byte, behind the length."""
    end: int


class Wire:
    """An open file of protobuf messages.

    Args:
        file: opened for reading in binary.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self._start = 0
        self._buffer = b""
        self._budget = FIELD_LIMIT

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """The fields of the message between two offsets, in the order of the file.

        Raises:
            CheckpointError: where the bytes are no message, or the file has too many fields.
        """
        while begin < end:
            self._budget -= 1
            if self._budget < 0:
                raise CheckpointError(f"the file has more than {FIELD_LIMIT} fields")
            key, at = self._varint(begin, end)
            number, kind, value, first = key >> 3, key & 7, 0, at
            if kind == _VARINT:
                value, at = self._varint(at, end)
            elif kind in (_FIXED64, _FIXED32):
                at += 8 if kind == _FIXED64 else 4
            elif kind == _BYTES:
                length, first = self._varint(at, end)
                at = first + length
            if kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32) or not number or at > end:
                raise CheckpointError(f"byte {begin} begins no field that fits: damaged, or not an ONNX file")
            yield Field(number, kind, value, first, at)
            begin = at

    def message(self, begin: int, end: int, known: Collection[int], once: Collection[int] = ()) -> dict[int, Any]:
        """The fields of a message by number.

        Args:
            begin: offset of its first byte.
            end: offset behind its last byte.
            known: numbers to keep.
            once: those that may occur once only. protobuf merges repeated ones, and readers differ in how.

        Returns:
            Number -> list of fields; for `once`: the field, if it is there.

        Raises:
            CheckpointError: if one of `once` is repeated.
        """
        found: dict[int, Any] = {}
        for field in self.fields(begin, end):
            if field.number in once:
                if field.number in found:
                    raise CheckpointError(f"byte {field.begin}: field {field.number} of a message is repeated")
                found[field.number] = field
            elif field.number in known:
                found.setdefault(field.number, []).append(field)
        return found

    def read(self, begin: int, end: int) -> bytes:
        """The bytes between two offsets.

        Raises:
            CheckpointError: if the file ends before.
        """
        if not 0 <= begin <= end <= self.size:
            raise CheckpointError(f"bytes {begin} to {end} are not in a file of {self.size}: it is cut off")
        if self._start <= begin and end <= self._start + len(self._buffer):
            return self._buffer[begin - self._start : end - self._start]
        self._file.seek(begin)
        data = self._file.read(end - begin)
        if len(data) != end - begin:
            raise CheckpointError(f"the file ends before byte {end}: it is cut off")
        return data

    def text(self, field: Field | None) -> str:
        """A string, "" if the field is not there.

        Raises:
            CheckpointError: if it is none, or holds what would spoil a message.
        """
        if field is None:
            return ""
        if field.kind != _BYTES or field.end - field.begin > _TEXT_LIMIT:
            raise CheckpointError(f"byte {field.begin}: a name is no string of at most {_TEXT_LIMIT} bytes")
        try:
            text = self.read(field.begin, field.end).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"byte {field.begin}: a name is not UTF-8") from error
        if not text.isprintable():
            raise CheckpointError(f"byte {field.begin}: the name {text[:80]!r} is unprintable")
        return text

    def number(self, field: Field | None) -> int:
        """A signed integer, 0 if the field is not there."""
        if field is None:
            return 0
        if field.kind != _VARINT:
            raise CheckpointError(f"byte {field.begin}: a number is no varint")
        return signed(field.value)

    def numbers(self, fields: Collection[Field]) -> tuple[int, ...]:
        """Repeated signed integers, packed or not."""
        found: list[int] = []
        for field in fields:
            if field.kind == _BYTES:
                if field.end - field.begin > _TEXT_LIMIT:
                    raise CheckpointError(f"byte {field.begin}: a list of numbers is too long")
                found += varints(self.read(field.begin, field.end)).astype(np.int64).tolist()
            else:
                found.append(self.number(field))
        return tuple(found)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            offset = at - self._start
            if not 0 <= offset < len(self._buffer):
                self._buffer, self._start, offset = self.read(at, min(at + _BUFFER, self.size)), at, 0
            byte = self._buffer[offset]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
        raise CheckpointError(f"byte {at} is inside a number that does not end: damaged, or not an ONNX file")


def signed(value: int) -> int:
    """An unsigned 64-bit integer as two's complement."""
    return value - (1 << 64) if value >> 63 else value


def varints(data: bytes) -> NDArray[np.uint64]:
    """Decode varints that follow one another.

    Args:
        data: nothing but varints.

    Returns:
        Their values, modulo 2^64.

    Raises:
        CheckpointError: if one is longer than ten bytes, or the last does not end.
    """
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80) + 1
    if len(raw) and (not len(ends) or ends[-1] != len(raw)):
        raise CheckpointError("the last number of a list does not end")
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    lengths = ends - starts
    if len(lengths) and lengths.max() > 10:
        raise CheckpointError("a number of a list is longer than ten bytes")
    values = np.zeros(len(ends), np.uint64)
    for byte in range(int(lengths.max()) if len(lengths) else 0):
        there = lengths > byte
        bits = (raw[starts[there] + byte] & 0x7F).astype(np.uint64)
        values[there] |= bits << np.uint64(7 * byte)
    return values
