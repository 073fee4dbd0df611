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

_NUMBER, _PLACE = np.uint8(0b111_00000), np.uint8(0b000_11111)  # parts of a label: of the group, within the group

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
        kept = _kept_positions(rows.numpy(), None if marks is None else marks.numpy(), layout)
        if kept is None:
            raise _violation(rows, marks, layout, name, first)
        _take(rows.numpy(), kept.flat, values[first:last].numpy())
        index[first:last] = torch.from_numpy(_encode(kept.codes, layout))
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


def check_index(index: Tensor, shape: Sequence[int], pattern: Pattern, name: str = "weight") -> None:
    """Check that an index is the canonical encoding of kept positions, without restoring anything.

    Args:
        index: uint8 [O/V, *K, row_bytes].
        shape: [O, I, *K] of the dense weight.
        pattern: N:M and vector length.
        name: what to call the tensor in messages.

    Raises:
        CheckpointError: if it is not.
    """
    layout = _layout_of_file(shape, pattern, name)
    _check_index_shape(index, layout, name)
    rows = index.cpu().reshape(layout.vectors, layout.positions, layout.row_bytes).numpy()
    for first, last in layout.chunks():
        _decode(rows[first:last], layout, name, first)


def _layout_of_file(shape: Sequence[int], pattern: Pattern, name: str) -> Layout:
    try:
        return Layout.of(shape, pattern)
    except PatternError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _check_index_shape(index: Tensor, layout: Layout, name: str) -> None:
    if tuple(index.shape) != layout.index_shape or index.dtype != torch.uint8:
        raise CheckpointError(
            f"{name}: the index is {index.dtype} {list(index.shape)}: {layout.pattern} of {list(layout.shape)} needs "
            f"torch.uint8 {list(layout.index_shape)}"
        )


def _checked_layout(values: Tensor, index: Tensor, shape: Sequence[int], pattern: Pattern, name: str) -> Layout:
    layout = _layout_of_file(shape, pattern, name)
    if tuple(values.shape) != layout.values_shape:
        raise CheckpointError(
            f"{name}: values have shape {list(values.shape)}: {pattern} of {list(shape)} needs "
            f"{list(layout.values_shape)}"
        )
    _check_index_shape(index, layout, name)
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


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """Kept positions of a chunk, in the order of groups."""

    flat: NDArray[np.int64]
    """Within the chunk's first rows of vectors, [o, prod(K) * I] flattened."""
    codes: Codes
    """Within the group; flat."""


def _kept_positions(rows: NDArray[Any], marks: NDArray[np.bool_] | None, layout: Layout) -> _Kept | None:
    """The positions to keep in each group of a chunk; None if it cannot be packed.

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


def _exact(used: NDArray[np.bool_], layout: Layout) -> _Kept | None:
    """The positions in use if every group has exactly N of them, else None.

    The p-th position in use belongs to group p // N if there are N of each. It is enough to compare three bits of the
    group's number: groups only ascend, so the first to differ by a multiple of eight would leave the last ones without
    a group to belong to.
    """
    n, m = layout.pattern.n, layout.pattern.m
    groups = used.size // m
    flat = np.flatnonzero(used)
    if flat.size != groups * n:
        return None
    labels = np.take(_labels(groups, m), flat, mode="clip")  # "raise" would check what cannot be
    whole = np.array_equal(labels & _NUMBER, _numbers(groups, n))
    return _Kept(flat, labels & _PLACE) if whole else None


@lru_cache(maxsize=8)
def _labels(groups: int, m: int) -> Codes:
    """Of every position: three bits of its group's number, five of its place in the group."""
    return (_numbers(groups, m).reshape(groups, m) | np.arange(m, dtype=np.uint8)).reshape(-1)


@lru_cache(maxsize=8)
def _numbers(groups: int, count: int) -> Codes:
    """The last three bits of every group's number, in the upper bits, `count` times each."""
    return (np.arange(groups) << 5).astype(np.uint8).repeat(count)


@lru_cache(maxsize=8)
def _starts(groups: int, n: int, m: int) -> NDArray[np.int64]:
    """The first position of every group, N times each."""
    return np.arange(0, groups * m, m).repeat(n)


def _fill(used: NDArray[np.bool_], layout: Layout) -> NDArray[np.bool_]:
    """Add the lowest free positions to the groups that use fewer than N."""
    n, m = layout.pattern.n, layout.pattern.m
    groups = used.reshape(-1, m).copy()
    count = groups.sum(axis=1)
    short = count < n
    free = ~groups[short]
    groups[short] |= free & (free.cumsum(axis=1) <= (n - count[short])[:, None])
    return groups


