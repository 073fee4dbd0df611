"""Which candidates or weights of a group survive a removal, over whole weights, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lbc_cli import patterns
from lbc_cli.patterns import Pattern

_CHUNK = 1 << 21  # candidate scores ranked at a time: 16 MiB in float64


def remove_candidates(weight: Tensor, score: Tensor, alive: Tensor | None, keep: int, pattern: Pattern) -> Tensor:
    """Alg. 1, line 7: keep the `keep` best-scored candidates of every group that are still alive.

    Args:
        weight: [O, I, *K]; its magnitudes break ties.
        score: a, shape of the weight.
        alive: uint8 [G, ceil(C/8)] bits, or None: all are.
        keep: survivors in each group.
        pattern: N:M and vector length.

    Returns:
        uint8 [G, ceil(C/8)]: the bits of those now alive, a subset.
    """
    table = patterns.candidates(pattern, weight.device)
    values = patterns.to_groups(score, pattern).to(torch.float64).sum(dim=1)
    magnitudes = patterns.to_groups(weight, pattern).to(torch.float64).abs().sum(dim=1)
    chunks = []
    rows = max(1, _CHUNK // len(table))
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        sums = patterns.candidate_sums(values[part], table)
        living = torch.ones_like(sums, dtype=torch.bool)
        if alive is not None:
            living = patterns.unpack_bits(alive[part], len(table))
        chunks.append(patterns.pack_bits(_keep(sums, living, keep, magnitudes[part], table)))
    return torch.cat(chunks)


def _keep(sums: Tensor, living: Tensor, keep: int, magnitudes: Tensor, table: Tensor) -> Tensor:
    def by_magnitude(tied: Tensor) -> Tensor:
        return patterns.candidate_sums(magnitudes[tied], table)

    return patterns.keep_best(sums, living, keep, tie=by_magnitude)


def mask_of_candidates(alive: Tensor, shape: Sequence[int], pattern: Pattern) -> Tensor:
    """Eq. 8 over a whole weight.

    Args:
        alive: uint8 [G, ceil(C/8)] bits.
        shape: [O, I, *K] of the weight.
        pattern: N:M and vector length.

    Returns:
        bool [O, I, *K]: the weights that an alive candidate contains.
    """
    table = patterns.candidates(pattern, alive.device)
    rows = max(1, _CHUNK // len(table))
    parts = [
        patterns.positions_of(patterns.unpack_bits(alive[start : start + rows], len(table)), table, pattern.m)
        for start in range(0, len(alive), rows)
    ]
    return patterns.from_groups(torch.cat(parts)[:, None], shape, pattern)


def remove_weights(weight: Tensor, score: Tensor, removed: Tensor | None, keep: int, pattern: Pattern) -> Tensor:
    """`removal = "weights"`: keep the `keep` best-scored positions of every group that are still there.

    Args:
        weight: [O, I, *K]; its magnitudes break ties.
        score: a, shape of the weight.
        removed: bool, shape of the weight, or None.
        keep: positions left in each group, at least N.
        pattern: N:M and vector length.

    Returns:
        bool [O, I, *K]: the weights that stay.
    """
    values = patterns.to_groups(score, pattern).to(torch.float64).sum(dim=1)
    magnitudes = patterns.to_groups(weight, pattern).to(torch.float64).abs().sum(dim=1)
    living = torch.ones_like(values, dtype=torch.bool)
    if removed is not None:
        living = ~patterns.to_groups(removed, pattern)[:, 0]
    kept = patterns.keep_best(values, living, keep, tie=lambda tied: magnitudes[tied])
    return patterns.from_groups(kept[:, None], weight.shape, pattern)


@lru_cache(maxsize=4096)
def expected_density(pattern: Pattern, survivors: int, samples: int = 512) -> float:
    """Share of a group's positions that `survivors` candidates cover, for planning.

    Exact where it does not depend on the scores (one, all, or N = 1); otherwise the mean over groups of independent
    normal weight scores, always the same ones.
    """
    total = pattern.num_candidates
    if pattern.n == 1 or survivors in (1, total):
        return survivors / total if pattern.n == 1 else (pattern.density if survivors == 1 else 1.0)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(samples, pattern.m, generator=generator, dtype=torch.float64)
    table = patterns.candidates(pattern)
    sums = patterns.candidate_sums(scores, table)
    alive = patterns.keep_best(sums, torch.ones_like(sums, dtype=torch.bool), survivors)
    return patterns.positions_of(alive, table, pattern.m).double().mean().item()
