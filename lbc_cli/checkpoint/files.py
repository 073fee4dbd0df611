"""Files that are either the old content or the new one, never a mixture, whatever happens while they are written.

The bytes go to a temporary `.NAME.lbc-tmp-PID` in the same folder, are flushed to the disk, and take the file's place
in one rename; then the folder is flushed too. What a killed process left behind is removed by the next write of that
file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from lbc_cli.errors import OutputError

TEMPORARY = ".lbc-tmp-"  # in the names of files that are being written

Buffer = bytes | bytearray | memoryview
_WRITE_BYTES = 1 << 24


def atomic_write_bytes(
    path: str | os.PathLike[str], content: Buffer | Iterable[Buffer], *, head: Callable[[], Buffer] | None = None
) -> None:
    """Write a file, replacing what was there only once the new content is safe on the disk.

    Args:
        path: the file; its folder must exist. A symbolic link stays, and what it points at is replaced.
        content: the bytes, at once or one piece after the other.
        head: called when all of them are written; what it returns takes the place of the file's first bytes.

    Raises:
        OutputError: if it cannot be written; a previous file is then as it was.
    """
    target = Path(path)
    pieces = [content] if isinstance(content, bytes | bytearray | memoryview) else content
    try:
        final = target.resolve()
        remove_stale(final)
        _write_and_rename(final, pieces, head)
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {error.strerror or error}; a file that was there is unchanged"
        ) from error


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, as `atomic_write_bytes` does.

    Raises:
        OutputError: if it cannot be written; a previous file is then as it was.
    """
    atomic_write_bytes(path, text.encode())


def check_free(path: str | os.PathLike[str]) -> Path:
    """A place for something new: nothing is there yet, and its folder is.

    Raises:
        OutputError: if it is not so.
    """
    target = Path(path)
    if os.path.lexists(target):
        raise OutputError(f"{target} exists and is not overwritten: remove it, or choose another name")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: there is no folder {target.parent}: create it, or choose another place")
    return target


def remove_stale(path: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporaries of `path` whose process no longer runs.

    Returns:
        What was removed.
    """
    target = Path(path)
    name = re.compile(re.escape(f".{target.name}{TEMPORARY}") + r"(\d+)")
    removed = []
    for entry in sorted(target.parent.iterdir()) if target.parent.is_dir() else []:
        match = name.fullmatch(entry.name)
        if match and not _is_another_running(int(match[1])):
            with contextlib.suppress(FileNotFoundError):
                entry.unlink()
                removed.append(entry)
    return removed


def _is_another_running(pid: int) -> bool:
    """Whether a process other than this one has the number (containers give the same one again after a kill)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _write_and_rename(final: Path, chunks: Iterable[Buffer], head: Callable[[], Buffer] | None) -> None:
    temporary = final.with_name(f".{final.name}{TEMPORARY}{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            for chunk in chunks:
                _write_all(descriptor, chunk)
            if head is not None:
                os.lseek(descriptor, 0, os.SEEK_SET)
                _write_all(descriptor, head())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, final)  # noqa: PTH105 (one seam with the other calls of os)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(final.parent)


def _write_all(descriptor: int, chunk: Buffer) -> None:
    rest = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
    while rest:
        rest = rest[os.write(descriptor, rest[:_WRITE_BYTES]) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
