"""`lbc train`: from a resolved recipe to a verified checkpoint in a run folder.

    job = prepare(resolved)          everything is built and checked, nothing is written
    outcome = run(job, folder)       train, save, verify; the folder tells the whole story

`resuming.resume` gives the job of an interrupted run with the state that it goes on from. On the ranks of a distributed
run all do the same, but rank 0 alone has a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lbc_cli import accounting, allocation, checkpoint, data, distill, flops, models, runs, states, weights
from lbc_cli.distributed import ALONE, World, rank_device
from lbc_cli.engine import FitResult, FitSettings, NullReporter, Reporter, fit, make_deterministic
from lbc_cli.environment import describe_environment
from lbc_cli.errors import ModelError, UsageError, VerificationError
from lbc_cli.methods import METHODS, Pruner, attach
from lbc_cli.optim import Scheduler, make_optimizer, make_scheduler, scaled, updates_per_epoch
from lbc_cli.patterns import Pattern
from lbc_cli.recipe import ResolvedRecipe, schema
from lbc_cli.runs import MetricsLog, RunFolder
from lbc_cli.smoke import GENERATED
from lbc_cli.tasks import Task, make_task
from lbc_cli.verifier import Report, verify

# Time and memory differ from run to run: they stay out of the checkpoint, so that equal runs give equal bytes.
_MEASURED = frozenset({"seconds", "images_per_second", "data_wait", "memory"})


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is ready to begin.

    Attributes:
        resolved: the recipe, with the layers that a budget has chosen.
        cost: parameters and multiply-adds of the dense model at the run's image size.
        world: the ranks of the run.
        state: what to go on from; emptied once it is loaded. None for a new run.
        notes: what is not as in the run that is resumed.
    """

    resolved: ResolvedRecipe
    device: torch.device
    source: data.DataSource
    loaders: data.Loaders
    model: nn.Module
    cost: flops.Cost
    optimizer: Optimizer
    scheduler: Scheduler
    pruner: Pruner
    task: Task
    settings: FitSettings
    world: World = ALONE
    state: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def pattern(self) -> Pattern | None:
        """The pattern asked for, single layers may have another; None for methods without one and under a budget."""
        sparsity = self.resolved.recipe.sparsity
        if self.budget or not (self.sparse and self.structured):
            return None
        return Pattern.parse(sparsity.pattern, sparsity.vector)

    @property
    def budget(self) -> str:
        """The budget that chose the patterns, as "flops 0.25"; "" without one."""
        budget = self.resolved.recipe.sparsity.budget
        found = {"flops": budget.flops, "params": budget.params}
        return next((f"{kind} {share:g}" for kind, share in found.items() if share), "")

    @property
    def sparse(self) -> bool:
        """Whether the method makes anything sparse."""
        return METHODS[self.pruner.method].sparse

    @property
    def structured(self) -> bool:
        """Whether the method takes an N:M pattern."""
        return METHODS[self.pruner.method].structured

    @property
    def sparsity(self) -> float | None:
        """The share to remove that an unstructured method was told; None for methods that are told none."""
        told: float | None = self.resolved.recipe.method.get("sparsity") if not self.structured else None
        return told

    @property
    def title(self) -> str:
        """Model, method and pattern or sparsity, for people."""
        name = f"{self.resolved.recipe.model.name} · {self.pruner.method}"
        if self.sparsity is not None:
            return f"{name}, sparsity {self.sparsity:g}"
        if self.budget:
            return f"{name}, {self.budget}"
        return name if self.pattern is None else f"{name} {self.pattern}"

    @property
    def default_folder(self) -> Path:
        """Where the run goes unless the user says so."""
        model = self.resolved.recipe.model.name
        pattern = self.pattern if self.sparsity is None else f"s{self.sparsity:g}"
        pattern = self.budget.replace(" ", "") or pattern
        return runs.default_name(model, self.pruner.method, pattern)

    @property
    def teacher_macs(self) -> int:
        """Multiply-adds of a teacher's forward pass on one image; 0 without one."""
        return self.task.teacher.macs if isinstance(self.task, distill.Distilled) else 0

    def planned_account(self) -> accounting.Account:
        """What the run will cost on paper."""
        return accounting.planned(self.cost, self.pruner, teacher_macs=self.teacher_macs)

    @property
    def images(self) -> int:
        """Training images of the whole run, each as often as it is seen."""
        batch = self.resolved.recipe.data.batch_size * self.world.size
        return len(self.loaders.train) * batch * self.settings.epochs

    def learning_rates(self) -> list[float]:
        """The largest learning rate of any parameter group at the first update of every epoch."""
        rates = []
        for epoch in range(self.settings.epochs):
            self.scheduler.step_update(epoch * self.updates_per_epoch)
            rates.append(max(float(group["lr"]) for group in self.optimizer.param_groups))
        self.scheduler.step_update(0)
        return rates

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in an epoch."""
        return updates_per_epoch(len(self.loaders.train), self.settings.accumulate)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        result: metrics of the last and the best epoch.
        report: the verifier's, on the checkpoint as written.
        ema_report: likewise for the averaged weights, if there are any.
        dense_bytes: what the tensors take when stored dense.
        file_bytes: size of the checkpoint.
        account: what the run has cost on paper.
        memory: bytes the method held at its peak, by kind.
        seconds: of training and evaluation, over all the sessions of the run.
    """

    result: FitResult
    report: Report
    ema_report: Report | None
    dense_bytes: int
    file_bytes: int
    account: accounting.Account
    memory: Mapping[str, int]
    seconds: float


