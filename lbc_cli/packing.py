"""Packed N:M tensors: kept values and position codes instead of a dense weight, bit for bit. Pure functions.

Layout, version 1. A tensor T of shape [O, I, *K] with pattern N:M along dim 1 and vector length V becomes two tensors:

    T.nm_values   dtype of T, shape [O, *K, I/M, N]: the kept values of each group in ascending position
    T.nm_index    uint8, shape [O/V, *K, ceil((I/M) * N * b / 8)] with b = max(1, ceil(log2 M))

- A group is M consecutive input channels at one kernel position; V consecutive output channels share its positions.
- A row (o, k) of the index holds (I/M) * N codes of b bits: code c is a position within its group and occupies the bits
  c*b .. c*b + b-1 of the row, least significant first, bits counted from the least significant bit of byte 0. The codes
  of a group ascend strictly and are below M. The bits after the last code are zero, up to a whole byte.
- Exactly N positions of every group are kept. With a mask those are its positions (a kept value may be zero). Without,
  they are the positions at which any of the V rows holds bytes other than zero, filled up with the lowest free ones.
- Whatever is not kept is +0.0, all bytes zero. Values move as bytes: -0.0, NaN payloads and subnormals survive.

Every tensor thus has one packed form for given kept positions, and `unpack` accepts nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbc_cli.errors import CheckpointError, PatternError
from lbc_cli.patterns import Pattern, check_shape

CHUNK_ELEMENTS = 1 << 18  # a few MiB of working memory; larger chunks leave the cache and gain nothing
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The two tensors that stand for a sparse one."""

    values: Tensor
    """Dtype of the weight, [O, *K, I/M, N]."""
    index: Tensor
    """uint8, [O/V, *K, row_bytes]."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes that follow from a shape and a pattern."""

    shape: tuple[int, ...]
    """[O, I, *K] of the dense tensor."""
    pattern: Pattern
    vectors: int
    """O / V."""
    positions: int
    """prod(K): kernel positions."""
    groups: int
    """I / M: groups in a row (o, k)."""

    @classmethod
    def of(cls, shape: Sequence[int], pattern: Pattern) -> Layout:
        """Derive the layout.

        Raises:
            PatternError: if the shape does not divide into groups, or has a dimension of zero.
        """
        check_shape(shape, pattern)
        if 0 in shape:
            raise PatternError(f"shape {list(shape)} is empty: {pattern} needs at least one group")
        out, inp, *kernel = shape
        return cls(tuple(shape), pattern, out // pattern.vector, math.prod(kernel), inp // pattern.m)

    @property
    def bits(self) -> int:
        """b: bits of a position code."""
        return code_bits(self.pattern.m)

    @property
    def codes(self) -> int:
        """Codes in a row of the index."""
        return self.groups * self.pattern.n

    @property
    def row_bytes(self) -> int:
        """Bytes in a row of the index."""
        return -(-self.codes * self.bits // 8)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of T.nm_values."""
        return (self.shape[0], *self.shape[2:], self.groups, self.pattern.n)

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Shape of T.nm_index."""
        return (self.vectors, *self.shape[2:], self.row_bytes)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of vectors (first, after the last), each about CHUNK_ELEMENTS weights."""
        step = max(1, CHUNK_ELEMENTS // (self.pattern.vector * self.positions * self.shape[1]))
        for first in range(0, self.vectors, step):
            yield first, min(first + step, self.vectors)


def code_bits(m: int) -> int:
    """Bits of a position code: max(1, ceil(log2 M))."""
    return max(1, (m - 1).bit_length())


def pack(weight: Tensor, pattern: Pattern, mask: Tensor | None = None, name: str = "weight") -> Packed:
    """Pack a weight that holds N:M.

    Args:
        weight: [O, I, *K], any dtype of 1, 2, 4 or 8 bytes, any strides.
        pattern: N:M and vector length.
        mask: bool [O, I, *K], exactly N kept in every group and the same for the V rows of a vector; None: what is not
            zero is kept.
        name: what to call the tensor in messages.

    Returns:
        The packed form, on the CPU.

    Raises:
        PatternError: if the shape does not fit, the mask is not N:M, or the weight is not zero where it must be.
    """
    try:
        layout = Layout.of(weight.shape, pattern)
    except PatternError as error:
        raise PatternError(f"{name}: {error}") from error
    if weight.dtype == torch.float8_e8m0fnu:
        raise PatternError(f"{name}: {weight.dtype} has no zero: it cannot be sparse")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        raise PatternError(
            f"{name}: the mask is {mask.dtype} {list(mask.shape)}: a bool of shape {list(weight.shape)} is needed"
        )
    source = _as_integers(weight, name)
    values = torch.empty(layout.vectors, pattern.vector, layout.positions * layout.codes, dtype=source.dtype)
    index = torch.empty(layout.vectors, layout.positions, layout.row_bytes, dtype=torch.uint8)
    for first, last in layout.chunks():
        rows = _arrange(_vectors(source, first, last, pattern), pattern)
        marks = None if mask is None else _arrange(_vectors(mask.cpu(), first, last, pattern), pattern)
        codes = _kept_positions(rows.numpy(), None if marks is None else marks.numpy(), layout)
        if codes is None:
            raise _violation(rows, marks, layout, name, first)
        _take(rows.numpy(), codes, layout, values[first:last].numpy())
        index[first:last] = torch.from_numpy(_encode(codes, layout))
    return Packed(values.view(weight.dtype).reshape(layout.values_shape), index.reshape(layout.index_shape))


def unpack(values: Tensor, index: Tensor, shape: Sequence[int], pattern: Pattern, name: str = "weight") -> Tensor:
    """Restore the dense weight, with +0.0 wherever nothing was kept.

    Args:
        values: [O, *K, I/M, N], any dtype of 1, 2, 4 or 8 bytes.
        index: uint8 [O/V, *K, row_bytes].
        shape: [O, I, *K] of the dense weight.
        pattern: N:M and vector length.
        name: what to call the tensor in messages.

    Returns:
        [O, I, *K], contiguous, dtype of `values`, on the CPU.

    Raises:
        CheckpointError: if the shapes do not belong together or the index is not the canonical encoding.
    """
    layout = _checked_layout(values, index, shape, pattern, name)
    source = _as_integers(values, name).reshape(layout.vectors, -1)
    rows_of_index = index.cpu().reshape(layout.vectors, layout.positions, layout.row_bytes)
    out, inp, *kernel = layout.shape
    dense = torch.empty(out, inp, layout.positions, dtype=source.dtype)
    for first, last in layout.chunks():
        codes = _decode(rows_of_index[first:last].numpy(), layout, name, first)
        rows = _put(source[first:last].numpy(), codes, layout)
        chunk = dense[first * pattern.vector : last * pattern.vector]
        chunk.copy_(torch.from_numpy(rows).reshape(-1, layout.positions, inp).transpose(1, 2))
    return dense.view(values.dtype).reshape(out, inp, *kernel)


def _checked_layout(values: Tensor, index: Tensor, shape: Sequence[int], pattern: Pattern, name: str) -> Layout:
    try:
        layout = Layout.of(shape, pattern)
    except PatternError as error:
        raise CheckpointError(f"{name}: {error}") from error
    if tuple(values.shape) != layout.values_shape:
        raise CheckpointError(
            f"{name}: values have shape {list(values.shape)}: {pattern} of {list(shape)} needs "
            f"{list(layout.values_shape)}"
        )
    if tuple(index.shape) != layout.index_shape or index.dtype != torch.uint8:
        raise CheckpointError(
            f"{name}: the index is {index.dtype} {list(index.shape)}: {pattern} of {list(shape)} needs "
            f"torch.uint8 {list(layout.index_shape)}"
        )
    return layout


def _as_integers(tensor: Tensor, name: str) -> Tensor:
    """The bytes of a tensor as integers of the same width, on the CPU."""
    integer = _INTEGERS.get(tensor.element_size())
    if integer is None:
        raise PatternError(f"{name}: {tensor.dtype} cannot be packed: only elements of 1, 2, 4 or 8 bytes can")
    return tensor.detach().resolve_conj().resolve_neg().cpu().view(integer)


def _vectors(tensor: Tensor, first: int, last: int, pattern: Pattern) -> Tensor:
    return tensor[first * pattern.vector : last * pattern.vector]


def _arrange(rows: Tensor, pattern: Pattern) -> Tensor:
    """[o*V, I, *K] to [o, V, prod(K) * I], contiguous, with input channels last."""
    return rows.movedim(1, -1).reshape(rows.shape[0] // pattern.vector, pattern.vector, -1).contiguous()


def _kept_positions(rows: NDArray[Any], marks: NDArray[np.bool_] | None, layout: Layout) -> Codes | None:
    """The positions kept in each group of a chunk, [groups, N], ascending; None if it cannot be packed.

    Args:
        rows: the elements, [o, V, prod(K) * I].
        marks: the mask, same shape.
        layout: the sizes.
    """
    nonzero = rows != 0
    used: NDArray[np.bool_] = nonzero[:, 0] if layout.pattern.vector == 1 else np.logical_or.reduce(nonzero, axis=1)
    if marks is None:
        found = _exact(used, layout)
        return _exact(_fill(used, layout), layout) if found is None else found
    kept = marks[:, 0]
    if (used & ~kept).any() or (layout.pattern.vector > 1 and (marks != kept[:, None]).any()):
        return None
    return _exact(kept, layout)


def _exact(used: NDArray[np.bool_], layout: Layout) -> Codes | None:
    """The positions in use if every group has exactly N of them, else None."""
    n, m = layout.pattern.n, layout.pattern.m
    groups = used.size // m
    if 16 % m == 0 and used.size % 16 == 0:
        codes, sound = _positions_of_words(n, m)
        words = np.packbits(used.reshape(-1), bitorder="little").view("<u2")
        return codes[words].reshape(groups, n) if sound[words].all() else None
    found = torch.from_numpy(used.reshape(-1)).nonzero().numpy()  # several times as fast as numpy's own
    if found.size != groups * n:
        return None
    flat = found.reshape(groups, n) - np.arange(0, groups * m, m)[:, None]
    return flat.astype(np.uint8) if (flat[:, 0] >= 0).all() and (flat[:, -1] < m).all() else None


@lru_cache(maxsize=8)
def _positions_of_words(n: int, m: int) -> tuple[Codes, NDArray[np.bool_]]:
    """For every 16-bit set of positions, 16/M groups: the codes, and whether each group has exactly N."""
    bits = (np.arange(1 << 16)[:, None] >> np.arange(16) & 1).astype(np.uint8).reshape(-1, 16 // m, m)
    codes = np.argsort(1 - bits, axis=-1, kind="stable")[..., :n].astype(np.uint8)
    return codes.reshape(1 << 16, -1), (bits.sum(axis=-1) == n).all(axis=-1)


def _fill(used: NDArray[np.bool_], layout: Layout) -> NDArray[np.bool_]:
    """Add the lowest free positions to the groups that use fewer than N."""
    n, m = layout.pattern.n, layout.pattern.m
    groups = used.reshape(-1, m).copy()
    count = groups.sum(axis=1)
    short = count < n
    free = ~groups[short]
    groups[short] |= free & (free.cumsum(axis=1) <= (n - count[short])[:, None])
    return groups


def _take(rows: NDArray[Any], codes: Codes, layout: Layout, out: NDArray[Any]) -> None:
    """Gather the kept values of every row of a vector into out [o, V, kept per row]."""
    o, v, width = rows.shape
    flat = codes + np.arange(0, len(codes) * layout.pattern.m, layout.pattern.m)[:, None]
    local = flat.reshape(o, 1, -1)
    if v > 1:
        rest = np.arange(o)[:, None] * (v - 1) + np.arange(v)
        local = local + (rest * width)[:, :, None]
    np.take(rows.reshape(-1), local, out=out, mode="clip")  # "raise" would buffer `out`


def _encode(codes: Codes, layout: Layout) -> Codes:
    """Positions [groups, N] of a chunk to rows of bytes [o, prod(K), row_bytes]. Eight codes fill b bytes."""
    b, per_row = layout.bits, layout.codes
    rows = codes.reshape(-1, per_row)
    padded = np.zeros((len(rows), -(-per_row // 8) * 8), np.uint8)
    padded[:, :per_row] = rows
    blocks = padded.reshape(len(rows), -1, 8)
    out = np.zeros((*blocks.shape[:2], b), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * b, 8)
        out[..., byte] |= blocks[..., i] << shift
        if shift + b > 8:
            out[..., byte + 1] |= blocks[..., i] >> (8 - shift)
    return out.reshape(len(rows), -1)[:, : layout.row_bytes].reshape(-1, layout.positions, layout.row_bytes)


def _decode(index: Codes, layout: Layout, name: str, first: int) -> Codes:
    """The inverse of `_encode`: [o, prod(K), I/M, N], or an error if the bytes are not canonical."""
    b, per_row, (o, k, row_bytes) = layout.bits, layout.codes, index.shape
    padded = np.zeros((o * k, -(-per_row // 8) * b), np.uint8)
    padded[:, :row_bytes] = index.reshape(o * k, row_bytes)
    blocks = padded.reshape(o * k, -1, b)
    codes = np.empty((*blocks.shape[:2], 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * b, 8)
        word = blocks[..., byte] >> shift
        if shift + b > 8:
            word |= blocks[..., byte + 1] << (8 - shift)
        codes[..., i] = word & ((1 << b) - 1)
    rows = codes.reshape(o * k, -1)
    if rows[:, per_row:].any():
        raise CheckpointError(f"{name}: the index has bits set after the last code of a row: padding must be zero")
    found = rows[:, :per_row].reshape(o, k, layout.groups, layout.pattern.n)
    _check_positions(found, layout, name, first)
    return found


def _check_positions(codes: Codes, layout: Layout, name: str, first: int) -> None:
    """Positions must ascend strictly and stay below M."""
    wrong = codes[..., -1] >= layout.pattern.m
    for slot in range(1, layout.pattern.n):
        wrong |= codes[..., slot] <= codes[..., slot - 1]
    if wrong.any():
        o, k, i = (int(axis) for axis in np.argwhere(wrong)[0])
        raise CheckpointError(
            f"{name}: group {_place(layout, first + o, k, i)} keeps positions {codes[o, k, i].tolist()}: "
            f"{layout.pattern} needs {layout.pattern.n} different ones below {layout.pattern.m} in ascending order"
        )


def _put(values: NDArray[Any], codes: Codes, layout: Layout) -> NDArray[Any]:
    """Scatter values [o, V * kept per row] into zeros [o * V, prod(K) * I]."""
    o, v = len(codes), layout.pattern.vector
    dense = np.zeros((o * v, layout.positions * layout.shape[1]), values.dtype)
    start = np.arange(o * v * layout.positions * layout.groups) * layout.pattern.m
    flat = start.reshape(o, v, -1, 1) + codes.reshape(o, 1, -1, layout.pattern.n)
    dense.reshape(-1)[flat.reshape(-1)] = values.reshape(-1)
    return dense


def _place(layout: Layout, vector: int, position: int, group: int) -> str:
    """A group as "(o=3, k=(1, 2), i=8..11)": output channels, kernel position, input channels."""
    v, m = layout.pattern.vector, layout.pattern.m
    rows = str(vector * v) if v == 1 else f"{vector * v}..{vector * v + v - 1}"
    kernel = tuple(int(axis) for axis in np.unravel_index(position, layout.shape[2:])) if layout.shape[2:] else ()
    return f"(o={rows}, k={kernel}, i={group * m}..{group * m + m - 1})"


def _violation(rows: Tensor, marks: Tensor | None, layout: Layout, name: str, first: int) -> PatternError:
    """The error for the first group of a chunk that cannot be packed."""
    n, m, v = layout.pattern.n, layout.pattern.m, layout.pattern.vector
    values = rows.reshape(rows.shape[0], v, layout.positions, layout.groups, m)
    if marks is None:
        wrong = (values != 0).any(dim=1).sum(dim=-1) > n
        rule = f"{layout.pattern} keeps at most {n} of {m}"
    else:
        kept = marks.reshape(values.shape)
        uneven = (kept.sum(dim=-1) != n).any(dim=1) | (kept != kept[:, :1]).any(dim=-1).any(dim=1)
        wrong = uneven | ((values != 0) & ~kept).any(dim=-1).any(dim=1)
        rule = f"{layout.pattern} needs a mask of exactly {n} of {m}, the same in every row, and +0.0 outside it"
    o, k, i = (int(axis) for axis in wrong.nonzero()[0])
    detail = f"holds the bytes {_hexadecimal(values[o, :, k, i])}"
    if marks is not None:
        detail += f" under the mask {marks.reshape(values.shape)[o, :, k, i].int().tolist()}"
    return PatternError(f"{name}: group {_place(layout, first + o, k, i)} {detail}: {rule}")


def _hexadecimal(bits: Tensor) -> str:
    """The elements of a group, as hexadecimal of their bytes (unambiguous for -0.0 and NaN)."""
    width = bits.element_size()
    rows = [[f"{int(b) & (256**width - 1):0{2 * width}x}" for b in row] for row in bits]
    return ", ".join("[" + " ".join(row) + "]" for row in rows[:4]) + (", ..." if len(rows) > 4 else "")
