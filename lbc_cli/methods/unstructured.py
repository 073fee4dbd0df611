"""What the methods without a pattern share: how much they keep, which weights are largest, when within an epoch it is.

Such a method is told a sparsity, the share of the targets' weights that it removes in the end; what it keeps is counted
exactly: n weights at sparsity s keep n - round(n s), halves rounded up, s read as the decimal number that was written.

Ties go to the earlier weight, in row-major order, and across layers to the earlier layer, so that a mask depends on
nothing but the numbers.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import optimizers
from lbc_cli.methods.base import MethodOptions, Pruner, State
from lbc_cli.methods.tensors import copy_like, held_bytes
from lbc_cli.targets import Selection, Target


class SparsityOptions(MethodOptions):
    """What every method with a target sparsity is told."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.9, description="share of the sparse layers' weights that is removed in the end"
    )

    @property
    def exact(self) -> Fraction:
        """The sparsity as it was written: 0.9 is 9/10."""
        return Fraction(str(self.sparsity))


def kept_of(total: int, sparsity: Fraction) -> int:
    """How many of `total` weights are kept: total - round(total * sparsity), halves rounded up."""
    return total - math.floor(total * sparsity + Fraction(1, 2))


def check_kept(targets: Sequence[Target], kept: Mapping[str, int], sparsity: float) -> None:
    """Refuse a sparsity that would leave a layer without weights.

    Raises:
        MethodError: naming the first such layer.
    """
    for target in targets:
        if kept[target.name] < 1:
            raise MethodError(
                f"sparsity = {sparsity:g} keeps none of the {target.weight.numel()} weights of {target.name}: lower "
                f'it, or keep the layer dense with layers = {{"{target.name}" = "dense"}}'
            )


def largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest values; among equals the earlier ones.

    Args:
        values: [n], no NaN.
        count: between 0 and n.

    Returns:
        bool [n], exactly `count` of them set.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if values.is_cuda:  # there kthvalue works with a single block of threads
        bound = values.topk(count, sorted=False).values.amin()
    else:
        bound = values.kthvalue(values.numel() - count + 1).values
    above, equal = values > bound, values == bound
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def check_finite(what: str, values: Tensor) -> None:
    """Refuse to go on with a run that has diverged.

    Args:
        what: for the message: "weights of fc.weight are".
        values: all of them.

    Raises:
        DivergenceError: if one is not finite.
    """
    if not bool(values.isfinite().all()):
        raise DivergenceError(f"{what} not finite: training diverged; lower the learning rate or clip the gradients")


def magnitudes(target: Target, removed: Tensor | None) -> Tensor:
    """|w| of a target in row-major order, [n]; -1 where it is removed already, which is less than any.

    Raises:
        DivergenceError: if a weight is not finite.
    """
    sizes = target.weight.detach().abs()
    check_finite(f"weights of {target.name} are", sizes)
    return (sizes if removed is None else sizes.masked_fill(removed, -1)).flatten()


class Clock:
    """Counts optimizer steps; where an epoch begins only `begin_epoch` says.

    How many steps an epoch has is known once one is over, and taken from the last one.

    Attributes:
        steps: made since the pruner was attached.
        inside: made in the epoch at hand.
        before: made in the epoch before it; 0: not known yet.
    """

    def __init__(self) -> None:
        self.steps = self.inside = self.before = 0

    def turn(self) -> None:
        """Another epoch begins."""
        self.before, self.inside = self.inside or self.before, 0

    def tick(self) -> None:
        """A step was made."""
        self.steps += 1
        self.inside += 1

    def time(self, epoch: int) -> Fraction:
        """The time in epochs: `epoch` at its beginning, less than `epoch` + 1 at its end; `epoch` if not known."""
        return epoch + Fraction(min(self.inside, self.before - 1), self.before) if self.before else Fraction(epoch)

    def state(self) -> State:
        """For `load`."""
        return {"steps": self.steps, "inside": self.inside, "before": self.before}

    def load(self, state: State) -> None:
        """The inverse of `state`."""
        self.steps, self.inside, self.before = state["steps"], state["inside"], state["before"]


class UnstructuredPruner(Pruner):
    """A method at work that keeps its masks in place and may change them between two steps.

    Args:
        optimizer: the optimizer that trains the targets.
        selection: which weights to sparsify, and why not the others.
        epochs: length of the run.

    Raises:
        MethodError: if the optimizer cannot carry the method, or does not train all targets.
    """

    def __init__(self, optimizer: Optimizer, selection: Selection, epochs: int) -> None:
        super().__init__(optimizer, selection, epochs)
        self.clock = Clock()
        self._removed: dict[str, Tensor] = {}

    # What a method implements.

    @abc.abstractmethod
    def _stepped(self) -> None:
        """A step was made and counted: change the masks if it is time to."""

    @abc.abstractmethod
    def _begin(self, epoch: int) -> None:
        """Change the masks as the schedule wants it when `epoch` begins."""

    def _own_state(self) -> State:
        """What the method must remember beside masks and clock."""
        return {}

    def _load_own_state(self, state: State) -> None:
        """The inverse of `_own_state`."""

    # What is common to them.

    def removed(self, target: Target) -> Tensor | None:
        """Where the weight of `target` is removed now."""
        return self._removed.get(target.name)

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """No pattern, no groups to count in."""
        return {}

    def planned_memory(self) -> dict[str, int]:
        """Peak bytes: the mask at a byte per weight."""
        return {"mask": sum(t.weight.numel() for t in self.targets)}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now."""
        return {"mask": held_bytes(self._removed.values())}

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        return

    def _schedule(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.clock.turn()
        self._begin(epoch)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._after_step(optimizer, args, kwargs)
        if not optimizers.loss_scale(optimizer)[1]:  # a fused optimizer skips an overflow inside its step
            self.clock.tick()
            self._stepped()
            self._note_versions()

    def _keep(self, target: Target, kept: Tensor) -> None:
        """Put a mask on a weight; whatever is removed, or comes back, has no past in the optimizer.

        Args:
            target: the weight.
            kept: bool [n], row-major.
        """
        weight, before = target.weight, self._removed.get(target.name)
        removed = copy_like(weight, ~kept.reshape(weight.shape))
        changed = removed if before is None else removed ^ before
        self._removed[target.name] = removed
        self._restore(target)
        optimizers.clear_state(self._optimizer, weight, changed)
        if weight.grad is not None:
            weight.grad.masked_fill_(removed, 0)

    def _method_state(self) -> State:
        return {"clock": self.clock.state(), "removed": dict(self._removed), "own": self._own_state()}

    def _load_method_state(self, state: State) -> None:
        self._load_own_state(state["own"])
        self.clock.load(state["clock"])
        weights = {t.name: t.weight for t in self.targets}
        self._removed = {name: copy_like(weights[name], mask) for name, mask in state["removed"].items()}
