"""Artefacts of one or several files that appear whole, once they are proven, or not at all.

They are made in a scratch folder `.NAME.lbc-tmp-PID` beside their place, flushed to the disk, and moved by renaming:
what stands beside the artefact first, the artefact itself last. What a killed process left behind is removed by the
next export to that place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lbc_cli.checkpoint.files import check_free
from lbc_cli.errors import OutputError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a place to make an artefact in; when the block ends well, the artefact moves to `target`.

    Args:
        target: its final place; the folder must exist, and nothing may be there.

    Returns:
        A path of the same name in an empty scratch folder.

    Raises:
        OutputError: if something is there already, or cannot be written.
    """
    check_free(target)
    _remove_stale(target)
    scratch = target.parent / f".{target.name}.lbc-tmp-{os.getpid()}"
    try:
        scratch.mkdir()
        yield scratch / target.name
        _sync(scratch)
        _move(scratch, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(scratch: Path, target: Path) -> None:
    made = sorted(scratch.iterdir(), key=lambda path: path.name == target.name)
    for path in made:
        check_free(target.parent / path.name)
    moved: list[Path] = []
    try:
        for path in made:
            path.rename(target.parent / path.name)
            moved.append(target.parent / path.name)
    except OSError:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    _flush(target.parent)


def _sync(folder: Path) -> None:
    """Flush everything in a folder to the disk, the folder last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(target: Path) -> None:
    """Remove the scratch folders of this target whose process no longer runs."""
    name = re.compile(re.escape(f".{target.name}.lbc-tmp-") + r"(\d+)")
    for entry in target.parent.iterdir():
        match = name.fullmatch(entry.name)
        if match and entry.is_dir() and not _is_another_running(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_another_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    with contextlib.suppress(ProcessLookupError, OverflowError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False
