"""Optimizers and learning-rate schedules, built by timm from their recipe tables.

What a recipe sets and timm would drop without a word is refused here: momentum for an optimizer that has none,
`betas` or `eps` likewise, milestones of a schedule that has no steps, decays that lie past the end of the run.

Learning rates advance per update, counted from 0, and update u is made with lr(u). With W warm-up updates, base rate
lr and T updates in all:

    u < W    warmup_lr + (lr - warmup_lr) u / W
    cosine   min_lr + (lr - min_lr) (1 + cos(pi (u - W) / (T - W))) / 2
    poly     min_lr + (lr - min_lr) (1 - (u - W) / (T - W)) ^ decay_rate
    tanh     min_lr + (lr - min_lr) (1 - tanh(-7 + 10 (u - W) / (T - W))) / 2
    step     lr * decay_rate ^ floor(u / (decay_epochs updates))
    multistep   lr * decay_rate ^ (number of milestones at or before u)

The three smooth shapes start where the warm-up ends, as in the paper: "linearly increased to 0.1 during the first 5
epochs and then decayed to 0 scheduled by cosine annealing". The epochs of step and multistep count from the start of
the run, as papers give them. Unlike timm's own milestones, which come one update early, these fall on the epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from lbc_cli.errors import MethodError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lbc_cli.recipe import schema

_SMOOTH = ("cosine", "poly", "tanh")
_USED_BY = {
    "min_lr": _SMOOTH,
    "decay_epochs": ("step",),
    "decay_milestones": ("multistep",),
    "decay_rate": ("step", "multistep", "poly"),
}
_OWN_KEYS = ("lr", "momentum", "weight_decay", "layer_decay")


class Scheduler(Protocol):
    """What sets the learning rate of every parameter group, without memory of earlier calls."""

    def step_update(self, num_updates: int) -> None:
        """Set the rates for the update that follows `num_updates` earlier ones."""


def updates_per_epoch(batches: int, accumulate: int = 1) -> int:
    """How many optimizer updates an epoch makes; a last, shorter group of batches makes one as well."""
    return -(-batches // accumulate)


def make_optimizer(model: nn.Module, settings: schema.Optimizer) -> Optimizer:
    """The optimizer of a recipe, over the parameters of a model that already stands on its device.

    Weight decay spares biases and norms unless `decay_1d`, and always what the model itself exempts.

    Args:
        model: its parameters become the parameter groups.
        settings: the recipe's `[optimizer]` table.

    Raises:
        MethodError: for an unknown name, a setting that this optimizer has no use for, or values that it refuses.
    """
    from timm.optim import create_optimizer_v2

    _check_optimizer(settings)
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.kwargs.items()}
    try:
        optimizer: Optimizer = create_optimizer_v2(
            model,
            opt=settings.name,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            filter_bias_and_bn=not settings.decay_1d,
            layer_decay=settings.layer_decay or None,
            **options,
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as problem:
        raise MethodError(
            f"optimizer {settings.name!r} cannot be made: {problem}{_hint(settings, problem)}"
        ) from problem
    return optimizer


def _check_optimizer(settings: schema.Optimizer) -> None:
    from timm.optim import get_optimizer_info, list_optimizers

    wrapper, _, base = settings.name.lower().rpartition("_")
    known = list_optimizers()
    if base not in known or wrapper not in ("", "lookahead"):
        near = did_you_mean(settings.name.lower(), known)
        raise MethodError(f"optimizer.name = {settings.name!r}: timm has no such optimizer.{near}")
    info = get_optimizer_info(base)
    if info.second_order:
        raise MethodError(
            f"optimizer.name = {settings.name!r} needs second derivatives, which this engine does not make"
        )
    for key in _OWN_KEYS:
        if key in settings.kwargs:
            raise MethodError(f"optimizer.kwargs.{key}: set optimizer.{key} instead, so that one place decides")
    for key, used in (("eps", info.has_eps), ("betas", info.has_betas)):
        if key in settings.kwargs and not used:
            raise MethodError(f"optimizer.kwargs.{key}: {settings.name} has no {key}; remove the key")
    default = type(settings).model_fields["momentum"].default
    if settings.momentum != default and not info.has_momentum:
        raise MethodError(
            f"optimizer.momentum = {settings.momentum}: {settings.name} has no momentum of its own; remove the key"
            + (" or set optimizer.kwargs.betas" if info.has_betas else "")
        )


def _hint(settings: schema.Optimizer, problem: Exception) -> str:
    """The remedy where an argument belongs to another optimizer, or needs momentum without Nesterov's."""
    strange = [key for key in settings.kwargs if isinstance(problem, TypeError) and f"'{key}'" in str(problem)]
    if strange:
        return f"; optimizer.kwargs.{strange[0]} is not for it: leave it out, or set optimizer.kwargs = {{}} for none"
    if settings.name.lower() == "sgd" and (settings.momentum == 0 or settings.kwargs.get("dampening")):
        return "; name = 'momentum' is SGD without Nesterov"
    return ""


