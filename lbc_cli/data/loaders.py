"""Loaders: transforms and mixing by timm, order and random numbers a pure function of (seed, epoch, position).

On CUDA the loader processes hand over uint8 images, and timm's `PrefetchLoader` normalises (and erases) them on the
device; elsewhere they hand over finished float tensors. A batch does not depend on the number of loader processes
(streams excepted), and the global random generators are never drawn from.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

from lbc_cli.data.hub import ImageStream
from lbc_cli.data.images import DataSource, ImageSet
from lbc_cli.data.order import (
    Batch,
    EpochBatches,
    EpochSampler,
    MixingCollate,
    SeededErasing,
    SeededSet,
    SeededStream,
    stack,
)
from lbc_cli.data.rng import EpochKey
from lbc_cli.data.transforms import Pixels, evaluation_transform, resolve_pixels, training_transform
from lbc_cli.distributed import ALONE, World
from lbc_cli.errors import DataError
from lbc_cli.recipe import schema

_OUTLAST = 20  # seconds
_ENDING = (signal.SIGINT, signal.SIGTERM)


class Loader:
    """Batches of one split, as many as its length says.

    Evaluation yields every image once, in order, the last batch as long as it comes out: images float32 [B, C, H, W]
    and targets int64 [B]. On CUDA both are on the device, elsewhere on the CPU.

    Args:
        batches: the loader underneath: torch's, or on CUDA timm's prefetching one around it.
        samples: images of a whole pass.
        length: batches of a whole pass.
    """

    def __init__(self, batches: Any, samples: int, length: int) -> None:
        self._batches = batches
        self.samples = samples
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._batches
        except DataError as error:
            # From a loader process it arrives with that process's traceback in its text, the message as its last line.
            raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from error


class TrainingLoader(Loader):
    """Full training batches; call `set_epoch` before each pass.

    Targets are int64 [B], or float32 [B, classes] when batches are mixed. The length is that of a whole epoch, also
    when a pass starts within it.

    Args:
        loader: torch's loader of seeded samples.
        key: what their seeds come from.
        mixup: what mixes the batches, if anything does.
        off_epoch: no mixing from this epoch on; 0 is never.
        world: the ranks that share every batch.
    """

    def __init__(
        self, loader: DataLoader[Any], key: EpochKey, mixup: Mixup | None, off_epoch: int, world: World = ALONE
    ) -> None:
        size = loader.batch_size or cast(EpochBatches, loader.batch_sampler).size
        super().__init__(loader, len(loader) * size, len(loader))
        self._loader = loader
        self._key = key
        self._mixup = mixup
        self._off_epoch = off_epoch
        self._world = world
        self._erasing: SeededErasing | None = None
        self._skipped = 0
        self.set_epoch(0)

    def prefetch(self, pixels: Pixels, augment: schema.Augment, device: torch.device) -> None:
        """Bring the uint8 batches to a CUDA device ahead of time; normalise and erase them there."""
        self._batches = _prefetched(self._loader, pixels, device)
        if augment.reprob > 0:
            erasing = RandomErasing(augment.reprob, mode=augment.remode, max_count=augment.recount, device=device)
            self._batches.random_erasing = self._erasing = SeededErasing(
                erasing, self._key, device, self._world.rank, self._world.size
            )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose what the next pass yields.

        Args:
            epoch: counted from 0.
            first_batch: where to start within it, to resume in mid-epoch.
        """
        self._key.epoch = epoch
        cast(torch.Generator, self._loader.generator).manual_seed(self._key.value)
        if isinstance(self._loader.dataset, SeededStream):
            self._loader.dataset.stream.set_loader(self._loader.num_workers, self._key.seed, epoch)
            self._skipped = first_batch
        else:
            batches = cast(EpochBatches, self._loader.batch_sampler)
            batches.sampler.set_epoch(epoch)
            batches.first = first_batch
        if self._erasing is not None:
            self._erasing.batch = first_batch - self._skipped
        if self._mixup is not None:
            self._mixup.mixup_enabled = not 0 < self._off_epoch <= epoch

    def __iter__(self) -> Iterator[Batch]:
        # Only a stream has to read the batches that it skips.
        return islice(super().__iter__(), self._skipped, None)


