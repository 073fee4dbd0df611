"""Slow oracles, written from the paper and sharing no code with `lbc_cli`.

`PaperLbc` trains with the paper's materialised score matrix S in R^{G x C} (Alg. 1): S is a real parameter of a real
torch optimizer, the weights stay dense under a mask, and removal is permanent. `candidates="weights"` gives every
single position a score of its own instead, the oracle of `removal = "weights"`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn


def survivors(t: int, t_i: int, t_f: int, total: int, final: int, rounding: str) -> int:
    """Eq. 6 with exact fractions, from its definition."""
    if t >= t_f:
        return final
    if t <= t_i:
        return total
    x = Fraction(t - t_i, t_f - t_i)
    if rounding == "removals":
        return total - math.ceil((total - final) * (1 - (1 - x) ** 3))
    return final + math.ceil((total - final) * (1 - x) ** 3)


@functools.cache
def group_indices(shape: tuple[int, ...], m: int, v: int) -> Tensor:
    """Flat indices of every group of V x M weights, [G, V, M], ordered by (o, k, i), by plain loops."""
    out, inp, *kernel = shape
    place = torch.arange(math.prod(shape)).reshape(shape)
    groups = []
    for o in range(0, out, v):
        for k in itertools.product(*(range(size) for size in kernel)):
            for i in range(0, inp, m):
                groups.append([[int(place[(o + row, i + column, *k)]) for column in range(m)] for row in range(v)])
    return torch.tensor(groups)


class PaperLayer:
    """Scores, candidates and mask of one weight."""

    def __init__(self, weight: Tensor, n: int, m: int, v: int, singles: bool) -> None:
        self.groups = group_indices(tuple(weight.shape), m, v)
        size = 1 if singles else n
        self.subsets = list(itertools.combinations(range(m), size))
        self.final = n if singles else 1
        self.scores = nn.Parameter(torch.ones(len(self.groups), len(self.subsets), dtype=torch.float64))
        self.alive = [set(range(len(self.subsets))) for _ in self.groups]
        self.mask = torch.ones_like(weight)

    def score_gradient(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Eq. 9-10: dL/dS_j = sum of W * dL/dW over the members of candidate j (and the rows that share it)."""
        per_position = (weight * grad).flatten()[self.groups].sum(dim=1)
        return torch.stack([per_position[:, list(subset)].sum(dim=1) for subset in self.subsets], dim=1)

    def remove(self, weight: Tensor, keep: int) -> None:
        """Alg. 1, line 7, one group after the other; ties by magnitude, then by position."""
        magnitude = weight.detach().abs().flatten()[self.groups].sum(dim=1)
        scores = self.scores.detach().tolist()
        for g, living in enumerate(self.alive):
            if keep < len(living):
                size = {j: sum(float(magnitude[g, i]) for i in self.subsets[j]) for j in living}
                ranked = sorted(living, key=lambda j: (-scores[g][j], -size[j], j))
                self.alive[g] = set(ranked[:keep])
        mask = torch.zeros(self.mask.numel(), dtype=self.mask.dtype)
        for g, living in enumerate(self.alive):
            for position in {i for j in living for i in self.subsets[j]}:
                mask[self.groups[g, :, position]] = 1
        self.mask = mask.reshape(self.mask.shape)


