"""`lbc verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbc_cli.cli.common import make_console, parse_layers, reported
from lbc_cli.cli.options import AsJson, Device, LayerPatterns, PatternText, Quiet
from lbc_cli.errors import UsageError

if TYPE_CHECKING:
    from lbc_cli.verifier import Report


@reported
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, safetensors file, timm folder, ONNX file or export.")],
    *,
    pattern: PatternText = None,
    layers: LayerPatterns = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Check names and shapes against this timm model.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="PATH", help="Check that this artefact holds the same weights.")
    ] = None,
    transposable: Annotated[
        bool, typer.Option("--transposable", help="The pattern must hold along the output channels too.")
    ] = False,
    data: Annotated[str | None, typer.Option("--data", metavar="D", help="Measure the accuracy on this data.")] = None,
    min_top1: Annotated[
        float | None, typer.Option("--min-top1", metavar="X", min=0, max=100, help="Percent that --data must reach.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How --data is prepared, such as data.image_size=224."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that an artefact holds its N:M pattern and is undamaged. Exit code 3 if not."""
    from lbc_cli.report import print_verify, task
    from lbc_cli.report.describe import verify_view
    from lbc_cli.verifier import verify as run

    _check_options(data, min_top1=min_top1, override=override, device=device)
    console = make_console(quiet)
    report = run(
        path,
        pattern=pattern,
        layers=parse_layers(layers),
        model=model,
        against=against,
        values_only=data is not None,
        transposable=transposable,
    )
    if data is not None and report.ok:
        # What says itself which model it is needs no name, and takes none.
        named = model if report.kind in ("dense", "onnx") else None
        with task(console, "measuring, images evaluated") as advance:
            _measure(report, data, min_top1, model=named, device=device, overrides=override or (), progress=advance)
    elif data is not None:
        console.warning(f"{path} does not pass, so its accuracy is not measured")
    console.json(report.as_dict()) if as_json else print_verify(console, verify_view(report))
    if not report.ok:
        raise typer.Exit(3)


def _check_options(data: str | None, **only_with_data: object) -> None:
    """Options that say how to measure mean nothing where nothing is measured."""
    for name, value in only_with_data.items():
        if data is None and value not in (None, []):
            flag = {"override": "--set"}.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"{flag} says how the accuracy is measured: name the data too, with --data")


def _measure(report: Report, data: str, min_top1: float | None, **options: Any) -> None:
    """Add the accuracy to the report, and a finding if it is less than asked; options as for `accuracy.measure`."""
    from lbc_cli.accuracy import measure
    from lbc_cli.verifier import Finding

    found = measure(report.path, data, **options)
    pixels = dataclasses.asdict(found.pixels)
    report.accuracy = {"top1": found.top1, "top5": found.top5, "n": found.images, "data": found.data, "pixels": pixels}
    if min_top1 is not None and not found.top1 >= min_top1:
        message = f"top-1 is {found.top1:.2f} % on {found.images} images of {found.data}: {min_top1:g} % is asked"
        report.add(Finding("accuracy", "", message))
