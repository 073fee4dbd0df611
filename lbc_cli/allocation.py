"""Another pattern for every layer, chosen so that the model meets a budget.

The setting is that of Sun et al., "DominoSearch: Find layer-wise fine-grained N:M sparse schemes from dense neural
networks" (NeurIPS 2021): a budget of multiply-adds or parameters for the whole model, and for every layer one of some
N:M patterns. Where DominoSearch lowers N step by step during training, by thresholds on the magnitudes with a penalty
for what a layer costs, the choice is made here once, before training, as the knapsack problem that it is:

    minimise    sum over layers of lost_l(p_l)        lost_l(p) = 1 - sum |w kept under p| / sum |w|
    such that   sum over layers of cost_l(p_l) <= budget

lost_l is the share of the layer's magnitude that the pattern would remove if it were applied now, so every layer counts
alike. It is taken from the weights that the run starts from: pretrained ones, those of a file, or random ones. Random
weights lose about the same share in every layer, and then it is the costs that decide.

Solved by dynamic programming over the budget, in units of the costs' greatest common divisor: exactly, as long as that
makes no more than `CELLS` units. Beyond that costs are rounded up to whole units: the budget still holds, and the
choice loses no more than the best one for a budget that is smaller by a unit for each layer and one more.

The choice goes into the recipe as explicit `layers`, so that a run that is resumed, or repeated from its recipe, does
not choose again. Globs that the recipe has already stand: their layers are not chosen for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from lbc_cli import patterns
from lbc_cli.errors import TargetError, UsageError
from lbc_cli.flops import Cost
from lbc_cli.patterns import Pattern
from lbc_cli.recipe import ResolvedRecipe, schema
from lbc_cli.recipe.load import with_values
from lbc_cli.targets import DENSE, find_targets, matching

CELLS = 1 << 18  # units of budget at the most: 2 MiB of losses, and as many bytes as a quarter of that for each layer

Kind = Literal["flops", "params"]
_NOUNS = {"flops": "multiply-adds", "params": "parameters"}


@dataclass(frozen=True, slots=True)
class Option:
    """One pattern that a layer can take.

    Attributes:
        text: as a recipe writes it: "2:4", or "dense".
        cost: multiply-adds or parameters of the layer under it.
        loss: share of the layer's magnitude that it removes, in [0, 1].
    """

    text: str
    cost: int
    loss: float


def choose(layers: Sequence[Sequence[Option]], limit: int, *, cells: int = CELLS) -> list[int]:
    """One option for every layer: the least sum of losses whose sum of costs stays within the limit.

    Args:
        layers: the options of each; among equal sums the earlier options are taken.
        limit: of the sum of costs; the cheapest options stay within it.
        cells: units into which the limit is divided at the most.

    Returns:
        The index of the option of each layer.

    Raises:
        ValueError: if even the cheapest options cost more than the limit.
    """
    least = [min(option.cost for option in options) for options in layers]
    spare = limit - sum(least)
    if spare < 0:
        raise ValueError(f"the cheapest options cost {sum(least)}, more than {limit}")
    over = [[option.cost - low for option in options] for options, low in zip(layers, least, strict=True)]
    room = min(spare, sum(max(costs) for costs in over))
    unit = math.gcd(*(cost for costs in over for cost in costs)) or 1
    unit = unit if room // unit < cells else -(-room // (cells - 1))
    capacity = min(spare // unit, sum(-(-max(costs) // unit) for costs in over))
    best = np.zeros(capacity + 1)  # capacity in units -> least loss of the layers so far
    picks = []
    for options, costs in zip(layers, over, strict=True):
        pick = np.zeros(len(best), dtype=np.uint8)
        found = np.full(len(best), np.inf)
        for number, (option, cost) in enumerate(zip(options, costs, strict=True)):
            units = -(-cost // unit)
            if units >= len(best):
                continue
            tried = best[: len(best) - units] + option.loss
            better = tried < found[units:]
            found[units:][better] = tried[better]
            pick[units:][better] = number
        best = found
        picks.append((pick, costs))
    return _trace(picks, len(best) - 1, unit)


def _trace(picks: Sequence[tuple[np.ndarray[Any, Any], Sequence[int]]], capacity: int, unit: int) -> list[int]:
    """The options that led to the last cell, from the last layer back to the first."""
    chosen = []
    for pick, costs in reversed(picks):
        number = int(pick[capacity])
        chosen.append(number)
        capacity -= -(-costs[number] // unit)
    return chosen[::-1]


def lost_magnitude(weight: Tensor, pattern: Pattern) -> float:
    """Share of the sum of |w| that the pattern removes, by magnitude.

    Args:
        weight: [O, I, *K].
        pattern: N:M and a vector length that it can take.

    Returns:
        0 for a weight of zeros.
    """
    sizes = weight.detach().double().abs()
    total = float(sizes.sum())
    if not math.isfinite(total):
        raise UsageError("a budget needs weights to choose by, and these are not finite: start from others")
    return 1 - float(sizes[patterns.magnitude_mask(weight, pattern)].sum()) / total if total else 0.0


def allocate(model: nn.Module, cost: Cost, sparsity: schema.Sparsity) -> dict[str, str]:
    """The pattern of every layer that the recipe's budget is to choose for.

    Args:
        model: with the weights that training starts from.
        cost: of the dense model.
        sparsity: the recipe's table, with a budget.

    Returns:
        Parameter name -> "N:M" or "dense", in the model's order.

    Raises:
        TargetError: if no layer takes any of the patterns, or the budget cannot be reached.
    """
    kind, share = _wanted(sparsity.budget)
    price: Mapping[str, int] = cost.macs if kind == "flops" else cost.params
    total = cost.total_macs if kind == "flops" else cost.total_params
    free = _options(model, price, sparsity)
    if not free:
        raise TargetError(
            f"budget {kind} = {share:g}: no layer that sparsity.layers leaves open takes any of "
            f"{', '.join(sparsity.budget.patterns)}; choose patterns with a smaller M"
        )
    fixed = total - sum(price[name] for name in free) - _saved_by_globs(model, price, sparsity)
    limit = math.floor(total * share) - fixed
    least = sum(min(option.cost for option in options) for options in free.values())
    if least > limit:
        raise TargetError(
            f"budget {kind} = {share:g} cannot be reached: with the sparsest of {', '.join(sparsity.budget.patterns)} "
            f"the model keeps {(fixed + least) / total:.4f} of its {_NOUNS[kind]}, {fixed / total:.4f} of them in "
            f"layers that stay as they are; raise the budget, or add sparser patterns to sparsity.budget.patterns"
        )
    chosen = choose(list(free.values()), limit)
    return {name: options[number].text for (name, options), number in zip(free.items(), chosen, strict=True)}


def _wanted(budget: schema.Budget) -> tuple[Kind, float]:
    return ("flops", budget.flops) if budget.flops else ("params", budget.params)


def _options(model: nn.Module, price: Mapping[str, int], sparsity: schema.Sparsity) -> dict[str, list[Option]]:
    """Parameter name -> its options, for every layer that takes one of the patterns and that no glob names."""
    taken = matching(model, sparsity.layers)
    found: dict[str, list[Option]] = {}
    for text in sparsity.budget.patterns:
        if text == DENSE:
            continue
        pattern = Pattern.parse(text, sparsity.vector)
        try:
            targets = find_targets(model, pattern).targets
        except TargetError:  # nothing takes this one
            continue
        for target in targets:
            if target.name not in taken:
                option = Option(
                    text,
                    price[target.name] * target.pattern.n // target.pattern.m,
                    lost_magnitude(target.weight, target.pattern),
                )
                found.setdefault(target.name, []).append(option)
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    if DENSE in sparsity.budget.patterns:
        found = {name: [Option(DENSE, price[name], 0.0), *options] for name, options in found.items()}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], 0)))


def _saved_by_globs(model: nn.Module, price: Mapping[str, int], sparsity: schema.Sparsity) -> int:
    """What the recipe's own globs save."""
    taken = matching(model, sparsity.layers)
    if not taken:
        return 0
    pattern = next(Pattern.parse(text, sparsity.vector) for text in sparsity.budget.patterns if text != DENSE)
    targets = find_targets(model, pattern, sparsity.layers).targets
    return sum(price[t.name] - price[t.name] * t.pattern.n // t.pattern.m for t in targets if t.name in taken)


def with_allocation(resolved: ResolvedRecipe, model: nn.Module, cost: Cost) -> ResolvedRecipe:
    """The recipe with explicit layers in the place of a budget's choice; as it is without a budget, or if that is made.

    Args:
        resolved: the recipe of the run.
        model: with the weights that training starts from.
        cost: of the dense model.

    Raises:
        UsageError: for a pattern on the command line, which the budget would overrule.
        TargetError: as `allocate` does.
    """
    sparsity = resolved.recipe.sparsity
    budget = sparsity.budget
    if not (budget.flops or budget.params) or budget.allocated:
        return resolved
    origin = resolved.provenance.get("sparsity.pattern", "")
    if origin.startswith("--"):
        raise UsageError(
            f"{origin} {sparsity.pattern} and a budget exclude each other: the budget chooses the patterns"
        )
    kind, share = _wanted(budget)
    chosen = allocate(model, cost, sparsity)
    layers = {**{_literal(name): text for name, text in chosen.items()}, **sparsity.layers}
    values = {"sparsity.layers": layers, "sparsity.budget.allocated": True}
    return with_values(resolved, values, f"budget {kind} = {share:g}")


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)
