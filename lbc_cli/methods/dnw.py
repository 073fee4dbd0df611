"""DNW: the weights of largest magnitude are used, all are trained, the mask is drawn anew at every step.

Wortsman, Farhadi, Rastegari: "Discovering Neural Wirings", NeurIPS 2019 (arXiv:1906.00586), in the form in which it
trains sparse networks: of a layer's N edges the share 1 - s with the largest |W| is used,

    W~ = 1{|W| among the k largest} * W,   k = N - round(s N)     in the forward pass, and for the gradient of the input
    W  <- W - lr dL/dW~                                           at every position: edges not in use learn as well

so that an edge comes into use when its magnitude has overtaken another one's, and goes out of it when overtaken.

Deviations
    * Momentum and weight decay act on all weights, used or not, as in the authors' code; the paper writes plain steps.
    * Which layers stay dense is the same for all methods here: the authors make the first one dense, or all sparse.
    * Ties go to the earlier weight; the authors' sort leaves them open.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli.methods.base import State, check_options
from lbc_cli.methods.shadow import ShadowPruner
from lbc_cli.methods.unstructured import SparsityOptions, check_finite, check_kept, kept_of, largest
from lbc_cli.targets import Selection, Target


class DnwOptions(SparsityOptions):
    """What a recipe may say of DNW."""


class Dnw(ShadowPruner):
    """DNW at work.

    Raises:
        MethodError: for a sparsity that leaves nothing of a layer.
    """

    method: ClassVar[str] = "dnw"
    sparse_passes: ClassVar[int] = 2

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: DnwOptions
    ) -> None:
        self.options = options
        self.counts = {t.name: kept_of(t.weight.numel(), options.exact) for t in selection.targets}
        check_kept(selection.targets, self.counts, options.sparsity)
        super().__init__(optimizer, selection, epochs)

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final from the first epoch on: the density is reached, though the masks move to the end."""
        return "final" if self.epoch >= 0 else "training"

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """No pattern, no groups to count in."""
        return {}

    def planned_density(self, epoch: int) -> float:
        """The same at every epoch."""
        return sum(self.counts.values()) / sum(t.weight.numel() for t in self.targets)

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> share of the weight that is kept, the same at every epoch."""
        return {t.name: self.counts[t.name] / t.weight.numel() for t in self.targets}

    def planned_densities(self) -> dict[str, float | None]:
        """As `planned_layers`."""
        return self.planned_layers(0)

    def _schedule(self, epoch: int) -> None:
        for target in self.targets:
            check_finite(f"weights of {target.name} are", self.dense_of(target))
        super()._schedule(epoch)

    def _redraw(self, target: Target, dense: Tensor) -> Tensor:
        kept = largest(dense.abs().flatten(), self.counts[target.name])
        return ~kept.reshape(dense.shape)

    def _own_state(self) -> State:
        return {"options": self.options.model_dump()}

    def _load_own_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
