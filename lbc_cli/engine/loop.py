"""The loop over epochs: train, evaluate, report, save, stop. The package's docstring has its rules."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lbc_cli.data.rng import seed_everything
from lbc_cli.engine.control import memory_advice, peak_memory
from lbc_cli.engine.evaluation import evaluate
from lbc_cli.engine.protocols import (
    Batch,
    Batches,
    FitResult,
    FitSettings,
    Loaders,
    NullReporter,
    Pruner,
    Record,
    Reporter,
)
from lbc_cli.engine.updates import NotFiniteError, Outcome, Updater
from lbc_cli.errors import CheckpointError, DataError, DivergenceError, Interrupted, LbcError, UsageError
from lbc_cli.optim import Scheduler, updates_per_epoch
from lbc_cli.tasks import Task

_STATE_VERSION = 1
_STATE_KEYS = frozenset({"version", "epoch", "updates", "updates_per_epoch", "model", "optimizer", "pruner"})
_STATE_KEYS |= {"scaler", "ema", "history", "best"}

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
    resume: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train for `settings.epochs` epochs, or for what is left of them.

    Args:
        model: on its device and in its memory format already; trained in place.
        optimizer: over the parameters of `model`.
        scheduler: sets the learning rates per update.
        pruner: attached to `model` and `optimizer` for as many epochs.
        task: batch -> loss and metrics.
        loaders: training and evaluation batches.
        settings: the loop's options.
        reporter: shows the run.
        save_state: writes the state of an epoch boundary: nested dicts of tensors and plain values. The tensors are
            the live ones: write them before returning.
        resume: such a state, to continue from.
        stop: polled after every update; once true, the run ends at once, or after an epoch's end is saved.

    Raises:
        DivergenceError: before the update that a non-finite loss or gradient would have made.
        Interrupted: when `stop` said so.
        DataError: if there are no batches.
        UsageError: if the saved state belongs to other settings.
        CheckpointError: if the saved state lacks something.
        LbcError: when memory runs out, with advice.
    """
    updater = Updater(model, optimizer, scheduler, task, settings)
    run = _Run(updater, pruner, loaders, reporter or NullReporter(), save_state, stop)
    if resume is not None:
        run.restore(resume)
    run.reporter.start(run.info())
    try:
        with memory_advice("the batch size (train.accumulate keeps the update's), the image size or train.amp"):
            for epoch in range(run.done, settings.epochs):
                with run.interruptible(epoch):
                    run.epoch(epoch)
    finally:
        run.reporter.finish()
    return FitResult(run.history[-1], run.best, run.history, updater.ema)


class _Clocked:
    """An iterator over batches that notes how long it was waited for."""

    def __init__(self, batches: Batches) -> None:
        began = time.perf_counter()
        self._batches = iter(batches)
        self.seconds = time.perf_counter() - began

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - began

    def in_groups(self, size: int) -> Iterator[Iterator[Batch]]:
        """Groups of `size` batches, the last maybe shorter; each is to be used up before the next is asked for."""
        for first in self:
            yield itertools.chain([first], itertools.islice(self, size - 1))


