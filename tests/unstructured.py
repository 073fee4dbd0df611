"""What the tests of unstructured methods share: a small network in float64, and slow oracles in plain loops.

The oracles follow the papers one weight at a time, in Python numbers, and share no code with `lbc_cli`. They know
nothing of hooks or in-place masks: weights stay dense under a mask, the optimizer of the effective weights is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import torch
from torch import Tensor, nn

EPOCHS, STEPS = 6, 4
TARGETS = ("1.weight", "5.weight")
LAYERS = {"0": "dense", "7": "dense"}


def network(seed: int = 0) -> nn.Sequential:
    """A stem, a convolution and a linear layer to sparsify (no size of them is a multiple of 4), a classifier."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 7, 3),
        nn.Conv2d(7, 5, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 11),
        nn.Tanh(),
        nn.Linear(11, 5),
    ]
    return nn.Sequential(*layers).double()


def batches(epoch: int, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + epoch)
    for _ in range(steps):
        images = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator)
        yield images, torch.randint(0, 5, (6,), generator=generator)


def learning_rate(step: int) -> float:
    """Warm-up, then cosine."""
    total, warm = EPOCHS * STEPS, 5
    return 0.2 * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm))))


def kept_of(total: int, sparsity: str, share: Fraction = Fraction(1)) -> int:
    """`total` less round-half-up(total * sparsity * share)."""
    removed = total * Fraction(sparsity) * share
    whole = removed.numerator // removed.denominator
    return total - (whole + (removed - whole >= Fraction(1, 2)))


def ranked(values: Iterable[float]) -> list[int]:
    """Places from the largest value to the smallest, the earlier one first among equals."""
    listed = list(values)
    return sorted(range(len(listed)), key=lambda place: (-listed[place], place))


class Masked:
    """Dense weights under masks, trained by torch's optimizer on masked gradients.

    Args:
        model: its parameters stay as they are; masks are applied in the forward pass.
        make: builds the optimizer.
    """

    def __init__(self, model: nn.Module, make: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
        self.model = model
        self.weights = dict(model.named_parameters())
        self.optimizer = make(list(self.weights.values()))
        self.masks = {name: torch.ones_like(self.weights[name]) for name in TARGETS}
        self.dense_grads: dict[str, Tensor] = {}

    def effective(self) -> dict[str, Tensor]:
        """The weights that the forward pass uses."""
        return {name: (w * self.masks[name] if name in self.masks else w).detach() for name, w in self.weights.items()}

    def backward(self, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> None:
        """Accumulate the gradients of one batch, and beside them those of the masked positions."""
        leaves = {name: value.clone().requires_grad_() for name, value in self.effective().items()}
        loss = loss_of(lambda *inputs: torch.func.functional_call(self.model, leaves, inputs))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for (name, weight), grad in zip(self.weights.items(), grads, strict=True):
            if name in self.masks:
                self.dense_grads[name] = self.dense_grads.get(name, torch.zeros_like(grad)) + grad
                grad = grad * self.masks[name]
            weight.grad = grad if weight.grad is None else weight.grad + grad

    def step(self, lr: float) -> None:
        """Update the weights."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()
        self.dense_grads = {}

    def forget(self, name: str, places: Iterable[int]) -> None:
        """Zero weight and optimizer state at some places."""
        weight = self.weights[name]
        for place in places:
            weight.data.view(-1)[place] = 0
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.view(-1)[place] = 0
