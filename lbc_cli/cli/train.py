"""`lbc train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Device, Overrides, PatternText, Quiet, RecipeName, Vector, Verbose
from lbc_cli.errors import UsageError

if TYPE_CHECKING:
    from lbc_cli.distributed import Launch
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
    previous_state: Annotated[
        bool, typer.Option("--previous-state", help="With --resume: from the state before the newest.")
    ] = False,
    extend_to: Annotated[
        int | None, typer.Option("--extend-to", metavar="N", help="With --resume: to N epochs, more than before.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Seconds on generated images, through every phase.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model to N:M sparsity, save it packed, and verify what was saved.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m lbc_cli train ...
    """
    from lbc_cli.distributed import launch

    launched = launch()
    console = make_console(quiet or (launched is not None and launched.rank > 0), verbose and not launched)
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
        _resume(resume, previous_state, extend_to, launched, console, as_json)
        return
    for option, value in (("--previous-state", previous_state), ("--extend-to", extend_to)):
        if value:
            raise UsageError(f"{option} is for a run that goes on: name its folder with --resume")
    if out is not None and not dry_run:
        from lbc_cli.runs import check_free

        check_free(out)
    resolved = _resolve(recipe, override or [], flags, smoke, console)
    _train(resolved, out, dry_run, launched, console, as_json)


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


def _train(
    resolved: ResolvedRecipe,
    out: Path | None,
    dry_run: bool,
    launched: Launch | None,
    console: Console,
    as_json: bool,
) -> None:
    from lbc_cli.distributed import session
    from lbc_cli.report import task
    from lbc_cli.runs import RunFolder
    from lbc_cli.trackers import check_trackers
    from lbc_cli.training import prepare

    check_trackers(resolved.recipe.track)
    with session(launched, resolved.recipe.train.device) as world:
        with task(console, "preparing, images checked") as advance:
            job = prepare(resolved, advance, world)
        _announce(job, console)
        if dry_run:
            _plan(job, out, console, as_json)
            return
        if not world.main:
            _take_part(job)
            return
        folder = RunFolder.create(out) if out is not None else RunFolder.create_unique(job.default_folder)
        console.info(f"run folder {folder.path}")
        _run(job, folder, console, as_json)


def _plan(job: Job, out: Path | None, console: Console, as_json: bool) -> None:
    from lbc_cli.report import print_plan
    from lbc_cli.report.describe import plan_view
    from lbc_cli.runs import unique

    if job.world.main:
        plan = plan_view(job, str(out or unique(job.default_folder)))
        console.json(plan) if as_json else print_plan(console, plan)


def _resume(
    path: Path, previous: bool, extend_to: int | None, launched: Launch | None, console: Console, as_json: bool
) -> None:
    from lbc_cli.distributed import session
    from lbc_cli.recipe import resolve
    from lbc_cli.report import task
    from lbc_cli.resuming import resume
    from lbc_cli.runs import RunFolder
    from lbc_cli.trackers import check_trackers

    folder = RunFolder.open(path)
    check_trackers(resolve(folder.recipe).recipe.track)
    with session(launched, resolve(folder.recipe).recipe.train.device) as world:
        with task(console, "preparing, images checked") as advance:
            job = resume(folder, advance, previous=previous, extend_to=extend_to, world=world)
        for note in job.notes:
            console.info(note)
        _announce(job, console)
        if world.main:
            _run(job, folder, console, as_json)
        else:
            _take_part(job)


def _announce(job: Job, console: Console) -> None:
    targets, skipped = len(job.pruner.targets), len(job.pruner.skipped)
    where = f"device {job.device}" if job.world.size == 1 else f"{job.world.size} ranks, device {job.device.type}"
    console.info(f"{job.title} on {job.source.name}, {where}: {targets} sparse layers, {skipped} left dense")
    for image in job.source.dropped:
        console.warning(f"unreadable image left out: {image}")


def _take_part(job: Job) -> None:
    from lbc_cli import training
    from lbc_cli.engine import StopOnSignal

    with StopOnSignal() as stop:
        training.take_part(job, stop=stop)


def _run(job: Job, folder: RunFolder, console: Console, as_json: bool) -> None:
    from lbc_cli import training
    from lbc_cli.engine import StopOnSignal
    from lbc_cli.report import TrainingProgress, print_summary
    from lbc_cli.report.describe import summary_view
    from lbc_cli.report.live import run_observed

    with StopOnSignal() as stop:
        outcome = run_observed(job, folder, TrainingProgress(console), stop=stop)
    if as_json:
        console.json(training.summary(job, outcome))
    else:
        print_summary(console, summary_view(job, outcome, folder))
