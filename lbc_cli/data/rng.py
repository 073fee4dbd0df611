"""Random numbers of the data pipeline: pure functions of (seed, epoch, position), drawn apart from the run's own.

Every sample is augmented, and every batch mixed, under a generator state that follows from the recipe's seed, the
epoch and the place of the sample or batch in that epoch. Nothing depends on how many loader processes there are or on
what was drawn before, and the global generators are left as they were found. So a run that resumes at any batch sees
the same images, and the model's own randomness (dropout, stochastic depth) stays the engine's business.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info

SAMPLE, MIX, ERASE, ORDER, STEP = range(5)


def stable_seed(*parts: int) -> int:
    """A well-mixed 63-bit seed from non-negative integers, the same on every machine and in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch of a run; whoever draws random numbers in that epoch starts from it.

    Args:
        seed: the recipe's seed, >= 0.
        epoch: counted from 0.

    Returns:
        An integer in [0, 2**63).
    """
    return stable_seed(seed, epoch)


def seed_everything(seed: int, epoch: int, *place: int) -> None:
    """Seed python's, numpy's and torch's global generators (every device).

    The loaders do not need it; a loop calls it at the start of each epoch, and of each update, so that the model's own
    draws (dropout, stochastic depth) are a function of where the run is, whatever came before.

    Args:
        seed: the recipe's seed.
        epoch: counted from 0.
        place: within the epoch: update and rank. Nothing is the epoch's beginning.
    """
    key = stable_seed(epoch_seed(seed, epoch), STEP, *place) if place else epoch_seed(seed, epoch)
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)


class EpochKey:
    """The seed of the current epoch, shared by the parts of a loader.

    Args:
        seed: the recipe's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    @property
    def value(self) -> int:
        """`epoch_seed` of the current epoch."""
        return epoch_seed(self.seed, self.epoch)


def reseed(seed: int) -> None:
    """Seed python's, numpy's and torch's CPU generators; to be called within `isolated_rng`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for every CUDA device as well


@contextmanager
def isolated_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw from generators seeded with `seed`, then put the global generators back as they were.

    Args:
        seed: where python's, numpy's and torch's generators start.
        device: where a CUDA device, its generator is treated likewise.
    """
    # A loader process draws for nothing but its samples: there is no state worth the time of putting it back.
    saved = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    cuda = device if device is not None and device.type == "cuda" else None
    saved_cuda = None if cuda is None else torch.cuda.get_rng_state(cuda)
    reseed(seed)
    if cuda is not None:
        with torch.cuda.device(cuda):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        if saved is not None:
            random.setstate(saved[0])
            np.random.set_state(saved[1])
            torch.set_rng_state(saved[2])
        if cuda is not None and saved_cuda is not None:
            torch.cuda.set_rng_state(saved_cuda, cuda)
