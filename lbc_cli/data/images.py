"""Map-style image sets: (PIL image, class id) pairs that name the file when an image cannot be read.

timm's own `ImageDataset` replaces an image that it cannot read by its neighbour; `ImageSet` raises instead. What an
image set reads from is a `Samples`: files, members of a tar, rows of a Hugging Face table, arrays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from lbc_cli.errors import DataError

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class DataSource:
    """A training and an evaluation set over the same classes.

    Both sets yield (RGB PIL image, class id) until a `transform` is set on them, as timm's do.
    """

    train: Dataset[tuple[Any, int]]
    val: Dataset[tuple[Any, int]]
    num_classes: int
    class_names: tuple[str, ...] | None
    """Names by class id, or None where the source has none."""
    name: str
    """What to call the source in reports: never a path."""
    channels: int = 3
    dropped: tuple[str, ...] = ()
    """Unreadable images that were left out on request."""


class Samples(Protocol):
    """Labelled images at rest."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image lies, for messages."""

    def label(self, index: int) -> int:
        """The class id, from 0."""

    def encoded(self, index: int) -> BinaryIO | None:
        """The image file, open for reading; None where the image is not kept as a file."""

    def image(self, index: int) -> Image.Image:
        """The image, decoded."""


def decode(stream: BinaryIO) -> Image.Image:
    """Decode an open image file to the end, and close it.

    Raises:
        Exception: whatever PIL's decoders raise on damaged input.
    """
    with stream:
        image: Image.Image = Image.open(stream)
        image.load()
    return image


def reason(error: Exception) -> str:
    """Why an image could not be read, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__


class ImageSet(Dataset[tuple[Any, int]]):
    """Images and class ids from `samples`.

    Args:
        samples: where the images are.
        kept: positions within `samples`, in order; all of them when None.
    """

    def __init__(self, samples: Samples, kept: Sequence[int] | None = None) -> None:
        self.samples = samples
        self.kept: NDArray[np.int64] = np.arange(len(samples)) if kept is None else np.asarray(kept, dtype=np.int64)
        self.transform: Transform | None = None
        self.mode = "RGB"

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image, converted to `mode` and transformed, and its class id.

        Raises:
            DataError: the image cannot be read; it is named, never replaced.
        """
        position = int(self.kept[index])
        try:
            image = self.samples.image(position).convert(self.mode)
        except Exception as error:  # decoders raise nearly anything on damaged input
            raise DataError(
                f"cannot read the image {self.samples.name(position)}: {reason(error)}; replace or remove it, "
                "or run with data.check='full' to list every such image first"
            ) from error
        return (image if self.transform is None else self.transform(image)), self.samples.label(position)

    def name(self, index: int) -> str:
        """Where the image lies."""
        return self.samples.name(int(self.kept[index]))


class FileSamples:
    """Image files on disk.

    Args:
        paths: the files.
        labels: their class ids.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.paths = list(paths)
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of the file."""
        return self.paths[index]

    def label(self, index: int) -> int:
        """The class id."""
        return int(self.labels[index])

    def encoded(self, index: int) -> BinaryIO:
        """The open file."""
        return Path(self.paths[index]).open("rb")

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        return decode(self.encoded(index))


class _Titled:
    """What samples without file names have in common: a title and a number name them."""

    def __init__(self, labels: Sequence[int] | NDArray[np.integer[Any]], title: str) -> None:
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.title = title

    def name(self, index: int) -> str:
        """Title and number."""
        return f"{self.title}[{index}]"

    def label(self, index: int) -> int:
        """The class id."""
        return int(self.labels[index])


class ArraySamples(_Titled):
    """Images in memory.

    Args:
        images: uint8 [N, H, W] (grey) or [N, H, W, 3].
        labels: [N] class ids.
        title: what to call the images in messages.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer[Any]], title: str) -> None:
        super().__init__(labels, title)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def encoded(self, index: int) -> BinaryIO | None:
        """None: there is no file."""
        return None

    def image(self, index: int) -> Image.Image:
        """The image as it is in memory."""
        return Image.fromarray(self.images[index])


class TorchSamples(_Titled):
    """A torchvision data set that keeps its images in memory, checked against torchvision's own digests.

    Args:
        dataset: yields (PIL image, class id).
        labels: all class ids.
        title: what to call the images in messages.
    """

    def __init__(self, dataset: Any, labels: Sequence[int], title: str) -> None:
        super().__init__(labels, title)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def encoded(self, index: int) -> BinaryIO | None:
        """None: there is no file."""
        return None

    def image(self, index: int) -> Image.Image:
        """The image as torchvision gives it."""
        image: Image.Image = self.dataset[index][0]
        return image


class ReaderSamples(_Titled):
    """A map-style timm reader, such as the one of Hugging Face tables.

    Args:
        reader: `reader[i]` gives (open file, class id).
        labels: all class ids.
        title: what to call the images in messages.
    """

    def __init__(self, reader: Any, labels: Sequence[int], title: str) -> None:
        super().__init__(labels, title)
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def encoded(self, index: int) -> BinaryIO:
        """The file as the reader opens it."""
        stream: BinaryIO = self.reader[index][0]
        return stream

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        return decode(self.encoded(index))
