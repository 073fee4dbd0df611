"""The paper's figures beside ours, as tables: all of them counted, none measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbc_cli.report.console import Console
from lbc_cli.report.formats import MISSING, format_accuracy, format_count, format_number
from lbc_cli.report.tables import Align, Parts, table

if TYPE_CHECKING:
    from lbc_cli.paper import Row


def format_paper(number: int, rows: list[Row], notes: tuple[str, ...]) -> Parts:
    """A table of the paper, what it prints beside what is counted, and why the two differ."""
    in_use = any(row.printed.params is not None for row in rows)
    columns, cells = _in_use(rows) if in_use else _training(rows)
    remarks = [f"- {note}" for note in notes]
    return (table(f"Table {number} of the LBC paper, on paper", columns, cells), *remarks, "")


def _training(rows: list[Row]) -> tuple[dict[str, Align], list[list[str]]]:
    columns: dict[str, Align] = {"recipe": "left", "top-1 (paper)": "right", "training (paper)": "right"}
    columns |= dict.fromkeys(("training (counted)", "of the sparse layers"), "right")
    cells = [
        [row.recipe, format_accuracy(row.printed.top1), *map(_times, (row.printed.training, row.training)),
         _times(row.training_sparse)]
        for row in rows
    ]  # fmt: skip
    return columns, cells


def _in_use(rows: list[Row]) -> tuple[dict[str, Align], list[list[str]]]:
    columns: dict[str, Align] = {"recipe": "left", "top-1 (paper)": "right", "parameters (paper)": "right"}
    columns |= dict.fromkeys(
        ("parameters (counted)", "without norms, biases", "MACs (paper)", "MACs (counted)"), "right"
    )
    cells = [
        [
            row.recipe,
            format_accuracy(row.printed.top1),
            MISSING if row.printed.params is None else f"{format_number(row.printed.params, 2)} M",
            format_count(row.params),
            format_count(row.weights),
            MISSING if row.printed.macs is None else f"{format_number(row.printed.macs, 2)} G",
            format_count(row.macs),
        ]
        for row in rows
    ]
    return columns, cells


def _times(share: float | None) -> str:
    return MISSING if share is None else f"{share:.3g}x"


def print_paper(console: Console, number: int, rows: list[Row], notes: tuple[str, ...]) -> None:
    """Print a table of the paper to stdout."""
    console.result(*format_paper(number, rows, notes))
