"""`lbc bench`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, Device, PatternText, Quiet, Vector
from lbc_cli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from lbc_cli.bench.results import InferenceSetup
    from lbc_cli.report import Console

DTYPES = ("float32", "float16", "bfloat16", "float64")


@reported
def bench(
    source: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="A checkpoint, or a timm model name.")],
    *,
    train: Annotated[bool, typer.Option("--train", help="Measure training steps, dense beside the method's.")] = False,
    pattern: PatternText = None,
    vector: Vector = None,
    device: Device = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N[,N]", help="Images at once, each measured.")] = "16",
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="N[,N]", help="Of a CPU, each measured; 1 and all by default.")
    ] = None,
    image_size: Annotated[int, typer.Option("--image-size", min=0, help="Pixels; 0: the model's own.")] = 0,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16, bfloat16 or float64.")] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="semi-structured, vector, cpu or reference; all that run here.")
    ] = None,
    modes: Annotated[
        str | None, typer.Option("--modes", help="Some of eager, compiled and, on a CPU, onnxruntime; all by default.")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Timed calls of each candidate.")] = None,
    layers: Annotated[bool | None, typer.Option("--layers/--no-layers", help="Time every layer by itself.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Store what is fastest per layer beside FILE.")] = False,
    estimate: Annotated[
        str | None, typer.Option("--estimate", metavar="GPU", help="a100, h100 or h200, from datasheets.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw the result.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="With --train: beside dense; lbc if not said.")] = None,
    amp: Annotated[str | None, typer.Option("--amp", help="With --train: off, bfloat16 or float16 autocast.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="With --train: NHWC.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="With --train: timed steps of each kind.")] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="With --train: steps before them.")] = 2,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure inference, dense beside sparse; or, with --train, what a method adds to a training step."""
    training: dict[str, Any] = {
        "--method": method,
        "--amp": amp,
        "--channels-last": channels_last or None,
        "--steps": steps,
    }
    inference: dict[str, Any] = {
        "--dtype": dtype,
        "--runtime": runtime,
        "--modes": modes,
        "--rounds": rounds,
        "--threads": threads,
        "--layers": layers,
    }
    inference |= {"--tune": tune or None, "--estimate": estimate, "--plot": plot}
    _refuse(inference if train else training, "inference: drop it, or --train" if train else "training: add --train")
    console = make_console(quiet)
    common = {
        "batches": _numbers("--batch", batch, "images, such as 1,64,256"),
        "image_size": image_size,
        "device": device,
        "pattern": _pattern(pattern, vector, method if train else None),
    }
    if train:
        step = {"method": method, "amp": amp, "channels_last": channels_last, "steps": steps, "warmup": warmup}
        _train(console, as_json, source, common, step)
        return
    options = {"dtype": dtype, "runtime": runtime, "modes": modes, "rounds": rounds, "per_layer": layers}
    options["threads"] = threads
    _check_source(source, {"--pattern": pattern, "--vector": vector})
    setup = _inference_setup(source, common, {**options, "estimate": estimate})
    if tune:
        _check_tune(source, setup)
    _inference(console, setup, as_json=as_json, plot=plot, tune=tune)


def _refuse(options: Mapping[str, Any], belongs: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} belongs to {belongs}")


def _check_source(source: str, options: Mapping[str, Any]) -> None:
    """Refuse a path where nothing is, and patterns for a file, which has its own."""
    path = Path(source)
    if path.exists():
        _refuse(options, f"a model by name: what {source} holds is in the file")
    elif (len(path.parts) > 1 and ":" not in source) or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".onnx"):
        raise UsageError(f"{source}: no such file")


def _check_tune(source: str, setup: InferenceSetup) -> None:
    """Refuse before hours of measuring what could not be stored after them."""
    from lbc_cli.runtime.executors import choose_executors, usable_executors

    if not Path(source).is_file():
        raise UsageError(f"--tune stores its choices beside a file: {source} is none")
    if not setup.per_layer:
        raise UsageError("--tune chooses by the times of every layer: drop --no-layers")
    place = setup.device, setup.dtype
    found = choose_executors(setup.runtime, *place) if setup.runtime else usable_executors(*place)
    if not setup.measure or not any(executor.measured for executor in found):
        raise UsageError(f"--tune: {setup.device} has no sparse kernel in {setup.dtype} here: nothing to choose from")


