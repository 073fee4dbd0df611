"""Order, seeds and mixing of the training samples: what makes a batch a function of (seed, epoch, place) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from lbc_cli.data.hub import ImageStream
from lbc_cli.data.images import ImageSet
from lbc_cli.data.rng import ERASE, MIX, ORDER, SAMPLE, EpochKey, isolated_rng, reseed, stable_seed

ROUND = 256
Batch = tuple[Tensor, Tensor]


class EpochSampler(Sampler[int]):
    """Positions of a data set in an order that follows from (seed, epoch) alone.

    With repeated augmentation (Hoffer et al., arXiv:1901.09335) each drawn position stands `repeats` times in a row,
    and an epoch keeps its length, rounded down to a multiple of 256 from 256 images on, as timm's sampler on one
    process: about one image in `repeats` is seen per epoch.

    Args:
        length: images in the data set.
        seed: the recipe's seed.
        repeats: copies of an image; 0 and 1 mean none.
    """

    def __init__(self, length: int, seed: int, repeats: int = 0) -> None:
        self.length = length
        self.repeats = max(1, repeats)
        self.key = EpochKey(seed)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order comes next."""
        self.key.epoch = epoch

    def __len__(self) -> int:
        return self.length // ROUND * ROUND if self.repeats > 1 and self.length >= ROUND else self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(stable_seed(self.key.value, ORDER))
        order = torch.randperm(self.length, generator=generator)
        return iter(order.repeat_interleave(self.repeats)[: len(self)].tolist())


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Whole batches of (place in the epoch, position in the data set), from `first` on.

    Several ranks cut the batches of one process with their common size: batch i of rank r is the r-th part of batch i
    of that process. So the images of an update do not depend on how many ranks share them.

    Args:
        sampler: the order of the epoch, the same on every rank.
        size: images of a batch of one rank.
        rank: which part is taken.
        ranks: how many parts there are.
    """

    def __init__(self, sampler: EpochSampler, size: int, rank: int = 0, ranks: int = 1) -> None:
        self.sampler = sampler
        self.size = size
        self.rank = rank
        self.ranks = ranks
        self.first = 0

    def __len__(self) -> int:
        return len(self.sampler) // (self.size * self.ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        places = list(enumerate(self.sampler))
        for batch in range(self.first, len(self)):
            start = (batch * self.ranks + self.rank) * self.size
            yield places[start : start + self.size]


class SeededSet(Dataset[tuple[Any, int, int]]):
    """Samples of a map-style set, each transformed under the seed of its place in the epoch."""

    def __init__(self, dataset: ImageSet, key: EpochKey) -> None:
        self.dataset = dataset
        self.key = key

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, int, int]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[tuple[Any, int, int]]:
        """A batch of samples; torch's loaders ask for it at once, so the generators are put back once."""
        epoch, samples = self.key.value, []
        with isolated_rng(epoch):
            for place, position in places:
                reseed(stable_seed(epoch, SAMPLE, place))
                samples.append((*self.dataset[position], place))
        return samples


class SeededStream(IterableDataset[tuple[Any, int, int]]):
    """Samples of a stream, each transformed under the seed of its place in its loader process."""

    def __init__(self, stream: ImageStream, key: EpochKey) -> None:
        self.stream = stream
        self.key = key

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        worker = get_worker_info()
        place = (worker.id if worker else 0) << 40
        for image, label in self.stream.images():
            with isolated_rng(stable_seed(self.key.value, SAMPLE, place)):
                tensor = image if self.stream.transform is None else self.stream.transform(image)
            yield tensor, label, place
            place += 1


class MixingCollate:
    """Stack samples into a batch, and mix it under the seed of its first sample."""

    def __init__(self, key: EpochKey, mixup: Mixup | None) -> None:
        self.key = key
        self.mixup = mixup

    def __call__(self, samples: Sequence[tuple[Tensor, int, int]]) -> Batch:
        """Images [B, C, H, W] and targets, int64 [B] or, mixed, float32 [B, classes]."""
        with isolated_rng(stable_seed(self.key.value, MIX, samples[0][2])):
            if isinstance(self.mixup, FastCollateMixup):
                images, targets = self.mixup([sample[:2] for sample in samples])
                return images, targets
            images, targets = stack(samples)
            return (images, targets) if self.mixup is None else self.mixup(images, targets)


def stack(samples: Sequence[tuple[Any, ...]]) -> Batch:
    """Images [B, C, H, W] and class ids int64 [B]."""
    return torch.stack([sample[0] for sample in samples]), torch.tensor([sample[1] for sample in samples])


class SeededErasing:
    """timm's random erasing on the device, under the seed of (epoch, batch, rank's part of it).

    Args:
        erasing: timm's.
        key: of the epoch.
        device: where the batches are.
        rank: which part of every batch comes here.
        ranks: how many parts there are.
    """

    def __init__(
        self, erasing: RandomErasing, key: EpochKey, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> None:
        self.erasing = erasing
        self.key = key
        self.device = device
        self.rank = rank
        self.ranks = ranks
        self.batch = 0

    def __call__(self, images: Tensor) -> Tensor:
        """The next batch [B, C, H, W], erased in place."""
        with isolated_rng(stable_seed(self.key.value, ERASE, self.batch * self.ranks + self.rank), self.device):
            erased: Tensor = self.erasing(images)
        self.batch += 1
        return erased
