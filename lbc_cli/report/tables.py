"""Plans, summaries and reports as tables. `format_*` returns what to render, `print_*` prints it to stdout.

What is saved on paper (parameters, MACs, bytes) and what was measured (seconds) never share a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lbc_cli.report.console import Console
from lbc_cli.report.formats import (
    MISSING,
    format_accuracy,
    format_bytes,
    format_change,
    format_count,
    format_density,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
    format_seconds,
    format_shape,
    one_line,
    plural,
)
from lbc_cli.report.views import (
    CheckedLayerView,
    CostView,
    CountedLayerView,
    EpochView,
    LayerView,
    PlanView,
    SkippedView,
    StepTiming,
    SummaryView,
    TrainBenchView,
    VerifyView,
    ViolationView,
)
from lbc_cli.runs import plain

Align = Literal["left", "right"]
Columns = Mapping[str, Align]
Cell = str | Text
Parts = tuple[RenderableType, ...]

LAYERS_SHOWN = 4  # layers whose violating groups are listed; every layer's are counted
NAMES_SHOWN = 4  # names of skipped layers listed per reason; their number is always given


def table(title: str, columns: Columns, rows: Sequence[Sequence[Cell]], *, caption: str = "") -> RenderableType:
    """A table in the one style of all reports, with an empty line below.

    Args:
        title: above the table.
        columns: heading -> alignment; right-aligned columns are numbers and never wrap.
        rows: one cell per column, taken literally.
        caption: a remark below the table.
    """
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading, align in columns.items():
        grid.add_column(heading, justify=align, no_wrap=align == "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    above = [Text(title, style="bold")] if title else []
    below = [Text(caption, style="dim")] if caption else []
    return Group(*above, grid, *below, "")


def format_facts(facts: Mapping[str, str]) -> RenderableType:
    """Labels and values in two columns without a frame, with an empty line below."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, value in facts.items():
        grid.add_row(label, value)
    return Group(grid, "")


def format_layers(layers: Sequence[LayerView], title: str = "Sparse layers") -> RenderableType:
    """One row per sparse layer; patterns and notes have a column only where there are any."""
    columns: dict[str, Align] = {
        "layer": "left",
        "shape": "left",
        "pattern": "left",
        "density": "right",
        "note": "left",
    }
    cells = [
        (layer.name, format_shape(layer.shape), layer.pattern, format_density(layer.density), layer.note)
        for layer in layers
    ]
    empty = {name for number, name in enumerate(columns) if not any(row[number] for row in cells)}
    rows = [[cell for name, cell in zip(columns, row, strict=True) if name not in empty] for row in cells]
    return table(f"{title} ({len(layers)})", {name: columns[name] for name in columns if name not in empty}, rows)


def format_skipped(skipped: Sequence[SkippedView]) -> RenderableType:
    """The dense layers by reason, with their number, their weights and the first of their names."""
    reasons: dict[str, list[SkippedView]] = {}
    for layer in skipped:
        reasons.setdefault(layer.reason, []).append(layer)
    rows = [
        [reason, str(len(group)), _some_names([layer.name for layer in group])] for reason, group in reasons.items()
    ]
    return table(
        f"Layers that stay dense ({len(skipped)})", {"reason": "left", "layers": "right", "names": "left"}, rows
    )


def _some_names(names: Sequence[str]) -> str:
    shown = names if len(names) <= NAMES_SHOWN else names[: NAMES_SHOWN - 1]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def format_schedule(schedule: Sequence[EpochView]) -> RenderableType:
    """The schedule, one row for each stretch of epochs with the same density; epochs count from 0."""
    patterns = list(schedule[0].survivors) if schedule else []
    columns: dict[str, Align] = {"epochs": "left", "density": "right"}
    columns |= dict.fromkeys((f"alive {pattern}" for pattern in patterns), "right")
    columns["learning rate"] = "left"
    rows = []
    for _, stretch in groupby(schedule, key=lambda epoch: (epoch.density, tuple(epoch.survivors.items()))):
        first, *others = stretch
        last = others[-1] if others else first
        alive = [str(first.survivors[pattern]) for pattern in patterns]
        epochs = _span(str(first.epoch), str(last.epoch), "-")
        rows.append([epochs, format_density(first.density), *alive, _span(format_rate(first.lr), format_rate(last.lr))])
    caption = "alive: candidates (or weights) per group still in the running" if patterns else ""
    return table("Schedule", columns, rows, caption=caption)


def _span(first: str, last: str, between: str = " to ") -> str:
    return first if first == last else f"{first}{between}{last}"


