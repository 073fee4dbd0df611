"""`lbc verify --data`: the accuracy of an artefact, measured on data, whatever kind of artefact it is.

    our checkpoint             as its training evaluated it: size, normalisation and crop are in the file
    semi-structured export     likewise, with the exact dense weights
    timm folder                as its config.json says
    ONNX file                  by onnxruntime; size from the graph, the rest from what our exporter noted in it
    other weight files         with the timm model that is named, prepared as timm does for it

Torch models compute in float32 from the weights as stored, so artefacts that hold the same weights score the same.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli import data
from lbc_cli.accuracy.subjects import Subject, open_subject
from lbc_cli.data import Pixels
from lbc_cli.engine import evaluate
from lbc_cli.errors import CheckpointError, DataError, ModelError, UsageError
from lbc_cli.recipe import resolve, schema
from lbc_cli.recipe.load import with_values
from lbc_cli.tasks import Classification
from lbc_cli.training import choose_device

_PIXELS = ("image_size", "mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What was measured.

    Attributes:
        top1, top5: percent.
        loss: mean cross-entropy.
        images: how many.
        data: name of the data.
        pixels: what the images were made into.
    """

    top1: float
    top5: float
    loss: float
    images: int
    data: str
    pixels: Pixels


def measure(
    path: str | os.PathLike[str],
    data_source: str,
    *,
    model: str | None = None,
    device: str | None = None,
    batch: int = 64,
    overrides: Sequence[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> Accuracy:
    """Evaluate an artefact.

    Args:
        path: a checkpoint, a timm folder, an ONNX file, an export, or weights of the timm model that is named.
        data_source: as in a recipe's data.source: "digits", a folder, a tar, torch/NAME, hfds/NAME, ...
        model: timm name, for what does not say which model it is.
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.
        batch: images at a time.
        overrides: "data.KEY=VALUE" each, as for --set; they win over what the artefact says.
        progress: told how many images more were evaluated.

    Raises:
        UsageError: if there is no such file, or a setting that does not fit.
        CheckpointError: if it is damaged.
        ModelError: if the model is unknown, does not fit the weights, or cannot take such images.
        DataError: if the data are missing, or have another number of classes than the model.
    """
    place = choose_device(device or "auto")
    subject = open_subject(Path(path), model, place)
    settings, chosen = _settings(path, data_source, subject, batch, overrides)
    if lacking := [key for key in subject.unknown if f"data.{key}" not in chosen]:
        raise UsageError(
            f"{path} does not say how its images are prepared: give "
            f"{', '.join(f'data.{key}' for key in lacking)} with --set, or the timm model that it is"
        )
    source = data.open_data(settings)
    loaders = data.make_loaders(source, settings, schema.Augment(), data_config=subject.config, device=place, seed=0)
    _check_takes(subject.model, loaders.pixels, path)
    found = evaluate(
        subject.model.to(place),
        _counted(loaders.val, progress),
        _Matched(source.num_classes, source.name),
        device=place,
    )
    images = loaders.val.samples
    return Accuracy(found["top1"], found["top5"], found["loss"], images, source.name, loaders.pixels)


def _settings(
    path: str | os.PathLike[str], data_source: str, subject: Subject, batch: int, overrides: Sequence[str]
) -> tuple[schema.Data, set[str]]:
    """The data table of the evaluation, and which keys of it were chosen by somebody.

    Raises:
        RecipeError: if the overrides make no sense.
        UsageError: if one of them is about anything else than the data.
    """
    if others := [text for text in overrides if not text.lstrip().startswith("data.")]:
        raise UsageError(f"--set {others[0]}: a measurement takes data.KEY=VALUE only, such as data.image_size=224")
    resolved = resolve(None, overrides=overrides, flags={"data.source": data_source})
    given = {key for key, origin in resolved.provenance.items() if origin != "default"}
    learnt = {f"data.{key}": value for key, value in _of_training(subject.recipe, data_source).items()}
    workers = 0 if data_source == "digits" else min(4, os.cpu_count() or 1)
    fixed = {"data.check": "off", "data.eval_batch_size": batch, "data.workers": workers}
    values = {key: value for key, value in {**fixed, **learnt}.items() if key not in given}
    # The evaluation set is read as it is; a batch to train on is never made.
    values["data.batch_size"] = 1
    return with_values(resolved, values, str(path)).recipe.data, given | learnt.keys()


def _of_training(recipe: str, data_source: str) -> dict[str, Any]:
    """What the recipe of an artefact says about images, and about the data if they are the same."""
    try:
        table = tomllib.loads(recipe).get("data", {})
    except tomllib.TOMLDecodeError as error:
        raise CheckpointError(f"the recipe in the file is not TOML: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"the recipe in the file has data = {str(table)[:80]!r}: a table is needed")
    keys = set(_PIXELS)
    if table.get("source") == data_source:
        keys |= {"root", "train_split", "val_split", "class_map", "workers"}
    return {key: value for key, value in table.items() if key in keys}


class _Matched(Classification):
    """Classification whose classes must be those of the data.

    Args:
        classes: of the data.
        name: of the data.
    """

    def __init__(self, classes: int, name: str) -> None:
        super().__init__()
        self._classes, self._name = classes, name

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits [N, K]; see `Classification.predict`.

        Raises:
            DataError: if the model has another number of classes than the data.
        """
        logits = super().predict(model, images)
        if logits.shape[1] != self._classes:
            raise DataError(
                f"the model tells {logits.shape[1]} classes apart, {self._name} has {self._classes}: measure on data "
                f"with the classes that it was trained on"
            )
        return logits


@torch.no_grad()
def _check_takes(model: nn.Module, pixels: Pixels, path: str | os.PathLike[str]) -> None:
    """Pass one black image through the model, before all the others.

    Raises:
        ModelError: if it cannot take images of this size.
    """
    image = torch.zeros(1, pixels.channels, pixels.height, pixels.width)
    try:
        model(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path} cannot take images of {pixels.channels} x {pixels.height} x {pixels.width} ({cause}): set "
            f"data.image_size to the size that it was made for"
        ) from error


def _counted(
    batches: Iterable[tuple[Tensor, Tensor]], progress: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, targets in batches:
        yield images, targets
        progress(len(targets))
