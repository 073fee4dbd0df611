"""What a layer computes and moves, by the way it is executed. Pure functions on shapes; n output pixels (or rows) of O.

    dense       2 n O C operations on a weight [O, C], C = prod(K) * I; bytes: the input pixels that it touches, the
                result, weight and bias, each moved once.
    2:4         the same at twice the peak, on a weight padded to cuSPARSELt's multiples, of which half of the values
                and two bits for each of them are stored: 0.5625 of dense in 16 bit, 0.625 in int8. 1:4, 2:8 and 1:16
                gain no more than 2:4.
    vector      N:M with masks shared by V output channels, V a multiple of 64: 2 n O C N/M operations at the dense peak
                on the kept columns; bytes: kept weights, and two int32 for each kept column of a tile of V. Columns
                are gathered where they lie (channels last).

`form` says what sparse kernels do beside the product:

    im2col      what kernels that only know matrices need: a copy of the image with its zeros around, every output
                pixel's patch written to memory (also for strides), columns padded, padded rows written. Vector-wise
                kernels gather for themselves and copy the padded image only.
    fused       none of it: an implicit GEMM, as dense convolutions are executed. There is no such 2:4 kernel in torch;
                this is what one would have to reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lbc_cli.bench.datasheets import SPARSE_PEAK, Gpu
from lbc_cli.patterns import Pattern
from lbc_cli.runtime.executors import why_not_24
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.matrix import Pair, geometry_of, padded_sizes
from lbc_cli.runtime.trace import Shape
from lbc_cli.runtime.vector_layout import TILE

Form = Literal["im2col", "fused"]
# cuSPARSELt's smallest multiples of (rows, columns), by bytes of a value; there is no 2:4 for wider types.
_MULTIPLES: dict[int, Pair] = {1: (32, 32), 2: (16, 16)}
_INDEX_BYTES = 8


@dataclass(frozen=True, slots=True)
class Work:
    """One product.

    Attributes:
        operations: 2 for a multiply-add; of 2:4 products those of the dense product, as datasheets count them.
        moved: bytes that the product reads and writes.
        copied: bytes that other kernels read and write before it.
        rate: at how many times the dense peak it runs.
    """

    operations: int
    moved: int
    copied: int = 0
    rate: int = 1

    def compute_seconds(self, gpu: Gpu, dtype: torch.dtype) -> float:
        """Estimated time of the operations alone."""
        return self.operations / (self.rate * gpu.peak(dtype))

    def memory_seconds(self, gpu: Gpu) -> float:
        """Estimated time of the product's own traffic alone."""
        return self.moved / gpu.bandwidth

    def estimate_seconds(self, gpu: Gpu, dtype: torch.dtype) -> float:
        """Estimated time with what comes before."""
        return self.copied / gpu.bandwidth + max(self.compute_seconds(gpu, dtype), self.memory_seconds(gpu))


def implies_24(pattern: Pattern) -> bool:
    """Whether every weight of a pattern also has at most two of any four aligned input channels."""
    # A window of four meets one group or several; each gives as many as it keeps, if they fit.
    return all(_most_in(pattern, start) <= 2 for start in range(0, math.lcm(4, pattern.m), 4))


def _most_in(pattern: Pattern, start: int) -> int:
    """How many of the channels start .. start + 3 a pattern can keep."""
    first = start - start % pattern.m
    overlaps = (min(start + 4, group + pattern.m) - max(start, group) for group in range(first, start + 4, pattern.m))
    return sum(min(pattern.n, overlap) for overlap in overlaps)


def obstacle_24(layer: Layer, dtype: torch.dtype) -> str:
    """Why 2:4 hardware has nothing for a layer, "" if it has."""
    if layer.reason or layer.pattern is None:
        return layer.reason or "its weights are dense"
    if dtype.itemsize not in _MULTIPLES:
        return f"{str(dtype).removeprefix('torch.')}: sparse tensor cores have 2:4 for types of 8 and 16 bits only"
    if layer.shape[1] % 4 == 0 and implies_24(layer.pattern):
        return ""
    if layer.weight.is_meta and layer.shape[1] % 4 == 0:
        return f"{layer.pattern} does not imply 2:4"
    return why_not_24(layer)


def obstacle_vector(layer: Layer) -> str:
    """Why vector-wise kernels have nothing for a layer, "" if they have."""
    if layer.reason or layer.pattern is None:
        return layer.reason or "its weights are dense"
    if layer.pattern.vector % TILE:
        return f"masks shared by {layer.pattern.vector} output channels, not by a multiple of {TILE}"
    return ""


