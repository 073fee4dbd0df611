"""What the command line says of a recipe: flags and `--set`."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from lbc_cli.recipe.layers import COMMAND_LINE, Layer, Origin, Problem, leaves
from lbc_cli.recipe.lines import KeyPath, dotted, parse_key

# Flags whose name is not that of the key behind them.
_FLAGS = {"model.name": "MODEL", "data.source": "--data", "method.name": "--method"}


def command_layer(overrides: Sequence[str], flags: Mapping[str, Any]) -> tuple[Layer, list[Problem]]:
    """What the command line says, as one layer: flags and `--set` may not contradict each other.

    Args:
        overrides: "a.b=v" each, as given to --set; the value is TOML, or else a string.
        flags: key -> value of the flags that were given; None: not given.

    Returns:
        The layer, and what is wrong on the command line.
    """
    given: dict[KeyPath, tuple[Any, Origin]] = {}
    problems: list[Problem] = []
    for number, (path, value, origin) in enumerate(_assignments(overrides, flags, problems)):
        clash = next((known for known in given if _clash(known, given[known][0], path, value)), None)
        if clash is None:
            given[path] = (value, replace(origin, line=number))
        else:
            text = f"{given[clash][1].place} and {origin.place} disagree: give one of them"
            problems.append(Problem(None, dotted(path), text))
    return nested(given), problems


def _assignments(
    overrides: Sequence[str], flags: Mapping[str, Any], problems: list[Problem]
) -> Iterator[tuple[KeyPath, Any, Origin]]:
    for key, value in flags.items():
        if value is not None:
            flag = _flag(key)
            place = flag if value is True or flag == "MODEL" else f"{flag} {value}"
            origin = Origin(COMMAND_LINE, 0, place, flag)
            yield from ((path, leaf, origin) for path, leaf in leaves(_plain(value), parse_key(key)[0]))
    for override in overrides:
        origin = Origin(COMMAND_LINE, 0, f"--set {override}", "--set")
        try:
            path, value = parse_override(override)
        except ValueError as error:
            problems.append(Problem(origin, "", str(error)))
            continue
        yield from ((leaf_path, leaf, origin) for leaf_path, leaf in leaves(value, path))


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """Read `a.b=v`: the value is TOML, or else taken as a string.

    Raises:
        ValueError: if there is no key, or no equals sign behind it.
    """
    try:
        path, at = parse_key(text)
    except ValueError:
        at = -1
    if at < 0 or not text.startswith("=", at):
        raise ValueError('must be KEY=VALUE, such as train.epochs=10 or sparsity.layers."layer4.*"="1:4"')
    if path == ("extends",):
        raise ValueError("extends belongs in a recipe file; on the command line, --recipe names the recipe")
    value = text[at + 1 :].strip()
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return path, value
    # More than one key: a line break in the value. A time: TOML 1.1 reads the pattern 16:32 as one.
    odd = len(parsed) != 1 or isinstance(parsed["value"], datetime.date | datetime.time)
    return path, value if odd else parsed["value"]


def _clash(known: KeyPath, old: Any, path: KeyPath, new: Any) -> bool:
    if known == path:
        return bool(old != new) or isinstance(old, bool) != isinstance(new, bool)
    shared = min(len(known), len(path))
    return known[:shared] == path[:shared]


def nested(given: Mapping[KeyPath, tuple[Any, Origin]]) -> Layer:
    """Values by path as one layer, each with its origin."""
    layer = Layer()
    for path, (value, origin) in given.items():
        table = layer.values
        for length, name in enumerate(path[:-1], 1):
            table = table.setdefault(name, {})
            layer.origins[path[:length]] = origin
        table[path[-1]] = value
        layer.origins[path] = origin
    return layer


def _flag(key: str) -> str:
    return _FLAGS.get(key, "--" + parse_key(key)[0][-1].replace("_", "-"))


def _plain(value: Any) -> Any:
    """A flag's value in the types that TOML has."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(below) for below in value]
    return value
