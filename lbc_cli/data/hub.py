"""Hugging Face tables (`hfds/`) and streams (`hfids/`, `wds/`), through timm's readers.

A stream has no positions: its order follows from the seed, the epoch and the number of loader processes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from lbc_cli.data.checks import require_same_labels, shown
from lbc_cli.data.folders import EVALUATION_SPLITS, checked_sets, read_class_map
from lbc_cli.data.images import DataSource, ReaderSamples, Transform, reason
from lbc_cli.errors import DataError, did_you_mean
from lbc_cli.recipe import schema

PACKAGES = {"hfds": ("datasets", "hf"), "hfids": ("datasets", "hf"), "wds": ("webdataset", "wds")}


class ImageStream(IterableDataset[tuple[Any, int]]):
    """An iterable timm data set that raises where an image cannot be read.

    Args:
        dataset: timm's `IterableImageDataset`.
        where: what to call it in messages.
        strict: make timm's webdataset reader raise where it would log and go on.
    """

    def __init__(self, dataset: Any, where: str, *, strict: bool) -> None:
        self.dataset = dataset
        self.where = where
        self.strict = strict
        self.transform: Transform | None = None

    def __len__(self) -> int:
        """Images of a pass over all loader processes; in training, rounded up to whole batches of each."""
        reader = self.dataset.reader
        return int(len(self.dataset) if reader.is_training else reader.num_samples)

    def set_loader(self, workers: int, seed: int, epoch: int) -> None:
        """Fix the order of the coming epoch.

        Args:
            workers: loader processes.
            seed: of the run.
            epoch: counted from 0.
        """
        reader = self.dataset.reader
        reader.ds = None  # a pipeline kept from the epoch before would go on with its own shuffling
        reader.common_seed = reader.worker_seed = seed % 2**31
        self.dataset.set_loader_cfg(num_workers=workers)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, label in self.images():
            yield (image if self.transform is None else self.transform(image)), label

    def images(self) -> Iterator[tuple[Image.Image, int]]:
        """Images before any transform, and class ids, of this loader process.

        Raises:
            DataError: the stream breaks off, or an image in it cannot be read.
        """
        if self.strict and self.dataset.reader.ds is None:
            _build_strictly(self.dataset.reader)
        try:
            for image, label in self.dataset:
                yield image, int(label)
        except DataError:
            raise
        except Exception as error:  # decoders and transports raise nearly anything
            raise DataError(f"cannot read on from {self.where}: {reason(error)}; repair that shard") from error


def _build_strictly(reader: Any) -> None:
    """Build a webdataset pipeline that raises on a damaged sample; timm's own logs it and goes on."""
    from timm.data.readers import reader_wds

    tolerant, plain = reader_wds.log_and_continue, reader_wds._decode
    reader_wds.log_and_continue, reader_wds._decode = _refuse, partial(_decode_named, plain)
    try:
        reader._lazy_init()
    finally:
        reader_wds.log_and_continue, reader_wds._decode = tolerant, plain


def _refuse(error: Exception) -> bool:
    raise error


def _decode_named(decode: Callable[..., Any], sample: Mapping[str, Any], **options: Any) -> Any:
    try:
        return decode(sample, **options)
    except Exception as error:  # decoders raise nearly anything on damaged input
        where = f"{sample.get('__key__')} in {sample.get('__url__')}"
        raise DataError(f"cannot read the image {where}: {reason(error)}; repair or remove it") from error


def require_package(prefix: str) -> None:
    """Refuse a kind of source whose package is not installed.

    Raises:
        DataError: with the line that installs it.
    """
    package, extra = PACKAGES[prefix]
    if importlib.util.find_spec(package) is None:
        raise DataError(f'{prefix}/ needs the package {package}: pip install "lbc-cli[{extra}]"')


def open_hfds(settings: schema.Data) -> DataSource:
    """Open a Hugging Face table, by its hub name or the path of a local folder."""
    require_package("hfds")
    if settings.class_map:
        raise DataError("hfds/ sets carry their own class names: leave data.class_map empty")
    train_split, val_split = _hf_splits(settings)
    readers = [_create(settings, split, training=False).reader for split in (train_split, val_split)]
    names = _class_names(readers[0].class_to_idx)
    if readers[0].class_to_idx != readers[1].class_to_idx:
        raise DataError(f"the classes of '{train_split}' and '{val_split}' of {settings.source} differ; fix the labels")
    labels = [list(reader.dataset[reader.label_key]) for reader in readers]
    count = len(names) if names else 1 + max(labels[0])
    splits = []
    for reader, ids, split in zip(readers, labels, (train_split, val_split), strict=True):
        require_same_labels(ids, count, f"the split '{split}' of {settings.source}")
        splits.append(ReaderSamples(reader, ids, f"{settings.source}:{split}"))
    sets, dropped = checked_sets(splits, settings)
    return DataSource(sets[0], sets[1], count, names, _title(settings), dropped=dropped)


