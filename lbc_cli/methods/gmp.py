"""Gradual magnitude pruning (GMP): remove the smallest weights along a cubic schedule, without a pattern.

Zhu, Gupta: "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017
(arXiv:1710.01878). From t_0 on, over n mask updates that lie dt apart, the sparsity rises as (their Eq. 1, initial
sparsity 0)

    s_t = s_f - s_f (1 - (t - t_0) / (n dt))^3

and every update removes the weights of smallest magnitude until the layer has sparsity s_t. Here t_0 is `t_i`, and
t_0 + n dt is `t_f`, in epochs; masks are drawn when an epoch begins and, with `every` = k, after every k updates as
well. LBC's Table 4 has GMP at sparsity 0.95, with 0.20 of 4.10 G multiply-adds: 5 % in every layer, `scope = "layer"`.

Deviations
    * Removed is removed: masks only grow. The authors' code hides removed weights, with the values they had, so that
      one can come back when a kept one has become smaller than it; that needs the dense weights beside the sparse ones.
    * `scope = "global"` ranks the weights of all layers together; the paper prunes every layer to the same sparsity. It
      can empty a layer whose weights are small.
    * Within an epoch time is measured in updates of the epoch before; in the run's first epoch, where there is none,
      the masks stay as they are.
    * The paper leaves ties and rounding open; `unstructured` says how they are settled.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from lbc_cli.errors import MethodError
from lbc_cli.methods.base import State, check_options
from lbc_cli.methods.unstructured import (
    SparsityOptions,
    UnstructuredPruner,
    check_kept,
    kept_of,
    largest,
    magnitudes,
)
from lbc_cli.schedules import Ramp
from lbc_cli.targets import Selection


class GmpOptions(SparsityOptions):
    """What a recipe may say of GMP."""

    t_i: Annotated[int, Field(ge=0)] = Field(default=0, description="last epoch that begins with all weights")
    t_f: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="first epoch at the full sparsity; left out: half the epochs"
    )
    every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="updates between removals within an epoch; 0: once an epoch, at its beginning"
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="the same sparsity in every layer, or the smallest weights of all layers"
    )

    def shortened(self, epochs: int) -> dict[str, Any]:
        """Removal from the first epoch to the middle, within epochs too if that was asked for."""
        return {"t_i": 0, "t_f": epochs // 2, "every": min(self.every, 1)}

    def pinned(self, epochs: int) -> dict[str, Any]:
        """The end of the ramp."""
        return {"t_f": Ramp.over(epochs, self.t_i, self.t_f).t_f} if self.t_f is None else {}


class Gmp(UnstructuredPruner):
    """GMP at work.

    Raises:
        MethodError: for an impossible schedule, or a sparsity that leaves nothing of a layer.
    """

    method: ClassVar[str] = "gmp"

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: GmpOptions
    ) -> None:
        self.options = options
        self.ramp = Ramp.over(epochs, options.t_i, options.t_f)
        sizes = {t.name: t.weight.numel() for t in selection.targets}
        if options.scope == "layer":
            kept = {name: kept_of(size, options.exact) for name, size in sizes.items()}
            check_kept(selection.targets, kept, options.sparsity)
        elif kept_of(sum(sizes.values()), options.exact) < 1:
            raise MethodError(f"sparsity = {options.sparsity:g} keeps none of {sum(sizes.values())} weights: lower it")
        super().__init__(optimizer, selection, epochs)
        self._kept = sizes
        self._done = False

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final from t_f on."""
        return "final" if self._done else "training"

    def planned_density(self, epoch: int) -> float:
        """Share of weights kept when `epoch` begins, exact."""
        sizes = [t.weight.numel() for t in self.targets]
        whole = sizes if self.options.scope == "layer" else [sum(sizes)]
        return sum(self._count(size, Fraction(epoch)) for size in whole) / sum(sizes)

    def planned_densities(self) -> dict[str, float | None]:
        """Name -> share of the weight kept from t_f on; known where all layers have the same sparsity."""
        return self.planned_layers(self.ramp.t_f)

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> share of the weight kept when `epoch` begins; known where all layers have the same sparsity."""
        if self.options.scope == "global":
            return dict.fromkeys((t.name for t in self.targets), None)
        sizes = {t.name: t.weight.numel() for t in self.targets}
        return {name: self._count(size, Fraction(epoch)) / size for name, size in sizes.items()}

    def _count(self, total: int, time: Fraction) -> int:
        """How many of `total` weights are kept at a time, in epochs."""
        return kept_of(total, self.options.exact * (1 - self.ramp.remaining(time)))

    def _begin(self, epoch: int) -> None:
        self._remove(Fraction(epoch))

    def _stepped(self) -> None:
        if self.options.every and self.clock.inside % self.options.every == 0:
            self._remove(self.clock.time(self.epoch))

    def _remove(self, time: Fraction) -> None:
        """Remove the smallest weights down to what is kept at `time`."""
        if self.options.scope == "layer":
            for target in self.targets:
                count = self._count(target.weight.numel(), time)
                if count < self._kept[target.name]:
                    self._keep(target, largest(magnitudes(target, self.removed(target)), count))
                    self._kept[target.name] = count
        else:
            self._remove_globally(self._count(sum(t.weight.numel() for t in self.targets), time))
        self._done = self._done or time >= self.ramp.t_f

    def _remove_globally(self, count: int) -> None:
        if count >= sum(self._kept.values()):
            return
        every = torch.cat([magnitudes(target, self.removed(target)) for target in self.targets])
        parts = torch.split(largest(every, count), [t.weight.numel() for t in self.targets])
        for target, kept in zip(self.targets, parts, strict=True):
            self._keep(target, kept)
            self._kept[target.name] = int(kept.sum())

    def _own_state(self) -> State:
        return {"options": self.options.model_dump(), "kept": dict(self._kept), "done": self._done}

    def _load_own_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
        self._kept, self._done = dict(state["kept"]), state["done"]
