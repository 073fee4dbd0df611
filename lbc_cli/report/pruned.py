"""What `lbc prune` and `lbc convert` have written, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from lbc_cli.report.console import Console
from lbc_cli.report.formats import (
    format_accuracy,
    format_bytes,
    format_density,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_shape,
    one_line,
    plural,
)
from lbc_cli.report.progress import task
from lbc_cli.report.tables import Align, Columns, format_facts, format_skipped, format_verdict, table
from lbc_cli.report.views import SkippedView
from lbc_cli.runs import plain

if TYPE_CHECKING:
    from lbc_cli.oneshot import Measured, Outcome, PrunedLayer
    from lbc_cli.permute import Permutation

_NOTES_SHOWN = 8


@contextmanager
def pruning_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show how far a pruning is, one scan after the other.

    Yields:
        A function to call with what is done, how much of it, and how much there is.
    """
    with ExitStack() as open_task:
        state: dict[str, Any] = {"what": None, "done": 0, "advance": None}

        def show(what: str, done: int, total: int) -> None:
            if what != state["what"] or done < state["done"]:
                open_task.close()
                state.update(what=what, done=0, advance=open_task.enter_context(task(console, what, total)))
            state["advance"](done - state["done"])
            state["done"] = done

        yield show


def print_pruned(console: Console, outcome: Outcome) -> None:
    """Print the result of pruning or converting to stdout."""
    console.result(*format_pruned(outcome))


def format_pruned(outcome: Outcome) -> tuple[RenderableType, ...]:
    """Layers, channels, accuracies, sizes, times as measured, and the verifier's word."""
    skipped = [SkippedView(name=s.name, shape=tuple(s.shape), reason=s.reason) for s in outcome.skipped]
    rows = [[what, format_seconds(seconds)] for what, seconds in outcome.seconds.items()]
    findings = [finding.message for finding in outcome.report.findings]
    measured = outcome.measured
    return (
        outcome.title,
        _format_layers(outcome.layers),
        *([format_skipped(skipped)] if skipped else []),
        *([_format_permutation(measured.permutation)] if measured.permutation else []),
        *_format_accuracy(measured),
        table("Time as measured", {"what": "left", "time": "right"}, rows),
        *_format_notes(outcome.notes),
        format_facts(_facts(outcome)),
        format_verdict(outcome.report.ok, findings, len(outcome.layers)),
    )


def _facts(outcome: Outcome) -> dict[str, str]:
    facts = {"weights": outcome.origin, "method": outcome.method}
    measured = outcome.measured
    if seen := measured.calibration:
        uses = " and ".join(seen.uses)
        facts["calibration"] = f"{plural(seen.images, 'training image')} of {seen.data}, seed {seen.seed}, for {uses}"
    if measured.batch_norms:
        facts["batch norms"] = f"statistics of {measured.batch_norms} renewed"
    if found := measured.permutation:
        # It looks for what helps N:M along the input channels, whatever masks come after it.
        masks = "by masks along the input channels alone " if outcome.report.transposable else ""
        facts["permuted"] = (
            f"{found.permuted} of {plural(len(found.sets), 'set')} of channels; kept |w| of all sparse layers {masks}"
            f"{format_percent(found.before)} -> {format_percent(found.after)}; logits before pruning differ by "
            f"{found.difference:.0e}"
        )
    size = f"{format_bytes(outcome.file_bytes)}, {format_ratio(outcome.file_bytes, outcome.dense_bytes)} of dense"
    return {**facts, "checkpoint": str(outcome.path), "size": size}


def _format_layers(layers: tuple[PrunedLayer, ...]) -> RenderableType:
    """One row per layer; magnitudes, errors and notes have a column only where there are any."""
    columns: dict[str, Align] = {"layer": "left", "shape": "left", "pattern": "left", "density": "right"}
    pruned = any(layer.magnitude is not None for layer in layers)
    lossy = any(layer.error is not None for layer in layers)
    noted = any(layer.note for layer in layers)
    columns |= dict.fromkeys([*(["kept |w|"] if pruned else []), *(["output lost"] if lossy else [])], "right")
    columns |= dict.fromkeys(["note"] if noted else [], "left")
    rows = [
        [
            layer.name,
            format_shape(layer.shape),
            layer.pattern,
            format_density(layer.density),
            *([format_percent(layer.magnitude)] if pruned else []),
            *([format_percent(layer.error)] if lossy else []),
            *([layer.note] if noted else []),
        ]
        for layer in layers
    ]
    captions = ["kept |w|: share of the sum of magnitudes"] if pruned else []
    captions += ["output lost: share of the squared output on the calibration images"] if lossy else []
    return table(f"Sparse layers ({len(layers)})", columns, rows, caption="; ".join(captions))


def _format_permutation(found: Permutation) -> RenderableType:
    """Every set of channels with what its order has brought, or why it has none."""
    rows = [
        [
            _first(entry.layers),
            str(entry.channels),
            format_percent(entry.before),
            format_percent(entry.after),
            entry.reason or "permuted",
        ]
        for entry in found.sets
    ]
    columns: Columns = {"read by": "left", "channels": "right", "before": "right", "after": "right", "order": "left"}
    return table(
        f"Sets of channels ({len(found.sets)}), {found.permuted} permuted",
        columns,
        rows,
        caption="before, after: share of the magnitude of their sparse layers that N:M keeps",
    )


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _format_accuracy(measured: Measured) -> list[RenderableType]:
    before, after = measured.before, measured.after
    if before is None or after is None:
        return []
    rows = [
        ["top-1", format_accuracy(before.top1), format_accuracy(after.top1)],
        ["top-5", format_accuracy(before.top5), format_accuracy(after.top5)],
        ["loss", format_number(before.loss), format_number(after.loss)],
    ]
    columns: Columns = {"measured": "left", "before": "right", "after": "right"}
    size = f"{before.pixels.height} x {before.pixels.width} pixels"
    return [table(f"Accuracy on {plural(before.images, 'image')} of {before.data}, {size}", columns, rows)]


def _format_notes(notes: tuple[str, ...]) -> list[RenderableType]:
    if not notes:
        return []
    rest = len(notes) - _NOTES_SHOWN
    more = [[f"and {plural(rest, 'note')} more"]] if rest > 0 else []
    columns: Columns = {"note": "left"}
    return [table("Notes", columns, [*([one_line(note)] for note in notes[:_NOTES_SHOWN]), *more])]


def pruned_record(outcome: Outcome) -> dict[str, Any]:
    """The result as JSON prints it; what was not asked for is null."""
    names = ("path", "title", "method", "origin", "layers", "notes", "dense_bytes", "file_bytes", "seconds")
    record = {name: plain(getattr(outcome, name)) for name in names}
    measured = {name: plain(getattr(outcome.measured, name)) for name in ("calibration", "permutation", "batch_norms")}
    accuracy = {name: plain(getattr(outcome.measured, name)) for name in ("before", "after")}
    return {
        **record,
        **measured,
        "accuracy": accuracy if outcome.measured.before else None,
        "dense": plain(outcome.skipped),
        "verified": outcome.report.ok,
    }
