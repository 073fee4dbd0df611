"""Learning Best Combination: N:M sparsity by removing the worst-scored candidates of every group while training.

Zhang, Lin, Lin, Luo, Li, Chao, Wu, Ji: "Learning Best Combination for Efficient N:M Sparsity", NeurIPS 2022.

The paper keeps a learnable score for each of the C(M, N) candidates of a group, S in R^{G x C}. By Eq. 9-10 its
gradient is the sum over the candidate's members, dL/dS_j = sum_{i in Theta_j} dL/dB_i with dL/dB_i = W_i dL/dW_i, and
all S_j start equal. Every optimizer that is linear in the gradient (SGD with momentum, Nesterov, dampening, decay)
therefore keeps, exactly and for ever,

    S_j(t) = c(t) + sum_{i in Theta_j} a_i(t)

with one score a per *weight*, updated by the same rule on dL/dB_i; c is common to a group and ranks nothing. So:

    every step     a <- SGD(a, W * dL/dW)                                          (Eq. 9, 10, 12)
    every epoch    keep the survivors(t) best of the candidates still alive         (Eq. 5, 6, Alg. 1 line 7)
                   B_i = 1 while an alive candidate contains i; W <- B * W in place   (Eq. 7, 8)

a = -sum lr * W * dL/dW is the score of movement pruning (Sanh, Wolf, Rush, NeurIPS 2020), here per N:M group and with
removal that is final. With vector-wise masks a candidate's score is also summed over the V rows that share it.

Deviations
    * Removed is removed (Eq. 5): the authors' code lets momentum revive candidates.
    * `rounding = "survivors"` rounds survivors up, as the authors' code does; "removals" is Eq. 6 to the letter.
    * `removal = "weights"` removes single positions, N + ceil((M - N)(1-x)^3) left, where C(M, N) is too large to rank.
      It equals the above at N = 1.
    * Ties (all scores before the first real update) go to the larger sum of |w|, then to the earlier candidate; the
      paper does not say. Position order alone would keep the same input channels everywhere and kill the others.
    * With an optimizer other than SGD the scores keep Eq. 12's rule: a <- (1 - r/T) a - r W dL/dW, r = lr / peak lr, T
      the score memory. Adam on S would not be linear, and is not what the paper analyses.
    * `score_memory` T, in updates at peak learning rate, replaces the weights' decay for the scores; the paper's
      settings amount to (1 - momentum) / (lr * decay) = 2,000.
    * `criterion` replaces the score by what Table 6 compares it with; `criteria` defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lbc_cli import patterns
from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import optimizers
from lbc_cli.methods.base import MethodOptions, Pruner, State, check_options
from lbc_cli.methods.criteria import LEARNED, Criterion, add_taylor_, values
from lbc_cli.methods.removal import expected_density, mask_of_candidates, remove_candidates, remove_weights
from lbc_cli.methods.scores import plain_step_, sgd_step_
from lbc_cli.methods.tensors import copy_like, held_bytes
from lbc_cli.patterns import Pattern
from lbc_cli.schedules import Ramp
from lbc_cli.targets import Selection, Target

MAX_CANDIDATES = 12_870  # C(16, 8): one bit for each is 100 bytes per weight
PAPER_MEMORY = 2_000.0


class LbcOptions(MethodOptions):
    """What a recipe may say of LBC."""

    t_i: Annotated[int, Field(ge=0)] = Field(default=0, description="last epoch at which every candidate is alive")
    t_f: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="first epoch at which one candidate is left; left out: half the epochs"
    )
    rounding: Literal["survivors", "removals"] = Field(
        default="survivors", description="which count of Eq. 6 is rounded up"
    )
    removal: Literal["candidates", "weights"] = Field(
        default="candidates", description="remove whole candidates (the paper) or single weights (any N:M)"
    )
    score_memory: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="updates that a score remembers; left out: the optimizer's decay (SGD) or 2000"
    )
    criterion: Criterion = Field(
        default="score", description="what candidates are ranked by: the learned score (the paper), or Table 6's others"
    )

    def shortened(self, epochs: int) -> dict[str, Any]:
        """Removal from the first epoch to the middle."""
        return {"t_i": 0, "t_f": epochs // 2}

    def pinned(self, epochs: int) -> dict[str, Any]:
        """The end of the ramp."""
        return {"t_f": Ramp.over(epochs, self.t_i, self.t_f, self.rounding).t_f} if self.t_f is None else {}


@dataclass(slots=True, eq=False)
class LbcState:
    """What LBC holds of one weight of shape [O, I, *K].

    Attributes:
        count: candidates (or positions) alive in each group.
        score: a, or what the criterion holds in its place, shape of the weight, float32 or wider; None once every
            group is decided, and for the magnitude.
        momentum: the score's momentum, shape of the weight; None until the optimizer has one.
        alive: bits of `patterns.pack_bits`, uint8 [G, ceil(C/8)]; None while all are alive and once one is left.
        removed: bool, shape of the weight; None until something is removed.
    """

    count: int
    score: Tensor | None
    momentum: Tensor | None = None
    alive: Tensor | None = None
    removed: Tensor | None = None


_Work = tuple[LbcState, Tensor, Tensor]  # state, weight, gradient


class Lbc(Pruner):
    """LBC at work: one score per weight, the surviving candidates as bits, weights masked in place.

    Raises:
        MethodError: for an impossible schedule, or more candidates than can be ranked.
    """

    method: ClassVar[str] = "lbc"
    sparse_passes: ClassVar[int] = 2

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: LbcOptions
    ) -> None:
        self.options = options
        self.ramp = Ramp.over(epochs, options.t_i, options.t_f, options.rounding)
        _check_memory(options)
        if options.removal == "candidates":
            for target in selection.targets:
                _check_candidates(target)
        super().__init__(optimizer, selection, epochs)
        self._peaks = [optimizers.peak_lr(group) for group in optimizer.param_groups]
        self._state = {
            t.name: LbcState(self._total(t.pattern), _new_score(t.weight) if self._holds else None)
            for t in self.targets
        }

    def removed(self, target: Target) -> Tensor | None:
        """Where the weight of `target` is removed for good."""
        return self._state[target.name].removed

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final once one candidate is left in every group."""
        final = all(self._state[t.name].count == self._final(t.pattern) for t in self.targets)
        return "final" if final else "training"

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """Pattern -> candidates (or positions) of a group alive at `epoch`."""
        return {str(p): self._survivors(p, epoch) for p in dict.fromkeys(t.pattern for t in self.targets)}

    def planned_density(self, epoch: int) -> float:
        """Expected share of weights kept at `epoch`: exact before t_i and from t_f on, simulated between."""
        total = sum(t.weight.numel() for t in self.targets)
        kept = sum(t.weight.numel() * self._expected(t.pattern, epoch) for t in self.targets)
        return kept / total if total else 1.0

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> expected share of the weight that is kept at `epoch`, as for `planned_density`."""
        return {t.name: self._expected(t.pattern, epoch) for t in self.targets}

    def planned_memory(self) -> dict[str, int]:
        """Peak bytes: scores, their momentum, candidate bits, and the mask at a byte per weight."""
        learns = self._linear and self.options.criterion in LEARNED
        momentum = {t.name for t in self.targets if self._group(t).get("momentum", 0) and learns}
        sizes = {t.name: t.weight.numel() * _score_dtype(t.weight).itemsize for t in self.targets}
        bits = sum(
            patterns.num_groups(t.weight.shape, t.pattern) * -(-t.pattern.num_candidates // 8) for t in self.targets
        )
        return {
            "score": sum(sizes.values()) if self._holds else 0,
            "momentum": sum(sizes[name] for name in momentum),
            "candidates": bits if self.options.removal == "candidates" else 0,
            "mask": sum(t.weight.numel() for t in self.targets),
        }

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now."""
        states = list(self._state.values())
        return {
            "score": held_bytes(s.score for s in states),
            "momentum": held_bytes(s.momentum for s in states),
            "candidates": held_bytes(s.alive for s in states),
            "mask": held_bytes(s.removed for s in states),
        }

    # The method.

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        peak = self._peak(targets[0], group)
        fresh: list[_Work] = []
        going: list[_Work] = []
        for target, grad in zip(targets, grads, strict=True):
            state = self._state[target.name]
            if state.score is not None:
                (fresh if state.momentum is None else going).append((state, target.weight.detach(), grad))
        for work in (fresh, going):
            for batch in _batches(work):
                self._update(batch, group, peak)

    def _peak(self, target: Target, group: dict[str, Any]) -> float:
        """The peak learning rate: what the group says, or the largest it was ever seen to have."""
        number = self._group_of[target.name]
        self._peaks[number] = max(self._peaks[number], optimizers.peak_lr(group))
        return self._peaks[number]

    def _update(self, batch: list[_Work], group: dict[str, Any], peak: float) -> None:
        """One step of the scores of some weights, which all have a momentum already, or none."""
        states = [state for state, _, _ in batch]
        scores = [state.score for state in states if state.score is not None]
        weights = [weight.to(score.dtype) for (_, weight, _), score in zip(batch, scores, strict=True)]
        grads = [grad.to(score.dtype) for (_, _, grad), score in zip(batch, scores, strict=True)]
        if self.options.criterion not in LEARNED:
            add_taylor_(scores, weights, grads)
            return
        if group.get("maximize"):
            grads = [-grad for grad in grads]
        if not self._linear:
            rate = float(group["lr"]) / peak if peak else 0.0
            memory = self.options.score_memory or PAPER_MEMORY
            plain_step_(scores, weights, grads, keep=1 - rate / memory, rate=rate)
            return
        held = [state.momentum for state in states if state.momentum is not None]
        momenta = sgd_step_(scores, held or None, weights, grads, **self._sgd_settings(group, peak))
        for number, state in enumerate(states):
            state.momentum = None if momenta is None else momenta[number]

    def _sgd_settings(self, group: dict[str, Any], peak: float) -> dict[str, Any]:
        """What the weights' own SGD does, with the decay that the score memory asks for."""
        mu, decay = float(group["momentum"]), float(group["weight_decay"])
        if self.options.score_memory is not None:
            decay = (1 - mu) / (peak * self.options.score_memory) if peak else 0.0
        settings = {"lr": float(group["lr"]), "mu": mu, "dampening": float(group["dampening"]), "decay": decay}
        return {**settings, "nesterov": bool(group["nesterov"])}

    def _schedule(self, epoch: int) -> None:
        for target in self.targets:
            keep = self._survivors(target.pattern, epoch)
            if keep < self._state[target.name].count:
                self._remove(target, keep)

    def _remove(self, target: Target, keep: int) -> None:
        """Remove down to `keep` survivors a group, and clear every memory of what is gone."""
        state, weight, pattern = self._state[target.name], target.weight.detach(), target.pattern
        score = values(self.options.criterion, weight, state.score)
        if not bool(score.isfinite().all()):
            raise DivergenceError(
                f"scores of {target.name} are not finite: training diverged before this epoch; lower the learning rate "
                f"or clip the gradients"
            )
        if self.options.removal == "candidates":
            state.alive = remove_candidates(weight, score, state.alive, keep, pattern)
            kept = mask_of_candidates(state.alive, weight.shape, pattern)
        else:
            kept = remove_weights(weight, score, state.removed, keep, pattern)
        # The weight's own memory format, or every masked_fill_ on a channels-last model would be strided.
        state.removed = torch.empty_like(weight, dtype=torch.bool).copy_(~kept)
        state.count = keep
        if keep == self._final(pattern):
            state.score = state.momentum = state.alive = None
        elif state.score is not None and self.options.criterion not in LEARNED:
            state.score.zero_()
        self._restore(target)
        optimizers.clear_state(self._optimizer, target.weight, state.removed)
        if target.weight.grad is not None:
            target.weight.grad.masked_fill_(state.removed, 0)

    def _method_state(self) -> State:
        fields = ("count", "score", "momentum", "alive", "removed")
        states = {name: {field: getattr(s, field) for field in fields} for name, s in self._state.items()}
        return {"options": self.options.model_dump(), "peaks": list(self._peaks), "weights": states}

    def _load_method_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
        self._peaks = list(state["peaks"])
        for target in self.targets:
            fields = state["weights"][target.name]
            tensors = {k: None if v is None else copy_like(target.weight, v) for k, v in fields.items() if k != "count"}
            self._state[target.name] = LbcState(count=fields["count"], **tensors)

    # The numbers of a pattern under the options.

    @property
    def _holds(self) -> bool:
        """Whether the criterion needs a value per weight between removals."""
        return self.options.criterion != "magnitude"

    @property
    def _linear(self) -> bool:
        return type(self._optimizer) is SGD

    def _group(self, target: Target) -> dict[str, Any]:
        return self._optimizer.param_groups[self._group_of[target.name]]

    def _total(self, pattern: Pattern) -> int:
        return pattern.num_candidates if self.options.removal == "candidates" else pattern.m

    def _final(self, pattern: Pattern) -> int:
        return 1 if self.options.removal == "candidates" else pattern.n

    def _survivors(self, pattern: Pattern, epoch: int) -> int:
        return self.ramp.survivors(epoch, self._total(pattern), self._final(pattern))

    def _expected(self, pattern: Pattern, epoch: int) -> float:
        left = self._survivors(pattern, epoch)
        if self.options.removal == "weights":
            return left / pattern.m
        return expected_density(pattern.with_vector(1), left)


def _check_memory(options: LbcOptions) -> None:
    if options.score_memory is not None and options.criterion not in LEARNED:
        raise MethodError(
            f'score_memory = {options.score_memory:g} beside criterion = "{options.criterion}", which learns no score: '
            f'leave it out, or set criterion = "score"'
        )


def _check_candidates(target: Target) -> None:
    pattern = target.pattern
    count = pattern.num_candidates
    if count > MAX_CANDIDATES:
        per_weight = count / (8 * pattern.m * pattern.vector)
        total = per_weight * target.weight.numel()
        raise MethodError(
            f"{pattern} has {count:,} candidates per group: {per_weight:,.0f} bytes of bookkeeping per weight, "
            f"{total / 1e9:,.0f} GB for {target.name} alone (limit {MAX_CANDIDATES:,} candidates); set the method "
            f'option removal = "weights"'
        )


def _batches(work: list[_Work]) -> list[list[_Work]]:
    """What is updated in one call: everything where launches are dear, one weight at a time where caches are small."""
    if work and work[0][1].is_cuda:
        return [work]
    return [[item] for item in work]


def _score_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _new_score(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=_score_dtype(weight), requires_grad=False)
