"""`lbc recipe`: list, show, paper, schema."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Overrides
from lbc_cli.errors import UsageError


@reported
def list_recipes(*, as_json: AsJson = False) -> None:
    """List the shipped recipes, and the sweeps made from them."""
    from lbc_cli.recipe import resolve, shipped_recipes, shipped_sweeps
    from lbc_cli.report import table

    console = make_console()
    found = {name: resolve(name).recipe.description for name in shipped_recipes()}
    sweeps = {name: _asked(path.read_text("utf-8")) for name, path in shipped_sweeps().items()}
    if as_json:
        console.json(found | sweeps)
    else:
        rows = [list(item) for item in found.items()]
        console.result(table("Shipped recipes", {"recipe": "left", "for": "left"}, rows))
        rows = [list(item) for item in sweeps.items()]
        console.result(table("Shipped sweeps", {"sweep": "left", "what it asks": "left"}, rows))


def _asked(text: str) -> str:
    """The first sentence of the comment that a file begins with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0]


@reported
def show_recipe(
    name: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    *,
    override: Overrides = None,
) -> None:
    """Print a recipe as resolved, with the origin of every value."""
    from lbc_cli.recipe import resolve

    print(resolve(name, overrides=override or []).text, end="")


@reported
def paper_figures(
    *,
    number: Annotated[int | None, typer.Option("--table", metavar="1|4|5", help="This table only.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the LBC paper's parameters and FLOPs beside those counted for its recipes."""
    from lbc_cli.paper import NOTES, TABLES, rows
    from lbc_cli.report.papers import print_paper

    if number is not None and number not in TABLES:
        raise UsageError(f"--table {number}: what can be counted is in tables {', '.join(map(str, TABLES))}")
    console = make_console()
    found = {known: rows(known) for known in TABLES if number in (None, known)}
    if as_json:
        console.json({str(known): {"rows": found[known], "notes": NOTES[known]} for known in found})
        return
    for known, lines in found.items():
        print_paper(console, known, lines, NOTES[known])


@reported
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Write it to lbc-recipe.schema.json and begin a recipe of your own with the line
    "#:schema ./lbc-recipe.schema.json".
    """
    from lbc_cli.recipe import json_schema

    make_console().json(json_schema())
