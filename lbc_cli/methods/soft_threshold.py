"""STR: one learnable threshold per layer; what is below it is zero, and what is above it shrinks by it.

Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi: "Soft Threshold Weight Reparameterization for Learnable
Sparsity", ICML 2020 (arXiv:2002.03231).

The forward pass multiplies by W~ = sign(W) relu(|W| - g(s)), with g the logistic function and one s per layer, so that

    dL/dW = 1{|W| > g(s)} * dL/dW~
    dL/ds = -g(s) (1 - g(s)) sum of sign(W) * dL/dW~ over the weights above the threshold

s begins at `s_init`, far below 0, where the threshold is next to nothing; its weight decay pulls it towards 0 and so
raises the threshold, and the gradient holds it back where that costs too much. How sparse the model becomes is what
comes out of the two: there is no sparsity to ask for, a plan cannot know it, and it moves until the last update. The
authors tune decay and `s_init` for the sparsity that they want (for ResNet-50 on ImageNet s_init = -3200, and decays of
about 2e-5 for weights and thresholds alike).

Deviations
    * `s_decay` may differ from the weights' decay. It has to in short runs: what s moves by goes with the sum of
      lr * decay over all updates, and this is how a run of 500 updates does what one of 500,000 does. (test_resnet with
      the recipe digits, seed 0: the weights' 5e-4 ended at density 0.99, s_decay = 0.01 at 0.22, 0.02 at 0.02.)
    * s is trained by the weights' SGD rule: learning rate, momentum, dampening, Nesterov. Under another optimizer than
      SGD it is plain SGD at that optimizer's learning rate; the authors use SGD only.
    * s takes no part in the norm of the gradients; where they are clipped, dL/ds follows from the clipped ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lbc_cli.methods.base import MethodOptions, State, check_options
from lbc_cli.methods.shadow import ShadowPruner
from lbc_cli.methods.tensors import copy_like, held_bytes
from lbc_cli.methods.unstructured import check_finite
from lbc_cli.targets import Selection, Target


class SoftThresholdOptions(MethodOptions):
    """What a recipe may say of STR."""

    s_init: Annotated[float, Field(allow_inf_nan=False)] = Field(
        default=-10.0, description="where every s begins; the threshold is 1 / (1 + exp(-s))"
    )
    s_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="weight decay of s, which makes the model sparse; left out: that of the weights"
    )

    def shortened(self, epochs: int) -> dict[str, Any]:
        """A threshold that is felt at once: few updates would not raise a low one."""
        return {"s_init": -4.0}


class SoftThreshold(ShadowPruner):
    """STR at work."""

    method: ClassVar[str] = "str"
    dense_gradients: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: SoftThresholdOptions
    ) -> None:
        self.options = options
        super().__init__(optimizer, selection, epochs)
        self.s = {t.name: _scalar(t.weight, options.s_init) for t in self.targets}
        self._momentum: dict[str, Tensor] = {}

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final in the last epoch: until then the model is not as sparse as it will be."""
        return "final" if self.epoch >= self.epochs - 1 else "training"

    def threshold(self, target: Target) -> Tensor:
        """g(s), a scalar."""
        return self.s[target.name].sigmoid()

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """No pattern, no groups to count in."""
        return {}

    def planned_density(self, epoch: int) -> None:
        """Only training will tell."""
        return

    def planned_densities(self) -> dict[str, float | None]:
        """Only training will tell."""
        return dict.fromkeys((t.name for t in self.targets), None)

    def planned_memory(self) -> dict[str, int]:
        """Peak bytes: the dense weights, the mask, s and its momentum."""
        groups = [self._optimizer.param_groups[self._group_of[t.name]] for t in self.targets]
        slots = [1 + bool(self._rule(group)["momentum"]) for group in groups]
        sizes = [n * s.element_size() for n, s in zip(slots, self.s.values(), strict=True)]
        return {**super().planned_memory(), "threshold": sum(sizes)}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now."""
        return {**super().memory_bytes(), "threshold": held_bytes([*self.s.values(), *self._momentum.values()])}

    def _schedule(self, epoch: int) -> None:
        for target in self.targets:
            check_finite(f"weights of {target.name} are", self.dense_of(target))
            check_finite(f"the threshold of {target.name} is", self.s[target.name])
        super()._schedule(epoch)

    def _redraw(self, target: Target, dense: Tensor) -> Tensor:
        return dense.abs() <= self.threshold(target)

    def _fill_(self, target: Target, dense: Tensor, removed: Tensor | None) -> None:
        """W~; where the mask is given, it says that |W| is not above the threshold."""
        assert removed is not None
        target.weight.copy_(dense - dense.sign() * self.threshold(target)).masked_fill_(removed, 0)

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        """One step of s; the weights are W~, whose sign is that of W above the threshold and 0 below it."""
        rule = self._rule(group)
        for target, grad in zip(targets, grads, strict=True):
            s = self.s[target.name]
            g = s.sigmoid()
            slope = (grad.to(s.dtype) * target.weight.detach().sign()).sum()
            momentum = sgd_step_(s, self._momentum.get(target.name), -g * (1 - g) * slope, **rule)
            if momentum is not None:
                self._momentum[target.name] = momentum

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        """The settings with which s is trained."""
        decay = group["weight_decay"] if self.options.s_decay is None else self.options.s_decay
        sign = -1.0 if group.get("maximize") else 1.0
        plain = {"lr": float(group["lr"]), "decay": float(decay), "sign": sign}
        if type(self._optimizer) is not SGD:
            return {**plain, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
        return {**plain, **{key: group[key] for key in ("momentum", "dampening", "nesterov")}}

    def _own_state(self) -> State:
        return {"options": self.options.model_dump(), "s": dict(self.s), "momentum": dict(self._momentum)}

    def _load_own_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
        weights = {t.name: t.weight for t in self.targets}
        self.s = {name: copy_like(weights[name], value) for name, value in state["s"].items()}
        self._momentum = {name: copy_like(weights[name], value) for name, value in state["momentum"].items()}


def sgd_step_(
    value: Tensor,
    buffer: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    decay: float,
    sign: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> Tensor | None:
    """One step of torch's SGD on one tensor, in place.

    Args:
        value: what is trained.
        buffer: its momentum, None before the first step.
        grad: its gradient.
        lr: learning rate.
        decay: weight decay.
        sign: -1 to maximize.
        momentum: factor; 0: none is kept.
        dampening: of the momentum.
        nesterov: look ahead.

    Returns:
        The momentum to pass next time; None where none is kept.
    """
    step = sign * grad + decay * value
    if momentum:
        buffer = step.clone() if buffer is None else buffer.mul_(momentum).add_(step, alpha=1 - dampening)
        step = step + momentum * buffer if nesterov else buffer
    value.sub_(lr * step)
    return buffer if momentum else None


def _scalar(weight: Tensor, value: float) -> Tensor:
    """A number on the weight's device, in float32 or wider."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device=weight.device)
