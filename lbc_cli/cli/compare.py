"""`lbc compare`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Quiet
from lbc_cli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from lbc_cli.comparing import Comparison

PRIMARY = "top1"


@reported
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or a folder of them (a sweep's).")],
    *,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the metric over the epochs: .png, .svg, .pdf.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="Of the epochs: top1 if not said, val_loss, seconds, ..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the table as well: .csv or .md.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show runs side by side: what they came to, and in which settings they differ."""
    console = make_console(quiet)
    from lbc_cli import comparing
    from lbc_cli.report.compared import FORMATS, comparison_record, print_comparison
    from lbc_cli.report.compared_plot import SUFFIXES, plot_comparison

    _check_suffix("--plot", plot, SUFFIXES)
    _check_suffix("--out", out, FORMATS)
    comparison = comparing.compare(runs)
    if metric is not None or plot is not None:
        _check_metric(comparison, metric or PRIMARY)
    metric = metric or PRIMARY
    if as_json:
        console.json(comparison_record(comparison, metric))
    else:
        print_comparison(console, comparison, metric)
    if out is not None:
        from lbc_cli.checkpoint.files import atomic_write_text

        atomic_write_text(out, FORMATS[out.suffix.lower()](comparison, metric))
        console.info(f"table {out}")
    if plot is not None:
        plot_comparison(comparison, metric, plot)
        console.info(f"plot {plot}")


def _check_suffix(option: str, path: Path | None, suffixes: Iterable[str]) -> None:
    known = tuple(suffixes)
    if path is not None and path.suffix.lower() not in known:
        raise UsageError(f"{option} {path}: the name must end in {', '.join(known)}")


def _check_metric(comparison: Comparison, metric: str) -> None:
    from lbc_cli.report.compared import known_metrics

    known = known_metrics(comparison.runs)
    if metric not in known:
        there = f"there are {', '.join(known)}" if known else "no run has an epoch behind it"
        raise UsageError(f"--metric {metric}: no run has it; {there}.{did_you_mean(metric, known)}")
