"""Transposable N:M masks: at most N of M along the input channels, and along the output channels too.

Hubara, Chmiel, Island, Banner, Naor, Soudry: "Accelerated Sparse Neural Training: A Provable and Efficient Method to
Find N:M Transposable Masks", NeurIPS 2021. With W and W^T both N:M, the backward pass through a layer (whose product is
with W^T) can use the same sparse kernels as the forward pass.

A weight [O, I, *K] is cut into blocks of M output channels x M input channels at each kernel position. A block's mask
has N ones in every row and every column; of all such masks the one that keeps the largest sum of scores is taken:

    max over S in {0, 1}^(M x M) of sum S_oi * score_oi    with    sum_i S_oi = sum_o S_oi = N

For M = 4 there are 90 such masks at 2:4 and 24 at 1:4 and 3:4, so the optimum is found by scoring all of them: one
product of the blocks with a table [16, 90].

Deviations
    * Their solver is a min-cost flow, for any M, and a 2-approximation for training; here M <= 4 and the optimum.
    * Ties go to the mask of larger magnitude where magnitudes are given, then to the first in lexicographic order (by
      rows, ones first).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lbc_cli.errors import PatternError
from lbc_cli.patterns import Pattern, check_shape

MAX_M = 4
_BLOCKS = 1 << 18  # scored at a time


class _Layer(Protocol):
    """What is asked of a weight before anything is done with it."""

    @property
    def name(self) -> str: ...
    @property
    def pattern(self) -> Pattern: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def groups(self) -> int: ...


def check_layers(layers: Iterable[_Layer]) -> None:
    """Refuse layers that cannot take a transposable mask.

    Args:
        layers: targets, each with its pattern.

    Raises:
        PatternError: for the first of them, with the reason.
    """
    for layer in layers:
        pattern, outputs = layer.pattern, layer.weight.shape[0] // layer.groups
        if pattern.m > MAX_M:
            reason = f"M = {pattern.m} has too many masks to compare: transposable masks are found for M <= {MAX_M}"
        elif pattern.vector > 1:
            reason = f"masks shared by {pattern.vector} output channels cannot differ along them: leave --vector out"
        elif outputs % pattern.m:
            per_group = " per group" if layer.groups > 1 else ""
            reason = f"{outputs} output channels{per_group} are no multiple of {pattern.m}: keep the layer dense"
        else:
            continue
        raise PatternError(f"{layer.name}: {pattern} cannot be transposable: {reason}")


@lru_cache(maxsize=16)
def block_masks(n: int, m: int) -> Tensor:
    """Every M x M mask with N ones in each row and each column.

    Returns:
        bool [C, M, M], in lexicographic order.
    """
    rows = list(itertools.combinations(range(m), n))
    found: list[list[tuple[int, ...]]] = []

    def extend(chosen: list[tuple[int, ...]], counts: list[int]) -> None:
        if len(chosen) == m:
            found.append(chosen)
            return
        left = m - len(chosen) - 1
        for row in rows:
            after = [count + (i in row) for i, count in enumerate(counts)]
            if all(count <= n and count + left >= n for count in after):
                extend([*chosen, row], after)

    extend([], [0] * m)
    masks = torch.zeros(len(found), m, m, dtype=torch.bool)
    for number, mask in enumerate(found):
        for row, kept in enumerate(mask):
            masks[number, row, list(kept)] = True
    return masks


def transposable_mask(scores: Tensor, pattern: Pattern, magnitudes: Tensor | None = None) -> Tensor:
    """The transposable mask that keeps the largest sum of scores, block by block.

    Args:
        scores: [O, I, *K], O and I multiples of M; compared in float64.
        pattern: N:M with M <= 4 and without a vector.
        magnitudes: of the shape of `scores`; their sum decides between masks that keep the same sum of scores.

    Returns:
        bool [O, I, *K] on the device of `scores`: N of M kept along O and along I.

    Raises:
        PatternError: if the pattern or the shape cannot take it.
    """
    check_shape(scores.shape, pattern)
    n, m = pattern.n, pattern.m
    out, inputs, *kernel = scores.shape
    if m > MAX_M or pattern.vector > 1 or out % m:
        raise PatternError(f"shape {list(scores.shape)}, pattern {pattern}: transposable masks need M <= 4, O % M == 0")
    masks = block_masks(n, m).to(scores.device)
    table = masks.flatten(1).double().T

    def parts(values: Tensor) -> Iterable[Tensor]:
        blocks = values.detach().reshape(out // m, m, inputs // m, m, -1).permute(0, 2, 4, 1, 3)
        return torch.split(blocks.reshape(-1, m * m), _BLOCKS)

    sums = (part.double() @ table for part in parts(scores))
    if magnitudes is not None:
        sizes = (part.double() @ table for part in parts(magnitudes))
        sums = (size.where(kept == kept.amax(1, keepdim=True), -1) for kept, size in zip(sums, sizes, strict=True))
    chosen = torch.cat([kept.argmax(dim=1) for kept in sums])
    kept = masks[chosen].reshape(out // m, inputs // m, -1, m, m).permute(0, 3, 1, 4, 2)
    return kept.reshape(out, inputs, *kernel).contiguous()
