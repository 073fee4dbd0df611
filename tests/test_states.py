"""Saved states: two of them, found again whatever happened while they were written."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lbc_cli import states, training
from lbc_cli.errors import CheckpointError, Interrupted, OutputError, UsageError
from lbc_cli.methods import METHODS, parse_options
from lbc_cli.recipe import resolve
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from tests.test_distributed import quiet_env, running, wait_for
from tests.test_resume import stop_at

ROOT = Path(__file__).parents[1]


def state(epoch: int, size: int = 100) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 0,
        "ranks": 1,
        "batch_size": 8,
        "teacher": "",
        "weights": torch.full((size,), float(epoch)),
    }


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(OutputError, match="before its first state was saved"):
        states.load(folder)
    for epoch in range(4):
        states.save(folder, state(epoch))
        assert states.load(folder)["epoch"] == epoch
        if epoch:
            assert states.load(folder, previous=True)["epoch"] == epoch - 1
        else:
            with pytest.raises(OutputError, match="there is none before it"):
                states.load(folder, previous=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-previous.safetensors", "state.safetensors"]


def test_a_process_that_ends_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    states.save(folder, state(0))
    states.save(folder, state(1))
    whole = os.replace
    for renames in (1, 2):  # of the file itself, of the state to the one before
        calls = iter(range(10))

        def replace(source: Any, target: Any, calls: Iterator[int] = calls, renames: int = renames) -> None:
            if next(calls) >= renames:
                raise KeyboardInterrupt
            whole(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                states.save(folder, state(2))
        assert states.load(folder)["epoch"] == 2
        assert states.load(folder, previous=True)["epoch"] == 1
        states.save(folder, state(1))
        states.save(folder, state(1))


def test_a_damaged_state_is_named_and_the_one_before_only_taken_when_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    states.save(folder, state(0))
    damage(folder.state)
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged.*; start a new run"):
        states.load(folder)
    folder.state.unlink()
    states.save(folder, state(0))
    states.save(folder, state(1))
    damage(folder.state)
    words = r"/state\.safetensors is damaged: .*; go on from the state before it, state-previous.*with --previous-state"
    with pytest.raises(CheckpointError, match=words):
        states.load(folder)
    assert states.load(folder, previous=True)["epoch"] == 0


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of that size, where this process may mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_leaves_both_states_as_they_were(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        folder = RunFolder(tmp_path / "disk")
        for epoch in (0, 1):
            states.save(folder, state(epoch, 100_000))
        before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
        with pytest.raises(OutputError, match=r"No space left.*unchanged"):
            states.save(folder, state(2, 400_000))
        assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m"):
        command = [
            *LBC,
            "train",
            "test_resnet",
            "--data",
            "digits",
            "--epochs",
            "3",
            "--out",
            str(tmp_path / "disk/run"),
        ]
        done = subprocess.run(command, env=quiet_env(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert re.fullmatch(r"error: .*No space left on device.*", done.stderr.splitlines()[-1])
        assert "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=40m", str(tmp_path / "disk")], check=True)
        again = [*LBC, "train", "--resume", str(tmp_path / "disk/run")]
        assert subprocess.run(again, env=quiet_env(), capture_output=True, timeout=120).returncode == 0


def test_a_folder_that_can_no_longer_be_written_keeps_its_states(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        folder = RunFolder(tmp_path / "disk")
        states.save(folder, state(0))
        subprocess.run(["mount", "-o", "remount,ro", str(folder.path)], check=True)
        with pytest.raises(OutputError, match="Read-only file system"):
            states.save(folder, state(1))
        assert states.load(folder)["epoch"] == 0


# Signals


LBC = [sys.executable, "-m", "lbc_cli"]
LONG = [*LBC, "train", "test_resnet", "--data", "digits", "--epochs", "500", "--set", "data.workers=1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_in_mid_epoch_and_exits_130(number: signal.Signals, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with running([*LONG, "--out", str(folder.path), "--set", "train.log_every=1"], tmp_path / "said") as process:
        wait_for(lambda: folder.metrics_jsonl.exists() and folder.metrics_jsonl.read_text().count("\n") >= 25)
        process.send_signal(number)
        assert process.wait(60) == 130
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert re.match(r"error: interrupted (in|after) epoch .*: the state after .* is saved, a resumed run goes on", last)
    found = states.load(folder)
    assert (found["epoch"], found["step"]) > (0, 0)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    code = (
        "import sys, time, lbc_cli.states as states\n"
        "whole = states.save\n"
        "def slow(*args):\n"
        "    print('saving', flush=True); time.sleep(60); whole(*args)\n"
        "states.save = slow\n"
        "from lbc_cli.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, *LONG[3:], "--out", str(folder.path), "--set", "train.save_every=500"]
    with running(command, tmp_path / "said") as process:
        wait_for(lambda: folder.metrics_jsonl.exists() and folder.metrics_jsonl.read_text().count("\n") >= 3)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: "saving" in (tmp_path / "said").read_text())
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 130
        assert time.monotonic() - began < 10
    assert not states.found(folder)


# Kills


def killed(tmp_path: Path, kills: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.kills", str(tmp_path), str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=quiet_env(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"equal after {kills} kills"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    killed(tmp_path, 3, seed=11)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_a_run_killed_fifty_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    killed(tmp_path, 50, seed=12)


# More epochs


def job(epochs: int, *overrides: str) -> training.Job:
    settings = ["data.batch_size=360", "schedule.warmup_epochs=1", *overrides]
    flags = {"model.name": "test_resnet", "data.source": "digits", "train.epochs": epochs}
    return training.prepare(resolve("digits", overrides=settings, flags=flags))


def test_a_run_is_extended_before_and_after_its_end(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(Interrupted):
        training.run(job(4), folder, stop=stop_at(6))
    for epochs in (3, 4):
        with pytest.raises(UsageError, match=f"--extend-to {epochs}: the run has 4 epochs already"):
            resume(folder, extend_to=epochs)
    longer = resume(folder, extend_to=6)
    assert longer.notes == (
        "6 epochs instead of 4: the learning rate goes on along the schedule of 6, t_f stays at epoch 2",
    )
    outcome = training.run(longer, folder)
    assert [record["epoch"] for record in outcome.result.history] == list(range(6))
    assert [record["phase"] for record in outcome.result.history] == ["training"] * 2 + ["final"] * 4
    assert "epochs = 6  # --extend-to 6" in folder.recipe.read_text()
    with pytest.raises(OutputError, match=r"has ended.*--extend-to"):
        resume(folder)
    first = folder.model.read_bytes()
    outcome = training.run(resume(folder, extend_to=7), folder)
    assert len(outcome.result.history) == 7
    assert folder.model.read_bytes() != first
    assert folder.summary.is_file()


@pytest.mark.parametrize("method", METHODS)
def test_what_follows_from_the_length_is_pinned_to_what_it_was(method: str) -> None:
    options = parse_options(method, {"schedule": "gradual"} if method == "sr-ste" else {})
    pinned = options.pinned(12)
    ends = {name for name in ("t_f", "t_end") if hasattr(options, name)}
    assert pinned.keys() == ends
    assert all(value in (6, 9) for value in pinned.values())
    again = parse_options(method, {**options.model_dump(exclude_none=True), **pinned})
    assert again.pinned(12) == {}


def test_options_of_a_resumed_run_need_one(tmp_path: Path) -> None:
    for option in (["--extend-to", "3"], ["--previous-state"]):
        done = subprocess.run([*LBC, "train", "resnet18", *option], capture_output=True, text=True, env=quiet_env())
        assert done.returncode == 2
        assert f"{option[0]} is for a run that goes on: name its folder with --resume" in done.stderr
