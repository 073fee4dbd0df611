"""Measuring: what a method adds to a training step.

Two copies of a model train in one process on the same batch, one dense, one with the method attached, their steps
interleaved so that noise falls on both alike. The time inside the method's hooks is taken by clocks that stand in the
hook queues directly before and after the method's own. Masks and scores are as in the middle of the schedule, when the
method has the most to do. Peak memory comes from a process of its own for each kind.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli import flops, models
from lbc_cli.checkpoint import save_state
from lbc_cli.engine import make_deterministic, memory_advice, peak_memory
from lbc_cli.errors import LbcError, OutputError, UsageError
from lbc_cli.methods import METHODS, Pruner, attach
from lbc_cli.patterns import Pattern
from lbc_cli.targets import find_targets

CLASSES = 1000
_DTYPES = {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSetup:
    """What is measured.

    Attributes:
        model: timm name, random weights, 1000 classes unless it says otherwise.
        pattern: N:M or N:M/V; "" for a method without one.
        batch: images per step.
        image_size: side in pixels; 0: the model's own.
        amp: autocast type.
        steps: timed steps of each kind.
        warmup: steps of each kind before them.
    """

    model: str
    pattern: str = "2:4"
    method: str = "lbc"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: int = 16
    image_size: int = 0
    amp: str = "off"
    channels_last: bool = False
    steps: int = 10
    warmup: int = 2

    def __post_init__(self) -> None:
        """Refuse a type that autocast does not have here.

        Raises:
            UsageError: naming those there are.
        """
        if self.amp not in _DTYPES:
            raise UsageError(f"amp = {self.amp!r}: one of {', '.join(_DTYPES)}")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of every timed step of a kind, and the peak memory of a process that makes only such (None: unknown)."""

    name: str
    seconds: tuple[float, ...]
    peak_bytes: int | None

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile, in seconds."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high


@dataclass(frozen=True, slots=True)
class TrainBench:
    """A dense training step beside a method's.

    Attributes:
        hooks: seconds in the method's hooks, per timed step.
        removal: seconds that one removal (`begin_epoch`) took.
        memory: bytes the method held, by kind.
        state_bytes: size of a saved state: weights, optimizer and method.
        state_seconds: what writing it took, digests and the wait for the disk included; median.
    """

    setup: StepSetup
    dense: StepTimes
    method: StepTimes
    hooks: tuple[float, ...]
    removal: float
    memory: dict[str, int]
    state_bytes: int
    state_seconds: float


class HookClock:
    """Times what stands between two hooks: `start` is queued before the method's own, `stop` behind it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self, *_: Any) -> None:
        """Note the time here, on the device's own clock where it has one."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> float:
        """Seconds between the pairs of marks since the last call; waits for the device."""
        marks, self._marks = self._marks, []
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        if self._cuda:
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(stop) for start, stop in pairs)) / 1e3
        return float(sum(stop - start for start, stop in pairs))


