"""The `sparse-24-bitmask` layout of compressed-tensors (0.9 to 0.14; removed in 0.15).

A weight X.weight of shape [R, C] is stored as three tensors; everything else stands under its own name:

    X.compressed   [R, C/2], dtype of the weight: the kept values in row-major order
    X.bitmask      uint8 [R, ceil(C/8)]: bit c % 8 (least significant first) of byte c // 8 of row r is set where (r, c)
                   is kept; the bits after the last column are zero
    X.shape        int64 [2, 1] (any shape of two elements is read): R, C

Exactly two of every four consecutive weights are kept, kept zeros among them. Its writer counts fours through the whole
tensor, so that they straddle rows where 4 does not divide C; such a tensor is read, and no pattern is claimed for it.

Read here with every size, count and padding bit checked. The layout's quantised and unstructured relatives
(`weight_scale`, `row_offsets`) are refused: their values are not the model's weights, or another format's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lbc_cli.checkpoint.container import MAX_ELEMENTS
from lbc_cli.errors import CheckpointError
from lbc_cli.patterns import Pattern
from lbc_cli.weights.base import Decoded

VALUES, BITS, SHAPE = ".compressed", ".bitmask", ".shape"
PATTERN = Pattern(2, 4)
_OTHERS = {
    ".row_offsets": "the unstructured sparse-bitmask layout",
    ".weight_scale": "quantised weights",
    ".weight_packed": "quantised weights",
    ".weight_zero_point": "quantised weights",
    ".meta": "the marlin-24 layout",
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any tensor is stored as values and a bitmask."""
    return any(name.endswith(BITS) and name.removesuffix(BITS) + VALUES in tensors for name in tensors)


def decode(tensors: Mapping[str, Tensor]) -> Decoded:
    """Restore the dense weights, bit for bit, +0.0 where nothing was kept.

    Raises:
        CheckpointError: if anything contradicts the layout.
    """
    parts = (VALUES, BITS, SHAPE)
    for name in tensors:
        if other := next((what for ending, what in _OTHERS.items() if name.endswith(ending)), None):
            raise CheckpointError(f"{name} belongs to {other}: only sparse-24-bitmask of plain weights is read")
    layers = sorted({name.removesuffix(part) for name in tensors for part in parts if name.endswith(part)})
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(parts)}
    patterns: dict[str, Pattern] = {}
    masks: dict[str, Tensor] = {}
    for layer in layers:
        name = f"{layer}.weight"
        if missing := [layer + part for part in parts if layer + part not in tensors]:
            raise CheckpointError(f"the packed {name} has no {missing[0]}")
        if name in plain:
            raise CheckpointError(f"{name} is stored dense and packed at once")
        plain[name], mask = _restore(name, *(tensors[layer + part] for part in parts))
        if mask.shape[1] % PATTERN.m == 0:
            patterns[name], masks[name] = PATTERN, mask
    return Decoded(tensors=plain, patterns=patterns, masks=masks)


def _restore(name: str, values: Tensor, bits: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = _shape(name, shape)
    row_bytes = -(-columns // 8)
    if values.element_size() not in _INTEGERS:
        raise CheckpointError(f"{name}: {values.dtype} cannot be a weight's dtype")
    if columns % 2 or tuple(values.shape) != (rows, columns // 2):
        raise CheckpointError(f"{name}: values {list(values.shape)} do not hold half of {rows} x {columns} weights")
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, row_bytes):
        raise CheckpointError(
            f"{name}: the bitmask is {bits.dtype} {list(bits.shape)}: uint8 {[rows, row_bytes]} is due"
        )
    unpacked = np.unpackbits(bits.contiguous().numpy(), axis=1, bitorder="little")
    if unpacked[:, columns:].any():
        raise CheckpointError(f"{name}: the bitmask has bits set after column {columns}: padding must be zero")
    mask = unpacked[:, :columns].astype(np.bool_)
    _check_fours(name, mask)
    integer = _INTEGERS[values.element_size()]
    dense = torch.zeros(rows, columns, dtype=integer)
    kept = torch.from_numpy(mask)
    dense[kept] = values.contiguous().view(integer).reshape(-1)
    return dense.view(values.dtype), kept


def _shape(name: str, shape: Tensor) -> tuple[int, int]:
    sizes = shape.reshape(-1).tolist() if shape.dtype in (torch.int32, torch.int64) and shape.numel() == 2 else []
    if not sizes or min(sizes) < 1 or sizes[0] * sizes[1] > MAX_ELEMENTS:
        raise CheckpointError(f"{name}: its shape is stored as {shape.dtype} {list(shape.shape)}: two sizes are needed")
    return sizes[0], sizes[1]


def _check_fours(name: str, mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> None:
    if mask.size % PATTERN.m:
        raise CheckpointError(f"{name}: {mask.size} weights do not divide into fours")
    counts = mask.reshape(-1, PATTERN.m).sum(axis=1)
    if (counts != PATTERN.n).any():
        first = int(np.argmax(counts != PATTERN.n))
        row, column = divmod(first * PATTERN.m, mask.shape[1])
        raise CheckpointError(
            f"{name}: the bitmask keeps {int(counts[first])} of the four weights from ({row}, {column}) on: "
            f"{PATTERN} keeps exactly {PATTERN.n}"
        )
