"""The search for an order of channels that keeps more magnitude under N:M.

Source: J. Pool and C. Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021: reorder the input channels of a layer,
so that the large weights of a row do not meet in one group. Their search tries all partitions of pairs of groups, which
C(2M, M) rules out for M > 4; ours exchanges single channels, for any M.

    kept(group)        = sum over rows of the N largest of its M magnitudes
    with i replaced    = sum over rows of  top(row) + max(0, x_row - threshold(row))

where top is the sum of the N largest of the M - 1 others and threshold the smallest of those: what any channel x would
bring in the place of any channel i is one L1 distance between two columns, sum max(0, x - t) = (|x - t|_1 + sum x -
sum t) / 2. Exchanging i and x in different groups gains what each brings in the other's place. In every round the best
exchanges that share no group are made, as far as a larger sample of the rows confirms them, until a round gains next to
nothing or the rounds are used up. No randomness and no clock: the same weights give the same order.

Legend
    C   channels           R   rows: (output channel or vector of V of them, kernel position) of every layer that reads
    G   groups of M        order [C]: position -> channel
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbc_cli.patterns import Pattern

PROPOSE, CONFIRM = 1024, 8192  # rows that proposals rest on, and that decide about them
ROUNDS = 200
LEAST = 1e-5  # of what is kept, that a round has to gain for another one to follow
CHUNK = 2**22  # magnitudes looked at together


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that reads the channels.

    Attributes:
        magnitudes: float32 [C, R].
        n, m: of its pattern.
    """

    magnitudes: Tensor
    n: int
    m: int


