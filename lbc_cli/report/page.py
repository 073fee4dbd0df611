"""The run on one page: `report.html`, a file that needs nothing but a browser.

Styles and curves are within it; nothing is fetched, no script runs, and every text that comes from a recipe, a path or
a model's name is escaped. Light and dark follow the reader's system. What is saved on paper and what was measured stand
in tables of their own.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from lbc_cli.report.charts import charts
from lbc_cli.report.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_density,
    format_percent,
    format_ratio,
    format_shape,
    plural,
)
from lbc_cli.report.page_style import STYLE
from lbc_cli.report.plots import BLUE, PANELS, Panel, Series
from lbc_cli.report.tables import format_result, result_label
from lbc_cli.report.views import CostView, LayerView, SkippedView

Status = Literal["running", "done", "interrupted", "diverged", "failed"]
SHOWN = 60  # layers listed at once; the others are folded away
SPEED = Panel(
    "Throughput, as measured",
    "images/s in training",
    (Series("images_per_second", "images/s", BLUE),),
    bottom=0.0,
)
_WRAPPED = ("why", "note", "value", "default", "from", "what", "on paper")  # columns of sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A key of the recipe that is not at its default."""

    key: str
    value: str
    default: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """What the page shows; what is not known yet is left out.

    Attributes:
        status: where the run stands.
        message: how it ended, if it did not come to its end.
        progress: how far it is, such as "epoch 3 of 24".
        written: when the page was.
        facts: label -> value: recipe, data, batch, hardware, versions.
        results: metric -> value, as in the last epoch's record.
        best: label and value of the best epoch; None where there is none yet.
        epochs: the epoch records, for the curves.
        layers: with their densities now.
        cost: as planned, while the run has not come to its end.
        memory: kind -> bytes held by the method at its peak.
        measured: what -> value, all of it measured.
        settings: what is not at its default, and where it was set.
        recipe: the whole of it, TOML.
        environment: label -> value.
        command: the command line.
        verified: the verifier's verdict on the checkpoint; None before there is one.
        checked: label -> value: what the verifier looked at.
        findings: the verifier's.
        warnings: of the run.
    """

    title: str
    status: Status
    message: str = ""
    progress: str = ""
    written: str = ""
    facts: Mapping[str, str]
    results: Mapping[str, float | None] = field(default_factory=dict)
    best: tuple[str, str] | None = None
    epochs: Sequence[Mapping[str, Any]] = ()
    layers: Sequence[LayerView] = ()
    skipped: Sequence[SkippedView] = ()
    cost: CostView | None = None
    dense_bytes: int | None = None
    file_bytes: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[Setting] = ()
    recipe: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    verified: bool | None = None
    checked: Mapping[str, str] = field(default_factory=dict)
    findings: Sequence[str] = ()
    warnings: Sequence[str] = ()


def write_page(page: RunPage, path: str | PathLike[str]) -> None:
    """Write the page, replacing an earlier one at once.

    Raises:
        OutputError: if it cannot be written.
    """
    from lbc_cli.checkpoint.files import atomic_write_text

    atomic_write_text(path, render(page))


