"""What can be measured: artefacts of every kind as a model, and how its images must be prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lbc_cli import models, weights
from lbc_cli.checkpoint.contents import read_contents
from lbc_cli.errors import CheckpointError, ModelError, UsageError
from lbc_cli.weights.plain import is_safetensors

if TYPE_CHECKING:
    from lbc_cli.accuracy.onnx import OnnxModel

_PREPARED = {"mean": list, "std": list, "interpolation": str, "crop_pct": float, "crop_mode": str}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate.

    Attributes:
        model: on the CPU, in eval mode.
        config: how images must be prepared, in the form of `models.data_config`.
        recipe: what the artefact was trained with, as TOML; "" if unknown.
        unknown: settings of the images that the artefact does not tell; somebody has to.
    """

    model: nn.Module
    config: Mapping[str, Any]
    recipe: str = ""
    unknown: tuple[str, ...] = ()


def open_subject(path: Path, model: str | None, device: torch.device) -> Subject:
    """Load an artefact of any kind.

    Args:
        path: the file or folder.
        model: timm name, for what does not say which model it is.
        device: where an ONNX graph will compute; anything else stays on the CPU.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged.
        ModelError: if the model is unknown, or does not fit the weights.
    """
    if path.suffix == ".onnx":
        return _open_onnx(path, model, device)
    if path.is_file() and is_safetensors(path):
        contents = read_contents(path)
        if contents.manifest is not None:
            loaded = weights.load(path, model=model)
            return _trained(loaded, contents.manifest.metrics, contents.manifest.recipe, path)
        if "semi_structured" in contents.metadata:
            return _open_semi_structured(path, model)
    loaded = weights.load(path, model=model)
    return Subject(_in_float32(loaded, path), models.data_config(loaded))


def _open_semi_structured(path: Path, model: str | None) -> Subject:
    from lbc_cli.exports import semi_structured

    if model is not None:
        raise UsageError(f"{path} says which model it is: leave the model's name out")
    origin = semi_structured.read_manifest(path).checkpoint
    return _trained(semi_structured.load(path), origin["metrics"], origin["recipe"], path)


def _trained(model: nn.Module, metrics: Mapping[str, Any], recipe: str, path: Path) -> Subject:
    """What training noted about its images goes before what timm knows of the model."""
    config = models.data_config(model)
    if isinstance(pixels := metrics.get("pixels"), Mapping):
        config |= _prepared(pixels, path)
        size = tuple(pixels.get(axis) for axis in ("channels", "height", "width"))
        if all(type(side) is int and side > 0 for side in size):
            config["input_size"] = size
    return Subject(_in_float32(model, path), config, recipe)


def _prepared(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """How images are prepared, as a file says it.

    Raises:
        CheckpointError: for a value of another type than it must have.
    """
    found = {key: values[key] for key in _PREPARED if values.get(key) is not None}
    for key, value in found.items():
        numbers = value if isinstance(value, list) else [value] if _PREPARED[key] is float else []
        sound = isinstance(value, (int, float) if _PREPARED[key] is float else _PREPARED[key])
        if not sound or not all(type(number) in (int, float) for number in numbers):
            raise CheckpointError(f"{path}: {key} = {str(value)[:80]} is no setting for images")
    return found


def _in_float32(model: nn.Module, path: Path) -> nn.Module:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ModelError(f"{path}: {name} is {parameter.dtype}: quantised weights cannot be evaluated")
    return model.float().eval()


def _open_onnx(path: Path, model: str | None, device: torch.device) -> Subject:
    from lbc_cli.accuracy.onnx import OnnxModel

    graph = OnnxModel(path, device)
    config = models.data_config(models.create(model)) if model is not None else models.data_config(graph)
    noted = _prepared(graph.preprocessing, path)
    unknown = () if model is not None else tuple(key for key in ("mean", "std") if key not in noted)
    config |= noted
    config["input_size"] = _graph_size(graph, config["input_size"])
    if model is None and None in graph.image_shape[1:]:
        unknown += ("image_size",)
    return Subject(graph, config, unknown=unknown)


def _graph_size(graph: OnnxModel, known: Sequence[int]) -> tuple[int, ...]:
    """What the graph leaves open comes from elsewhere."""
    return tuple(other if side is None else side for side, other in zip(graph.image_shape, known, strict=True))
