"""The ways to execute a sparse layer, under one contract; a kernel of a new kind is one class and a line in EXECUTORS.

A variant is a way by name: "cutlass", "cusparselt:im2col", "vector:channels-first". Which is best is for measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from lbc_cli.errors import UsageError, did_you_mean
from lbc_cli.runtime.backends import Backend, CuSparseLt, Cutlass, Reference
from lbc_cli.runtime.cpu import CpuKernels
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.layers import Form, SparseConv2d, SparseLinear
from lbc_cli.runtime.matrix import geometry_of, is_24
from lbc_cli.runtime.vector import VectorWise

DENSE = "dense"


class Executor(Protocol):
    """One kind of sparse kernel."""

    name: str
    measured: bool
    """Whether it can be faster than dense; False for a reference."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on a device in a dtype, None if it can."""

    def obstacle(self, layer: Layer) -> str:
        """Why a layer without a reason of its own cannot run here, "" if it can."""

    def variants(self, layer: Layer) -> tuple[str, ...]:
        """The ways to run a layer, the usual one first."""

    def build(self, layer: Layer, variant: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A module that takes the layer's place: same call, same shapes."""


class Products:
    """Layers as products with a 2:4 matrix (any N:M for the reference).

    Args:
        backend: compresses and multiplies.
    """

    def __init__(self, backend: Backend) -> None:
        self.name, self.measured, self._backend = backend.name, backend.measured, backend

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the back end cannot run there."""
        return self._backend.why_not(device, dtype)

    def obstacle(self, layer: Layer) -> str:
        """Anything that is not 2:4, for the hardware's back ends."""
        return "" if isinstance(self._backend, Reference) else why_not_24(layer)

    def variants(self, layer: Layer) -> tuple[str, ...]:
        """A single product for linear and 1 x 1 layers, two forms for other convolutions."""
        return tuple(self._forms(layer))

    def build(self, layer: Layer, variant: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A `SparseLinear` or `SparseConv2d`."""
        backend = self._backend
        if isinstance(backend, Reference) and layer.pattern is not None:
            backend = backend.with_pattern(layer.pattern)
        weight = layer.weight.detach().to(device, dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
        if not isinstance(layer.module, nn.Conv2d):
            return SparseLinear(weight, bias, backend).eval()
        return SparseConv2d(weight, bias, backend, geometry_of(layer.module), self._forms(layer)[variant]).eval()

    def _forms(self, layer: Layer) -> dict[str, Form]:
        if isinstance(layer.module, nn.Conv2d) and not geometry_of(layer.module).pointwise:
            return {f"{self.name}:im2col": "im2col", f"{self.name}:shifts": "shifts"}
        return {self.name: "matrix"}


def why_not_24(layer: Layer) -> str:
    """Why a layer's weights cannot go through 2:4 kernels, "" if they can."""
    if layer.shape[1] % 4:
        return f"{layer.shape[1]} input channels, not a multiple of 4"
    rows = layer.weight.detach().movedim(1, -1).reshape(layer.shape[0], -1)
    return "" if is_24(rows) else f"{layer.pattern}: some four consecutive weights hold more than two non-zeros"


EXECUTORS: dict[str, Executor] = {
    # In the order of preference where nothing was measured.
    "cusparselt": Products(CuSparseLt()),
    "cutlass": Products(Cutlass()),
    "vector": VectorWise(),
    "cpu": CpuKernels(),
    "reference": Products(Reference()),
    "vector-reference": VectorWise(reference=True),
}
RUNTIMES: dict[str, tuple[str, ...]] = {
    "semi-structured": ("cusparselt", "cutlass"),
    "vector": ("vector",),
    "cpu": ("cpu",),
    "reference": ("reference",),
    "vector-reference": ("vector-reference",),
}


def choose_executors(
    runtime: str, device: torch.device, dtype: torch.dtype, backend: str | None = None
) -> list[Executor]:
    """The executors of a runtime that can run, the preferred one first.

    Args:
        runtime: a key of RUNTIMES.
        device: where.
        dtype: of weights and activations.
        backend: only this one of the runtime.

    Raises:
        UsageError: for an unknown name, or if none can run there.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime {runtime!r}: one of {', '.join(RUNTIMES)}.{did_you_mean(runtime, RUNTIMES)}")
    names: Sequence[str] = RUNTIMES[runtime]
    if backend is not None:
        if backend not in names:
            raise UsageError(f"runtime {runtime} has no back end {backend!r}: it has {', '.join(names)}")
        names = (backend,)
    found = [EXECUTORS[name] for name in names]
    reasons = [executor.why_not(device, dtype) for executor in found]
    usable = [executor for executor, reason in zip(found, reasons, strict=True) if reason is None]
    if not usable:
        raise UsageError(
            f"runtime {runtime} cannot run here: {'; '.join(reason for reason in reasons if reason)}; the runtime "
            f"reference runs anywhere, without a speed-up, and without a runtime everything runs dense"
        )
    return usable


def usable_executors(device: torch.device, dtype: torch.dtype) -> list[Executor]:
    """Every executor with kernels of its own for a device and dtype; empty where there are none."""
    return [executor for executor in EXECUTORS.values() if executor.measured and not executor.why_not(device, dtype)]
