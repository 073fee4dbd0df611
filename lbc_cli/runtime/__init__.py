"""Execution of N:M weights: models whose eligible layers multiply by what is kept, and nothing else.

    matrix      layers as matrix products            trace       one look at a model at work
    backends    what multiplies by a 2:4 matrix      fold        batch norms into convolutions
    layers      SparseLinear, SparseConv2d           layer       what the model's layers hold, and how they are called
    executors   the ways to execute a layer          convert     layer by layer, dense or sparse, and why
    prepare     what dense and sparse have alike     clock       timing in turns
    tune        per layer the fastest, measured      loading     `lbc_cli.load`
    cpu         layers on CPUs: cpu_ops, cpu_layers  native      their kernels in C++, built and loaded
    fuse        sums and ReLUs into CPU layers       slices      batches that fit the cache

The names load torch only when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbc_cli.runtime.convert import Executed
    from lbc_cli.runtime.fuse import Fusion, fusion
    from lbc_cli.runtime.loading import executed, load, open_model
    from lbc_cli.runtime.prepare import Prepared, prepare

__all__ = ["Executed", "Fusion", "Prepared", "executed", "fusion", "load", "open_model", "prepare"]

_HOME = {
    "Executed": "convert",
    "Prepared": "prepare",
    "Fusion": "fuse",
    "executed": "loading",
    "fusion": "fuse",
    "load": "loading",
    "open_model": "loading",
    "prepare": "prepare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