class _Stepper:
    """A model that makes training steps on one fixed batch, with a method or dense."""

    def __init__(self, setup: StepSetup, method: str) -> None:
        make_deterministic(0, setup.device)
        model = models.create(setup.model, num_classes=None, image_size=setup.image_size).to(setup.device)
        size = models.input_size(model, setup.image_size)
        flops.count(model, size)  # refuses an image that the model cannot take
        layout = torch.channels_last if setup.channels_last else torch.contiguous_format
        self.model = model.to(memory_format=layout).train()
        self.images = torch.randn(setup.batch, *size, device=setup.device).to(memory_format=layout)
        self.labels = torch.randint(0, 2, (setup.batch,), device=setup.device)
        self.setup = setup
        self.clock = HookClock(setup.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.removal = 0.0
        self.pruner = self._attach(method)

    def _attach(self, method: str) -> Pruner:
        """Attach between the clock's hooks and go to the middle of the schedule."""
        wanted = Pattern.parse(self.setup.pattern) if self.setup.pattern else None
        sparse = METHODS[method].sparse if method in METHODS else True
        weights = [target.weight for target in find_targets(self.model, wanted).targets] if sparse else []
        self._clock_hooks(weights)
        pruner = attach(self.model, self.optimizer, pattern=wanted, method=method, epochs=6)
        self._clock_hooks(weights)
        pruner.begin_epoch(0)
        self.step()
        start = time.perf_counter()
        pruner.begin_epoch(1)
        self._wait()
        self.removal = time.perf_counter() - start
        return pruner

    def _clock_hooks(self, weights: list[nn.Parameter]) -> None:
        for weight in weights:
            weight.register_hook(self.clock.mark)  # type: ignore[no-untyped-call]
        self.optimizer.register_step_pre_hook(self.clock.mark)
        self.optimizer.register_step_post_hook(self.clock.mark)

    def step(self) -> float:
        """One whole training step, in seconds; waits for the device before and after."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.setup.device.type, _DTYPES[self.setup.amp], enabled=self.setup.amp != "off"):
            loss = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start

    def _loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.images).float(), self.labels)

    def _wait(self) -> None:
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize()


def train_bench(setup: StepSetup, *, progress: Callable[[str], None] = lambda text: None) -> TrainBench:
    """Measure a dense training step beside a method's.

    Args:
        setup: what is measured.
        progress: told what is going on.

    Raises:
        UsageError: for settings that cannot be measured.
        LbcError: if memory runs out, or a measuring process ends early.
    """
    if setup.steps < 1 or setup.batch < 1:
        raise UsageError(f"steps = {setup.steps}, batch = {setup.batch}: both must be at least 1")
    with memory_advice("--batch or --image-size"):
        steppers = {name: _Stepper(setup, name) for name in ("dense", setup.method)}
        seconds: dict[str, list[float]] = {name: [] for name in steppers}
        hooks: list[float] = []
        for number in range(setup.warmup + setup.steps):
            progress(f"step {number + 1} of {setup.warmup + setup.steps}, dense and {setup.method}")
            for name, stepper in steppers.items():
                taken, inside = stepper.step(), stepper.clock.take()
                if number >= setup.warmup:
                    seconds[name].append(taken)
                    hooks += [inside] if name == setup.method else []
        sparse = steppers[setup.method]
        removal, memory = sparse.removal, sparse.pruner.memory_bytes()
        progress("saving states")
        state_bytes, state_seconds = _save_states(sparse)
    del steppers, sparse
    times = []
    for name in seconds:
        progress(f"peak memory of {name} steps")
        times.append(StepTimes(name, tuple(seconds[name]), _peak_apart(setup, name)))
    return TrainBench(setup, times[0], times[-1], tuple(hooks), removal, memory, state_bytes, state_seconds)


def _save_states(stepper: _Stepper) -> tuple[int, float]:
    """Size of a saved state, and the median of the seconds it takes to write one into the current folder.

    Raises:
        OutputError: if nothing can be written there.
    """
    state = {
        "model": stepper.model.state_dict(),
        "optimizer": stepper.optimizer.state_dict(),
        "pruner": stepper.pruner.state_dict(),
    }
    seconds = []
    try:
        with tempfile.TemporaryDirectory(prefix=".lbc-bench-", dir=Path.cwd()) as folder:
            path = Path(folder, "state.safetensors")
            for _ in range(3):
                start = time.perf_counter()
                save_state(path, state)
                seconds.append(time.perf_counter() - start)
            return path.stat().st_size, statistics.median(seconds)
    except OSError as error:
        raise OutputError(
            f"cannot write a state into {Path.cwd()}: {error.strerror or error}; run where run folders shall go"
        ) from error


def _peak_apart(setup: StepSetup, method: str) -> int | None:
    """Peak bytes of a fresh process that makes three steps of one kind: device memory, or resident on a CPU."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(setup, method, sender), daemon=True)
    process.start()
    sender.close()
    try:
        peak = receiver.recv()
        return None if peak is None else int(peak)
    except EOFError:
        raise LbcError(
            f"the process that measures the memory of {method} steps ended early: try a smaller --batch"
        ) from None
    finally:
        process.join()


def _report_peak(setup: StepSetup, method: str, sender: Any) -> None:
    stepper = _Stepper(setup, method)
    for _ in range(2):
        stepper.step()
    sender.send(peak_memory(setup.device))
