"""RigL: sparse from the start; weights of small magnitude make place for those with a large gradient.

Evci, Gale, Menick, Castro, Elsen: "Rigging the Lottery: Making All Tickets Winners", ICML 2020 (arXiv:1911.11134).

Every layer l of N_l weights begins with a random mask of density d_l = 1 - s_l. Every dT = `every` updates, while
t < T_end, in each layer (their Algorithm 1)

    k = floor(f(t) d_l N_l),   f(t) = alpha / 2 (1 + cos(pi t / T_end))
    drop    the k kept weights of smallest |W|
    grow    of all weights that are then not kept, the k with the largest |dL/dW|; they start at 0

so that the density never changes. The layers' densities are all the same (`distribution = "uniform"`), or ERK's: in
proportion to (sum of the weight's dimensions) / (product of them), where what exceeds 1 is 1 and the others share the
rest, so that the whole has the density asked for.

dL/dW at removed weights is wanted in the one update before masks change, and nobody else may see it: the hook that
masks the gradient puts it aside, summed over the backward passes that the update accumulates. In all other updates the
gradient of a removed weight is zero at once.

Deviations
    * The optimizer's update is made as well where masks change, after them; in the paper the change takes its place.
      Grown weights have no gradient then: they begin to move with the update after that.
    * T_end is `t_end`, in epochs, and t within an epoch is measured in updates of the epoch before; in the run's first
      epoch t is 0. The paper counts updates, and ends at 3/4 of them, as the default does.
    * A weight that is dropped and grown at once keeps its value, as in the authors' code.
    * Adaptive clipping and the like do not change which weights grow: their gradients are ranked as they come from the
      backward passes.
    * Which layers stay dense is the same for all methods here; the paper keeps the first one dense under "uniform".
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli.errors import MethodError
from lbc_cli.flops import step_share
from lbc_cli.methods.base import State, check_options
from lbc_cli.methods.tensors import held_bytes
from lbc_cli.methods.unstructured import (
    SparsityOptions,
    UnstructuredPruner,
    check_kept,
    kept_of,
    largest,
    magnitudes,
)
from lbc_cli.targets import Selection, Target


class RigLOptions(SparsityOptions):
    """What a recipe may say of RigL."""

    distribution: Literal["erk", "uniform"] = Field(
        default="erk", description="densities of the layers: by their dimensions, or all the same"
    )
    every: Annotated[int, Field(gt=0)] = Field(default=100, description="updates between changes of the masks")
    alpha: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="share of the kept weights that the first change drops and grows"
    )
    t_end: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="first epoch without changes; left out: three quarters of the epochs"
    )

    def shortened(self, epochs: int) -> dict[str, Any]:
        """Changes after every update, until three quarters of the epochs."""
        return {"every": 1, "t_end": 3 * epochs // 4}

    def pinned(self, epochs: int) -> dict[str, Any]:
        """The end of the changes."""
        return {"t_end": 3 * epochs // 4} if self.t_end is None else {}


class RigL(UnstructuredPruner):
    """RigL at work.

    Raises:
        MethodError: for an impossible schedule, or a sparsity that leaves nothing of a layer.
    """

    method: ClassVar[str] = "rigl"

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: RigLOptions
    ) -> None:
        self.options = options
        self.t_end = 3 * epochs // 4 if options.t_end is None else options.t_end
        if self.t_end > epochs - 1:
            raise MethodError(
                f"t_end = {self.t_end} is past the last epoch, {epochs - 1} (epochs count from 0): the masks would "
                f"still change when the run ends; set t_end to {epochs - 1} or less"
            )
        shapes = {t.name: tuple(t.weight.shape) for t in selection.targets}
        self.counts = layer_counts(shapes, options.exact, options.distribution)
        check_kept(selection.targets, self.counts, options.sparsity)
        super().__init__(optimizer, selection, epochs)
        self._seed = _common_seed(self.targets)
        self._gradients: dict[str, Tensor] = {}  # dense, of the update at hand
        self._changes = 0

    @property
    def phase(self) -> Literal["training", "final"]:
        """Final once the masks stay as they are."""
        return "final" if self.epoch >= self.t_end else "training"

    def planned_density(self, epoch: int) -> float:
        """The same at every epoch."""
        return sum(self.counts.values()) / sum(t.weight.numel() for t in self.targets)

    def planned_densities(self) -> dict[str, float | None]:
        """The same at every epoch, and known for every layer."""
        return {t.name: self.counts[t.name] / t.weight.numel() for t in self.targets}

    def planned_layers(self, epoch: int) -> dict[str, float | None]:
        """Name -> share of the weight that is kept, the same at every epoch."""
        return self.planned_densities()

    def step_shares(self, densities: Mapping[str, float]) -> dict[str, float]:
        """As `Pruner.step_shares`: one update in `every` needs the gradient of all weights."""
        part = 1 / self.options.every
        return {n: (1 - part) * step_share(d, 3) + part * step_share(d, 2) for n, d in densities.items()}

    def planned_memory(self) -> dict[str, int]:
        """Peak bytes: the mask, and the dense gradients of the update in which masks change."""
        return {**super().planned_memory(), "dense gradient": held_bytes(t.weight for t in self.targets)}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now; dense gradients until the update after a change."""
        return {**super().memory_bytes(), "dense gradient": held_bytes(self._gradients.values())}

    def _begin(self, epoch: int) -> None:
        if not self._removed:
            generator = torch.Generator().manual_seed(self._seed)
            for target in self.targets:
                drawn = torch.rand(target.weight.numel(), generator=generator)
                self._keep(target, largest(drawn, self.counts[target.name]).to(target.weight.device))
        if self.epoch < self.t_end <= epoch:
            self._gradients = {}
            if self.clock.steps and not self._changes:
                warnings.warn(
                    f"rigl: the masks never changed: every = {self.options.every}, but there were only "
                    f"{self.clock.steps} updates before epoch t_end = {self.t_end}; a smaller `every` changes them",
                    stacklevel=2,
                )

    @property
    def _due(self) -> bool:
        """Whether masks change in the update to come."""
        return 0 <= self.epoch < self.t_end and (self.clock.steps + 1) % self.options.every == 0

    def _gradient_hook(self, target: Target) -> Callable[[Tensor], Tensor | None]:
        mask = super()._gradient_hook(target)

        def hook(grad: Tensor) -> Tensor | None:
            if self._due:
                self._put_aside(target, grad)
            return mask(grad)

        return hook

    @torch.no_grad()
    def _put_aside(self, target: Target, grad: Tensor) -> None:
        """Add to the dense gradient of the update at hand; the first backward pass of an update starts it anew.

        What an update has accumulated so far is its `grad`: none, or all zero where a training loop zeroes it in place
        (after an update, or a batch that it gave up).
        """
        so_far = target.weight.grad
        if target.name in self._gradients and so_far is not None and bool(so_far.any()):
            self._gradients[target.name].add_(grad)
        else:
            self._gradients[target.name] = grad.detach().clone()

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        if not self._due:
            self._gradients = {}
            return
        fraction = self._fraction(self.clock.time(self.epoch))
        for target in targets:
            if target.name in self._gradients:
                self._change(target, _averaged(self._gradients[target.name]), fraction)

    def _fraction(self, time: Fraction) -> float:
        """f(t), at a time in epochs."""
        return self.options.alpha / 2 * (1 + math.cos(math.pi * float(time / self.t_end)))

    def _change(self, target: Target, grad: Tensor, fraction: float) -> None:
        """Drop and grow in one layer."""
        count = self.counts[target.name]
        number = int(fraction * count)
        if count == target.weight.numel() or not number:
            return
        staying = largest(magnitudes(target, self.removed(target)), count - number)
        # A float16 backward pass may overflow where the loss scaler cannot see it, for removed weights are masked: what
        # is infinite is large, what is not a number is nothing.
        sizes = grad.abs().nan_to_num(nan=0).flatten().masked_fill(staying, -1)
        self._keep(target, staying | largest(sizes, number))

    def _stepped(self) -> None:
        if 0 <= self.epoch < self.t_end and self.clock.steps % self.options.every == 0:
            self._changes += 1

    def _own_state(self) -> State:
        return {"options": self.options.model_dump(), "changes": self._changes}

    def _load_own_state(self, state: State) -> None:
        check_options(self.method, state["options"], self.options)
        self._changes, self._gradients = state["changes"], {}


