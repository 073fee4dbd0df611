"""Numbers as people read them, and objects as JSON: plain strings, ASCII, no terminal needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "-"
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def _three(value: float) -> str:
    """Three significant digits without an exponent; whole parts in full."""
    digits = next((digits for digits in (2, 1) if abs(round(value, digits)) < 10 ** (3 - digits)), 0)
    return f"{value:.{digits}f}"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    """`value` in the unit in which it reads as less than `base`; whole numbers below `base` as they are."""
    if abs(value) < base and value == int(value):
        return f"{value:.0f} {units[0]}".rstrip()
    for unit in units[:-1]:
        if abs(float(_three(value))) < base:
            return f"{_three(value)} {unit}".rstrip()
        value /= base
    return f"{_three(value)} {units[-1]}"


def format_bytes(count: float | None) -> str:
    """Bytes in binary units: 0 B, 1.50 KiB, 43.7 MiB."""
    return MISSING if count is None else _scaled(count, 1024, _BINARY)


def format_count(count: float | None) -> str:
    """A number of things in decimal units: 640, 11.7 M, 1.82 G."""
    return MISSING if count is None else _scaled(count, 1000, _DECIMAL)


def format_seconds(seconds: float | None) -> str:
    """A duration: 35.0 us, 4.20 ms, 12.3 s, 4 min 07 s, 2 h 05 min, 3 d 04 h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if float(_three(seconds)) < 60:
        return _short_seconds(seconds)
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_left(seconds: float | None) -> str:
    """An estimate of the time left, which deserves no fractions: 7 s, 4 min 07 s."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    return f"{math.ceil(seconds)} s" if seconds <= 59 else format_seconds(math.ceil(seconds))


def _short_seconds(seconds: float) -> str:
    """Less than a minute, in the unit that keeps it at 1 or above."""
    if seconds == 0:
        return "0 s"
    for value, unit in ((seconds, "s"), (1e3 * seconds, "ms")):
        if float(_three(value)) >= 1:
            return f"{_three(value)} {unit}"
    return f"{_three(1e6 * seconds)} us"


def format_percent(share: float | None, digits: int = 1) -> str:
    """A share of one as a percentage: 0.123 is 12.3 %."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def format_accuracy(percent: float | None) -> str:
    """An accuracy that is a percentage already: 76.54 %."""
    return MISSING if percent is None else f"{percent:.2f} %"


def format_ratio(part: float | None, whole: float | None) -> str:
    """What `part` is of `whole`, as a percentage; missing where there is no whole."""
    return MISSING if part is None or not whole else format_percent(part / whole)


def format_change(value: float, base: float) -> str:
    """How far `value` is above or below `base`: +2.1 %, -0.4 %; missing where there is no base."""
    return MISSING if not base else f"{100 * (value / base - 1):+.1f} %"


def format_number(value: float | None, digits: int = 4) -> str:
    """A number with this many decimals; a NaN stays visible."""
    return MISSING if value is None else f"{value:.{digits}f}"


def format_density(density: float | None) -> str:
    """A density with four decimals, with six where four would hide a difference: 0.5000, 0.499997."""
    if density is None:
        return MISSING
    return f"{density:.6f}".removesuffix("00")


def format_rate(value: float | None) -> str:
    """A learning rate with three significant digits: 0.1, 0.0345, 1.2e-05."""
    return MISSING if value is None else f"{value:.3g}"


def format_shape(shape: Sequence[int]) -> str:
    """A shape as the field writes it: 64x64x3x3."""
    return "x".join(str(size) for size in shape) or "scalar"


def one_line(text: str) -> str:
    """The text on one line: line breaks become spaces, characters that a terminal would obey become escapes."""
    joined = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


def plural(count: int, noun: str) -> str:
    """The count with its noun: 1 layer, 2 layers."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
