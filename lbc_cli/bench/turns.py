"""Timing in turns where candidates have pools of threads of their own, which wait for work by spinning.

torch (with what it compiles, and the kernels of this package) has one pool, onnxruntime another for every session. With
as many threads as cores, whichever runs next shares its cores with what still spins after the one before: measured on
two cores, a convolution of 0.7 ms took 4 ms right after onnxruntime, and a graph of 0.6 ms in onnxruntime took 1.3 ms
right after torch. To forbid spinning would slow onnxruntime down by a tenth on such graphs. So each pool has its own
stretch of rounds, which begins when nothing of this process runs any more, and with a call that is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from lbc_cli.runtime.clock import Call, Times, interleaved

STRETCHES = 4
"""How often each pool has its turn."""
_STEP, _LONGEST = 0.002, 0.5


def in_turns(
    pools: Sequence[Mapping[str, Call]], device: torch.device, *, rounds: int, seconds: float, warmup: int = 3
) -> dict[str, Times]:
    """Time calls in turn, as `interleaved` does within each pool.

    Args:
        pools: name -> call; the names of all differ, empty pools are passed over.
        device: where they run.
        rounds: timed calls of each.
        seconds: no further stretch after that time.
        warmup: calls of each before the first that is timed.
    """
    pools = [pool for pool in pools if pool]
    if len(pools) < 2 or torch.get_num_threads() == 1:
        return interleaved(
            {name: call for pool in pools for name, call in pool.items()},
            device,
            rounds=rounds,
            seconds=seconds,
            warmup=warmup,
        )
    taken: dict[str, list[float]] = {name: [] for pool in pools for name in pool}
    end = time.perf_counter() + seconds
    for number, part in enumerate(_stretches(rounds)):
        for pool in pools:
            settle()
            timed = interleaved(pool, device, rounds=part, warmup=1 if number else max(warmup, 1))
            for name, times in timed.items():
                taken[name] += times.seconds
        if time.perf_counter() > end:
            break
    return {name: Times(tuple(values)) for name, values in taken.items()}


def _stretches(rounds: int) -> list[int]:
    """How many rounds each stretch has: three at least, so that few suffice where time runs out."""
    count = max(1, min(STRETCHES, rounds // 3))
    return [rounds // count + (number < rounds % count) for number in range(count)]


def settle() -> None:
    """Wait until this process uses no processor: until no thread spins any more, half a second at most."""
    end = time.perf_counter() + _LONGEST
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_STEP)
        if time.process_time() - before < _STEP / 5:
            return
