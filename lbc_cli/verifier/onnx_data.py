"""The elements of an ONNX tensor as bits, read in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.bits import FORMATS, Bits
from lbc_cli.verifier.onnx_file import Tensor
from lbc_cli.verifier.protobuf import varints
from lbc_cli.verifier.source import row_blocks


def elements(tensor: Tensor) -> Iterator[Bits]:
    """All elements from front to back, in flat pieces.

    Raises:
        CheckpointError: if the data are cut off, or not what the type says.
    """
    total = math.prod(tensor.shape)
    if tensor.varints:
        yield _decoded(tensor)
        return
    with tensor.file.open("rb") as file:
        for first, last in row_blocks(total, 1):
            yield _raw(file, tensor, first, last)


def rows(tensor: Tensor, axes: tuple[int, ...], step: int = 1) -> Iterator[tuple[int, Bits]]:
    """The elements of a weight by output channels.

    Args:
        tensor: the weight, as stored.
        axes: which stored axes are O, I, *K.
        step: the pieces are multiples of so many output channels, but for the last.

    Returns:
        The number of the first output channel, and [rows, I, prod(K)]. Only where O is not stored first, or as
        varints, is the whole weight in memory.

    Raises:
        CheckpointError: if the data are cut off, or not what the type says.
    """
    shape = tuple(tensor.shape[axis] for axis in axes)
    row = math.prod(shape[1:])
    streamed = axes == tuple(range(len(axes))) and not tensor.varints
    whole = None if streamed else _whole(tensor).reshape(tensor.shape).transpose(axes)
    with tensor.file.open("rb") as file:
        for first, last in row_blocks(shape[0], row, step):
            piece = _raw(file, tensor, first * row, last * row) if whole is None else whole[first:last]
            yield first, np.ascontiguousarray(piece).reshape(last - first, shape[1], math.prod(shape[2:]))


def _whole(tensor: Tensor) -> Bits:
    return np.concatenate([*elements(tensor), np.empty(0, f"<u{FORMATS[tensor.dtype].size}")])


def _raw(file: BinaryIO, tensor: Tensor, first: int, last: int) -> Bits:
    size = FORMATS[tensor.dtype].size
    file.seek(tensor.begin + first * size)
    data = file.read((last - first) * size)
    if len(data) != (last - first) * size:
        raise CheckpointError(f"tensor {tensor.name} is cut off")
    return np.frombuffer(data, f"<u{size}")


def _decoded(tensor: Tensor) -> Bits:
    """Elements that are stored as varints; negative ones are sign-extended to 64 bits there."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        values = varints(file.read(tensor.end - tensor.begin))
    if len(values) != math.prod(tensor.shape):
        raise CheckpointError(f"tensor {tensor.name} has {len(values)} elements, not those of {list(tensor.shape)}")
    size = FORMATS[tensor.dtype].size
    kept = values & np.uint64(256**size - 1)
    negative = values.astype(np.int64) < 0
    if size < 8 and bool((np.where(negative, ~values, values) >> np.uint64(8 * size)).any()):
        raise CheckpointError(f"tensor {tensor.name} has elements that {tensor.dtype} cannot hold")
    return kept.astype(f"<u{size}")
