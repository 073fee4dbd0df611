"""The options that several commands share, each spelled once."""

from __future__ import annotations

from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results, warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe.")]
PatternText = Annotated[str | None, typer.Option("--pattern", metavar="N:M", help="Keep N of M input channels.")]
Vector = Annotated[int | None, typer.Option("--vector", metavar="V", help="V output channels share a mask.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; cuda where there is one.")]
LayerPatterns = Annotated[
    list[str] | None,
    typer.Option("--layers", metavar="GLOB=N:M", help="Another pattern, or dense, for these layers; repeatable."),
]
