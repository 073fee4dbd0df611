"""Image folders and tars: one folder per class within one folder (or tar) per split.

Accepted: a folder with the splits as sub-folders or as tars (`train/` or `train.tar`, ...), and a single tar with the
splits as folders. A split is found by its exact name or not at all: timm falls back to the whole root, which trains on
the evaluation images. Class names are the names of the folders that hold the images; ids follow their natural order,
or the class map.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data import create_dataset
from timm.utils.misc import natural_key

from lbc_cli.data.checks import find_unreadable, require_same_classes, shown, unreadable_error, unwatched
from lbc_cli.data.images import DataSource, FileSamples, ImageSet, Samples
from lbc_cli.data.tar import Contents, TarSamples, empty_folders, scan_tar, split_members
from lbc_cli.errors import DataError, did_you_mean
from lbc_cli.recipe import schema

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
EVALUATION_SPLITS = ("val", "validation", "test")
COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


@dataclass(frozen=True)
class Split:
    """The images of one split, before class ids are given."""

    where: str
    paths: Sequence[str]
    names: Sequence[str]
    """Class name of each image: its folder's name, "" for an image outside any class folder."""
    empty: Sequence[str]
    """Class folders without an image."""
    tar: tuple[Path, Contents] | None = None

    def samples(self, ids: Mapping[str, int]) -> Samples:
        """The images with their class ids."""
        labels = [ids[name] for name in self.names]
        return TarSamples(self.tar[0], self.tar[1].images, labels) if self.tar else FileSamples(self.paths, labels)


def open_folders(settings: schema.Data, progress: Callable[[int], None] = unwatched) -> DataSource:
    """Open a folder or tar of image folders, with every guard.

    Args:
        settings: `source` is the folder or tar.
        progress: told how many images more were checked.

    Raises:
        DataError: whatever is missing, damaged or inconsistent, before the first image is used.
    """
    root = Path(settings.source).expanduser()
    train, val = read_splits(root, settings.train_split, settings.val_split)
    ids = class_ids(train, val, read_class_map(settings.class_map, root) if settings.class_map else None, root)
    sets, dropped = checked_sets([train.samples(ids), val.samples(ids)], settings, progress)
    name = root.resolve().name.removesuffix(".tar")
    return DataSource(sets[0], sets[1], len(ids), tuple(ids), name, dropped=dropped)


def read_splits(root: Path, train: str, val: str) -> tuple[Split, Split]:
    """Find and read the training and the evaluation split.

    Args:
        root: a folder, or an uncompressed tar.
        train: name of the training split.
        val: name of the evaluation split; "" takes the first of val, validation and test that is there.
    """
    if not root.exists():
        raise DataError(f"no such data: '{root}' is neither a folder nor a tar; give an existing path, or 'digits'")
    if root.is_file() and root.suffix.lower() != ".tar":
        unpack = "unpack it first" if root.suffix.lower() in COMPRESSED else "give a folder or a .tar"
        raise DataError(f"'{root}' is a file that cannot be read as image folders; {unpack}")
    whole = scan_tar(root, EXTENSIONS) if root.is_file() else None
    training = _find(root, whole, train)
    if training is None:
        raise _no_split(root, whole, "train", train)
    candidates = (val,) if val else tuple(name for name in EVALUATION_SPLITS if name != train)
    for name in candidates:
        evaluation = _find(root, whole, name)
        if evaluation is not None:
            _require_apart(training, evaluation)
            return training, evaluation
    raise _no_split(root, whole, "val", val)


def _find(root: Path, whole: Contents | None, split: str) -> Split | None:
    if whole is not None:
        found = split_members(whole, split)
        return None if found is None else _tar_split(root, f"{root}:{'/'.join(found[1])}", found[0], len(found[1]))
    if (root / split).is_dir() and (root / split).resolve() != root.resolve():
        return _folder_split(root / split)
    archive = root / f"{split}.tar"
    return _tar_split(archive, str(archive), scan_tar(archive, EXTENSIONS), 0) if archive.is_file() else None


def _folder_split(folder: Path) -> Split:
    empty = _empty_class_folders(folder)
    try:
        reader = create_dataset("", str(folder), search_split=False, input_key=";".join(EXTENSIONS)).reader
    except RuntimeError as error:  # timm's way to say that there is no image at all
        raise _no_images(str(folder)) from error
    classes = {index: name for name, index in reader.class_to_idx.items()}
    paths, names = zip(*((path, classes[index]) for path, index in reader.samples), strict=True)
    return Split(str(folder), paths, names, empty)


def _tar_split(path: Path, where: str, contents: Contents, depth: int) -> Split:
    images = sorted(contents.images, key=lambda member: natural_key("/".join(member.parts)))
    if not images:
        raise _no_images(where)
    names = [member.parts[-2] if len(member.parts) > depth + 1 else "" for member in images]
    empty = empty_folders(contents)
    return Split(where, (), names, empty, tar=(path, Contents(images, contents.folders)))


