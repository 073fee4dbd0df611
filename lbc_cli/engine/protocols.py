"""What the loop takes and gives: a pruner, loaders and a reporter by protocol, settings, result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lbc_cli.recipe import schema

Record = dict[str, Any]
Batch = tuple[Tensor, Tensor]
Amp = Literal["off", "bfloat16", "float16"]


class Pruner(Protocol):
    """What the loop needs of a sparsification method; `methods.Pruner` provides it."""

    @property
    def phase(self) -> str:
        """Either "training" or "final"."""

    def begin_epoch(self, epoch: int) -> None:
        """Carry out the schedule."""

    def density(self) -> float:
        """Share of the weights kept now."""

    def masks(self) -> dict[str, Tensor]:
        """Name -> bool mask of the kept weights."""

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """Pattern -> alive per group."""

    def project_(self, module: nn.Module) -> None:
        """Put the masks on a copy of the model."""

    def deployed(self) -> AbstractContextManager[None]:
        """Within it the model carries the weights that would be shipped."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values, nested."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""


class Batches(Protocol):
    """Batches of (images, targets), as many as its length says."""

    def __iter__(self) -> Iterator[Batch]:
        """A fresh pass."""

    def __len__(self) -> int:
        """Batches in a pass."""


class Loaders(Protocol):
    """Training and evaluation batches; `data.Loaders` provides it."""

    @property
    def train(self) -> Batches:
        """Training batches, in the order of the epoch set last."""

    @property
    def val(self) -> Iterable[Batch]:
        """Evaluation batches, each image once."""

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose order and augmentation of the next pass, and the batch that it starts at."""


class Reporter(Protocol):
    """Whoever shows the run; called from the loop's own thread, and never waited for by the device."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Once, before the first epoch."""

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        """Masks are set: density, survivors, phase, lr."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Every `log_every` updates and after the last of an epoch."""

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """The epoch's record, as kept in the history."""

    def message(self, text: str, level: str = "info") -> None:
        """Anything else worth a line."""

    def finish(self) -> None:
        """Once, also after an error."""


class NullReporter:
    """Shows nothing."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Nothing."""

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def message(self, text: str, level: str = "info") -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """How to train; the fields are those of the recipe's `[train]` table, with the device resolved."""

    epochs: int
    device: torch.device
    seed: int = 0
    amp: Amp = "off"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    clip_grad: float = 0.0
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    ema: bool = False
    ema_decay: float = 0.9998
    eval_every: int = 1
    log_every: int = 50
    save_every: int = 1
    save_steps: int = 0
    save_minutes: float = 15.0

    @classmethod
    def of(cls, train: schema.Train, device: torch.device) -> FitSettings:
        """The settings of a recipe on a device."""
        names = [name for name in cls.__dataclass_fields__ if name != "device"]
        return cls(device=device, **{name: getattr(train, name) for name in names})


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a run came to.

    Attributes:
        last: record of the last epoch.
        best: record of the best evaluated epoch among those with final masks; None if there was none.
        history: one record per epoch, resumed ones included.
        ema: the averaged model, projected onto the masks; None without averaging.
    """

    last: Record
    best: Record | None
    history: list[Record]
    ema: nn.Module | None
