"""From a recipe's data table to a `DataSource`: which kind of source it is, and what that kind cannot take."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset

from lbc_cli.data.checks import require_same_labels, unwatched
from lbc_cli.data.digits import open_digits
from lbc_cli.data.folders import checked_sets, open_folders
from lbc_cli.data.hub import open_hfds, open_stream
from lbc_cli.data.images import DataSource, FileSamples, Samples, TorchSamples
from lbc_cli.errors import DataError, did_you_mean
from lbc_cli.recipe import schema

_HALVES = (("train", "training"), ("test", "val", "valid", "validation", "eval", "evaluation"))


@dataclass(frozen=True, slots=True)
class TorchSet:
    """A torchvision data set that timm creates: the split names it understands, the default first."""

    train: Sequence[str] = _HALVES[0]
    val: Sequence[str] = _HALVES[1]


TORCH_SETS: dict[str, TorchSet] = {
    **{name: TorchSet() for name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist")},
    "qmnist": TorchSet(("train",), ("test", "test10k", "test50k")),
    "imagenet": TorchSet(("train",), ("val", "validation")),
    "inaturalist": TorchSet(
        ("2021_train", "train", "2021_train_mini", "2017", "2018", "2019"), ("2021_valid", "val", "validation")
    ),
    "places365": TorchSet(("train-standard", "train", "train-challenge"), ("val", "validation")),
}


def open_data(settings: schema.Data, progress: Callable[[int], None] = unwatched) -> DataSource:
    """Open the data that a recipe names and check it, before anything is trained.

    Args:
        settings: the recipe's data table.
        progress: told how many images of a folder or tar more were checked.

    Raises:
        DataError: one line that says what is missing, damaged or inconsistent, and the remedy.
    """
    source = settings.source
    if not source:
        raise DataError(
            "no data given; name a source with --data (data.source): 'digits' (bundled), an image folder, a tar, "
            "torch/NAME, hfds/NAME, hfids/NAME or wds/NAME"
        )
    if source == "digits":
        return _open_bundled(settings)
    prefix, _, name = source.partition("/")
    opener = _OPENERS.get(prefix.lower())
    if opener is not None and name:
        return opener(settings)
    _refuse(settings, "an image folder or tar, which is its own root,", root="", download=False)
    if not Path(source).expanduser().exists():
        raise DataError(
            f"no such data: '{source}' is neither a bundled set, nor a folder or tar, nor one of "
            f"{', '.join(f'{known}/NAME' for known in _OPENERS)}."
            f"{did_you_mean(source, ['digits'])}{did_you_mean(prefix, _OPENERS)}"
        )
    return open_folders(settings, progress)


def _open_bundled(settings: schema.Data) -> DataSource:
    _refuse(settings, "the bundled digits", root="", download=False, class_map="", train_split="train")
    if settings.val_split not in ("", "val"):
        raise DataError(
            f"the bundled digits have the splits 'train' and 'val'; got data.val_split='{settings.val_split}'"
        )
    return open_digits()


def _refuse(settings: schema.Data, what: str, **defaults: Any) -> None:
    """Refuse keys that this kind of source would ignore."""
    for key, default in defaults.items():
        value = getattr(settings, key)
        if value != default:
            raise DataError(f"{what} takes no data.{key}; got {value!r}: leave it at {default!r}")


def open_torch(settings: schema.Data) -> DataSource:
    """Open one of torchvision's data sets through timm."""
    name = settings.source.partition("/")[2].lower()
    known = TORCH_SETS.get(name)
    if known is None:
        raise DataError(
            f"unknown torchvision set 'torch/{name}'; known: {', '.join(TORCH_SETS)}.{did_you_mean(name, TORCH_SETS)}"
        )
    _refuse(settings, f"torch/{name}", class_map="")
    if not settings.root:
        raise DataError(f"torch/{name} needs data.root: the folder where torchvision keeps (or downloads) it")
    train = _torch_dataset(settings, name, _torch_split(name, known.train, settings.train_split, "train_split"))
    val = _torch_dataset(settings, name, _torch_split(name, known.val, settings.val_split or known.val[0], "val_split"))
    classes = _torch_classes(train, name)
    samples = [_torch_samples(dataset, f"torch/{name}") for dataset in (train, val)]
    for one in samples:
        require_same_labels((one.label(index) for index in range(len(one))), len(classes), f"torch/{name}")
    sets, dropped = checked_sets(samples, settings)
    return DataSource(sets[0], sets[1], len(classes), classes, f"torch/{name}", dropped=dropped)


def _torch_split(name: str, known: Sequence[str], split: str, key: str) -> str:
    if split not in known:
        # timm reads an unknown name as the evaluation split, and would train on it.
        raise DataError(
            f"torch/{name} has no split '{split}' for data.{key}; known: {', '.join(known)}."
            f"{did_you_mean(split, known)}"
        )
    return split


def _torch_dataset(settings: schema.Data, name: str, split: str) -> Any:
    root = Path(settings.root).expanduser()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torchvision prints its progress; stdout is for results
            return create_dataset(f"torch/{name}", str(root), split=split, download=settings.download)
    except (RuntimeError, OSError, ValueError) as error:
        remedy = "" if settings.download else ", or set data.download=true where torchvision can fetch it"
        raise DataError(
            f"cannot open the {split} split of torch/{name} in '{root}': {' '.join(str(error).split())}; "
            f"put it there{remedy}"
        ) from error


def _torch_classes(dataset: Any, name: str) -> tuple[str, ...]:
    classes = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    if not classes:
        raise DataError(f"torch/{name} does not tell its classes; unpack it into image folders and give that folder")
    return tuple(entry if isinstance(entry, str) else ", ".join(entry) for entry in classes)


def _torch_samples(dataset: Any, title: str) -> Samples:
    if hasattr(dataset, "imgs"):
        return FileSamples(*zip(*dataset.imgs, strict=True))
    if hasattr(dataset, "all_categories"):
        rows = [(str(Path(dataset.root, dataset.all_categories[label], file)), label) for label, file in dataset.index]
        return FileSamples(*zip(*rows, strict=True))
    labels = np.asarray(dataset.targets)
    return TorchSamples(dataset, labels[:, 0] if labels.ndim == 2 else labels, title)  # type: ignore[arg-type]


_OPENERS: dict[str, Callable[[schema.Data], DataSource]] = {
    "torch": open_torch,
    "hfds": open_hfds,
    "hfids": open_stream,
    "wds": open_stream,
}
