"""Runs side by side: tables for people, records for programs, CSV and Markdown for papers and spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from lbc_cli.comparing import Comparison, RunRecord
from lbc_cli.recipe.emit import toml_value
from lbc_cli.report.console import Console
from lbc_cli.report.formats import MISSING, format_count, format_density, format_number, format_seconds, one_line
from lbc_cli.report.tables import Align, Columns, format_result, result_label, table

# Alike in many comparisons: said once above the table where all runs have the same.
_COMMON = ("model", "method", "pattern", "seed")
_NUMBERS = ("seed", "epochs", "density", "val loss", "images/s", "time")


def print_comparison(console: Console, comparison: Comparison, metric: str = "top1") -> None:
    """Two tables on stdout: what the runs came to, and where their recipes differ.

    Args:
        console: where to.
        comparison: the runs.
        metric: of the epoch records, its last and its best value.
    """
    runs = comparison.runs
    rows = [_texts(run, metric) for run in runs]
    common = {name: rows[0][name] for name in _COMMON if len(runs) > 1 and len({row[name] for row in rows}) == 1}
    columns = {name: _align(name, metric) for name in rows[0] if name not in common}
    alike = ", ".join(f"{name} {value}" for name, value in common.items() if value != MISSING)
    title = f"Runs ({len(runs)})" + (f", all with {alike}" if alike else "")
    console.result(table(title, columns, [[row[name] for name in columns] for row in rows]))
    console.result(*_differences(comparison))


def _differences(comparison: Comparison) -> tuple[Any, ...]:
    runs, differing = comparison.runs, comparison.differing
    if not differing:
        return ("no other setting differs",) if len(runs) > 1 else ()
    names = [run.name for run in runs]
    values = [[_shown(run.settings.get(key)) for key in differing] for run in runs]
    if len(runs) > len(differing):  # the longer side goes down
        headings: Columns = dict.fromkeys(["run", *differing], "left")
        rows = [[name, *row] for name, row in zip(names, values, strict=True)]
    else:
        headings = dict.fromkeys(["setting", *names], "left")
        rows = [[key, *column] for key, column in zip(differing, zip(*values, strict=True), strict=True)]
    return (table("Settings that differ", headings, rows),)


def _align(name: str, metric: str) -> Align:
    return "right" if name in _NUMBERS or name in _metric_columns(metric) else "left"


def _metric_columns(metric: str) -> tuple[str, str]:
    return result_label(metric), "best"


def _texts(run: RunRecord, metric: str) -> dict[str, str]:
    """A run's cells, as people read them."""
    planned = run.settings.get("train.epochs", MISSING)
    last, best = _metric_columns(metric)
    texts = {
        "run": run.name,
        "model": run.model,
        "method": run.method,
        "pattern": run.pattern or MISSING,
        "epochs": f"{len(run.epochs)}/{planned}",
        "seed": str(run.settings.get("train.seed", MISSING)),
        "density": format_density(run.last("density")),
        last: format_result(metric, run.last(metric)),
        best: format_result(metric, run.best(metric)),
        **({"val loss": format_number(run.last("val_loss"))} if metric != "val_loss" else {}),
        "images/s": format_count(run.images_per_second),
        "time": format_seconds(run.seconds),
        "state": run.state,
    }
    return {name: one_line(text) for name, text in texts.items()}


def comparison_record(comparison: Comparison, metric: str = "top1") -> dict[str, Any]:
    """The same as plain values, floats in full: run -> what it came to, and its values of the differing settings."""
    return {
        run.name: {
            **_record(run, metric),
            "last": run.epochs[-1] if run.epochs else None,
            "settings": {key: run.settings.get(key) for key in comparison.differing},
        }
        for run in comparison.runs
    }


def _record(run: RunRecord, metric: str) -> dict[str, Any]:
    return {
        "model": run.model,
        "method": run.method,
        "pattern": run.pattern,
        "epochs": len(run.epochs),
        "planned_epochs": run.settings.get("train.epochs"),
        "seed": run.settings.get("train.seed"),
        "density": run.last("density"),
        f"last_{metric}": run.last(metric),
        f"best_{metric}": run.best(metric),
        "train_loss": run.last("train_loss"),
        "val_loss": run.last("val_loss"),
        "images_per_second": run.images_per_second,
        "seconds": run.seconds,
        "state": run.state,
    }


def to_csv(comparison: Comparison, metric: str) -> str:
    """A line per run, floats in full, nothing where there is no value; the differing settings behind."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    records = [_record(run, metric) for run in comparison.runs]
    writer.writerow(["run", *records[0], *comparison.differing])
    for run, record in zip(comparison.runs, records, strict=True):
        settings = [run.settings.get(key) for key in comparison.differing]
        writer.writerow([run.name, *record.values(), *settings])
    return text.getvalue()


def to_markdown(comparison: Comparison, metric: str) -> str:
    """The table for people, with the differing settings behind."""
    rows = [_texts(run, metric) for run in comparison.runs]
    lines = [[*rows[0], *comparison.differing], ["---"] * (len(rows[0]) + len(comparison.differing))]
    for run, row in zip(comparison.runs, rows, strict=True):
        lines.append([*row.values(), *(_shown(run.settings.get(key)) for key in comparison.differing)])
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


FORMATS: dict[str, Callable[[Comparison, str], str]] = {".csv": to_csv, ".md": to_markdown}
"""Suffix of a file -> what writes it."""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _shown(value: Any) -> str:
    """A value of a recipe, without quotes around words."""
    if value is None:
        return MISSING
    return one_line(value) if isinstance(value, str) and value else _toml(value)


def _toml(value: Any) -> str:
    try:
        return toml_value(value)
    except TypeError:  # a date, which no recipe of ours has
        return str(value)


def known_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """What the epoch records count."""
    records = [record for run in runs for record in run.epochs]
    return sorted({key for record in records for key, value in record.items() if _is_number(value)} - {"epoch"})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