class PaperLbc:
    """The paper's algorithm around a copy of a model.

    Args:
        model: its parameters stay dense; the masks are applied in the forward pass.
        targets: parameter name -> (n, m, v).
        make_optimizer: builds the optimizer of the weights from their list.
        t_i, t_f, rounding, singles: the schedule and what is removed.
        rule: "sgd": S has the same SGD as the weights; otherwise (peak lr, memory) of a <- (1 - r/T) a - r dL/dS.
        score_decay: weight decay on S, where it differs from the weights'.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, tuple[int, int, int]],
        make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        *,
        t_i: int,
        t_f: int,
        rounding: str = "survivors",
        singles: bool = False,
        rule: str | tuple[float, float] = "sgd",
        score_decay: float | None = None,
    ) -> None:
        self.model = model
        self.weights = dict(model.named_parameters())
        self.layers = {name: PaperLayer(self.weights[name], *nmv, singles) for name, nmv in targets.items()}
        self.optimizer = make_optimizer(list(self.weights.values()))
        self.rule = rule
        self.score_optimizer = make_optimizer([layer.scores for layer in self.layers.values()])
        if score_decay is not None:
            self.score_optimizer.param_groups[0]["weight_decay"] = score_decay
        self.when = (t_i, t_f)
        self.rounding = rounding

    def begin_epoch(self, epoch: int) -> None:
        for name, layer in self.layers.items():
            keep = survivors(epoch, *self.when, len(layer.subsets), layer.final, self.rounding)
            layer.remove(self.weights[name], keep)

    def effective(self) -> dict[str, Tensor]:
        """Eq. 7: B * W, the weights the forward pass uses."""
        masks = {name: layer.mask for name, layer in self.layers.items()}
        return {name: w.detach() * masks[name] if name in masks else w.detach() for name, w in self.weights.items()}

    def backward(self, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> None:
        """Accumulate the gradients of one batch."""
        leaves = {name: value.requires_grad_() for name, value in self.effective().items()}
        loss = loss_of(lambda *inputs: torch.func.functional_call(self.model, leaves, inputs))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for (name, weight), grad in zip(self.weights.items(), grads, strict=True):
            masked = grad * self.layers[name].mask if name in self.layers else grad
            weight.grad = masked if weight.grad is None else weight.grad + masked

    def step(self, lr: float, clip: float = 0.0) -> None:
        """Clip, update S (Eq. 12) and W, clear the gradients."""
        if clip:
            nn.utils.clip_grad_norm_(list(self.weights.values()), clip)
        for optimizer in (self.optimizer, self.score_optimizer):
            optimizer.param_groups[0]["lr"] = lr
        for name, layer in self.layers.items():
            weight = self.weights[name]
            layer.scores.grad = layer.score_gradient(weight.detach(), weight.grad)
        if self.rule == "sgd":
            self.score_optimizer.step()
        else:
            peak, memory = self.rule
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.scores.mul_(1 - lr / peak / memory).sub_(layer.scores.grad, alpha=lr / peak)
        self.optimizer.step()
        self.optimizer.zero_grad()


@functools.cache
def group_lists(shape: tuple[int, ...], m: int, v: int) -> list[list[list[int]]]:
    """`group_indices` as plain lists."""
    return group_indices(shape, m, v).tolist()  # type: ignore[no-any-return]


def magnitude_mask(weight: Tensor, keep: int, m: int, v: int) -> Tensor:
    """Keep the `keep` positions of largest magnitude (summed over the rows) of every group, one group after another."""
    values, mask = weight.flatten().tolist(), [0.0] * weight.numel()
    for group in group_lists(tuple(weight.shape), m, v):
        size = [sum(abs(values[row[i]]) for row in group) for i in range(m)]
        for position in sorted(range(m), key=lambda i: (-size[i], i))[:keep]:
            for row in group:
                mask[row[position]] = 1.0
    return torch.tensor(mask, dtype=weight.dtype).reshape(weight.shape)


class _StraightThrough(torch.autograd.Function):
    """W~ = E * W; backward passes g, plus decay (1 - E) W where it is asked for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * (1 - mask) * weight, None, None


class PaperSrSte:
    """SR-STE as its authors wrote it: an autograd function in the forward pass of dense parameters.

    Args:
        model: its parameters are the dense weights.
        targets: parameter name -> (n, m, v).
        make_optimizer: builds the optimizer from the parameters.
        decay: of removed weights.
        t_i, t_f: of the gradual schedule; both 0: constant.
        accumulate: backward passes per update; the authors' term is added in each, so that it is divided here.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, tuple[int, int, int]],
        make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        *,
        decay: float,
        t_i: int = 0,
        t_f: int = 0,
        accumulate: int = 1,
    ) -> None:
        self.model = model
        self.weights = dict(model.named_parameters())
        self.targets, self.when = targets, (t_i, t_f)
        self.optimizer = make_optimizer(list(self.weights.values()))
        self.decay = decay / accumulate
        if self.optimizer.param_groups[0].get("maximize"):
            self.decay = -self.decay
        self.kept: dict[str, int] = {}
        self.masks: dict[str, Tensor] = {}

    def begin_epoch(self, epoch: int) -> None:
        for name, (n, m, _) in self.targets.items():
            self.kept[name] = survivors(epoch, *self.when, m, n, "survivors")
        self.draw()

    def draw(self) -> None:
        """Masks of the next forward passes."""
        for name, (_, m, v) in self.targets.items():
            self.masks[name] = magnitude_mask(self.weights[name].detach(), self.kept[name], m, v)

    def effective(self) -> dict[str, Tensor]:
        """What the forward pass multiplies by."""
        return {
            name: _StraightThrough.apply(weight, self.masks[name], self.decay) if name in self.targets else weight
            for name, weight in self.weights.items()
        }

    def backward(self, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> None:
        """Accumulate the gradients of one batch."""
        effective = self.effective()
        loss_of(lambda *inputs: torch.func.functional_call(self.model, effective, inputs)).backward()

    def step(self, lr: float) -> None:
        """Update the dense weights, clear the gradients."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.draw()