def scaled(recipe: schema.Recipe, ranks: int) -> schema.Optimizer:
    """The optimizer's table with the learning rate for the images of an update, as timm scales it.

    With `lr_base_size` B and n = batch_size * accumulate * ranks, lr becomes lr * n / B, or lr * sqrt(n / B) with
    `lr_base_scale = "sqrt"` (Goyal et al., arXiv:1706.02677; Krizhevsky, arXiv:1404.5997). Without, it stays.

    Args:
        recipe: of the run.
        ranks: that share an update.
    """
    table = recipe.optimizer
    if not table.lr_base_size:
        return table
    ratio = recipe.data.batch_size * recipe.train.accumulate * ranks / table.lr_base_size
    return table.model_copy(update={"lr": table.lr * (ratio if table.lr_base_scale == "linear" else ratio**0.5)})


def make_scheduler(optimizer: Optimizer, schedule: schema.Schedule, epochs: int, updates_per_epoch: int) -> Scheduler:
    """The learning-rate schedule of a recipe, per update; see the module's docstring for the formulas.

    Sets every group's `initial_lr` (the peak, before a group's own `lr_scale`) and the `lr` of update 0.

    Args:
        optimizer: its `lr` is the base rate.
        schedule: the recipe's `[schedule]` table.
        epochs: of the whole run, warm-up included.
        updates_per_epoch: optimizer updates, after accumulation.

    Raises:
        MethodError: if a setting would have no effect, or the schedule does not fit the run.
    """
    if updates_per_epoch < 1:
        raise MethodError(f"updates_per_epoch = {updates_per_epoch}: an epoch has at least one update")
    rate = min(group["lr"] for group in optimizer.param_groups)
    _check_schedule(schedule, epochs, rate)
    scheduler: Scheduler = _builder(schedule, epochs, updates_per_epoch)(
        optimizer,
        t_in_epochs=False,
        warmup_t=schedule.warmup_epochs * updates_per_epoch,
        warmup_lr_init=schedule.warmup_lr,
        warmup_prefix=schedule.name in _SMOOTH,
    )
    scheduler.step_update(0)
    return scheduler


def _builder(schedule: schema.Schedule, epochs: int, updates: int) -> Callable[..., Any]:
    """The class of timm for the shape, with the arguments that only this shape takes."""
    from functools import partial

    from timm import scheduler as shapes

    after_warmup = {"t_initial": (epochs - schedule.warmup_epochs) * updates, "lr_min": schedule.min_lr}
    if schedule.name == "cosine":
        return partial(shapes.CosineLRScheduler, **after_warmup)
    if schedule.name == "poly":
        return partial(shapes.PolyLRScheduler, power=schedule.decay_rate, **after_warmup)
    if schedule.name == "tanh":
        return partial(shapes.TanhLRScheduler, **after_warmup)
    if schedule.name == "step":
        return partial(shapes.StepLRScheduler, decay_t=schedule.decay_epochs * updates, decay_rate=schedule.decay_rate)
    if schedule.name == "multistep":
        # timm compares its milestones with u + 1
        milestones = [epoch * updates + 1 for epoch in sorted(schedule.decay_milestones)]
        return partial(shapes.MultiStepLRScheduler, decay_t=milestones, decay_rate=schedule.decay_rate)
    return partial(shapes.StepLRScheduler, decay_t=1, decay_rate=1.0)


def _check_schedule(schedule: schema.Schedule, epochs: int, rate: float) -> None:
    for key, users in _USED_BY.items():
        default = type(schedule).model_fields[key].get_default(call_default_factory=True, validated_data={})
        if schedule.name not in users and getattr(schedule, key) != default:
            raise MethodError(
                f"schedule.{key} = {getattr(schedule, key)}: schedule {schedule.name!r} has no use for it "
                f"(only {', '.join(users)}); remove the key"
            )
    _check_warmup(schedule, epochs, rate)
    if schedule.name in _SMOOTH and schedule.min_lr > rate:
        raise MethodError(f"schedule.min_lr = {schedule.min_lr} is above optimizer.lr = {rate}: the rate would rise")
    if schedule.name == "step" and schedule.decay_epochs >= epochs:
        raise MethodError(
            f"schedule.decay_epochs = {schedule.decay_epochs}: a run of {epochs} epochs would never decay; "
            "lower it, or name the schedule 'constant'"
        )
    if schedule.name == "multistep":
        _check_milestones(schedule.decay_milestones, epochs)


def _check_warmup(schedule: schema.Schedule, epochs: int, rate: float) -> None:
    if schedule.warmup_epochs >= epochs:
        raise MethodError(
            f"schedule.warmup_epochs = {schedule.warmup_epochs}: the warm-up must end before the run of {epochs} "
            f"epochs does; set it to {epochs - 1} or less"
        )
    if schedule.warmup_lr and not schedule.warmup_epochs:
        raise MethodError(
            f"schedule.warmup_lr = {schedule.warmup_lr}: there is no warm-up (schedule.warmup_epochs = 0)"
        )
    if schedule.warmup_lr > rate:
        raise MethodError(
            f"schedule.warmup_lr = {schedule.warmup_lr} is above optimizer.lr = {rate}: that is no warm-up"
        )


def _check_milestones(milestones: list[int], epochs: int) -> None:
    if not milestones:
        raise MethodError("schedule.decay_milestones is empty: multistep needs the epochs of its decays")
    outside = [epoch for epoch in milestones if not 0 < epoch < epochs]
    if outside:
        raise MethodError(
            f"schedule.decay_milestones has {', '.join(map(str, outside))}: a decay of a run of {epochs} epochs lies "
            f"between epoch 1 and epoch {epochs - 1}"
        )
