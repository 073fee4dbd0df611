"""A sweep as tables: the runs that there are to do, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lbc_cli.report.console import Console
from lbc_cli.report.formats import (
    MISSING,
    format_accuracy,
    format_density,
    format_number,
    format_percent,
    format_seconds,
    plural,
)
from lbc_cli.report.tables import Align, Parts, result_label, table

if TYPE_CHECKING:
    from lbc_cli.sweeps import Statistic, Sweep, SweepSummary

SHOWN = ("top1", "val_loss", "ema_top1")  # the files have all


def format_runs(sweep: Sweep, states: Mapping[str, str]) -> Parts:
    """The runs of a sweep in their order, and what there is to do for each."""
    columns: dict[str, Align] = {"run": "left", **dict.fromkeys(sweep.headings, "left"), "seed": "right", "": "left"}
    rows = [[run.name, *run.labels.values(), str(run.seed), states[run.name]] for run in sweep.runs]
    return (table(f"Sweep {sweep.name} ({plural(len(rows), 'run')})", columns, rows),)


def format_sweep(summary: SweepSummary) -> Parts:
    """Mean, standard deviation and number over the seeds of every cell."""
    shown = [name for name in SHOWN if name in summary.metrics]
    columns: dict[str, Align] = dict.fromkeys(summary.headings, "left")
    for name in shown:
        columns |= {result_label(name): "right", f"± {result_label(name)}": "right"}
    columns |= dict.fromkeys(("n", "density", "training MACs", "time of a run"), "right")
    rows = []
    for cell in summary.cells:
        numbers = [text for name in shown for text in _texts(name, cell.metric(name))]
        counted = [str(cell.n), format_density(cell.density.mean), format_percent(cell.training.mean)]
        counted.append(format_seconds(cell.seconds.mean))
        rows.append([*cell.labels.values(), *numbers, *counted])
    missing = sum(cell.missing for cell in summary.cells)
    remark = (
        "±: standard deviation over seeds, n - 1; MACs on paper, of dense training; time as measured, one thread a run"
    )
    left = f"; {plural(missing, 'run')} not done" if missing else ""
    return (table(f"Sweep {summary.name}", columns, rows, caption=remark + left),)


def _texts(name: str, found: Statistic) -> list[str]:
    show = format_accuracy if name.removeprefix("ema_").startswith("top") else format_number
    return [show(found.mean) if found.values else MISSING, show(found.deviation)]


def print_runs(console: Console, sweep: Sweep, states: Mapping[str, str]) -> None:
    """Print the runs of a sweep to stdout."""
    console.result(*format_runs(sweep, states))


def print_sweep(console: Console, summary: SweepSummary) -> None:
    """Print what came of a sweep to stdout."""
    console.result(*format_sweep(summary))
