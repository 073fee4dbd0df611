"""`lbc sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Overrides, Quiet, Verbose
from lbc_cli.errors import Interrupted, LbcError

if TYPE_CHECKING:
    from lbc_cli.report import Console
    from lbc_cli.sweeps import Ended, RunState, Sweep, SweepFolder, SweepSummary


@reported
def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            help="A recipe with a [sweep] table of lists, or the name of one that is shipped (sweeps/methods)."
        ),
    ],
    *,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to, or what to go on with.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Runs at a time, one thread each.")] = 1,
    override: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Seconds a run, on generated images.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train every combination of a sweep file into one folder; called again, go on with it.

    The file is a recipe with one more table, whose lists are combined: [sweep] methods = ["dense", "lbc"],
    patterns = ["2:4", "1:16"], seeds = [0, 1, 2], optimizer.lr = [0.05, 0.1], ... The folder gets a run folder for each
    run, and the table of means, standard deviations and numbers as CSV, Markdown and JSON.
    """
    console = make_console(quiet, verbose)
    from lbc_cli.sweeps import RunState, SweepFolder, check_files, read_sweep
    from lbc_cli.trackers import check_trackers

    wanted = read_sweep(file, overrides=override or [], smoke=smoke)
    for run in wanted.runs:
        check_trackers(run.resolved.recipe.track)
    folder = SweepFolder(out if out is not None else Path("runs") / wanted.name)
    folder.check()
    states = folder.states(wanted)
    check_files(run for run in wanted.runs if states[run.name] is not RunState.DONE)
    _announce(wanted, folder, console)
    if dry_run:
        _list(wanted, states, console, as_json)
        return
    folder = SweepFolder.create(folder.path, wanted)
    with folder.locked():
        _run(wanted, folder, jobs, console, as_json)


def _announce(sweep: Sweep, folder: SweepFolder, console: Console) -> None:
    console.info(f"{len(sweep.runs)} runs in {folder.path}")
    if folder.changed(sweep):
        console.info("the sweep file has changed since the last call; runs that are in both are kept")
    if others := folder.strangers(sweep):
        console.warning(f"not in the sweep, left alone and out of the table: {', '.join(others)}")


def _list(sweep: Sweep, states: dict[str, RunState], console: Console, as_json: bool) -> None:
    from lbc_cli.report.swept import print_runs

    if as_json:
        runs = {
            run.name: {"labels": run.labels, "seed": run.seed, "state": states[run.name].value} for run in sweep.runs
        }
        console.json(runs)
    else:
        print_runs(console, sweep, {name: state.value for name, state in states.items()})


def _run(sweep: Sweep, folder: SweepFolder, jobs: int, console: Console, as_json: bool) -> None:
    """Carry out what is to do, keep the summary up to date, show it, and say what failed."""
    from lbc_cli.engine import StopOnSignal
    from lbc_cli.report.swept import print_sweep
    from lbc_cli.sweeps.workers import carry_out

    states = folder.states(sweep)  # once more: now nobody else can change them
    failures = folder.damaged(states)
    tasks = folder.tasks(sweep, states)
    if done := len(sweep.runs) - len(tasks) - len(failures):
        console.info(f"{done} of {len(sweep.runs)} runs are done already")
    summary = folder.summarise(sweep, failures)
    count = done + len(failures)

    def ended(end: Ended) -> None:
        nonlocal summary, count
        count += end.outcome != "stopped"
        if end.outcome == "failed":
            failures[end.name] = end.error
        summary = folder.summarise(sweep, failures)
        console.message(_line(end, summary, f"{count}/{len(sweep.runs)}"), "info" if not end.error else "warning")

    with StopOnSignal() as stop:
        carry_out(
            tasks,
            jobs,
            started=lambda name: console.detail(f"{name}: begun"),
            epoch=lambda name, record: console.detail(f"{name}: {_epoch(sweep, name, record)}"),
            warning=lambda name, text: console.warning(f"{name}: {text}"),
            ended=ended,
            stop=stop,
        )
    console.json(summary) if as_json else print_sweep(console, summary)
    if stop():
        raise Interrupted(f"interrupted after {count} of {len(sweep.runs)} runs; the same command goes on from there")
    if failures:
        first = next(iter(failures.items()))
        more = f"; and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise LbcError(f"{len(failures)} of {len(sweep.runs)} runs failed: {first[0]}: {first[1]}{more}")


def _line(end: Ended, summary: SweepSummary, place: str) -> str:
    """What became of a run, on one line."""
    from lbc_cli.report import format_seconds
    from lbc_cli.report.swept import SHOWN
    from lbc_cli.report.tables import format_result, result_label

    if end.outcome == "stopped":
        return f"{end.name}: stopped"
    if end.outcome == "failed":
        return f"{place} {end.name}: failed: {end.error}"
    record = summary.runs[end.name]
    shown = [f"{result_label(name)} {format_result(name, record[name])}" for name in SHOWN if name in record]
    return f"{place} {end.name}: {', '.join([*shown, f'time {format_seconds(end.seconds)}'])}"


def _epoch(sweep: Sweep, name: str, record: Mapping[str, Any]) -> str:
    from lbc_cli.report.progress import format_epoch

    run = next(run for run in sweep.runs if run.name == name)
    return format_epoch(record, run.resolved.recipe.train.epochs)
