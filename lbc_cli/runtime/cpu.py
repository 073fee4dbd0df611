"""The executor of N:M layers on CPUs: compiled kernels that multiply by kept weights alone, at any N:M.

A weight with a mask per output channel is executed by permutations of registers; one whose masks are shared by 16 or
32 output channels (`--vector`) as in a dense kernel that skips. `native/` holds the kernels and says more.
"""

from __future__ import annotations

import torch
from torch import nn

from lbc_cli.errors import PatternError
from lbc_cli.runtime.cpu_layers import CpuConv2d, CpuLinear
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.matrix import geometry_of
from lbc_cli.runtime.native import library

DTYPES = (torch.float32, torch.bfloat16)
GROUPS = (4, 8, 16, 32)
"""M of the patterns that have a kernel."""


class CpuKernels:
    """Layers through the compiled CPU kernels."""

    name = "cpu"
    measured = True

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on a device in a dtype, None if it can."""
        if device.type != "cpu":
            return f"{self.name} runs on a CPU, not on {device.type}"
        if dtype not in DTYPES:
            return f"{self.name} has no kernel for {dtype}: it has float32, and bfloat16 with sums in float32"
        return library.why_missing() or _why_not_here()

    def obstacle(self, layer: Layer) -> str:
        """A pattern without a kernel."""
        assert layer.pattern is not None, f"{layer.name} has no pattern, and so a reason of its own"
        if layer.pattern.m not in GROUPS:
            return f"{layer.pattern}: the CPU kernels have M = {', '.join(map(str, GROUPS))}"
        return "" if layer.shape[1] % layer.pattern.m == 0 else f"{layer.shape[1]} input channels, not a multiple of M"

    def variants(self, layer: Layer) -> tuple[str, ...]:
        """One."""
        return (self.name,)

    def build(self, layer: Layer, variant: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A `CpuLinear` or `CpuConv2d`."""
        assert layer.pattern is not None
        weight, bias = layer.weight.detach().to(device, dtype), layer.bias
        try:
            if isinstance(layer.module, nn.Conv2d):
                return CpuConv2d(weight, bias, layer.pattern, geometry_of(layer.module)).eval()
            return CpuLinear(weight, bias, layer.pattern).eval()
        except PatternError as error:
            raise PatternError(f"{layer.name}: {error}") from None


def _why_not_here() -> str | None:
    """Why the processor is no match for dense kernels, unless it is told to try."""
    if library.isas() != ("portable",) or library.chosen_isa() != library.AUTO:
        return None
    return (
        "this processor has neither AVX-512 nor AVX2, and portable kernels are slower than dense ones: "
        f"{library.ISA_VARIABLE}=portable runs them all the same, without a runtime everything runs dense"
    )
