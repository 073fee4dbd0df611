"""Per layer the fastest way, by measurement: dense and every sparse variant timed on the shapes that the model uses.

A sparse variant is taken only where its time lies clearly below the dense one's (their middle halves do not overlap),
so that noise never turns a layer sparse. The whole model is timed too: where the tuned one is not below dense, dense is
kept, and the plan says so. Plans stand in a JSON file beside the model:

    {"schema": 1, "plans": [{"key": {"device", "torch", "dtype", "batch", "image_size", "weights"},
                             "choices": {layer: variant}, "seconds": {layer: {variant: [q1, median, q3]}},
                             "model": {"dense": [q1, median, q3], "tuned": [...]}, "verdict": sentence,
                             "failed": {layer: {variant: why}}}]}

`weights` is the SHA-256 of the checkpoint's manifest. A plan is used only where its whole key is equal: times of
another GPU, torch, dtype or shape say nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.checkpoint import atomic_write_text
from lbc_cli.errors import CheckpointError
from lbc_cli.runtime.clock import Times, interleaved
from lbc_cli.runtime.convert import ways_of
from lbc_cli.runtime.cpu_dense import packed
from lbc_cli.runtime.executors import DENSE, Executor
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.prepare import Prepared
from lbc_cli.runtime.trace import Shape

SCHEMA = 1
Quartiles = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Key:
    """What a measurement holds for."""

    device: str
    """Name of the GPU, or of the CPU with its number of threads."""
    torch: str
    dtype: str
    batch: int
    image_size: tuple[int, int]
    """Height and width in pixels."""
    weights: str
    """SHA-256 of the checkpoint's manifest, "" for a model without a file."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs how, and the times that say so."""

    key: Key
    choices: Mapping[str, str]
    """Layer -> "dense" or a variant; only layers that can run sparse."""
    seconds: Mapping[str, Mapping[str, Quartiles]]
    """Layer -> variant -> first quartile, median, third quartile of one call."""
    model: Mapping[str, Quartiles]
    """The whole model, "dense" and "tuned"; only "dense" where no layer is faster sparse."""
    verdict: str
    """One sentence."""
    failed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Layer -> variant -> why its kernel cannot run it; such a variant has no times and is never chosen."""


def device_name(device: torch.device) -> str:
    """What times depend on: the GPU's name, or the CPU's and its threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    from lbc_cli.environment import describe_hardware

    return f"{describe_hardware()['cpu']}, {torch.get_num_threads()} threads"


def key_for(prepared: Prepared, *, batch: int, dtype: torch.dtype, device: torch.device, weights: str = "") -> Key:
    """The key of a measurement on this machine."""
    height, width = prepared.sample.shape[2:]
    name = str(dtype).removeprefix("torch.")
    return Key(device_name(device), torch.__version__, name, batch, (int(height), int(width)), weights)


