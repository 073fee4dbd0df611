"""The algebra of N:M sparsity: patterns, groups, candidates, masks, checks. Pure functions, no state.

A weight has shape [O, I, *K]: output channels, input channels (per convolution group), kernel positions. A *group* is M
consecutive input channels of V consecutive output channels at one kernel position: V x M weights that share one mask
of N kept positions. V = 1 is the usual fine-grained N:M; V > 1 is vector-wise N:M, in which every row is still N:M.

Shapes
    O, I, *K   dimensions of the weight; K is empty for Linear
    G          number of groups, O/V * prod(K) * I/M, ordered by (o, k, i): the order of the checkpoint format
    C          number of candidates, the C(M, N) subsets of N positions, in lexicographic order (Eq. 2 of LBC)
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lbc_cli.errors import PatternError

MAX_M = 32
_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?:/\s*(\d+)\s*)?")


@dataclass(frozen=True, slots=True)
class Pattern:
    """At most `n` of `m` consecutive input channels kept, one mask for `vector` output channels.

    Raises:
        PatternError: unless 1 <= n < m <= 32 and vector >= 1.
    """

    n: int
    m: int
    vector: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise PatternError(
                f"pattern {self.n}:{self.m} keeps {self.n} of {self.m} weights: N must be at least 1 and less than M "
                f"(2:4, 1:4, 2:8, 1:16, ...)"
            )
        if self.m > MAX_M:
            raise PatternError(
                f"pattern {self.n}:{self.m} has groups of {self.m} weights: M may be {MAX_M} at the most"
            )
        if self.vector < 1:
            raise PatternError(f"vector length {self.vector} is not positive: 1 is the usual N:M, 16 or 32 share masks")

    @classmethod
    def parse(cls, text: str, vector: int = 1) -> Pattern:
        """Read "N:M" or "N:M/V"; a V in the text wins over `vector`.

        Raises:
            PatternError: if the text is not a pattern, or not a possible one.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise PatternError(
                f"{text!r} is not a pattern: write N:M, such as 2:4 or 1:16 (N:M/V for vector-wise masks)"
            )
        n, m, v = match.groups()
        return cls(int(n), int(m), int(v) if v else vector)

    def __str__(self) -> str:
        return self.name if self.vector == 1 else f"{self.name}/{self.vector}"

    @property
    def name(self) -> str:
        """The pattern without its vector length, as checkpoints spell it: "2:4"."""
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.n / self.m

    @property
    def num_candidates(self) -> int:
        """C(M, N): how many ways a group can be kept."""
        return math.comb(self.m, self.n)

    def with_vector(self, vector: int) -> Pattern:
        """The same N:M with another vector length."""
        return Pattern(self.n, self.m, vector)


def check_shape(shape: Sequence[int], pattern: Pattern) -> None:
    """Check that a weight of this shape can be divided into groups.

    Args:
        shape: [O, I, *K].
        pattern: N:M and vector length.

    Raises:
        PatternError: if there are fewer than two dimensions, I % M != 0 or O % V != 0.
    """
    if len(shape) < 2:
        raise PatternError(f"shape {list(shape)} has no input channels: {pattern} needs [O, I, ...]")
    if shape[1] % pattern.m:
        raise PatternError(
            f"shape {list(shape)} has {shape[1]} input channels: not a multiple of {pattern.m} ({pattern})"
        )
    if shape[0] % pattern.vector:
        raise PatternError(
            f"shape {list(shape)} has {shape[0]} output channels: not a multiple of {pattern.vector} ({pattern})"
        )


def num_groups(shape: Sequence[int], pattern: Pattern) -> int:
    """G for a weight of shape [O, I, *K]."""
    return math.prod(shape) // (pattern.m * pattern.vector)


