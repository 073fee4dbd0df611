"""Images for one-shot pruning: some of the training split to calibrate on, the evaluation split to measure with.

Both are prepared as `lbc verify --data` prepares them: size, normalisation and crop as the checkpoint says, or else as
timm knows the model; `data.KEY=VALUE` settings go over that.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli import data, models
from lbc_cli.accuracy import Accuracy
from lbc_cli.data.images import ImageSet
from lbc_cli.data.rng import ORDER, stable_seed
from lbc_cli.data.transforms import evaluation_transform
from lbc_cli.engine import evaluate
from lbc_cli.errors import CheckpointError, DataError, ModelError, UsageError
from lbc_cli.oneshot.choice import Progress
from lbc_cli.recipe import resolve, schema
from lbc_cli.recipe.load import with_values
from lbc_cli.tasks import Classification

BATCH = 64
_NUMBERS = {"mean": list, "std": list, "crop_pct": (int, float), "interpolation": str, "crop_mode": str}


@dataclass(frozen=True, slots=True)
class Images:
    """Data that go with a model.

    Attributes:
        source: training and evaluation split.
        pixels: what the images are made into.
        evaluation: the evaluation split, batch by batch.
    """

    source: data.DataSource
    pixels: data.Pixels
    evaluation: data.Loader

    def calibration(self, count: int, seed: int, progress: Progress) -> tuple[Tensor, Tensor]:
        """Images of the training split, prepared as for evaluation, in an order that follows from the seed.

        Args:
            count: how many.
            seed: of the choice and the order.
            progress: told how many are read.

        Returns:
            float32 [N, C, H, W] and class ids int64 [N], on the CPU.

        Raises:
            DataError: if there are fewer, or they come as a stream.
        """
        dataset = self.source.train
        if not isinstance(dataset, ImageSet):
            raise DataError(
                f"{self.source.name} is a stream: calibration images are chosen by number; unpack it into image folders"
            )
        if count > len(dataset):
            raise DataError(
                f"{count} calibration images were asked for, the training split of {self.source.name} has "
                f"{len(dataset)}: give --calibration {len(dataset)} or less"
            )
        prepared = copy.copy(dataset)
        prepared.transform = evaluation_transform(self.pixels, uint8=False)
        prepared.mode = "L" if self.pixels.channels == 1 else "RGB"
        generator = torch.Generator().manual_seed(stable_seed(seed, ORDER))
        images, labels = [], []
        for done, position in enumerate(torch.randperm(len(dataset), generator=generator)[:count].tolist()):
            progress("reading calibration images", done, count)
            image, label = prepared[position]
            images.append(image)
            labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    def accuracy(self, model: nn.Module, device: torch.device, progress: Progress) -> Accuracy:
        """Measure a model on the evaluation split.

        Args:
            model: in float32, on `device`.
            device: where to compute.
            progress: told how many images are evaluated.
        """
        total = self.evaluation.samples

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            done = 0
            for images, targets in self.evaluation:
                yield images, targets
                done += len(targets)
                progress("measuring, images", done, total)

        found = evaluate(model, counted(), Classification(), device=device)
        return Accuracy(found["top1"], found["top5"], found["loss"], total, self.source.name, self.pixels)


def open_images(
    model: nn.Module,
    source: str,
    *,
    kept: Mapping[str, Any],
    overrides: Sequence[str],
    device: torch.device,
) -> Images:
    """Open data for a model, and check that the two go together.

    Args:
        model: a classifier, on the CPU.
        source: as in a recipe's data.source.
        kept: what the model's checkpoint says of its images, as `Start.kept` has it.
        overrides: "data.KEY=VALUE" each.
        device: where batches go.

    Raises:
        UsageError: for a setting of something else than data.
        DataError: if the data are missing, or have other classes than the model.
        ModelError: if the model cannot take such images.
        CheckpointError: if what the checkpoint says is no setting for images.
    """
    settings = _settings(source, overrides)
    opened = data.open_data(settings)
    config = models.data_config(model) | _prepared(kept.get("pixels"))
    loaders = data.make_loaders(opened, settings, schema.Augment(), data_config=config, device=device, seed=0)
    _check_takes(model, loaders.pixels, opened)
    return Images(opened, loaders.pixels, loaders.val)


def _settings(source: str, overrides: Sequence[str]) -> schema.Data:
    if others := [text for text in overrides if not text.lstrip().startswith("data.")]:
        raise UsageError(f"{others[0]}: images are prepared by data.KEY=VALUE only, such as data.image_size=224")
    resolved = resolve(None, overrides=overrides, flags={"data.source": source})
    workers = 0 if source == "digits" else min(4, os.cpu_count() or 1)
    fixed = {"data.check": "off", "data.eval_batch_size": BATCH, "data.workers": workers}
    values: dict[str, Any] = {key: value for key, value in fixed.items() if resolved.provenance[key] == "default"}
    values["data.batch_size"] = 1  # no batch to train on is ever made
    return with_values(resolved, values, "lbc prune").recipe.data


def _prepared(pixels: Any) -> dict[str, Any]:
    """How images are prepared, as a checkpoint says it, in the form of `models.data_config`."""
    if not isinstance(pixels, Mapping):
        return {}
    found: dict[str, Any] = {}
    for key, kind in _NUMBERS.items():
        value = pixels.get(key)
        if value is None:
            continue
        entries = value if isinstance(value, list) else [0]
        if not isinstance(value, kind) or not all(type(entry) in (int, float) for entry in entries):  # type: ignore[arg-type]
            raise CheckpointError(f"the checkpoint says {key} = {str(value)[:80]} of its images: no such setting")
        found[key] = value
    size = tuple(pixels.get(axis) for axis in ("channels", "height", "width"))
    if all(type(side) is int and side > 0 for side in size):
        found["input_size"] = size
    return found


@torch.no_grad()
def _check_takes(model: nn.Module, pixels: data.Pixels, source: data.DataSource) -> None:
    """Pass one black image through the model, before all the others.

    Raises:
        ModelError: if it cannot take images of this size.
        DataError: if it has another number of classes.
    """
    image = torch.zeros(1, pixels.channels, pixels.height, pixels.width)
    try:
        classes = Classification().predict(model, image).shape[1]
    except (AssertionError, RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the model cannot take images of {pixels.channels} x {pixels.height} x {pixels.width} ({cause}): set "
            f"data.image_size to the size that it was made for"
        ) from error
    if classes != source.num_classes:
        raise DataError(
            f"the model tells {classes} classes apart, {source.name} has {source.num_classes}: prune on data with the "
            f"classes that it was trained on"
        )
