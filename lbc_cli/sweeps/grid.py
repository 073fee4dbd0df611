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
seed: every cell of the table once, then every cell again.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbc_cli.errors import RecipeError, UsageError
from lbc_cli.methods import METHODS
from lbc_cli.recipe import ResolvedRecipe, find_recipe
from lbc_cli.recipe.command import nested, parse_override
from lbc_cli.recipe.emit import toml_value
from lbc_cli.recipe.files import Chain, read_chain
from lbc_cli.recipe.layers import COMMAND_LINE, Layer, Origin
from lbc_cli.recipe.lines import KeyPath, dotted, parse_key
from lbc_cli.recipe.load import resolve_chain
from lbc_cli.smoke import smoke as smoked

TABLE = "sweep"
VARIANTS = "variants"
SEED: KeyPath = ("train", "seed")
_SHORT: dict[str, KeyPath] = {
    "methods": ("method",),
    "patterns": ("sparsity", "pattern"),
    "vectors": ("sparsity", "vector"),
    "models": ("model", "name"),
    "seeds": SEED,
}
# Path -> heading of its column, and what stands before its value in the name of a run.
_HEADINGS: dict[KeyPath, tuple[str, str]] = {
    ("method",): ("method", ""),
    ("method", "name"): ("method", ""),
    ("sparsity", "pattern"): ("pattern", ""),
    ("sparsity", "vector"): ("vector", "v"),
    ("model", "name"): ("model", ""),
    SEED: ("seed", "seed"),
}
_LONGEST = 120  # characters of a run's name, which is a folder

