"""Progress of a run on stderr: a bar and a line per epoch on a terminal, plain lines now and then anywhere else.

`TrainingProgress` is what the engine calls a reporter; it needs nothing from the engine but the calls.

Records are mappings with the engine's keys. `COLUMNS` names the keys of an epoch that are shown; others are passed
over, absent ones leave no gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lbc_cli.report.console import Console
from lbc_cli.report.formats import (
    MISSING,
    format_accuracy,
    format_count,
    format_left,
    format_number,
    format_rate,
    format_seconds,
)

Clock = Callable[[], float]
Format = Callable[[float | None], str]

INTERVAL = 30.0  # seconds between plain lines within an epoch

COLUMNS: dict[str, tuple[str, int, Format]] = {
    "train_loss": ("loss", 8, format_number),
    "val_loss": ("val loss", 8, format_number),
    "top1": ("top-1", 8, format_accuracy),
    "density": ("density", 7, lambda value: format_number(value, 3)),
    "lr": ("lr", 8, format_rate),
    "images_per_second": ("images/s", 8, format_count),
    "seconds": ("time", 11, format_seconds),
    "ema_top1": ("top-1 EMA", 9, format_accuracy),
    "top5": ("top-5", 8, format_accuracy),
}
"""Key of an epoch's record -> heading, width, format. Those that do not fit a narrow terminal drop out from the end."""


def format_epoch(record: Mapping[str, Any], epochs: int) -> str:
    """An epoch as one plain line: "epoch 3/30: loss 1.2345, val loss 1.1000, top-1 85.3 %, ..."."""
    shown = [f"{label} {show(record[key])}" for key, (label, _, show) in COLUMNS.items() if record.get(key) is not None]
    return f"epoch {int(record['epoch']) + 1}/{epochs}: " + ", ".join(shown)


class EpochTable:
    """Lines of a table that grows by a row per epoch.

    Args:
        epochs: of the whole run.
        width: columns of the terminal.
        ema: whether averaged weights are evaluated as well.
    """

    def __init__(self, epochs: int, width: int, *, ema: bool = False) -> None:
        self._epochs = epochs
        self._first = max(5, 2 * len(str(epochs)) + 1)
        self._keys: list[str] = []
        left = width - self._first
        for key in (key for key in COLUMNS if ema or not key.startswith("ema_")):
            left -= COLUMNS[key][1] + 2
            if left < 0:
                break
            self._keys.append(key)

    def header(self) -> str:
        """The headings."""
        return self._join("epoch", [COLUMNS[key][0] for key in self._keys])

    def row(self, record: Mapping[str, Any]) -> str:
        """The row of an epoch."""
        cells = [COLUMNS[key][2](record.get(key)) for key in self._keys]
        return self._join(f"{int(record['epoch']) + 1}/{self._epochs}", cells)

    def _join(self, first: str, cells: list[str]) -> str:
        sized = [cell.rjust(COLUMNS[key][1]) for key, cell in zip(self._keys, cells, strict=True)]
        return "  ".join([first.rjust(self._first), *sized])


class _Pace:
    """How long the rest will take.

    Args:
        done: updates made before the clock started.
        total: updates of the whole run.
        clock: monotonic seconds.
    """

    def __init__(self, done: int, total: int, clock: Clock) -> None:
        self._before = self._done = done
        self._total, self._clock = total, clock
        self._begun = self._noted = clock()

    def note(self, done: int) -> None:
        """So many updates are behind now."""
        self._done, self._noted = done, self._clock()

    def left(self) -> float | None:
        """Seconds to the end at the pace so far, evaluations included; None before the first update."""
        if self._done <= self._before:
            return None
        each = (self._noted - self._begun) / (self._done - self._before)
        return max(0.0, each * (self._total - self._done) - (self._clock() - self._noted))


