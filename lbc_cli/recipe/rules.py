"""Rules between the values of a recipe that types cannot express."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lbc_cli.errors import PatternError
from lbc_cli.recipe.layers import leaves, takes_pattern
from lbc_cli.recipe.lines import KeyPath
from lbc_cli.recipe.schema import Recipe

_EPOCHS: KeyPath = ("train", "epochs")
SPARSE, DENSE = "sparse", "dense"  # of `sparsity.layers`, where there is no pattern


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that is broken.

    Attributes:
        paths: the keys that it concerns.
        text: the values met, the rule and the remedy.
    """

    paths: tuple[KeyPath, ...]
    text: str


def broken_rules(recipe: Recipe) -> Iterator[Finding]:
    """Every rule that a recipe of sound types breaks."""
    for rule in _RULES:
        yield from rule(recipe)


def _patterns(recipe: Recipe) -> Iterator[Finding]:
    from lbc_cli.patterns import Pattern  # loads torch

    sparsity = recipe.sparsity
    if not takes_pattern(recipe.method.get("name")):
        yield from _no_patterns(recipe)
        return
    texts: dict[KeyPath, str] = {("sparsity", "pattern"): sparsity.pattern}
    texts.update({("sparsity", "layers", glob): text for glob, text in sparsity.layers.items() if text != "dense"})
    for path, text in texts.items():
        try:
            pattern = Pattern.parse(text, sparsity.vector)
        except PatternError as error:
            yield Finding((path,), str(error) + ('; or "dense"' if "layers" in path else ""))
            continue
        if "layers" not in path and sparsity.vector not in (1, pattern.vector):
            yield Finding(
                (path, ("sparsity", "vector")),
                f"pattern {text!r} and vector {sparsity.vector} disagree: keep one of the two vector lengths",
            )


def _no_patterns(recipe: Recipe) -> Iterator[Finding]:
    """What an unstructured method cannot take."""
    name, sparsity = recipe.method["name"], recipe.sparsity
    if sparsity.pattern:
        told = "sparsity" in recipe.method
        remedy = f"; method.sparsity says how much it removes{_as_much(sparsity.pattern)}" if told else ""
        yield Finding(
            (("sparsity", "pattern"), ("method", "name")),
            f"method {name} is unstructured, pattern {sparsity.pattern} does not apply to it: leave the pattern out"
            + remedy,
        )
    if sparsity.vector != 1:
        paths = (("sparsity", "vector"), ("method", "name"))
        yield Finding(paths, f"method {name} is unstructured, no masks are shared: leave the vector length out")
    for glob, text in sparsity.layers.items():
        if text.strip().lower() not in (SPARSE, DENSE):
            said = f'{text!r}: method {name} is unstructured and has no patterns: write "{SPARSE}" or "{DENSE}"'
            yield Finding((("sparsity", "layers", glob),), said)


def _as_much(text: str) -> str:
    """The sparsity that is a pattern's, "" for what is none."""
    from lbc_cli.patterns import Pattern

    try:
        return f" ({1 - Pattern.parse(text).density:g} is as much as {text})"
    except PatternError:
        return ""


def _budget(recipe: Recipe) -> Iterator[Finding]:
    from lbc_cli.methods import METHODS  # loads torch
    from lbc_cli.patterns import Pattern

    table, budget = ("sparsity", "budget"), recipe.sparsity.budget
    name = recipe.method.get("name")
    if budget.flops and budget.params:
        yield Finding(((*table, "flops"), (*table, "params")), "flops and params exclude each other: keep one budget")
    if not (budget.flops or budget.params):
        if budget.allocated:
            yield Finding(((*table, "allocated"),), "there is no budget that chose: set flops or params, or drop it")
        return
    if name in METHODS and not (METHODS[name].sparse and METHODS[name].structured):
        yield Finding((table, ("method", "name")), f"method {name} takes no patterns: a budget does not apply to it")
    if not set(budget.patterns) - {DENSE}:
        yield Finding(((*table, "patterns"),), f'{budget.patterns}: name at least one pattern, such as "2:4"')
    for text in budget.patterns:
        try:
            text == DENSE or Pattern.parse(text, recipe.sparsity.vector)
        except PatternError as error:
            yield Finding(((*table, "patterns"),), f'{error}; or "dense"')


