"""SR-STE: dense weights under a magnitude mask that is drawn anew at every step.

Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li: "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021.

The forward pass multiplies by W~ = E * W, where E keeps the N largest |W| of every group. The gradient at W~ is taken
for that of W at every position (straight-through), and a term pulls removed weights towards zero, so that they do not
come and go:

    W <- W - lr (g(W~) + decay (1 - E) * W)                                        (the paper's update, decay = 2e-4)

E in the term is the mask of the forward pass that made g. The term is part of the gradient: the optimizer adds its own
weight decay to it (on all of W, removed or not) and takes both into its momentum, and AdamW divides it by its second
moment, as in the authors' code, where a backward function returns the sum.

`schedule = "gradual"` is Table 5 of LBC: N + ceil((M - N)(1 - x)^3) weights of a group are kept at epoch t, with
x = (t - t_i) / (t_f - t_i), all before t_i and N from t_f on. Nothing is removed for good: E is drawn anew all along.

Deviations
    * Groups run along the input channels at each kernel position; so does the authors' variant for NHWC, while their
      default runs over the flattened weight.
    * The term is added once per update, after clipping, as weight decay is: in the authors' code once per backward
      pass, so that accumulating K batches made it K times as large, and a loss scale made it vanish.
    * Ties go to the lower position; the authors' argsort leaves them open.
    * `transposable = true` draws masks that are N:M in both directions (see `transposable`), as Hubara et al. do.
    * With vector-wise masks a position's magnitude is summed over the V rows that share the mask.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli import patterns
from lbc_cli.errors import MethodError
from lbc_cli.methods.base import MethodOptions, State, check_options
from lbc_cli.methods.shadow import ShadowPruner
from lbc_cli.patterns import Pattern
from lbc_cli.schedules import Ramp
from lbc_cli.targets import Selection, Target
from lbc_cli.transposable import check_layers, transposable_mask


class SrSteOptions(MethodOptions):
    """What a recipe may say of SR-STE."""

    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=2e-4, description="pull of removed weights towards zero; 0 is plain straight-through training"
    )
    schedule: Literal["constant", "gradual"] = Field(
        default="constant", description="N of M from the start, or fewer and fewer between t_i and t_f"
    )
    t_i: Annotated[int, Field(ge=0)] = Field(default=0, description="gradual: last epoch at which all weights are kept")
    t_f: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="gradual: first epoch at which N of M are kept; left out: half the epochs"
    )

    transposable: bool = Field(
        default=False, description="keep N of M along the output channels too, so that W and its transpose are N:M"
    )

    def shortened(self, epochs: int) -> dict[str, Any]:
        """The ramp from the first epoch to the middle, if there is one."""
        return {"t_i": 0, "t_f": epochs // 2} if self.schedule == "gradual" else {}

    def pinned(self, epochs: int) -> dict[str, Any]:
        """The end of the ramp, where there is one."""
        return {"t_f": self.ramp(epochs).t_f} if self.schedule == "gradual" and self.t_f is None else {}

    def ramp(self, epochs: int) -> Ramp:
        """The schedule over a run.

        Raises:
            MethodError: for an impossible ramp, or one beside a constant schedule.
        """
        if self.schedule == "gradual":
            return Ramp.over(epochs, self.t_i, self.t_f)
        if self.t_i or self.t_f is not None:
            raise MethodError(
                f't_i = {self.t_i}, t_f = {self.t_f} beside schedule = "constant", which has no ramp: leave them out, '
                f'or set schedule = "gradual"'
            )
        return Ramp(0, 0)


class SrSte(ShadowPruner):
    """SR-STE at work.

    Raises:
        MethodError: for an impossible schedule.
    """

    method: ClassVar[str] = "sr-ste"
    sparse_passes: ClassVar[int] = 1

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: SrSteOptions
    ) -> None:
        if options.transposable:
            check_layers(selection.targets)
        self.options = options
        self.transposable = options.transposable
        self.ramp = options.ramp(epochs)
        super().__init__(optimizer, selection, epochs)
        self._kept = {t.name: t.pattern.m for t in self.targets}

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final once N of M are kept in every group, though the masks still move."""
        return "final" if all(self._kept[t.name] == t.pattern.n for t in self.targets) else "training"

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """Pattern -> weights of a group kept at `epoch`."""
        return {str(p): self._planned(p, epoch) for p in dict.fromkeys(t.pattern for t in self.targets)}

    def planned_density(self, epoch: int) -> float:
        """Share of weights kept at `epoch`, exact."""
        total = sum(t.weight.numel() for t in self.targets)
        kept = sum(t.weight.numel() * self._planned(t.pattern, epoch) / t.pattern.m for t in self.targets)
        return kept / total if total else 1.0

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> share of the weight that is kept at `epoch`, exact."""
        return {t.name: self._planned(t.pattern, epoch) / t.pattern.m for t in self.targets}

    def _planned(self, pattern: Pattern, epoch: int) -> int:
        return self.ramp.survivors(epoch, pattern.m, pattern.n)

    def _schedule(self, epoch: int) -> None:
        self._kept = {t.name: self._planned(t.pattern, epoch) for t in self.targets}
        super()._schedule(epoch)

    def _redraw(self, target: Target, dense: Tensor) -> Tensor | None:
        keep, m = self._kept[target.name], target.pattern.m
        if self.options.transposable and keep < m:
            return ~transposable_mask(dense.abs(), Pattern(keep, m))
        return removed_by_magnitude(dense, target.pattern, keep)

    def _correct_(self, target: Target, grad: Tensor, scale: float, group: dict[str, Any]) -> None:
        removed = self.removed(target)
        if removed is not None and self.options.decay:
            sign = -1.0 if group.get("maximize") else 1.0
            grad.addcmul_(self.dense_of(target), removed, value=sign * scale * self.options.decay)

    def _own_state(self) -> State:
        return {"options": self.options.model_dump(), "kept": dict(self._kept)}

    def _load_own_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
        self._kept = dict(state["kept"])


def removed_by_magnitude(weight: Tensor, pattern: Pattern, keep: int) -> Tensor | None:
    """Where a weight is removed when the `keep` positions of largest magnitude stay in every group.

    Args:
        weight: [O, I, *K].
        pattern: group size and vector length.
        keep: between 1 and M.

    Returns:
        bool [O, I, *K]; None if all stay.
    """
    if keep == pattern.m:
        return None
    return ~patterns.magnitude_mask(weight, Pattern(keep, pattern.m, pattern.vector))
