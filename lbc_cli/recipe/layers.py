"""What a recipe is put together from: files that extend one another, `--set` and flags, each value with its origin.

Every source becomes a `Layer`; layers are merged from the furthest parent to the command line. Tables merge, all other
values replace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lbc_cli.recipe.lines import KeyPath
from lbc_cli.recipe.schema import Recipe

COMMAND_LINE = 1 << 30  # behind every file of a chain


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a value was written.

    Attributes:
        layer: place in the chain of layers; what is later was written over what is earlier.
        line: in the file, or place on the command line.
        place: for messages: "recipes/digits.toml:12", "--set train.epochs=3", "--epochs".
        short: for the provenance, which travels in checkpoints: "--set", and no folders outside the current one.
    """

    layer: int
    line: int
    place: str
    short: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe, and where."""

    origin: Origin | None
    key: str
    text: str

    def __str__(self) -> str:
        """The problem on one line: place, key, what is wrong and the remedy."""
        return ": ".join(part for part in (self.origin.place if self.origin else "", self.key, self.text) if part)

    @property
    def order(self) -> tuple[int, int]:
        """Problems are reported in the order in which they were written."""
        return (self.origin.layer, self.origin.line) if self.origin else (COMMAND_LINE + 1, 0)


@dataclass(slots=True)
class Layer:
    """Values of a recipe, nested as in TOML, and the origin of every key and table among them."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin_of(self, path: Sequence[str | int]) -> Origin | None:
        """The origin of a key, else of what it stands in."""
        names = tuple(part for part in path if isinstance(part, str))
        for length in range(len(names), 0, -1):
            if names[:length] in self.origins:
                return self.origins[names[:length]]
        return None


def default_method() -> str:
    """The method of a recipe that names none."""
    name: str = Recipe.model_fields["method"].get_default(call_default_factory=True, validated_data={})["name"]
    return name


def merge(below: Layer, above: Layer) -> Layer:
    """Put one layer over another: tables merge, other values replace.

    A layer that names another method than the one below starts that method's options afresh, and the pattern as well
    where one of the two has none.
    """
    merged = Layer(copy.deepcopy(below.values), dict(below.origins))
    method = _method_of(below.values, default_method())
    other = _method_of(above.values, method)
    if other != method:
        _forget(merged, ("method",))
        if takes_pattern(other) != takes_pattern(method):
            _forget(merged, ("sparsity", "pattern"))
            _forget(merged, ("sparsity", "vector"))
    _overlay(merged, merged.values, above.values, ())
    merged.origins.update(above.origins)
    return merged


def takes_pattern(method: Any) -> bool:
    """Whether a method has an N:M pattern; one that there is not is taken to have one."""
    from lbc_cli.methods import METHODS  # loads torch

    return not isinstance(method, str) or method not in METHODS or METHODS[method].structured


def _method_of(values: Mapping[str, Any], otherwise: Any) -> Any:
    table = values.get("method")
    return table.get("name", otherwise) if isinstance(table, dict) else otherwise


def _overlay(layer: Layer, into: dict[str, Any], values: Mapping[str, Any], path: KeyPath) -> None:
    for key, value in values.items():
        old = into.get(key)
        # An empty table of globs or arguments is a wish, to have none; an empty [train] is just a heading.
        if isinstance(old, dict) and isinstance(value, dict) and (value or not path):
            _overlay(layer, old, value, (*path, key))
        else:
            # Out and in again: a glob of sparsity.layers that is set anew is the last one, and the last match wins.
            _forget(layer, (*path, key))
            into[key] = copy.deepcopy(value)


def _forget(layer: Layer, path: KeyPath) -> None:
    *tables, key = path
    table: Any = layer.values
    for name in tables:
        table = table.get(name) if isinstance(table, dict) else None
    if isinstance(table, dict):
        table.pop(key, None)
    for known in [known for known in layer.origins if known[: len(path)] == path]:
        del layer.origins[known]


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value below `path` that is not a table with something in it."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    else:
        yield path, value
