"""`lbc train --resume`: what an interrupted run goes on with, and what may change on the way.

A resumed run takes every setting from its folder. Two things may be another: the number of ranks, as long as the images
of an update stay the same ones (each rank takes a larger or smaller part of them), and the epochs, where --extend-to
says so. Both are written into the folder's recipe before anything is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lbc_cli import states
from lbc_cli.distill import teacher_digest
from lbc_cli.distributed import ALONE, World
from lbc_cli.errors import OutputError, UsageError
from lbc_cli.methods import parse_options
from lbc_cli.recipe import ResolvedRecipe
from lbc_cli.recipe.load import with_values
from lbc_cli.recipe.origins import resolve_again
from lbc_cli.runs import RunFolder
from lbc_cli.training import Job, prepare


def resume(
    folder: RunFolder,
    progress: Callable[[int], None] = lambda count: None,
    *,
    previous: bool = False,
    extend_to: int | None = None,
    world: World = ALONE,
) -> Job:
    """The job of an earlier run, with the state that it goes on from.

    Args:
        folder: of that run.
        progress: told how many images more were checked.
        previous: go on from the state before the newest.
        extend_to: epochs of the whole run, more than it was begun with.
        world: the ranks of this process's run.

    Raises:
        OutputError: if that run has ended, or saved no state to go on from.
        CheckpointError: if the state is damaged.
        UsageError: if its settings do not fit this machine, or the change asked for.
    """
    if folder.summary.is_file() and extend_to is None:
        raise OutputError(
            f"the run in {folder.path} has ended ({folder.summary.name} is there): start another one, or train it for "
            "longer with --extend-to EPOCHS"
        )
    state = states.load(folder, previous=previous)
    resolved, notes = resolve_again(folder.recipe), []
    if extend_to is not None:
        resolved, note = _extended(resolved, state, extend_to)
        notes.append(note)
    if state["ranks"] != world.size:
        resolved, note = _shared_anew(resolved, state, world.size)
        notes.append(note)
    job = prepare(resolved, progress, world)
    if teacher_digest(job.task) != state["teacher"]:
        raise UsageError(
            f"distill.teacher = {resolved.recipe.distill.teacher!r} has other weights than when the run began: put the "
            "teacher back that it was begun with, or start a new run"
        )
    return dataclasses.replace(job, state=state, notes=tuple(notes))


def _extended(resolved: ResolvedRecipe, state: states.State, epochs: int) -> tuple[ResolvedRecipe, str]:
    """The recipe, and the state, of a run of more epochs; what the method left to the length stays where it was."""
    before = resolved.recipe.train.epochs
    if epochs <= before:
        raise UsageError(f"--extend-to {epochs}: the run has {before} epochs already; give more than that")
    method = dict(resolved.recipe.method)
    name = method.pop("name")
    given = {key: value for key, value in method.items() if value is not None}
    pinned = parse_options(name, given).pinned(before)
    values: dict[str, Any] = {"train.epochs": epochs, **{f"method.{key}": value for key, value in pinned.items()}}
    pruner = state["pruner"]
    pruner["epochs"] = epochs
    if "options" in pruner["state"]:
        pruner["state"]["options"].update(pinned)
    kept = "".join(f", {key} stays at epoch {value}" for key, value in pinned.items())
    note = f"{epochs} epochs instead of {before}: the learning rate goes on along the schedule of {epochs}{kept}"
    return with_values(resolved, values, f"--extend-to {epochs}"), note


def _shared_anew(resolved: ResolvedRecipe, state: states.State, ranks: int) -> tuple[ResolvedRecipe, str]:
    """The recipe whose batches give other ranks the same images an update."""
    before, size = int(state["ranks"]), int(state["batch_size"])
    common, now = before * size, f"{ranks} rank{'' if ranks == 1 else 's'}"
    if common % ranks:
        raise UsageError(
            f"the run had {before} ranks of {size} images, {common} together, which {now} cannot share: resume "
            f"with a number of ranks that divides {common}"
        )
    note = (
        f"{now} instead of {before}: the same {common} images a batch in the same order, now "
        f"{common // ranks} each; statistics of batch norms and mixing are of each rank's part"
    )
    return with_values(resolved, {"data.batch_size": common // ranks}, f"--resume with {now}"), note
