"""Measuring inference: dense beside sparse, with everything else alike, so that the difference is the sparsity.

Both sides have the same weights, dtype, channels-last layout and folded batch norms, and each gets the better of eager
and compiled execution. Outputs are compared before anything is timed. Calls are interleaved round by round; medians and
quartiles are given. Where a device has no sparse kernel, dense is measured alone and nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lbc_cli import models
from lbc_cli.bench.datasheets import find_gpu
from lbc_cli.bench.machine import clocks, measured_peak
from lbc_cli.bench.operators import other_operators
from lbc_cli.bench.results import TOLERANCE, BatchResult, InferenceBench, InferenceSetup, LayerResult, Quartiles, Side
from lbc_cli.bench.roofline import Estimate, estimate
from lbc_cli.bench.work import Form, work_dense
from lbc_cli.engine import memory_advice
from lbc_cli.environment import describe_hardware
from lbc_cli.errors import VerificationError
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.runtime.clock import Times, interleaved
from lbc_cli.runtime.convert import Executed, ways_of
from lbc_cli.runtime.executors import DENSE, Executor, choose_executors, usable_executors
from lbc_cli.runtime.layers import SparseLayer
from lbc_cli.runtime.loading import identity, open_model
from lbc_cli.runtime.prepare import Prepared, prepare
from lbc_cli.runtime.tune import Plan, example, time_layer, tune, work_of
from lbc_cli.runtime.vector_layers import VectorLayer
from lbc_cli.targets import find_targets


def inference_bench(setup: InferenceSetup, progress: Callable[[str], None] = lambda line: None) -> InferenceBench:
    """Measure a model, dense and sparse.

    Raises:
        UsageError: for a source or runtime that cannot run here.
        VerificationError: if dense and sparse outputs differ beyond what their dtype explains.
    """
    prepared = open_source(setup)
    estimates = _estimates(setup, prepared)
    executors = _executors(setup) if setup.measure else []
    before = clocks(setup.device)
    results: list[BatchResult] = []
    plans: list[Plan] = []
    layers: list[LayerResult] = []
    ran: dict[int, list[Executed]] = {}
    with memory_advice("a smaller batch or image size needs less"), torch.inference_mode():
        peak = measured_peak(setup.device, setup.dtype) if setup.measure else None
        for batch in setup.batches if setup.measure else ():
            progress(f"batch {batch}")
            plan = _plan(setup, prepared, executors, batch, progress)
            plans += [plan] if plan else []
            result, ran[batch] = _measure(setup, prepared, executors, batch, plan, progress)
            results.append(result)
        if setup.per_layer and setup.measure:
            largest = max(setup.batches)
            seconds = next((plan.seconds for plan in plans if plan.key.batch == largest), {})
            layers = _layers(setup, prepared, executors, largest, ran[largest], seconds)
    height, width = prepared.sample.shape[2:]
    return InferenceBench(
        setup=setup,
        pattern=", ".join(sorted({str(pattern) for pattern in prepared.patterns.values()})),
        image_size=(int(height), int(width)),
        folded=len(prepared.folded),
        executors=tuple(executor.name for executor in executors),
        measured_peak=peak,
        environment={**describe_hardware(), "clocks": {"before": before, "after": clocks(setup.device)}},
        batches=tuple(results),
        layers=tuple(layers),
        notes=_notes(setup, executors),
        verdict=_verdict(results, layers, executors, setup.device, plans),
        plans=tuple(plans),
        estimates=estimates,
    )


def _estimates(setup: InferenceSetup, prepared: Prepared) -> dict[str, Estimate]:
    if not setup.estimate:
        return {}
    find_gpu(setup.estimate)  # a name that is none is said before the work
    batch, image = max(setup.batches), tuple(prepared.sample.shape[1:])
    layers = prepared.layers()
    others = other_operators(prepared.model, image, batch=batch, dtype=setup.dtype)
    return {
        form: estimate(layers, setup.estimate, batch, setup.dtype, form=form, others=others) for form in get_args(Form)
    }


def open_source(setup: InferenceSetup) -> Prepared:
    """The model to measure: from a file, or by name with random weights and magnitude masks."""
    if Path(setup.source).exists():
        return open_model(setup.source, image_size=setup.image_size)
    pattern = Pattern.parse(setup.pattern)
    torch.manual_seed(0)
    model = models.create(setup.source, image_size=setup.image_size)
    targets = find_targets(model, pattern).targets
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates and norms that begin at zero would hide what is behind them
                parameter.normal_(std=0.05)
        for target in targets:
            target.weight.masked_fill_(~magnitude_mask(target.weight, target.pattern), 0)
    sample = torch.randn(1, *models.input_size(model, setup.image_size), generator=torch.Generator().manual_seed(0))
    return prepare(model, {target.name: target.pattern for target in targets}, sample)


def _executors(setup: InferenceSetup) -> list[Executor]:
    if setup.runtime is None:
        return usable_executors(setup.device, setup.dtype)
    return choose_executors(setup.runtime, setup.device, setup.dtype)


def _plan(
    setup: InferenceSetup,
    prepared: Prepared,
    executors: Sequence[Executor],
    batch: int,
    progress: Callable[[str], None],
) -> Plan | None:
    """Per layer the fastest way; none where only a reference is there, which would always lose."""
    if not setup.per_layer or not any(executor.measured for executor in executors):
        return None
    weights = identity(setup.source) if Path(setup.source).is_file() else ""
    return tune(
        prepared,
        executors,
        batch=batch,
        dtype=setup.dtype,
        device=setup.device,
        weights=weights,
        rounds=setup.rounds,
        seconds=setup.seconds,
        progress=progress,
    )


def _measure(
    setup: InferenceSetup,
    prepared: Prepared,
    executors: Sequence[Executor],
    batch: int,
    plan: Plan | None,
    progress: Callable[[str], None],
) -> tuple[BatchResult, list[Executed]]:
    images = example(tuple(prepared.sample.shape), batch, setup.dtype, setup.device)
    sides = {"dense": prepared.dense(dtype=setup.dtype, device=setup.device)}
    executed: list[Executed] = []
    difference = None
    if executors:
        choices = None if plan is None else plan.choices
        sides["sparse"], executed = prepared.sparse(executors, dtype=setup.dtype, device=setup.device, choices=choices)
        difference = _compare(sides, images, setup)
    taken: dict[str, dict[str, Times]] = {name: {} for name in sides}
    for mode in setup.modes:
        progress(f"batch {batch}, {mode}")
        calls = {name: partial(_in_mode(model, mode), images) for name, model in sides.items()}
        timed = interleaved(calls, setup.device, rounds=setup.rounds, seconds=10 * setup.seconds)
        for name, times in timed.items():
            taken[name][mode] = times
    found = {name: _side(model, taken[name], images, setup) for name, model in sides.items()}
    return BatchResult(batch, difference, found), executed


def _in_mode(model: nn.Module, mode: str) -> Callable[[Tensor], Any]:
    if mode == "eager":
        return model
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Any] = torch.compile(model, mode="max-autotune")
    return compiled


def _compare(sides: Mapping[str, nn.Module], images: Tensor, setup: InferenceSetup) -> float:
    expected, actual = sides["dense"](images).double(), sides["sparse"](images).double()
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE[setup.dtype]:
        raise VerificationError(
            f"{setup.source}: sparse outputs differ from dense ones by {difference:.2g} of the largest logit: at most "
            f"{TOLERANCE[setup.dtype]:g} is explained by {setup.dtype}; nothing was timed"
        )
    return difference


def _side(model: nn.Module, taken: Mapping[str, Times], images: Tensor, setup: InferenceSetup) -> Side:
    mode = min(taken, key=lambda name: taken[name].median)
    quartiles = taken[mode].quartiles
    return Side(
        mode=mode,
        quartiles=quartiles,
        images_per_second=len(images) / quartiles[1],
        peak_bytes=_peak_bytes(model, images, setup.device),
        weight_bytes=weight_bytes(model),
        modes={name: times.quartiles for name, times in taken.items()},
    )


def _peak_bytes(model: nn.Module, images: Tensor, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(images)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def weight_bytes(model: nn.Module) -> int:
    """Memory of the weights as they are executed, compressed ones in their compressed form."""
    sparse = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLayer | VectorLayer)]
    inside = tuple(f"{name}." for name, _ in sparse)
    plain: list[Tensor] = [value for name, value in model.named_parameters() if not name.startswith(inside)]
    plain += [module.bias for _, module in sparse if module.bias is not None]
    return sum(value.nbytes for value in plain) + sum(module.stored_bytes() for _, module in sparse)


def _layers(
    setup: InferenceSetup,
    prepared: Prepared,
    executors: Sequence[Executor],
    batch: int,
    executed: Sequence[Executed],
    seconds: Mapping[str, Mapping[str, Quartiles]],
) -> list[LayerResult]:
    """Every layer with its times: those that its way was chosen by, where it was chosen; else measured here."""
    ran = {entry.name: entry for entry in executed}
    known: dict[tuple[object, ...], Mapping[str, Quartiles]] = {}
    found = []
    for layer in prepared.layers():
        if not layer.inputs:
            continue
        ways, reason = ways_of(layer, executors)
        same = work_of(layer, ways)
        if layer.name not in seconds and same not in known:
            times, _ = time_layer(layer, ways, batch, setup.dtype, setup.device, setup.rounds, setup.seconds)
            known[same] = {name: value.quartiles for name, value in times.items()}
        shapes = [
            ((batch * i[0], *i[1:]), (batch * o[0], *o[1:])) for i, o in zip(layer.inputs, layer.outputs, strict=True)
        ]
        work = [work_dense(layer, inputs, outputs, setup.dtype) for inputs, outputs in shapes]
        entry = ran.get(layer.name)
        found.append(
            LayerResult(
                name=layer.name,
                shape=layer.shape,
                pattern=str(layer.pattern or DENSE),
                variant=entry.variant if entry else DENSE,
                reason=entry.reason if entry else reason,
                operations=sum(int(part.operations) for part in work),
                moved_bytes=sum(int(part.moved) for part in work),
                times=seconds[layer.name] if layer.name in seconds else known[same],
            )
        )
    return found


def _notes(setup: InferenceSetup, executors: Sequence[Executor]) -> tuple[str, ...]:
    notes = []
    if not setup.measure:
        notes.append("nothing was measured: all times are estimates")
    elif not executors:
        notes.append(
            f"no sparse kernel for {setup.dtype} on {setup.device}: dense is measured alone, and no speed-up is claimed"
        )
    elif not any(executor.measured for executor in executors):
        notes.append("the reference decodes its weights at every call: its times say nothing about sparse kernels")
    if not Path(setup.source).exists():
        notes.append("random weights with magnitude masks: times do not depend on their values")
    return tuple(notes)


def _verdict(
    results: Sequence[BatchResult],
    layers: Sequence[LayerResult],
    executors: Sequence[Executor],
    device: torch.device,
    plans: Sequence[Plan] = (),
) -> str:
    if not results:
        return "nothing was measured"
    if not any(executor.measured for executor in executors):
        return f"nothing sparse was measured: {device} has no sparse kernel here"
    parts = []
    all_dense = {plan.key.batch for plan in plans if set(plan.choices.values()) <= {DENSE}}
    for result in results:
        if result.batch in all_dense:  # both sides are the same model: any difference is noise
            parts.append(f"batch {result.batch}: nothing is faster sparse, so that everything runs dense")
            continue
        ratio = result.speedup or 1.0
        word = "faster" if ratio - 1 > result.spread else "slower" if 1 - ratio > result.spread else "level"
        parts.append(f"batch {result.batch}: sparse is {word} ({ratio:.2f}x, spread {result.spread:.1%})")
    able = [layer for layer in layers if layer.speedup is not None]
    if able:
        wins = [layer for layer in able if layer.variant != DENSE]
        mean = math.exp(sum(math.log(layer.speedup or 1.0) for layer in able) / len(able))
        parts.append(f"{len(wins)} of {len(able)} sparse layers run sparse, {mean:.2f}x in the geometric mean")
        lost = [layer for layer in able if layer.variant == DENSE]
        if lost:
            small = min(lost, key=lambda layer: layer.operations)
            parts.append(f"{len(lost)} stay dense because dense is as fast there, the smallest {small.name}")
    return "; ".join(parts)
