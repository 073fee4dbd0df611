"""Runs side by side: what they came to, and in which settings they differ. Read from their folders, without torch."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.locks import is_locked
from lbc_cli.recipe.layers import leaves
from lbc_cli.recipe.lines import dotted
from lbc_cli.runs import Record, RunFolder, read_epochs

# What a run is called, or who follows it: no setting that could explain a result.
_NOT_COMPARED = ("description", "track.")
# Columns of their own in every table.
SHOWN = ("model.name", "method.name", "sparsity.pattern", "sparsity.vector", "train.epochs", "train.seed")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its folder tells of it.

    Attributes:
        name: the folder, as short as tells the runs apart.
        state: "done", "running", "interrupted", "diverged" or "failed"; "not ended" where it cannot be told whether it
            is still running.
        settings: dotted key of the recipe -> value.
        epochs: the epoch records.
    """

    name: str
    state: str
    settings: Mapping[str, Any]
    epochs: Sequence[Record]

    def last(self, key: str) -> Any:
        """A value of the last epoch that has one."""
        return next((record[key] for record in reversed(self.epochs) if record.get(key) is not None), None)

    def best(self, key: str) -> Any:
        """The best value over the epochs with final masks."""
        found = [r[key] for r in self.epochs if r.get(key) is not None and r.get("phase", "final") == "final"]
        return (min if smaller_is_better(key) else max)(found) if found else None

    @property
    def model(self) -> str:
        """Timm name."""
        return str(self.settings["model.name"])

    @property
    def method(self) -> str:
        """Name in METHODS."""
        return str(self.settings["method.name"])

    @property
    def pattern(self) -> str | None:
        """N:M or N:M/V; a budget, or the sparsity that was asked for; None for dense training."""
        if self.method == "dense":
            return None
        for kind in ("flops", "params"):
            if share := self.settings.get(f"sparsity.budget.{kind}"):
                return f"{kind} {share:g}"
        if pattern := self.settings.get("sparsity.pattern"):
            vector = self.settings.get("sparsity.vector", 1)
            return f"{pattern}/{vector}" if vector != 1 and "/" not in str(pattern) else str(pattern)
        sparsity = self.settings.get("method.sparsity")
        return None if sparsity is None else f"sparsity {sparsity:g}"

    @property
    def images_per_second(self) -> float | None:
        """In training, median over the epochs."""
        known = [r["images_per_second"] for r in self.epochs if r.get("images_per_second") is not None]
        return statistics.median(known) if known else None

    @property
    def seconds(self) -> float | None:
        """Of training and evaluation, all parts of a resumed run together."""
        known = [record["seconds"] for record in self.epochs if record.get("seconds") is not None]
        return sum(known) if known else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs.

    Attributes:
        runs: as they were named.
        differing: keys of the recipe in which they differ, in the recipe's order, without those of `SHOWN`.
    """

    runs: tuple[RunRecord, ...]
    differing: tuple[str, ...]


def smaller_is_better(metric: str) -> bool:
    """Whether less of a value of an epoch is more."""
    return any(word in metric for word in ("loss", "seconds", "memory", "wait"))


def compare(paths: Sequence[Path]) -> Comparison:
    """Read runs and find where they differ.

    Args:
        paths: run folders, or folders of them such as a sweep's.

    Raises:
        UsageError: for a folder that holds no run, or one whose files are damaged.
    """
    folders = [folder for path in paths for folder in _folders(path)]
    folders = list({folder.path.resolve(): folder for folder in folders}.values())
    runs = tuple(_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True))
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    wanted = [key for key in keys if key not in SHOWN and not key.startswith(_NOT_COMPARED)]
    return Comparison(runs, tuple(key for key in wanted if _differs(runs, key)))


def _differs(runs: Sequence[RunRecord], key: str) -> bool:
    """Whether the runs have several values; an option that another method lacks is no difference of its own."""
    having = [run for run in runs if key in run.settings]
    methods = {run.method for run in having}
    lacking = [run for run in runs if key not in run.settings]
    if key.startswith("method."):
        lacking = [run for run in lacking if run.method in methods]
    return bool(lacking) or len({repr(run.settings[key]) for run in having}) > 1


def _folders(path: Path) -> list[RunFolder]:
    if not path.is_dir():
        raise UsageError(f"no folder {path}: give run folders, or the folder of a sweep")
    if RunFolder(path).recipe.is_file():
        return [RunFolder(path)]
    within = sorted(folder.parent for folder in path.glob("*/recipe.toml"))
    if not within:
        raise UsageError(f"{path} holds no run: there is no recipe.toml in it, nor in a folder of it")
    return [RunFolder(folder) for folder in within]


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """The last part of each path, with as many before it as tell them apart."""
    parts = [folder.path.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _read(folder: RunFolder, name: str) -> RunRecord:
    state = _state(folder)
    try:
        epochs = read_epochs(folder.metrics_jsonl)
    except (CheckpointError, OSError) as error:
        raise UsageError(f"{error}; or leave that run out") from error
    return RunRecord(name, state, _settings(folder.recipe), epochs)


def _settings(path: Path) -> dict[str, Any]:
    """The values of a resolved recipe. As they are: one of another version may have keys that this one lacks."""
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; leave that run out") from error
    settings = {dotted(key): value for key, value in leaves(recipe)}
    for key in ("model.name", "method.name"):
        if not isinstance(settings.get(key), str):
            raise UsageError(f"{path} is not the recipe of a run: it has no {key}; leave that folder out")
    return settings


def _state(folder: RunFolder) -> str:
    busy = is_locked(folder.path)
    if busy:
        return "running"
    if _json(folder.summary):
        return "done"
    how = _json(folder.ended).get("how")
    # A run that says nothing of its end was killed, if it is certain that it runs no more.
    return str(how) if how is not None else "not ended" if busy is None else "interrupted"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; delete it, or leave that run out") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not an object: delete it, or leave that run out")
    return found
