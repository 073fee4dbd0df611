"""A whole model on a GPU, dense beside sparse: one dtype, channels last, each side the better of eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.bench.results import BatchResult, InferenceSetup
from lbc_cli.bench.sides import check_agreement, side_of, weight_bytes
from lbc_cli.runtime.clock import Times, interleaved
from lbc_cli.runtime.convert import Executed
from lbc_cli.runtime.executors import Executor
from lbc_cli.runtime.prepare import Prepared
from lbc_cli.runtime.tune import example


def measure_gpu(
    setup: InferenceSetup,
    prepared: Prepared,
    executors: Sequence[Executor],
    batch: int,
    choices: Mapping[str, str] | None,
    progress: Callable[[str], None],
) -> tuple[BatchResult, list[Executed]]:
    """Time one batch.

    Args:
        setup: what is measured.
        prepared: the model.
        executors: of the sparse side; none: dense alone.
        batch: images at once.
        choices: per layer; None: every layer that can runs sparse.
        progress: told a line per mode.

    Raises:
        VerificationError: if dense and sparse outputs differ beyond what their dtype explains.
    """
    images = example(tuple(prepared.sample.shape), batch, setup.dtype, setup.device)
    sides = {"dense": prepared.dense(dtype=setup.dtype, device=setup.device)}
    executed: list[Executed] = []
    if executors:
        sides["sparse"], executed = prepared.sparse(executors, dtype=setup.dtype, device=setup.device, choices=choices)
    difference = check_agreement(setup.source, {name: model(images) for name, model in sides.items()}, setup.dtype)
    taken: dict[str, dict[str, Times]] = {name: {} for name in sides}
    for mode in setup.modes:
        progress(f"batch {batch}, {mode}")
        calls = {name: partial(_in_mode(model, mode), images) for name, model in sides.items()}
        timed = interleaved(calls, setup.device, rounds=setup.rounds, seconds=10 * setup.seconds)
        for name, times in timed.items():
            taken[name][mode] = times
    found = {
        name: side_of(
            taken[name],
            batch,
            setup.dtype,
            weights=weight_bytes(model),
            peak=_peak_bytes(model, images, setup.device),
        )
        for name, model in sides.items()
    }
    return BatchResult(batch, difference, found), executed


def _in_mode(model: nn.Module, mode: str) -> Callable[[Tensor], Any]:
    if mode == "eager":
        return model
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Any] = torch.compile(model, mode="max-autotune")
    return compiled


def _peak_bytes(model: nn.Module, images: Tensor, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(images)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
