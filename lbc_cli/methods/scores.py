"""How scores of single weights learn: the update rules, in place, on lists of tensors.

A score a collects -lr * W * dL/dW, the first-order estimate of what removing the weight would cost (Eq. 11 and 12 of
LBC; movement pruning's score). Lists, because one call for all weights is what a GPU wants.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sgd_step_(
    scores: list[Tensor],
    momenta: list[Tensor] | None,
    weights: list[Tensor],
    grads: list[Tensor],
    *,
    lr: float,
    mu: float,
    dampening: float,
    decay: float,
    nesterov: bool,
) -> list[Tensor] | None:
    """One step of torch's SGD on scores, with gradient W * dL/dW, in place and without temporaries.

    d = W dL/dW + decay a;  m <- mu m + (1 - dampening) d  (m = d at first);  a <- a - lr (m, or d + mu m with Nesterov)

    Args:
        scores: a, one tensor per weight.
        momenta: m, shapes of the scores, or None before the first step.
        weights: W, shapes and dtypes of the scores.
        grads: dL/dW, likewise.
        lr: learning rate of this step.
        mu: momentum factor.
        dampening: of the momentum.
        decay: of the scores.
        nesterov: look ahead.

    Returns:
        The momenta to pass next time; None when `mu` is 0.
    """
    if mu == 0:
        plain_step_(scores, weights, grads, keep=1 - lr * decay, rate=lr)
        return None
    if momenta is None:
        momenta = [torch.zeros_like(score) for score in scores]
        dampening = 0.0
    share = 1 - dampening
    torch._foreach_mul_(momenta, mu)
    torch._foreach_add_(momenta, scores, alpha=share * decay)
    torch._foreach_addcmul_(momenta, weights, grads, value=share)
    if nesterov:
        plain_step_(scores, weights, grads, keep=1 - lr * decay, rate=lr)
    torch._foreach_add_(scores, momenta, alpha=-lr * (mu if nesterov else 1))
    return momenta


def plain_step_(scores: list[Tensor], weights: list[Tensor], grads: list[Tensor], *, keep: float, rate: float) -> None:
    """A <- keep a - rate W dL/dW, in place."""
    torch._foreach_mul_(scores, keep)
    torch._foreach_addcmul_(scores, weights, grads, value=-rate)
