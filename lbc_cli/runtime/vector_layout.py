"""Vector-wise layers as gathered dense products: what is kept, where it lies, how outputs walk over it. Pure functions.

V output channels share their kept columns (an input channel at a kernel position each): a *tile*. Its outputs are a
dense product of the kept columns, gathered, with a dense matrix of kept weights:

    output[p, v] = sum_j buffer[start(p) + step(tile, j)] * weights[tile, j, v]

`start` depends on the output pixel alone and `step` on the kept column alone, so that linear layers and convolutions
of every kernel, stride and dilation are one loop. Two layouts of the buffer:

    channels-last     the image with its zeros around, [n, h, w, I], as it lies: no copy, elements gathered one by one
    channels-first    [kw * I, n, h, w']: a column is a run of pixels, read as whole vectors, and gathering costs
                      nothing; made at every call by one copy of the input for each kernel column

Shapes
    O, I      channels              kh, kw   kernel size            V, T   vector length, number of tiles O / V
    N, M      of the pattern        J        kept columns of a tile, kh * kw * I * N / M
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lbc_cli.errors import PatternError
from lbc_cli.patterns import Pattern, check_shape
from lbc_cli.runtime.matrix import Geometry, padded_image, patches, weight_from_matrix, weight_matrix

Layout = Literal["channels-first", "channels-last"]
POINTWISE = Geometry((1, 1), (1, 1), (0, 0), (1, 1))
TILE = 64
"""Output channels that fill a block of the kernel: vector lengths must be multiples of it there."""
RUN = 8
"""Pixels in a row that channels-first buffers keep together and aligned: 16 bytes in 16 bit, one vector access."""


class Walk(NamedTuple):
    """How output pixels and kept columns are found in a buffer; steps are in elements.

    Pixel (image, y, x) starts at image * image_step + y * row_step + x * pixel_step; a kept column with tap (row,
    column) lies row * tap_step + column * column_step further on.
    """

    images: int
    height: int
    width: int
    pitch: int
    """Pixels computed in a row, at least `width`; what is more is dropped."""
    image_step: int
    row_step: int
    pixel_step: int
    tap_step: int
    """0 where no column has a row."""
    column_step: int
    run: int
    """Aligned pixels that lie side by side, 1 or RUN: every step but `pixel_step`, and `pitch`, are multiples of it."""

    @property
    def pixels(self) -> int:
        """Rows of the result."""
        return self.images * self.height * self.width

    @property
    def computed(self) -> int:
        """Pixels computed, those dropped included."""
        return self.images * self.height * self.pitch


class Taps(NamedTuple):
    """Where the kept columns of every tile lie, as multiples of a walk's steps: int32 [T, J] each."""

    rows: Tensor
    columns: Tensor


def kept_columns(weight: Tensor, pattern: Pattern) -> Tensor:
    """The columns that the tiles keep, exactly N of every M.

    Args:
        weight: [O, I, *K].
        pattern: with the vector length V.

    Returns:
        int64 [T, J], ascending columns of `weight_matrix(weight)`; groups with fewer than N in use are filled up.

    Raises:
        PatternError: if the weight does not hold the pattern.
    """
    check_shape(weight.shape, pattern)
    matrix = weight_matrix(weight)
    used = (matrix != 0).reshape(-1, pattern.vector, matrix.shape[1]).any(dim=1)
    groups = used.reshape(len(used), -1, pattern.m)
    if bool((groups.sum(dim=-1) > pattern.n).any()):
        raise PatternError(f"a weight of shape {list(weight.shape)} does not hold {pattern}: some group keeps more")
    # A stable sort puts the positions in use first and fills up with the lowest free ones.
    kept = (~groups).to(torch.uint8).sort(dim=-1, stable=True).indices[..., : pattern.n].sort(dim=-1).values
    firsts = torch.arange(groups.shape[1], device=weight.device)[:, None] * pattern.m
    return (kept + firsts).flatten(1)


def tile_weights(weight: Tensor, columns: Tensor) -> Tensor:
    """The kept weights of every tile, as the right-hand side of its product.

    Args:
        weight: [O, I, *K].
        columns: int64 [T, J] from `kept_columns`.

    Returns:
        [T, J, V], contiguous.
    """
    tiles = weight_matrix(weight).reshape(len(columns), -1, weight[0].numel())
    return tiles.transpose(1, 2).take_along_dim(columns[:, :, None], dim=1).contiguous()