Settings = Mapping[KeyPath, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of an axis.

    Attributes:
        label: for tables: "2:4", "lbc t_i=2".
        part: of the names of its runs: "2_4", "lbc_t_i2".
        settings: the keys of the recipe that it sets.
    """

    label: str
    part: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Axis:
    """One list of the table.

    Attributes:
        heading: of its column.
        choices: its values, in the file's order.
        origin: where it is written.
    """

    heading: str
    choices: tuple[Choice, ...]
    origin: Origin | None

    @property
    def keys(self) -> set[KeyPath]:
        """Every key that one of the choices sets."""
        return {path for choice in self.choices for path in choice.settings}


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
    file = find_recipe(path)
    chain = read_chain(file)
    if chain.problems:
        raise RecipeError([str(problem) for problem in chain.problems])
    axes = _take_axes(chain)
    _check_overrides(axes, overrides)
    runs = _expand(axes, _Resolver(chain, file.stem, overrides, smoke))
    headings = tuple(axis.heading for axis in axes if axis.keys != {SEED})
    return Sweep(file.stem, file.read_text(encoding="utf-8-sig"), headings, tuple(runs))


# The table


def _take_axes(chain: Chain) -> list[Axis]:
    """The axes of a sweep file, whose table is taken out of the chain."""
    layer = chain.layers[0]
    table = layer.values.pop(TABLE, None)
    origins = {path[1:]: layer.origins.pop(path) for path in list(layer.origins) if path[0] == TABLE}
    if not isinstance(table, dict) or not table:
        raise RecipeError(
            [f"{chain.files[0]}: has no [{TABLE}] table with lists, such as seeds = [0, 1, 2]; for a single run there "
             "is lbc train --recipe"]
        )  # fmt: skip
    problems: list[str] = []
    axes = []
    for key, path, values in _lists(table):
        origin = origins.get(key) or origins.get(key[:1])
        try:
            axes.append(_axis(key, path, values, origin))
        except ValueError as error:
            problems.append(f"{origin.place if origin else chain.files[0]}: {TABLE}.{dotted(key)}: {error}")
    for one, other in itertools.combinations(axes, 2):
        if shared := [path for path in other.keys if any(_overlap(path, known) for known in one.keys)]:
            place = other.origin.place if other.origin else chain.files[0]
            problems.append(f"{place}: {dotted(min(shared))} is varied twice: keep one of the two lists")
    if problems:
        raise RecipeError(problems)
    return _with_clear_headings(axes)


def _lists(table: Mapping[str, Any]) -> Iterator[tuple[KeyPath, KeyPath, Any]]:
    """Key as written, key of the recipe and value of every entry; dots and tables both lead to a key."""
    for key, value in table.items():
        if key in (*_SHORT, VARIANTS):
            yield (key,), _SHORT.get(key, (VARIANTS,)), value
        else:
            for path, below in _below((key,), value):
                yield path, (*_split(key), *path[1:]), below


def _below(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _below((*path, key), inner)
    else:
        yield path, value


def _split(key: str) -> KeyPath:
    """The parts of a key that may be dotted, in quotes."""
    path, at = parse_key(key)
    return path if at == len(key) else (key,)


def _axis(key: KeyPath, path: KeyPath, values: Any, origin: Origin | None) -> Axis:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{_shown(values)}: must be a list with a value for each run, such as [0, 1]")
    heading, prefix = _HEADINGS.get(path, (dotted(path), path[-1]))
    if path == (VARIANTS,):
        heading, choices = "variant", [_variant(value) for value in values]
    elif path == ("method",):
        choices = [_method(value) for value in values]
    else:
        choices = [Choice(_shown(value), prefix + _clean(_shown(value)), {path: value}) for value in values]
    for number, choice in enumerate(choices):
        if any(choice.label == other.label for other in choices[:number]):
            raise ValueError(f"{choice.label} stands there twice: name every value once")
    return Axis(heading, tuple(choices), origin)


def _method(value: Any) -> Choice:
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ValueError(f'{_shown(value)}: must be a name, or a table with one: {{ name = "lbc", t_i = 2 }}')
    given = [(key, option) for key, option in options.items() if key != "name"]
    label = " ".join([options["name"], *(f"{key}={_shown(option)}" for key, option in given)])
    part = "_".join([options["name"], *(f"{key}{_shown(option)}" for key, option in given)])
    return Choice(label, _clean(part), {("method", key): option for key, option in options.items()})


def _variant(value: Any) -> Choice:
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(value)}: must be a table of keys: {{ name = ..., method.removal = ... }}")
    keys = [(key, inner) for key, inner in value.items() if key != "name"]
    settings = {(*_split(key), *path[1:]): leaf for key, inner in keys for path, leaf in _below((key,), inner)}
    if not settings:
        raise ValueError(f"{_shown(value)}: sets nothing: add a key of the recipe")
    name = value.get("name", ", ".join(f"{dotted(path)}={_shown(leaf)}" for path, leaf in settings.items()))
    if not isinstance(name, str):
        raise ValueError(f"{_shown(value)}: its name must be a string")
    return Choice(name, _clean(name), settings)


def _with_clear_headings(axes: Sequence[Axis]) -> list[Axis]:
    """Names that two keys end in (optimizer.name, schedule.name) are written out in the names of runs."""
    last = [path[-1] for axis in axes if len(axis.keys) == 1 for path in axis.keys if path not in _HEADINGS]
    clear = []
    for axis in axes:
        path = min(axis.keys)
        if len(axis.keys) > 1 or path in _HEADINGS or last.count(path[-1]) < 2:
            clear.append(axis)
            continue
        choices = [replace(c, part=_clean(dotted(path) + c.part.removeprefix(path[-1]))) for c in axis.choices]
        clear.append(replace(axis, choices=tuple(choices)))
    return clear


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return toml_value(value)
    except TypeError:
        return str(value)


def _clean(text: str) -> str:
    """The text as a folder's name may hold it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text.replace("/", "v")).strip("_.") or "unnamed"


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    """Whether two keys are the same, or one is a table that holds the other."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _check_overrides(axes: Sequence[Axis], overrides: Sequence[str]) -> None:
    for override in overrides:
        try:
            path, _ = parse_override(override)
        except ValueError:
            continue  # resolving says what is wrong with it
        for key in sorted({key for axis in axes for key in axis.keys}):
            if _overlap(key, path):
                raise UsageError(f"--set {override}: the sweep varies {dotted(key)}: drop one of the two")


# The runs


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
        return smoked(resolved) if self.smoke else resolved


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