def work_dense(layer: Layer, inputs: Shape, outputs: Shape, dtype: torch.dtype) -> Work:
    """A dense call, convolutions as an implicit GEMM.

    Args:
        layer: any linear or convolution layer.
        inputs: [n, I, ...] for convolutions, [..., I] for linear layers.
        outputs: of the same call.
        dtype: of weights and activations.
    """
    size, columns = dtype.itemsize, _columns(layer)
    result = math.prod(outputs)
    weight = layer.shape[0] * columns + _bias(layer)
    return Work(2 * result * columns, size * (_touched(layer, math.prod(inputs), outputs) + result + weight))


def work_24(layer: Layer, inputs: Shape, outputs: Shape, dtype: torch.dtype, form: Form) -> Work:
    """A call through a 2:4 kernel. Arguments as for `work_dense`; the layer has no obstacle."""
    size = dtype.itemsize
    pixels, columns = _pixels(layer, outputs), _columns(layer)
    rows, wide = padded_sizes(layer.shape[0], columns, _MULTIPLES[size])
    operations, weight = 2 * pixels * rows * wide, compressed_bytes(rows, wide, size) + size * _bias(layer)
    if form == "fused":
        activations = _touched(layer, math.prod(inputs), outputs) + math.prod(outputs)
        return Work(operations, size * activations + weight, rate=SPARSE_PEAK)
    copied = _copied(layer, inputs, pixels, columns)
    copied += pixels * (columns + wide) if wide != columns else 0
    return Work(operations, size * pixels * (wide + rows) + weight, size * copied, rate=SPARSE_PEAK)


def work_vector(layer: Layer, inputs: Shape, outputs: Shape, dtype: torch.dtype, form: Form) -> Work:
    """A call through a vector-wise kernel. Arguments as for `work_dense`; the layer has no obstacle.

    Every kept column is somebody's, and which are nobody's is not known from shapes: all touched pixels are read.
    """
    assert layer.pattern is not None
    size, result = dtype.itemsize, math.prod(outputs)
    kept = _columns(layer) * layer.pattern.n // layer.pattern.m
    index = _INDEX_BYTES * kept * (layer.shape[0] // layer.pattern.vector)
    image, padded = math.prod(inputs), _padded(layer, inputs)
    around = form == "im2col" and padded != image
    read = _touched(layer, padded if around else image, outputs)
    weight = layer.shape[0] * kept + _bias(layer)
    return Work(2 * result * kept, size * (read + result + weight) + index, size * (image + padded) if around else 0)


def compressed_bytes(rows: int, columns: int, size: int) -> int:
    """A 2:4 matrix in memory: half of the values, two bits of position for each.

    Args:
        rows: padded.
        columns: padded.
        size: bytes of a value.
    """
    values = rows * columns // 2
    return values * size + values // 4


def _columns(layer: Layer) -> int:
    return math.prod(layer.shape[1:])


def _bias(layer: Layer) -> int:
    return 0 if layer.bias is None else layer.shape[0]


def _pixels(layer: Layer, outputs: Shape) -> int:
    return math.prod(outputs) // layer.shape[0]


def _touched(layer: Layer, image: int, outputs: Shape) -> int:
    """Elements of the input that are read at least once: strides may pass over some."""
    groups = getattr(layer.module, "groups", 1)
    return min(image, _pixels(layer, outputs) * _columns(layer) * groups)


def _padded(layer: Layer, inputs: Shape) -> int:
    """Elements of the input with its zeros around."""
    if not isinstance(layer.module, nn.Conv2d):
        return math.prod(inputs)
    batch, channels, height, width = inputs
    left, right, top, bottom = geometry_of(layer.module).pads(height, width)
    return batch * channels * (height + top + bottom) * (width + left + right)


def _copied(layer: Layer, inputs: Shape, pixels: int, columns: int) -> int:
    """Elements read and written to bring an image into matrix form; none where that is a view."""
    if not isinstance(layer.module, nn.Conv2d):
        return 0
    geometry, image, padded = geometry_of(layer.module), math.prod(inputs), _padded(layer, inputs)
    around = image + padded if padded != image else 0
    if geometry.pointwise and geometry.stride == (1, 1):
        return around
    return around + min(padded, pixels * columns) + pixels * columns