def open_stream(settings: schema.Data) -> DataSource:
    """Open a Hugging Face stream or webdataset shards."""
    prefix = settings.source.partition("/")[0].lower()
    require_package(prefix)
    if settings.unreadable == "skip" and prefix != "wds":
        raise DataError(f"{prefix}/ cannot leave unreadable images out: set data.unreadable to 'fail'")
    train_split, val_split = _wds_splits(settings) if prefix == "wds" else _hf_splits(settings)
    train, val = _create(settings, train_split, training=True), _create(settings, val_split, training=False)
    names = _stream_classes(settings, prefix, train)
    for dataset, split in ((train, train_split), (val, val_split)):
        if not dataset.reader.num_samples:
            raise DataError(
                f"the split '{split}' of {settings.source} does not tell its size; write it as '{split}|SIZE'"
            )
    strict = prefix == "wds" and settings.unreadable == "fail"
    sets = [
        ImageStream(dataset, f"{settings.source}:{split}", strict=strict)
        for dataset, split in ((train, train_split), (val, val_split))
    ]
    return DataSource(sets[0], sets[1], len(names), names, _title(settings))


def _stream_classes(settings: schema.Data, prefix: str, dataset: Any) -> tuple[str, ...]:
    if prefix == "wds":
        if not settings.class_map:
            raise DataError(
                "wds/ shards do not name their classes: give data.class_map, one name a line in order of id"
            )
        return tuple(read_class_map(settings.class_map, Path(settings.root)))
    names = _class_names(dataset.reader.class_to_idx)
    if settings.class_map or names is None:
        raise DataError(
            f"{settings.source}: class ids must come from its own ClassLabel column, and class_map be empty"
        )
    return names


def _title(settings: schema.Data) -> str:
    """The source without the path to it, if it is a local folder."""
    prefix, _, name = settings.source.partition("/")
    return f"{prefix}/{Path(name).resolve().name}" if Path(name).expanduser().exists() else settings.source


def _class_names(ids: dict[str, int]) -> tuple[str, ...] | None:
    return tuple(sorted(ids, key=lambda name: ids[name])) if ids else None


def _create(settings: schema.Data, split: str, *, training: bool) -> Any:
    streaming = not settings.source.lower().startswith("hfds/")
    options = {"batch_size": settings.batch_size, "is_training": training, "download": settings.download}
    try:
        return create_dataset(settings.source, settings.root or None, split=split, **(options if streaming else {}))
    except Exception as error:  # the readers raise whatever their packages do, down to assertions
        unknown = streaming and isinstance(error, ValueError) and "num_samples" in str(error)
        why = "its size is not stated" if unknown else reason(error)
        remedy = "set data.download=true" if unknown else "check data.source, data.root and the name of the split"
        raise DataError(f"cannot open the split '{split}' of {settings.source}: {why}; {remedy}") from error


def _hf_splits(settings: schema.Data) -> tuple[str, str]:
    import datasets

    name = settings.source.partition("/")[2]
    try:
        there = list(datasets.get_dataset_split_names(name))
    except Exception as error:  # anything from the hub's client
        raise DataError(f"cannot find {settings.source}: {reason(error)}; give a hub name or a local folder") from error
    return _choose(settings, there)


def _wds_splits(settings: schema.Data) -> tuple[str, str]:
    if not settings.root:
        raise DataError("wds/ needs data.root: the folder or address that the shards lie under")
    info = next((p for p in (Path(settings.root, n) for n in ("_info.json", "info.json")) if p.is_file()), None)
    try:
        there = list(json.loads(info.read_text(encoding="utf-8"))["splits"]) if info else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the splits in '{info}': {reason(error)}; see webdataset's info format") from error
    return _choose(settings, there)


def _choose(settings: schema.Data, there: list[str]) -> tuple[str, str]:
    train = settings.train_split
    val = settings.val_split or next((name for name in EVALUATION_SPLITS if name in there and name != train), "")
    for key, split in (("train", train), ("val", val)):
        if split not in there and not any(mark in split for mark in ("[", ".tar", "..")):
            raise DataError(
                f"no split '{split or 'val'}' in {settings.source}; found {shown(there) or 'none'}: name one with "
                f"data.{key}_split.{did_you_mean(split, there)}"
            )
    if train == val:
        raise DataError(f"training and evaluation both read the split '{train}'; name another with data.val_split")
    return train, val
