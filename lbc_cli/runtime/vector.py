"""The executor of vector-wise N:M layers: dense tensor-core products over the kept columns, gathered.

Where V output channels share their mask, nothing about a tile of V channels is sparse but the choice of its columns:
the work is N/M of the dense product's, on ordinary tensor cores, at any N:M. 2:4 hardware stops at a half.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from lbc_cli.patterns import holds
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.matrix import geometry_of
from lbc_cli.runtime.vector_layers import Product, VectorConv2d, VectorLinear, reference_product
from lbc_cli.runtime.vector_layout import TILE, Layout

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class VectorWise:
    """Vector-wise layers as gathered dense products, with the columns in either layout.

    Args:
        reference: gather and multiply by torch's own operators, on any device, in any floating-point type: for tests,
            not for speed. Otherwise the Triton kernel.
    """

    def __init__(self, *, reference: bool = False) -> None:
        self.name = "vector-reference" if reference else "vector"
        self.measured = not reference

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on a device in a dtype, None if it can."""
        if not self.measured:
            return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"
        if device.type != "cuda":
            return f"{self.name} needs a CUDA device with tensor cores, not {device.type}"
        if importlib.util.find_spec("triton") is None:
            return f"{self.name} needs Triton, which is not installed: pip install triton"
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)}: {self.name} needs the tensor cores of Ampere (A100) or later"
        if dtype not in DTYPES:
            return f"{self.name} has no kernel for {dtype}: it has float16, bfloat16 and float32"
        return None

    def obstacle(self, layer: Layer) -> str:
        """Output channels that do not share their masks by 64, or weights that do not hold their pattern."""
        pattern, shape = layer.pattern, layer.shape
        assert pattern is not None, f"{layer.name} has no pattern, and so a reason of its own"
        if pattern.vector % TILE:
            return f"{pattern}: masks are shared by {pattern.vector} output channels, not by a multiple of {TILE}"
        if shape[0] % pattern.vector or shape[1] % pattern.m or not holds(layer.weight.detach(), pattern):
            return f"its weights do not hold {pattern}"
        return ""

    def variants(self, layer: Layer) -> tuple[str, ...]:
        """A copy with whole vectors to read (channels-first), or elements read where they lie (channels-last)."""
        return tuple(self._layouts())

    def build(self, layer: Layer, variant: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A `VectorLinear` or `VectorConv2d`."""
        assert layer.pattern is not None
        weight = layer.weight.detach().to(device, dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
        product, layout = self._product(), self._layouts()[variant]
        if not isinstance(layer.module, nn.Conv2d):
            return VectorLinear(weight, bias, layer.pattern, product, layout).eval()
        return VectorConv2d(weight, bias, layer.pattern, product, layout, geometry_of(layer.module)).eval()

    def _layouts(self) -> dict[str, Layout]:
        return {f"{self.name}:channels-first": "channels-first", f"{self.name}:channels-last": "channels-last"}

    def _product(self) -> Product:
        if not self.measured:
            return reference_product
        # Triton does not come with every torch: it is needed only here.
        from lbc_cli.runtime.vector_kernel import gathered_product

        return gathered_product
