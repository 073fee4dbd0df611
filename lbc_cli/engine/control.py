"""The process around a training loop: random seeds, determinism, signals and memory."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

from lbc_cli.errors import LbcError


def make_deterministic(seed: int, device: torch.device) -> None:
    """Seed Python's, NumPy's and torch's generators, and on the CPU allow only deterministic algorithms.

    Both hold for the whole process, and are for what comes before the first epoch, such as initial weights; every epoch
    is seeded anew.

    On the CPU runs are then the same bit for bit at the same number of threads. On CUDA only the seeds are set: its
    deterministic kernels are slower, and ask for them with `torch.use_deterministic_algorithms`.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # On by default with the above; it only helps to find reads of memory that was never written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class StopOnSignal:
    """Within this context SIGINT and SIGTERM ask for an orderly end; a second one raises KeyboardInterrupt at once.

    Called, it tells whether an end was asked for. Earlier handlers return at exit. Main thread only, as for any signal
    handler.

    Args:
        signals: which to listen to.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self.received: signal.Signals | None = None

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def __enter__(self) -> StopOnSignal:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: installed by something other than Python, which cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn a failed allocation, on any device, into one line that says what to lower.

    Args:
        advice: completes "lower ...".

    Raises:
        LbcError: in place of the allocator's error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise LbcError(f"out of memory: {_first_line(error)}; lower {advice}") from error
    except RuntimeError as error:
        # torch has no class of its own for a failed allocation on the CPU
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise LbcError(f"out of memory: {_first_line(error)}; lower {advice}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def peak_memory(device: torch.device) -> int | None:
    """Bytes held at most since the last call (CUDA), or since the process began (CPU); None where unknown."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform == "win32":
        return None
    # Not getrusage where this is at hand: its peak begins with that of the process that started this one.
    with contextlib.suppress(OSError):
        match = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
