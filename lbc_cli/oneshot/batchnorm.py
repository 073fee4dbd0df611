"""New statistics for the batch norms of a pruned model: pruning changes what they see, and no training corrects it.

The running mean and variance are started anew and averaged over the calibration batches with equal weight (momentum
None), as torch's `update_bn` does; everything else stays in eval mode.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbc_cli.errors import MethodError
from lbc_cli.oneshot.choice import Calibration

BATCH = 64


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def check_batch_norms(model: nn.Module, arch: str) -> None:
    """Refuse to renew what is not there.

    Raises:
        MethodError: if the model has no batch norm with running statistics.
    """
    if not batch_norms(model):
        raise MethodError(f"{arch} has no batch norms with running statistics: leave --recalibrate-bn out")


@torch.no_grad()
def recalibrate(model: nn.Module, calibration: Calibration) -> int:
    """Renew the running statistics of a model.

    Args:
        model: gets the new statistics.
        calibration: images, and a copy of `model` to run.

    Returns:
        How many batch norms there are.
    """
    norms = batch_norms(calibration.model)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    done = 0
    for images, _ in calibration.batches(BATCH):
        calibration.progress("batch norms, images", done, len(calibration.images))
        calibration.model(images)
        done += len(images)
    for name, own in batch_norms(model).items():
        for buffer, renewed in norms[name].named_buffers(recurse=False):
            own.get_buffer(buffer).copy_(renewed)
    return len(norms)
