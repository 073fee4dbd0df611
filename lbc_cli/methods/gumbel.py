"""Masks that are drawn from a distribution over candidates: their arithmetic, and what is held of one weight.

Legend
    G, C, M    groups, candidates of a group, positions of a group
    logits     pi, [G, C]: the log-odds that are learned
    noise      g, [G, C]: independent draws of the standard Gumbel distribution
    choice     y, [G, C]: rows that sum to 1; one-hot in the limit of temperature 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbc_cli import patterns
from lbc_cli.methods.tensors import copy_like
from lbc_cli.patterns import Pattern

LOGIT_STD = 0.01


@dataclass(slots=True, eq=False)
class Choice:
    """The distribution over the candidates of one weight, and the draw in use.

    Attributes:
        logits: pi, [G, C].
        first: Adam's mean of the gradient, likewise.
        second: Adam's mean of its square, likewise.
        noise: g of the draw, likewise.
        steps: Adam's, made so far.
    """

    logits: Tensor
    first: Tensor
    second: Tensor
    noise: Tensor
    steps: int = 0

    @classmethod
    def begin(cls, weight: Tensor, pattern: Pattern, prior: float, generator: torch.Generator) -> Choice:
        """Logits N(0, 0.01) + their deviation * prior * likeness to the magnitude mask.

        Args:
            weight: [O, I, *K].
            pattern: N:M and vector length.
            prior: strength alpha.
            generator: of the logits.
        """
        table = patterns.candidates(pattern, weight.device)
        shape = (patterns.num_groups(weight.shape, pattern), len(table))
        logits = torch.empty(shape, dtype=logit_dtype(weight), device=generator.device)
        logits = logits.normal_(0, LOGIT_STD, generator=generator).to(weight.device)
        if prior:
            largest = patterns.to_groups(patterns.magnitude_mask(weight, pattern), pattern)[:, 0]
            logits += logits.std() * prior * likeness(largest, table, pattern).to(logits.dtype)
        return cls(logits, torch.zeros_like(logits), torch.zeros_like(logits), torch.zeros_like(logits))

    def draw_(self, generator: torch.Generator) -> None:
        """Another draw."""
        self.noise.copy_(gumbel(self.noise.shape, generator, self.noise.dtype))

    def soft(self, scale: float, temperature: float) -> Tensor:
        """The draw as a choice y, [G, C]."""
        return soft_choice(self.logits, self.noise, scale, temperature)

    def step_(self, grad: Tensor, lr: float) -> None:
        """One step of Adam along dL/dpi."""
        self.steps += 1
        adam_step_(self.logits, self.first, self.second, grad, step=self.steps, lr=lr)

    def state(self) -> dict[str, Any]:
        """For `load`."""
        return {field: getattr(self, field) for field in self.__slots__}

    @classmethod
    def load(cls, state: Mapping[str, Any], weight: Tensor) -> Choice:
        """The inverse of `state`, on the device of `weight`."""
        tensors = {key: copy_like(weight, value) for key, value in state.items() if key != "steps"}
        return cls(steps=state["steps"], **tensors)


def logit_dtype(weight: Tensor) -> torch.dtype:
    """In which logits are held: float32, or float64 for a weight that is."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def gumbel(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise, -log(-log u), on the generator's device.

    Args:
        shape: [G, C].
        generator: the only source of chance.
        dtype: float32 or float64.
    """
    waiting = torch.empty(tuple(shape), dtype=dtype, device=generator.device).exponential_(generator=generator)
    return waiting.clamp_min_(torch.finfo(dtype).tiny).log_().neg_()  # a draw of exactly 0 would be infinite noise


def soft_choice(logits: Tensor, noise: Tensor, scale: float, temperature: float) -> Tensor:
    """The choice softmax((scale * pi + g) / temperature), [G, C]."""
    return torch.softmax((logits * scale + noise) / temperature, dim=1)


def logit_gradient(choice: Tensor, grad: Tensor, scale: float, temperature: float) -> Tensor:
    """dL/dpi from dL/dy through `soft_choice`, [G, C]."""
    centred = grad - (choice * grad).sum(dim=1, keepdim=True)
    return choice * centred * (scale / temperature)


def one_hot(values: Tensor) -> Tensor:
    """Bool [G, C], true at the largest of every row."""
    largest = values.argmax(dim=1, keepdim=True)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, largest, True)


def position_weights(choice: Tensor, table: Tensor, m: int) -> Tensor:
    """The mask that a choice stands for, sum_c y_c * (position is in candidate c).

    Args:
        choice: [G, C], of the dtype wanted.
        table: int64 [C, N] of `patterns.candidates`.
        m: group size.

    Returns:
        [G, M], every row sums to N.
    """
    members = torch.zeros(len(table), m, dtype=choice.dtype, device=choice.device).scatter_(1, table, 1)
    return choice @ members


def likeness(mask: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
    """How much every candidate has in common with a mask, less the average candidate.

    Args:
        mask: bool [G, M], N positions of every group.
        table: int64 [C, N] of `patterns.candidates`.
        pattern: N:M.

    Returns:
        float32 [G, C]: the number of shared positions, minus N * N / M.
    """
    return patterns.candidate_sums(mask.float(), table) - pattern.n * pattern.n / pattern.m


def adam_step_(
    values: Tensor,
    first: Tensor,
    second: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> None:
    """One step of Adam (Kingma and Ba 2015), in place.

    Args:
        values: what is trained, any shape.
        first: running mean of the gradient, likewise.
        second: running mean of its square, likewise.
        grad: likewise.
        step: counted from 1.
        lr: learning rate of this step.
        betas: shares of the old means that stay.
        eps: added to the root of the second.
    """
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = (second / (1 - betas[1] ** step)).sqrt_().add_(eps)
    values.addcdiv_(first, root, value=-lr / (1 - betas[0] ** step))
