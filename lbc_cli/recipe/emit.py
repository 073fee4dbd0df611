"""Recipes as TOML: what a run folder and a checkpoint keep, each value with its origin behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lbc_cli.recipe.layers import leaves
from lbc_cli.recipe.lines import KeyPath, dotted, quoted


def toml_value(value: Any) -> str:
    """A value on one line of TOML.

    Args:
        value: str, bool, int, float (infinite ones too), or a sequence or mapping of these.

    Raises:
        TypeError: for what TOML cannot express.
    """
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{dotted([key])} = {toml_value(below)}" for key, below in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(toml_value(below) for below in value) + "]"
    raise TypeError(f"{value!r} cannot be written as TOML")


def toml_text(values: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """A document of TOML.

    Args:
        values: nested as in TOML; None, which TOML lacks, becomes a comment.
        comments: dotted key -> what to say behind its value.

    Returns:
        Text that `tomllib` reads back as `values`, but for the None.
    """
    return "\n".join(_table(values, (), comments)).strip("\n") + "\n"


def provenance(values: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> dict[str, str]:
    """Dotted key -> where its value comes from, for every value of a resolved recipe."""
    return {dotted(path): origins.get(path, "default") for path, _ in leaves(dict(values))}


def printable(text: str) -> str:
    """A text as a comment can hold it: file names may have control characters, TOML's comments may not."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _table(values: Mapping[str, Any], path: KeyPath, comments: Mapping[str, str]) -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping) and value}
    if path and len(tables) < len(values):
        yield f"\n[{dotted(path)}]"
    for key, value in values.items():
        if key not in tables:
            yield _line(key, value, comments.get(dotted((*path, key)), ""))
    for key, below in tables.items():
        yield from _table(below, (*path, key), comments)


def _line(key: str, value: Any, comment: str) -> str:
    line = f"# {dotted([key])}: not set" if value is None else f"{dotted([key])} = {toml_value(value)}"
    return f"{line}  # {printable(comment)}" if comment else line
