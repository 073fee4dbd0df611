"""`lbc inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Verbose
from lbc_cli.errors import UsageError


@reported
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, run state, or any safetensors file.")],
    *,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print only the recipe it comes from, as TOML.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what a file holds, without reading its tensors: model, method, recipe, every layer."""
    if recipe and as_json:
        raise UsageError("--recipe prints TOML and --json JSON, which holds the recipe anyway: give one of them")
    from lbc_cli.checkpoint.contents import read_contents
    from lbc_cli.report.inspected import inspect_record, print_inspect, recipe_of

    contents = read_contents(file)
    console = make_console()
    if recipe:
        sys.stdout.write(recipe_of(contents))
    elif as_json:
        console.json(inspect_record(contents))
    else:
        print_inspect(console, contents, every=verbose)
