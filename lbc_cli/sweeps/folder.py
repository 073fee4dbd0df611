"""The folder of a sweep: a run folder for each run, the sweep file, and the summary.

    sweep.toml                            the sweep file as it was read
    NAME/                                 a run, named by what varies
    summary.csv  summary.md  summary.json

It is meant to be gone back to: what is done stays, what was interrupted goes on, and a sweep file that has grown adds
its runs. A run in the folder whose recipe is not the one that the file asks for is refused, never overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from lbc_cli import states
from lbc_cli.errors import LbcError, OutputError
from lbc_cli.locks import locked
from lbc_cli.recipe import Recipe, resolve
from lbc_cli.runs import RunFolder, check_free
from lbc_cli.sweeps.grid import Run, Sweep
from lbc_cli.sweeps.tables import SweepSummary, summarise
from lbc_cli.sweeps.workers import Task
from lbc_cli.verifier import verify


class RunState(Enum):
    """What there is to do for a run."""

    NEW = "to do"
    RESTART = "to begin again"
    RESUME = "to go on"
    DONE = "done"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """A folder that holds a sweep.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str], sweep: Sweep) -> SweepFolder:
        """Make the folder, or take that of an earlier call, and write the sweep file into it.

        Raises:
            OutputError: if something else is there, or it cannot be written.
        """
        folder = cls(Path(path))
        folder.check()
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {folder.path}: {error.strerror}; choose another with --out") from error
        _write(folder.file, sweep.text)
        return folder

    def check(self) -> None:
        """Check, without writing, that a sweep can be here.

        Raises:
            OutputError: if something else is here, or nothing can be written.
        """
        if not self.file.is_file():
            check_free(self.path)

    @property
    def file(self) -> Path:
        """The sweep file."""
        return self.path / "sweep.toml"

    def run(self, run: Run) -> RunFolder:
        """The folder of a run, whether it exists or not."""
        return RunFolder(self.path / run.name)

    def changed(self, sweep: Sweep) -> bool:
        """Whether an earlier call had another sweep file."""
        return self.file.is_file() and self.file.read_text(encoding="utf-8") != sweep.text

    def strangers(self, sweep: Sweep) -> list[str]:
        """Runs in the folder that the sweep does not have."""
        if not self.path.is_dir():
            return []
        names = {run.name for run in sweep.runs}
        return sorted(p.parent.name for p in self.path.glob("*/recipe.toml") if p.parent.name not in names)

    def states(self, sweep: Sweep) -> dict[str, RunState]:
        """Name of a run -> what there is to do for it.

        Raises:
            OutputError: if a run in the folder has another recipe than the sweep.
        """
        differing = [difference for run in sweep.runs if (difference := self._difference(run))]
        if differing:
            more = f" (and {len(differing) - 1} runs more)" if len(differing) > 1 else ""
            raise OutputError(f"{differing[0]}{more}; choose another folder with --out, or delete those runs")
        return {run.name: self._state(run) for run in sweep.runs}

    def _difference(self, run: Run) -> str:
        """In what the recipe of a run in the folder differs from the one asked for, or nothing."""
        folder = self.run(run)
        if not folder.recipe.is_file():
            return ""
        found = resolve(folder.recipe).recipe
        chosen = found.sparsity.budget.allocated and not run.resolved.recipe.sparsity.budget.allocated
        there, wanted = (_values(recipe, chosen) for recipe in (found, run.resolved.recipe))
        for key in sorted(there.keys() | wanted.keys()):
            if there.get(key) != wanted.get(key):
                return f"{folder.path} was run with {key} = {there.get(key)!r}, the sweep has {wanted.get(key)!r}"
        return ""

    def _state(self, run: Run) -> RunState:
        folder = self.run(run)
        if not folder.path.is_dir() or not any(folder.path.iterdir()):
            return RunState.NEW
        if folder.summary.is_file():
            return RunState.DONE if is_done(folder) else RunState.DAMAGED
        return RunState.RESUME if states.found(folder) else RunState.RESTART

    def clear(self, run: Run) -> None:
        """Remove what a run left behind that ended before its first state was saved.

        Raises:
            OutputError: if something else is in its folder.
        """
        folder = self.run(run)
        own = {folder.recipe.name, folder.environment.name, folder.metrics_jsonl.name, folder.metrics_csv.name}
        own |= {
            "tensorboard",
            "wandb",
            folder.curves.name,
            folder.metrics_steps.name,
            folder.report.name,
            folder.ended.name,
        }
        for path in sorted(folder.path.iterdir()):
            if path.name not in own and ".lbc-tmp-" not in path.name:
                raise OutputError(f"{path} is not of a run: remove it, or choose another folder with --out")
        for path in sorted(folder.path.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def locked(self) -> AbstractContextManager[None]:
        """Within it nobody else works in the folder (on systems that can lock folders).

        Raises:
            OutputError: if somebody does.
        """
        return locked(self.path, "another lbc sweep")

    def tasks(self, sweep: Sweep, states: Mapping[str, RunState]) -> list[Task]:
        """What is left to do, in the sweep's order; places that are to be begun again are cleared.

        Raises:
            OutputError: if something is in the way.
        """
        tasks = []
        for run in sweep.runs:
            state = states[run.name]
            if state is RunState.RESTART:
                self.clear(run)
            if state in (RunState.NEW, RunState.RESTART, RunState.RESUME):
                tasks.append(Task(run.name, run.resolved, self.run(run).path, state is RunState.RESUME))
        return tasks

    def damaged(self, states: Mapping[str, RunState]) -> dict[str, str]:
        """Name of a run that has ended, but whose files do not say so together -> what to do about it."""
        return {
            name: f"its checkpoint does not verify: delete {self.path / name} to run it again"
            for name, state in states.items()
            if state is RunState.DAMAGED
        }

    def summarise(self, sweep: Sweep, failures: Mapping[str, str]) -> SweepSummary:
        """Bring what is done into a table, and write it.

        Args:
            sweep: the runs.
            failures: name of a run -> why it failed.

        Raises:
            OutputError: if it cannot be written.
        """
        found = {run.name: self.summary_of(run) for run in sweep.runs if run.name not in failures}
        summary = summarise(sweep, found, failures)
        for name, text in summary.files():
            _write(self.path / name, text)
        return summary

    def summary_of(self, run: Run) -> dict[str, Any] | None:
        """How a run ended; None while it has not."""
        path = self.run(run).summary
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def is_done(folder: RunFolder) -> bool:
    """Whether a run has ended well: its summary says so, and its checkpoints verify now."""
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        files = [folder.model, *([folder.ema] if folder.ema.exists() else [])]
        return summary.get("verified") is True and all(verify(file).ok for file in files)
    except (LbcError, ValueError, OSError):
        return False


def _values(recipe: Recipe, chosen: bool) -> dict[str, Any]:
    """Dotted key -> value, but for the description, which changes nothing, and for layers that a budget has chosen."""
    values: dict[str, Any] = {}
    for table, entries in recipe.model_dump(exclude={"description"}).items():
        if isinstance(entries, dict):
            values |= {f"{table}.{key}": value for key, value in entries.items()}
        else:
            values[table] = entries
    if chosen:
        del values["sparsity.layers"]
        values["sparsity.budget"] = {**values["sparsity.budget"], "allocated": True}
    return values


def _write(path: Path, text: str) -> None:
    from lbc_cli.checkpoint.files import atomic_write_text

    atomic_write_text(path, text)
