"""Forward passes without gradients, and what they share with those of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.distributed import ALONE, World
from lbc_cli.engine.protocols import Amp, Batch
from lbc_cli.tasks import Task

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    *,
    device: torch.device,
    amp: Amp = "off",
    channels_last: bool = False,
    world: World = ALONE,
) -> dict[str, float]:
    """The task's metrics over all batches, exact whatever the size of the last.

    Args:
        model: on `device`; left in the mode it was in.
        batches: (images, targets).
        task: names the metrics.
        device: where to compute.
        amp: autocast type of the forward pass.
        channels_last: memory format of the images.
        world: the ranks, each with batches of its own, whose metrics are taken together.

    Raises:
        DataError: if there are no images.
    """
    training = model.training
    model.eval()
    collected = task.evaluation()
    for images, targets in batches:
        images, targets = place(images, targets, device, channels_last)
        with autocast(device, amp):
            outputs = task.predict(model, images)
        collected.update(outputs, targets)
    model.train(training)
    if world.size > 1:
        collected.combine(world.total)
    return collected.result()


def place(images: Tensor, targets: Tensor, device: torch.device, channels_last: bool) -> Batch:
    """A batch on the device, images in their memory format."""
    layout = torch.channels_last if channels_last and images.ndim == 4 else torch.preserve_format
    return (
        images.to(device, non_blocking=True, memory_format=layout),
        targets.to(device, non_blocking=True),
    )


def autocast(device: torch.device, amp: Amp) -> AbstractContextManager[Any]:
    """Reduced precision within this context, or none."""
    return contextlib.nullcontext() if amp == "off" else torch.autocast(device.type, dtype=_DTYPES[amp])
