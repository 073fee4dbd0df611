"""MaskLLM: a learned distribution over the candidates of every group, sampled in training, its mode kept in the end.

Fang, Yin, Muralidharan, Heinrich, Pool, Kautz, Molchanov, Wang: "MaskLLM: Learnable Semi-Structured Sparsity for Large
Language Models", NeurIPS 2024. Meant for weights that are trained already (`--pretrained`, `--init FILE`).

Of the C candidates of a group (LBC's, Eq. 2 there) candidate c has the logit pi_c. With Gumbel noise g and a member
matrix S in {0, 1}^{C x M}, training multiplies the weights by a soft mask,

    y = softmax((kappa pi + g) / tau)        M~ = y S        W~ = M~ * W

and the logits take Adam's steps on L - lambda sum (M~ * W)^2, whose second term keeps large weights, and so gradients,
alive. tau falls and kappa rises linearly from epoch 0 to t_f. There the most likely candidate of every group becomes
its mask for good. Logits begin as pi = N(0, 0.01) + std(pi) * alpha * (likeness of candidate c and the magnitude mask,
in shared positions, less the average). With `hard` a one-hot y multiplies the weights, and the gradient is taken as if
it were the soft one. With `weights = "trained"` the weights get dL/dW = M~ * dL/dW~ and their optimizer's decay.

When things happen, for nothing may wrap a layer: the post-step hook draws the noise for the next update and writes
M~ * W into the model; the pre-step hook turns its gradient into that of the logits. So *until t_f* what lies in the
model between steps is M~ * W, which is not N:M (with `hard` it is, of a random draw). What would be shipped, the most
likely mask, is in the model within `deployed()`, where the engine evaluates and saves, and is what `project_` applies.
From t_f on the model carries the effective weights as with every method.

Deviations
    * One draw per update, not per forward pass: batches that are accumulated share it.
    * tau and kappa move with the update within an epoch from the second epoch on; how long the first is, nobody knows.
    * Only the sparse weights are frozen; norms, biases and dense layers train as the recipe says (theirs are frozen
      too), and go on after t_f, when the masks are fixed.
    * The logits' learning rate follows that of the weights: mask_lr * lr / peak lr. Theirs is a cosine to a tenth. They
      decay logits by AdamW's 0.1 and use eps = 1e-5, made for their gradients; here there is no decay, eps = 1e-8.
    * Until t_f the norm of all gradients, and so clipping, counts those that the logits learn from.
    * The regulariser acts on the logits alone: on weights that train it would reward growth without end.
    * The prior is the magnitude mask; theirs may come from other one-shot methods.
    * An average of the weights (EMA) averages draws until t_f: `project_` puts frozen weights back exactly; for trained
      weights an average is sound only some time after t_f.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli import flops, patterns
from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import optimizers
from lbc_cli.methods.base import MethodOptions, Pruner, State, check_options
from lbc_cli.methods.gumbel import Choice, logit_dtype, logit_gradient, one_hot, position_weights
from lbc_cli.methods.shadow import ShadowPruner
from lbc_cli.methods.tensors import copy_like, held_bytes
from lbc_cli.methods.unstructured import Clock
from lbc_cli.schedules import Ramp
from lbc_cli.targets import Selection, Target, clean_name

MAX_BYTES = 256  # of logits, moments and noise per weight; 2:4 takes 24, 4:8 140, 4:16 would take 1,820
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MaskLlmOptions(MethodOptions):
    """What a recipe may say of MaskLLM; the defaults are those of the authors' 2:4 runs."""

    weights: Literal["frozen", "trained"] = Field(
        default="frozen", description="whether the sparse weights stay as given, or train beside their masks"
    )
    hard: bool = Field(default=False, description="multiply by one drawn candidate, not by the soft mask")
    t_f: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="epoch at which the most likely masks are fixed; left out: half the epochs"
    )
    mask_lr: _Amount = Field(default=5e-4, description="Adam's learning rate for the logits, at its peak")
    temperature: _Positive = Field(default=4.0, description="tau at epoch 0")
    temperature_end: _Positive = Field(default=0.05, description="tau at t_f")
    scale: _Positive = Field(default=100.0, description="kappa, the factor of the logits, at epoch 0")
    scale_end: _Positive = Field(default=500.0, description="kappa at t_f")
    prior: _Amount = Field(default=3.0, description="alpha: how much the logits favour the magnitude mask at first")
    regularisation: _Amount = Field(default=1e-5, description="lambda: reward for large weights under the mask")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="of the draws, the same in every process of a distributed run"
    )

    def shortened(self, epochs: int) -> dict[str, Any]:
        """Masks fixed in the middle."""
        return {"t_f": epochs // 2}

    def pinned(self, epochs: int) -> dict[str, Any]:
        """The end of the ramp."""
        return {"t_f": Ramp.over(epochs, 0, self.t_f).t_f} if self.t_f is None else {}


class MaskLlm(ShadowPruner):
    """MaskLLM at work.

    Raises:
        MethodError: for an impossible schedule, or more candidates than logits can be held for.
    """

    method: ClassVar[str] = "maskllm"

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: MaskLlmOptions
    ) -> None:
        self.options = options
        self.t_f = Ramp.over(epochs, 0, options.t_f).t_f
        for target in selection.targets:
            _check_candidates(target)
        super().__init__(optimizer, selection, epochs)
        self.clock = Clock()
        self._choices: dict[str, Choice] = {}
        self._final: dict[str, Tensor] = {}  # name -> removed, once the masks are fixed
        self._showing = False  # within `deployed`
        self._at = 0  # the epoch, from its beginning on
        self._peaks = [optimizers.peak_lr(group) for group in optimizer.param_groups]
        self._generator = torch.Generator(self.targets[0].weight.device).manual_seed(options.seed)

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final from t_f on."""
        return "final" if self._final else "training"

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """Pattern -> candidates of a group in the running at `epoch`."""
        found = dict.fromkeys(t.pattern for t in self.targets)
        return {str(p): p.num_candidates if epoch < self.t_f else 1 for p in found}

    def planned_density(self, epoch: int) -> float:
        """Share of weights that take part in training at `epoch`, exact: all of them under soft masks."""
        sizes = {t.name: t.weight.numel() for t in self.targets}
        return sum(sizes[name] * share for name, share in self._layers(epoch).items()) / sum(sizes.values())

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> share of the weight that takes part in training at `epoch`, exact."""
        return {**self._layers(epoch)}

    def _layers(self, epoch: int) -> dict[str, float]:
        dense = epoch < self.t_f and not self.options.hard
        return {t.name: 1.0 if dense else t.pattern.density for t in self.targets}

    def step_shares(self, densities: Mapping[str, float]) -> dict[str, float]:
        """As `Pruner.step_shares`; with `hard` every weight's gradient is needed until t_f, and counted to the end."""
        passes = 2 if self.options.hard else 3
        return {name: flops.step_share(density, passes) for name, density in densities.items()}

    def planned_memory(self) -> dict[str, int]:
        """Peak bytes: logits, Adam's two moments, noise, the dense weights, and the mask at a byte per weight."""
        logits = sum(
            patterns.num_groups(t.weight.shape, t.pattern) * t.pattern.num_candidates * logit_dtype(t.weight).itemsize
            for t in self.targets
        )
        # With t_f = 0 logits are made and judged within one call.
        held = logits if self.t_f else 0
        return {"logits": held, "moments": 2 * held, "noise": held, **super().planned_memory()}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now."""
        choices = list(self._choices.values())
        return {
            "logits": held_bytes(c.logits for c in choices),
            "moments": held_bytes(moment for c in choices for moment in (c.first, c.second)),
            "noise": held_bytes(c.noise for c in choices),
            **super().memory_bytes(),
        }

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        """Within this context the model carries W under the most likely masks."""
        if self._final or self._showing or not self._choices:
            yield
            return
        self._show(True)
        try:
            yield
        finally:
            self._show(False)

    @torch.no_grad()
    def project_(self, module: nn.Module) -> None:
        """Apply the most likely masks to another copy of the model; frozen weights are put back as they were given."""
        with self.deployed():
            super().project_(module)
            if self.options.weights == "frozen":
                self._copy_to(module)

    # The schedule.

    def _schedule(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.clock.turn()
        self._at = epoch
        if not self._final and not self._choices:
            prior = self.options.prior
            self._choices = {
                t.name: Choice.begin(self.dense_of(t), t.pattern, prior, self._generator) for t in self.targets
            }
            self._draw()
        if epoch >= self.t_f and not self._final:
            self._fix()
        self._refresh()

    def _draw(self) -> None:
        """Noise for the next update."""
        for choice in self._choices.values():
            choice.draw_(self._generator)

    def _fix(self) -> None:
        """The most likely masks become final, and everything that was learned about the others is dropped."""
        for name, choice in self._choices.items():
            if not bool(choice.logits.isfinite().all()):
                raise DivergenceError(
                    f"logits of {name} are not finite: training diverged before this epoch; lower mask_lr or the "
                    f"learning rate"
                )
        self._final = {t.name: copy_like(t.weight, self._removed_by_likely(t)) for t in self.targets}
        self._choices = {}
        for target in self.targets:
            removed = self._final[target.name]
            optimizers.clear_state(self._optimizer, target.weight, removed)
            if target.weight.grad is not None:
                target.weight.grad.masked_fill_(removed, 0)

    def _settings(self) -> tuple[float, float]:
        """The factor of the logits and the temperature now."""
        done = float(self.clock.time(self._at) / self.t_f) if self.t_f else 1.0
        options = self.options
        scale = options.scale + (options.scale_end - options.scale) * done
        return scale, options.temperature + (options.temperature_end - options.temperature) * done

    # Masks.

    def _soft(self, target: Target) -> Tensor:
        """y, [G, C]."""
        return self._choices[target.name].soft(*self._settings())

    def _mask_of(self, target: Target, choice: Tensor) -> Tensor:
        """M~ of a choice, [G, M]; of its largest entry with `hard`."""
        picked = one_hot(choice).to(choice.dtype) if self.options.hard else choice
        return position_weights(picked, patterns.candidates(target.pattern, choice.device), target.pattern.m)

    def _removed_by_likely(self, target: Target) -> Tensor:
        likely = one_hot(self._choices[target.name].logits)
        kept = patterns.positions_of(likely, patterns.candidates(target.pattern, likely.device), target.pattern.m)
        return patterns.from_groups(~kept[:, None], target.weight.shape, target.pattern)

    def _redraw(self, target: Target, dense: Tensor) -> Tensor | None:
        if self._final:
            return self._final[target.name]
        if self._showing:
            return self._removed_by_likely(target)
        if self.options.hard:
            return self._spread(target, self._mask_of(target, self._soft(target))) == 0
        return None

    def _fill_(self, target: Target, dense: Tensor, removed: Tensor | None) -> None:
        super()._fill_(target, dense, removed)
        if removed is None:
            mask = self._spread(target, self._mask_of(target, self._soft(target)))
            target.weight.mul_(mask).masked_fill_(mask == 0, 0)  # +0.0 where a soft mask underflows

    def _spread(self, target: Target, mask: Tensor) -> Tensor:
        """A mask by groups, [G, M], over the weight."""
        return patterns.from_groups(mask[:, None], target.weight.shape, target.pattern).to(target.weight.dtype)

    @torch.no_grad()
    def _show(self, likely: bool) -> None:
        if likely:
            self._adopt_changes()
        self._showing = likely
        self._refresh()
        self._note_versions()

    def _copy_to(self, module: nn.Module) -> None:
        """The weights that lie in the model, into another copy of it."""
        others = {clean_name(name): parameter for name, parameter in module.named_parameters()}
        for target in self.targets:
            if others[target.name] is not target.weight:
                others[target.name].copy_(target.weight)

    # Learning.

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        if self._final:
            return
        number = self._group_of[targets[0].name]
        self._peaks[number] = max(self._peaks[number], optimizers.peak_lr(group))
        peak = self._peaks[number]
        rate = self.options.mask_lr * (float(group["lr"]) / peak if peak else 0.0)
        for target, grad in zip(targets, grads, strict=True):
            self._step(target, -grad if group.get("maximize") else grad, rate)

    def _step(self, target: Target, grad: Tensor, rate: float) -> None:
        """One step of the logits of a weight, from dL/dW~; then W.grad becomes that of W, if W trains."""
        soft = self._soft(target)
        mask = self._mask_of(target, soft)
        dense = patterns.to_groups(self.dense_of(target), target.pattern).to(soft.dtype)
        wanted = (dense * patterns.to_groups(grad, target.pattern).to(soft.dtype)).sum(dim=1)
        if self.options.regularisation:
            wanted = wanted - 2 * self.options.regularisation * dense.square().sum(dim=1) * mask
        if self.options.weights == "trained" and target.weight.grad is not None:
            target.weight.grad.mul_(self._spread(target, mask))
        by_candidate = patterns.candidate_sums(wanted, patterns.candidates(target.pattern, dense.device))
        self._choices[target.name].step_(logit_gradient(soft, by_candidate, *self._settings()), rate)

    # The hooks.

    def _gradient_hook(self, target: Target) -> Callable[[Tensor], Tensor | None]:
        masked = Pruner._gradient_hook(self, target)

        def hook(grad: Tensor) -> Tensor | None:
            if not self._final:
                return None
            # Nobody learns from it any more: it must not count in norms.
            return torch.zeros_like(grad) if self.options.weights == "frozen" else masked(grad)

        return hook

    @torch.no_grad()
    def _observe(self) -> None:
        super()._observe()
        if self.options.weights == "frozen":
            for target in self.targets:  # also when an overflow is about to be skipped: fused SGD trips over it
                target.weight.grad = None  # optimizers leave such a weight alone, its decay included

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping and not self._final:
            self.clock.tick()
            self._draw()
        super()._after_step(optimizer, args, kwargs)

    # State.

    def _own_state(self) -> State:
        return {
            "options": self.options.model_dump(),
            "clock": self.clock.state(),
            "at": self._at,
            "peaks": list(self._peaks),
            "generator": self._generator.get_state(),
            "choices": {name: choice.state() for name, choice in self._choices.items()},
            "final": dict(self._final),
        }

    def _load_own_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
        self.clock.load(state["clock"])
        self._at, self._peaks = state["at"], list(state["peaks"])
        self._generator.set_state(state["generator"].cpu())
        weights = {t.name: t.weight for t in self.targets}
        self._final = {name: copy_like(weights[name], mask) for name, mask in state["final"].items()}
        self._choices = {name: Choice.load(saved, weights[name]) for name, saved in state["choices"].items()}


def _check_candidates(target: Target) -> None:
    pattern, floats = target.pattern, 4  # logit, two moments, noise
    per_weight = pattern.num_candidates * floats * 4 / (pattern.m * pattern.vector)
    if per_weight > MAX_BYTES:
        size = (
            f"{per_weight:,.0f} bytes per weight, {per_weight * target.weight.numel() / 1e6:,.1f} MB for {target.name}"
        )
        raise MethodError(
            f"{pattern} has {pattern.num_candidates:,} candidates per group, whose logits, moments and noise take "
            f"{size} alone (limit {MAX_BYTES} bytes per weight): take another pattern, a longer vector, or method lbc"
        )
