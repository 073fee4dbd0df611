"""`lbc bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Device, PatternText, Quiet, Vector
from lbc_cli.errors import UsageError


@reported
def bench(
    model: Annotated[str, typer.Argument(help="timm model name.")],
    *,
    train: Annotated[bool, typer.Option("--train", help="Measure training steps, dense beside the method's.")] = False,
    pattern: PatternText = None,
    vector: Vector = None,
    method: Annotated[str, typer.Option("--method", help="What to measure beside dense.")] = "lbc",
    device: Device = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per step.")] = 16,
    image_size: Annotated[int, typer.Option("--image-size", min=0, help="Pixels; 0: the model's own.")] = 0,
    amp: Annotated[str, typer.Option("--amp", help="off, bfloat16 or float16 autocast.")] = "off",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC memory format.")] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each kind.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them.")] = 2,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a method adds to a training step, interleaved with dense steps."""
    if not train:
        raise UsageError("lbc bench measures training steps: add --train")
    from lbc_cli import training
    from lbc_cli.bench import StepSetup, train_bench
    from lbc_cli.patterns import Pattern
    from lbc_cli.report import print_train_bench, train_bench_record
    from lbc_cli.report.describe import train_bench_view

    console = make_console(quiet)
    setup = StepSetup(
        model=model,
        pattern=str(Pattern.parse(pattern or "2:4", vector or 1)),
        method=method,
        device=training.choose_device(device or "auto"),
        batch=batch,
        image_size=image_size,
        amp=amp,
        channels_last=channels_last,
        steps=steps,
        warmup=warmup,
    )
    view = train_bench_view(train_bench(setup, progress=console.info))
    console.json(train_bench_record(view)) if as_json else print_train_bench(console, view)
