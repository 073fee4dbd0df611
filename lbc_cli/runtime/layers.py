"""Layers that execute N:M weights: a linear layer, and a 2-D convolution as one or several matrix products.

Each takes the place of the dense layer: the same call, the same shapes, any batch. Weights are padded to the back end's
multiples once; results are cut back. `dense_weight` gives the weight exactly as it was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli.runtime.backends import Backend, Operand
from lbc_cli.runtime.matrix import (
    Geometry,
    pad_matrix,
    padded_sizes,
    patches,
    shifts,
    to_image,
    weight_from_matrix,
    weight_matrix,
)

Form = Literal["matrix", "im2col", "shifts"]
"""A convolution as a product with the pixels (1 x 1), with their patches, or as a sum over kernel positions."""


class SparseLayer(nn.Module, ABC):
    """What sparse layers have in common.

    Attributes:
        shape: [O, I, *K] of the weight.
        backend: name of the back end.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: Backend) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.backend = backend.name
        self.out_features, self.in_features = self.shape[:2]
        self._multiples = backend.multiples(weight.dtype)
        self.rows = padded_sizes(self.out_features, 1, self._multiples)[0]
        padded = (
            None if bias is None else functional.pad(bias.detach(), (0, self.rows - self.out_features)).to(weight.dtype)
        )
        self.register_buffer("bias", padded, persistent=False)

    def _compress(self, matrix: Tensor, backend: Backend) -> Operand:
        rows, columns = padded_sizes(matrix.shape[0], matrix.shape[1], self._multiples)
        return backend.compress(pad_matrix(matrix.detach(), rows, columns))

    def _multiply(self, operand: Operand, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """[n, columns] to [n, O]."""
        missing = operand.columns - inputs.shape[1]
        result: Tensor = operand(functional.pad(inputs, (0, missing)) if missing else inputs.contiguous(), bias)
        return result if self.rows == self.out_features else result[:, : self.out_features].contiguous()

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """[O, I, *K], bit for bit what was compressed."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, restored at every access: for code that asks for its dtype, device or values."""
        return self.dense_weight()

    def stored_bytes(self) -> int:
        """Memory of the compressed weight."""
        return sum(part.stored_bytes() for part in self.modules() if isinstance(part, Operand))

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{list(self.shape)}, backend={self.backend}"


class SparseLinear(SparseLayer):
    """A linear layer, [*, I] to [*, O].

    Args:
        weight: [O, I]; holds the back end's pattern along I.
        bias: [O] or None.
        backend: compresses and multiplies.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: Backend) -> None:
        super().__init__(weight, bias, backend)
        self.operand = self._compress(weight, backend)

    def forward(self, inputs: Tensor) -> Tensor:
        """[*, I] to [*, O]."""
        rows = inputs.reshape(-1, self.in_features)
        return self._multiply(self.operand, rows, self.bias).reshape(*inputs.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """[O, I], bit for bit what was compressed."""
        return self.operand.dense()[: self.out_features, : self.in_features].contiguous()


class SparseConv2d(SparseLayer):
    """A 2-D convolution over one group of channels, [n, I, h, w] to [n, O, h', w'] in channels-last order.

    Args:
        weight: [O, I, kh, kw]; holds the back end's pattern along I at every kernel position.
        bias: [O] or None.
        backend: compresses and multiplies.
        geometry: kernel, stride, padding, dilation.
        form: how it becomes matrix products; "matrix" needs a 1 x 1 kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: Backend, geometry: Geometry, form: Form) -> None:
        super().__init__(weight, bias, backend)
        if form == "matrix" and not geometry.pointwise:
            raise ValueError(f"a {geometry.kernel} convolution is no single product with the pixels")
        self.geometry, self.form = geometry, form
        matrices = weight_matrix(weight)
        width = self.in_features
        parts = torch.split(matrices, width, dim=1) if form == "shifts" else (matrices,)
        self.operands = nn.ModuleList(self._compress(part, backend) for part in parts)

    def forward(self, images: Tensor) -> Tensor:
        """[n, I, h, w] to [n, O, h', w'], channels last."""
        size = self.geometry.output(images.shape[2], images.shape[3])
        rows = self._shifted(images) if self.form == "shifts" else self._single(images)
        return to_image(rows, images.shape[0], size)

    def _single(self, images: Tensor) -> Tensor:
        return self._multiply(self._operand(0), patches(images, self.geometry), self.bias)

    def _shifted(self, images: Tensor) -> Tensor:
        """The sum over kernel positions, in float32 at least: kernels cannot add to a result they find."""
        wide = torch.promote_types(images.dtype, torch.float32)
        total: Tensor | None = None
        for number, rows in enumerate(shifts(images, self.geometry)):
            part = self._multiply(self._operand(number), rows, None).to(wide)
            total = part if total is None else total + part
        assert total is not None
        if self.bias is not None:
            total = total + self.bias[: self.out_features]
        return total.to(images.dtype)

    def _operand(self, number: int) -> Operand:
        operand = self.operands[number]
        assert isinstance(operand, Operand)
        return operand

    def dense_weight(self) -> Tensor:
        """[O, I, kh, kw], bit for bit what was compressed."""
        width = self.in_features * (1 if self.form == "shifts" else math.prod(self.geometry.kernel))
        parts = [self._operand(number).dense()[: self.out_features, :width] for number in range(len(self.operands))]
        return weight_from_matrix(torch.cat(parts, dim=1), self.shape)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{super().extra_repr()}, form={self.form}"