def tune(
    prepared: Prepared,
    executors: Sequence[Executor],
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    weights: str = "",
    rounds: int = 20,
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Measure every layer that can run sparse, and choose.

    Args:
        prepared: the model.
        executors: whose variants compete with dense.
        batch: images at once.
        dtype: of weights and activations.
        device: where.
        weights: SHA-256 of the checkpoint's manifest.
        rounds: timed calls of every variant; on a CUDA device each is a CUDA graph.
        seconds: no further round of a layer after that time.
        progress: told a line per layer.
    """
    taken: dict[str, dict[str, Times]] = {}
    failed: dict[str, dict[str, str]] = {}
    known: dict[tuple[object, ...], tuple[dict[str, Times], dict[str, str]]] = {}
    for layer in prepared.layers():
        ways, _ = ways_of(layer, executors)
        if not ways:
            continue
        same = work_of(layer, ways)
        if same not in known:  # layers of one shape take one time: a ViT has four
            known[same] = time_layer(layer, ways, batch, dtype, device, rounds, seconds)
        taken[layer.name], refused = known[same]
        if refused:
            failed[layer.name] = refused
        progress(_line(layer, taken[layer.name], refused))
    choices = {name: fastest(times) for name, times in taken.items()}
    model = _time_model(prepared, executors, choices, batch, dtype, device, rounds, seconds)
    sparse = sum(choice != DENSE for choice in choices.values())
    verdict = f"{sparse} of {len(choices)} layers are faster sparse"
    if "tuned" in model and not model["tuned"].clearly_below(model["dense"]):
        verdict += ", but the whole model is not: everything stays dense"
        choices = dict.fromkeys(choices, DENSE)
    return Plan(
        key=key_for(prepared, batch=batch, dtype=dtype, device=device, weights=weights),
        choices=choices,
        seconds={name: {way: times.quartiles for way, times in ways.items()} for name, ways in taken.items()},
        model={name: times.quartiles for name, times in model.items()},
        verdict=verdict,
        failed=failed,
    )


def fastest(times: Mapping[str, Times]) -> str:
    """The variant of the least median, where it lies clearly below dense; else dense."""
    best = min(times, key=lambda name: times[name].median)
    return best if best != DENSE and times[best].clearly_below(times[DENSE]) else DENSE


def work_of(layer: Layer, ways: Mapping[str, Executor]) -> tuple[object, ...]:
    """What the times of a layer depend on: equal for layers that take the same time."""
    settings = [str(getattr(layer.module, name, None)) for name in ("stride", "padding", "dilation", "groups")]
    return (layer.shape, layer.pattern, layer.inputs, tuple(ways), *settings)


def _line(layer: Layer, times: Mapping[str, Times], refused: Mapping[str, str]) -> str:
    parts = [f"{name} {1e6 * value.median:.1f} us" for name, value in times.items()]
    parts += [f"{name} cannot run ({why})" for name, why in refused.items()]
    return f"{layer.name}: {', '.join(parts)}"


def time_layer(
    layer: Layer,
    ways: Mapping[str, Executor],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    seconds: float,
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time a layer as dense and as each of its variants, on inputs for a batch.

    Returns:
        Times by variant; and the variants that cannot run this layer, with the kernel's own reason.
    """
    inputs = [example(shape, batch, dtype, device) for shape in layer.inputs]
    calls = {DENSE: partial(_run, dense_module(layer, dtype=dtype, device=device), inputs)}
    refused: dict[str, str] = {}
    with torch.inference_mode():
        for name, executor in ways.items():
            try:
                call = partial(_run, executor.build(layer, name, dtype=dtype, device=device), inputs)
                call()
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:  # libraries say only when asked what they cannot do
                refused[name] = " ".join(str(error).split())[:200]
            else:
                calls[name] = call
        graphs = device.type == "cuda"
        return interleaved(calls, device, rounds=rounds, graphs=graphs, seconds=seconds), refused


def dense_module(layer: Layer, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A dense copy of a layer as models run it: channels last, on a CPU with packed weights."""
    dense = copy.deepcopy(layer.module).to(device=device, dtype=dtype).to(memory_format=torch.channels_last).eval()
    return packed(dense)


def example(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random input of a layer for a batch, channels last; `shape` is that for one image."""
    # Made where it is needed: a large batch takes a CPU longer than what is timed.
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn((shape[0] * batch, *shape[1:]), generator=generator, device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


def _run(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    for value in inputs:
        module(value)


def _time_model(
    prepared: Prepared,
    executors: Sequence[Executor],
    choices: Mapping[str, str],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    seconds: float,
) -> dict[str, Times]:
    models = {DENSE: prepared.dense(dtype=dtype, device=device)}
    if any(choice != DENSE for choice in choices.values()):
        models["tuned"], _ = prepared.sparse(executors, dtype=dtype, device=device, choices=choices)
    images = [example(tuple(prepared.sample.shape), batch, dtype, device)]
    calls = {name: partial(_run, model, images) for name, model in models.items()}
    with torch.inference_mode():
        return interleaved(calls, device, rounds=rounds, graphs=device.type == "cuda", seconds=10 * seconds)


def plan_file(model_file: str | os.PathLike[str]) -> Path:
    """Where the plans of a model stand: "m.safetensors" -> "m.tuned.json"."""
    return Path(model_file).with_suffix(".tuned.json")


def save_plan(model_file: str | os.PathLike[str], plan: Plan) -> Path:
    """Add a plan to the file beside the model, in place of an older one with the same key.

    Raises:
        OutputError: if it cannot be written.
        CheckpointError: if what is there is no plan file.
    """
    path = plan_file(model_file)
    others = [other for other in read_plans(model_file) if other.key != plan.key]
    plans = [dataclasses.asdict(entry) for entry in [*others, plan]]
    atomic_write_text(path, json.dumps({"schema": SCHEMA, "plans": plans}, indent=1, sort_keys=True) + "\n")
    return path


def find_plan(model_file: str | os.PathLike[str], key: Key) -> Plan | None:
    """The plan that was measured for exactly this, None if there is none.

    Raises:
        CheckpointError: if the file beside the model is no plan file.
    """
    return next((plan for plan in read_plans(model_file) if plan.key == key), None)


def read_plans(model_file: str | os.PathLike[str]) -> list[Plan]:
    """All plans of a model; none if there is no file.

    Raises:
        CheckpointError: if the file is no plan file.
    """
    path = plan_file(model_file)
    if not path.exists():
        return []
    try:
        parsed = json.loads(path.read_text())
        if parsed["schema"] != SCHEMA:
            raise ValueError(f"schema {parsed['schema']}, {SCHEMA} is known")
        return [_parse(entry) for entry in parsed["plans"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no plan file ({error}): delete it and tune again") from error


def _parse(entry: dict[str, Any]) -> Plan:
    fields = dict(entry["key"])
    fields["image_size"] = tuple(fields["image_size"])
    seconds = {name: {way: _three(q) for way, q in ways.items()} for name, ways in entry["seconds"].items()}
    model = {name: _three(q) for name, q in entry["model"].items()}
    failed = {name: dict(ways) for name, ways in entry["failed"].items()}
    return Plan(Key(**fields), dict(entry["choices"]), seconds, model, str(entry["verdict"]), failed)


def _three(values: Sequence[float]) -> Quartiles:
    low, middle, high = (float(value) for value in values)
    return low, middle, high
