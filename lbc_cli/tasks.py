"""What is learnt: how a batch becomes a loss, and how predictions become metrics.

A task is all that the engine knows of the problem. Adding one: a class with the methods of `Task`, and a line in TASKS.

Shapes: N images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli.errors import DataError, MethodError, ModelError, did_you_mean
from lbc_cli.recipe import schema


class Evaluation(Protocol):
    """Collects what the metrics of a whole evaluation set need."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch, without waiting for the device."""

    def combine(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take in what the other processes of the run collected; `total` adds a tensor up over all of them."""

    def result(self) -> dict[str, float]:
        """The metrics over everything taken in; "loss" among them.

        Raises:
            DataError: if that was nothing.
        """


class Task(Protocol):
    """A learning problem.

    Attributes:
        primary: the metric that ranks epochs.
        larger_is_better: whether more of it is better.
    """

    primary: str
    larger_is_better: bool

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass for training: the batch's mean loss, a scalar with a gradient, and the outputs."""

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """One forward pass for evaluation."""

    def evaluation(self) -> Evaluation:
        """A fresh collector."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task as the registry knows it.

    Attributes:
        description: one line for people.
        build: makes the task from a resolved recipe.
    """

    description: str
    build: Callable[[schema.Recipe], Task]


class Classification:
    """One class per image: cross-entropy, or binary cross-entropy for every class on its own.

    Targets are class ids [N], which are smoothed here, or distributions [N, K], as mixup makes them: whoever mixes
    also smooths, so these are taken as they are.

    Args:
        smoothing: share of a class id's target that is spread evenly over all K classes.
        bce: binary cross-entropy, averaged over classes, in place of cross-entropy.
    """

    primary = "top1"
    larger_is_better = True

    def __init__(self, *, smoothing: float = 0.0, bce: bool = False) -> None:
        self.smoothing = smoothing
        self.bce = bce

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss over the batch in at least single precision, and the logits [N, K]."""
        outputs = self.predict(model, images)
        loss = binary_loss if self.bce else softmax_loss
        return loss(outputs, targets, self.smoothing), outputs

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits [N, K], in at least single precision.

        Raises:
            ModelError: if the model returns anything else.
        """
        outputs = model(images)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            got = f"a tensor of shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ModelError(
                f"the model returned {got}; classification needs logits [images, classes]: choose a model with a "
                "classifier and one output"
            )
        return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs

    def evaluation(self) -> ClassificationEvaluation:
        """Collects top-1, top-5 and the mean loss."""
        return ClassificationEvaluation()


def softmax_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy; class ids [N] are smoothed, distributions [N, K] are taken as they are."""
    if targets.ndim == 1:
        return functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    return functional.cross_entropy(logits, targets.to(logits.dtype))


def binary_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean binary cross-entropy over images and classes; targets as for `softmax_loss`."""
    if targets.ndim == 1:
        classes = logits.shape[1]
        targets = functional.one_hot(targets, classes).to(logits.dtype) * (1.0 - smoothing) + smoothing / classes
    return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


class ClassificationEvaluation:
    """Top-1 and top-5 in percent and the mean cross-entropy (not smoothed, not binary), by sums and counts.

    Exact over any split into batches. With fewer than five classes top-5 is trivially all. Of equal logits the lower
    class id ranks first, so a model that has died scores chance; a row with a NaN is never right.

    Attributes:
        totals: float64 [4]: images, right at top-1, right at top-5, sum of losses; sums, so processes can add theirs.
    """

    def __init__(self) -> None:
        self.totals: Tensor | None = None

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch.

        Args:
            outputs: logits [N, K].
            targets: class ids [N].
        """
        ranks = rank_of(outputs, targets)
        losses = functional.cross_entropy(outputs, targets, reduction="none").double()
        batch = torch.stack(
            [losses.new_tensor(len(targets)), (ranks < 1).sum().double(), (ranks < 5).sum().double(), losses.sum()]
        )
        self.totals = batch if self.totals is None else self.totals + batch

    def combine(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the images of the other processes; one may have had none."""
        self.totals = total(torch.zeros(4, dtype=torch.float64) if self.totals is None else self.totals)

    def result(self) -> dict[str, float]:
        """Mean loss, top-1 and top-5 in percent.

        Raises:
            DataError: if there was no image.
        """
        images, top1, top5, loss = (0.0, 0.0, 0.0, 0.0) if self.totals is None else self.totals.tolist()
        if not images:
            raise DataError("the evaluation set is empty: there is nothing to measure")
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}


def rank_of(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes come before the right one.

    Args:
        logits: [N, K].
        targets: class ids [N].

    Returns:
        int64 [N]: 0 is best; K for a row with a NaN.
    """
    classes = logits.shape[1]
    of_target = logits.gather(1, targets.unsqueeze(1))
    earlier = torch.arange(classes, device=logits.device) < targets.unsqueeze(1)
    ahead = (logits > of_target) | ((logits == of_target) & earlier)
    return ahead.sum(1).masked_fill(logits.isnan().any(1), classes)


def _classification(recipe: schema.Recipe) -> Task:
    return Classification(smoothing=recipe.augment.smoothing, bce=recipe.train.bce)


TASKS: dict[str, TaskInfo] = {
    "classification": TaskInfo("one class per image; top-1 and top-5", _classification),
}


def make_task(recipe: schema.Recipe) -> Task:
    """The task that a recipe names.

    Raises:
        MethodError: if there is no such task.
    """
    if recipe.task not in TASKS:
        near = did_you_mean(recipe.task, TASKS)
        raise MethodError(f"task = {recipe.task!r}: there is no such task, only {', '.join(TASKS)}.{near}")
    return TASKS[recipe.task].build(recipe)
