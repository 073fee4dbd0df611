"""Reading back what `to_toml` wrote behind the values: a resumed run knows where its settings came from at first.

Without this every value of a resumed run would come from the run folder's own recipe.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lbc_cli.recipe.emit import toml_value
from lbc_cli.recipe.layers import leaves
from lbc_cli.recipe.lines import dotted, key_lines
from lbc_cli.recipe.load import HEADER, NO_FILES, ResolvedRecipe, resolve

_EXTENDS = " extends "


def resolve_again(path: Path) -> ResolvedRecipe:
    """The recipe of a run folder, with the origins that it was written with.

    Raises:
        RecipeError: as `resolve` does.
    """
    resolved = resolve(path)
    text = path.read_text(encoding="utf-8")
    written = read_origins(text)
    provenance = {key: written.get(key, origin) for key, origin in resolved.provenance.items()}
    extends = read_files(text)
    if extends is None:  # written by hand, or by something else
        return replace(resolved, provenance=provenance)
    return replace(resolved, provenance=provenance, name=Path(extends[0]).stem if extends else "", extends=extends)


def read_origins(text: str) -> dict[str, str]:
    """Dotted key -> what stands as a comment behind its value.

    Args:
        text: valid TOML. Values that are not written as `to_toml` writes them are passed over, those without a comment
            as well.
    """
    lines = text.splitlines()
    places = key_lines(text)
    found: dict[str, str] = {}
    for path, value in leaves(tomllib.loads(text)):
        if path not in places or not _is_plain(value):
            continue
        # A value may hold a "#" itself: what is behind it is found by writing it once more.
        written = f"{dotted(path[-1:])} = {toml_value(value)}"
        line = lines[places[path] - 1]
        if line.startswith(f"{written}  # "):
            found[dotted(path)] = line.removeprefix(f"{written}  # ")
    return found


def _is_plain(value: object) -> bool:
    """Whether `to_toml` could have written the value."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | bool | int | float)


def read_files(text: str) -> tuple[str, ...] | None:
    """The files that a resolved recipe was made from; None for a text that does not say."""
    first = text.split("\n", 1)[0]
    if not first.startswith(HEADER):
        return None
    files = first.removeprefix(HEADER)
    return () if files == NO_FILES else tuple(files.split(_EXTENDS))
