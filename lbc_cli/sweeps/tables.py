"""What came of a sweep: for every cell mean, standard deviation (n - 1) and n over its seeds; as CSV, Markdown, JSON.

The same runs give the same text, but for times. Densities are counted, times were measured: they have columns of their
own.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbc_cli.report.formats import (
    MISSING,
    format_accuracy,
    format_density,
    format_number,
    format_percent,
    format_seconds,
)
from lbc_cli.runs import to_json
from lbc_cli.sweeps.grid import Run, Sweep

METRICS = ("top1", "top5", "val_loss", "ema_top1", "ema_top5")  # of the last epoch, as far as a run has them


@dataclass(frozen=True, slots=True)
class Statistic:
    """A quantity over the seeds of a cell.

    Attributes:
        mean: None where there is no value.
        deviation: standard deviation, n - 1 in the denominator; None for fewer than two values.
        values: by seed, as the runs come.
    """

    mean: float | None
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Mean and deviation of some values."""
        mean = statistics.fmean(values) if values else None
        return cls(mean, statistics.stdev(values) if len(values) > 1 else None, tuple(values))


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of a sweep that differ in nothing but the seed.

    Attributes:
        labels: heading -> label of what varies.
        seeds: of the runs that are done.
        missing: runs that are not done.
        metrics: name in an epoch's record -> its values, in percent or as losses.
        density: kept share of the sparse layers, at the end.
        training: multiply-adds of training on paper, as a share of dense training.
        seconds: of training and evaluation, as measured.
    """

    labels: Mapping[str, str]
    seeds: tuple[int, ...]
    missing: int
    metrics: Mapping[str, Statistic]
    density: Statistic
    training: Statistic
    seconds: Statistic

    @property
    def n(self) -> int:
        """How many runs are done."""
        return len(self.seeds)

    def metric(self, name: str) -> Statistic:
        """A metric over the seeds, without values where no run has it."""
        return self.metrics.get(name, Statistic.of([]))


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """The table of a sweep.

    Attributes:
        name: of the sweep file.
        headings: of the columns that say what varies.
        cells: in the order of the file.
        runs: name -> seed, what varies, and how it ended.
        failures: name -> why the run failed.
    """

    name: str
    headings: tuple[str, ...]
    cells: tuple[Cell, ...]
    runs: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that any cell has."""
        return tuple(name for name in METRICS if any(name in cell.metrics for cell in self.cells))

    def files(self) -> list[tuple[str, str]]:
        """Name and text of every file of the summary."""
        return [
            ("summary.csv", to_csv(self)),
            ("summary.md", to_markdown(self)),
            ("summary.json", to_json(self, indent=2) + "\n"),
        ]


def summarise(
    sweep: Sweep, summaries: Mapping[str, Mapping[str, Any] | None], failures: Mapping[str, str]
) -> SweepSummary:
    """Bring the summaries of single runs into a table.

    Args:
        sweep: says which runs belong together.
        summaries: name of a run -> its summary.json; None or absent where it is not done.
        failures: name of a run -> why it failed.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in sweep.runs:
        groups.setdefault(tuple(run.labels.values()), []).append(run)
    cells = tuple(_cell(runs, summaries) for _, runs in sorted(groups.items(), key=lambda item: _place(item[1], sweep)))
    return SweepSummary(
        name=sweep.name,
        headings=sweep.headings,
        cells=cells,
        runs={run.name: _record(run, summaries.get(run.name), failures.get(run.name)) for run in sweep.runs},
        failures=dict(failures),
    )


def _place(runs: Sequence[Run], sweep: Sweep) -> int:
    return min(sweep.runs.index(run) for run in runs)


def _cell(runs: Sequence[Run], summaries: Mapping[str, Mapping[str, Any] | None]) -> Cell:
    done = [(run, summary) for run in runs if (summary := summaries.get(run.name)) is not None]
    found = {name: [s["last"][name] for _, s in done if s["last"].get(name) is not None] for name in METRICS}
    return Cell(
        labels=runs[0].labels,
        seeds=tuple(run.seed for run, _ in done),
        missing=len(runs) - len(done),
        metrics={name: Statistic.of(values) for name, values in found.items() if values},
        density=Statistic.of([summary["density"] for _, summary in done]),
        training=Statistic.of([share for _, s in done if (share := _training_share(s)) is not None]),
        seconds=Statistic.of([summary["seconds"] for _, summary in done]),
    )


def _training_share(summary: Mapping[str, Any]) -> float | None:
    share: float | None = summary.get("counted", {}).get("training_share")
    return share


def _record(run: Run, summary: Mapping[str, Any] | None, failure: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {"seed": run.seed, "labels": dict(run.labels), "done": summary is not None}
    if failure is not None:
        record["error"] = failure
    if summary is not None:
        record |= {name: summary["last"][name] for name in METRICS if name in summary["last"]}
        record |= {"density": summary["density"], "training_share": _training_share(summary)}
        record |= {"seconds": summary["seconds"]}
    return record


def to_csv(summary: SweepSummary) -> str:
    """One line per cell, floats in full precision, nothing where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    quantities = [*summary.metrics, "density", "training_share"]
    columns = [f"{name}_{kind}" for name in quantities for kind in ("mean", "std")]
    writer.writerow([*summary.headings, "n", "missing", *columns, "seconds_mean", "seconds_std"])
    for cell in summary.cells:
        found = [*(cell.metric(name) for name in summary.metrics), cell.density, cell.training, cell.seconds]
        numbers = [number for one in found for number in (one.mean, one.deviation)]
        writer.writerow([*cell.labels.values(), cell.n, cell.missing, *numbers])
    return text.getvalue()


def to_markdown(summary: SweepSummary) -> str:
    """A table for people: mean and deviation of the first metrics, each seed's value of the very first."""
    shown = [name for name in summary.metrics if name in ("top1", "val_loss", "ema_top1")]
    heads = [f"{metric_label(name)}, mean ± standard deviation" for name in shown]
    first = [f"{metric_label(shown[0])}, each seed"] if shown else []
    columns = [*summary.headings, *heads, *first, "n", "density", "training MACs of dense", "time of a run"]
    rows = []
    for cell in summary.cells:
        each = [", ".join(metric_text(shown[0], v) for v in cell.metric(shown[0]).values) or MISSING] if shown else []
        numbers = [spread_text(name, cell.metric(name)) for name in shown]
        counted = [str(cell.n), format_density(cell.density.mean), format_percent(cell.training.mean)]
        counted.append(format_seconds(cell.seconds.mean))
        rows.append([*cell.labels.values(), *numbers, *each, *counted])
    lines = [_row(columns), _row(["---"] * len(columns)), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def metric_label(name: str) -> str:
    """A metric as a heading, with its unit."""
    from lbc_cli.report.tables import result_label

    return result_label(name) + (" (%)" if "top" in name else "")


def metric_text(name: str, value: float | None) -> str:
    """A metric's value without its unit."""
    return format_accuracy(value).removesuffix(" %") if "top" in name else format_number(value)


def spread_text(name: str, statistic: Statistic) -> str:
    """Mean ± deviation, as far as they are known."""
    if statistic.deviation is None:
        return metric_text(name, statistic.mean)
    return f"{metric_text(name, statistic.mean)} ± {metric_text(name, statistic.deviation)}"
