"""What a group's candidates are ranked by: LBC's own score, and the criteria that its Table 6 compares with it.

Each gives a value for every weight; a candidate is worth the sum over its members (and over the V rows that share its
mask). When to remove, and how many, is the same for all.

    score       the learned a, Eq. 9 to 12: the candidates of largest sum stay
    inverse     the same a, and the candidates of smallest sum stay
    magnitude   |W| when candidates are removed (Han et al. 2015); nothing is held in between
    gradient    first-order Taylor, sum of |W * dL/dW| over the updates since candidates were last removed (Molchanov et
                al. 2017), each with the gradient that the optimizer is about to use

The paper names the criteria and cites them, no more. Ours of `gradient`: Molchanov et al. average the absolute value
over the mini-batches between two prunings, and begin anew after each, because it is another network then; the sum ranks
as the mean does. They take it of whole feature maps; here it is of single weights, as everything in LBC is.

Where values tie, the larger sum of |W| stays, for all four.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

Criterion = Literal["score", "inverse", "magnitude", "gradient"]
LEARNED: tuple[Criterion, ...] = ("score", "inverse")
"""Those that need the score, its update rule and its memory."""


def values(criterion: Criterion, weight: Tensor, held: Tensor | None) -> Tensor:
    """What is summed over the members of a candidate; the largest sums stay.

    Args:
        criterion: one of the four.
        weight: [O, I, *K].
        held: what was learned or accumulated, shape of the weight; None for the magnitude.

    Returns:
        [O, I, *K], float32 or wider.
    """
    if criterion == "magnitude":
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    assert held is not None
    if criterion == "inverse":
        return -held
    if criterion == "score" or criterion == "gradient":
        return held
    assert_never(criterion)


def add_taylor_(held: list[Tensor], weights: list[Tensor], grads: list[Tensor]) -> None:
    """A <- a + |W * dL/dW|, in place.

    Args:
        held: a, one tensor per weight.
        weights: W, shapes and dtypes of `held`.
        grads: dL/dW, likewise.
    """
    products = torch._foreach_mul(weights, grads)
    torch._foreach_abs_(products)
    torch._foreach_add_(held, products)