def _warm_up(recipe: Recipe) -> Iterator[Finding]:
    epochs, warm_up = recipe.train.epochs, recipe.schedule.warmup_epochs
    if warm_up >= epochs:
        yield Finding(
            (_EPOCHS, ("schedule", "warmup_epochs")),
            f"the warm-up of {warm_up} epochs must end before the run of {epochs} does: train for {warm_up + 1} epochs "
            f"or more, or --set schedule.warmup_epochs={epochs - 1} or less",
        )


def _milestones(recipe: Recipe) -> Iterator[Finding]:
    path = ("schedule", "decay_milestones")
    milestones, epochs = recipe.schedule.decay_milestones, recipe.train.epochs
    if recipe.schedule.name != "multistep":
        return
    if not milestones:
        yield Finding((path,), "multistep needs the epochs at which the rate falls, such as [30, 60, 90]")
    elif not 0 < min(milestones) <= max(milestones) < epochs:
        text = f"{milestones}: in a run of {epochs} epochs the rate can fall at epochs 1 to {epochs - 1}"
        yield Finding((_EPOCHS, path), text)


def _mixing(recipe: Recipe) -> Iterator[Finding]:
    size = recipe.data.batch_size
    for key in ("mixup", "cutmix"):
        if getattr(recipe.augment, key) > 0 and size % 2:
            yield Finding(
                (("augment", key), ("data", "batch_size")),
                f"{key} mixes pairs of images, and a batch of {size} has one left over: make data.batch_size even",
            )


def _crop(recipe: Recipe) -> Iterator[Finding]:
    for key, highest in (("scale", 1.0), ("ratio", float("inf"))):
        low, high = getattr(recipe.augment, key)
        if not 0 < low <= high <= highest:
            rule = "0 < low <= high <= 1" if highest == 1 else "0 < low <= high"
            yield Finding((("augment", key),), f"[{low}, {high}] must be [low, high] with {rule}")


def _jitter(recipe: Recipe) -> Iterator[Finding]:
    policy = recipe.augment.auto_augment
    if recipe.augment.color_jitter > 0 and policy and "3a" not in policy:
        yield Finding(
            (("augment", "color_jitter"), ("augment", "auto_augment")),
            f"timm leaves colour jitter out under the policy {policy!r}: set one of the two, color_jitter = 0 or "
            'auto_augment = ""',
        )


def _teacher(recipe: Recipe) -> Iterator[Finding]:
    if recipe.distill.teacher:
        return
    for key, field in type(recipe.distill).model_fields.items():
        if getattr(recipe.distill, key) != field.default:
            yield Finding((("distill", key),), f"there is no teacher to which {key} applies: set distill.teacher")


def _average(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    if not train.ema and train.ema_decay != type(train).model_fields["ema_decay"].default:
        text = "no average is taken to which ema_decay applies: set train.ema = true, or leave ema_decay out"
        yield Finding((("train", "ema_decay"),), text)


def _track(recipe: Recipe) -> Iterator[Finding]:
    if "wandb" in recipe.track.tools:
        return
    for key in ("project", "name", "mode"):
        if getattr(recipe.track, key) != type(recipe.track).model_fields[key].default:
            text = f'{key} is for wandb, which is not among track.tools: add "wandb" to them, or leave {key} out'
            yield Finding((("track", key),), text)


def _plain_values(recipe: Recipe) -> Iterator[Finding]:
    for path, value in leaves(recipe.model_dump()):
        for item in _flat(value):
            if isinstance(item, datetime.date | datetime.time):
                yield Finding((path,), f"{item} is a date or time, which no setting is: put it in quotes")
            elif (
                isinstance(item, str) and not item.isprintable() and any("\ud800" <= char <= "\udfff" for char in item)
            ):
                yield Finding((path,), f"{item!a} is not valid UTF-8: rename what it refers to")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


_RULES: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (
    _patterns,
    _budget,
    _warm_up,
    _milestones,
    _mixing,
    _crop,
    _jitter,
    _teacher,
    _average,
    _track,
    _plain_values,
)
