"""One optimizer update: forward, backward, scaling, accumulation, the check for divergence, clipping, averaging.

With several ranks the gradients are averaged by DDP in the last backward pass of an update. Its buffers (the statistics
of batch norms) are rank 0's, which every forward pass takes over: so rank 0's state is the state of the run.

The check for divergence on a CPU, and under a gradient scaler, comes before the update. On a GPU without one it would
make the host wait for the device at every update: there the flag is copied while the device goes on, and read before
the next update, or at once where `update(settle=True)` asks for it, as a loop does before it logs or saves. A state on
the disk is therefore always from before the first value that is not finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lbc_cli.distributed import ALONE, World
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
    """Loss or gradients of an update are not finite.

    Attributes:
        outcome: of that update.
        made: whether the update was made before it was noticed.
        ago: how many updates were begun since.
    """

    def __init__(self, outcome: Outcome, *, made: bool, ago: int = 0) -> None:
        self.outcome, self.made, self.ago = outcome, made, ago
        super().__init__("loss or gradient is not finite")


class _Pending:
    """A flag on its way from the device to the host."""

    def __init__(self, outcome: Outcome, finite: Tensor) -> None:
        self.outcome = outcome
        self._flag = torch.empty((), dtype=torch.bool, pin_memory=finite.is_cuda)
        self._flag.copy_(finite, non_blocking=True)
        self._copied = torch.cuda.Event() if finite.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def finite(self) -> bool:
        """The flag; waits until it has come."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag)


class Updater:
    """Turns groups of batches into updates.

    Args:
        model: on its device.
        optimizer: over its parameters.
        scheduler: sets the learning rates.
        task: batch -> loss.
        settings: the loop's options.
        world: the ranks that share every update.

    Attributes:
        updates: made so far, those skipped by the gradient scaler included.
        between: whether the last update is complete, so that the state is that of a moment between two.
        ema: the averaged model, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Scheduler,
        task: Task,
        settings: FitSettings,
        world: World = ALONE,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.task, self.settings = task, settings
        self._ddp = _distributed(model, settings.device) if world.size > 1 else None
        whole: nn.Module = model if self._ddp is None else self._ddp
        # Only training goes through the wrappers: evaluation would compile anew for its mode and last batch.
        self._forward: Any = torch.compile(whole) if settings.compile else whole
        self._pending: _Pending | None = None
        self.lags = settings.device.type == "cuda" and settings.amp != "float16"
        self.between = True
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

    def update(self, group: Iterator[Batch], size: int = 1, *, settle: bool = True) -> Outcome:
        """Make one update.

        Args:
            group: its batches; there is at least one.
            size: how many there are; only averaging over ranks must know it.
            settle: whether the caller must be sure that this update was finite.

        Raises:
            NotFiniteError: before anything was changed but the gradients; where the check lags (see the module), one
                update later unless it was settled.
        """
        lr = self.set_rate()
        loss, images, expected = self._backward(group, size)
        self.settle(ago=1)
        self._scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if images != expected:
            for grad in grads:
                grad.mul_(expected / images)
        outcome = Outcome(loss / images, images, get_total_norm(grads), lr)
        self._check(outcome)
        if self.settings.clip_grad:
            self._clip(outcome.norm)
        self.between = False
        self._step()
        self.between = True
        if settle:
            self.settle()
        return outcome

    def settle(self, ago: int = 0) -> None:
        """Read the flag of the last update, if it is still on its way.

        Args:
            ago: how many updates were begun since.

        Raises:
            NotFiniteError: if that update was not finite.
        """
        pending, self._pending = self._pending, None
        if pending is not None and not pending.finite():
            raise NotFiniteError(pending.outcome, made=True, ago=ago)

    def _averaging(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients in the last backward pass of an update only."""
        return contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def _backward(self, group: Iterator[Batch], size: int) -> tuple[Tensor, int, int]:
        """Accumulate gradients, each batch weighing as many of the `expected` images of a full group as it has.

        Returns:
            Sum of the images' losses, the images, and the images expected.
        """
        settings = self.settings
        total = torch.zeros((), dtype=torch.float64, device=settings.device)
        expected = seen = 0
        for number, (raw_images, raw_targets) in enumerate(group, 1):
            images, targets = place(raw_images, raw_targets, settings.device, settings.channels_last)
            count = len(images)
            expected = expected or count * settings.accumulate
            with self._averaging(number == size):
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
        if self.lags:
            self._pending = _Pending(outcome, finite)
        elif not finite.item() or (scaled and self._scaler.get_scale() < LEAST_SCALE):
            raise NotFiniteError(outcome, made=False)

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


class _Passed(nn.Module):
    """A model that can also be passed without images: then every parameter has a gradient, in reverse order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor | None) -> Any:
        if images is not None:
            return self.model(images)
        return torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum()


def _distributed(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model with its gradients averaged over the ranks; weights and buffers begin as rank 0's.

    DDP forms its buckets anew after the first backward pass, by the order in which gradients came. Sums over more than
    two ranks round by an element's place in its bucket, so the first update of a resumed run would round as no update
    of a run that was not stopped. A pass without images settles the buckets before the first update of either.
    """
    averaged = DistributedDataParallel(_Passed(model), device_ids=None if device.type == "cpu" else [device])
    averaged(None).backward()
    for parameter in model.parameters():
        parameter.grad = None
    return averaged


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
