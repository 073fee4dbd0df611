"""ASP: the largest weights of every group, chosen once, then training under the fixed mask.

Mishra, Latorre, Pool, Stosic, Stosic, Venkatesh, Yu, Micikevicius: "Accelerating Sparse Deep Neural Networks", 2021
(NVIDIA's ASP, Automatic SParsity). Their recipe: train dense, prune to 2:4 by magnitude, repeat the training.

    epochs 0 ... dense_epochs - 1    dense training, as if this method were not there
    epoch dense_epochs               keep the N largest |W| of every group; forget what the optimizer knows of the rest
    from then on                     W <- mask * W: training with the mask as it is

With `dense_epochs = 0`, the default, the given weights are pruned at once (`--pretrained`, `--init FILE`; weights that
hold the pattern already keep it; with `transposable` those that hold it in both directions).

Deviations
    * One run has one learning-rate schedule. Theirs begins anew after pruning: to have that, train dense in one run and
      go on in another with `--init`.
    * Their permutation of input channels before pruning is not part of training; `lbc prune` does what comes before.
    * `transposable = true` takes the mask that is N:M in both directions (see `transposable`) in place of theirs.
    * With vector-wise masks a position's magnitude is summed over the V rows that share the mask. Ties go to the lower
      position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli import patterns
from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import optimizers
from lbc_cli.methods.base import MethodOptions, Pruner, State, check_options
from lbc_cli.methods.tensors import copy_like, held_bytes
from lbc_cli.targets import Selection, Target
from lbc_cli.transposable import check_layers, transposable_mask


class AspOptions(MethodOptions):
    """What a recipe may say of ASP."""

    dense_epochs: Annotated[int, Field(ge=0)] = Field(
        default=0, description="epochs of dense training before the weights are pruned; 0 prunes the given weights"
    )

    transposable: bool = Field(
        default=False, description="keep N of M along the output channels too, so that W and its transpose are N:M"
    )

    def shortened(self, epochs: int) -> dict[str, Any]:
        """Half dense, half sparse, if there is a dense phase at all."""
        return {"dense_epochs": epochs // 2} if self.dense_epochs else {}


class Asp(Pruner):
    """ASP at work.

    Raises:
        MethodError: if the weights would never be pruned.
    """

    method: ClassVar[str] = "asp"

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: AspOptions
    ) -> None:
        if options.dense_epochs >= epochs:
            raise MethodError(
                f"dense_epochs = {options.dense_epochs}: a run of {epochs} epochs would never prune; set it to "
                f"{epochs - 1} or less"
            )
        if options.transposable:
            check_layers(selection.targets)
        self.options = options
        self.transposable = options.transposable
        super().__init__(optimizer, selection, epochs)
        self._removed: dict[str, Tensor] = {}

    def removed(self, target: Target) -> Tensor | None:
        """Where the weight of `target` is removed; nowhere in the dense phase."""
        return self._removed.get(target.name)

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final from the pruning on."""
        return "final" if len(self._removed) == len(self.targets) else "training"

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """Pattern -> weights of a group kept at `epoch`."""
        dense = epoch < self.options.dense_epochs
        return {str(p): p.m if dense else p.n for p in dict.fromkeys(t.pattern for t in self.targets)}

    def planned_density(self, epoch: int) -> float:
        """Share of weights kept at `epoch`, exact."""
        total = sum(t.weight.numel() for t in self.targets)
        if epoch < self.options.dense_epochs or not total:
            return 1.0
        return sum(t.weight.numel() * t.pattern.density for t in self.targets) / total

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> share of the weight that is kept at `epoch`, exact."""
        return {t.name: 1.0 if epoch < self.options.dense_epochs else t.pattern.density for t in self.targets}

    def planned_memory(self) -> dict[str, int]:
        """The mask, at a byte per weight."""
        return {"mask": sum(t.weight.numel() for t in self.targets)}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now."""
        return {"mask": held_bytes(self._removed.values())}

    def _schedule(self, epoch: int) -> None:
        if epoch >= self.options.dense_epochs:
            for target in self.targets:
                if target.name not in self._removed:
                    self._prune(target)

    def _prune(self, target: Target) -> None:
        weight = target.weight.detach()
        if not bool(weight.isfinite().all()):
            raise DivergenceError(f"{target.name} is not finite: there is no magnitude to prune it by")
        choose = transposable_mask if self.options.transposable else patterns.magnitude_mask
        removed = copy_like(weight, ~choose(weight.abs(), target.pattern))
        self._removed[target.name] = removed
        self._restore(target)
        optimizers.clear_state(self._optimizer, target.weight, removed)
        if target.weight.grad is not None:
            target.weight.grad.masked_fill_(removed, 0)

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        """There is nothing to learn beside the weights."""

    def _method_state(self) -> State:
        return {"options": self.options.model_dump(), "removed": dict(self._removed)}

    def _load_method_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
        weights = {t.name: t.weight for t in self.targets}
        self._removed = {name: copy_like(weights[name], mask) for name, mask in state["removed"].items()}
