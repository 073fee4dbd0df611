"""The curves of a run as inline SVG, for a page: sharp at any size, in the reader's colours, values on hovering.

The panels are those of curves.png and more. Legends are HTML above a chart, where they wrap on a phone and never lie
over a line. Classes, not colours, so that the page's style has the last word on light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lbc_cli.report.plots import BLUE, GREEN, MARKED, PURPLE, VERMILLION, Panel, Series, points, removal_span

Records = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT = 400, 220  # user units; one is about a pixel on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 26
TICKS = 5  # about as many on an axis
CLASSES = {BLUE: "blue", VERMILLION: "vermillion", GREEN: "green", PURPLE: "purple"}


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to user units along an axis.

    Args:
        low: value at `start`.
        high: value at `end`; not `low`.
        start: user units.
        end: user units.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def charts(panels: Sequence[Panel], records: Records) -> list[str]:
    """A figure for every panel that has values, as HTML."""
    removal = removal_span(records)
    return [
        chart(panel, records, removal) for panel in panels if any(points(records, line.key)[0] for line in panel.series)
    ]


def chart(panel: Panel, records: Records, removal: tuple[float, float] | None = None) -> str:
    """A panel with at least one value, as HTML: title, legend, SVG.

    Args:
        panel: what to draw.
        records: epoch records.
        removal: epochs between which weights are removed, to be shaded.
    """
    lines = [(line, *points(records, line.key, line.scale)) for line in panel.series]
    lines = [found for found in lines if found[1]]
    last = max(points(records, "epoch")[0])
    x = Scale(0.5, last + 0.5, LEFT, WIDTH - RIGHT)
    low, high = _limits([value for _, _, values in lines for value in values], panel.bottom)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    drawn = [
        _shade(x, removal),
        *_grid(x, y, last),
        *(_line(line, xs, ys, x, y, held=panel.held) for line, xs, ys in lines),
    ]
    legend = _legend([line for line, _, _ in lines], shaded=removal is not None and panel.held)
    unit = "" if panel.unit == panel.title.lower() else f" <span>{escape(panel.unit)}</span>"
    return (
        f"<figure><figcaption><b>{escape(panel.title)}</b>{unit}{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)} over the epochs">'
        f"{''.join(drawn)}</svg></figure>"
    )


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers between two values, about TICKS of them.

    Args:
        low: not above `high`.
        high: the other end.
        whole: whole numbers only.
    """
    rough = (high - low) / TICKS
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A round number, short: 0.05, 2.5, 1200, 3e-05, 2.5M."""
    if abs(value) >= 1e5:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{round(value, 10):g}"


def _limits(values: Sequence[float], bottom: float | None) -> tuple[float, float]:
    """Ends of the vertical axis, with some air; never the same."""
    low, high = min(values), max(values)
    if bottom is not None:
        low = min(low, bottom)
    air = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if low == bottom else low - air), high + air


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _grid(x: Scale, y: Scale, last: float) -> list[str]:
    """Lines and labels of both axes."""
    parts = []
    for value in ticks(y.low, y.high):
        at = _number(y(value))
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".33em" text-anchor="end">{tick_label(value)}</text>')
    for value in ticks(1, last, whole=True):
        parts.append(f'<text x="{_number(x(value))}" y="{HEIGHT - 8}" text-anchor="middle">{tick_label(value)}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    return parts


def _shade(x: Scale, removal: tuple[float, float] | None) -> str:
    if removal is None:
        return ""
    start, end = (x(value) for value in removal)
    height = HEIGHT - TOP - BOTTOM
    return f'<rect class="shade" x="{_number(start)}" y="{TOP}" width="{_number(end - start)}" height="{height}"/>'


def _line(line: Series, xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale, *, held: bool) -> str:
    """A line, and a point for every value that says it."""
    places = [(x(a), y(b)) for a, b in zip(xs, ys, strict=True)]
    kind = CLASSES[line.colour] + (" dashed" if line.dashed else "")
    size = "2.6" if len(places) <= MARKED else "0"
    dots = "".join(
        f'<g><circle class="dot" cx="{_number(a)}" cy="{_number(b)}" r="{size}"/>'
        f'<circle class="hit" cx="{_number(a)}" cy="{_number(b)}" r="7"/>'
        f"<title>{escape(line.label)}, epoch {epoch:g}: {value:.5g}</title></g>"
        for (a, b), epoch, value in zip(places, xs, ys, strict=True)
    )
    return f'<g class="{kind}"><path class="line" d="{_path(places, held=held)}"/>{dots}</g>'


def _path(places: Sequence[tuple[float, float]], *, held: bool) -> str:
    """Through all places; held values change half-way between two."""
    (a, b), *rest = places
    path = f"M{_number(a)} {_number(b)}"
    for c, d in rest:
        path += f"H{_number((a + c) / 2)}V{_number(d)}H{_number(c)}" if held else f"L{_number(c)} {_number(d)}"
        a = c
    return path


def _legend(lines: Sequence[Series], *, shaded: bool) -> str:
    """What the lines are, where that is not clear from the title."""
    keys = [
        f'<span class="key {CLASSES[line.colour]}{" dashed" if line.dashed else ""}"></span>{escape(line.label)}'
        for line in lines
        if len(lines) > 1
    ]
    keys += ['<span class="key shaded"></span>weights being removed'] if shaded else []
    return f'<span class="legend">{"".join(f"<span>{key}</span>" for key in keys)}</span>' if keys else ""
