"""The loop over epochs: train, evaluate, report, save, stop. The package's docstring has its rules."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lbc_cli.data.rng import seed_everything
from lbc_cli.distributed import ALONE, World
from lbc_cli.engine import positions
from lbc_cli.engine.control import memory_advice, peak_memory
from lbc_cli.engine.evaluation import evaluate
from lbc_cli.engine.meters import Clocked, Meter
from lbc_cli.engine.positions import Position
from lbc_cli.engine.protocols import (
    Batch,
    FitResult,
    FitSettings,
    Loaders,
    NullReporter,
    Pruner,
    Record,
    Reporter,
)
from lbc_cli.engine.updates import NotFiniteError, Outcome, Updater
from lbc_cli.errors import DataError, DistributedError, DivergenceError, Interrupted
from lbc_cli.optim import Scheduler, updates_per_epoch
from lbc_cli.tasks import Task

SaveState = Callable[[dict[str, Any]], None]


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Scheduler,
    pruner: Pruner,
    task: Task,
    loaders: Loaders,
    settings: FitSettings,
    *,
    reporter: Reporter | None = None,
    save_state: SaveState | None = None,
    resume: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> FitResult:
    """Train for `settings.epochs` epochs, or for what is left of them.

    Args:
        model: on its device and in its memory format already; trained in place.
        optimizer: over the parameters of `model`.
        scheduler: sets the learning rates per update.
        pruner: attached to `model` and `optimizer` for as many epochs.
        task: batch -> loss and metrics.
        loaders: training and evaluation batches, of several ranks each its part.
        settings: the loop's options.
        reporter: shows the run; called on rank 0 only.
        save_state: writes a state of the run: nested dicts of tensors and plain values. The tensors are the live ones:
            write them before returning. Called on rank 0 only.
        resume: such a state, to continue from; the same on every rank. Emptied once it is loaded, for it may be large.
        stop: polled after every update; once true on any rank, the state is saved and the run ends on all of them.
        world: the ranks of a distributed run.

    Raises:
        DivergenceError: for a loss or gradient that is not finite, before the update that it would have made (on a GPU
            maybe one later, but before any state is saved).
        Interrupted: when `stop` said so.
        DistributedError: if a rank was lost, or its masks are not those of the others.
        DataError: if there are no batches.
        UsageError: if the saved state belongs to other settings.
        CheckpointError: if the saved state lacks something.
        LbcError: when memory runs out, with advice.
    """
    updater = Updater(model, optimizer, scheduler, task, settings, world)
    shown = reporter if reporter is not None and world.main else NullReporter()
    run = _Run(updater, pruner, loaders, shown, save_state, stop, world)
    if resume is not None:
        run.restore(resume)
        resume.clear()
    run.reporter.start(run.info())
    try:
        with memory_advice("the batch size (train.accumulate keeps the update's), the image size or train.amp"):
            for epoch in range(run.at.epoch, settings.epochs):
                with run.interruptible():
                    run.epoch(epoch)
    finally:
        run.reporter.finish()
    return FitResult(run.history[-1], run.best, run.history, updater.ema)


class _Run:
    """The state of one `fit`."""

    def __init__(
        self,
        updater: Updater,
        pruner: Pruner,
        loaders: Loaders,
        reporter: Reporter,
        save_state: SaveState | None,
        stop: Callable[[], bool],
        world: World,
    ) -> None:
        self.updater, self.settings, self.pruner = updater, updater.settings, pruner
        self.loaders, self.reporter, self.save_state, self.stop = loaders, reporter, save_state, stop
        self.world = world
        self.steps = updates_per_epoch(len(loaders.train), self.settings.accumulate)
        if not self.steps:
            raise DataError("there is no training batch: the training set is smaller than data.batch_size")
        self.at = Position(0, 0)
        self.saved: Position | None = None
        self.history: list[Record] = []
        self.best: Record | None = None
        self._facts: Record = {}
        self._lr = self._waited = 0.0
        self._peak = 0
        self._meter = Meter(self.settings.device, world)
        self._resumed: Mapping[str, Any] | None = None
        self._saved_at = time.monotonic()

    def info(self) -> Record:
        """What is known before the first epoch."""
        return {
            "epochs": self.settings.epochs,
            "first_epoch": self.at.epoch,
            "first_step": self.at.step,
            "updates_per_epoch": self.steps,
            "device": str(self.settings.device),
            "amp": self.settings.amp,
            "ranks": self.world.size,
        }

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """What a signal to the whole process group has ended first is an interruption, not a failure.

        It reaches loader processes and other ranks too, before the loop looks at its flag.
        """
        try:
            yield
        except (RuntimeError, DistributedError) as error:
            if not self.stop():
                raise
            raise self._interrupted(saving=self._savable()) from error

    def _savable(self) -> bool:
        """Whether this process alone can still take a state that a run could go on from."""
        begun = bool(self._facts) and not self.at.step  # the masks have moved, no update was made yet
        return self.world.size == 1 and self.updater.between and not begun

    def epoch(self, epoch: int) -> None:
        """Train, evaluate, report and save one epoch, or what is left of it."""
        self._begin(epoch)
        self.reporter.epoch_started(epoch, self.settings.epochs, self.steps, self._facts)
        record = {"epoch": epoch, **self._facts, **self._train(epoch)}
        if self.updater.ema is not None:
            self.pruner.project_(self.updater.ema)
        if self._due(epoch, self.settings.eval_every):
            record.update(self._measure())
        memory = peak_memory(self.settings.device)
        record.update(seconds=self._meter.seconds, memory=None if memory is None else max(self._peak, memory))
        self._close(epoch, record)

    def _begin(self, epoch: int) -> None:
        """Order, masks and measures of an epoch; of one that was begun before, those that the state had."""
        seed_everything(self.settings.seed, epoch)
        self.loaders.set_epoch(epoch, self.at.step * self.settings.accumulate)
        self._meter, self._peak = Meter(self.settings.device, self.world), 0
        running, self._resumed = self._resumed, None
        if running is None:
            self.pruner.begin_epoch(epoch)
            self._facts = {
                "density": self.pruner.density(),
                "survivors": self.pruner.planned_survivors(epoch),
                "phase": self.pruner.phase,
                "lr": self.updater.set_rate(),
            }
            self._lr, self._waited = self._facts["lr"], 0.0
        else:
            self._facts, self._lr, self._waited = dict(running["facts"]), running["lr"], running["waited"]
            self._meter.load_state_dict(running["meter"])
        if self.world.size > 1:
            self.world.agree(positions.mask_digest(self.pruner.masks()), f"the masks at the start of epoch {epoch}")

    def _train(self, epoch: int) -> Record:
        """All updates of an epoch that are left."""
        self.updater.model.train()
        batches = Clocked(self.loaders.train, self._waited)
        for step, group in enumerate(batches.in_groups(self.settings.accumulate), self.at.step + 1):
            logs = step % self.settings.log_every == 0 or step == self.steps
            outcome = self._update(group, epoch, step, logs)
            self._meter.add(outcome)
            self.at, self._lr, self._waited = Position(epoch, step), outcome.lr, batches.seconds
            if logs:
                self.reporter.step(self._step_record(outcome))
            if step != self.steps:
                self._between_updates()
        if self._meter.empty:
            raise DataError(f"epoch {epoch}: the training loader gave no batch")
        rates = self._meter.since_start(self._waited)
        return {"lr": self._lr, "train_loss": rates.pop("loss"), **rates}

    def _update(self, group: Iterator[Batch], epoch: int, step: int, logs: bool) -> Outcome:
        """One update, under random numbers that follow from its place."""
        seed_everything(self.settings.seed, epoch, step, self.world.rank)
        size = min(self.settings.accumulate, len(self.loaders.train) - (step - 1) * self.settings.accumulate)
        try:
            return self.updater.update(group, size, settle=logs)
        except NotFiniteError as error:
            raise self._diverged(error, epoch, step) from None

    def _between_updates(self) -> None:
        """Save a state where one is due, and end where a signal asks for it; all ranks alike."""
        stop, due = self.world.any(self.stop(), self._save_due())
        if stop:
            raise self._interrupted()
        if due:
            self._save()

    def _save_due(self) -> bool:
        settings = self.settings
        if settings.save_steps and self.at.step % settings.save_steps == 0:
            return True
        return bool(settings.save_minutes) and time.monotonic() - self._saved_at >= 60 * settings.save_minutes

    def _save(self) -> None:
        """Write the state of this moment; every rank has a part in making it, rank 0 writes."""
        try:
            self.updater.settle()
        except NotFiniteError as error:
            raise self._diverged(error, self.at.epoch, self.at.step) from None
        state = self.state()
        if self.save_state and self.world.main:
            self.save_state(state)
        if self.save_state:
            self.saved = self.at
        self._saved_at = time.monotonic()

    def _measure(self) -> Record:
        """Metrics of the weights that would be shipped, and of their average."""
        self.world.take_buffers(self.updater.model)
        with self.pruner.deployed():
            metrics = self._evaluate(self.updater.model)
        record = {"val_loss" if name == "loss" else name: value for name, value in metrics.items()}
        if self.updater.ema is not None:
            self.world.take_buffers(self.updater.ema)
            record.update({f"ema_{name}": value for name, value in self._evaluate(self.updater.ema).items()})
        return record

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        return evaluate(
            model,
            self.loaders.val,
            self.updater.task,
            device=self.settings.device,
            amp=self.settings.amp,
            channels_last=self.settings.channels_last,
            world=self.world,
        )

    def _close(self, epoch: int, record: Record) -> None:
        """Keep, report and save the record and state of an epoch; end here if asked to."""
        self.at = Position(epoch + 1, 0)
        self._facts = {}
        self.history.append(record)
        self._compare(record)
        self.reporter.epoch_ended(record)
        (stop,) = self.world.any(self.stop())
        last = self.at.epoch == self.settings.epochs
        if stop and not last:
            raise self._interrupted()
        if self._due(epoch, self.settings.save_every):
            self._save()

    def _compare(self, record: Record) -> None:
        name = self.updater.task.primary
        if name not in record or record["phase"] != "final":
            return
        sign = 1 if self.updater.task.larger_is_better else -1
        if self.best is None or sign * record[name] > sign * self.best[name]:
            self.best = record

    def _due(self, epoch: int, every: int) -> bool:
        return (epoch + 1) % every == 0 or epoch + 1 == self.settings.epochs

    def _step_record(self, outcome: Outcome) -> Record:
        where = {"epoch": self.at.epoch, "step": self.at.step, "steps": self.steps, "update": self.updater.updates}
        rates = self._meter.since_last(self._waited)
        memory = peak_memory(self.settings.device)
        self._peak = max(self._peak, memory or 0)
        shown = {"lr": outcome.lr, "grad_norm": outcome.norm.item()}
        masks = {key: self._facts[key] for key in ("density", "survivors")}  # as the epoch began
        return {**where, **shown, **masks, **rates, "memory": memory}

    def _diverged(self, error: NotFiniteError, epoch: int, step: int) -> DivergenceError:
        outcome = error.outcome
        when = "found after it, before anything was saved" if error.made else "stopped before the update"
        return DivergenceError(
            f"epoch {epoch}, update {step - error.ago} of {self.steps}: loss {outcome.loss.item():.4g}, gradient norm "
            f"{outcome.norm.item():.4g}, learning rate {outcome.lr:.4g}: loss and gradients must be finite; {when}. "
            f"Lower optimizer.lr, warm up longer, set train.clip_grad, or change train.amp = "
            f"{self.settings.amp!r}; {positions.until(self.saved)}"
        )

    def _interrupted(self, *, saving: bool = True) -> Interrupted:
        """The end of an interrupted run, with its last complete update saved."""
        if saving:
            self._save()
        return Interrupted(f"interrupted {self.at.described(self.steps)}: {positions.until(self.saved)}")

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, beside settings and data. All ranks must call it."""
        running = None
        if self.at.step:
            running = {"facts": self._facts, "lr": self._lr, "waited": self._waited}
            running["meter"] = self._meter.state_dict()
        return {
            "version": positions.STATE_VERSION,
            "epoch": self.at.epoch,
            "step": self.at.step,
            "running": running,
            "updates_per_epoch": self.steps,
            "ranks": self.world.size,
            "pruner": self.pruner.state_dict(),
            "history": self.history,
            "best": self.best,
            **self.updater.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        positions.check(state, self.settings, self.steps)
        positions.load(state, self.updater, self.pruner)
        self.at = self.saved = Position(state["epoch"], state["step"])
        self._resumed = state["running"]
        self.history = [dict(record) for record in state["history"]]
        self.best = state["best"]