class PaperAsp:
    """Dense training, one magnitude mask, then dense parameters multiplied by it in every forward pass.

    Args:
        model: its parameters are the dense weights.
        targets: parameter name -> (n, m, v).
        make_optimizer: builds the optimizer from the parameters.
        dense_epochs: before the mask.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, tuple[int, int, int]],
        make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        *,
        dense_epochs: int,
    ) -> None:
        self.model, self.targets, self.dense_epochs = model, targets, dense_epochs
        self.weights = dict(model.named_parameters())
        self.optimizer = make_optimizer(list(self.weights.values()))
        self.masks = {name: torch.ones_like(self.weights[name]) for name in targets}

    def begin_epoch(self, epoch: int) -> None:
        if epoch == self.dense_epochs:
            for name, nmv in self.targets.items():
                self.masks[name] = magnitude_mask(self.weights[name].detach(), *nmv)

    def effective(self) -> dict[str, Tensor]:
        """What the forward pass multiplies by."""
        return {name: w * self.masks[name] if name in self.masks else w for name, w in self.weights.items()}

    def backward(self, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> None:
        """Accumulate the gradients of one batch."""
        effective = self.effective()
        loss_of(lambda *inputs: torch.func.functional_call(self.model, effective, inputs)).backward()

    def step(self, lr: float) -> None:
        """Update the weights, clear the gradients."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()


