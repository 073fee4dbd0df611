"""Who is at work in a folder: one process at a time, and others can see that there is one.

An advisory lock on the folder itself, which the system gives back however the process ends. Where a system or a file
system knows no such locks, everybody may work, and nobody can tell.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbc_cli.errors import OutputError

_flock: Any = None
with contextlib.suppress(ImportError):  # a system without them
    import fcntl

    _flock = fcntl.flock

_TRIES = 5  # somebody who looks holds the lock for a moment
_PAUSE = 0.05  # seconds between them
_held: set[int] = set()


def _forget_in_child() -> None:
    """Loader processes outlive their parent for a moment; the lock shall not."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Within it nobody else works in the folder.

    Args:
        folder: which exists.
        what: is at work there, for the message: "a training run".

    Raises:
        OutputError: if somebody else works in it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _taken(descriptor):
            raise OutputError(f"{what} is at work in {folder} already: wait until it has ended, or take another folder")
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Take the lock, or tell that another has it."""
    for attempt in range(_TRIES):
        if _try(descriptor, shared=False) is not False:
            return True
        if attempt + 1 < _TRIES:
            time.sleep(_PAUSE)
    return False


def is_locked(folder: Path) -> bool | None:
    """Whether somebody works in a folder; None where that cannot be told."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        free = _try(descriptor, shared=True)
        return None if free is None else not free
    finally:
        os.close(descriptor)


def _try(descriptor: int, *, shared: bool) -> bool | None:
    """Whether the lock could be taken; None where there are no locks."""
    if _flock is None:
        return None
    try:
        _flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without them
        return None
    return True
