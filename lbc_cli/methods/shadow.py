"""The base of methods that keep dense weights behind the sparse ones, and may let a weight return.

Between steps the model carries the effective weights; the dense ones, the *shadow*, are kept here. Around a step

    pre-step hook    `_learn`: the method's own parameters take in the gradients, by rules of their own
                     `_correct_`: gradient of the effective weights -> gradient of the dense weights, in place
                     dense weights into the model
    optimizer.step   torch's own, on the dense weights: its momentum and decay are theirs
    post-step hook   shadow <- the model's weights; `_redraw` the masks; `_fill_` the effective weights into the model

The gradient that accumulates, and that clipping and norms see, is that of the effective weight at *every* position:
the straight-through estimate of the dense weight's. A method whose removed weights take no gradient sets
`dense_gradients = False`, and then it is masked as for every other method.

Weights written from outside between two steps (a load, a broadcast) become the dense weights as they are, zeros
included: a removed weight that was hidden behind them is forgotten. Anything else would leave the processes of a
distributed run with shadows that differ.

A method subclasses `ShadowPruner` and implements `_redraw`; the rest has defaults for straight-through gradients under
a mask. Beside the schedule it must say its density, phase and state (`_own_state`) as every other method does.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lbc_cli.methods.base import Pruner, State
from lbc_cli.methods.tensors import copy_like, held_bytes
from lbc_cli.targets import Selection, Target


class ShadowPruner(Pruner):
    """A method at work whose dense weights live beside the model.

    Args:
        optimizer: the optimizer that trains the targets.
        selection: which weights to sparsify, and why not the others.
        epochs: length of the run.

    Raises:
        MethodError: if the optimizer cannot carry the method, or does not train all targets.
    """

    dense_gradients: ClassVar[bool] = True

    def __init__(self, optimizer: Optimizer, selection: Selection, epochs: int) -> None:
        super().__init__(optimizer, selection, epochs)
        self._dense: dict[str, Tensor] = {}
        self._removed: dict[str, Tensor] = {}
        self._stepping: list[Target] = []  # those whose dense weights are in the model, between the two hooks

    # What a method implements.

    @abc.abstractmethod
    def _redraw(self, target: Target, dense: Tensor) -> Tensor | None:
        """Where the weight is removed, given its dense values: bool, shape of `dense`; None: nowhere.

        Called after every step and by `_schedule`; it must depend on nothing but `dense` and the method's state.
        """

    def _fill_(self, target: Target, dense: Tensor, removed: Tensor | None) -> None:
        """Write the effective weights into the model: here the dense ones, +0.0 where removed."""
        target.weight.copy_(dense)
        if removed is not None:
            target.weight.masked_fill_(removed, 0)

    def _correct_(self, target: Target, grad: Tensor, scale: float, group: dict[str, Any]) -> None:
        """Turn the gradient of the effective weight into that of the dense weight, in place; here they are the same.

        Args:
            target: its dense weight is `dense_of(target)`, its mask `removed(target)`.
            grad: dL/dW times `scale`, shape of the weight.
            scale: a factor that a fused optimizer divides by during the step; 1.0 for all others.
            group: the optimizer's settings for this weight.
        """

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Train the method's own parameters: the weights are the effective ones, the gradients are without scale."""

    def _refresh(self) -> None:
        """Draw all masks anew and write all effective weights; for masks that depend on all layers, override this."""
        for target in self.targets:
            self._apply(target, self._redraw(target, self.dense_of(target)))

    def _own_state(self) -> State:
        """What the method must remember beside the dense weights; the masks must follow from both."""
        return {}

    def _load_own_state(self, state: State) -> None:
        """The inverse of `_own_state`."""

    # What is common to them.

    def dense_of(self, target: Target) -> Tensor:
        """The dense weight behind `target`, shape, dtype and memory format of the weight; it is there from epoch 0."""
        return self._dense[target.name]

    def removed(self, target: Target) -> Tensor | None:
        """Where the weight of `target` is removed now."""
        return self._removed.get(target.name)

    def planned_memory(self) -> dict[str, int]:
        """Peak bytes: the dense weights, and the mask at a byte per weight."""
        return {
            "shadow": held_bytes(t.weight for t in self.targets),
            "mask": sum(t.weight.numel() for t in self.targets),
        }

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now."""
        return {"shadow": held_bytes(self._dense.values()), "mask": held_bytes(self._removed.values())}

    def _apply(self, target: Target, removed: Tensor | None) -> None:
        """Note a mask and write the effective weights that follow from it."""
        dense = self.dense_of(target)
        if removed is None:
            self._removed.pop(target.name, None)
        else:
            removed = removed if removed.stride() == dense.stride() else copy_like(dense, removed)
            self._removed[target.name] = removed
        self._fill_(target, dense, removed)

    def _restore(self, target: Target) -> None:
        """Write the effective weights again, from the shadow."""
        if target.name in self._dense:
            self._fill_(target, self._dense[target.name], self._removed.get(target.name))

    def _schedule(self, epoch: int) -> None:
        """Bring masks and weights to where the schedule wants them; a method with a schedule adds to this."""
        self._refresh()

    def _method_state(self) -> State:
        return {"dense": dict(self._dense), "own": self._own_state()}

    def _load_method_state(self, state: State) -> None:
        self._load_own_state(state["own"])
        self._stepping = []
        self._removed = {}
        self._dense = {
            t.name: copy_like(t.weight, state["dense"][t.name]) for t in self.targets if t.name in state["dense"]
        }
        if self._dense:
            self._refresh()

    # The hooks.

    def _gradient_hook(self, target: Target) -> Callable[[Tensor], Tensor | None]:
        return super()._gradient_hook(target) if not self.dense_gradients else lambda grad: None

    def _take_in(self, scale: float) -> None:
        super()._take_in(scale)
        for target in self.targets:
            if target.weight.grad is not None:
                group = self._optimizer.param_groups[self._group_of[target.name]]
                self._correct_(target, target.weight.grad, scale, group)
                target.weight.copy_(self.dense_of(target))
                self._stepping.append(target)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Empty where a fused optimizer skipped an overflow: nothing has changed, and what came from outside is not
        # taken for ours.
        if not self._stepping:
            return
        for target in self._stepping:
            self.dense_of(target).copy_(target.weight)
        self._stepping = []
        self._refresh()
        self._note_versions()

    def _adopt_changes(self) -> None:
        """Take weights written from outside for the dense ones."""
        self._stepping = []  # not empty only after a step that failed half-way
        changed = [t for t in self.targets if t.name not in self._dense or self._changed(t)]
        for target in changed:
            self._dense[target.name] = copy_like(target.weight, target.weight)
        if changed and self.epoch >= 0:
            self._refresh()
            self._note_versions()
