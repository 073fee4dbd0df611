"""Measuring, and estimating where nothing could be measured.

    training    a training step with a method beside a dense one
    inference   a model dense beside sparse; results: what it gives back; verdict: in words; notes: what it adds
    whole_gpu, whole_cpu    one batch of it; sides: what both need
    ways            to run a model on a CPU; compiling, onnx_graphs: two of them; turns: timing them all
    layers          one by one; dense_layers: ways to run one densely on a CPU
    machine         peak and clocks
    roofline    what datasheets allow: estimates, marked as such, for GPUs that are not at hand; from
    datasheets      rates of GPUs
    work            what a layer computes and moves, dense and sparse
    operators       what a forward pass moves besides its layers

The names load torch only when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbc_cli.bench.datasheets import GPUS
    from lbc_cli.bench.operators import Operator, other_operators
    from lbc_cli.bench.roofline import Estimate, LayerEstimate, estimate
    from lbc_cli.bench.training import HookClock, StepSetup, StepTimes, TrainBench, train_bench

__all__ = [
    "GPUS",
    "Estimate",
    "HookClock",
    "LayerEstimate",
    "Operator",
    "StepSetup",
    "StepTimes",
    "TrainBench",
    "estimate",
    "other_operators",
    "train_bench",
]

_HOME = {
    "GPUS": "datasheets",
    "Estimate": "roofline",
    "HookClock": "training",
    "LayerEstimate": "roofline",
    "Operator": "operators",
    "StepSetup": "training",
    "StepTimes": "training",
    "TrainBench": "training",
    "estimate": "roofline",
    "other_operators": "operators",
    "train_bench": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