def choose_device(name: str) -> torch.device:
    """The device of a recipe; "auto" takes a GPU where there is one.

    Raises:
        UsageError: for a device that is not there, or is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported: cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices")
    return device


def prepare(
    resolved: ResolvedRecipe, progress: Callable[[int], None] = lambda count: None, world: World = ALONE
) -> Job:
    """Build everything that a run needs and check that it goes together; nothing is written.

    Args:
        resolved: the recipe.
        progress: told how many images more were checked.
        world: the ranks of the run.

    Raises:
        UsageError: of the kind that tells what does not fit: model, data, layers, method, optimizer.
    """
    recipe = resolved.recipe
    models.check_torchvision()
    device = rank_device(recipe.train.device, world) or choose_device(recipe.train.device)
    if not recipe.model.name:
        raise UsageError("no model: name one (lbc train resnet50 ...) or give a --recipe that has a model.name")
    models.check_name(recipe.model.name)
    source = _open(resolved, progress, world)
    make_deterministic(recipe.train.seed, device)
    model = _create(resolved, source.num_classes).to(device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, scaled(recipe, world.size))
    loaders = data.make_loaders(
        source,
        recipe.data,
        recipe.augment,
        data_config=models.data_config(model, recipe.data.image_size),
        device=device,
        seed=recipe.train.seed,
        world=world,
    )
    cost = _count(model, loaders.pixels, recipe.model.name)
    if recipe.train.sync_bn and world.size > 1:
        model = models.with_common_statistics(model, device)
    resolved = allocation.with_allocation(resolved, model, cost)
    updates = updates_per_epoch(len(loaders.train), recipe.train.accumulate)
    task = distill.distilled(
        make_task(recipe),
        recipe.distill,
        student=recipe.model,
        pixels=loaders.pixels,
        num_classes=source.num_classes,
        class_names=source.class_names,
        device=device,
        channels_last=recipe.train.channels_last,
    )
    return Job(
        resolved=resolved,
        device=device,
        source=source,
        loaders=loaders,
        model=model,
        cost=cost,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, recipe.schedule, recipe.train.epochs, updates),
        pruner=_attach(resolved, model, optimizer),
        task=task,
        settings=FitSettings.of(recipe.train, device),
        world=world,
    )


def _attach(resolved: ResolvedRecipe, model: nn.Module, optimizer: Optimizer) -> Pruner:
    recipe = resolved.recipe
    options = {key: value for key, value in recipe.method.items() if key != "name" and value is not None}
    return attach(
        model,
        optimizer,
        pattern=recipe.sparsity.pattern or None,
        vector=recipe.sparsity.vector,
        layers=recipe.sparsity.layers,
        method=recipe.method["name"],
        epochs=recipe.train.epochs,
        **options,
    )


def _count(model: nn.Module, pixels: data.Pixels, name: str) -> flops.Cost:
    """Pass one image through a copy of the model without memory, before anything is written.

    Raises:
        ModelError: if the model cannot run on images of this size.
    """
    try:
        return flops.count(model, (pixels.channels, pixels.height, pixels.width))
    except ModelError as error:
        raise ModelError(f"{error}; set data.image_size to a size that {name} takes") from error


def _open(resolved: ResolvedRecipe, progress: Callable[[int], None], world: World) -> data.DataSource:
    """The data, checked; rank 0 checks first, and the others take its word where nothing may be left out."""
    recipe = resolved.recipe
    if world.main:
        source = _source(recipe, progress)
        world.barrier()
        return source
    world.barrier()
    trusting = {"check": "off"} if recipe.data.unreadable == "fail" else {}
    return _source(recipe.model_copy(update={"data": recipe.data.model_copy(update=trusting)}), progress)


def _source(recipe: schema.Recipe, progress: Callable[[int], None]) -> data.DataSource:
    if recipe.data.source == GENERATED:
        return data.generated_data(size=recipe.data.image_size or 32, n=4 * min(recipe.data.batch_size, 64))
    return data.open_data(recipe.data, progress)


def _create(resolved: ResolvedRecipe, num_classes: int) -> nn.Module:
    wanted = resolved.recipe.model
    return models.create(
        wanted.name,
        num_classes=num_classes,
        image_size=resolved.recipe.data.image_size,
        pretrained=wanted.pretrained,
        instead="give a file with --init",
        init=Path(wanted.init) if wanted.init else None,
        read=lambda path: weights.read(path).tensors,
        drop_rate=wanted.drop_rate,
        drop_path_rate=wanted.drop_path_rate,
        kwargs=wanted.kwargs,
    )


class _Recorder:
    """A reporter that writes what it hears to the metrics files and passes it on.

    An epoch's record gets the share of a dense step that its steps cost on paper, by the masks at its end.
    """

    def __init__(self, log: MetricsLog, inner: Reporter, job: Job) -> None:
        self._log, self._inner, self._pruner, self._cost = log, inner, job.pruner, job.cost
        self._teacher_macs = job.teacher_macs
        self.memory: dict[str, int] = {}

    def account(self) -> accounting.Account:
        """What the run has cost so far."""
        shares = [record["step_share"] for record in self._log.epochs if record.get("step_share") is not None]
        whole = shares if len(shares) == len(self._log.epochs) else []  # begun by a version that did not note them
        return accounting.carried_out(self._cost, self._pruner.densities(), whole, teacher_macs=self._teacher_macs)

    def start(self, info: Mapping[str, Any]) -> None:
        self._inner.start(info)

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        self._inner.epoch_started(epoch, epochs, steps, facts)

    def step(self, record: Mapping[str, Any]) -> None:
        self._log.append("step", **record)
        held = self._pruner.memory_bytes()
        self.memory = {kind: max(self.memory.get(kind, 0), size) for kind, size in held.items()}
        self._inner.step(record)

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        share = accounting.step_share(self._cost, self._pruner, self._pruner.densities())
        self._log.append("epoch", **record, step_share=share)
        self._inner.epoch_ended(record)

    def message(self, text: str, level: str = "info") -> None:
        self._inner.message(text, level)

    def finish(self) -> None:
        self._inner.finish()


def run(
    job: Job,
    folder: RunFolder,
    *,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train, save the checkpoint, verify it, and write the summary.

    Args:
        job: prepared, or that of a resumed run.
        folder: new, or that of the run to go on with.
        reporter: shows the run.
        stop: polled; once true the run ends in order.

    Raises:
        Interrupted, DivergenceError: from the loop; the last state saved is in the folder.
        VerificationError: if the checkpoint does not hold what it claims.
        OutputError: if the folder cannot be written.
    """
    if job.state is None or job.notes:
        folder.write_recipe(job.resolved.text)
    if job.state is None:
        folder.write_environment(describe_environment())
    folder.summary.unlink(missing_ok=True)  # of a run that is extended
    log = folder.metrics(None if job.state is None else (int(job.state["epoch"]), int(job.state["step"])))
    recorder = _Recorder(log, reporter or NullReporter(), job)
    noted = {"batch_size": job.resolved.recipe.data.batch_size, "teacher": distill.teacher_digest(job.task)}
    result = _fit(job, stop, recorder, lambda state: states.save(folder, {**state, **noted}))
    seconds = sum(record["seconds"] for record in result.history)
    report, ema_report = _save(job, folder, result)
    dense = sum(t.numel() * t.element_size() for t in job.model.state_dict().values())
    size = folder.model.stat().st_size
    outcome = Outcome(result, report, ema_report, dense, size, recorder.account(), recorder.memory, seconds)
    folder.write_summary(summary(job, outcome))
    return outcome


