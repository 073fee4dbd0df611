"""Layers that execute vector-wise N:M weights as gathered dense products.

Each takes the place of the dense layer: the same call, the same shapes, any batch. What multiplies is a parameter: the
Triton kernel, or the reference here, which gathers through the same tables from the same buffer on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from lbc_cli.patterns import Pattern
from lbc_cli.runtime.matrix import Geometry, to_image
from lbc_cli.runtime.vector_layout import (
    POINTWISE,
    Layout,
    Taps,
    Walk,
    columns_of,
    image_buffer,
    kept_columns,
    rows_buffer,
    starts,
    steps,
    taps_of,
    tile_weights,
    untile_weights,
)

_GATHERED = 1 << 22
"""Elements that the reference gathers at a time."""


class Product(Protocol):
    """What multiplies gathered columns by the weights of their tiles."""

    def __call__(
        self, buffer: Tensor, weights: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, walk: Sequence[int]
    ) -> Tensor:
        """[pixels, O], dtype of the weights.

        Args:
            buffer: contiguous, dtype of the weights.
            weights: [T, J, V], contiguous.
            bias: [O] or None.
            rows: int32 [T, J], taps of the kept columns.
            columns: int32 [T, J], likewise.
            walk: the fields of a `Walk`.
        """


def reference_product(
    buffer: Tensor, weights: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, walk: Sequence[int]
) -> Tensor:
    """A `Product` of plain torch operators: gather, then multiply, a tile and some pixels at a time. Not fast."""
    path = Walk(*walk)
    flat, begin = buffer.flatten(), starts(path, buffer.device)
    tiles, kept, vector = weights.shape
    output = weights.new_empty(path.pixels, tiles, vector)
    for tile, offsets in enumerate(steps(Taps(rows, columns), path)):
        for first in range(0, path.pixels, step := max(1, _GATHERED // kept)):
            chunk = slice(first, first + step)
            output[chunk, tile] = flat[begin[chunk, None] + offsets] @ weights[tile]
    output = output.flatten(1)
    return output if bias is None else output + bias


class VectorLayer(nn.Module):
    """What vector-wise layers have in common.

    Args:
        weight: [O, I, *K]; holds the pattern.
        bias: [O] or None.
        pattern: with the vector length V.
        product: what multiplies.
        layout: of the buffer that columns are gathered from.
        geometry: of the convolution.

    Attributes:
        shape: [O, I, *K] of the weight.

    Raises:
        PatternError: if the weight does not hold the pattern.
    """

    weights: Tensor
    rows: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        product: Product,
        layout: Layout,
        geometry: Geometry = POINTWISE,
    ) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.out_features, self.in_features = self.shape[:2]
        self.pattern, self.layout, self.geometry, self._product = pattern, layout, geometry, product
        kept = kept_columns(weight.detach(), pattern)
        taps = taps_of(kept, self.in_features, geometry, layout)
        self.register_buffer("weights", tile_weights(weight.detach(), kept), persistent=False)
        self.register_buffer("rows", taps.rows, persistent=False)
        self.register_buffer("columns", taps.columns, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(weight.dtype), persistent=False)

    def _multiply(self, buffer: Tensor, walk: Walk) -> Tensor:
        """[pixels, O]."""
        # Kernels read where the tables say: nothing but the check here keeps them inside the buffer.
        if buffer.dtype != self.weights.dtype:
            raise ValueError(f"inputs are {buffer.dtype}, weights {self.weights.dtype}: both must be the same")
        return self._product(buffer, self.weights, self.bias, self.rows, self.columns, list(walk))

    def _check_channels(self, channels: int) -> None:
        if channels != self.in_features:
            raise ValueError(f"the input has {channels} channels, the layer {self.in_features}")

    def dense_weight(self) -> Tensor:
        """[O, I, *K], bit for bit what was packed but for the sign of zeros that are not kept."""
        columns = columns_of(Taps(self.rows, self.columns), self.in_features, self.geometry, self.layout)
        return untile_weights(self.weights, columns, self.shape)

    @property
    def weight(self) -> Tensor:
        """The dense weight, restored at every access: for code that asks for its dtype, device or values."""
        return self.dense_weight()

    def stored_bytes(self) -> int:
        """Memory of the weight: kept values and tables."""
        return self.weights.nbytes + self.rows.nbytes + self.columns.nbytes

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{list(self.shape)}, pattern={self.pattern}, layout={self.layout}"


class VectorLinear(VectorLayer):
    """A linear layer, [*, I] to [*, O]; arguments as for `VectorLayer`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[*, I] to [*, O]."""
        self._check_channels(inputs.shape[-1])
        buffer, walk = rows_buffer(inputs.reshape(-1, self.in_features), self.layout)
        return self._multiply(buffer, walk).reshape(*inputs.shape[:-1], self.out_features)


class VectorConv2d(VectorLayer):
    """A 2-D convolution over one group of channels, [n, I, h, w] to [n, O, h', w']; arguments as for `VectorLayer`."""

    def forward(self, images: Tensor) -> Tensor:
        """[n, I, h, w] to [n, O, h', w'], channels last."""
        self._check_channels(images.shape[1])
        size = self.geometry.output(images.shape[2], images.shape[3])
        if min(size) < 1:
            raise ValueError(f"images of {list(images.shape[2:])} are smaller than the kernel {self.geometry.kernel}")
        buffer, walk = image_buffer(images, self.geometry, self.layout)
        return to_image(self._multiply(buffer, walk), images.shape[0], size)
