"""Work on several tensors at once, in order and within bounds: reading, hashing and packing release the interpreter."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

LOOKAHEAD_BYTES = 1 << 26  # enough to keep the threads busy, little beside what any process holds after its imports
MAX_WORKERS = 4  # beyond it the memory bus and the one thread that writes are the limit

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], size: Callable[[Item], int]) -> Generator[Result]:
    """The results of `work`, in the order of `items`, while the next ones are already being worked on.

    Args:
        work: called from several threads at once.
        items: what to work on.
        size: bytes that an item and its result hold. Together those under way stay below 64 MiB; a larger one is
            worked on alone.

    Yields:
        One result per item. An error of `work` is raised in its item's place.
    """
    with ThreadPoolExecutor(min(MAX_WORKERS, _processors()), thread_name_prefix="lbc") as pool:
        waiting: deque[tuple[Future[Result], int]] = deque()
        try:
            held = 0
            for item in items:
                needed = size(item)
                while waiting and held + needed > LOOKAHEAD_BYTES:
                    yield waiting[0][0].result()
                    held -= waiting.popleft()[1]
                waiting.append((pool.submit(work, item), needed))
                held += needed
            while waiting:
                yield waiting[0][0].result()
                waiting.popleft()
        finally:
            for future, _ in waiting:
                future.cancel()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
