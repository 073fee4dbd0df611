"""The contract of every sparsification method, and the machinery they share.

Between optimizer steps the model's own weights are the effective (sparse) weights: evaluation, saving and export need
to know nothing about the method. A method is arithmetic around `optimizer.step()`:

    gradient hook    on the parameter, before accumulation: zero the gradient of removed weights, so that clipping and
                     norms see what the sparse model sees
    pre-step hook    gradients -> scores (`_learn`)
    optimizer.step   torch's own
    post-step hook   restore the effective weights (`_restore`)
    begin_epoch      the schedule (`_schedule`): remove, redraw, clear the optimizer's memory of removed weights

A method subclasses `Pruner`, implements these three and its state, and is listed once in `METHODS`. Nothing wraps a
layer or replaces `step`; every write to a weight is in place.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli import flops
from lbc_cli.errors import MethodError
from lbc_cli.methods import optimizers
from lbc_cli.targets import Selection, Skipped, Target, clean_name

State = dict[str, Any]


class MethodOptions(BaseModel):
    """What a recipe may say of a method: typed, described fields; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def shortened(self, epochs: int) -> dict[str, Any]:
        """Option -> value with which a run of so few epochs passes every phase of the method; here there are none.

        Args:
            epochs: length of the short run, at least 4.
        """
        return {}

    def pinned(self, epochs: int) -> dict[str, Any]:
        """Option -> value of those that were left out and follow from the length of the run; here there are none.

        Args:
            epochs: that length.
        """
        return {}


