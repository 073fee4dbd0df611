"""Pixels: the size and normalisation of a run, and timm's transforms for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize

from lbc_cli.errors import DataError, did_you_mean
from lbc_cli.recipe import schema

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True, slots=True)
class Pixels:
    """What the model gets: size, normalisation, and how evaluation cuts the image out."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"


def resolve_pixels(data: schema.Data, config: Mapping[str, Any]) -> Pixels:
    """The model's own values where the recipe sets none.

    Args:
        data: the recipe's data table.
        config: as `timm.data.resolve_model_data_config` gives it.

    Raises:
        DataError: a value that no transform can follow.
    """
    channels, height, width = config["input_size"]
    if channels not in (1, 3):
        raise DataError(f"the model takes {channels} input channels; images have 1 (grey) or 3 (RGB)")
    interpolation = data.interpolation or config["interpolation"]
    _require_interpolation(interpolation, "data.interpolation", INTERPOLATIONS)
    crop_pct = data.crop_pct or float(config["crop_pct"])
    if crop_pct > 1:
        raise DataError(f"data.crop_pct is the share of the side that is kept, at most 1; got {crop_pct}")
    std = _per_channel(data.std or config["std"], channels, "data.std")
    if min(std) <= 0:
        raise DataError(f"data.std must be positive, got {list(std)}")
    mean = _per_channel(data.mean or config["mean"], channels, "data.mean")
    side = data.image_size
    return Pixels(
        channels, side or height, side or width, mean, std, interpolation, crop_pct, config.get("crop_mode") or "center"
    )


def _per_channel(values: Sequence[float], channels: int, key: str) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise DataError(f"{key} needs one value, or one per channel ({channels}); got {len(values)}")
    return tuple(float(value) for value in (values if len(values) == channels else list(values) * channels))


def _require_interpolation(name: str, key: str, known: Sequence[str]) -> None:
    if name not in known:
        raise DataError(f"unknown {key}='{name}'; known: {', '.join(known)}.{did_you_mean(name, known)}")


def _require_range(bounds: Sequence[float], key: str, most: float | None = None) -> None:
    low, high = bounds
    if not 0 < low <= high or (most is not None and high > most):
        limit = "" if most is None else f" <= {most:g}"
        raise DataError(f"{key} must be [low, high] with 0 < low <= high{limit}; got [{low:g}, {high:g}]")


def training_transform(augment: schema.Augment, pixels: Pixels, *, uint8: bool) -> Callable[[Any], Any]:
    """The training transform, by timm.

    Args:
        augment: the recipe's augmentation table.
        pixels: size and normalisation.
        uint8: stop at uint8 tensors; normalising and erasing follow on the device.

    Returns:
        PIL image -> Tensor [C, H, W], float32 and normalised, or uint8.
    """
    _require_range(augment.scale, "augment.scale", 1.0)
    _require_range(augment.ratio, "augment.ratio")
    _require_interpolation(augment.interpolation, "augment.interpolation", ("random", *INTERPOLATIONS))
    if augment.auto_augment and augment.color_jitter and "3a" not in augment.auto_augment:
        raise DataError(
            f"augment.color_jitter={augment.color_jitter:g} has no effect beside augment.auto_augment="
            f"'{augment.auto_augment}'; set one of them to none"
        )
    try:
        transform: Callable[[Any], Any] = create_transform(
            (pixels.channels, pixels.height, pixels.width),
            is_training=True,
            scale=tuple(augment.scale),
            ratio=tuple(augment.ratio),
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment or None,
            interpolation=augment.interpolation,
            mean=pixels.mean,
            std=pixels.std,
            re_prob=0.0 if uint8 else augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
            use_prefetcher=uint8,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(
            f"timm cannot build augment.auto_augment='{augment.auto_augment}': "
            f"{' '.join(str(error).split()) or type(error).__name__}; a valid one is 'rand-m9-mstd0.5-inc1'"
        ) from error
    _allow_zero_bits(transform)
    return transform


def _allow_zero_bits(transform: Any) -> None:
    """Give timm's posterize its whole range: from Pillow 13 on, 0 bits raise instead of giving a black image."""
    for step in transform.transforms:
        operations = [*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))]
        for operation in operations:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    if bits <= 0:
        return Image.new(image.mode, image.size)
    result: Image.Image = posterize(image, bits, **options)
    return result


def evaluation_transform(pixels: Pixels, *, uint8: bool) -> Callable[[Any], Any]:
    """The evaluation transform, by timm: resize, centre crop, normalise.

    Args:
        pixels: size and normalisation.
        uint8: stop at uint8 tensors; normalising follows on the device.
    """
    transform: Callable[[Any], Any] = create_transform(
        (pixels.channels, pixels.height, pixels.width),
        is_training=False,
        interpolation=pixels.interpolation,
        mean=pixels.mean,
        std=pixels.std,
        crop_pct=pixels.crop_pct,
        crop_mode=pixels.crop_mode,
        use_prefetcher=uint8,
    )
    return transform
