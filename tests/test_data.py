"""Data: the guards, the fixed digits, and batches that are a function of (seed, epoch, place)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lbc_cli.data import (
    DataSource,
    EpochSampler,
    Loaders,
    epoch_seed,
    generated_data,
    make_loaders,
    open_data,
    seed_everything,
)
from lbc_cli.data import hub as hub_module
from lbc_cli.data import loaders as loaders_module
from lbc_cli.data.checks import why_unreadable
from lbc_cli.data.digits import evaluation_mask, load_digits
from lbc_cli.data.rng import isolated_rng
from lbc_cli.errors import DataError
from lbc_cli.recipe import schema

CONFIG = {
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
CPU = torch.device("cpu")
CLASSES = ("apple", "pear", "quince")


def picture(seed: int, side: int = 24, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def write_folder(root: Path, splits: dict[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """A folder set with `splits[name]` images per class."""
    seed = 0
    for split, count in splits.items():
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                (root / split / label / f"{number}.jpg").write_bytes(picture(seed))
                seed += 1
    return root


def pack(root: Path, path: Path, prefix: str = "") -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(root, arcname=prefix or ".")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "fruit", {"train": 5, "val": 3})


def settings(source: Path | str, **options: Any) -> schema.Data:
    return schema.Data(source=str(source), **{"batch_size": 4, "workers": 0, **options})


def loaders_of(source: DataSource, augment: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Loaders:
    return make_loaders(
        source,
        settings("digits", **options),
        schema.Augment(**(augment or {})),
        data_config=CONFIG,
        device=CPU,
        seed=seed,
    )


def epoch_of(loaders: Loaders, epoch: int, first_batch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loaders.set_epoch(epoch, first_batch)
    return list(loaders.train)


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


class TestDigits:
    def test_the_arrays_are_the_published_ones(self) -> None:
        images, labels = load_digits()
        assert images.shape == (1797, 8, 8)
        assert images.dtype == labels.dtype == np.uint8
        assert (images.min(), images.max()) == (0, 16)
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"

    def test_the_split_is_fixed_and_stratified(self) -> None:
        labels = load_digits()[1]
        held_out = evaluation_mask(labels)
        assert held_out.sum() == 355
        assert np.bincount(labels[held_out]).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
        packed = np.packbits(held_out).tobytes()
        assert hashlib.sha256(packed).hexdigest()[:16] == hashlib.sha256(packed_reference(labels)).hexdigest()[:16]

    def test_it_yields_rgb_images_scaled_to_bytes(self) -> None:
        source = open_data(settings("digits"))
        assert (len(source.train), len(source.val), source.num_classes) == (1442, 355, 10)
        assert source.class_names == tuple("0123456789")
        image, label = source.train[0]
        assert image.mode == "RGB"
        assert image.size == (8, 8)
        assert label == load_digits()[1][0]
        expected = np.floor(load_digits()[0][0].astype(float) * 255 / 16 + 0.5)
        assert np.array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=-1))

    def test_the_attribution_travels_with_the_file(self) -> None:
        from importlib.resources import files

        head = files("lbc_cli.data").joinpath("digits.safetensors").read_bytes()[:2000]
        assert b"10.24432/C50P49" in head
        assert b"CC BY 4.0" in head

    @pytest.mark.parametrize("option", [{"root": "/x"}, {"class_map": "m.txt"}, {"download": True}, {"val_split": "x"}])
    def test_keys_that_it_would_ignore_are_refused(self, option: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=next(iter(option))):
            open_data(settings("digits", **option))


def packed_reference(labels: np.ndarray) -> bytes:
    seen: Counter[int] = Counter()
    held_out = []
    for label in labels.tolist():
        seen[label] += 1
        held_out.append(seen[label] % 5 == 0)
    return np.packbits(np.array(held_out)).tobytes()


class TestFolders:
    def test_end_to_end(self, folder: Path) -> None:
        source = open_data(settings(folder))
        assert source.class_names == CLASSES
        assert (len(source.train), len(source.val), source.name) == (15, 9, "fruit")
        loaders = loaders_of(source, batch_size=4)
        images, targets = next(iter(loaders.train))
        assert images.shape == (4, 3, 16, 16)
        assert images.dtype == torch.float32
        assert targets.dtype == torch.int64
        assert len(loaders.train) == 3
        assert loaders.train.samples == 12

    @pytest.mark.parametrize(("names", "found"), [(("test", "validation"), "validation"), (("test",), "test")])
    def test_the_evaluation_split_is_found_by_name(self, tmp_path: Path, names: tuple[str, ...], found: str) -> None:
        root = write_folder(tmp_path / "set", {"train": 1, **dict.fromkeys(names, 2)})
        source = open_data(settings(root))
        assert Path(source.val.name(0)).parts[-3] == found  # type: ignore[attr-defined]

    def test_a_missing_source_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no such data: .*nowhere"):
            open_data(settings(tmp_path / "nowhere"))
        with pytest.raises(DataError, match="Did you mean 'digits'"):
            open_data(settings("digit"))
        with pytest.raises(DataError, match="no data given"):
            open_data(settings(""))

    @pytest.mark.parametrize(("present", "missing"), [("val", "training"), ("train", "evaluation")])
    def test_a_missing_split_never_falls_back_to_the_root(self, tmp_path: Path, present: str, missing: str) -> None:
        root = write_folder(tmp_path / "set", {present: 2})
        with pytest.raises(DataError, match=f"no {missing} split"):
            open_data(settings(root))

    def test_a_misspelt_split_is_met_with_a_suggestion(self, folder: Path) -> None:
        with pytest.raises(DataError, match="Did you mean 'train'"):
            open_data(settings(folder, train_split="trian"))

    @pytest.mark.parametrize("val", ["train", "train/apple", "."])
    def test_evaluating_on_training_images_is_refused(self, folder: Path, val: str) -> None:
        with pytest.raises(DataError, match=r"same images|no evaluation split"):
            open_data(settings(folder, val_split=val))

    def test_a_link_to_the_training_split_is_refused(self, folder: Path) -> None:
        (folder / "holdout").symlink_to(folder / "train")
        with pytest.raises(DataError, match="same images"):
            open_data(settings(folder, val_split="holdout"))

    def test_classes_that_differ_are_listed(self, folder: Path) -> None:
        (folder / "val" / "pear").rename(folder / "val" / "plum")
        with pytest.raises(DataError, match=r"only training: 'pear'; only evaluation: 'plum'"):
            open_data(settings(folder))

    def test_empty_class_folders_are_listed(self, folder: Path) -> None:
        (folder / "train" / "banana").mkdir()
        (folder / "val" / "banana").mkdir()
        with pytest.raises(DataError, match=r"without an image: .*banana"):
            open_data(settings(folder))

    def test_images_outside_class_folders_are_refused(self, folder: Path) -> None:
        (folder / "train" / "stray.jpg").write_bytes(picture(0))
        with pytest.raises(DataError, match="outside any class folder"):
            open_data(settings(folder))

    def test_a_layout_that_hides_the_classes_is_refused(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            for label in CLASSES:
                (tmp_path / split / label / "images").mkdir(parents=True)
                (tmp_path / split / label / "images" / "0.png").write_bytes(picture(0, form="PNG"))
        with pytest.raises(DataError, match="single class 'images'"):
            open_data(settings(tmp_path))

    def test_folders_without_images_and_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "set" / "train" / "a").mkdir(parents=True)
        with pytest.raises(DataError, match="no images"):
            open_data(settings(tmp_path / "set"))
        (tmp_path / "set.tar.gz").write_bytes(b"x")
        with pytest.raises(DataError, match="unpack it first"):
            open_data(settings(tmp_path / "set.tar.gz"))

    def test_a_root_beside_a_folder_is_refused(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"takes no data.root"):
            open_data(settings(folder, root=str(folder)))


class TestClassMap:
    def test_it_fixes_the_ids(self, folder: Path) -> None:
        (folder / "map.txt").write_text("quince\nfig\npear\napple\n")
        source = open_data(settings(folder, class_map="map.txt"))
        assert source.class_names == ("quince", "fig", "pear", "apple")
        assert source.num_classes == 4
        labels = {Path(source.val.name(i)).parts[-2]: source.val[i][1] for i in range(len(source.val))}  # type: ignore[attr-defined]
        assert labels == {"quince": 0, "pear": 2, "apple": 3}

    def test_it_settles_classes_that_differ(self, folder: Path) -> None:
        for path in (folder / "val" / "pear").iterdir():
            path.unlink()
        (folder / "map.txt").write_text("\n".join(CLASSES))
        source = open_data(settings(folder, class_map="map.txt"))
        assert len(source.val) == 6
        assert source.num_classes == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("apple\npear\n", "does not name: 'quince'"),
            ("apple\n\npear\nquince\n", "line 2 .* is blank"),
            ("apple\npear\napple\nquince\n", "line 3 .* repeats 'apple'"),
            ("", "is empty"),
            (b"\xff\xfe\x00", "UTF-8"),
        ],
    )
    def test_faulty_maps_are_refused(self, folder: Path, text: str | bytes, message: str) -> None:
        (folder / "map.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DataError, match=message):
            open_data(settings(folder, class_map="map.txt"))

    def test_a_missing_map_is_named(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"no such class map: 'gone.txt'"):
            open_data(settings(folder, class_map="gone.txt"))


def damage(folder: Path, kind: str) -> Path:
    path = folder / "train" / "pear" / "2.jpg"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "text": b"this is not an image",
            "empty": b"",
            "zero-filled tail": whole[:300] + bytes(len(whole) - 300),
        }[kind]
    )
    return path


class TestUnreadable:
    @pytest.mark.parametrize("check", ["fast", "full"])
    @pytest.mark.parametrize("kind", ["truncated", "text", "empty", "zero-filled tail"])
    def test_each_kind_is_found_and_named(self, folder: Path, kind: str, check: str) -> None:
        path = damage(folder, kind)
        with pytest.raises(DataError, match="1 unreadable image: ") as caught:
            open_data(settings(folder, check=check))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_all_are_listed_in_the_notes(self, folder: Path) -> None:
        bad = [folder / split / label / "0.jpg" for split in ("train", "val") for label in CLASSES]
        for path in bad:
            path.write_bytes(b"")
        with pytest.raises(DataError, match=r"6 unreadable images: .*; and 1 more") as caught:
            open_data(settings(folder))
        assert all(str(path) in caught.value.__notes__[0] for path in bad)

    def test_skipping_drops_and_never_substitutes(self, folder: Path) -> None:
        whole = open_data(settings(folder))
        path = damage(folder, "truncated")
        source = open_data(settings(folder, unreadable="skip"))
        assert source.dropped == (str(path),)
        names = [source.train.name(i) for i in range(len(source.train))]  # type: ignore[attr-defined]
        expected = [whole.train.name(i) for i in range(len(whole.train))]  # type: ignore[attr-defined]
        expected.remove(str(path))
        assert names == expected
        labels = [source.train[i][1] for i in range(len(source.train))]
        assert labels == [CLASSES.index(Path(name).parts[-2]) for name in names]

    def test_skipping_needs_a_check(self, folder: Path) -> None:
        with pytest.raises(DataError, match="needs a check"):
            open_data(settings(folder, check="off", unreadable="skip"))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_unreadable_image_stops_the_iteration(self, folder: Path, workers: int) -> None:
        path = damage(folder, "text")
        loaders = loaders_of(open_data(settings(folder, check="off")), batch_size=5, workers=workers)
        with pytest.raises(DataError, match=r"cannot read the image .*pear/2\.jpg: not an image") as caught:
            list(loaders.train)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP"])
    def test_no_false_alarm_whatever_the_format_behind_the_name(self, form: str) -> None:
        assert why_unreadable(io.BytesIO(picture(1, form=form)), full=False) == ""

    def test_a_readable_image_with_a_tail_is_no_false_alarm(self) -> None:
        assert why_unreadable(io.BytesIO(picture(1) + b"trailing bytes of a camera"), full=False) == ""

    def test_a_png_cut_short_is_found(self) -> None:
        assert why_unreadable(io.BytesIO(picture(1, form="PNG")[:-300]), full=False) == "image file is truncated"


class TestTar:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("prefix", ["", "fruit"])
    def test_it_reads_what_the_folder_reads(self, folder: Path, tmp_path: Path, workers: int, prefix: str) -> None:
        source = open_data(settings(pack(folder, tmp_path / "fruit.tar", prefix)))
        assert (source.class_names, source.name) == (CLASSES, "fruit")
        source.train[0]  # an open handle in the parent is what breaks forked readers
        options = {"batch_size": 4, "workers": workers}
        expected = loaders_of(open_data(settings(folder)), **options)
        actual = loaders_of(source, **options)
        assert same(epoch_of(actual, 3), epoch_of(expected, 3))
        assert same(list(actual.val), list(expected.val))

    def test_one_tar_per_split(self, folder: Path, tmp_path: Path) -> None:
        both = tmp_path / "both"
        both.mkdir()
        for split in ("train", "val"):
            pack(folder / split, both / f"{split}.tar")
        source = open_data(settings(both))
        assert (len(source.train), len(source.val), source.class_names) == (15, 9, CLASSES)

    def test_a_tar_inside_the_tar_is_a_folder(self, folder: Path, tmp_path: Path) -> None:
        nested = tmp_path / "nested"
        for split in ("train", "val"):
            (nested / split).mkdir(parents=True)
            for label in CLASSES:
                pack(folder / split / label, nested / split / f"{label}.tar")
        source = open_data(settings(pack(nested, tmp_path / "nested.tar")))
        flat = open_data(settings(folder))
        assert (len(source.train), source.class_names) == (15, CLASSES)
        assert all(np.array_equal(source.train[i][0], flat.train[i][0]) for i in range(15))

    def test_a_tar_without_splits_is_refused(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no training split"):
            open_data(settings(pack(folder / "train", tmp_path / "flat.tar")))

    def test_an_unreadable_member_is_named(self, folder: Path, tmp_path: Path) -> None:
        damage(folder, "truncated")
        with pytest.raises(DataError, match=r"fruit\.tar:train/pear/2\.jpg"):
            open_data(settings(pack(folder, tmp_path / "fruit.tar")))

    def test_empty_folders_are_refused(self, folder: Path, tmp_path: Path) -> None:
        (folder / "train" / "banana").mkdir()
        with pytest.raises(DataError, match=r"without an image: .*train/banana"):
            open_data(settings(pack(folder, tmp_path / "fruit.tar")))

    @pytest.mark.parametrize("kept", [0.3, 0.5, 0.9])
    def test_a_truncated_archive_is_refused(self, folder: Path, tmp_path: Path, kept: float) -> None:
        path = pack(folder, tmp_path / "fruit.tar")
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        path.write_bytes(path.read_bytes()[: int((last.offset_data + last.size) * kept)])
        with pytest.raises(DataError, match=r"the archive is truncated|no end mark|cannot read the archive"):
            open_data(settings(path))

    def test_a_damaged_header_does_not_shorten_the_set(self, folder: Path, tmp_path: Path) -> None:
        path = pack(folder, tmp_path / "fruit.tar")
        with tarfile.open(path) as archive:
            middle = archive.getmembers()[12]
        raw = bytearray(path.read_bytes())
        raw[middle.offset + 150] ^= 0xFF
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"no end mark|cannot read the archive"):
            open_data(settings(path))

    def test_links_and_compressed_archives_are_refused(self, folder: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "linked.tar", "w") as archive:
            entry = tarfile.TarInfo("train/apple/0.jpg")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(entry)
        with pytest.raises(DataError, match="is a link"):
            open_data(settings(tmp_path / "linked.tar"))
        with tarfile.open(tmp_path / "squeezed.tar", "w:gz") as archive:
            archive.add(folder, arcname=".")
        with pytest.raises(DataError, match="uncompressed"):
            open_data(settings(tmp_path / "squeezed.tar"))


class TestOtherSources:
    def test_torch_sets(self) -> None:
        with pytest.raises(DataError, match="Did you mean 'cifar10'"):
            open_data(settings("torch/cifr10", root="/x"))
        with pytest.raises(DataError, match=r"needs data.root"):
            open_data(settings("torch/cifar10"))
        with pytest.raises(DataError, match="no split 'trian'"):
            open_data(settings("torch/cifar10", root="/x", train_split="trian"))

    def test_a_torch_set_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data.download=true") as caught:
            open_data(settings("torch/mnist", root=str(tmp_path)))
        assert "\n" not in str(caught.value)

    def test_a_torch_set_of_grey_images_becomes_rgb(self, tmp_path: Path) -> None:
        write_mnist(tmp_path / "MNIST" / "raw")
        source = open_data(settings("torch/mnist", root=str(tmp_path)))
        assert (len(source.train), len(source.val), source.num_classes) == (20, 10, 10)
        image, label = source.train[3]
        assert (image.mode, image.size, label) == ("RGB", (28, 28), 3)
        loaders = loaders_of(source, batch_size=4)
        assert next(iter(loaders.train))[0].shape == (4, 3, 16, 16)

    @pytest.mark.parametrize(("source", "extra"), [("hfds/x", "hf"), ("hfids/x", "hf"), ("wds/x", "wds")])
    def test_missing_packages_are_named_with_the_line(
        self, monkeypatch: pytest.MonkeyPatch, source: str, extra: str
    ) -> None:
        monkeypatch.setattr(hub_module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match=rf'pip install "lbc-cli\[{extra}\]"'):
            open_data(settings(source))


class TestShards:
    """Needs the package webdataset, which the `wds` extra installs."""

    @pytest.fixture
    def shards(self, tmp_path: Path) -> dict[str, Any]:
        pytest.importorskip("webdataset")
        splits = {}
        for split, count in (("train", 4), ("validation", 2)):
            names = [f"fruit-{split}-{number:04d}.tar" for number in range(count)]
            for number, name in enumerate(names):
                write_shard(tmp_path / name, number)
            splits[split] = {
                "name": split,
                "num_samples": 6 * count,
                "filenames": names,
                "shard_lengths": [6] * count,
            }
        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
        (tmp_path / "map.txt").write_text("\n".join(CLASSES))
        return {"root": str(tmp_path), "class_map": "map.txt"}

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_are_a_function_of_seed_and_epoch(self, shards: dict[str, Any], workers: int) -> None:
        source = open_data(settings("wds/fruit", **shards))
        assert (source.class_names, len(source.val)) == (CLASSES, 12)
        one, other = (loaders_of(source, AUGMENT, workers=workers) for _ in range(2))
        first, expected = epoch_of(one, 0), epoch_of(one, 2)
        assert len(expected) == len(one.train) == 6
        assert not same(first, expected)
        assert same(epoch_of(other, 2), expected)
        assert same(epoch_of(other, 2, first_batch=2), expected[2:])
        assert sum(len(images) for images, _ in one.val) == one.val.samples == 12

    def test_a_damaged_image_stops_the_iteration(self, shards: dict[str, Any]) -> None:
        write_shard(Path(shards["root"]) / "fruit-train-0002.tar", 2, damaged=3)
        with pytest.raises(DataError, match=r"cannot read the image s0002_3 in .*fruit-train-0002\.tar: not an image"):
            list(loaders_of(open_data(settings("wds/fruit", **shards))).train)

    def test_what_a_stream_cannot_do_is_refused(self, shards: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=r"give data\.class_map"):
            open_data(settings("wds/fruit", root=shards["root"]))
        with pytest.raises(DataError, match=r"no split 'validatoin'.*Did you mean 'validation'"):
            open_data(settings("wds/fruit", **shards, val_split="validatoin"))
        with pytest.raises(DataError, match="cannot repeat images"):
            loaders_of(open_data(settings("wds/fruit", **shards)), {"aug_repeats": 3})


def write_shard(path: Path, number: int, damaged: int = -1) -> None:
    with tarfile.open(path, "w") as archive:
        for index in range(6):
            image = b"no image" if index == damaged else picture(100 * number + index)
            for suffix, content in (("jpg", image), ("cls", str(index % 3).encode())):
                entry = tarfile.TarInfo(f"s{number:04d}_{index}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


class TestTables:
    """Needs the package datasets, which the `hf` extra installs."""

    def test_a_local_table(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        root = str(tmp_path / "cache")
        (folder / "val").rename(folder / "validation")
        source = open_data(settings(f"hfds/{folder}", root=root))
        assert (source.class_names, source.name) == (CLASSES, "hfds/fruit")
        assert (len(source.train), len(source.val)) == (15, 9)
        assert source.val[8][1] == 2
        with pytest.raises(DataError, match=r"no split 'train2'.*Did you mean 'train'"):
            open_data(settings(f"hfds/{folder}", root=root, train_split="train2"))


def write_mnist(folder: Path) -> None:
    folder.mkdir(parents=True)
    for stem, count in (("train", 20), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


AUGMENT: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "vflip": 0.5}
MIX: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


class TestOrder:
    def test_it_is_a_function_of_seed_and_epoch(self) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            sampler = EpochSampler(50, seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        assert order(1, 4) == order(1, 4)
        assert sorted(order(1, 4)) == list(range(50))
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6

    @pytest.mark.parametrize(("length", "expected"), [(100, 100), (256, 256), (700, 512)])
    def test_repeated_augmentation(self, length: int, expected: int) -> None:
        sampler = EpochSampler(length, seed=0, repeats=3)
        order = list(sampler)
        assert len(sampler) == len(order) == expected
        whole = order[: expected // 3 * 3]
        assert all(len(set(whole[start : start + 3])) == 1 for start in range(0, len(whole), 3))
        assert len(set(order)) == -(-expected // 3)

    def test_repeats_are_those_of_timm(self) -> None:
        from timm.data.distributed_sampler import RepeatAugSampler

        for length in (256, 700):  # below 256, timm before 1.0.31 shows no images at all
            theirs = RepeatAugSampler(range(length), num_replicas=1, rank=0, num_repeats=3)
            assert len(theirs) == len(EpochSampler(length, seed=0, repeats=3))
            assert Counter(Counter(theirs).values()) == Counter(Counter(EpochSampler(length, 0, 3)).values())

    def test_copies_of_an_image_are_augmented_apart(self) -> None:
        loaders = loaders_of(generated_data(n=32, size=16), {"aug_repeats": 2, "scale": [0.2, 0.5]}, batch_size=8)
        images, targets = next(iter(loaders.train))
        assert torch.equal(targets[0::2], targets[1::2])
        assert not torch.equal(images[0], images[1])

    def test_epoch_seed_is_stable(self) -> None:
        assert epoch_seed(0, 0) == 7896617691693857887
        assert len({epoch_seed(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400

    def test_seed_everything_repeats_all_three(self) -> None:
        def draws() -> tuple[float, float, float]:
            seed_everything(3, 7)
            return random.random(), float(np.random.rand()), float(torch.rand(()))

        assert draws() == draws()


class TestReproducibility:
    @pytest.mark.parametrize("augment", [AUGMENT, MIX, {**AUGMENT, **MIX}], ids=["augment", "mix", "both"])
    def test_batches_do_not_depend_on_workers_or_on_what_came_before(self, augment: dict[str, Any]) -> None:
        source = generated_data(n=26, size=20)
        resumed = loaders_of(source, augment, batch_size=4, workers=0)
        expected = epoch_of(resumed, 2)
        assert len(expected) == 6
        long_run = loaders_of(source, augment, batch_size=4, workers=2)
        first = epoch_of(long_run, 0)
        assert not same(first, expected)
        torch.rand(17)
        np.random.rand(5)
        assert same(epoch_of(long_run, 2), expected)
        assert not same(epoch_of(loaders_of(source, augment, seed=1, batch_size=4), 2), expected)

    def test_an_epoch_can_be_resumed_at_any_batch(self) -> None:
        loaders = loaders_of(generated_data(n=26, size=20), {**AUGMENT, **MIX}, batch_size=4)
        whole = epoch_of(loaders, 1)
        assert same(epoch_of(loaders, 1, first_batch=4), whole[4:])
        assert same(epoch_of(loaders, 1), whole)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_global_generators_are_left_alone(self, workers: int) -> None:
        loaders = loaders_of(generated_data(n=16, size=16), {**AUGMENT, **MIX}, batch_size=4, workers=workers)
        seed_everything(0, 0)
        expected = random.random(), float(np.random.rand()), float(torch.rand(()))
        seed_everything(0, 0)
        epoch_of(loaders, 0)
        list(loaders.val)
        assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected

    def test_isolation_survives_an_error(self) -> None:
        seed_everything(0, 0)
        before = torch.get_rng_state()

        def fail() -> None:
            with isolated_rng(1):
                torch.rand(3)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_source_is_left_as_it_was(self) -> None:
        source = generated_data(n=16, size=16)
        loaders_of(source)
        assert source.train[0][0].mode == "RGB"


class TestMixing:
    @pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
    def test_targets_are_soft_and_sum_to_one(self, mode: str) -> None:
        loaders = loaders_of(generated_data(n=16, size=16), {**MIX, "mixup_mode": mode}, batch_size=8)
        assert loaders.soft_targets
        images, targets = next(iter(loaders.train))
        assert images.dtype == targets.dtype == torch.float32
        assert targets.shape == (8, 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert targets.max() < 1.0

    def test_it_stops_from_the_epoch_on(self) -> None:
        loaders = loaders_of(generated_data(n=64, size=16), {"mixup": 5.0, "mixup_off_epoch": 2}, batch_size=8)
        mixed = torch.cat([targets for _, targets in epoch_of(loaders, 1)])
        assert (mixed.max(1).values < 1).any()
        plain = torch.cat([targets for _, targets in epoch_of(loaders, 2)])
        assert (plain.max(1).values == 1).all()

    def test_an_odd_batch_is_refused(self) -> None:
        with pytest.raises(DataError, match="must be even, got 7"):
            loaders_of(generated_data(n=16), MIX, batch_size=7)


class TestEvaluation:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_image_once_in_order_with_a_short_last_batch(self, workers: int) -> None:
        source = generated_data(num_classes=23, n=23, size=16)
        loaders = loaders_of(source, batch_size=8, workers=workers)
        batches = list(loaders.val)
        assert [len(images) for images, _ in batches] == [8, 8, 7]
        assert torch.cat([targets for _, targets in batches]).tolist() == list(range(23))
        assert (loaders.val.samples, len(loaders.val)) == (23, 3)

    def test_its_own_batch_size_and_the_normalisation(self) -> None:
        source = generated_data(n=20, size=16)
        loaders = loaders_of(source, batch_size=8, eval_batch_size=16)
        images, _ = next(iter(loaders.val))
        assert len(images) == 16
        pixels = torch.from_numpy(np.array(source.val[0][0])).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(images[0], (pixels - mean) / std)


class TestSettings:
    def test_fewer_images_than_a_batch(self) -> None:
        with pytest.raises(DataError, match="8 training images are fewer than one batch of 9"):
            loaders_of(generated_data(n=8), batch_size=9)

    def test_size_and_normalisation_follow_the_recipe(self) -> None:
        loaders = loaders_of(generated_data(n=8), image_size=24, mean=[0.0], std=[1.0], interpolation="nearest")
        assert next(iter(loaders.train))[0].shape == (4, 3, 24, 24)
        assert loaders.pixels.mean == (0.0, 0.0, 0.0)
        assert (loaders.pixels.height, loaders.pixels.interpolation) == (24, "nearest")

    def test_a_model_of_grey_images(self) -> None:
        config = {**CONFIG, "input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
        data, augment = settings("digits"), schema.Augment()
        loaders = make_loaders(open_data(data), data, augment, data_config=config, device=CPU, seed=0)
        assert next(iter(loaders.train))[0].shape == (4, 1, 16, 16)
        assert next(iter(loaders.val))[0].shape == (4, 1, 16, 16)

    @pytest.mark.parametrize(
        ("augment", "options", "message"),
        [
            ({}, {"mean": [0.1, 0.2]}, "data.mean needs one value, or one per channel"),
            ({}, {"std": [0.0]}, "data.std must be positive"),
            ({}, {"interpolation": "bicubik"}, "Did you mean 'bicubic'"),
            ({}, {"crop_pct": 1.5}, "at most 1"),
            ({"scale": [1.0, 0.5]}, {}, "augment.scale must be"),
            ({"ratio": [0.0, 1.0]}, {}, "augment.ratio must be"),
            ({"interpolation": "best"}, {}, "augment.interpolation"),
            ({"auto_augment": "randaugment"}, {}, "auto_augment='randaugment'"),
            ({"auto_augment": "rand-m9", "color_jitter": 0.4}, {}, "has no effect beside"),
        ],
    )
    def test_what_no_transform_can_follow(self, augment: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            loaders_of(generated_data(n=8), augment, **options)

    def test_strong_posterizing_works_with_every_pillow(self) -> None:
        loaders = loaders_of(generated_data(n=64), {"auto_augment": "rand-m10-n6-inc1"}, batch_size=64)
        assert all(torch.isfinite(images).all() for images, _ in loaders.train)

    def test_digits_whole_and_upright(self) -> None:
        data = settings("digits", image_size=8, mean=[0.0], std=[1.0], batch_size=64)
        augment = schema.Augment(scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.0, interpolation="nearest")
        source = open_data(data)
        loaders = make_loaders(source, data, augment, data_config=CONFIG, device=CPU, seed=0)
        order = list(EpochSampler(len(source.train), 0))  # type: ignore[arg-type]
        images, targets = next(iter(loaders.train))
        expected = torch.from_numpy(np.array(source.train[order[0]][0])).permute(2, 0, 1) / 255
        torch.testing.assert_close(images[0], expected)
        assert targets[0] == source.train[order[0]][1]


class TestGenerated:
    def test_it_repeats_and_differs_between_splits(self) -> None:
        one, two = generated_data(seed=3), generated_data(seed=3)
        assert np.array_equal(one.train[5][0], two.train[5][0])
        assert not np.array_equal(one.train[5][0], one.val[5][0])
        assert not np.array_equal(one.train[5][0], generated_data(seed=4).train[5][0])

    @pytest.mark.parametrize("channels", [1, 3])
    def test_shapes(self, channels: int) -> None:
        source = generated_data(num_classes=4, channels=channels, size=12, n=6)
        image, label = source.val[5]
        assert (image.mode, image.size, label) == ("RGB", (12, 12), 1)
        assert (len(source.train), source.num_classes, source.channels) == (6, 4, channels)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_loader_process_that_only_begins_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    begin = torch.utils.data._utils.worker._worker_loop

    def begin_with_a_signal(*args: Any) -> None:
        os.kill(os.getpid(), number)
        begin(*args)

    source = generated_data(n=26, size=20)
    expected = epoch_of(loaders_of(source), 0)
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_loop", begin_with_a_signal)
    assert same(epoch_of(loaders_of(source, workers=2), 0), expected)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


class TestBytesToTheDevice:
    """The path of CUDA devices, uint8 until the device, walked on the CPU."""

    @pytest.fixture(autouse=True)
    def _prefetch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loaders_module, "_prefetches", lambda device: True)

    def test_batches_repeat_for_any_number_of_workers(self) -> None:
        source = generated_data(n=26, size=20)
        expected = epoch_of(loaders_of(source, {**AUGMENT, **MIX}), 2)
        assert expected[0][0].dtype == torch.float32
        torch.testing.assert_close(expected[0][1].sum(1), torch.ones(4))
        other = loaders_of(source, {**AUGMENT, **MIX}, workers=2)
        assert not same(epoch_of(other, 1), expected)
        assert same(epoch_of(other, 2), expected)
        assert same(epoch_of(other, 2, first_batch=4), expected[4:])

    def test_evaluation_equals_the_float_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = generated_data(n=23, size=16)
        ahead = torch.cat([images for images, _ in loaders_of(source).val])
        monkeypatch.setattr(loaders_module, "_prefetches", lambda device: False)
        torch.testing.assert_close(ahead, torch.cat([images for images, _ in loaders_of(source).val]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    def test_batches_arrive_on_the_device_and_repeat(self) -> None:
        source, device = generated_data(n=26, size=20), torch.device("cuda")
        data = settings("digits", workers=2)
        augment = schema.Augment(**AUGMENT, **MIX)
        runs = [make_loaders(source, data, augment, data_config=CONFIG, device=device, seed=0) for _ in range(2)]
        epoch_of(runs[1], 0)
        expected = epoch_of(runs[0], 2)
        assert expected[0][0].device.type == expected[0][1].device.type == "cuda"
        assert same(epoch_of(runs[1], 2), expected)
        assert same(epoch_of(runs[1], 2, first_batch=3), expected[3:])

    def test_evaluation_equals_the_cpu(self) -> None:
        source, data = generated_data(n=20, size=16), settings("digits")
        batches = [
            torch.cat(
                [
                    images.cpu()
                    for images, _ in make_loaders(
                        source, data, schema.Augment(), data_config=CONFIG, device=torch.device(name), seed=0
                    ).val
                ]
            )
            for name in ("cpu", "cuda")
        ]
        torch.testing.assert_close(*batches, rtol=0, atol=1e-5)


def test_checking_a_folder_reports_every_image(folder: Path) -> None:
    checked: list[int] = []
    source = open_data(settings(folder), checked.append)
    assert sum(checked) == len(source.train) + len(source.val)  # type: ignore[arg-type]
    assert min(checked) > 0
