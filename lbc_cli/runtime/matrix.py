"""Layers as matrix products: weights and images in the order that keeps N:M groups whole. Pure functions.

A weight [O, I, kh, kw] becomes a matrix [O, kh * kw * I]: kernel positions outside, input channels inside ("RSC"). A
group of M consecutive input channels at one kernel position is then M consecutive columns, which is what 2:4 hardware
wants; the order of `torch.nn.functional.unfold` (channels outside) would cut every group apart. Images are read as
[n, h, w, channels], which is how channels-last tensors lie in memory, so that a 1 x 1 convolution is a view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a 2-D convolution walks over an image. Pairs are (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    """Zeros on each side; ignored where `same` is set."""
    dilation: Pair
    same: bool = False
    """Pad as TensorFlow does: by the image's size, the odd pixel at the end (timm's Conv2dSame)."""

    @classmethod
    def of(cls, conv: nn.Conv2d, *, same: bool = False) -> Geometry:
        """The geometry of a convolution with zero padding."""
        kernel, stride, dilation = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation)
        if conv.padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            if any(size % 2 for size in total):
                return cls(kernel, stride, (0, 0), dilation, same=True)
            return cls(kernel, stride, (total[0] // 2, total[1] // 2), dilation)
        padding = (0, 0) if isinstance(conv.padding, str) else _pair(conv.padding)
        return cls(kernel, stride, padding, dilation, same)

    @property
    def pointwise(self) -> bool:
        """Whether every output pixel sees one input pixel."""
        return self.kernel == (1, 1)

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Zeros to add: left, right, top, bottom."""
        if not self.same:
            return self.padding[1], self.padding[1], self.padding[0], self.padding[0]
        top, bottom = self._same(height, 0)
        left, right = self._same(width, 1)
        return left, right, top, bottom

    def _same(self, size: int, axis: int) -> Pair:
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        total = max(0, (math.ceil(size / self.stride[axis]) - 1) * self.stride[axis] + reach - size)
        return total // 2, total - total // 2

    def output(self, height: int, width: int) -> Pair:
        """Height and width of the result."""
        left, right, top, bottom = self.pads(height, width)
        return self._steps(height + top + bottom, 0), self._steps(width + left + right, 1)

    def _steps(self, size: int, axis: int) -> int:
        return (size - (self.kernel[axis] - 1) * self.dilation[axis] - 1) // self.stride[axis] + 1


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """The geometry of a convolution, timm's Conv2dSame included."""
    return Geometry.of(conv, same=type(conv).__name__.startswith("Conv2dSame"))


def weight_matrix(weight: Tensor) -> Tensor:
    """[O, I, *K] to [O, prod(K) * I], contiguous."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1).contiguous()


def weight_from_matrix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `weight_matrix`.

    Args:
        matrix: [O, prod(K) * I].
        shape: [O, I, *K].
    """
    out, inputs, *kernel = shape
    return matrix.reshape(out, *kernel, inputs).movedim(-1, 1).contiguous()


def padded_sizes(rows: int, columns: int, multiples: Pair) -> Pair:
    """The sizes of a matrix after padding to multiples of (rows, columns)."""
    return -(-rows // multiples[0]) * multiples[0], -(-columns // multiples[1]) * multiples[1]


def pad_matrix(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """[r, c] to [rows, columns] with zeros below and to the right, contiguous."""
    return functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])).contiguous()


def padded_image(images: Tensor, geometry: Geometry) -> Tensor:
    """[n, c, h, w] to [n, h', w', c] with its zeros around, contiguous."""
    rows = images.permute(0, 2, 3, 1)
    left, right, top, bottom = geometry.pads(images.shape[2], images.shape[3])
    if left or right or top or bottom:
        rows = functional.pad(rows, (0, 0, left, right, top, bottom))
    return rows.contiguous()


def patches(images: Tensor, geometry: Geometry) -> Tensor:
    """Every output pixel's inputs, in the order of `weight_matrix`.

    Args:
        images: [n, c, h, w].
        geometry: of the convolution.

    Returns:
        [n * h_out * w_out, kh * kw * c]; a view where the convolution is 1 x 1 with stride 1 and channels lie last.
    """
    height, width = geometry.output(images.shape[2], images.shape[3])
    rows = padded_image(images, geometry)
    channels = rows.shape[3]
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    if geometry.pointwise:
        return rows[:, ::sh, ::sw][:, :height, :width].reshape(-1, channels)
    image, row, pixel = rows.stride()[:3]
    windows = rows.as_strided(
        (rows.shape[0], height, width, kh, kw, channels), (image, sh * row, sw * pixel, dh * row, dw * pixel, 1)
    )
    return windows.reshape(-1, kh * kw * channels)


def shifts(images: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """The inputs of every output pixel at one kernel position after the other, [n * h_out * w_out, c] each."""
    height, width = geometry.output(images.shape[2], images.shape[3])
    rows = padded_image(images, geometry)
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    for y in range(geometry.kernel[0]):
        for x in range(geometry.kernel[1]):
            top, left = y * dh, x * dw
            yield rows[:, top : top + (height - 1) * sh + 1 : sh, left : left + (width - 1) * sw + 1 : sw].reshape(
                -1, rows.shape[3]
            )


def to_image(rows: Tensor, images: int, size: Pair) -> Tensor:
    """[n * h * w, c] to [n, c, h, w], a view in channels-last order."""
    return rows.reshape(images, *size, rows.shape[1]).permute(0, 3, 1, 2)


def is_24(matrix: Tensor) -> bool:
    """Whether at most two of every four consecutive columns are in use; columns must be a multiple of four."""
    return bool(((matrix.reshape(matrix.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


def _pair(value: int | tuple[int, ...]) -> Pair:
    first, second = (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
    return int(first), int(second)