@dataclass(frozen=True)
class Loaders:
    """The loaders of a run."""

    train: TrainingLoader
    val: Loader
    pixels: Pixels
    """Size and normalisation that both use; goes into the checkpoint."""
    soft_targets: bool
    """Training targets are [B, classes], label smoothing included, in every epoch."""

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the training epoch, and the batch to start at; mixing stops from `mixup_off_epoch` on."""
        self.train.set_epoch(epoch, first_batch)


def make_loaders(
    source: DataSource,
    data: schema.Data,
    augment: schema.Augment,
    *,
    data_config: Mapping[str, Any],
    device: torch.device,
    seed: int,
    world: World = ALONE,
) -> Loaders:
    """Build the training and the evaluation loader.

    With several ranks each gets its part of every training batch, and evaluates its share of the images, none twice.

    Args:
        source: what `open_data` or `generated_data` returned; its sets are left as they are.
        data: the recipe's data table.
        augment: the recipe's augmentation table.
        data_config: the model's own, from `timm.data.resolve_model_data_config`: input_size, mean, std, interpolation,
            crop_pct.
        device: where the batches go if it is a CUDA device; otherwise they stay on the CPU.
        seed: of order, augmentation and mixing.
        world: the ranks that share the images.

    Raises:
        DataError: fewer training images than a batch, settings that no transform can follow, or that a stream cannot.
    """
    pixels = resolve_pixels(data, data_config)
    ahead = _prefetches(device)
    mixup = _make_mixup(augment, data.batch_size, source.num_classes, uint8=ahead)
    images = _prepared(source.train, training_transform(augment, pixels, uint8=ahead), pixels)
    key = EpochKey(seed)
    samples = _training_samples(images, data, augment.aug_repeats, key, world)
    loader = _loader(samples.pop("dataset"), data.workers, device, MixingCollate(key, mixup), **samples)
    train = TrainingLoader(loader, key, mixup, augment.mixup_off_epoch, world)
    if ahead:
        train.prefetch(pixels, augment, device)
    return Loaders(train, _evaluation_loader(source.val, data, pixels, device, world), pixels, mixup is not None)


def _prefetches(device: torch.device) -> bool:
    """Whether batches leave the loader processes as uint8, to be finished on the device."""
    return device.type == "cuda"


def _make_mixup(augment: schema.Augment, batch: int, classes: int, *, uint8: bool) -> Mixup | None:
    if augment.mixup == 0 and augment.cutmix == 0:
        return None
    if batch % 2:
        raise DataError(f"mixup and cutmix pair the images of a batch: data.batch_size must be even, got {batch}")
    return (FastCollateMixup if uint8 else Mixup)(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=augment.smoothing,
        num_classes=classes,
    )


def _training_samples(images: Any, data: schema.Data, repeats: int, key: EpochKey, world: World) -> dict[str, Any]:
    """The seeded samples and how torch's loader batches them."""
    if isinstance(images, ImageStream):
        if world.size > 1:
            raise DataError(
                f"{images.where} is a stream, whose order is made by the loader processes of one rank; with "
                f"{world.size} ranks give an image folder, a tar or hfds/NAME"
            )
        if repeats > 1:
            raise DataError(f"{images.where} is a stream, which cannot repeat images: set augment.aug_repeats to 0")
        images.set_loader(data.workers, key.seed, 0)
        _require_a_batch(images.dataset.reader.num_samples, data.batch_size)
        return {"dataset": SeededStream(images, key), "batch_size": data.batch_size, "drop_last": True}
    sampler = EpochSampler(len(images), key.seed, repeats)
    _require_a_batch(len(sampler), data.batch_size, world.size)
    batches = EpochBatches(sampler, data.batch_size, world.rank, world.size)
    return {"dataset": SeededSet(images, key), "batch_sampler": batches}


def _prepared(dataset: Any, transform: Callable[[Any], Any], pixels: Pixels) -> Any:
    """A copy of the set that transforms; sets are shared with their source, which stays as it is."""
    prepared = copy.copy(dataset)
    prepared.transform = transform
    if isinstance(dataset, ImageSet):
        prepared.mode = "L" if pixels.channels == 1 else "RGB"
    elif pixels.channels != 3:
        raise DataError(f"{dataset.where} streams RGB images, but the model takes {pixels.channels} input channel")
    return prepared


def _require_a_batch(images: int, batch: int, ranks: int = 1) -> None:
    if images < batch * ranks:
        each = f" for each of {ranks} ranks" if ranks > 1 else ""
        raise DataError(
            f"{images} training images are fewer than one batch of {batch}{each}; set data.batch_size to at most "
            f"{images // ranks}"
        )


def _loader(
    dataset: Any, workers: int, device: torch.device, collate: Callable[[Any], Batch], **options: Any
) -> DataLoader[Any]:
    # No persistent workers: each epoch forks anew, so that its key and its mixing are those of the main process.
    return _Loader(
        dataset,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=_outlast_signals,
        generator=torch.Generator(),
        **options,
    )


class _Loader(DataLoader[Any]):
    """Its processes begin with signals held back, so that none ends them before they know what to do with it."""

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlast_signals(worker_id: int) -> None:
    # Ctrl-C, and torchrun's SIGTERM, reach the whole process group; the main process decides when its loaders end, and
    # saves first. SIGTERM still ends them, a little later: it is also how a loader process that hangs is ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_OUTLAST) and None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _prefetched(loader: DataLoader[Any], pixels: Pixels, device: torch.device) -> Any:
    return PrefetchLoader(
        loader,
        mean=pixels.mean,
        std=pixels.std,
        channels=pixels.channels,
        device=device,
        img_dtype=torch.float32,
    )


def _evaluation_loader(dataset: Any, data: schema.Data, pixels: Pixels, device: torch.device, world: World) -> Loader:
    ahead = _prefetches(device)
    images = _prepared(dataset, evaluation_transform(pixels, uint8=ahead), pixels)
    size = data.eval_batch_size or data.batch_size
    # The processes of a stream each end with a short batch of their own.
    shares = max(1, data.workers) if isinstance(images, ImageStream) else 1
    if isinstance(images, ImageStream):
        images.set_loader(data.workers, 0, 0)
    # Every rank evaluates each size-th image; nothing is padded, so nothing counts twice.
    share = range(world.rank, len(images), world.size)
    order = {} if world.size == 1 else {"sampler": share}
    loader = _loader(images, data.workers, device, stack, batch_size=size, **order)
    length = shares * math.ceil(math.ceil(len(share) / shares) / size)
    return Loader(_prefetched(loader, pixels, device) if ahead else loader, len(images), length)
