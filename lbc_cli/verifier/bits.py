"""Numbers as bits: zeros, NaN and infinities of every dtype, and rounding between floats. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Format:
    """How a dtype spells its numbers."""

    size: int
    """Bytes of an element."""
    sign: int = 0
    """The sign bit, which alone is -0.0; 0 if there is no -0.0."""
    top: int | None = None
    """Magnitudes above are NaN; None if there is none."""
    infinite: bool = False
    """Whether `top` itself is infinity."""
    nan: int | None = None
    """The one pattern that is NaN, where a format has just one and no sign bit of zero."""


FORMATS: dict[str, Format] = {
    **{name: Format(1) for name in ("BOOL", "U8", "I8")},
    **{name: Format(2) for name in ("U16", "I16")},
    **{name: Format(4) for name in ("U32", "I32")},
    **{name: Format(8) for name in ("U64", "I64", "C64")},
    "F8_E4M3": Format(1, 0x80, 0x7E),
    "F8_E5M2": Format(1, 0x80, 0x7C, True),
    "F8_E8M0": Format(1, nan=0xFF),
    "F8_E4M3FNUZ": Format(1, nan=0x80),
    "F8_E5M2FNUZ": Format(1, nan=0x80),
    "F16": Format(2, 0x8000, 0x7C00, True),
    "BF16": Format(2, 0x8000, 0x7F80, True),
    "F32": Format(4, 0x80000000, 0x7F800000, True),
    "F64": Format(8, 1 << 63, 0x7FF << 52, True),
}


@dataclass(slots=True)
class Census:
    """Counts over the elements of a tensor."""

    elements: int = 0
    nonzero: int = 0
    negative_zeros: int = 0
    nans: int = 0
    infinities: int = 0

    @property
    def density(self) -> float:
        """Share that is not zero."""
        return self.nonzero / self.elements if self.elements else 0.0


def unsigned(data: bytes | bytearray | memoryview, dtype: str) -> Bits:
    """The elements as unsigned integers of their own width, little-endian."""
    return np.frombuffer(data, f"<u{FORMATS[dtype].size}")


def count(bits: Bits, dtype: str, census: Census) -> NDArray[np.bool_]:
    """Add elements to a census.

    Args:
        bits: any shape, from `unsigned`.
        dtype: safetensors' name.
        census: updated in place.

    Returns:
        bool, same shape: what is not zero (-0.0 is zero).
    """
    form = FORMATS[dtype]
    kind = bits.dtype.type
    magnitude = bits & kind(~form.sign & (256**form.size - 1)) if form.sign else bits
    nonzero: NDArray[np.bool_] = magnitude != 0
    used = int(np.count_nonzero(nonzero))
    census.elements += bits.size
    census.nonzero += used
    if form.sign:
        census.negative_zeros += int(np.count_nonzero(bits)) - used
    if form.nan is not None:
        census.nans += int(np.count_nonzero(bits == kind(form.nan)))
    if form.top is not None and bits.size and int(magnitude.max()) >= form.top:
        census.nans += int(np.count_nonzero(magnitude > kind(form.top)))
        census.infinities += int(np.count_nonzero(magnitude == kind(form.top))) if form.infinite else 0
    return nonzero


def narrowed(bits: Bits, dtype: str, target: str) -> tuple[Bits, NDArray[np.bool_]]:
    """Round floats to another type: to nearest even, float64 through float32, as torch does.

    Args:
        bits: from `unsigned`.
        dtype: F64, F32, F16 or BF16.
        target: one of these that is no wider, or F32.

    Returns:
        The rounded elements as bits, and which of them are NaN.
    """
    if dtype == target:
        numbers = bits
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = _single_to(_to_single(bits, dtype), target)
    form = FORMATS[target]
    kind = numbers.dtype.type
    return numbers, np.asarray((numbers & kind(~form.sign & (256**form.size - 1))) > kind(form.top))


def _to_single(bits: Bits, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(f"<f{FORMATS[dtype].size}").astype(np.float32)


def _single_to(numbers: NDArray[np.float32], target: str) -> Bits:
    if target != "BF16":
        return numbers.astype(f"<f{FORMATS[target].size}").view(f"<u{FORMATS[target].size}")
    bits = numbers.view(np.uint32)
    # Half of the last place, less one where the kept part is even, carries upwards; a NaN must not carry into zero.
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded)


def shown(bits: Bits, dtype: str) -> str:
    """Elements for a message: numbers where numpy has the type, else hexadecimal bytes."""
    row = np.ascontiguousarray(bits)
    if dtype == "BF16":
        numbers: Any = (row.astype(np.uint32) << 16).view(np.float32)
    elif dtype[0] in "IF" and not dtype.startswith("F8"):
        numbers = row.view(f"<{dtype[0].lower()}{FORMATS[dtype].size}")
    elif dtype in ("U8", "U16", "U32", "U64", "BOOL"):
        numbers = row
    else:
        return "[" + " ".join(f"0x{int(value):0{2 * FORMATS[dtype].size}x}" for value in row) + "]"
    return "[" + " ".join(_short(number) for number in numbers.tolist()) + "]"


def _short(number: float) -> str:
    return str(number) if isinstance(number, int) or not math.isfinite(number) else f"{number:.6g}"