def format_memory(memory: Mapping[str, int], dense_parameters: int) -> RenderableType:
    """What the method holds, in bytes and beside the model's own weights in float32."""
    rows = [[name, format_bytes(count), format_ratio(count, 4 * dense_parameters)] for name, count in memory.items()]
    total = sum(memory.values())
    rows.append(["total", format_bytes(total), format_ratio(total, 4 * dense_parameters)])
    columns: Columns = {"held": "left", "size": "right", "of the weights": "right"}
    return table("Memory of the method, at its peak", columns, rows)


def format_cost(cost: CostView, dense_bytes: int | None = None, file_bytes: int | None = None) -> RenderableType:
    """Dense against sparse, as counted: parameters, MACs and, where known, bytes."""
    rows = [
        _versus("parameters", cost.parameters_dense, cost.parameters_sparse, "count"),
        _versus("MACs per image", cost.macs_dense, cost.macs_sparse, "count"),
    ]
    if dense_bytes is not None or file_bytes is not None:
        rows.append(_versus("checkpoint", dense_bytes, file_bytes, "bytes"))
    if cost.training_macs is not None:
        share = cost.training_share
        trained = None if share is None else cost.training_macs * share
        rows.append(["training MACs", format_count(cost.training_macs), format_count(trained), format_percent(share)])
    if cost.teacher_share:
        rows.append(["of them the teacher's", MISSING, MISSING, format_percent(cost.teacher_share)])
    columns: Columns = {"on paper": "left", "dense": "right", "sparse": "right", "share": "right"}
    return table("Savings as counted (not measured time)", columns, rows)


def _versus(name: str, dense: int | None, sparse: int | None, kind: Literal["count", "bytes"]) -> list[str]:
    show = format_bytes if kind == "bytes" else format_count
    return [name, show(dense), show(sparse), format_ratio(sparse, dense)]


def format_plan(plan: PlanView) -> Parts:
    """What a run would do, before any of it is done."""
    return (
        _title(f"Plan: {plan.title}"),
        format_facts(plan.facts),
        *([format_layers(plan.layers)] if plan.layers else []),
        *([format_skipped(plan.skipped)] if plan.skipped else []),
        format_schedule(plan.schedule),
        *([format_memory(plan.memory, plan.cost.parameters_dense)] if plan.memory else []),
        format_cost(plan.cost),
    )


def format_summary(summary: SummaryView) -> Parts:
    """How a run ended."""
    return (
        _title(f"Summary: {summary.title}"),
        *([format_layers(summary.layers)] if summary.layers else []),
        *([format_skipped(summary.skipped)] if summary.skipped else []),
        format_cost(summary.cost, summary.dense_bytes, summary.file_bytes),
        *([format_memory(summary.memory, summary.cost.parameters_dense)] if summary.memory else []),
        _format_times(summary.times),
        _format_results(summary.results),
        format_facts({**summary.facts, **summary.files}),
        format_verdict(summary.verified, summary.findings, len(summary.layers)),
    )


def _format_times(times: Mapping[str, float]) -> RenderableType:
    rows = [[name, format_seconds(seconds)] for name, seconds in times.items()]
    return table("Time as measured", {"what": "left", "time": "right"}, rows)


def _format_results(results: Mapping[str, float | None]) -> RenderableType:
    rows = [[result_label(name), format_result(name, value)] for name, value in results.items()]
    return table("Results", {"metric": "left", "value": "right"}, rows)


def result_label(name: str) -> str:
    """A metric's name as people write it: ema_top1 is "top-1 (EMA)"."""
    stem = name.removeprefix("ema_")
    labels = {"top1": "top-1", "top5": "top-5", "val_loss": "validation loss", "train_loss": "training loss"}
    return labels.get(stem, stem.replace("_", " ")) + (" (EMA)" if stem != name else "")


def format_result(name: str, value: float | None) -> str:
    """A metric's value: accuracies as percentages, anything else with four decimals."""
    return format_accuracy(value) if name.removeprefix("ema_").startswith("top") else format_number(value)


def format_verdict(
    verified: bool | None, findings: Sequence[str], layers: int, *, warnings: Sequence[str] = ()
) -> Text:
    """Warnings and findings, and below them the last line: ok, violations, or that nothing was verified."""
    if verified is None:
        last, style = "not verified", "yellow"
    elif verified:
        last = f"ok: {plural(layers, 'sparse layer')} verified" if layers else "ok: no layer claims a pattern"
        style = "green"
    else:
        last, style = f"violations: {plural(len(findings), 'finding')}", "red"
    notes, lines = ("".join(f"  {one_line(text)}\n" for text in texts) for texts in (warnings, findings))
    return Text().append(notes, style="yellow").append(lines, style="yellow" if verified else style).append(last, style)


