"""One optimizer update: forward, backward, scaling, accumulation, the check for divergence, clipping, averaging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lbc_cli.engine.evaluation import autocast, place
from lbc_cli.engine.protocols import Batch, FitSettings
from lbc_cli.optim import Scheduler
from lbc_cli.tasks import Task

# GradScaler halves its scale at every overflow; below this the gradients themselves are broken.
LEAST_SCALE = 2.0**-14


@dataclass(frozen=True, slots=True)
class Outcome:
    """An update that was made, or would have been.

    Attributes:
        loss: mean over the images, float64 scalar on the device.
        images: how many.
        norm: of all gradients before clipping, a scalar on the device.
        lr: the largest of the parameter groups.
    """

    loss: Tensor
    images: int
    norm: Tensor
    lr: float


class NotFiniteError(Exception):
    """The update was not made: its loss or gradients are not finite."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        super().__init__("loss or gradient is not finite")


class Updater:
    """Turns groups of batches into updates.

    Args:
        model: on its device.
        optimizer: over its parameters.
        scheduler: sets the learning rates.
        task: batch -> loss.
        settings: the loop's options.

    Attributes:
        updates: made so far, those skipped by the gradient scaler included.
        ema: the averaged model, or None.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: Scheduler, task: Task, settings: FitSettings
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.task, self.settings = task, settings
        # Only training goes through the compiled wrapper: evaluation would compile anew for its mode and last batch.
        self._forward: Any = torch.compile(model) if settings.compile else model
        self._scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.amp == "float16")
        self._ema = ModelEmaV3(model, decay=settings.ema_decay) if settings.ema else None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.updates = 0

    @property
    def ema(self) -> nn.Module | None:
        """The averaged model."""
        return None if self._ema is None else self._ema.module

    def set_rate(self) -> float:
        """Set the learning rates of the next update; the largest is returned."""
        self.scheduler.step_update(self.updates)
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def update(self, group: Iterator[Batch]) -> Outcome:
        """Make one update.

        Args:
            group: its batches; there is at least one.

        Raises:
            NotFiniteError: before anything was changed but the gradients.
        """
        lr = self.set_rate()
        loss, images, expected = self._backward(group)
        self._scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if images != expected:
            for grad in grads:
                grad.mul_(expected / images)
        outcome = Outcome(loss / images, images, get_total_norm(grads), lr)
        self._check(outcome)
        if self.settings.clip_grad:
            self._clip(outcome.norm)
        self._step()
        return outcome

    def _backward(self, group: Iterator[Batch]) -> tuple[Tensor, int, int]:
        """Accumulate gradients, each batch weighing as many of the `expected` images of a full group as it has.

        Returns:
            Sum of the images' losses, the images, and the images expected.
        """
        settings = self.settings
        total = torch.zeros((), dtype=torch.float64, device=settings.device)
        expected = seen = 0
        for raw_images, raw_targets in group:
            images, targets = place(raw_images, raw_targets, settings.device, settings.channels_last)
            count = len(images)
            expected = expected or count * settings.accumulate
            with autocast(settings.device, settings.amp):
                loss, _ = self.task.training_loss(self._forward, images, targets)
            torch.autograd.backward(self._scaler.scale(loss * (count / expected)))
            total += loss.detach() * count
            seen += count
        return total, seen, expected

    def _check(self, outcome: Outcome) -> None:
        # Under the scaler an infinite gradient is an overflow: it skips the update and lowers the scale.
        scaled = self._scaler.is_enabled()
        finite = torch.isfinite(outcome.loss)
        if not scaled:
            finite = finite & torch.isfinite(outcome.norm)
        if not finite.item() or (scaled and self._scaler.get_scale() < LEAST_SCALE):
            raise NotFiniteError(outcome)

    def _clip(self, norm: Tensor) -> None:
        bound, mode = self.settings.clip_grad, self.settings.clip_mode
        if mode == "norm":
            clip_grads_with_norm_(self._parameters, bound, norm)
        else:
            # Adaptive clipping leaves the classifier alone, as its authors and timm do.
            dispatch_clip_grad(model_parameters(self.model, exclude_head=mode == "agc"), value=bound, mode=mode)

    def _step(self) -> None:
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update(self.model)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, average, scale and position; the tensors are the live ones."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else dict(self.ema.state_dict()),
            "scaler": self._scaler.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, of an updater with the same settings."""
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a copy of an optimizer's state, each slot of a parameter's shape in that parameter's memory format.

    A file keeps no memory format, and arithmetic that walks memory differently could round differently.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                like = parameter.detach() if value.shape == parameter.shape else value
                values[name] = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
