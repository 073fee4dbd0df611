"""Linear layers and convolutions that execute N:M weights on a CPU, with what follows them: a sum and a ReLU.

The call and the shapes are those of the dense layers. Activations are float32, or bfloat16 that is widened on the way
in and rounded on the way out; values are then stored in bfloat16 too. Sums are float32 always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.patterns import Pattern
from lbc_cli.runtime import cpu_ops
from lbc_cli.runtime.matrix import Geometry

_OPERATOR: Callable[..., Tensor] = torch.ops.lbc.nm_conv2d.default
POINTWISE = Geometry((1, 1), (1, 1), (0, 0), (1, 1))


class CpuLayer(nn.Module):
    """What N:M layers on a CPU have in common.

    Args:
        weight: [O, I, *K], float32 or bfloat16; holds the pattern.
        bias: [O] or None.
        pattern: with the vector length V.
        geometry: of the convolution.

    Attributes:
        shape: [O, I, *K] of the weight.
        pattern: as given.
        relu: whether results below 0 become 0.

    Raises:
        PatternError: if the weight does not hold the pattern.
        UsageError: where there are no kernels.
    """

    values: Tensor
    index: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, pattern: Pattern, geometry: Geometry = POINTWISE) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.out_features, self.in_features = self.shape[:2]
        self.pattern, self.geometry, self.dtype, self.relu = pattern, geometry, weight.dtype, False
        kernel = weight.reshape(*self.shape, 1, 1) if weight.dim() == 2 else weight
        self.packing = cpu_ops.plan(
            tuple(kernel.shape),
            pattern.n,
            pattern.m,
            shared_by(pattern),
            stride=geometry.stride[1],
            half=weight.dtype == torch.bfloat16,
        )
        values, index = cpu_ops.pack(kernel, self.packing)
        self._numbers = list(self.packing)
        self._walk = self._walk_over(1, 1)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)

    def _run(self, images: Tensor, residual: Tensor | None) -> Tensor:
        """[n, I, h, w] to [n, O, h', w'], channels last."""
        self.check(images)
        walk = self.walk(images.shape)
        # Past the dispatcher where nobody looks on: it takes as long as a small layer's work.
        plain = type(images) is Tensor and not torch.compiler.is_compiling()
        run = cpu_ops.nm_conv2d if plain else _OPERATOR
        buffers: dict[str, Any] = self._buffers  # faster than one attribute after the other
        held = buffers["values"], buffers["index"], buffers["bias"]
        if self.dtype == torch.float32:
            return run(images, *held, residual, self._numbers, walk, self.relu)
        wide = None if residual is None else residual.float()
        return run(images.float(), *held, wide, self._numbers, walk, self.relu).to(self.dtype)

    def check(self, images: Tensor) -> None:
        """Refuse what the layer cannot take.

        Raises:
            RuntimeError: if a gradient is asked for.
            ValueError: for another dtype than the layer's.
        """
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("N:M layers on a CPU have no gradient: call the model under torch.inference_mode()")
        if images.dtype != self.dtype:
            raise ValueError(f"inputs are {images.dtype}, the layer was made for {self.dtype}")

    def walk(self, shape: Sequence[int]) -> list[int]:
        """The geometry as the operator takes it, for images [n, I, h, w]."""
        return self._walk_over(shape[2], shape[3]) if self.geometry.same else self._walk

    def _walk_over(self, height: int, width: int) -> list[int]:
        """The zeros around depend on the image only for "same" padding."""
        left, right, top, bottom = self.geometry.pads(height, width)
        return [*self.geometry.stride, *self.geometry.dilation, top, left, bottom, right]

    def dense_weight(self) -> Tensor:
        """[O, I, *K], bit for bit what was packed."""
        return cpu_ops.unpack(self.values, self.index, self.packing).reshape(self.shape).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, restored at every access: for code that asks for its dtype, device or values."""
        return self.dense_weight()

    def stored_bytes(self) -> int:
        """Memory of the weight: kept values and positions."""
        return self.values.nbytes + self.index.nbytes

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{list(self.shape)}, pattern={self.pattern}{', relu' if self.relu else ''}"


class CpuLinear(CpuLayer):
    """A linear layer, [*, I] to [*, O]; arguments as for `CpuLayer`."""

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        """[*, I] to [*, O].

        Args:
            inputs: [*, I].
            residual: [*, O], added before the activation.
        """
        shape = (*inputs.shape[:-1], self.out_features)
        rows = self._rows(inputs, self.in_features)
        result = self._run(rows, None if residual is None else self._rows(residual, self.out_features))
        return result.permute(0, 2, 3, 1).reshape(shape)

    @staticmethod
    def _rows(values: Tensor, features: int) -> Tensor:
        """[*, f] as an image of one row, [1, f, 1, n]: a view where it is contiguous."""
        return values.reshape(1, 1, math.prod(values.shape[:-1]), features).permute(0, 3, 1, 2)


class CpuConv2d(CpuLayer):
    """A 2-D convolution over one group of channels; arguments as for `CpuLayer`."""

    def forward(self, images: Tensor, residual: Tensor | None = None) -> Tensor:
        """[n, I, h, w] to [n, O, h', w'], channels last.

        Args:
            images: [n, I, h, w].
            residual: [n, O, h', w'], added before the activation.
        """
        return self._run(images, residual)


def shared_by(pattern: Pattern) -> int:
    """How many output channels share their positions in the kernel: 32, 16 or 1."""
    return next((width for width in (32, 16) if pattern.vector % width == 0), 1)
