"""From what the library returns to what the tables show. No arithmetic beyond what a table needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lbc_cli.environment import describe_hardware
from lbc_cli.optim import scaled
from lbc_cli.recipe.schema import Train
from lbc_cli.report import views
from lbc_cli.report.formats import format_accuracy, format_bytes, format_percent, format_seconds, plural
from lbc_cli.runs import RunFolder

if TYPE_CHECKING:
    from lbc_cli.accounting import Account
    from lbc_cli.bench import StepTimes, TrainBench
    from lbc_cli.training import Job, Outcome
    from lbc_cli.verifier import Report, Violation

_SAVE_MINUTES = Train().save_minutes
_BROKEN = ("pattern", "positions")  # rules of the verifier that say a group breaks its pattern


def plan_view(job: Job, folder: str) -> views.PlanView:
    """What a job would do.

    Args:
        job: prepared, not begun.
        folder: where the run would go.
    """
    pruner = job.pruner
    rates = job.learning_rates()
    epochs = range(job.settings.epochs)
    final = pruner.planned_densities()
    schedule = [
        views.EpochView(
            epoch=epoch,
            density=pruner.planned_density(epoch),
            survivors=pruner.planned_survivors(epoch),
            lr=rates[epoch],
        )
        for epoch in epochs
    ]
    return views.PlanView(
        title=job.title,
        facts={**_facts(job), "run folder": folder},
        layers=_layers(job, final),
        skipped=_skipped(job),
        schedule=schedule,
        memory=pruner.planned_memory(),
        cost=_cost(job.planned_account(), job.images),
    )


def summary_view(job: Job, outcome: Outcome, folder: RunFolder) -> views.SummaryView:
    """How a run ended."""
    files = {"run folder": folder.path, "checkpoint": folder.model}
    if outcome.ema_report is not None:
        files["averaged weights"] = folder.ema
    return views.SummaryView(
        title=job.title,
        results=_results(outcome.result.last),
        layers=_layers(job, job.pruner.densities()),
        skipped=_skipped(job),
        memory=outcome.memory,
        cost=_cost(outcome.account, job.images),
        dense_bytes=outcome.dense_bytes,
        file_bytes=outcome.file_bytes,
        times={"training and evaluation": outcome.seconds},
        verified=outcome.report.ok,
        findings=[finding.message for finding in outcome.report.findings],
        files={what: str(path) for what, path in files.items()},
        facts=_facts(job),
    )


def running_view(job: Job, folder: RunFolder, last: Mapping[str, Any]) -> views.SummaryView:
    """How a run stands that has not come to its end.

    Args:
        job: of the run.
        folder: of the run.
        last: record of its last epoch, empty before there is one.
    """
    return views.SummaryView(
        title=job.title,
        results=_results(last),
        layers=_layers(job, job.pruner.densities()),
        skipped=_skipped(job),
        memory=job.pruner.memory_bytes(),
        cost=_cost(job.planned_account(), job.images),
        dense_bytes=None,
        file_bytes=None,
        times={},
        verified=None,
        files={"run folder": str(folder.path)},
        facts=_facts(job),
    )


def _results(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of an epoch that results show."""
    names = ("top1", "top5", "val_loss", "ema_top1", "ema_top5", "train_loss")
    return {name: record[name] for name in names if record.get(name) is not None}


def verify_view(report: Report) -> views.VerifyView:
    """What the verifier found."""
    broken = Counter[str]()
    for finding in report.findings:
        if finding.rule in _BROKEN:
            broken[finding.tensor] += finding.count
    layers = [
        views.CheckedLayerView(
            name=layer.name,
            shape=tuple(layer.shape),
            pattern=layer.pattern,
            density=layer.density,
            groups=layer.groups,
            violations=broken[layer.name],
            under_filled=layer.under_filled,
        )
        for layer in report.layers
    ]
    return views.VerifyView(
        path=report.path,
        ok=report.ok,
        layers=layers,
        findings=[finding.message for finding in report.findings if finding.level == "error"],
        warnings=[finding.message for finding in report.findings if finding.level == "warning"],
        facts=_verify_facts(report),
        counted=[
            views.CountedLayerView(
                name=c.name, shape=tuple(c.shape), density=c.density, nonzeros=c.nonzeros, claimed=c.claimed
            )
            for c in report.counted
        ],
        skipped=[views.SkippedView(name=d.name, shape=tuple(d.shape), reason=d.why) for d in report.dense],
        violations=[_violation_view(f.tensor, group) for f in report.findings for group in f.groups],
    )


def _verify_facts(report: Report) -> dict[str, str]:
    facts: dict[str, str | None] = {
        "kind": report.kind,
        "phase": report.phase,
        "method": report.method,
        "manifest": report.digest,
        "patterns": "along input and along output channels" if report.transposable else None,
    }
    if model := report.model:
        arguments = ", ".join(f"{key}={value}" for key, value in model["kwargs"].items())
        facts["model"] = model["name"] + (f" with {arguments}" if arguments else "")
    if other := report.against:
        rounded = f", {other['rounded']} after rounding" if other["rounded"] else ""
        facts["compared with"] = f"{other['path']} ({other['kind']})"
        facts["equal tensors"] = f"{other['equal']} of {other['tensors']} in both{rounded}"
        facts["weights"] = other["digest"]
    if accuracy := report.accuracy:
        facts["accuracy"] = (
            f"top-1 {format_accuracy(accuracy['top1'])}, top-5 {format_accuracy(accuracy['top5'])} "
            f"on {accuracy['n']} images of {accuracy['data']}, "
            f"{accuracy['pixels']['height']} x {accuracy['pixels']['width']} pixels"
        )
    return {name: value for name, value in facts.items() if value}


