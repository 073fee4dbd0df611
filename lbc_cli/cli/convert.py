"""`lbc convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbc_cli.cli.arguments import Arguments, Classes, Key, model_arguments, pattern_text
from lbc_cli.cli.common import make_console, parse_layers, reported
from lbc_cli.cli.options import AsJson, LayerPatterns, PatternText, Vector
from lbc_cli.errors import UsageError


@reported
def convert(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Weights: safetensors, .pth, .pt, .bin, a timm folder.")],
    *,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="timm model of the weights.")] = None,
    pattern: PatternText = None,
    vector: Vector = None,
    layers: LayerPatterns = None,
    key: Key = None,
    num_classes: Classes = None,
    override: Arguments = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="F", help="The checkpoint; must be new.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pack weights that hold N:M already, unchanged: apex ASP, the LBC authors' code, compressed-tensors, any other.

    Files of the LBC authors' code and of compressed-tensors (sparse-24-bitmask) bring their own pattern; for others
    name it. Weights that do not hold it are refused.
    """
    console = make_console()
    if out is None:
        raise UsageError("lbc convert needs --out, the file to write")
    text, chosen = pattern_text(pattern, vector), parse_layers(layers)
    arguments = model_arguments(override, num_classes)
    from lbc_cli import oneshot
    from lbc_cli.report.pruned import print_pruned, pruned_record

    outcome = oneshot.convert(path, out=out, model=model, pattern=text, layers=chosen, key=key, kwargs=arguments)
    console.json(pruned_record(outcome)) if as_json else print_pruned(console, outcome)
