"""One process at a time in a folder, until it ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbc_cli.errors import OutputError
from lbc_cli.locks import is_locked, locked

pytest.importorskip("fcntl")

HOLD = """
import os, sys, time
from pathlib import Path
from lbc_cli.locks import locked
with locked(Path(sys.argv[1]), "another run"):
    child = os.fork()  # as a loader process
    if not child:
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
    time.sleep(30)
"""


def test_a_folder_is_locked_within_and_free_after(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is False
    with locked(tmp_path, "another run"):
        assert is_locked(tmp_path) is True
        with pytest.raises(OutputError, match=r"another run is at work in .* already"), locked(tmp_path, "another run"):
            pass
    assert is_locked(tmp_path) is False
    assert is_locked(tmp_path / "missing") is None


def test_a_killed_process_gives_its_lock_back_though_a_child_of_it_lives_on(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert is_locked(tmp_path) is True
        process.kill()
        process.wait()
        time.sleep(0.05)
        os.kill(child, 0)  # it is there
        assert is_locked(tmp_path) is False
    finally:
        os.kill(child, signal.SIGKILL)


def test_who_only_looks_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    looking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(looking))  # looks away in the pause between two tries
    with locked(tmp_path, "another run"):
        assert is_locked(tmp_path) is True


def test_a_file_system_without_locks_lets_everybody_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("lbc_cli.locks._flock", refuse)
    with locked(tmp_path, "another run"):
        assert is_locked(tmp_path) is None