def _numbers(option: str, text: str, what: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"{option} {text}: give numbers of {what}")
    return found


def _pattern(pattern: str | None, vector: int | None, method: str | None) -> str:
    """The pattern asked for, 2:4 unless said; "" for an unstructured method, which can have none."""
    from lbc_cli.patterns import Pattern
    from lbc_cli.recipe.layers import takes_pattern

    if method is not None and not takes_pattern(method):
        _refuse({"--pattern": pattern, "--vector": vector}, f"methods with a pattern: {method} is unstructured")
        return ""
    return str(Pattern.parse(pattern or "2:4", vector or 1))


def _train(console: Console, as_json: bool, model: str, common: Mapping[str, Any], step: Mapping[str, Any]) -> None:
    from lbc_cli import training
    from lbc_cli.bench import StepSetup, train_bench
    from lbc_cli.report import print_train_bench, train_bench_record
    from lbc_cli.report.describe import train_bench_view

    if len(common["batches"]) > 1:
        raise UsageError(f"--train measures one batch size: {len(common['batches'])} are given")
    setup = StepSetup(
        model=model,
        pattern=common["pattern"],
        method=step["method"] or "lbc",
        device=training.choose_device(common["device"] or "auto"),
        batch=common["batches"][0],
        image_size=common["image_size"],
        amp=step["amp"] or "off",
        channels_last=step["channels_last"],
        steps=step["steps"] or 10,
        warmup=step["warmup"],
    )
    view = train_bench_view(train_bench(setup, progress=console.info))
    console.json(train_bench_record(view)) if as_json else print_train_bench(console, view)


def _inference_setup(source: str, common: Mapping[str, Any], options: Mapping[str, Any]) -> InferenceSetup:
    import torch

    from lbc_cli.bench.results import InferenceSetup
    from lbc_cli.training import choose_device

    device = choose_device(common["device"] or "auto")
    on_gpu = device.type == "cuda"
    dtype = options["dtype"] or ("bfloat16" if on_gpu else "float32")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    # An estimate is for a GPU that is not here: dense times of this CPU would only stand in its way.
    measure = on_gpu or not options["estimate"]
    return InferenceSetup(
        source=source,
        pattern=common["pattern"],
        runtime=options["runtime"],
        device=device,
        dtype=getattr(torch, dtype),
        batches=common["batches"],
        image_size=common["image_size"],
        threads=_threads(options["threads"], on_gpu=on_gpu, measure=measure),
        modes=_modes(options["modes"], on_gpu=on_gpu),
        rounds=options["rounds"] or 20,
        per_layer=options["per_layer"] is not False,
        estimate=options["estimate"] or "",
        measure=measure,
    )


def _threads(text: str | None, *, on_gpu: bool, measure: bool) -> tuple[int, ...]:
    if text is None:
        return ()
    if on_gpu or not measure:
        raise UsageError("--threads belongs to measurements on a CPU: " + ("drop it" if on_gpu else "drop --estimate"))
    return _numbers("--threads", text, "threads, such as 1,4")


def _modes(text: str | None, *, on_gpu: bool) -> tuple[str, ...]:
    from importlib.util import find_spec

    from lbc_cli.bench.results import CPU_MODES, MODES, ONNXRUNTIME

    if text is None:
        return MODES if on_gpu else CPU_MODES
    if ONNXRUNTIME in text.split(",") and find_spec(ONNXRUNTIME) is None:
        raise UsageError(f"--modes {text}: {ONNXRUNTIME} is not installed: pip install 'lbc-cli[onnx]'")
    return tuple(text.split(","))


def _inference(console: Console, setup: InferenceSetup, *, as_json: bool, plot: Path | None, tune: bool) -> None:
    from lbc_cli.bench.inference import inference_bench
    from lbc_cli.report.benched import print_bench
    from lbc_cli.report.benched_plot import draw_bench
    from lbc_cli.runtime.tune import save_plan

    result = inference_bench(setup, console.info)
    for plan in result.plans if tune else ():
        console.info(f"{save_plan(setup.source, plan)}: batch {plan.key.batch} on {plan.key.device}: {plan.verdict}")
    console.json(result.as_dict()) if as_json else print_bench(console, result)
    if plot is not None and not draw_bench(result, plot):
        raise UsageError(f"--plot {plot}: nothing was measured, so there is nothing to draw")
