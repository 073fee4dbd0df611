"""The command line: parse, call, render, exit code. Torch is loaded only once a command really needs it.

Each command is a module of this package, and a line below.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lbc_cli import __version__
from lbc_cli.cli.bench import bench
from lbc_cli.cli.compare import compare
from lbc_cli.cli.convert import convert
from lbc_cli.cli.export import export
from lbc_cli.cli.inspect import inspect
from lbc_cli.cli.prune import prune
from lbc_cli.cli.recipes import list_recipes, paper_figures, recipe_schema, show_recipe
from lbc_cli.cli.sweep import sweep
from lbc_cli.cli.train import train
from lbc_cli.cli.verify import verify

app = typer.Typer(
    name="lbc",
    help="N:M sparse vision models: train, verify and measure them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(name="recipe", help="Look at recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes)
app.command()(train)
app.command()(sweep)
app.command()(compare)
app.command()(prune)
app.command()(convert)
app.command()(verify)
app.command()(export)
app.command()(inspect)
app.command()(bench)
recipes.command("list")(list_recipes)
recipes.command("show")(show_recipe)
recipes.command("paper")(paper_figures)
recipes.command("schema")(recipe_schema)


def _version(value: bool) -> None:
    if value:
        print(f"lbc {__version__}")
        raise typer.Exit


@app.callback()
def _lbc(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """N:M sparse vision models: train, verify and measure them."""


def main() -> None:
    """Entry point of the `lbc` command."""
    app()


if __name__ == "__main__":
    main()