def _empty_class_folders(root: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder '{error.filename}': {error.strerror}; check its permissions")

    empty = []
    for folder, below, files in os.walk(root, followlinks=True, onerror=refuse):
        hidden = Path(folder).name.startswith(".")
        if not below and not hidden and not any(file.lower().endswith(EXTENSIONS) for file in files):
            empty.append(folder)
    return sorted(empty)


def _no_images(where: str) -> DataError:
    return DataError(f"no images in '{where}': expected CLASS/IMAGE with one of {', '.join(EXTENSIONS)}")


def _no_split(root: Path, whole: Contents | None, key: str, split: str) -> DataError:
    if whole is None:
        there = sorted(p.name.removesuffix(".tar") for p in root.iterdir() if p.is_dir() or p.suffix == ".tar")
    else:
        there = sorted({member.parts[0] for member in whole.images})
    wanted = f"'{split}'" if split else "any of " + ", ".join(f"'{name}'" for name in EVALUATION_SPLITS)
    kind = "training" if key == "train" else "evaluation"
    return DataError(
        f"no {kind} split in '{root}': looked for {wanted}, found {shown(there) or 'no folder'}; "
        f"name one with data.{key}_split.{did_you_mean(split or 'val', there)}"
    )


def _require_apart(train: Split, val: Split) -> None:
    one, other = Path(train.where).resolve(), Path(val.where).resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise DataError(
            f"training reads '{train.where}' and evaluation '{val.where}', which hold the same images; name another "
            "split with data.val_split"
        )


def read_class_map(file: str, root: Path) -> dict[str, int]:
    """Read class names, one a line, whose order gives the class ids.

    Args:
        file: the text file; looked for as given, then in `root`.
        root: the data's own folder.

    Raises:
        DataError: missing, not text, empty, or with a blank or repeated line.
    """
    path = next((p for p in (Path(file).expanduser(), root / file) if p.is_file()), None)
    if path is None:
        raise DataError(f"no such class map: '{file}'; give a text file with one class name a line")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the class map '{path}': {error}; it must be UTF-8 text") from error
    ids: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name or name in ids:
            fault = f"repeats '{name}'" if name else "is blank"
            raise DataError(f"line {number + 1} of the class map '{path}' {fault}; class ids would shift: fix the line")
        ids[name] = number
    if not ids:
        raise DataError(f"the class map '{path}' is empty; write one class name a line")
    return ids


def class_ids(train: Split, val: Split, class_map: Mapping[str, int] | None, root: Path) -> dict[str, int]:
    """Class name -> id, in order of the ids.

    Without a class map, the folders of both splits must be the same and each must hold images.

    Raises:
        DataError: images outside class folders, empty or differing class folders, folders the class map does not name.
    """
    for split in (train, val):
        _require_class_folders(split, class_map)
    if class_map is not None:
        return dict(class_map)
    require_same_classes(train.names, val.names, f"'{root}'")
    if len(set(train.names)) < 2:
        raise DataError(
            f"'{train.where}' has the single class '{train.names[0]}'; a class is named by the folder that directly "
            "holds its images, and there must be two or more"
        )
    return {name: index for index, name in enumerate(sorted(set(train.names), key=natural_key))}


def _require_class_folders(split: Split, class_map: Mapping[str, int] | None) -> None:
    if "" in split.names:
        raise DataError(f"images outside any class folder in '{split.where}'; move each into the folder of its class")
    if class_map is None and split.empty:
        raise DataError(
            f"class folders without an image: {shown(split.empty)}; class ids would shift: fill or remove them, or fix "
            "the ids with data.class_map"
        )
    unknown = sorted(set(split.names) - set(class_map)) if class_map is not None else []
    if unknown:
        raise DataError(
            f"class folders in '{split.where}' that the class map does not name: {shown(unknown)}; add them to the map "
            f"or move them out of the data.{did_you_mean(unknown[0], class_map or ())}"
        )


def checked_sets(
    splits: Sequence[Samples], settings: schema.Data, progress: Callable[[int], None] = unwatched
) -> tuple[list[ImageSet], tuple[str, ...]]:
    """Image sets without unreadable images, or an error that lists them.

    Args:
        splits: the images of each split.
        settings: `check` and `unreadable`.
        progress: told how many images more were checked.

    Returns:
        A set per split, and the paths that were left out.
    """
    if settings.check == "off":
        if settings.unreadable == "skip":
            raise DataError("data.unreadable='skip' needs a check: set data.check to 'fast' or 'full'")
        return [ImageSet(samples) for samples in splits], ()
    found = [find_unreadable(samples, full=settings.check == "full", progress=progress) for samples in splits]
    bad = [(s.name(index), why) for s, pairs in zip(splits, found, strict=True) for index, why in pairs]
    if bad and settings.unreadable == "fail":
        raise unreadable_error(bad)
    return [_without(s, {index for index, _ in pairs}) for s, pairs in zip(splits, found, strict=True)], tuple(
        path for path, _ in bad
    )


def _without(samples: Samples, bad: set[int]) -> ImageSet:
    kept = [index for index in range(len(samples)) if index not in bad]
    if not kept:
        raise DataError(f"no readable image is left among {len(samples)}, the first being {samples.name(0)}")
    return ImageSet(samples, kept)