class _Meter:
    """Sums over a training epoch; losses stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self.images = 0
        self._began = time.perf_counter()
        self._read = (0.0, 0, 0.0)

    def add(self, outcome: Outcome) -> None:
        """Take in an update."""
        self._loss += outcome.loss * outcome.images
        self.images += outcome.images

    def since_start(self) -> tuple[float, float]:
        """Mean loss, and seconds once the device has caught up."""
        return self._loss.item() / self.images, time.perf_counter() - self._began

    def since_last(self) -> Record:
        """Mean loss and throughput since the last call. Waits for the device."""
        loss = self._loss.item()
        now = (loss, self.images, time.perf_counter() - self._began)
        loss, images, seconds = (a - b for a, b in zip(now, self._read, strict=True))
        self._read = now
        return {"loss": loss / images, "images_per_second": images / seconds}


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
    ) -> None:
        self.updater, self.settings, self.pruner = updater, updater.settings, pruner
        self.loaders, self.reporter, self.save_state, self.stop = loaders, reporter, save_state, stop
        self.steps = updates_per_epoch(len(loaders.train), self.settings.accumulate)
        if not self.steps:
            raise DataError("there is no training batch: the training set is smaller than data.batch_size")
        self.done = 0
        self.saved: int | None = None
        self.history: list[Record] = []
        self.best: Record | None = None

    def info(self) -> Record:
        """What is known before the first epoch."""
        return {
            "epochs": self.settings.epochs,
            "first_epoch": self.done,
            "updates_per_epoch": self.steps,
            "device": str(self.settings.device),
            "amp": self.settings.amp,
        }

    @contextlib.contextmanager
    def interruptible(self, epoch: int) -> Iterator[None]:
        """Loader processes that a signal has ended are an interruption, not a failure.

        A signal to the whole process group reaches them too, before the loop looks at its flag.
        """
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and self.stop():
                raise self._interrupted(epoch) from error
            raise

    def epoch(self, epoch: int) -> None:
        """Train, evaluate, report and save one epoch."""
        began = time.perf_counter()
        seed_everything(self.settings.seed, epoch)
        self.loaders.set_epoch(epoch)
        self.pruner.begin_epoch(epoch)
        facts = {
            "density": self.pruner.density(),
            "survivors": self.pruner.planned_survivors(epoch),
            "phase": self.pruner.phase,
            "lr": self.updater.set_rate(),
        }
        self.reporter.epoch_started(epoch, self.settings.epochs, self.steps, facts)
        record = {"epoch": epoch, **facts, **self._train(epoch)}
        if self.updater.ema is not None:
            self.pruner.project_(self.updater.ema)
        if self._due(epoch, self.settings.eval_every):
            record.update(self._measure())
        record.update(seconds=time.perf_counter() - began, memory=peak_memory(self.settings.device))
        self._close(epoch, record)

    def _train(self, epoch: int) -> Record:
        """All updates of an epoch."""
        self.updater.model.train()
        meter = _Meter(self.settings.device)
        batches = _Clocked(self.loaders.train)
        lr = 0.0
        for step, group in enumerate(batches.in_groups(self.settings.accumulate), 1):
            outcome = self._update(group, epoch, step)
            meter.add(outcome)
            lr = outcome.lr
            if step % self.settings.log_every == 0 or step == self.steps:
                self.reporter.step(self._step_record(epoch, step, outcome, meter))
            if step != self.steps and self.stop():
                raise self._interrupted(epoch, step)
        if not meter.images:
            raise DataError(f"epoch {epoch}: the training loader gave no batch")
        loss, seconds = meter.since_start()
        speed = {"images_per_second": meter.images / seconds, "data_wait": batches.seconds / seconds}
        return {"lr": lr, "train_loss": loss, **speed}

    def _update(self, group: Iterator[Batch], epoch: int, step: int) -> Outcome:
        try:
            return self.updater.update(group)
        except NotFiniteError as error:
            raise self._diverged(error.outcome, epoch, step) from None

    def _measure(self) -> Record:
        """Metrics of the weights that would be shipped, and of their average."""
        with self.pruner.deployed():
            metrics = self._evaluate(self.updater.model)
        record = {"val_loss" if name == "loss" else name: value for name, value in metrics.items()}
        if self.updater.ema is not None:
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
        )

    def _close(self, epoch: int, record: Record) -> None:
        """Keep, report and save the record and state of an epoch; end here if asked to."""
        self.done = epoch + 1
        self.history.append(record)
        self._compare(record)
        self.reporter.epoch_ended(record)
        stop = self.stop()
        if self.save_state and (stop or self._due(epoch, self.settings.save_every)):
            self.save_state(self.state())
            self.saved = epoch
        if stop and self.done < self.settings.epochs:
            raise self._interrupted(epoch)

    def _compare(self, record: Record) -> None:
        name = self.updater.task.primary
        if name not in record or record["phase"] != "final":
            return
        sign = 1 if self.updater.task.larger_is_better else -1
        if self.best is None or sign * record[name] > sign * self.best[name]:
            self.best = record

    def _due(self, epoch: int, every: int) -> bool:
        return (epoch + 1) % every == 0 or epoch + 1 == self.settings.epochs

    def _step_record(self, epoch: int, step: int, outcome: Outcome, meter: _Meter) -> Record:
        where = {"epoch": epoch, "step": step, "steps": self.steps, "update": self.updater.updates}
        return {**where, "lr": outcome.lr, "grad_norm": outcome.norm.item(), **meter.since_last()}

    def _diverged(self, outcome: Outcome, epoch: int, step: int) -> DivergenceError:
        return DivergenceError(
            f"epoch {epoch}, update {step} of {self.steps}: loss {outcome.loss.item():.4g}, gradient norm "
            f"{outcome.norm.item():.4g}, learning rate {outcome.lr:.4g}: loss and gradients must be finite; stopped "
            f"before the update. Lower optimizer.lr, warm up longer, set train.clip_grad, or change train.amp = "
            f"{self.settings.amp!r}; {self._saved_until()}"
        )

    def _interrupted(self, epoch: int, step: int | None = None) -> Interrupted:
        where = f"after epoch {epoch}" if self.done > epoch else f"in epoch {epoch}"
        after = f", update {step} of {self.steps}" if step else ""
        return Interrupted(f"interrupted {where}{after}: {self._saved_until()}")

    def _saved_until(self) -> str:
        if self.saved is None:
            return "no state was saved yet, so a new run starts from the beginning"
        return f"the state after epoch {self.saved} is saved, a resumed run goes on with epoch {self.saved + 1}"

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, beside settings and data."""
        return {
            "version": _STATE_VERSION,
            "epoch": self.done,
            "updates_per_epoch": self.steps,
            "pruner": self.pruner.state_dict(),
            "history": self.history,
            "best": self.best,
            **self.updater.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`: the pruner last, for it looks at weights and optimizer."""
        self._check(state)
        try:
            self.updater.load_state_dict(state)
            self.pruner.load_state_dict(state["pruner"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, LbcError):
                raise
            # torch goes on for lines, with every parameter in them
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
            raise UsageError(
                f"the saved state does not fit this run ({reason[:200]}): resume with the model, optimizer and "
                "settings that it was saved with"
            ) from error
        self.done = state["epoch"]
        self.saved = self.done - 1
        self.history = [dict(record) for record in state["history"]]
        self.best = state["best"]

    def _check(self, state: Mapping[str, Any]) -> None:
        missing = _STATE_KEYS - state.keys()
        if missing or state["version"] != _STATE_VERSION:
            found = f"it lacks {', '.join(sorted(missing))}" if missing else f"it has version {state['version']}"
            raise CheckpointError(f"the saved state cannot be continued: {found}; version {_STATE_VERSION} is needed")
        settings = {
            "updates per epoch (from data, batch size and accumulation)": (state["updates_per_epoch"], self.steps),
            "train.ema": (state["ema"] is not None, self.settings.ema),
            "train.amp = 'float16'": (bool(state["scaler"]), self.settings.amp == "float16"),
        }
        for what, (saved, now) in settings.items():
            if saved != now:
                raise UsageError(f"the saved state has {what}: {saved}, this run {now}; resume with the same settings")
        if state["epoch"] > self.settings.epochs:
            raise UsageError(f"the saved state is of {state['epoch']} epochs, train.epochs = {self.settings.epochs}")
