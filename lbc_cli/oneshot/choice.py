"""What the methods of one-shot pruning have in common: what they look at, and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lbc_cli.errors import MethodError
from lbc_cli.patterns import from_groups, keep_best, to_groups
from lbc_cli.targets import Target
from lbc_cli.transposable import transposable_mask

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def unheard(what: str, done: int, total: int) -> None:
    """Nobody wants to know how far it is."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model and images to look at it with.

    Attributes:
        model: a copy to work on, in float32 and eval mode, on `device`; the methods may change it.
        images: float32 [N, C, H, W], on the CPU.
        labels: int64 [N], class ids.
        device: where the model is.
        progress: told how far a method is.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    device: torch.device
    progress: Progress = unheard

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images with their labels on the device, in order, in batches of nearly equal length.

        Args:
            size: images in a batch, at the most.
        """
        count = -(-len(self.images) // size)
        images, labels = self.images.tensor_split(count), self.labels.tensor_split(count)
        for batch, ids in zip(images, labels, strict=True):
            yield batch.to(self.device), ids.to(self.device)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What stays.

    Attributes:
        masks: parameter name -> bool mask of exactly N in every group.
        weights: parameter name -> the weight with new values where it is kept and +0.0 elsewhere, in float64; only
            from methods that change what they keep.
        errors: parameter name -> share of the layer's squared output that is lost on the calibration images.
        notes: what people should know.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Masker = Callable[[Tensor, Target], Tensor]
"""From scores and a target to the mask of what stays."""


def mask_by(scores: Tensor, target: Target) -> Tensor:
    """Keep the N positions of largest score in every group, summed over the V rows of a vector.

    Args:
        scores: float64 [O, I, *K], on the CPU.
        target: the weight and its pattern.

    Returns:
        bool [O, I, *K]. Ties go to the larger magnitude, then to the lower position: where nothing was ever seen of a
        group, all its scores are 0.

    Raises:
        MethodError: if a score is not finite.
    """
    _check_finite(scores, target)
    pattern = target.pattern
    sums = to_groups(scores, pattern).sum(dim=1)
    size = to_groups(target.weight.detach().double().abs(), pattern).sum(dim=1)
    kept = keep_best(sums, torch.ones_like(sums, dtype=torch.bool), pattern.n, lambda rows: size[rows])
    return from_groups(kept[:, None], target.weight.shape, pattern)


def transposable_mask_by(scores: Tensor, target: Target) -> Tensor:
    """Keep N of M along input and output channels, so that the sum of the scores is the largest; see `transposable`.

    Args:
        scores: float64 [O, I, *K], on the CPU.
        target: the weight and its pattern.

    Raises:
        MethodError: if a score is not finite.
    """
    _check_finite(scores, target)
    return transposable_mask(scores, target.pattern, target.weight.detach().double().abs())


def _check_finite(scores: Tensor, target: Target) -> None:
    if not scores.isfinite().all():
        raise MethodError(
            f"{target.name}: scores from the calibration images are NaN or Inf, so its weights cannot be ranked; check "
            f"the images and how they are normalised"
        )
