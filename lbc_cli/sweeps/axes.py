"""The lists of a sweep file: what each of their values sets, and what it is called.

An axis is one list of the `[sweep]` table, a choice one of its values. See `grid` for the table itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lbc_cli.errors import RecipeError
from lbc_cli.recipe.emit import toml_value
from lbc_cli.recipe.files import Chain
from lbc_cli.recipe.layers import Origin
from lbc_cli.recipe.lines import KeyPath, dotted, parse_key

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


def take_axes(chain: Chain) -> list[Axis]:
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
        if shared := [path for path in other.keys if any(overlap(path, known) for known in one.keys)]:
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


def overlap(one: KeyPath, other: KeyPath) -> bool:
    """Whether two keys are the same, or one is a table that holds the other."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]
