"""From a sweep file to its runs.

A sweep is a recipe with one more table, whose lists are combined:

    extends = "digits"

    [model]
    name = "resnet18"

    [sweep]
    methods = ["dense", "sr-ste", { name = "lbc", t_i = 2 }]
    patterns = ["2:4", "1:16"]
    seeds = [0, 1, 2]
    optimizer.lr = [0.05, 0.1]          # any key of a recipe

`methods`, `patterns`, `vectors`, `models` and `seeds` are short for method, sparsity.pattern, sparsity.vector,
model.name and train.seed. `variants` is a list of tables, for keys that change together:

    variants = [{ name = "by weights", sparsity.pattern = "4:16", method.removal = "weights" }, { ... }]

A method that takes no pattern (dense, unstructured ones) is run once, not once for each pattern. Runs come seed by
seed: every cell of the table once, then every cell again. In model.init and distill.teacher `{seed}` stands for a run's
seed, so that each begins with, or learns from, the run of that seed in another sweep.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbc_cli.errors import RecipeError, UsageError
from lbc_cli.methods import METHODS
from lbc_cli.recipe import ResolvedRecipe, find_sweep
from lbc_cli.recipe.command import nested, parse_override
from lbc_cli.recipe.files import Chain, read_chain
from lbc_cli.recipe.layers import COMMAND_LINE, Layer, Origin
from lbc_cli.recipe.lines import KeyPath, dotted
from lbc_cli.recipe.load import resolve_chain, with_values
from lbc_cli.smoke import smoke as smoked
from lbc_cli.sweeps.axes import SEED, Axis, Choice, overlap, take_axes

_LONGEST = 120  # characters of a run's name, which is a folder
_SEED = "{seed}"
_FILES = ("model.init", "distill.teacher")  # keys that name a file of another run


@dataclass(frozen=True, slots=True)
class Run:
    """One combination.

    Attributes:
        name: unique in the sweep; the name of its folder.
        labels: heading -> label, but for the seed; "-" for what the method has no use for.
        resolved: its recipe.
    """

    name: str
    labels: Mapping[str, str]
    resolved: ResolvedRecipe

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.resolved.recipe.train.seed


@dataclass(frozen=True, slots=True)
class Sweep:
    """All runs of a sweep file.

    Attributes:
        name: the file's, without its suffix.
        text: the file.
        headings: of the columns that say what varies, but for the seed.
        runs: in the order in which they are carried out.
    """

    name: str
    text: str
    headings: tuple[str, ...]
    runs: tuple[Run, ...]


def read_sweep(path: str | Path, *, overrides: Sequence[str] = (), smoke: bool = False) -> Sweep:
    """Read a sweep file and resolve every run.

    Args:
        path: the file.
        overrides: "a.b=v" of every --set, over all runs.
        smoke: cut every run down to seconds on generated images.

    Raises:
        RecipeError: with every problem of the file and of any run.
        UsageError: for a --set of what the sweep varies.
    """
    file = find_sweep(path)
    chain = read_chain(file)
    if chain.problems:
        raise RecipeError([str(problem) for problem in chain.problems])
    axes = take_axes(chain)
    _check_overrides(axes, overrides)
    runs = _expand(axes, _Resolver(chain, file.stem, overrides, smoke))
    headings = tuple(axis.heading for axis in axes if axis.keys != {SEED})
    return Sweep(file.stem, file.read_text(encoding="utf-8-sig"), headings, tuple(runs))


def check_files(runs: Iterable[Run]) -> None:
    """Refuse runs that begin with, or learn from, files that are not there.

    Raises:
        UsageError: naming the first file, and how many there are.
    """
    missing: dict[str, str] = {}
    for run in runs:
        recipe = run.resolved.recipe
        for key, name in zip(_FILES, (recipe.model.init, recipe.distill.teacher), strict=True):
            if (key == _FILES[0] or "/" in name or Path(name).suffix == ".safetensors") and name:
                missing |= {} if Path(name).exists() else {name: key}
    if missing:
        name, key = next(iter(missing.items()))
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"{key} = {name!r} is not there{more}: the runs that make such files come first")


def _check_overrides(axes: Sequence[Axis], overrides: Sequence[str]) -> None:
    for override in overrides:
        try:
            path, _ = parse_override(override)
        except ValueError:
            continue  # resolving says what is wrong with it
        for key in sorted({key for axis in axes for key in axis.keys}):
            if overlap(key, path):
                raise UsageError(f"--set {override}: the sweep varies {dotted(key)}: drop one of the two")


@dataclass(frozen=True, slots=True)
class _Resolver:
    """What all runs have in common."""

    chain: Chain
    name: str
    overrides: Sequence[str]
    smoke: bool

    def __call__(self, choices: Mapping[int, Choice], axes: Sequence[Axis]) -> ResolvedRecipe:
        given: dict[KeyPath, tuple[Any, Origin]] = {}
        for number, choice in choices.items():
            origin = axes[number].origin or Origin(0, 0, self.chain.files[0], self.chain.files[0])
            above = replace(origin, layer=COMMAND_LINE - 1)
            given |= {path: (value, above) for path, value in choice.settings.items()}
        layer = nested(dict(sorted(given.items()))) if given else Layer()
        resolved = resolve_chain(self.chain, self.name, above=layer, overrides=self.overrides)
        resolved = _with_seed(resolved)
        return smoked(resolved) if self.smoke else resolved


def _with_seed(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """The recipe with its seed in the names of other runs' files."""
    recipe = resolved.recipe
    for key, name in zip(_FILES, (recipe.model.init, recipe.distill.teacher), strict=True):
        if _SEED in name:
            named = name.replace(_SEED, str(recipe.train.seed))
            resolved = with_values(resolved, {key: named}, resolved.provenance[key])
    return resolved


