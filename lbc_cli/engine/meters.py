"""What an epoch measures while it trains: loss, images, time and the wait for data; it may be stopped in between."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lbc_cli.distributed import World
from lbc_cli.engine.protocols import Batch, Batches, Record
from lbc_cli.engine.updates import Outcome


class Clocked:
    """An iterator over batches that notes how long it was waited for.

    Args:
        batches: one pass of the loader.
        seconds: of waiting before, in the part of the pass that is not repeated.

    Attributes:
        seconds: of waiting so far.
    """

    def __init__(self, batches: Batches, seconds: float = 0.0) -> None:
        began = time.perf_counter()
        self._batches = iter(batches)
        self.seconds = seconds + time.perf_counter() - began

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - began

    def in_groups(self, size: int) -> Iterator[Iterator[Batch]]:
        """Groups of `size` batches, the last maybe shorter; each is to be used up before the next is asked for."""
        for first in self:
            yield itertools.chain([first], itertools.islice(self, size - 1))


class Meter:
    """Sums over a training epoch, of all ranks; losses stay on the device until they are read.

    Args:
        device: where the losses are.
        world: the ranks whose images are counted together.
    """

    def __init__(self, device: torch.device, world: World) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._images = 0
        self._world = world
        self._began = time.perf_counter()
        self._before = 0.0
        self._read = (0.0, 0.0, 0.0, 0.0)

    @property
    def empty(self) -> bool:
        """Whether nothing was taken in."""
        return not self._images

    @property
    def seconds(self) -> float:
        """Since the epoch began, without the time between a state and its continuation."""
        return self._before + time.perf_counter() - self._began

    def add(self, outcome: Outcome) -> None:
        """Take in an update."""
        self._loss += outcome.loss * outcome.images
        self._images += outcome.images

    def since_start(self, waited: float) -> Record:
        """Mean loss, throughput and share of the time spent waiting for data. Waits for the device and the ranks.

        Args:
            waited: seconds of waiting for data since the epoch began.
        """
        return _rates(*self._now(waited))

    def since_last(self, waited: float) -> Record:
        """The same since the last call."""
        now = self._now(waited)
        loss, images, seconds, wait = (a - b for a, b in zip(now, self._read, strict=True))
        self._read = now
        return _rates(loss, images, seconds, wait)

    def _now(self, waited: float) -> tuple[float, float, float, float]:
        """Loss and images of all ranks, seconds of this one, and the wait of the one that waited longest."""
        if self._world.size == 1:
            return self._loss.item(), float(self._images), self.seconds, waited
        loss, images = self._world.total(torch.stack([self._loss.cpu(), torch.tensor(float(self._images))])).tolist()
        return loss, images, self.seconds, self._world.largest(waited)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands: plain numbers, the loss of every rank. All ranks must call it."""
        return {
            "loss": self._world.gather(self._loss.item()),
            "images": self._images,
            "seconds": self.seconds,
            "read": list(self._read),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; with another number of ranks the first one takes over what all had."""
        losses, world = state["loss"], self._world
        if len(losses) == world.size:
            loss, images = losses[world.rank], state["images"]
        else:
            loss, images = (sum(losses), state["images"] * len(losses)) if world.main else (0.0, 0)
        self._loss.fill_(loss)
        self._images = images
        self._before = state["seconds"]
        self._read = tuple(state["read"])


def _rates(loss: float, images: float, seconds: float, waited: float) -> Record:
    return {"loss": loss / images, "images_per_second": images / seconds, "data_wait": waited / seconds}
