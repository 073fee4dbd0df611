"""Resolving a recipe: find it, follow what it extends, put the command line over it, check everything at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbc_cli.errors import RecipeError
from lbc_cli.recipe.check import validate
from lbc_cli.recipe.command import command_layer
from lbc_cli.recipe.emit import printable, provenance, toml_text
from lbc_cli.recipe.files import Chain, read_chain, short_label
from lbc_cli.recipe.layers import Layer, leaves, merge
from lbc_cli.recipe.lines import dotted
from lbc_cli.recipe.schema import Recipe

HEADER = "# Recipe as resolved: "  # and the files that it was made from
NO_FILES = "none but the defaults"


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """A recipe in which every key has a value, and where each of them comes from.

    Attributes:
        recipe: the values.
        provenance: dotted key -> "default", "recipes/digits.toml:12", "--set", "--epochs", ...
        name: what the recipe is called; empty where there was none but the defaults.
        extends: files that were read, the recipe first, its furthest parent last.
    """

    recipe: Recipe
    provenance: Mapping[str, str]
    name: str
    extends: tuple[str, ...]

    @property
    def text(self) -> str:
        """The recipe as TOML; see `to_toml`."""
        return to_toml(self)


def resolve(
    recipe: str | Path | None = None, *, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> ResolvedRecipe:
    """Turn a recipe and a command line into values.

    Args:
        recipe: path of a TOML file or name of a shipped recipe; None: the defaults alone.
        overrides: "a.b=v" of every --set.
        flags: dotted key -> value of the flags that were given; None: not given.

    Returns:
        Values and provenance. A flag or --set wins over the recipe, a recipe over what it extends.

    Raises:
        RecipeError: with every problem: what cannot be found or read, unknown keys, wrong types, values out of range,
            an unknown method, flags that contradict --set.
    """
    chain = Chain() if recipe is None else read_chain(recipe)
    return resolve_chain(chain, _name(recipe), overrides=overrides, flags=flags)


def resolve_chain(
    chain: Chain,
    name: str,
    *,
    above: Layer | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> ResolvedRecipe:
    """Turn files that were read, and a command line, into values.

    Args:
        chain: a recipe and what it extends.
        name: what the recipe is called.
        above: values that stand over the files and under the command line.
        overrides: "a.b=v" of every --set.
        flags: dotted key -> value of the flags that were given; None: not given.

    Raises:
        RecipeError: as `resolve` does.
    """
    command, disagreements = command_layer(overrides, flags or {})
    layer = merge(merge(chain.merged(), above or Layer()), command)
    resolved, problems = validate(layer)
    problems = [*chain.problems, *disagreements, *problems]
    if problems:
        raise RecipeError([str(problem) for problem in problems])
    origins = {path: origin.short for path, origin in layer.origins.items()}
    return ResolvedRecipe(
        recipe=resolved,
        provenance=provenance(resolved.model_dump(), origins),
        name=name,
        extends=tuple(map(short_label, chain.files)),
    )


def _name(recipe: str | Path | None) -> str:
    if recipe is None:
        return ""
    return Path(recipe).stem if str(recipe).endswith(".toml") else str(recipe)


def to_toml(resolved: ResolvedRecipe) -> str:
    """Write a resolved recipe as TOML, with the origin of every value behind it.

    Returns:
        Text that `tomllib` and `resolve` read back as the same recipe.
    """
    source = printable(" extends ".join(resolved.extends)) or NO_FILES
    header = f"{HEADER}{source}\n# Behind each value: where it comes from.\n\n"
    return header + toml_text(resolved.recipe.model_dump(), resolved.provenance)


def with_values(resolved: ResolvedRecipe, values: Mapping[str, Any], origin: str) -> ResolvedRecipe:
    """The same recipe with some values replaced.

    Args:
        resolved: a sound recipe.
        values: dotted key -> value; keys that the recipe has. Of a table, entries that stay as they were keep their
            origin.
        origin: where the new values come from, for the provenance.

    Raises:
        RecipeError: if the new values are not sound.
    """
    tables = resolved.recipe.model_dump()
    for key, value in values.items():
        *path, name = key.split(".")
        table = tables
        for part in path:
            table = table[part]
        table[name] = value
    recipe, problems = validate(Layer(values=tables))
    if problems:
        raise RecipeError([str(problem) for problem in problems])
    return replace(resolved, recipe=recipe, provenance=_provenance_with(resolved, values, origin))


def _provenance_with(resolved: ResolvedRecipe, values: Mapping[str, Any], origin: str) -> dict[str, str]:
    known = dict(resolved.provenance)
    before = {dotted(path): value for path, value in leaves(resolved.recipe.model_dump())}
    for key, value in values.items():
        if not isinstance(value, dict):
            known[key] = origin
            continue
        for name in [name for name in known if name == key or name.startswith(f"{key}.")]:
            del known[name]
        for path, leaf in leaves(value, tuple(key.split("."))):
            name = dotted(path)
            kept = name in before and before[name] == leaf and name in resolved.provenance
            known[name] = resolved.provenance[name] if kept else origin
    return known