def _expand(axes: Sequence[Axis], resolve: _Resolver) -> list[Run]:
    """Every combination once, seeds last of all in turning."""
    runs: dict[tuple[Any, ...], Run] = {}
    problems: list[str] = []
    for choices in _combinations(axes):
        try:
            bare = {number: choice for number, choice in choices.items() if not _is_pattern(choice)}
            resolved = resolve(bare, axes)
            if _takes_pattern(resolved):
                resolved = resolve(choices, axes)
            else:
                choices = bare
        except RecipeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        key = tuple(sorted((number, choice.label) for number, choice in choices.items()))
        if key not in runs:
            taken = {run.name for run in runs.values()}
            runs[key] = Run(_name(choices, taken), _labels(choices, axes), resolved)
    if problems:
        raise RecipeError(problems)
    return list(runs.values())


def _combinations(axes: Sequence[Axis]) -> Iterator[dict[int, Choice]]:
    """Axis number -> choice; the seeds turn slowest, the others as in the file."""
    order = sorted(range(len(axes)), key=lambda number: axes[number].keys != {SEED})
    for choices in itertools.product(*(axes[number].choices for number in order)):
        found = dict(zip(order, choices, strict=True))
        yield {number: found[number] for number in range(len(axes))}


def _takes_pattern(resolved: ResolvedRecipe) -> bool:
    info = METHODS[resolved.recipe.method["name"]]
    return info.sparse and info.structured


def _is_pattern(choice: Choice) -> bool:
    return choice.settings.keys() <= {("sparsity", "pattern"), ("sparsity", "vector")}


def _labels(choices: Mapping[int, Choice], axes: Sequence[Axis]) -> dict[str, str]:
    return {
        axis.heading: choices[number].label if number in choices else "-"
        for number, axis in enumerate(axes)
        if axis.keys != {SEED}
    }


def _name(choices: Mapping[int, Choice], taken: set[str]) -> str:
    """The parts of all choices; cut to a length that file systems take, numbered where cleaning made two alike."""
    name = "-".join(choice.part for choice in choices.values())
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    numbers = (f"{name}-{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbers if other not in taken)