def to_groups(weight: Tensor, pattern: Pattern) -> Tensor:
    """Arrange a weight by groups.

    Args:
        weight: [O, I, *K], any dtype.
        pattern: N:M and vector length.

    Returns:
        [G, V, M]: the weights of each group, a row for each of its output channels. A copy unless a view can do.

    Raises:
        PatternError: if the shape does not divide into groups.
    """
    check_shape(weight.shape, pattern)
    out, inp, *kernel = weight.shape
    v, m = pattern.vector, pattern.m
    split = weight.reshape(out // v, v, inp // m, m, *kernel)
    positions = range(4, 4 + len(kernel))
    return split.permute(0, *positions, 2, 1, 3).reshape(-1, v, m)


def from_groups(groups: Tensor, shape: Sequence[int], pattern: Pattern) -> Tensor:
    """The inverse of `to_groups`.

    Args:
        groups: [G, V, M], or [G, 1, M] to give every row of a vector the same entries (a mask).
        shape: [O, I, *K] of the weight.
        pattern: N:M and vector length.

    Returns:
        [O, I, *K], contiguous, dtype of `groups`.
    """
    check_shape(shape, pattern)
    out, inp, *kernel = shape
    v, m = pattern.vector, pattern.m
    full = groups.expand(-1, v, m).reshape(out // v, *kernel, inp // m, v, m)
    last = full.dim()
    order = (0, last - 2, last - 3, last - 1, *range(1, 1 + len(kernel)))
    return full.permute(order).reshape(tuple(shape)).contiguous()


@lru_cache(maxsize=64)
def _candidate_rows(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    return tuple(itertools.combinations(range(m), n))


def candidates(pattern: Pattern, device: torch.device | str = "cpu") -> Tensor:
    """The collection Theta of Eq. 2: every subset of N of the M positions.

    Returns:
        int64 [C, N], positions ascending within a row, rows in lexicographic order.
    """
    return torch.tensor(_candidate_rows(pattern.n, pattern.m), dtype=torch.int64, device=device)


def candidate_sums(values: Tensor, table: Tensor) -> Tensor:
    """Sum a value per position over each candidate's members (the S_j = sum a_i of the factored LBC).

    The members are added in ascending order, one after the other, so that equal candidates tie exactly on every device.

    Args:
        values: [G, M].
        table: int64 [C, N] from `candidates`.

    Returns:
        [G, C], dtype of `values`.
    """
    total = values[:, table[:, 0]]
    for member in table.T[1:]:
        total = total + values[:, member]
    return total


def keep_best(scores: Tensor, alive: Tensor, keep: int, tie: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Keep the best-scored of what is alive in every row.

    Ties go to the larger tie value, then to the lower index (lexicographically earlier candidate).

    Args:
        scores: [G, C], finite.
        alive: bool [G, C]; only these can be kept. Every row must have at least `keep` of them.
        keep: how many stay alive in each row.
        tie: given the numbers of the T rows in which a tie decides (int64 [T]), their tie values, [T, C] and finite;
            called only when needed. None: ties go to the lower index at once.

    Returns:
        bool [G, C], exactly `keep` true in each row.
    """
    ranked = scores.masked_fill(~alive, -math.inf)
    worst = ranked.topk(keep, dim=1).values[:, -1:]
    kept = ranked >= worst
    tied = (kept.sum(dim=1) != keep).nonzero()[:, 0]
    if len(tied):
        kept[tied] = _break_ties(ranked[tied], keep, None if tie is None else tie(tied))
    return kept


def _break_ties(ranked: Tensor, keep: int, tie: Tensor | None) -> Tensor:
    """Rows of `keep_best` in which a tie decides: a stable sort by tie value, then by score."""
    order = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    if tie is not None:
        order = tie.argsort(dim=1, descending=True, stable=True)
    by_score = ranked.gather(1, order).argsort(dim=1, descending=True, stable=True)
    winners = order.gather(1, by_score)[:, :keep]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, winners, True)


def positions_of(alive: Tensor, table: Tensor, m: int) -> Tensor:
    """The mask of Eq. 8: a position is kept while any alive candidate contains it.

    Args:
        alive: bool [G, C].
        table: int64 [C, N].
        m: group size.

    Returns:
        bool [G, M].
    """
    kept = torch.zeros(alive.shape[0], m, dtype=torch.bool, device=alive.device)
    for position in range(m):
        members = (table == position).any(dim=1)
        kept[:, position] = alive[:, members].any(dim=1)
    return kept


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Keep the N positions of largest magnitude in every group (summed over the V rows, in float64).

    Args:
        weight: [O, I, *K].
        pattern: N:M and vector length.

    Returns:
        bool [O, I, *K]; ties go to the lower position.
    """
    check_shape(weight.shape, pattern)
    out, inp, v, m = *weight.shape[:2], pattern.vector, pattern.m
    # One row compares exactly as it is; float64 is for sums, and for dtypes that cannot be compared.
    exact = v == 1 and weight.element_size() > 1
    magnitude = weight.detach().to(weight.dtype if exact else torch.float64).abs()
    rows = magnitude.reshape(out // v, v, inp // m, m, -1)
    kept = _largest((rows[:, 0] if v == 1 else rows.sum(dim=1)).movedim(2, 0), pattern.n).movedim(0, 2)
    return kept[:, None].expand(rows.shape).reshape(weight.shape).contiguous()


def _largest(values: Tensor, keep: int) -> Tensor:
    """Bool [M, ...]: the `keep` largest along dim 0, the lower index where they tie. Comparing pairs beats sorting.

    A row loses to every later one that is larger, and to every earlier one unless it is larger itself.
    """
    losses = _losses_by_rows(values) if values.is_cuda else _losses_by_pairs(values)
    return losses < keep


def _losses_by_pairs(values: Tensor) -> Tensor:
    """How many rows each row loses to, [M, ...]; each pair is compared once, in bytes: least work."""
    columns = [column.contiguous() for column in values]
    losses = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for i, j in itertools.combinations(range(len(columns)), 2):
        later = columns[j] > columns[i]
        losses[i] += later
        losses[j] += ~later
    return torch.stack(losses)


def _losses_by_rows(values: Tensor) -> Tensor:
    """The same with M comparisons of a row with all others: fewest calls, which is what a GPU waits for."""
    rows = values.contiguous()
    return torch.stack(
        [(rows[i + 1 :] > row).sum(dim=0) + (~(row > rows[:i])).sum(dim=0) for i, row in enumerate(rows)]
    )


def pack_bits(bits: Tensor) -> Tensor:
    """Store booleans eight to a byte.

    Args:
        bits: bool [G, C].

    Returns:
        uint8 [G, ceil(C / 8)], bit c of a row in byte c // 8 at place c % 8.
    """
    rows, columns = bits.shape
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -columns % 8)).reshape(rows, -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded << places).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8 [G, ceil(columns / 8)].
        columns: C.

    Returns:
        bool [G, columns].
    """
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> places) & 1
    return bits.reshape(packed.shape[0], -1)[:, :columns].to(torch.bool)


def kept_per_group(nonzero: Tensor, pattern: Pattern) -> Tensor:
    """How many positions of each group are in use in at least one of its rows.

    Args:
        nonzero: bool [O, I, *K].
        pattern: N:M and vector length.

    Returns:
        int64 [G], each between 0 and M; a weight holds the pattern while none exceeds N.
    """
    return to_groups(nonzero, pattern).any(dim=1).sum(dim=1)


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Whether a weight (or a bool mask) of shape [O, I, *K] has at most N positions in use in every group."""
    return bool((kept_per_group(weight != 0, pattern) <= pattern.n).all())


def check_mask(mask: Tensor, pattern: Pattern, name: str = "mask") -> None:
    """Check that a mask keeps exactly N positions of every group, the same for the V rows of a vector.

    Args:
        mask: bool [O, I, *K].
        pattern: N:M and vector length.
        name: what to call it in the message.

    Raises:
        PatternError: naming the first group that breaks the rule.
    """
    rows = to_groups(mask, pattern)
    wrong = (rows.sum(dim=2) != pattern.n).any(dim=1) | (rows != rows[:, :1]).any(dim=2).any(dim=1)
    if bool(wrong.any()):
        group = int(wrong.nonzero()[0])
        raise PatternError(
            f"{name}: group {group} keeps {rows[group].int().tolist()}, and {int(wrong.sum())} of {len(wrong)} groups "
            f"break the pattern: {pattern} keeps exactly {pattern.n} of {pattern.m} positions, the same in all rows of "
            f"a vector"
        )
