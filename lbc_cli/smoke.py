"""`--smoke`: a recipe cut down to seconds, on generated images, through every phase of its method.

What a recipe is made of stays: model, method, pattern, optimizer, augmentation. Shortened are the epochs, the images,
and their size: to the smallest at which the model runs. A teacher is replaced by a fresh network like the student.
"""

from __future__ import annotations

from typing import Any

import torch

from lbc_cli import distill, flops, models
from lbc_cli.errors import ModelError, UsageError
from lbc_cli.methods import METHODS
from lbc_cli.recipe import Recipe, ResolvedRecipe
from lbc_cli.recipe.load import with_values

GENERATED = "generated"
BATCH = 8
_EPOCHS = 4
_SIZES = (32, 64, 96, 128, 192, 224)  # pixels, tried in this order; else the model's own
_REPLACED = ("data.source", "distill.teacher", "distill.model")  # a smoke run has others, and says so


def smoke(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """The same recipe cut down to seconds: few generated images, a few epochs that pass every phase of the method.

    Weights to begin with and a teacher that a recipe names are left aside, since another run may have to make them
    first. Weights named on the command line are used.

    Raises:
        UsageError: if the command line asks for something else than a smoke run can give.
    """
    recipe = resolved.recipe
    values: dict[str, Any] = {
        "data.source": GENERATED,
        "data.root": "",
        "data.download": False,
        "data.class_map": "",
        "data.batch_size": BATCH,
        "data.eval_batch_size": 0,
        "data.workers": 0,
        "data.image_size": _smallest_size(recipe),
        "train.epochs": _EPOCHS,
        "train.eval_every": 1,
        "train.save_every": _EPOCHS,
        "train.accumulate": 1,
        "schedule.warmup_epochs": min(1, recipe.schedule.warmup_epochs),
        "schedule.decay_milestones": [2] if recipe.schedule.name == "multistep" else [],
        "schedule.decay_epochs": 2 if recipe.schedule.name == "step" else recipe.schedule.decay_epochs,
        "augment.mixup_off_epoch": min(2, recipe.augment.mixup_off_epoch),
        "model.init": recipe.model.init if resolved.provenance.get("model.init", "").startswith("--") else "",
        "distill.teacher": distill.GENERATED if recipe.distill.teacher else "",
        "distill.model": "",
    }
    options = {key: value for key, value in recipe.method.items() if key != "name"}
    short = METHODS[recipe.method["name"]].options.model_validate(options).shortened(_EPOCHS)
    values |= {f"method.{key}": value for key, value in short.items()}
    for key, value in values.items():
        origin = resolved.provenance.get(key, "")
        if origin.startswith("--") and key not in _REPLACED and _value(resolved, key) != value:
            raise UsageError(f"--smoke sets {key} = {value!r} itself: drop it from {origin}, or run without --smoke")
    return with_values(resolved, values, "--smoke")


def _value(resolved: ResolvedRecipe, key: str) -> Any:
    table, name = key.split(".")
    values: dict[str, Any] = resolved.recipe.model_dump()[table]
    return values.get(name)


def _smallest_size(recipe: Recipe) -> int:
    """The smallest side at which the model runs; 0, its own, where that is none of the usual ones."""
    return next((size for size in _SIZES if _runs(recipe.model.name, recipe.model.kwargs, size)), 0)


def _runs(name: str, kwargs: dict[str, Any], size: int) -> bool:
    """Whether a model runs on images of a size; one that there is not, or that cannot be told, does."""
    if not name or not models.is_known(name):
        return True  # said where the run is prepared
    try:
        with torch.random.fork_rng(devices=[]):
            flops.count(_without_memory(name, kwargs, size), (int(kwargs.get("in_chans", 3)), size, size))
    except (ModelError, RuntimeError):
        return False
    return True


def _without_memory(name: str, kwargs: dict[str, Any], size: int) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            return models.create(name, num_classes=10, image_size=size, kwargs=kwargs)
    except (ModelError, RuntimeError, NotImplementedError):  # some models compute with numbers while they are made
        return models.create(name, num_classes=10, image_size=size, kwargs=kwargs)
