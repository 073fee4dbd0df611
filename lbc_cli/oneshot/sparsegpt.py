"""SparseGPT: choose and prune column by column, and let the weights that follow make up for what is lost.

Source: E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", ICML
2023, Algorithm 1 and its N:M form; the update is the Optimal Brain Surgeon's (Hassibi and Stork 1993).

    H      = X X^T + 0.01 mean(diag X X^T) I        X [K * I, P]: the layer's inputs, H in float64
    U      = the upper Cholesky factor of H^-1, U^T U = H^-1; U_jj^2 = [(H over the columns from j on)^-1]_jj
    group  when its first column is reached: keep the N of largest w_j^2 / U_jj^2
    column e_j = w_j / U_jj where j is pruned, else 0; all later columns of the row: w -= e_j U_j

Columns are ordered by (kernel position, channel), so that a group of M consecutive input channels at one kernel
position is M consecutive columns; ordered by channel first, as flattening a weight does, a group would run over kernel
positions and the result would not be N:M along the channels. Layers are treated in the order in which the network
uses them, each with inputs from the layers before it as they are after pruning.

Deviations: convolutions, also grouped ones (a Hessian per group); V rows of a vector share a mask, chosen by the sum of
their scores; inputs that are zero throughout keep their weights, where the paper's code clears them (the damping alone
ranks them, by magnitude, and nothing is added to them).

Memory: H of one layer at a time, 8 (K I)^2 (G + 3) bytes with its factors, e.g. 0.63 GiB for a 3x3 convolution of 512
channels; checked before anything is computed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lbc_cli.errors import MethodError
from lbc_cli.oneshot.choice import Calibration, Chosen
from lbc_cli.oneshot.inputs import Seen, Watch, from_order, in_order, not_seen, order_of_use
from lbc_cli.patterns import Pattern
from lbc_cli.targets import Target

BATCH = 32
DAMPING = 0.01
COLUMNS = 128  # whose updates of the rest are made together


@dataclass(frozen=True, slots=True)
class Solution:
    """A pruned layer.

    Attributes:
        weight: float64 [O, C], zero where it is pruned.
        mask: bool [O, C].
        lost: sum over all inputs of the squared change of the output.
        whole: the sum of the squared output before.
    """

    weight: Tensor
    mask: Tensor
    lost: float
    whole: float


def by_sparsegpt(targets: Sequence[Target], calibration: Calibration | None) -> Chosen:
    """Prune layer after layer; the calibration's model is pruned on the way.

    Args:
        targets: the weights, [O, I, *K] each.
        calibration: model and images; the labels play no part.

    Raises:
        MethodError: if a layer's inputs cannot be seen or are not finite, or its Hessian is too large for the memory.
    """
    assert calibration is not None
    largest = max(targets, key=lambda target: _bytes(target))
    _check_memory(largest, calibration.device)
    by_name = {target.name: target for target in targets}
    weights = {target.name: calibration.model.get_parameter(target.name) for target in targets}
    calls = order_of_use(calibration.model, weights, calibration.images[:1].to(calibration.device))
    for target in targets:
        if target.name not in calls:
            raise MethodError(not_seen("sparsegpt", target.name))
    masks, values, errors = {}, {}, {}
    for done, (name, uses) in enumerate(calls.items()):
        calibration.progress("SparseGPT, layers", done, len(calls))
        target = by_name[name]
        hessians = _hessians(calibration, name, uses)
        weight, mask, errors[name] = _prune_layer(target, hessians)
        masks[name], values[name] = mask, weight
        with torch.no_grad():  # what later layers see is what will be stored
            weights[name].copy_(weight.to(target.weight.dtype))
    size = _columns(largest)
    held = f"{8 * size**2 * largest.groups / 2**20:.0f} MiB"
    note = f"largest Hessian: {largest.name}, {size} x {size} in float64, {held} ({_gib(_bytes(largest))} with factors)"
    return Chosen(masks, values, errors, (note,))


def _columns(target: Target) -> int:
    return target.weight[0].numel()


def _bytes(target: Target) -> int:
    """What the Hessians of a layer and the factors of one of them take."""
    return 8 * _columns(target) ** 2 * (target.groups + 3)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _check_memory(target: Target, device: torch.device) -> None:
    """Refuse a layer whose Hessian does not fit.

    Raises:
        MethodError: with the figures.
    """
    needed, free = _bytes(target), free_memory(device)
    if needed > free:
        raise MethodError(
            f"sparsegpt needs {_gib(needed)} for {target.name} alone, its Hessian over {_columns(target)} inputs and "
            f"its factors, and {_gib(free)} are free on {device}: leave that layer dense with --layers "
            f"'{target.name}=dense', or use --method wanda"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device; on CPUs that do not tell, all that there are."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _ReachedError(Exception):
    """The layer has had all its inputs: the rest of the forward pass is not needed."""


@torch.no_grad()
def _hessians(calibration: Calibration, name: str, uses: int) -> Tensor:
    """X X^T of a layer over all calibration images, float64 [G, C, C].

    Args:
        calibration: its model runs up to this layer.
        name: of the weight.
        uses: how often a forward pass uses it.
    """
    total: Tensor | None = None
    left = 0

    def note(_: str, seen: Seen) -> None:
        nonlocal total, left
        for part in seen.columns():
            total = part @ part.mT if total is None else total.baddbmm_(part, part.mT)
        left -= 1
        if not left:
            raise _ReachedError

    for images, _ in calibration.batches(BATCH):
        left = uses
        try:
            with Watch({name: calibration.model.get_parameter(name)}, note):
                calibration.model(images)
        except _ReachedError:
            pass
    assert total is not None
    if not total.isfinite().all():
        raise MethodError(
            f"{name}: its inputs on the calibration images are NaN or Inf; check the images and how they are normalised"
        )
    return total


def _prune_layer(target: Target, hessians: Tensor) -> tuple[Tensor, Tensor, float]:
    """New weight in float64 and mask, both [O, I, *K] on the CPU, and the share of the squared output that is lost."""
    rows = in_order(target.weight.detach().double()).to(hessians.device)
    solved = [
        solve(part, hessian, target.pattern) for part, hessian in zip(rows.chunk(len(hessians)), hessians, strict=True)
    ]
    shape = target.weight.shape
    weight = from_order(torch.cat([entry.weight for entry in solved]).cpu(), shape)
    mask = from_order(torch.cat([entry.mask for entry in solved]).cpu(), shape)
    lost, whole = sum(entry.lost for entry in solved), sum(entry.whole for entry in solved)
    return weight, mask, lost / whole if whole else 0.0


def solve(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Solution:
    """Prune one matrix.

    Args:
        weight: float64 [O, C], M consecutive columns to a group.
        hessian: float64 [C, C], X X^T.
        pattern: N:M and vector length.
    """
    upper = _factor(hessian)
    work, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    step = COLUMNS // pattern.m * pattern.m
    for first in range(0, weight.shape[1], step):
        block = slice(first, first + step)
        errors = _prune_block(work[:, block], mask[:, block], upper[block, block], pattern)
        work[:, first + step :] -= errors @ upper[block, first + step :]
    work.masked_fill_(~mask, 0)
    change = weight - work
    lost, whole = (float(((rows @ hessian) * rows).sum()) for rows in (change, weight))
    return Solution(work, mask, lost, whole)


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, [C, C]."""
    mean = float(hessian.diagonal().mean())
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * mean if mean else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def _prune_block(work: Tensor, mask: Tensor, upper: Tensor, pattern: Pattern) -> Tensor:
    """Prune the columns of one block in place; returns their errors, [O, B].

    Args:
        work: [O, B], a view.
        mask: bool [O, B], a view that is filled.
        upper: [B, B], of the factor.
        pattern: N:M and vector length.
    """
    errors = torch.zeros_like(work)
    pivots = upper.diagonal()
    for column in range(work.shape[1]):
        if column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            mask[:, group] = _chosen((work[:, group] / pivots[group]).square(), pattern)
        errors[:, column] = (work[:, column] / pivots[column]).masked_fill(mask[:, column], 0)
        work[:, column:] -= errors[:, column, None] * upper[column, column:]
    return errors


def _chosen(scores: Tensor, pattern: Pattern) -> Tensor:
    """The N of largest score in each row of [O, M], the same for V rows; ties go to the lower position."""
    sums = scores.reshape(-1, pattern.vector, pattern.m).sum(1)
    best = sums.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
    kept = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, best, True)
    return kept.repeat_interleave(pattern.vector, dim=0)
