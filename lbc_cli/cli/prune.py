"""`lbc prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbc_cli.cli.arguments import Arguments, Classes, Key, model_arguments, pattern_text
from lbc_cli.cli.common import make_console, parse_layers, reported
from lbc_cli.cli.options import AsJson, Device, LayerPatterns, PatternText, Quiet, Vector
from lbc_cli.errors import UsageError

if TYPE_CHECKING:
    from lbc_cli.oneshot import Start
    from lbc_cli.report import Console

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


@reported
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="timm model, or a checkpoint or timm folder.")],
    *,
    pattern: PatternText = None,
    vector: Vector = None,
    layers: LayerPatterns = None,
    method: Annotated[
        str,
        typer.Option("--method", help="How to choose the weights that stay: magnitude, taylor, wanda or sparsegpt."),
    ] = "magnitude",
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="D", help="Measure on it before and after; its training split calibrates."),
    ] = None,
    calibration: Annotated[
        int | None,
        typer.Option("--calibration", metavar="N", min=1, help="Training images to look at; 512 if not said."),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="Permute channels first: more is kept, the function stays the same.")
    ] = False,
    transposable: Annotated[
        bool, typer.Option("--transposable", help="Keep N of M along the output channels too: W and its transpose.")
    ] = False,
    recalibrate_bn: Annotated[
        bool, typer.Option("--recalibrate-bn", help="Renew batch-norm statistics on the calibration images.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="pretrained|random|FILE", help="Weights for MODEL; pretrained if not said."),
    ] = None,
    key: Key = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="S", min=0, help="Of random weights and calibration images; 0 if not said."),
    ] = None,
    num_classes: Classes = None,
    override: Arguments = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="F", help="The checkpoint; must be new.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model to N:M in one shot, save it packed, and verify what was saved.

    --set takes arguments of timm.create_model and, with --data, how images are prepared: data.image_size=224.
    """
    console = make_console(quiet)
    text = pattern_text(pattern, vector)
    if text is None or out is None:
        missing = "--pattern, such as --pattern 2:4" if text is None else "--out, the file to write"
        raise UsageError(f"lbc prune needs {missing}")
    prepared = [entry for entry in override or () if entry.lstrip().startswith("data.")]
    arguments = model_arguments([entry for entry in override or () if entry not in prepared], num_classes)
    chosen = parse_layers(layers)
    from lbc_cli import oneshot
    from lbc_cli.checkpoint.files import check_free
    from lbc_cli.report.pruned import print_pruned, pruned_record, pruning_progress

    asked: dict[str, Any] = {
        "method": method,
        "data": data,
        "calibration": calibration,
        "seed": seed or 0,
        "permute": permute,
        "transposable": transposable,
        "recalibrate_bn": recalibrate_bn,
        "device": device,
        "overrides": tuple(prepared),
    }
    request = oneshot.Request(**asked)
    check_free(out)
    if seed is not None and weights != oneshot.RANDOM and not request.calibrates:
        raise UsageError("--seed is for random weights and calibration images: add --weights random, or leave it out")
    start = _start(console, model, weights, seed, key, arguments)
    console.info(f"{start.arch}, weights: {start.origin}")
    with pruning_progress(console) as progress:
        outcome = oneshot.prune(start, pattern=text, out=out, layers=chosen, progress=progress, **asked)
    console.json(pruned_record(outcome)) if as_json else print_pruned(console, outcome)


def _start(
    console: Console, model: str, weights: str | None, seed: int | None, key: str | None, arguments: dict[str, Any]
) -> Start:
    from lbc_cli import oneshot

    if not _is_path(model):
        if weights in (None, oneshot.PRETRAINED):
            console.info(f"loading timm's pretrained weights for {model}")
        return oneshot.from_name(
            model, weights=weights or oneshot.PRETRAINED, seed=seed or 0, key=key, kwargs=arguments
        )
    if weights is not None:
        raise UsageError(f"{model} brings its own weights: drop --weights, or name a timm model instead of the file")
    return oneshot.from_file(model, key=key, kwargs=arguments)


def _is_path(text: str) -> bool:
    """Whether MODEL|FILE is a file: by its spelling, or because it is there and timm knows no such model."""
    from lbc_cli import models

    if "/" in text or text.lower().endswith(_ENDINGS):
        return True
    return Path(text).exists() and not models.is_known(text)
