"""Measuring inference: dense beside sparse, with everything else alike, so that the difference is the sparsity.

On a GPU both sides have the same weights, dtype, channels-last layout and folded batch norms, and each gets the better
of eager and compiled execution (`whole_gpu`). On a CPU dense is the fastest of several libraries and layouts, and is
measured for several numbers of threads (`whole_cpu`). Outputs are compared before anything is timed. Calls are
interleaved round by round; medians and quartiles are given. Where a device has no sparse kernel, dense is measured
alone and nothing is claimed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch

from lbc_cli import models
from lbc_cli.bench.datasheets import find_gpu
from lbc_cli.bench.layers import LayerBench
from lbc_cli.bench.machine import Peak, bfloat16_support, clocks, measured_peak
from lbc_cli.bench.notes import Notes
from lbc_cli.bench.onnx_graphs import Graphs
from lbc_cli.bench.operators import other_operators
from lbc_cli.bench.results import CPU_MODES, MODES, BatchResult, InferenceBench, InferenceSetup, LayerResult
from lbc_cli.bench.roofline import Estimate, estimate
from lbc_cli.bench.verdict import Row, row_name, verdict
from lbc_cli.bench.whole_cpu import CpuBench
from lbc_cli.bench.whole_gpu import measure_gpu
from lbc_cli.bench.work import Form
from lbc_cli.engine import memory_advice
from lbc_cli.environment import describe_hardware
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.runtime.convert import Executed
from lbc_cli.runtime.executors import DENSE, Executor, choose_executors, usable_executors
from lbc_cli.runtime.loading import identity, open_model
from lbc_cli.runtime.prepare import Prepared, prepare
from lbc_cli.runtime.tune import Plan, tune
from lbc_cli.targets import find_targets

_SCATTERED = 0.2  # spread above which a row is worth a remark


@dataclass(slots=True)
class _Measured:
    """What the rows have given."""

    rows: dict[Row, tuple[BatchResult, list[Executed], Plan | None]]
    layers: list[LayerResult]
    layers_at: Row | None
    peak: Peak | None


def inference_bench(setup: InferenceSetup, progress: Callable[[str], None] = lambda line: None) -> InferenceBench:
    """Measure a model, dense and sparse.

    Raises:
        UsageError: for a source or runtime that cannot run here.
        VerificationError: if outputs differ beyond what their dtype explains.
    """
    prepared = open_source(setup)
    estimates = _estimates(setup, prepared)
    executors = _executors(setup) if setup.measure else []
    notes = _notes(setup, executors)
    before = clocks(setup.device)
    measured = _Measured({}, [], None, None)
    if setup.measure:
        with memory_advice("a smaller batch or image size needs less"), torch.inference_mode():
            measured = _measure(setup, prepared, executors, notes, progress)
    rows = measured.rows
    results = [result for result, _, _ in rows.values()]
    all_dense = [row for row, (_, _, plan) in rows.items() if plan and set(plan.choices.values()) <= {DENSE}]
    height, width = prepared.sample.shape[2:]
    return InferenceBench(
        setup=setup,
        pattern=", ".join(sorted({str(pattern) for pattern in prepared.patterns.values()})),
        image_size=(int(height), int(width)),
        folded=len(prepared.folded),
        executors=tuple(executor.name for executor in executors),
        peak=measured.peak,
        environment={**_environment(setup), "clocks": {"before": before, "after": clocks(setup.device)}},
        batches=tuple(results),
        layers=tuple(measured.layers),
        notes=notes.lines(),
        verdict=verdict(results, measured.layers, executors, setup.device, all_dense),
        layers_at=measured.layers_at,
        plans=tuple(plan for _, _, plan in rows.values() if plan),
        estimates=estimates,
    )


def _measure(
    setup: InferenceSetup,
    prepared: Prepared,
    executors: Sequence[Executor],
    notes: Notes,
    progress: Callable[[str], None],
) -> _Measured:
    """Every row; then the layers at the largest batch, with the most threads."""
    counts = setup.thread_counts()
    last: Row = (max(setup.batches), max((threads for threads in counts if threads), default=None))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_threads_restored())
        graphs = stack.enter_context(Graphs(prepared))
        _use(last[1])
        found = _Measured({}, [], None, measured_peak(setup.device, setup.dtype))
        for threads, batch in itertools.product(counts, setup.batches):
            _use(threads)
            progress(row_name(batch, threads))
            plan = _plan(setup, prepared, executors, batch, progress)
            choices = None if plan is None else plan.choices
            if threads is None:
                row = measure_gpu(setup, prepared, executors, batch, choices, progress)
            else:
                row = CpuBench(setup, prepared, executors, graphs, notes, progress).measure(batch, choices)
            found.rows[batch, threads] = (*row, plan)
            if row[0].spread > _SCATTERED:
                notes.add("times scatter widely: other work on this machine?", row_name(batch, threads))
        if setup.per_layer:
            _use(last[1])
            _, executed, plan = found.rows[last]
            layers = LayerBench(setup, prepared, executors, last[0], notes)
            found.layers = layers.measure(executed, plan.seconds if plan else {}, progress)
            found.layers_at = last
    found.rows = dict(sorted(found.rows.items(), key=lambda row: setup.batches.index(row[0][0])))
    return found


def _use(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment(setup: InferenceSetup) -> dict[str, Any]:
    found = describe_hardware()
    if setup.device.type == "cpu" and setup.measure:
        found["bfloat16"] = bfloat16_support()
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["onnxruntime"] = metadata.version("onnxruntime")
    return found


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


def _notes(setup: InferenceSetup, executors: Sequence[Executor]) -> Notes:
    """What is known before anything is measured."""
    notes = Notes()
    if not setup.measure:
        notes.add("nothing was measured: all times are estimates")
    elif not executors:
        notes.add(
            f"no sparse kernel for {setup.dtype} on {setup.device}: dense is measured alone, and no speed-up is claimed"
        )
    elif not any(executor.measured for executor in executors):
        notes.add("the reference decodes its weights at every call: its times say nothing about sparse kernels")
    known = CPU_MODES if setup.device.type == "cpu" else MODES
    missing = [mode for mode in known if mode not in setup.modes]
    if setup.measure and setup.device.type == "cpu" and missing:
        notes.add(f"not asked for: {', '.join(missing)}; dense may be faster there")
    if not Path(setup.source).exists():
        notes.add("random weights with magnitude masks: times do not depend on their values")
    return notes