class PaperCriteria(PaperLbc):
    """LBC whose candidates are ranked, one by one, by another criterion of Table 6 than the score.

    Args:
        criterion: "inverse", "magnitude" or "gradient".
        *args, **kwargs: of `PaperLbc`.
    """

    def __init__(self, criterion: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.criterion = criterion
        self.taylor = {name: torch.zeros_like(layer.scores.detach()) for name, layer in self.layers.items()}

    def begin_epoch(self, epoch: int) -> None:
        for name, layer in self.layers.items():
            keep = survivors(epoch, *self.when, len(layer.subsets), layer.final, self.rounding)
            removes = keep < len(layer.alive[0])
            learned = layer.scores.detach().clone()
            with torch.no_grad():
                layer.scores.copy_(self.ranks(name, layer))
                layer.remove(self.weights[name], keep)
                layer.scores.copy_(learned)
            if removes:
                self.taylor[name].zero_()

    def ranks(self, name: str, layer: PaperLayer) -> Tensor:
        """What the candidates are ranked by, [G, C]."""
        if self.criterion == "inverse":
            return -layer.scores.detach()
        if self.criterion == "gradient":
            return self.taylor[name]
        size = (self.weights[name].detach() * layer.mask).abs().flatten()[layer.groups]
        return torch.stack([size[:, :, list(subset)].sum(dim=(1, 2)) for subset in layer.subsets], dim=1)

    def step(self, lr: float, clip: float = 0.0) -> None:
        for name, layer in self.layers.items():
            weight = self.weights[name]
            loss = (weight.detach() * layer.mask * weight.grad).abs().flatten()[layer.groups]
            for j, subset in enumerate(layer.subsets):
                self.taylor[name][:, j] += loss[:, :, list(subset)].sum(dim=(1, 2))
        super().step(lr, clip)


class PaperMaskLlm:
    """MaskLLM as autograd would have it: logits are parameters of torch's Adam, masks are made in the forward pass.

    Args:
        model: its parameters are the dense weights.
        targets: parameter name -> (n, m, v).
        make_optimizer: builds the optimizer of everything that is not frozen.
        logits: name -> [G, C] to begin with.
        frozen: whether the weights of the targets are.
        hard: one-hot masks, gradient of the soft ones.
        regularisation: lambda.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, tuple[int, int, int]],
        make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        logits: dict[str, Tensor],
        *,
        frozen: bool,
        hard: bool,
        regularisation: float,
        mask_lr: float,
    ) -> None:
        self.model, self.targets, self.hard, self.regularisation = model, targets, hard, regularisation
        self.weights = dict(model.named_parameters())
        for name in targets:
            self.weights[name].requires_grad_(not frozen)
        self.optimizer = make_optimizer([p for p in self.weights.values() if p.requires_grad])
        self.sign = -1.0 if self.optimizer.param_groups[0].get("maximize") else 1.0
        self.logits = {name: nn.Parameter(value.clone()) for name, value in logits.items()}
        self.mask_lr = mask_lr
        self.adam = torch.optim.Adam(self.logits.values(), lr=mask_lr, betas=(0.9, 0.95), eps=1e-8)
        self.final: dict[str, Tensor] = {}
        self.noise: dict[str, Tensor] = {}
        self.scale = self.temperature = 1.0

    def members(self, name: str) -> Tensor:
        """S, [C, M]."""
        n, m, _ = self.targets[name]
        rows = [[float(i in subset) for i in range(m)] for subset in itertools.combinations(range(m), n)]
        return torch.tensor(rows, dtype=torch.float64)

    def spread(self, name: str, mask: Tensor) -> Tensor:
        """[G, M] over the weight."""
        _, m, v = self.targets[name]
        flat = torch.zeros(self.weights[name].numel(), dtype=torch.float64)
        groups = group_indices(tuple(self.weights[name].shape), m, v)
        return flat.index_put((groups,), mask[:, None].expand(groups.shape)).reshape(self.weights[name].shape)

    def likely(self, name: str) -> Tensor:
        """The mask of the largest logits."""
        return self.spread(name, self.members(name)[self.logits[name].detach().argmax(dim=1)])

    def fix(self) -> None:
        self.final = {name: self.likely(name) for name in self.targets}

    def effective(self) -> dict[str, Tensor]:
        """What the forward pass multiplies by."""
        return {name: self.one(name) if name in self.targets else weight for name, weight in self.weights.items()}

    def one(self, name: str) -> Tensor:
        if self.final:
            return self.weights[name] * self.final[name]
        choice = torch.softmax((self.logits[name] * self.scale + self.noise[name]) / self.temperature, dim=1)
        if self.hard:
            picked = nn.functional.one_hot(choice.argmax(dim=1), choice.shape[1]).double()
            choice = picked - choice.detach() + choice
        return self.weights[name] * self.spread(name, choice @ self.members(name))

    def backward(self, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> None:
        """Accumulate the gradients of one batch."""
        effective = self.effective()
        loss_of(lambda *inputs: torch.func.functional_call(self.model, effective, inputs)).backward()

    def step(self, lr: float, peak: float) -> None:
        """Update the logits, with the regulariser, and what trains; clear the gradients."""
        if not self.final:
            if self.sign < 0:
                for value in self.logits.values():
                    value.grad.neg_()
            frozen = {name: p.detach() for name, p in self.weights.items()}
            for name in self.targets:
                masked = self.one(name) if not self.weights[name].requires_grad else None
                if masked is None:
                    kept, self.weights[name] = self.weights[name], frozen[name]
                    masked = self.one(name)
                    self.weights[name] = kept
                (-self.regularisation * masked.square().sum()).backward()
            self.adam.param_groups[0]["lr"] = self.mask_lr * lr / peak
            self.adam.step()
            self.adam.zero_grad()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()


def best_transposable_block(scores: list[list[float]], n: int) -> tuple[float, list[list[int]]]:
    """The square 0/1 matrix with n ones in every row and column that keeps the largest sum, by trying every matrix.

    Of equal sums the one that reads largest as a number of its rows, first row first.
    """
    m = len(scores)
    best: tuple[float, list[list[int]]] | None = None
    for bits in itertools.product((1, 0), repeat=m * m):  # ones first: larger readings come first
        rows = [list(bits[m * row : m * (row + 1)]) for row in range(m)]
        if any(sum(row) != n for row in rows) or any(sum(column) != n for column in zip(*rows, strict=True)):
            continue
        total = math.fsum(scores[i][j] for i in range(m) for j in range(m) if rows[i][j])
        if best is None or total > best[0]:
            best = total, rows
    assert best is not None
    return best
