"""A run under observation: its curves and page are drawn as it goes on, its tools hear of it, and its end is noted.

`run_observed` is what `lbc train` and the processes of a sweep call in the place of `training.run`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lbc_cli.errors import DivergenceError, Interrupted, LbcError
from lbc_cli.report.page import RunPage, Status, write_page
from lbc_cli.report.plots import run_curves

if TYPE_CHECKING:
    from lbc_cli.engine import Reporter
    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job, Outcome

INTERVAL = 30.0  # seconds at least between two drawings
SHARE = 0.01  # of the time that drawing may take


def run_observed(job: Job, folder: RunFolder, reporter: Reporter, *, stop: Callable[[], bool]) -> Outcome:
    """Carry out a run, with everything that follows it.

    Args:
        job: prepared, or that of a resumed run.
        folder: new, or that of the run to go on with.
        reporter: shows the run; also told where tools show it, and what fails without ending it.
        stop: polled; once true the run ends in order.

    Raises:
        UsageError: if a tool that the recipe asks for cannot begin.
        OutputError: if another process works in the folder; and as `training.run`.
        LbcError: as `training.run` does.
    """
    from lbc_cli import training
    from lbc_cli.locks import locked
    from lbc_cli.trackers import Several, begin_trackers, ending

    page = LivePage(job, folder, warn=lambda text: reporter.message(text, "warning"))

    def tell(text: str, level: str) -> None:
        page.message(text, level)
        reporter.message(text, level)

    with locked(folder.path, "another run"):
        trackers = begin_trackers(job, folder, tell)
        if job.state is not None:
            _note_resumption(folder)
        with page.until_the_end() as ended, ending(trackers, job):
            outcome = training.run(job, folder, reporter=Several([reporter, page, *trackers]), stop=stop)
            ended(outcome)
    return outcome


def _note_resumption(folder: RunFolder) -> None:
    """Add to environment.json what the run goes on with."""
    from lbc_cli.environment import describe_environment

    try:
        found = json.loads(folder.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}  # of an interrupted write, or an older version; what is known now is still worth keeping
    found = found if isinstance(found, dict) else {}
    folder.write_environment({**found, "resumed": [*found.get("resumed", []), describe_environment()]})


class LivePage:
    """A reporter that keeps `curves.png` and `report.html` of a run folder up to date.

    What cannot be drawn while the run goes on is tried again later; at the end it is an error.

    Args:
        job: of the run.
        folder: of the run.
        warn: told once, if the run cannot be drawn while it goes on.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        *,
        warn: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job, self._folder, self._warn, self._clock = job, folder, warn, clock
        self._due = clock() + INTERVAL
        self._failed = False
        self._warnings: list[str] = [f"unreadable image left out: {image}" for image in job.source.dropped]

    def start(self, info: Mapping[str, Any]) -> None:
        """A run that goes on has not ended."""
        self._folder.ended.unlink(missing_ok=True)

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        """Nothing to draw."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Nothing to draw."""

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """Draw, if it is time."""
        began = self._clock()
        if began < self._due:
            return
        try:
            self._draw("running")
        except Exception as error:  # no picture is worth a run; a full disk ends it where its metrics are written
            if not self._failed:
                self._warn(f"the run cannot be drawn now, which is tried again later: {error}")
            self._failed = True
        taken = self._clock() - began
        self._due = self._clock() + max(INTERVAL, taken / SHARE)

    def message(self, text: str, level: str = "info") -> None:
        """Warnings stand on the page."""
        if level == "warning":
            self._warnings.append(text)

    def finish(self) -> None:
        """The end is drawn by `until_the_end`, which knows how it came."""

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[Callable[[Outcome], None]]:
        """Within it the run goes on; draw what it came to.

        Yields:
            To be called with the outcome of a run that came to its end.
        """
        found: list[Outcome] = []
        try:
            yield found.append
        except BaseException as error:
            with contextlib.suppress(LbcError):  # what ended the run is what the user must hear of
                self._draw("done", outcome=found[0]) if found else self._ended(error)
            raise
        if found:
            self._draw("done", outcome=found[0])

    def _ended(self, error: BaseException) -> None:
        status = how_it_ended(error)
        message = str(error) or type(error).__name__
        self._folder.write_ended({"how": status, "message": message})
        self._draw(status, message=message)

    def _draw(self, status: Status, *, message: str = "", outcome: Outcome | None = None) -> None:
        run_curves(self._job, self._folder)
        page = run_page(self._job, self._folder, status, message, outcome, self._warnings)
        write_page(page, self._folder.report)


def how_it_ended(error: BaseException) -> Status:
    """What an error that ended a run makes of it."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    return "diverged" if isinstance(error, DivergenceError) else "failed"


def run_page(
    job: Job,
    folder: RunFolder,
    status: Status,
    message: str = "",
    outcome: Outcome | None = None,
    warnings: list[str] | None = None,
) -> RunPage:
    """The page of a run, from what is known of it.

    Args:
        job: of the run.
        folder: of the run.
        status: where it stands.
        message: how it ended, if it did not come to its end.
        outcome: of a run that did.
        warnings: of the run.

    Raises:
        OutputError: if the folder cannot be read.
        CheckpointError: if its metrics are damaged.
    """
    from lbc_cli.report import observed
    from lbc_cli.report.describe import running_view, summary_view
    from lbc_cli.runs import read_epochs

    epochs = read_epochs(folder.metrics_jsonl)
    environment = observed.read_environment(folder)
    last = epochs[-1] if epochs else {}
    view = running_view(job, folder, last) if outcome is None else summary_view(job, outcome, folder)
    planned = job.settings.epochs
    return RunPage(
        title=f"{job.title} on {job.source.name}",
        status=status,
        message=message,
        progress="" if status == "done" else f"{len(epochs)} of {planned} epochs",
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        facts={**view.facts, "run folder": str(folder.path)},
        results=view.results,
        best=observed.best(job, epochs),
        epochs=epochs,
        layers=view.layers,
        skipped=view.skipped,
        cost=view.cost,
        dense_bytes=view.dense_bytes,
        file_bytes=view.file_bytes,
        memory=view.memory,
        measured=observed.measured(epochs),
        settings=observed.settings(job),
        recipe=observed.read_recipe(folder),
        environment=observed.environment_facts(environment),
        command=observed.command_lines(environment),
        verified=view.verified,
        checked=observed.checked(outcome, folder),
        findings=view.findings,
        warnings=warnings or [],
    )
