"""What `lbc prune` and `lbc convert` have written, as a table and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from lbc_cli.report.console import Console
from lbc_cli.report.formats import (
    format_bytes,
    format_density,
    format_percent,
    format_ratio,
    format_seconds,
    format_shape,
    one_line,
    plural,
)
from lbc_cli.report.tables import Align, Columns, format_facts, format_skipped, format_verdict, table
from lbc_cli.report.views import SkippedView
from lbc_cli.runs import plain

if TYPE_CHECKING:
    from lbc_cli.oneshot import Outcome, PrunedLayer

_NOTES_SHOWN = 8


def print_pruned(console: Console, outcome: Outcome) -> None:
    """Print the result of pruning or converting to stdout."""
    console.result(*format_pruned(outcome))


def format_pruned(outcome: Outcome) -> tuple[RenderableType, ...]:
    """Layers, sizes, times as measured, and the verifier's word."""
    skipped = [SkippedView(name=s.name, shape=tuple(s.shape), reason=s.reason) for s in outcome.skipped]
    facts = {
        "weights": outcome.origin,
        "method": outcome.method,
        "checkpoint": str(outcome.path),
        "size": f"{format_bytes(outcome.file_bytes)}, {format_ratio(outcome.file_bytes, outcome.dense_bytes)} of dense",
    }
    rows = [[what, format_seconds(seconds)] for what, seconds in outcome.seconds.items()]
    findings = [finding.message for finding in outcome.report.findings]
    return (
        outcome.title,
        _format_layers(outcome.layers),
        *([format_skipped(skipped)] if skipped else []),
        table("Time as measured", {"what": "left", "time": "right"}, rows),
        *_format_notes(outcome.notes),
        format_facts(facts),
        format_verdict(outcome.report.ok, findings, len(outcome.layers)),
    )


def _format_layers(layers: tuple[PrunedLayer, ...]) -> RenderableType:
    """One row per layer; magnitudes and notes have a column only where there are any."""
    columns: dict[str, Align] = {"layer": "left", "shape": "left", "pattern": "left", "density": "right"}
    pruned = any(layer.magnitude is not None for layer in layers)
    noted = any(layer.note for layer in layers)
    columns |= dict.fromkeys(["kept |w|"] if pruned else [], "right")
    columns |= dict.fromkeys(["note"] if noted else [], "left")
    rows = [
        [
            layer.name,
            format_shape(layer.shape),
            layer.pattern,
            format_density(layer.density),
            *([format_percent(layer.magnitude)] if pruned else []),
            *([layer.note] if noted else []),
        ]
        for layer in layers
    ]
    caption = "kept |w|: share of the sum of magnitudes" if pruned else ""
    return table(f"Sparse layers ({len(layers)})", columns, rows, caption=caption)


def _format_notes(notes: tuple[str, ...]) -> list[RenderableType]:
    if not notes:
        return []
    rest = len(notes) - _NOTES_SHOWN
    more = [[f"and {plural(rest, 'note')} more"]] if rest > 0 else []
    columns: Columns = {"note": "left"}
    return [table("Notes", columns, [*([one_line(note)] for note in notes[:_NOTES_SHOWN]), *more])]


def pruned_record(outcome: Outcome) -> dict[str, Any]:
    """The result as JSON prints it."""
    names = ("path", "title", "method", "origin", "layers", "notes", "dense_bytes", "file_bytes", "seconds")
    record = {name: plain(getattr(outcome, name)) for name in names}
    return {**record, "dense": plain(outcome.skipped), "verified": outcome.report.ok}
