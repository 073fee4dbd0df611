"""`lbc train`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Device, Overrides, PatternText, Quiet, RecipeName, Vector, Verbose
from lbc_cli.errors import LbcError, UsageError

if TYPE_CHECKING:
    from lbc_cli.recipe import ResolvedRecipe
    from lbc_cli.report import Console
    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job


@reported
def train(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="timm model name.")] = None,
    *,
    pattern: PatternText = None,
    vector: Vector = None,
    data: Annotated[
        str | None, typer.Option("--data", help="digits (bundled), a folder, a tar, torch/NAME, hfds/NAME, wds/NAME.")
    ] = None,
    recipe: RecipeName = None,
    override: Overrides = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="lbc if not said, sr-ste, asp or maskllm; dense for the baseline. Without a --pattern: gmp, rigl and "
            "dnw, which remove a share of all weights (--set method.sparsity=0.9), and str, whose thresholds decide.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the data.")] = None,
    pretrained: Annotated[bool | None, typer.Option("--pretrained", help="Start from timm's weights.")] = None,
    init: Annotated[Path | None, typer.Option("--init", metavar="FILE", help="Start from this weight file.")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="NAME|FILE", help="Learn from this dense model as well.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="S", help="Of weights, order, augmentation.")] = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder; must be new.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Go on with an earlier run.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Seconds on generated images, through every phase.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model to N:M sparsity, save it packed, and verify what was saved."""
    console = make_console(quiet, verbose)
    flags = {
        "model.name": model,
        "sparsity.pattern": pattern,
        "sparsity.vector": vector,
        "data.source": data,
        "method.name": method,
        "train.epochs": epochs,
        "model.pretrained": pretrained,
        "model.init": init,
        "distill.teacher": teacher,
        "train.seed": seed,
        "train.device": device,
    }
    if resume is not None:
        others = {"--recipe": recipe, "--set": override, "--out": out, "--smoke": smoke, "--dry-run": dry_run}
        given = [key for key, value in flags.items() if value is not None] + [key for key in others if others[key]]
        _refuse_with_resume(resume, given)
        _resume(resume, console, as_json)
        return
    if out is not None and not dry_run:
        from lbc_cli.runs import check_free

        check_free(out)
    resolved = _resolve(recipe, override or [], flags, smoke, console)
    _train(resolved, out, dry_run, console, as_json)


def _refuse_with_resume(folder: Path, given: list[str]) -> None:
    if given:
        raise UsageError(
            f"--resume {folder} takes every setting from that run: drop {', '.join(given)}, or start a new run with "
            f"--recipe {folder / 'recipe.toml'}"
        )


def _resolve(
    recipe: str | None, overrides: list[str], flags: dict[str, Any], smoke: bool, console: Console
) -> ResolvedRecipe:
    """The recipe that was named, or the shipped one that fits model and data."""
    from lbc_cli.recipe import recipe_for, resolve

    if recipe is None:
        recipe, why = recipe_for(flags["model.name"] or "", flags["data.source"] or "")
        console.info(why)
    resolved = resolve(recipe, overrides=overrides, flags=flags)
    if not smoke:
        return resolved
    from lbc_cli.smoke import smoke as smoked

    console.info("smoke run: a few epochs on generated images, whatever the data and the teacher")
    return smoked(resolved)


def _train(resolved: ResolvedRecipe, out: Path | None, dry_run: bool, console: Console, as_json: bool) -> None:
    from lbc_cli.report import print_plan, task
    from lbc_cli.report.describe import plan_view
    from lbc_cli.runs import RunFolder, unique
    from lbc_cli.training import prepare

    with task(console, "preparing, images checked") as advance:
        job = prepare(resolved, advance)
    _announce(job, console)
    if dry_run:
        plan = plan_view(job, str(out or unique(job.default_folder)))
        console.json(plan) if as_json else print_plan(console, plan)
        return
    folder = RunFolder.create(out) if out is not None else RunFolder.create_unique(job.default_folder)
    console.info(f"run folder {folder.path}")
    _run(job, folder, console, as_json, resuming=False)


def _resume(path: Path, console: Console, as_json: bool) -> None:
    from lbc_cli import training
    from lbc_cli.report import task
    from lbc_cli.runs import RunFolder

    folder = RunFolder.open(path)
    with task(console, "preparing, images checked") as advance:
        job = training.resume(folder, advance)
    _announce(job, console)
    _run(job, folder, console, as_json, resuming=True)


def _announce(job: Job, console: Console) -> None:
    targets, skipped = len(job.pruner.targets), len(job.pruner.skipped)
    console.info(
        f"{job.title} on {job.source.name}, device {job.device}: {targets} sparse layers, {skipped} left dense"
    )
    for image in job.source.dropped:
        console.warning(f"unreadable image left out: {image}")


def _run(job: Job, folder: RunFolder, console: Console, as_json: bool, *, resuming: bool) -> None:
    from lbc_cli import training
    from lbc_cli.engine import StopOnSignal
    from lbc_cli.report import TrainingProgress, print_summary
    from lbc_cli.report.describe import summary_view

    with _curves_at_the_end(job, folder), StopOnSignal() as stop:
        outcome = training.run(job, folder, resuming=resuming, reporter=TrainingProgress(console), stop=stop)
    if as_json:
        console.json(training.summary(job, outcome))
    else:
        print_summary(console, summary_view(job, outcome, folder))


@contextlib.contextmanager
def _curves_at_the_end(job: Job, folder: RunFolder) -> Iterator[None]:
    """Draw the curves of what was trained, also of a run that was interrupted or failed."""
    from lbc_cli.report import run_curves

    try:
        yield
    except BaseException:
        with contextlib.suppress(LbcError):  # what ended the run is what the user must hear of
            run_curves(job, folder)
        raise
    run_curves(job, folder)