def untile_weights(weights: Tensor, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `tile_weights`, +0.0 elsewhere.

    Args:
        weights: [T, J, V].
        columns: int64 [T, J].
        shape: [O, I, *K].
    """
    tiles, _, vector = weights.shape
    matrix = weights.new_zeros(tiles, math.prod(shape[1:]), vector)
    matrix = matrix.scatter(1, columns[:, :, None].expand_as(weights), weights)
    return weight_from_matrix(matrix.transpose(1, 2).reshape(shape[0], -1), shape)


def taps_of(columns: Tensor, channels: int, geometry: Geometry, layout: Layout) -> Taps:
    """Where columns lie in a buffer.

    Args:
        columns: int64 [T, J] from `kept_columns`.
        channels: I.
        geometry: of the convolution; `POINTWISE` for a linear layer.
        layout: of the buffer.
    """
    position, channel = columns // channels, columns % channels
    row, column = position // geometry.kernel[1], position % geometry.kernel[1]
    shift = column * (geometry.dilation[1] if layout == "channels-last" else 1)
    return Taps((row * geometry.dilation[0]).int(), (shift * channels + channel).int())


def columns_of(taps: Taps, channels: int, geometry: Geometry, layout: Layout) -> Tensor:
    """The inverse of `taps_of`: int64 [T, J]."""
    row = taps.rows.long() // geometry.dilation[0]
    column = taps.columns.long() // channels // (geometry.dilation[1] if layout == "channels-last" else 1)
    return (row * geometry.kernel[1] + column) * channels + taps.columns % channels


def rows_buffer(rows: Tensor, layout: Layout) -> tuple[Tensor, Walk]:
    """Rows of features as a buffer: an image of one row of pixels.

    Args:
        rows: [n, I].
        layout: of the buffer; channels-first copies.

    Returns:
        [n, I] or [I, n'] with n' a multiple of RUN, contiguous; and the walk of n pixels.
    """
    number, channels = rows.shape
    if layout == "channels-last":
        return rows.contiguous(), Walk(1, 1, number, number, 0, 0, channels, 0, 1, 1)
    pitch = _run_up(number)
    # What lies beyond the pixels stays as it is: it reaches only results that are dropped.
    buffer = rows.new_empty(channels, pitch)
    buffer[:, :number] = rows.t()
    return buffer, Walk(1, 1, number, pitch, 0, 0, 1, 0, pitch, RUN)


def image_buffer(images: Tensor, geometry: Geometry, layout: Layout) -> tuple[Tensor, Walk]:
    """Images as a buffer for a convolution.

    Args:
        images: [n, I, h, w].
        geometry: of the convolution.
        layout: of the buffer; channels-last copies only to pad, or what does not lie channels last.

    Returns:
        The buffer, contiguous, and the walk of [n, h_out, w_out] pixels.
    """
    if layout == "channels-last":
        return _channels_last(images, geometry)
    if not geometry.pointwise:
        return _channels_first(images, geometry)
    return rows_buffer(patches(images, geometry), layout)


def _channels_last(images: Tensor, geometry: Geometry) -> tuple[Tensor, Walk]:
    height, width = geometry.output(images.shape[2], images.shape[3])
    buffer = padded_image(images, geometry)
    image, row, pixel, _ = buffer.stride()
    (down, right), tap = geometry.stride, row if geometry.kernel[0] > 1 else 0
    return buffer, Walk(len(images), height, width, width, image, down * row, right * pixel, tap, 1, 1)


def _channels_first(images: Tensor, geometry: Geometry) -> tuple[Tensor, Walk]:
    """A copy for each kernel column, stride and dilation along the row spent: output pixels then lie side by side."""
    height, width = geometry.output(images.shape[2], images.shape[3])
    padded = padded_image(images, geometry)
    number, rows, _, channels = padded.shape
    step, pitch = geometry.stride[1], _run_up(width)
    buffer = padded.new_empty(geometry.kernel[1], channels, number, rows, pitch)
    for column in range(geometry.kernel[1]):
        left = column * geometry.dilation[1]
        shifted = padded[:, :, left : left + (width - 1) * step + 1 : step]
        buffer[column, :, :, :, :width] = shifted.permute(3, 0, 1, 2)
    plane = number * rows * pitch
    tap = pitch if geometry.kernel[0] > 1 else 0
    walk = Walk(number, height, width, pitch, rows * pitch, geometry.stride[0] * pitch, 1, tap, plane, RUN)
    return buffer, walk


def starts(walk: Walk, device: torch.device) -> Tensor:
    """Where every output pixel starts: int64 [pixels]."""
    image = torch.arange(walk.images, device=device)[:, None, None] * walk.image_step
    row = torch.arange(walk.height, device=device)[:, None] * walk.row_step
    return (image + row + torch.arange(walk.width, device=device) * walk.pixel_step).flatten()


def steps(taps: Taps, walk: Walk) -> Tensor:
    """How far every kept column lies from a start: int64 [T, J]."""
    return taps.rows.long() * walk.tap_step + taps.columns.long() * walk.column_step


def _run_up(number: int) -> int:
    return -(-number // RUN) * RUN
