"""Runs carried out by processes of their own, several at a time, with one thread of torch each.

One thread each: then a run's bits depend neither on how many others are at work nor on the machine's cores.
SIGINT and SIGTERM reach the parent, which asks its processes to end in order; each saves the state after its last
update. A process whose parent has died ends in the same way.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch

from lbc_cli import training
from lbc_cli.engine import NullReporter, StopOnSignal
from lbc_cli.errors import Interrupted, LbcError, one_line
from lbc_cli.recipe import ResolvedRecipe
from lbc_cli.report.live import run_observed
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder

Outcome = Literal["done", "failed", "stopped"]
Hears = Mapping[str, Callable[[str, Any], None]]
"""Kind of message from a process -> whom it is for, told the name of the run first."""
_POLL = 0.2  # seconds between looks at whether an end was asked for
_PATIENCE = 60.0  # seconds for a process to end in order


@dataclass(frozen=True, slots=True)
class Task:
    """A run to be carried out.

    Attributes:
        name: of the run.
        resolved: its recipe.
        folder: its folder.
        resume: whether to go on with what is there.
    """

    name: str
    resolved: ResolvedRecipe
    folder: Path
    resume: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run's process ended.

    Attributes:
        name: of the run.
        outcome: done, failed or stopped.
        error: why it failed, on one line.
        seconds: since its process was started.
    """

    name: str
    outcome: Outcome
    error: str
    seconds: float


@dataclass(slots=True)
class _Worker:
    task: Task
    process: Any
    connection: Connection
    began: float = field(default_factory=time.monotonic)
    said: tuple[Outcome, str] | None = None


def carry_out(
    tasks: Sequence[Task],
    jobs: int,
    *,
    started: Callable[[str], None] = lambda name: None,
    epoch: Callable[[str, Mapping[str, Any]], None] = lambda name, record: None,
    warning: Callable[[str, str], None] = lambda name, text: None,
    ended: Callable[[Ended], None] = lambda ended: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Ended]:
    """Carry out runs, `jobs` at a time, in their order.

    Args:
        tasks: the runs.
        jobs: processes at a time.
        started: told the name of a run whose process starts.
        epoch: told the name of a run and the record of an epoch.
        warning: told the name of a run and what its user should know.
        ended: told of every end.
        stop: polled; once true no run is started, and those at work are asked to end.

    Returns:
        The ends, in their own order; of a run that was never started there is none.
    """
    waiting, active, ends = deque(tasks), [], []  # type: deque[Task], list[_Worker], list[Ended]
    context = _context()
    asked = 0.0
    hears: Hears = {"epoch": epoch, "warning": warning}
    try:
        while active or (waiting and not asked):
            if stop() and not asked:
                asked = time.monotonic()
                for worker in active:
                    worker.process.terminate()
            while waiting and len(active) < jobs and not asked:
                worker = _start(context, waiting.popleft())
                active.append(worker)
                started(worker.task.name)
            for worker in _listen(active, hears):
                active.remove(worker)
                ends.append(_end_of(worker, stopping=bool(asked)))
                ended(ends[-1])
            if asked and time.monotonic() - asked > _PATIENCE:
                break
    finally:
        for worker in active:
            worker.process.kill()
            worker.process.join()
    return ends


def _context() -> Any:
    """Processes that start from one which has loaded torch already, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start(context: Any, task: Task) -> _Worker:
    receiver, sender = context.Pipe(duplex=False)
    # Not a daemon: those may not have processes of their own, which loaders need.
    process = context.Process(target=_work, args=(sender, task), name=task.name, daemon=False)
    process.start()
    sender.close()
    return _Worker(task, process, receiver)


def _listen(active: Sequence[_Worker], hears: Hears) -> list[_Worker]:
    """Take in what the processes say; those that have ended are returned."""
    wait([end for worker in active for end in (worker.connection, worker.process.sentinel)], timeout=_POLL)
    over = []
    for worker in active:
        dead = not worker.process.is_alive()  # looked at first: what it said before is still to be read
        while _take(worker, hears):
            pass
        if dead:
            over.append(worker)
    return over


def _take(worker: _Worker, hears: Hears) -> bool:
    """Take in one message; whether there was one."""
    try:
        if not worker.connection.poll():
            return False
        kind, value = worker.connection.recv()
    except (EOFError, OSError):
        return False
    if kind in hears:
        hears[kind](worker.task.name, value)
    else:
        worker.said = (kind, value)
    return True


def _end_of(worker: _Worker, *, stopping: bool) -> Ended:
    worker.process.join()
    worker.connection.close()
    seconds = time.monotonic() - worker.began
    if worker.said is not None:
        return Ended(worker.task.name, *worker.said, seconds)
    code = worker.process.exitcode
    if stopping:
        return Ended(worker.task.name, "stopped", "", seconds)
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    hint = " (out of memory? try fewer --jobs)" if code == -signal.SIGKILL else ""
    return Ended(worker.task.name, "failed", f"its process was ended {how}{hint}", seconds)


# In the process of a run


class _Teller(NullReporter):
    """A reporter that tells the parent of every epoch, and of what the user should know."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """Pass the record on."""
        self._connection.send(("epoch", dict(record)))

    def message(self, text: str, level: str = "info") -> None:
        """Pass warnings on."""
        if level == "warning":
            self._connection.send(("warning", text))


def _work(connection: Connection, task: Task) -> None:
    """Carry out one run and say how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    said: tuple[Outcome, str]
    try:
        with StopOnSignal((signal.SIGTERM,)) as asked:
            _train(task, _Teller(connection), lambda: asked() or _orphaned())
        said = ("done", "")
    except Interrupted:
        said = ("stopped", "")
    except LbcError as error:
        said = ("failed", one_line(str(error)))
    except Exception as error:
        said = ("failed", one_line(f"{type(error).__name__}: {error} (unexpected: a bug in lbc)"))
    if not _orphaned():
        connection.send(said)


def _train(task: Task, reporter: NullReporter, stop: Callable[[], bool]) -> None:
    folder = RunFolder(task.folder)
    job = resume(folder) if task.resume else training.prepare(task.resolved)
    if not task.resume:
        folder = RunFolder.create(task.folder)
    run_observed(job, folder, reporter, stop=stop)


def _orphaned() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()
