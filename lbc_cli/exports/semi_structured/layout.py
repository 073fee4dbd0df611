"""Matrices in the layout of 2:4 tensor cores, and back: pure functions. The head of the package describes the layout.

Legend
    m, k    rows and columns of the padded matrix
    q       k / 4, quads of a row
    R       rows that are reordered together: 32 where a word of metadata has 16 bits, 16 where it has 32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lbc_cli.errors import PatternError

# Which elements of a quad are not zero (bit p: position p) -> its code, p0 + 4 * p1; 0 where they are too many.
_CODES = torch.tensor([14, 8, 9, 4, 14, 8, 9, 0, 14, 12, 13, 0, 14, 0, 0, 0], dtype=torch.uint8)
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int8}
_WORDS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int32}
_BLOCK = 1 << 20  # elements of the matrix at a time: indices take eight bytes each


def to_matrix(weight: Tensor) -> Tensor:
    """[O, I, *K] as the matrix [O, prod(K) * I], input channels innermost."""
    return weight.flatten(2).movedim(1, -1).reshape(len(weight), -1) if weight.dim() > 2 else weight


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `to_matrix`; contiguous."""
    out, inputs, *kernel = shape
    return matrix.reshape(out, *kernel, inputs).movedim(-1, 1).contiguous()


def misfit(matrix: Tensor) -> tuple[int, int] | None:
    """The first row and column at which a group of four has more than two elements that are not zero.

    Args:
        matrix: [rows, columns], float16, bfloat16 or int8; an incomplete last group is filled with zeros.
    """
    wrong = _CODES[_occupied(_quads(matrix, -(-matrix.shape[1] // 4) * 4))] == 0
    first = wrong.nonzero()[:1].tolist()
    return (first[0][0], 4 * first[0][1]) if first else None


def encode(matrix: Tensor, padded: tuple[int, int], name: str = "matrix") -> tuple[Tensor, Tensor]:
    """Compress a matrix.

    Args:
        matrix: [rows, columns], float16, bfloat16 or int8, at most two elements of every aligned four not zero.
        padded: (m, k), multiples of what the dtype needs.
        name: what to call it in messages.

    Returns:
        packed [m, k/2], dtype of the matrix; meta int16 [m, k/16], or int32 [m, k/32] for int8.

    Raises:
        PatternError: if a group of four has more.
    """
    m, k = padded
    bits = _BITS[matrix.dtype]  # moved as integers: gather and scatter_ change the payload of a bfloat16 NaN
    packed = torch.zeros((m, k // 2), dtype=bits)
    codes = torch.full((m, k // 4), 14, dtype=torch.uint8)
    for first, rows in _blocks(matrix):
        quads = _quads(rows, k)
        found = _CODES[_occupied(quads)]
        if bool((found == 0).any()):
            o, q = (found == 0).nonzero()[0].tolist()
            raise PatternError(
                f"{name}: row {first + o}, columns {4 * q}..{4 * q + 3} hold {quads[o, q].tolist()}: "
                "2:4 allows two of four"
            )
        places = torch.stack((found & 3, found >> 2), dim=-1).long()
        packed[first : first + len(rows)] = quads.view(bits).gather(-1, places).flatten(1)
        codes[first : first + len(rows)] = found
    return packed.view(matrix.dtype), _reorder(_as_words(codes, _WORDS[matrix.dtype]))


def decode(packed: Tensor, meta: Tensor) -> Tensor:
    """Restore a padded matrix.

    Args:
        packed: [m, k/2].
        meta: int16 [m, k/16] or int32 [m, k/32]. Its codes are taken as they are: `is_canonical` tells whether they are
            what `encode` gives.

    Returns:
        [m, k], dtype of `packed`.
    """
    m, half = packed.shape
    codes = _as_codes(_restore_order(meta))
    kept = packed.view(_BITS[packed.dtype])
    matrix = torch.zeros((m, half // 2, 4), dtype=kept.dtype)
    step = max(1, _BLOCK // (2 * half))
    for first in range(0, m, step):
        rows = slice(first, first + step)
        places = torch.stack((codes[rows] & 3, codes[rows] >> 2), dim=-1).long()
        matrix[rows].scatter_(-1, places, kept[rows].reshape(*places.shape))
    return matrix.flatten(1).view(packed.dtype)


def is_canonical(matrix: Tensor, packed: Tensor, meta: Tensor) -> bool:
    """Whether a matrix (without its padding) is stored as exactly these tensors."""
    try:
        again = encode(matrix, (packed.shape[0], 2 * packed.shape[1]))
    except PatternError:
        return False
    bits = _BITS[packed.dtype]
    return torch.equal(again[0].view(bits), packed.view(bits)) and torch.equal(again[1], meta)


def _blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    for first in range(0, len(matrix), step):
        yield first, matrix[first : first + step]


def _quads(rows: Tensor, columns: int) -> Tensor:
    """[rows, columns / 4, 4], filled up with zeros."""
    return torch.nn.functional.pad(rows, (0, columns - rows.shape[1])).reshape(len(rows), -1, 4)


def _occupied(quads: Tensor) -> Tensor:
    """Which elements are not zero, as bits; int32 [rows, q]. By their bytes: -0.0 is an element like any other."""
    first, second, third, fourth = (quads.view(_BITS[quads.dtype]) != 0).view(torch.uint8).unbind(-1)
    return (first | second << 1 | third << 2 | fourth << 3).int()


def _as_words(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [m, q], four bits each, as words of metadata; the first in the lowest bits."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(dtype)


def _as_codes(words: Tensor) -> Tensor:
    """The inverse of `_as_words`."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def _reorder(words: Tensor) -> Tensor:
    """Words of metadata as tensor cores read them.

    Of a row's number within R, the lowest three bits come in front of the others; then 2 x 2 blocks of words are
    transposed, and pairs of columns stored one after the other. As one permutation of axes:
    [m/R, R/16, 2, 8, columns/2, 2] -> [columns/2, m/R, 8, R/16, 2, 2].
    """
    m, columns = words.shape
    outer = 2 if words.dtype == torch.int16 else 1
    blocks = words.reshape(m // (16 * outer), outer, 2, 8, columns // 2, 2)
    return blocks.permute(4, 0, 3, 1, 5, 2).reshape(m, columns)


def _restore_order(words: Tensor) -> Tensor:
    """The inverse of `_reorder`."""
    m, columns = words.shape
    outer = 2 if words.dtype == torch.int16 else 1
    blocks = words.reshape(columns // 2, m // (16 * outer), 8, outer, 2, 2)
    return blocks.permute(1, 3, 5, 2, 0, 4).reshape(m, columns)
