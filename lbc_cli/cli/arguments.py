"""Options that say which model and pattern, for commands that have no recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lbc_cli.errors import UsageError

Arguments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An argument of timm.create_model, such as img_size=384."),
]
Key = Annotated[
    str | None, typer.Option("--key", help="Entry of a .pth file that holds the weights, such as model_ema.")
]
Classes = Annotated[int | None, typer.Option("--num-classes", min=0, help="Size of the classifier.")]


def model_arguments(given: Sequence[str] | None, num_classes: int | None = None) -> dict[str, Any]:
    """The arguments of --set, each a TOML value or else a string, and of --num-classes.

    Raises:
        UsageError: for what is not KEY=VALUE, or an argument that is given twice.
    """
    from lbc_cli.recipe.command import parse_override

    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    for text in given or ():
        try:
            path, value = parse_override(text)
        except ValueError:
            path, value = (), None
        if len(path) != 1:
            raise UsageError(f"--set {text}: write KEY=VALUE, such as --set img_size=384")
        if path[0] in arguments:
            raise UsageError(f"{path[0]} is given twice: keep one of the two")
        arguments[path[0]] = value
    return arguments


def pattern_text(pattern: str | None, vector: int | None) -> str | None:
    """--pattern and --vector as one text, "N:M/V".

    Raises:
        UsageError: if a vector length stands without a pattern, or two of them differ.
        PatternError: if it is not a pattern.
    """
    from lbc_cli.patterns import Pattern

    if pattern is None:
        if vector is not None:
            raise UsageError("--vector needs a --pattern: add one, such as --pattern 2:4")
        return None
    parsed = Pattern.parse(pattern, vector or 1)
    if vector is not None and parsed.vector != vector:
        raise UsageError(f"--pattern {pattern} and --vector {vector} disagree: keep one of the two vector lengths")
    return str(parsed)