def reader(weight: Tensor, pattern: Pattern) -> Reader:
    """A weight as the search sees it.

    Args:
        weight: [O, C, *K].
        pattern: N:M and vector length; the V rows of a vector are added, as its mask is chosen by their sum.
    """
    out, inputs, *kernel = weight.shape
    rows = weight.detach().float().abs().reshape(out // pattern.vector, pattern.vector, inputs, math.prod(kernel))
    return Reader(rows.sum(1).movedim(1, 0).reshape(inputs, -1), pattern.n, pattern.m)


def kept(readers: Sequence[Reader], order: Tensor) -> float:
    """The sum of the magnitudes that N:M keeps, in float64.

    Args:
        readers: layers that read the same C channels.
        order: int64 [C].
    """
    return sum(float(_kept_in(r, order.reshape(-1, r.m)).sum()) for r in readers)


def _kept_in(r: Reader, groups: Tensor) -> Tensor:
    """What the groups keep, float64 [G].

    Args:
        r: the layer.
        groups: int64 [G, M]: their channels.
    """
    total = torch.zeros(len(groups), dtype=torch.float64)
    step = max(1, CHUNK // groups.numel())
    for first in range(0, r.magnitudes.shape[1], step):
        for largest in _largest(r.magnitudes[:, first : first + step], groups, r.n):
            total += largest.sum(dim=1, dtype=torch.float64)
    return total


def _largest(magnitudes: Tensor, groups: Tensor, count: int) -> list[Tensor]:
    """The largest, the next, ... magnitude of every row within every group.

    Channels are compared in pairs, whole rows of them at once, which is several times faster than to sort each group.

    Args:
        magnitudes: [C, R].
        groups: int64 [G, M].
        count: how many, at most M.

    Returns:
        `count` tensors [G, R], in descending order.
    """
    members = [magnitudes[channels] for channels in groups.T]
    for place in range(count):
        for other in range(len(members) - 1, place, -1):
            upper, lower = members[other - 1], members[other]
            members[other - 1], members[other] = torch.maximum(upper, lower), torch.minimum(upper, lower)
    return members[:count]


def find_order(readers: Sequence[Reader]) -> Tensor:
    """An order of the channels that keeps more than the present one, or that one.

    Args:
        readers: one at least, all of C channels, a multiple of every M.

    Returns:
        int64 [C]: the channel at each position.
    """
    channels = len(readers[0].magnitudes)
    unit = math.lcm(*(r.m for r in readers))
    order = torch.arange(channels)
    if channels == unit and all(r.m == unit for r in readers):
        return order
    few, many = ([_sampled(r, rows / _rows(readers)) for r in readers] for rows in (PROPOSE, CONFIRM))
    gain = torch.zeros(channels, channels)
    stale = torch.arange(channels)
    least = LEAST * kept(many, order)
    for _ in range(ROUNDS):
        gain[stale] = _replacements(few, order, stale)
        pairs = _proposed(gain, order, unit)
        won = _won(many, order, pairs, unit)
        better = won > 0
        # Proposals rest on few rows: what more of them refuse is not proposed again until its group changes.
        gain[pairs[~better], order[pairs[~better].flip(1)]] = -math.inf
        made = pairs[better]
        order[made] = order[made.flip(1)]
        if float(won[better].sum()) <= least:
            break
        changed = torch.zeros(channels // unit, dtype=torch.bool)
        changed[made // unit] = True
        stale = changed.repeat_interleave(unit).nonzero()[:, 0]
    return order


def _rows(readers: Sequence[Reader]) -> int:
    return sum(r.magnitudes.shape[1] for r in readers)


def _sampled(r: Reader, share: float) -> Reader:
    """The layer with that share of its rows, evenly spaced; all of them if it is 1 or more."""
    rows = r.magnitudes.shape[1]
    count = min(rows, max(1, round(rows * share)))
    return Reader(r.magnitudes[:, torch.arange(count) * rows // count], r.n, r.m)


def _replacements(readers: Sequence[Reader], order: Tensor, places: Tensor) -> Tensor:
    """What a channel in the place of another one changes, in that place's group alone.

    Args:
        readers: the layers.
        order: [C].
        places: int64 [P], positions of whole units, ascending.

    Returns:
        float32 [P, C]: by position and by the channel that would come there; 0 for channels of its own group.
    """
    position = order.argsort()
    total = torch.zeros(len(places), len(order))
    for r in readers:
        own = r.magnitudes[order[places]]
        *_, last, following = _largest(r.magnitudes, order[places].reshape(-1, r.m), r.n + 1)
        last, following = (value.repeat_interleave(r.m, dim=0) for value in (last, following))
        # The N largest without i: if i is one of them, the next one takes its place.
        smallest = torch.where(own >= last, following, last)
        lost = (own - smallest).clamp_min(0).sum(1)
        distance = torch.cdist(smallest, r.magnitudes, p=1)
        brought = (distance + r.magnitudes.sum(1)[None] - smallest.sum(1)[:, None]) / 2
        same = (places // r.m)[:, None] == (position // r.m)[None]
        total += (brought - lost[:, None]).masked_fill(same, 0)
    return total


def _proposed(gain: Tensor, order: Tensor, unit: int) -> Tensor:
    """The best exchanges, none of which shares a unit of channels with another.

    Args:
        gain: [C, C] from `_replacements`.
        order: [C].
        unit: channels that hold whole groups of every layer.

    Returns:
        int64 [P, 2], positions.
    """
    both = gain[:, order]
    best, partner = (both + both.T).max(dim=1)
    busy = [False] * (len(order) // unit)
    pairs = []
    for place in best.argsort(descending=True, stable=True).tolist():
        if best[place] <= 0:
            break
        other = int(partner[place])
        if not (busy[place // unit] or busy[other // unit]):
            busy[place // unit] = busy[other // unit] = True
            pairs.append((place, other))
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _won(readers: Sequence[Reader], order: Tensor, pairs: Tensor, unit: int) -> Tensor:
    """What each exchange gains.

    Args:
        readers: the layers.
        order: [C].
        pairs: int64 [P, 2], positions; no two pairs share a unit.
        unit: channels that hold whole groups of every layer.

    Returns:
        float64 [P]; 0 where it is no more than rounding.
    """
    swapped = order.clone()
    swapped[pairs] = order[pairs.flip(1)]
    before, after = (_kept_of_pairs(readers, o, pairs, unit) for o in (order, swapped))
    return (after - before).masked_fill(after <= before * (1 + 1e-7), 0)


def _kept_of_pairs(readers: Sequence[Reader], order: Tensor, pairs: Tensor, unit: int) -> Tensor:
    """What the units of each pair keep, float64 [P]."""
    units = pairs // unit
    channels = order.reshape(-1, unit)[units]
    total = torch.zeros(units.shape, dtype=torch.float64)
    for r in readers if len(pairs) else ():
        total += _kept_in(r, channels.reshape(-1, r.m)).reshape(*units.shape, -1).sum(2)
    within = units[:, 0] == units[:, 1]  # one unit may hold several groups of a layer
    return torch.where(within, total[:, 0], total.sum(1))
