"""Weights that hold N:M already, wherever they come from, made ready to be packed.

Nothing is pruned here: a layer is taken as it is, or refused with the group that breaks the rule. Two things happen
that no forward pass can see: -0.0 becomes +0.0 unless the file itself says that it is kept, and groups with fewer than
N weights in use are filled up with positions that hold zeros.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.errors import UsageError, VerificationError
from lbc_cli.patterns import Pattern, from_groups, keep_best, kept_per_group, num_groups, to_groups
from lbc_cli.targets import DENSE, Selection, Target, find_targets
from lbc_cli.weights.base import CHECKPOINT, Weights

_UNCLAIMED = "the file claims no pattern for it"


@dataclass(frozen=True, slots=True)
class Converted:
    """A model whose targets hold their patterns.

    Attributes:
        selection: targets, and the layers that stay dense.
        masks: parameter name -> bool mask, exactly N kept in every group.
        notes: what was done, for people.
    """

    selection: Selection
    masks: Mapping[str, Tensor]
    notes: tuple[str, ...]


def convert(
    model: nn.Module, weights: Weights, *, pattern: str | None = None, layers: Mapping[str, str] | None = None
) -> Converted:
    """Find the masks of weights that are sparse already.

    Args:
        model: filled with the weights; zeros of its targets are made +0.0, in place.
        weights: from `read`.
        pattern: what every layer that can take it must hold; None: what the file itself claims, or `layers` alone.
        layers: globs with "N:M", "N:M/V" or "dense", as for `find_targets`.

    Raises:
        UsageError: if no pattern is known, or the one given is not the file's own.
        VerificationError: if a layer does not hold its pattern.
    """
    selection = _select(model, weights, pattern, layers)
    broken = [target for target in selection.targets if not _holds(target)]
    if broken:
        raise VerificationError(_refusal(broken, selection, weights))
    masks: dict[str, Tensor] = {}
    negative = 0
    for target in selection.targets:
        masks[target.name], changed = _settle(target, weights.masks.get(target.name))
        negative += changed
    notes = (f"{negative} zeros were -0.0 and became +0.0",) if negative else ()
    return Converted(selection, masks, notes)


@torch.no_grad()
def _settle(target: Target, known: Tensor | None) -> tuple[Tensor, int]:
    """The mask of a target, whose zeros outside the file's own mask become +0.0; also how many were -0.0."""
    weight = target.weight
    mask = kept_mask(weight, target.pattern, known)
    loose = (weight == 0) if known is None else (weight == 0) & ~(known & mask)
    negative = int((loose & torch.signbit(weight)).sum())
    weight.masked_fill_(loose, 0)
    return mask, negative


def kept_mask(weight: Tensor, pattern: Pattern, known: Tensor | None = None) -> Tensor:
    """A mask of exactly N in every group that contains every weight in use.

    Args:
        weight: [O, I, *K]; holds the pattern.
        pattern: N:M and vector length.
        known: bool [O, I, *K], the mask if there is one; it may keep weights that are zero, and fewer than N.

    Returns:
        bool [O, I, *K]; groups with room keep what `known` keeps, then their lowest positions.
    """
    used = to_groups(weight.detach() != 0, pattern).any(dim=1).to(torch.float32)
    rank = 2 * used if known is None else 2 * used + to_groups(known, pattern).any(dim=1)
    kept = keep_best(rank, torch.ones_like(rank, dtype=torch.bool), pattern.n)
    return from_groups(kept[:, None], weight.shape, pattern)


def _select(model: nn.Module, weights: Weights, pattern: str | None, layers: Mapping[str, str] | None) -> Selection:
    if weights.kind == CHECKPOINT and weights.patterns:
        raise UsageError(f"{weights.path} is a packed checkpoint of lbc already: there is nothing to convert")
    if pattern is not None:
        return find_targets(model, Pattern.parse(pattern), layers)
    if layers:
        only = {"*": DENSE, **layers}
        return find_targets(model, Pattern(2, 4), only)
    if not weights.patterns:
        raise UsageError(
            f"{weights.path} does not say which pattern it holds: name it with --pattern, such as 2:4, or --layers"
        )
    own = {glob.escape(name): str(claimed) for name, claimed in weights.patterns.items()}
    found = find_targets(model, Pattern(2, 4), {"*": DENSE, **own})
    return replace(found, skipped=tuple(replace(entry, reason=_UNCLAIMED) for entry in found.skipped))


def _holds(target: Target) -> bool:
    return bool((kept_per_group(target.weight.detach() != 0, target.pattern) <= target.pattern.n).all())


def _refusal(broken: Sequence[Target], selection: Selection, weights: Weights) -> str:
    first = broken[0]
    wrong = int((kept_per_group(first.weight.detach() != 0, first.pattern) > first.pattern.n).sum())
    others = f"; so do {len(broken) - 1} of {len(selection.targets)} layers more" if len(broken) > 1 else ""
    why = next((note for note in weights.notes if note.startswith(f"{first.name}:")), "")
    return (
        f"{first.name}: {_first_violation(first)}; {wrong} of {num_groups(first.weight.shape, first.pattern)} groups "
        f"violate it{others}{f' ({why})' if why else ''}. List layers that are meant to be dense with --layers "
        f"'GLOB=dense', or make them sparse with lbc prune MODEL --weights {weights.path}"
    )


def _first_violation(target: Target) -> str:
    """The first group that breaks the pattern, with its place and values."""
    pattern, weight = target.pattern, target.weight.detach()
    group = int((kept_per_group(weight != 0, pattern) > pattern.n).nonzero()[0])
    per_row = weight.shape[1] // pattern.m
    kernel: tuple[Any, ...] = tuple(weight.shape[2:])
    positions = weight[0, 0].numel()
    row, rest = divmod(group, positions * per_row)
    position, chunk = divmod(rest, per_row)
    place = [int(axis) for axis in torch.unravel_index(torch.tensor(position), kernel)] if kernel else []
    values = to_groups(weight, pattern)[group].float().tolist()
    rows = f"{row}" if pattern.vector == 1 else f"{row * pattern.vector}..{(row + 1) * pattern.vector - 1}"
    shown = ", ".join("[" + " ".join(f"{value:.6g}" for value in line) + "]" for line in values[:4])
    start = chunk * pattern.m
    return (
        f"group (o={rows}, k={tuple(place)}, i={start}..{start + pattern.m - 1}) holds {shown}: "
        f"{pattern} keeps at most {pattern.n} of {pattern.m}"
    )
