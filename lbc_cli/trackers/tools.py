"""Which tools there are, what they need, and how they begin and end with a run."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbc_cli.errors import UsageError
from lbc_cli.recipe import schema
from lbc_cli.trackers import tensorboard, weights_biases
from lbc_cli.trackers.reporting import Tell, Tool, Tracker, first_line

if TYPE_CHECKING:
    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job


@dataclass(frozen=True, slots=True)
class ToolInfo:
    """A tool as the registry knows it.

    Attributes:
        package: that it needs; an extra of the tool's name installs it.
        begin: makes the tool for a run, its folder, the updates behind it, and whom to tell.
        folder: of its files, within the run folder.
        remedy: what to do if it cannot begin.
    """

    package: str
    begin: Callable[[Job, RunFolder, int, Tell], Tool]
    folder: str
    remedy: str


TOOLS: dict[str, ToolInfo] = {
    "tensorboard": ToolInfo(
        "tensorboard", tensorboard.TensorBoard, tensorboard.FOLDER, "see to that, or leave it out of track.tools"
    ),
    "wandb": ToolInfo(
        "wandb",
        weights_biases.Wandb,
        weights_biases.FOLDER,
        "see to that (wandb login), set track.mode = 'offline', or leave it out of track.tools",
    ),
}


def check_trackers(track: schema.Track) -> None:
    """Refuse tools whose package is missing.

    Raises:
        UsageError: with the line that installs it.
    """
    for name in track.tools:
        package = TOOLS[name].package
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"track.tools has {name!r}, which needs the package {package}: pip install 'lbc-cli[{name}]'"
            )


def begin_trackers(job: Job, folder: RunFolder, tell: Tell) -> list[Tracker]:
    """A reporter for every tool that the recipe asks for, each begun.

    Args:
        job: of the run.
        folder: of the run.
        tell: told where a tool shows the run, and when one fails.

    Raises:
        UsageError: if a tool cannot begin with a new run; its files are gone again. A run that is resumed goes on
            without the tool.
    """
    done = 0
    if job.state is not None:
        done = int(job.state["epoch"]) * job.updates_per_epoch + int(job.state["step"])
    begun: list[Tracker] = []
    for name in dict.fromkeys(job.resolved.recipe.track.tools):
        try:
            begun.append(Tracker(name, TOOLS[name].begin(job, folder, done, tell), tell, done))
        except Exception as error:
            if job.state is not None:
                tell(f"{name} cannot go on and is left out, the run goes on: {first_line(error)}", "warning")
                continue
            _undo(begun, folder)
            raise UsageError(f"{name} cannot begin: {first_line(error)}; {TOOLS[name].remedy}") from error
    return begun


def _undo(begun: Sequence[Tracker], folder: RunFolder) -> None:
    """Leave nothing of a run that never began."""
    for tracker in begun:
        tracker.close(well=False)
    for tool in TOOLS.values():
        shutil.rmtree(folder.path / tool.folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        folder.path.rmdir()


@contextlib.contextmanager
def ending(trackers: Sequence[Tracker], job: Job) -> Iterator[None]:
    """Within it the run goes on; at its end, in whatever way, the tools are closed.

    Args:
        trackers: begun.
        job: of the run, whose densities are handed over if it came to its end.
    """
    well = False
    try:
        yield
        well = True
        layers = job.pruner.densities() if trackers else {}
        for tracker in trackers:
            tracker.ended(layers)
    finally:
        for tracker in trackers:
            tracker.close(well=well)
