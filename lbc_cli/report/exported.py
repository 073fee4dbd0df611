"""Exports: the formats there are, and what one of them wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from lbc_cli.report.console import Console
from lbc_cli.report.formats import format_bytes, format_ratio, format_shape, one_line
from lbc_cli.report.tables import Align, format_facts, format_skipped, format_verdict, table
from lbc_cli.report.views import SkippedView

if TYPE_CHECKING:
    from lbc_cli.exports import ExportedLayer, Exporter, ExportResult


def format_formats(exporters: Iterable[Exporter]) -> RenderableType:
    """The formats, what runs each, and which extra it needs."""
    columns: dict[str, Align] = {"format": "left", "artefact": "left", "runs on": "left", "dtypes": "left"}
    rows = [
        [
            exporter.name,
            exporter.description,
            exporter.runs_on + (f"; needs pip install 'lbc-cli[{exporter.extra}]'" if exporter.extra else ""),
            ", ".join(exporter.dtypes) or "the checkpoint's",
        ]
        for exporter in exporters
    ]
    return table("Formats", columns, rows)


def format_export(
    result: ExportResult, checkpoint_bytes: int | None = None, runs_on: str = ""
) -> tuple[RenderableType, ...]:
    """What was written: its size, its layers, what to know of it, and the verifier's verdict in the last line.

    Args:
        result: of the export.
        checkpoint_bytes: size of the checkpoint, to compare with.
        runs_on: what loads or runs the format.
    """
    share = f", {format_ratio(result.bytes, checkpoint_bytes)} of the checkpoint" if checkpoint_bytes else ""
    facts = {"written": str(result.path), "size": f"{format_bytes(result.bytes)}{share}"}
    facts |= {"for": runs_on} if runs_on else {}
    facts |= {name: _shown(value) for name, value in result.checks.items()}
    sparse = [layer for layer in result.layers if layer.pattern]
    dense = [SkippedView(name=e.name, shape=e.shape, reason=e.reason) for e in result.layers if not e.pattern]
    findings = [finding.message for finding in result.verified.findings]
    return (
        Text(f"Export: {one_line(result.format)}", style="bold"),
        format_facts(facts),
        *([_format_layers(sparse)] if sparse else []),
        *([format_skipped(dense)] if dense else []),
        *(Text(f"note: {one_line(note)}") for note in result.notes),
        format_verdict(result.verified.ok, findings, len(result.verified.layers)),
    )


def print_export(
    console: Console, result: ExportResult, checkpoint_bytes: int | None = None, runs_on: str = ""
) -> None:
    """Print what was written to stdout."""
    console.result(*format_export(result, checkpoint_bytes, runs_on))


def print_formats(console: Console, exporters: Iterable[Exporter]) -> None:
    """Print the formats to stdout."""
    console.result(format_formats(exporters))


def _format_layers(layers: list[ExportedLayer]) -> RenderableType:
    """One row per sparse layer of the checkpoint; remarks have a column only where there are any."""
    columns: dict[str, Align] = {"layer": "left", "shape": "left", "pattern": "left", "stored": "left"}
    remarked = any(layer.reason for layer in layers)
    if remarked:
        columns["remark"] = "left"
    rows = [
        [layer.name, format_shape(layer.shape), layer.pattern, layer.stored, *([layer.reason] if remarked else [])]
        for layer in layers
    ]
    return table(f"Sparse layers ({len(layers)})", columns, rows)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