def format_verify(view: VerifyView) -> Parts:
    """What the verifier found, layer by layer, and its verdict in the last line."""
    return (
        _title(f"Verify: {view.path}"),
        *([format_facts(view.facts)] if view.facts else []),
        *([_format_checked(view.layers)] if view.layers else []),
        *([_format_counted(view.counted)] if view.counted else []),
        *([format_skipped(view.skipped)] if view.skipped else []),
        *([_format_violations(view.violations)] if view.violations else []),
        format_verdict(view.ok, view.findings, len(view.layers) + len(view.counted), warnings=view.warnings),
    )


def _format_checked(layers: Sequence[CheckedLayerView]) -> RenderableType:
    """One row per layer; groups that are not full have a column only where there are any."""
    columns: dict[str, Align] = {"layer": "left", "shape": "left", "pattern": "left", "density": "right"}
    unfilled = any(layer.under_filled for layer in layers)
    columns |= dict.fromkeys(["groups", *(["not full"] if unfilled else []), "violations"], "right")
    rows: list[list[Cell]] = [
        [
            layer.name,
            format_shape(layer.shape),
            layer.pattern,
            format_density(layer.density),
            str(layer.groups),
            *([str(layer.under_filled)] if unfilled else []),
            Text(str(layer.violations), style="red" if layer.violations else ""),
        ]
        for layer in layers
    ]
    return table(f"Sparse layers ({len(layers)})", columns, rows)


def _format_counted(layers: Sequence[CountedLayerView]) -> RenderableType:
    columns: Columns = {"layer": "left", "shape": "left", "density": "right", "non-zero": "right", "claimed": "right"}
    rows: list[list[Cell]] = [
        [
            layer.name,
            format_shape(layer.shape),
            format_density(layer.density),
            Text(str(layer.nonzeros), style="" if layer.nonzeros == layer.claimed else "red"),
            str(layer.claimed),
        ]
        for layer in layers
    ]
    return table(f"Sparse layers without a pattern ({len(layers)})", columns, rows)


def _format_violations(violations: Sequence[ViolationView]) -> RenderableType:
    """The first violating groups, of the first layers that have any."""
    layers = list(dict.fromkeys(violation.layer for violation in violations))
    rows = [
        [v.layer, v.place, str(v.group), str(v.used), v.values] for v in violations if v.layer in layers[:LAYERS_SHOWN]
    ]
    columns: Columns = {"layer": "left", "place": "left", "group": "right", "used": "right", "values": "left"}
    rest = len(layers) - LAYERS_SHOWN
    caption = f"and groups of {plural(rest, 'more layer')}: --json lists them" if rest > 0 else ""
    return table("First violating groups", columns, rows, caption=caption)


def format_train_bench(view: TrainBenchView) -> Parts:
    """A dense training step beside a method's, as measured."""
    columns: Columns = {
        "step": "left",
        "median": "right",
        "quartiles": "right",
        "against dense": "right",
        "images/s": "right",
        "peak memory": "right",
    }
    rows = [_timing_row(timing, view) for timing in (view.dense, view.method)]
    return (
        _title(f"Training step: {view.title}"),
        *([format_facts(view.facts)] if view.facts else []),
        table(
            "Time as measured", columns, rows, caption=f"{view.steps} interleaved steps of each, {view.images} images"
        ),
        f"hooks: {format_seconds(view.hooks)} a step, {format_percent(view.hooks_share)} of a dense step",
    )


def _timing_row(timing: StepTiming, view: TrainBenchView) -> list[str]:
    against = MISSING if timing is view.dense else format_change(timing.median, view.dense.median)
    spread = f"{format_seconds(timing.first_quartile)} - {format_seconds(timing.third_quartile)}"
    rate = f"{view.images / timing.median:.1f}" if timing.median else MISSING
    return [timing.name, format_seconds(timing.median), spread, against, rate, format_bytes(timing.peak_bytes)]


def train_bench_record(view: TrainBenchView) -> dict[str, Any]:
    """The bench as JSON prints it, with what follows from the measurements."""
    return {**plain(view), "overhead": view.overhead, "hooks_share": view.hooks_share}


def _title(text: str) -> Text:
    return Text(text, style="bold")


def print_plan(console: Console, plan: PlanView) -> None:
    """Print a plan to stdout."""
    console.result(*format_plan(plan))


def print_summary(console: Console, summary: SummaryView) -> None:
    """Print a summary to stdout."""
    console.result(*format_summary(summary))


def print_verify(console: Console, view: VerifyView) -> None:
    """Print a verifier's report to stdout."""
    console.result(*format_verify(view))


def print_train_bench(console: Console, view: TrainBenchView) -> None:
    """Print a training bench to stdout."""
    console.result(*format_train_bench(view))