class TrainingProgress:
    """A reporter for the engine.

    Args:
        console: where to; a quiet one shows warnings only.
        interval: seconds between plain lines within an epoch, off a terminal.
        clock: monotonic seconds.
    """

    def __init__(self, console: Console, *, interval: float = INTERVAL, clock: Clock = time.monotonic) -> None:
        self._console, self._interval, self._clock = console, interval, clock
        self._epochs, self._density = 0, 1.0
        self._spoken = clock()
        self._pace = _Pace(0, 0, clock)
        self._table: EpochTable | None = None
        self._bar: Progress | None = None

    def start(self, info: Mapping[str, Any]) -> None:
        """A run begins.

        Args:
            info: "epochs" of the whole run, "first_epoch" (counted from 0) of this process, "updates_per_epoch".
        """
        updates = int(info["updates_per_epoch"])
        done, total = int(info["first_epoch"]) * updates, int(info["epochs"]) * updates
        self._pace = _Pace(done, total, self._clock)
        if self._console.live and not self._console.quiet:
            self._bar = _training_bar(self._console.err, self._pace)
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        """An epoch begins.

        Args:
            epoch: counted from 0.
            epochs: of the whole run.
            steps: updates of this epoch.
            facts: what the schedule did: density, survivors, phase, lr; details for the curious.
        """
        self._epochs, self._density = epochs, facts["density"]
        self._spoken = self._clock()
        self._console.detail(f"epoch {epoch + 1}/{epochs}, {steps} updates: {_facts(facts)}")
        if self._bar is not None:
            number, density = self._bar.tasks[0].id, format_number(self._density, 3)
            self._bar.update(number, description=f"epoch {epoch + 1}/{epochs}", density=density)

    def step(self, record: Mapping[str, Any]) -> None:
        """Updates were made.

        Args:
            record: "epoch", "step" of "steps" in it (counted from 1), "update" of the run, "loss" and
                "images_per_second" since the last record.
        """
        self._pace.note(int(record["update"]))
        if self._bar is not None:
            self._bar.update(
                self._bar.tasks[0].id,
                completed=int(record["update"]),
                loss=format_number(record["loss"]),
                rate=format_count(record["images_per_second"]),
            )
        elif self._clock() - self._spoken >= self._interval and record["step"] < record["steps"]:
            self._spoken = self._clock()
            self._console.info(self._step_line(record))

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """An epoch is over, evaluated where it was to be.

        Args:
            record: "epoch" (counted from 0) and any of the keys in COLUMNS.
        """
        if self._bar is None:
            last = int(record["epoch"]) + 1 >= self._epochs
            left = "" if last else f", {format_left(self._pace.left())} left"
            self._console.info(format_epoch(record, self._epochs) + left)
            return
        if self._table is None:
            self._table = EpochTable(self._epochs, self._console.err.width, ema="ema_top1" in record)
            self._console.err.print(Text(self._table.header(), style="bold"), no_wrap=True)
        self._console.err.print(Text(self._table.row(record)), no_wrap=True)

    def message(self, text: str, level: str = "info") -> None:
        """Say something at "detail", "info" or "warning"."""
        self._console.message(text, level)

    def finish(self) -> None:
        """The run is over, in whatever way; the terminal is the user's again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def _step_line(self, record: Mapping[str, Any]) -> str:
        return (
            f"epoch {record['epoch'] + 1}/{self._epochs}, step {record['step']}/{record['steps']}: "
            f"loss {format_number(record['loss'])}, density {format_number(self._density, 3)}, "
            f"{format_count(record['images_per_second'])} images/s, {format_left(self._pace.left())} left"
        )


def _facts(facts: Mapping[str, Any]) -> str:
    """What the schedule did, as "density 0.8333, survivors 2:4 = 5, phase training, lr 0.1"."""
    said = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            said += [f"{key} {name} = {count}" for name, count in value.items()]
        else:
            said.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(said)


class _Field(ProgressColumn):
    """A field of the task between two words."""

    def __init__(self, name: str, before: str = "", after: str = "") -> None:
        super().__init__()
        self._name, self._before, self._after = name, before, after

    def render(self, task: Task) -> Text:
        """The field, or a dash while it is not known."""
        return Text(f"{self._before}{task.fields.get(self._name, MISSING)}{self._after}", no_wrap=True)


class _Left(ProgressColumn):
    """The time left, counting down between updates."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        """The time left, or a dash while there is nothing to go by."""
        return Text(f"{format_left(self._pace.left())} left", no_wrap=True)


def _training_bar(console: RichConsole, pace: _Pace) -> Progress:
    """A bar over all updates of a run."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        _Field("loss", "loss "),
        _Field("density", "density "),
        _Field("rate", after=" img/s"),
        _Left(pace),
        console=console,
        expand=True,
        transient=True,
        redirect_stdout=False,
        refresh_per_second=4,
    )


def _ignore(_: int) -> None:
    """Take note of nothing."""


@contextmanager
def task(
    console: Console,
    description: str,
    total: int | None = None,
    *,
    interval: float = INTERVAL,
    clock: Clock = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """A long scan: a bar on a terminal, a plain line every `interval` seconds elsewhere.

    Args:
        console: where to.
        description: what is done, such as "checking images".
        total: how many things there are; None where that is not known.
        interval: seconds between plain lines.
        clock: monotonic seconds.

    Yields:
        A function to call with the number of things done since the last call.
    """
    if console.quiet:
        yield _ignore
    elif console.live:
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}" + ("" if total is None else " of {task.total:.0f}"), markup=False),
            console=console.err,
            transient=True,
        ) as bar:
            yield partial(bar.advance, bar.add_task(description, total=total))
    else:
        yield _PlainTask(console, description, total, interval, clock).advance


class _PlainTask:
    """A scan that says now and then how far it is."""

    def __init__(self, console: Console, description: str, total: int | None, interval: float, clock: Clock) -> None:
        self._console, self._description, self._total = console, description, total
        self._interval, self._clock, self._spoken, self._done = interval, clock, clock(), 0

    def advance(self, count: int) -> None:
        """Note that so many things more are done."""
        self._done += count
        if self._clock() - self._spoken >= self._interval:
            self._spoken = self._clock()
            of = f"{self._done}" if self._total is None else f"{self._done} of {self._total}"
            self._console.info(f"{self._description}: {of}")