def layer_counts(shapes: Mapping[str, tuple[int, ...]], sparsity: Fraction, distribution: str) -> dict[str, int]:
    """How many weights each layer keeps.

    Args:
        shapes: name -> shape of the weight.
        sparsity: of all layers together.
        distribution: "erk" or "uniform".

    Returns:
        Name -> weights kept: within one of the layer's share, and exactly `kept_of` for their sum.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = kept_of(sum(sizes.values()), sparsity)
    wanted = {name: Fraction(total * size, sum(sizes.values())) for name, size in sizes.items()}
    if distribution == "erk":
        wanted = _erk(shapes, sizes, total)
    counts, before = {}, Fraction(0)
    for name, share in wanted.items():
        counts[name] = math.floor(before + share + Fraction(1, 2)) - math.floor(before + Fraction(1, 2))
        before += share
    return counts


def _erk(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], total: int) -> dict[str, Fraction]:
    """ERK's shares, in weights: eps * sum(shape) for each layer, no more than it has; eps makes them `total`."""
    full: set[str] = set()
    while True:
        rest = {name: sum(shape) for name, shape in shapes.items() if name not in full}
        left = total - sum(sizes[name] for name in full)
        eps = Fraction(left, sum(rest.values())) if rest else Fraction(0)
        over = {name for name, share in rest.items() if eps * share > sizes[name]}
        if not over:
            return {name: Fraction(sizes[name]) if name in full else eps * rest[name] for name in shapes}
        full |= over


def _common_seed(targets: Sequence[Target]) -> int:
    """A seed for the first masks: it follows from torch's own, and all processes of a distributed run share it.

    It is mixed, or the masks would be drawn from the very numbers that the weights were.
    """
    digest = hashlib.sha256(f"rigl {torch.initial_seed()}".encode()).digest()
    seed = torch.tensor(int.from_bytes(digest[:7], "little"))
    if targets and _processes() > 1:
        shared = seed.to(targets[0].weight.device)
        torch.distributed.broadcast(shared, src=0)
        seed = shared.cpu()
    return int(seed)


def _averaged(grad: Tensor) -> Tensor:
    """A gradient over all processes of a distributed run, which see different images; the hook sees one's own."""
    if _processes() > 1:
        torch.distributed.all_reduce(grad)
    return grad


def _processes() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
