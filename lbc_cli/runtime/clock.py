"""Timing that compares: every candidate once per round, so that noise and clock changes fall on all alike.

On a GPU the device's own events are read, one pair around a call; with `graphs` a call is captured into a CUDA graph
first, so that the time is that of the kernels, not of launching them one by one. On a CPU the wall clock is read, and
every timed call follows an untimed one of the same candidate: nobody's weights are read from where another candidate
has pushed them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lbc_cli.errors import UsageError

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of every timed call of one candidate."""

    seconds: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile, in seconds."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    @property
    def median(self) -> float:
        """In seconds."""
        return self.quartiles[1]

    def clearly_below(self, other: Times) -> bool:
        """Whether the middle halves of both do not overlap, this one being the faster."""
        return self.quartiles[2] < other.quartiles[0]


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 3,
    graphs: bool = False,
    seconds: float | None = None,
) -> dict[str, Times]:
    """Time several calls in turn.

    Args:
        calls: name -> what to call; same inputs every time.
        device: where they run.
        rounds: timed calls of each.
        warmup: calls of each before that.
        graphs: capture each into a CUDA graph; only on a CUDA device.
        seconds: stop after the round in which this time is exceeded (never before three rounds); None: all rounds.

    Raises:
        UsageError: for graphs on another device, or no rounds.
    """
    if graphs and device.type != "cuda":
        raise UsageError(f"CUDA graphs need a CUDA device, not {device.type}")
    if rounds < 1 or warmup < 0:
        raise UsageError(f"rounds = {rounds}, warmup = {warmup}: at least 1 and 0 are needed")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with _current(device):
        for call in calls.values():
            for _ in range(warmup):
                call()
        timed = {name: _captured(call) if graphs else call for name, call in calls.items()}
        end = None if seconds is None else time.perf_counter() + seconds
        for number in range(rounds):
            for name, call in timed.items():
                if device.type == "cpu":
                    call()  # as in service: caches and threads are where this call's last run left them
                taken[name].append(_time(call, device))
            if end is not None and number >= 2 and time.perf_counter() > end:
                break
    return {name: Times(tuple(values)) for name, values in taken.items()}


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """On a GPU: events and graphs belong to the current device, and cuDNN measures its kernels instead of guessing.

    A dense convolution that cuDNN guesses badly would flatter the sparse one beside it.
    """
    if device.type != "cuda":
        yield
        return
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def _time(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(stop)) / 1000


def _captured(call: Call) -> Call:
    """The call as a CUDA graph; warm-up on a side stream first, as capturing needs."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