def render(page: RunPage) -> str:
    """The page as HTML."""
    body = "".join(
        (
            _head(page),
            _figures(page),
            _warnings(page.warnings),
            _curves(page),
            _settings(page),
            _layers(page),
            _skipped(page.skipped),
            _pair(_paper(page), _measured(page.measured)),
            _pair(_checkpoint(page), _memory(page.memory)),
            _pair(_section("Run", _pairs(page.facts)), _section("Environment", _environment(page))),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'\"><title>{escape(page.title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def escape(text: str) -> str:
    """A text as HTML may hold it: no markup, no quotes; escapes for what cannot be printed or turns a line around."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text))


def _head(page: RunPage) -> str:
    said = f'<p class="message">{escape(page.message)}</p>' if page.message else ""
    verdict = {True: "verified", False: "not as it claims", None: ""}[page.verified]
    badge = f'<span class="badge {"done" if page.verified else "failed"}">{verdict}</span>' if verdict else ""
    place = ", ".join(filter(None, (page.progress, page.written and f"written {page.written}")))
    return (
        f'<header><h1>{escape(page.title)}</h1><p><span class="badge {page.status}">{page.status}</span>{badge}'
        f'<span class="soft">{escape(place)}</span></p>{said}</header>'
    )


def _figures(page: RunPage) -> str:
    """The results, large."""
    cells = [(result_label(name), format_result(name, value)) for name, value in page.results.items()]
    if page.best is not None:
        cells.insert(1, page.best)
    known = [layer for layer in page.layers if layer.density is not None]
    if size := sum(math.prod(layer.shape) for layer in known):
        kept = sum(math.prod(layer.shape) * (layer.density or 0.0) for layer in known)
        cells.append(("density of the sparse layers", format_density(kept / size)))
    if page.file_bytes is not None:
        cells.append(("checkpoint", format_bytes(page.file_bytes)))
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in cells)
    return f'<section class="figures">{shown}</section>' if shown else ""


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>' if items else ""


def _curves(page: RunPage) -> str:
    drawn = "".join(charts([*PANELS, SPEED], page.epochs))
    return _section("Curves, by epoch", f'<div class="charts">{drawn}</div>' if drawn else "")


def _layers(page: RunPage) -> str:
    rows = [
        (
            layer.name,
            format_shape(layer.shape),
            layer.pattern,
            _groups(layer),
            format_density(layer.density),
            layer.note,
        )
        for layer in page.layers
    ]
    columns = ("layer", "shape", "pattern", "groups", "density", "note")
    used = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    table = _table([columns[n] for n in used], [[row[n] for n in used] for row in rows], numbers={"groups", "density"})
    return _section(f"Sparse layers ({len(rows)})", _folded(table, len(rows)) if rows else "")


def _groups(layer: LayerView) -> str:
    """How many groups of a layer have a mask of their own: M weights of each of V output channels."""
    match = re.match(r"\d+:(\d+)(?:/(\d+))?", layer.pattern)
    return str(math.prod(layer.shape) // (int(match[1]) * int(match[2] or 1))) if match else ""


def _skipped(skipped: Sequence[SkippedView]) -> str:
    rows = [(layer.name, format_shape(layer.shape), layer.reason) for layer in skipped]
    table = _table(("layer", "shape", "why"), rows)
    return _section(f"Layers that stay dense ({len(rows)})", _folded(table, len(rows)) if rows else "")


def _paper(page: RunPage) -> str:
    """What is counted."""
    cost = page.cost
    if cost is None:
        return ""
    rows = [
        _versus("parameters", cost.parameters_dense, cost.parameters_sparse),
        _versus("multiply-adds per image", cost.macs_dense, cost.macs_sparse),
    ]
    if page.dense_bytes and page.file_bytes:
        share = format_ratio(page.file_bytes, page.dense_bytes)
        rows.append(("checkpoint", format_bytes(page.dense_bytes), format_bytes(page.file_bytes), share))
    if cost.training_macs is not None and cost.training_share is not None:
        trained = round(cost.training_macs * cost.training_share)
        rows.append(_versus("multiply-adds of training", cost.training_macs, trained))
    if cost.teacher_share:
        rows.append(("of them the teacher's", MISSING, MISSING, format_percent(cost.teacher_share)))
    columns = ("on paper", "dense", "sparse", "share")
    kind = "counted" if page.status == "done" else "planned"
    remark = '<p class="soft">Not measured: zeros make no dense kernel faster.</p>'
    return _section(f"Savings on paper, as {kind}", _table(columns, rows, numbers=set(columns[1:])) + remark)


def _versus(name: str, dense: int | None, sparse: int | None) -> tuple[str, ...]:
    return name, format_count(dense), format_count(sparse), format_ratio(sparse, dense)


def _measured(measured: Mapping[str, str]) -> str:
    table = _table(("what", "measured"), measured.items(), numbers={"measured"})
    return _section("Time and memory, as measured", table if measured else "")


def _checkpoint(page: RunPage) -> str:
    """The verifier's verdict."""
    if page.verified is None:
        return ""
    sparse = plural(len(page.layers), "sparse layer")
    said = f"ok: {sparse} verified" if page.verified else f"violations: {plural(len(page.findings), 'finding')}"
    kind = "done" if page.verified else "failed"
    findings = "".join(f"<li>{escape(finding)}</li>" for finding in page.findings)
    listed = f"<ul>{findings}</ul>" if findings else ""
    badge = f'<p><span class="badge {kind}">{said}</span></p>'
    return _section("Checkpoint, as verified", badge + listed + _pairs(page.checked))


def _memory(memory: Mapping[str, int]) -> str:
    held = [*memory.items(), ("total", sum(memory.values()))]
    rows = [(kind, format_bytes(size)) for kind, size in held]
    table = _table(("held", "size"), rows, numbers={"size"})
    return _section("Memory of the method, at its peak", table if memory else "")


def _settings(page: RunPage) -> str:
    rows = [(setting.key, setting.value, setting.default, setting.origin) for setting in page.settings]
    changed = _table(("key", "value", "default", "from"), rows) if rows else "<p>All at their defaults.</p>"
    changed = f'<div class="loose">{changed}</div>'
    whole = f"<details><summary>The whole recipe</summary><pre>{escape(page.recipe)}</pre></details>"
    return _section("Settings that are not defaults", changed + (whole if page.recipe else ""))


def _environment(page: RunPage) -> str:
    command = f'<p class="soft">Command line</p><pre class="command">{escape(page.command)}</pre>'
    return _pairs(page.environment) + (command if page.command else "")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _pair(first: str, second: str) -> str:
    """Two sections beside each other where there is room."""
    return f'<div class="pair">{first}{second}</div>' if first and second else first + second


def _pairs(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[str] | frozenset[str] = frozenset()
) -> str:
    kinds = [_kind(column, numbers) for column in columns]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for column, kind in zip(columns, kinds, strict=True))
    lines = [
        "".join(f"<td{kind}>{_breakable(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _breakable(text: str) -> str:
    """Dotted keys and paths may go on in the next line behind their parts."""
    return re.sub(r"([._/])(?=[A-Za-z_])", r"\1<wbr>", escape(text))


def _kind(column: str, numbers: set[str] | frozenset[str]) -> str:
    """Numbers stand to the right; names and shapes stay on their line, sentences do not."""
    if column in numbers:
        return ' class="number"'
    return ' class="text"' if column in _WRAPPED else ""


def _folded(table: str, rows: int) -> str:
    if rows <= SHOWN:
        return table
    return f"<details><summary>{plural(rows, 'row')}</summary>{table}</details>"