class Pruner(abc.ABC):
    """One method at work on one model and one optimizer.

    Args:
        optimizer: the optimizer that trains the targets.
        selection: which weights to sparsify, and why not the others.
        epochs: length of the run; epochs count from 0.

    Raises:
        MethodError: if the optimizer cannot carry the method, or does not train all targets.
    """

    method: ClassVar[str]
    transposable = False
    """Whether final masks hold their pattern along the output channels too; a checkpoint says so, and is checked."""
    sparse_passes: ClassVar[int] = 3
    """Of the three products of a training step with a weight, how many are counted at the weight's density, the others
    as dense; `flops.step_share` has the arithmetic and the conventions."""

    def __init__(self, optimizer: Optimizer, selection: Selection, epochs: int) -> None:
        optimizers.check_optimizer(optimizer)
        _check_free(optimizer, selection.targets)
        self.targets: tuple[Target, ...] = selection.targets
        self.skipped: tuple[Skipped, ...] = selection.skipped
        self.epochs = epochs
        self.epoch = -1
        self._optimizer = optimizer
        self._group_of = optimizers.check_parameters([(t.name, t.weight) for t in self.targets], optimizer)
        self._versions: dict[str, int] = {}
        self._handles: list[Any] = [
            *(t.weight.register_hook(self._gradient_hook(t)) for t in self.targets),  # type: ignore[no-untyped-call]
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    # What a method implements.

    @abc.abstractmethod
    def removed(self, target: Target) -> Tensor | None:
        """Where the weight of `target` is removed: bool, shape of the weight; None while nothing is."""

    @abc.abstractmethod
    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """Pattern -> how many candidates (or weights) of a group the schedule leaves alive at `epoch`."""

    @abc.abstractmethod
    def planned_density(self, epoch: int) -> float | None:
        """Expected share of the targets' weights that is kept at `epoch`; None where only training will tell."""

    @abc.abstractmethod
    def planned_memory(self) -> dict[str, int]:
        """Kind -> bytes that the method will hold at its peak, beside the model and the optimizer."""

    @abc.abstractmethod
    def memory_bytes(self) -> dict[str, int]:
        """Kind -> bytes that the method holds now."""

    @property
    @abc.abstractmethod
    def phase(self) -> Literal["training", "final"]:
        """Whether the weights hold their final pattern, so that they may be shipped.

        The mask itself may still move, in a method that draws it anew at every step.
        """

    @abc.abstractmethod
    def _schedule(self, epoch: int) -> None:
        """Bring masks and weights to where the schedule wants them at `epoch`."""

    @abc.abstractmethod
    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Take in the gradients of the targets of one parameter group, just before the optimizer does."""

    @abc.abstractmethod
    def _method_state(self) -> State:
        """What the method must remember over a restart: tensors, JSON scalars, nested dicts."""

    @abc.abstractmethod
    def _load_method_state(self, state: State) -> None:
        """The inverse of `_method_state`, already checked to be of the same method, run length and targets."""

    def _restore(self, target: Target) -> None:
        """Make the weight effective again after a change: removed weights back to +0.0."""
        removed = self.removed(target)
        if removed is not None:
            target.weight.masked_fill_(removed, 0)

    def planned_densities(self) -> dict[str, float | None]:
        """Name -> share of the weight that is kept in the end; None where only training will tell."""
        return {t.name: t.pattern.density for t in self.targets}

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> expected share of the weight that is kept at `epoch`; None where only training will tell."""
        return dict.fromkeys((t.name for t in self.targets), self.planned_density(epoch))

    def step_shares(self, densities: Mapping[str, float]) -> dict[str, float]:
        """What a training step costs, as a share of a dense step: name of a weight, and its density -> the share."""
        return {name: flops.step_share(density, self.sparse_passes) for name, density in densities.items()}

    # The life of a pruner.

    def begin_epoch(self, epoch: int) -> None:
        """Carry out the schedule up to `epoch`. May be repeated and may skip ahead.

        Raises:
            MethodError: when going back, past the end of the run, or after `detach`.
        """
        if not self._handles:
            raise MethodError(f"begin_epoch({epoch}) on a detached {self.method} pruner: attach a new one")
        if epoch < max(self.epoch, 0):
            raise MethodError(
                f"begin_epoch({epoch}) after epoch {self.epoch}: removal is final, epochs only go forward"
            )
        if epoch >= self.epochs:
            raise MethodError(
                f"begin_epoch({epoch}): the pruner was attached with epochs={self.epochs}, so the last epoch is "
                f"{self.epochs - 1}"
            )
        with torch.no_grad():
            self._adopt_changes()
            self._schedule(epoch)
            self._note_versions()
        self.epoch = epoch

    def masks(self) -> dict[str, Tensor]:
        """Name -> bool mask of the kept weights, shape of the weight."""
        return {t.name: self._mask(t) for t in self.targets}

    def densities(self) -> dict[str, float]:
        """Name -> share of the weights that is kept now."""
        return {t.name: self._mask(t).sum().item() / t.weight.numel() for t in self.targets}

    def density(self) -> float:
        """Share of all targets' weights that is kept now; 1.0 without targets."""
        total = sum(t.weight.numel() for t in self.targets)
        kept = sum(int(self._mask(t).sum()) for t in self.targets)
        return kept / total if total else 1.0

    @torch.no_grad()
    def project_(self, module: nn.Module) -> None:
        """Apply the current masks to another copy of the model, such as an average of its weights.

        An average over moving masks is not N:M until it is projected.

        Args:
            module: has a parameter of the same name and shape for every target.

        Raises:
            MethodError: if it does not.
        """
        parameters = {clean_name(name): p for name, p in module.named_parameters()}
        for target in self.targets:
            other = parameters.get(target.name)
            if other is None or other.shape != target.weight.shape:
                raise MethodError(
                    f"{target.name} is not in the module to project: it must be a copy of the pruned model"
                )
            removed = self.removed(target)
            if removed is not None and other is not target.weight:  # a write would count as one from outside
                other.masked_fill_(removed.to(other.device), 0)

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        """Within this context the model carries the weights that would be shipped now."""
        yield

    def detach(self) -> None:
        """Take all hooks off; the weights stay as they are. May be repeated."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> State:
        """Everything needed to go on: tensors, JSON scalars and dicts of them, no objects."""
        return {
            "method": self.method,
            "epochs": self.epochs,
            "epoch": self.epoch,
            "targets": {t.name: t.label for t in self.targets},
            "state": self._method_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict()` of a pruner attached in the same way; the weights are loaded by the caller.

        Raises:
            MethodError: if method, epochs or targets differ.
        """
        for key, mine in (("method", self.method), ("epochs", self.epochs)):
            if state[key] != mine:
                raise MethodError(
                    f"saved pruner has {key} {state[key]!r}, this one {mine!r}: resume with the same settings"
                )
        if state["targets"] != {t.name: t.label for t in self.targets}:
            raise MethodError("saved pruner has other layers or patterns than this one: resume with the same settings")
        with torch.no_grad():
            self._load_method_state(state["state"])
            self.epoch = state["epoch"]
            for target in self.targets:
                self._restore(target)
            self._note_versions()

    # The hooks.

    def _gradient_hook(self, target: Target) -> Callable[[Tensor], Tensor | None]:
        def mask(grad: Tensor) -> Tensor | None:
            removed = self.removed(target)
            return None if removed is None else grad.masked_fill(removed, 0)

        return mask

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Learn from the gradients; with a closure they exist only after it, so learning moves into it."""
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            self._observe()
            return None

        def observed() -> Any:
            loss = closure()
            self._observe()
            return loss

        return ((args[0], observed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": observed})

    @torch.no_grad()
    def _observe(self) -> None:
        if self.epoch < 0:
            raise MethodError(
                "optimizer.step() before the first pruner.begin_epoch(0): call it at the start of every epoch"
            )
        scale, overflow = optimizers.loss_scale(self._optimizer)
        if overflow:
            return
        self._adopt_changes()
        self._take_in(scale)

    def _take_in(self, scale: float) -> None:
        """Let the method learn, group by group, from gradients that still carry the factor `scale`."""
        for number, group in enumerate(self._optimizer.param_groups):
            due = [t for t in self.targets if self._group_of[t.name] == number and t.weight.grad is not None]
            if due:
                self._learn(due, optimizers.gradients([t.weight for t in due], scale), group)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for target in self.targets:
            self._restore(target)
        self._note_versions()

    def _adopt_changes(self) -> None:
        """Weights written from outside since the last step (a load, a broadcast) are taken over, under the masks."""
        for target in self.targets:
            if self._changed(target):
                self._restore(target)

    def _changed(self, target: Target) -> bool:
        return self._versions.get(target.name, -1) != target.weight._version

    def _note_versions(self) -> None:
        self._versions = {t.name: t.weight._version for t in self.targets}

    def _mask(self, target: Target) -> Tensor:
        removed = self.removed(target)
        return torch.ones_like(target.weight, dtype=torch.bool) if removed is None else ~removed


def check_options(method: str, saved: State, options: MethodOptions) -> None:
    """Refuse to go on from the state of a run with other options.

    Args:
        method: for the message.
        saved: `options.model_dump()` of the saved run.
        options: of this run.

    Raises:
        MethodError: naming every option that differs.
    """
    mine = options.model_dump()
    different = [key for key in {**mine, **saved} if saved.get(key) != mine.get(key)]
    if different:
        said = ", ".join(f"{key} = {saved.get(key)!r} (here {mine.get(key)!r})" for key in different)
        raise MethodError(f"the saved run has {method} options {said}: resume with the same settings")


def _check_free(optimizer: Optimizer, targets: Sequence[Target]) -> None:
    """Two pruners on one weight would overrule each other's masks.

    Raises:
        MethodError: if another pruner on this optimizer already has one of the targets.
    """
    hooks = optimizer._optimizer_step_pre_hooks.values()
    pruners = [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Pruner)]
    taken = {id(other.weight): pruner.method for pruner in pruners for other in pruner.targets}
    for target in targets:
        if id(target.weight) in taken:
            raise MethodError(
                f"{target.name} already has a {taken[id(target.weight)]} pruner on this optimizer: detach() that one "
                f"first, or keep the layer dense here"
            )
