"""`--smoke`: a recipe cut down to seconds."""

from __future__ import annotations

from typing import Any

from lbc_cli import distill
from lbc_cli.errors import UsageError
from lbc_cli.methods import METHODS
from lbc_cli.recipe import ResolvedRecipe
from lbc_cli.recipe.load import with_values

GENERATED = "generated"
_SMOKE_EPOCHS = 4
_REPLACED = ("data.source", "distill.teacher", "distill.model")  # a smoke run has others, and says so


def smoke(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """The same recipe cut down to seconds: generated images, a few epochs that pass every phase of the method.

    Raises:
        UsageError: if the command line asks for something else than a smoke run can give.
    """
    recipe = resolved.recipe
    values: dict[str, Any] = {
        "data.source": GENERATED,
        "data.root": "",
        "data.download": False,
        "data.class_map": "",
        "data.batch_size": 8,
        "data.workers": 0,
        "data.image_size": 32 if recipe.data.image_size in range(1, 65) else 64,
        "train.epochs": _SMOKE_EPOCHS,
        "train.eval_every": 1,
        "train.save_every": 1,
        "train.accumulate": 1,
        "schedule.warmup_epochs": min(1, recipe.schedule.warmup_epochs),
        "schedule.decay_milestones": [2] if recipe.schedule.name == "multistep" else [],
        "schedule.decay_epochs": 2 if recipe.schedule.name == "step" else recipe.schedule.decay_epochs,
        "augment.mixup_off_epoch": min(2, recipe.augment.mixup_off_epoch),
        "distill.teacher": distill.GENERATED if recipe.distill.teacher else "",
        "distill.model": "",
    }
    options = {key: value for key, value in recipe.method.items() if key != "name"}
    short = METHODS[recipe.method["name"]].options.model_validate(options).shortened(_SMOKE_EPOCHS)
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