def take_part(job: Job, *, stop: Callable[[], bool] = lambda: False) -> None:
    """What the ranks other than 0 do: train, and leave report and files to rank 0.

    Raises:
        Interrupted, DivergenceError, DistributedError: from the loop.
    """
    _fit(job, stop, None, lambda state: None)


def _fit(
    job: Job, stop: Callable[[], bool], reporter: Reporter | None, save_state: Callable[[dict[str, Any]], None]
) -> FitResult:
    return fit(
        job.model,
        job.optimizer,
        job.scheduler,
        job.pruner,
        job.task,
        job.loaders,
        job.settings,
        reporter=reporter,
        save_state=save_state,
        resume=job.state,
        stop=stop,
        world=job.world,
    )


def _save(job: Job, folder: RunFolder, result: FitResult) -> tuple[Report, Report | None]:
    """Write and verify the checkpoint, and that of the averaged weights."""
    created = models.created(job.model)
    assert created is not None
    arch = {"arch": created.arch, "kwargs": dict(created.kwargs), "task": job.resolved.recipe.task}
    pixels = dataclasses.asdict(job.loaders.pixels)
    # The folder's own text: a resumed run read its values from there, and would call that their origin.
    recipe = folder.recipe.read_text(encoding="utf-8")
    shared: dict[str, Any] = {"pruner": job.pruner, "arch": arch, "recipe": recipe, "overwrite": True}
    numbers = {key: value for key, value in result.last.items() if isinstance(value, int | float)}
    metrics = {key: value for key, value in numbers.items() if key not in _MEASURED}
    described = {**metrics, "pixels": pixels, "class_names": job.source.class_names}
    checkpoint.save(job.model, folder.model, metrics=described, **shared)
    if result.ema is None:
        return _verified(folder.model), None
    checkpoint.save(job.model, folder.ema, metrics=described, tensors=result.ema.state_dict(), **shared)
    return _verified(folder.model), _verified(folder.ema)


def _verified(path: Path) -> Report:
    report = verify(path)
    if not report.ok:
        raise VerificationError(f"{path} does not hold what it claims: {report.findings[0].message}; a bug in lbc")
    return report


def summary(job: Job, outcome: Outcome) -> dict[str, Any]:
    """What summary.json says of a run; plain values only."""
    last, best = outcome.result.last, outcome.result.best
    return {
        "model": job.resolved.recipe.model.name,
        "method": job.pruner.method,
        "pattern": None if job.pattern is None else str(job.pattern),
        "sparsity": job.sparsity,
        "budget": job.budget or None,
        "data": job.source.name,
        "seed": job.settings.seed,
        "epochs": job.settings.epochs,
        "last": last,
        "best": best,
        "density": job.pruner.density(),
        "layers": job.pruner.densities(),
        "dense_layers": {s.name: s.reason for s in job.pruner.skipped},
        "counted": outcome.account.record(),
        "method_bytes": dict(outcome.memory),
        "dense_bytes": outcome.dense_bytes,
        "file_bytes": outcome.file_bytes,
        "seconds": outcome.seconds,
        "verified": outcome.report.ok,
    }