def _violation_view(layer: str, group: Violation) -> views.ViolationView:
    values = ", ".join(group.values[:4]) + (", ..." if len(group.values) > 4 else "")
    return views.ViolationView(layer=layer, place=group.place, group=group.number, used=group.used, values=values)


def train_bench_view(result: TrainBench) -> views.TrainBenchView:
    """A measured training step."""
    setup = result.setup
    hooks = sorted(result.hooks)
    size = f"{setup.image_size} px" if setup.image_size else "the model's own image size"
    facts = {
        "batch": f"{setup.batch} images, {size}",
        "precision": "float32" if setup.amp == "off" else f"{setup.amp} autocast",
        "layout": "channels last" if setup.channels_last else "contiguous",
        "schedule": "middle of the ramp: masks and scores both at work",
        "removal": f"{format_seconds(result.removal)}, once an epoch while the ramp lasts",
        "saved state": (
            f"{format_bytes(result.state_bytes)}, written in {format_seconds(result.state_seconds)}: every "
            f"{_SAVE_MINUTES:g} minutes, {format_percent(result.state_seconds / (60 * _SAVE_MINUTES))} of the time"
        ),
        "method memory": ", ".join(f"{kind} {format_bytes(size)}" for kind, size in result.memory.items() if size),
        **_hardware(),
    }
    return views.TrainBenchView(
        title=f"{setup.model} · {setup.method} {setup.pattern}".rstrip(),
        images=setup.batch,
        steps=setup.steps,
        dense=_timing(result.dense),
        method=_timing(result.method),
        hooks=hooks[len(hooks) // 2],
        facts={name: value for name, value in facts.items() if value},
    )


def _timing(times: StepTimes) -> views.StepTiming:
    low, median, high = times.quartiles
    return views.StepTiming(
        name=times.name, median=median, first_quartile=low, third_quartile=high, peak_bytes=times.peak_bytes
    )


def _facts(job: Job) -> dict[str, str]:
    recipe = job.resolved.recipe
    pixels = job.loaders.pixels
    accumulate = f" x {recipe.train.accumulate}" if recipe.train.accumulate > 1 else ""
    ranks = f" x {job.world.size} ranks" if job.world.size > 1 else ""
    facts = {
        "recipe": job.resolved.name or "none but the defaults",
        "data": f"{job.source.name}, {job.source.num_classes} classes, {pixels.height} x {pixels.width} pixels",
        "batch": f"{recipe.data.batch_size}{accumulate}{ranks} images, {job.updates_per_epoch} updates an epoch",
        "epochs": f"{recipe.train.epochs}, seed {recipe.train.seed}",
        **_hardware(),
        "device": str(job.device),
    }
    if recipe.optimizer.lr_base_size:
        lr, size = recipe.optimizer.lr, recipe.optimizer.lr_base_size
        rate = scaled(recipe, job.world.size).lr
        facts["peak rate"] = f"{rate:g}: {lr:g} for {size} images, {recipe.optimizer.lr_base_scale}"
    if recipe.distill.teacher:
        wanted = recipe.distill
        facts["teacher"] = f"{wanted.teacher}, alpha {wanted.alpha:g}, temperature {wanted.temperature:g}"
    if job.source.dropped:
        facts["left out"] = f"{len(job.source.dropped)} unreadable images"
    return facts


def versions() -> str:
    """The versions that results depend on."""
    found = describe_hardware()
    return f"lbc {found['lbc']}, torch {found['torch']}, timm {found['timm']}"


def _hardware() -> dict[str, str]:
    found = describe_hardware()
    place = found["gpus"][0] if found["gpus"] else f"{found['cpu']}, {plural(found['threads'], 'thread')}"
    return {"hardware": str(place), "versions": versions()}


def _layers(job: Job, densities: Mapping[str, float | None]) -> list[views.LayerView]:
    return [
        views.LayerView(
            name=target.name,
            shape=tuple(target.weight.shape),
            pattern=str(target.pattern) if target.structured else "",
            density=densities[target.name],
            note=target.note,
        )
        for target in job.pruner.targets
    ]


def _skipped(job: Job) -> list[views.SkippedView]:
    return [views.SkippedView(name=s.name, shape=tuple(s.shape), reason=s.reason) for s in job.pruner.skipped]


def _cost(account: Account, images: int) -> views.CostView:
    """What is counted; what depends on a density that only training will tell is left open."""
    return views.CostView(
        parameters_dense=account.dense.params,
        parameters_sparse=account.parameters,
        macs_dense=account.dense.macs,
        macs_sparse=None if account.sparse is None else account.sparse.macs,
        training_share=account.training_share,
        training_macs=account.training_macs(images),
        teacher_share=account.teacher_share,
    )
