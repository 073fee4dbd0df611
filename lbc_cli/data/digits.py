"""The bundled handwritten digits and generated images: data that needs no download.

The digits are "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49), the 1,797 images of its test file, used under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). `digits.safetensors` keeps them unchanged: `images` uint8 [1797, 8, 8]
with values 0..16, `labels` uint8 [1797], and the attribution as metadata.

The split is fixed: within each class, in file order, every fifth image (the 5th, 10th, ...) is for evaluation. That
gives 1,442 training and 355 evaluation images, 34 to 36 of each class.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from lbc_cli.data.images import ArraySamples, DataSource, ImageSet
from lbc_cli.data.rng import stable_seed

EVERY = 5


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The bundled arrays.

    Returns:
        images uint8 [1797, 8, 8] with values 0..16, and labels uint8 [1797].
    """
    arrays = load(files("lbc_cli.data").joinpath("digits.safetensors").read_bytes())
    return arrays["images"], arrays["labels"]


def evaluation_mask(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which images the fixed split keeps for evaluation: every fifth of each class.

    Args:
        labels: [N] class ids.

    Returns:
        bool [N].
    """
    mask = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[EVERY - 1 :: EVERY]] = True
    return mask


def open_digits() -> DataSource:
    """The bundled digits as RGB images of 8 by 8 pixels, grey values scaled to 0..255."""
    images, labels = load_digits()
    scaled = ((images.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    held_out = evaluation_mask(labels)
    samples = ArraySamples(scaled, labels, "digits")
    train, val = (ImageSet(samples, np.flatnonzero(mask).tolist()) for mask in (~held_out, held_out))
    return DataSource(train, val, 10, tuple("0123456789"), "digits")


def generated_data(num_classes: int = 10, channels: int = 3, size: int = 32, n: int = 64, seed: int = 0) -> DataSource:
    """Tiny generated images, for smoke runs: a pattern of coarse blocks per class, plus noise.

    Args:
        num_classes: classes, dealt out in turn.
        channels: 1 (grey) or 3.
        size: side in pixels.
        n: training images; the evaluation set has as many, with other noise.
        seed: of patterns and noise.
    """
    rng = np.random.default_rng(stable_seed(seed))
    coarse = rng.integers(32, 224, size=(num_classes, 4, 4, channels))
    rows = np.arange(size) * 4 // size
    patterns = coarse[:, rows][:, :, rows]

    def draw(title: str) -> ImageSet:
        labels = np.arange(n) % num_classes
        noise = rng.integers(-32, 32, size=(n, size, size, channels))
        images = (patterns[labels] + noise).clip(0, 255).astype(np.uint8)
        return ImageSet(ArraySamples(images[..., 0] if channels == 1 else images, labels, f"generated-{title}"))

    names = tuple(f"class{c}" for c in range(num_classes))
    return DataSource(draw("train"), draw("val"), num_classes, names, "generated", channels)