def _take(rows: NDArray[Any], flat: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Gather the kept values of every row of a vector, [o, V, width], into out [o, V, kept per row]."""
    np.take(rows.reshape(-1), _in_all_rows(flat, *rows.shape), out=out, mode="clip")  # "raise" would buffer `out`


def _in_all_rows(flat: NDArray[np.int64], o: int, v: int, width: int) -> NDArray[np.int64]:
    """From positions in [o, width], the same for all rows of a vector, to positions in [o, V, width]: [o, V, kept]."""
    shared = flat.reshape(o, 1, -1)
    if v == 1:
        return shared
    rows = np.arange(o)[:, None] * (v - 1) + np.arange(v)
    return shared + (rows * width)[:, :, None]


def _encode(codes: Codes, layout: Layout) -> Codes:
    """Positions of a chunk to rows of bytes [o, prod(K), row_bytes]. Eight codes, one in each byte, become b bytes."""
    b, rows = layout.bits, codes.reshape(-1, layout.codes)
    words = _padded(rows, 8).view("<u8")
    for lanes in (1, 2, 4):  # codes that lie together so far, in lanes of as many bytes; pairs of lanes join
        low = _lanes((1 << b * lanes) - 1, 16 * lanes)
        words = (words & low) | ((words >> np.uint64((8 - b) * lanes)) & (low << np.uint64(b * lanes)))
    packed = words.astype("<u8", copy=False).view(np.uint8).reshape(len(rows), -1, 8)[..., :b]
    return packed.reshape(len(rows), -1)[:, : layout.row_bytes].reshape(-1, layout.positions, layout.row_bytes)


def _decode(index: Codes, layout: Layout, name: str, first: int) -> Codes:
    """The inverse of `_encode`: flat positions, or an error if the bytes are not canonical."""
    b, per_row, (o, k, row_bytes) = layout.bits, layout.codes, index.shape
    blocks = _padded(index.reshape(o * k, row_bytes), b).reshape(-1, b)
    spread = np.zeros((len(blocks), 8), np.uint8)
    for byte in range(b):
        spread[:, byte] = blocks[:, byte]
    words = spread.view("<u8")
    for lanes in (4, 2, 1):
        low = _lanes((1 << b * lanes) - 1, 16 * lanes)
        words = (words & low) | ((words & (low << np.uint64(b * lanes))) << np.uint64((8 - b) * lanes))
    rows = words.astype("<u8", copy=False).view(np.uint8).reshape(o * k, -1)
    if rows[:, per_row:].any():
        raise CheckpointError(f"{name}: the index has bits set after the last code of a row: padding must be zero")
    codes = np.ascontiguousarray(rows[:, :per_row]).reshape(-1)
    _check_positions(codes, layout, name, first)
    return codes


def _padded(rows: Codes, multiple: int) -> Codes:
    """Rows filled up with zeros to a multiple of so many columns."""
    missing = -rows.shape[1] % multiple
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, missing))) if missing else rows)


def _lanes(value: int, width: int) -> np.uint64:
    """A word that repeats a value every `width` bits."""
    return np.uint64(sum(value << at for at in range(0, 64, width)))


def _check_positions(codes: Codes, layout: Layout, name: str, first: int) -> None:
    """Positions must ascend strictly and stay below M."""
    n, m = layout.pattern.n, layout.pattern.m
    wrong = codes >= m
    behind = codes[1:] <= codes[:-1]
    behind[n - 1 :: n] = False  # from one group to the next
    wrong[1:] |= behind
    if wrong.any():
        groups = codes.reshape(-1, layout.positions, layout.groups, n)
        o, k, i = (int(axis) for axis in np.argwhere(wrong.reshape(groups.shape).any(axis=-1))[0])
        raise CheckpointError(
            f"{name}: group {_place(layout, first + o, k, i)} keeps positions {groups[o, k, i].tolist()}: "
            f"{layout.pattern} needs {n} different ones below {m} in ascending order"
        )


def _put(values: NDArray[Any], codes: Codes, layout: Layout) -> NDArray[Any]:
    """Scatter values [o, V * kept per row] into zeros [o * V, prod(K) * I]."""
    o, v, width = len(values), layout.pattern.vector, layout.positions * layout.shape[1]
    dense = np.zeros((o * v, width), values.dtype)
    flat = _starts(codes.size // layout.pattern.n, layout.pattern.n, layout.pattern.m) + codes
    dense.reshape(-1)[_in_all_rows(flat, o, v, width).reshape(-1)] = values.reshape(-1)
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
