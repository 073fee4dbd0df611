"""timm's folders: config.json with the architecture, and the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbc_cli.checkpoint.container import parse_json
from lbc_cli.errors import CheckpointError, ModelError

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
_MAX_CONFIG_BYTES = 1 << 24
_IMAGE_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder says of its model."""

    weights: Path
    arch: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    """How images must be prepared, of timm's `pretrained_cfg`."""


def open_folder(path: Path) -> Folder:
    """Find the weights of a folder and read its configuration.

    Raises:
        ModelError: if there are no weights, or they are spread over several files.
        CheckpointError: if config.json is damaged.
    """
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        shards = sorted(path.glob("*.index.json"))
        if shards:
            raise ModelError(f"{path}: the weights are spread over several files ({shards[0].name}): merge them first")
        raise ModelError(f"{path}: a folder without weights: {' or '.join(WEIGHT_FILES)} is needed in it")
    config = path / CONFIG
    return _configured(found, _read_config(config)) if config.is_file() else Folder(found)


def _read_config(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: no configuration is")
    try:
        parsed = parse_json(path.read_bytes(), CONFIG)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent}: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return parsed


def _configured(weights: Path, config: Mapping[str, Any]) -> Folder:
    """Read the configuration as timm does: older folders have everything in one table."""
    arch = config.get("architecture")
    if not isinstance(arch, str):
        return Folder(weights)
    inner = config.get("pretrained_cfg", config)
    if not isinstance(inner, dict) or not isinstance(arguments := config.get("model_args") or {}, dict):
        raise CheckpointError(f"{weights.parent / CONFIG}: pretrained_cfg and model_args must be tables")
    images = {key: inner[key] for key in _IMAGE_KEYS if inner.get(key) is not None}
    _check_images(images, weights.parent / CONFIG)
    classes = config.get("num_classes", inner.get("num_classes"))
    kwargs: dict[str, Any] = {}
    if isinstance(classes, int) and classes >= 0:
        kwargs["num_classes"] = classes
    if isinstance(pool := inner.get("global_pool"), str):
        kwargs["global_pool"] = pool
    if size := images.get("input_size"):
        kwargs |= {"in_chans": size[0]} if size[0] != 3 else {}
        kwargs |= {"img_size": list(size[1:])} if inner.get("fixed_input_size") else {}
    return Folder(weights, arch, {**kwargs, **arguments}, images)


def _check_images(images: Mapping[str, Any], where: Path) -> None:
    for key, value in images.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "input_size":
            sound = isinstance(value, list) and len(value) == 3 and all(type(n) is int and n > 0 for n in value)
        elif key in ("mean", "std"):
            sound = isinstance(value, list) and len(value) > 0 and all(isinstance(n, int | float) for n in value)
        else:
            sound = number if key == "crop_pct" else isinstance(value, str)
        if not sound:
            raise CheckpointError(f"{where}: {key} = {str(value)[:80]} is no setting for images")
