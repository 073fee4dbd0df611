"""Kill a training run at random moments and go on, over and over: `python -m tests.kills FOLDER KILLS SEED`.

Each run is a fork of this process, which has everything imported: so a kill costs the time until it, not a start.
States are saved after every update. After every kill the newest state must load; at last the run is let to its end and
compared with one that was never stopped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from lbc_cli import states, training
from lbc_cli.checkpoint.files import TEMPORARY
from lbc_cli.recipe import resolve
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from tests.test_engine import without_times

OVERRIDES = [
    "data.batch_size=240",
    "train.save_steps=1",
    "train.log_every=1",
    "train.ema=true",
    "train.ema_decay=0.9",
    "schedule.warmup_epochs=1",
]


def prepared() -> training.Job:
    flags = {"model.name": "test_resnet", "data.source": "digits", "train.epochs": 8, "train.seed": 1}
    return training.prepare(resolve("digits", overrides=OVERRIDES, flags=flags))


def train(path: Path) -> None:
    """Begin the run, or go on with it."""
    folder = RunFolder(path)
    if states.found(folder):
        training.run(resume(folder), folder)
        return
    for entry in path.glob("*"):  # nothing was saved yet: begin again
        entry.unlink()
    training.run(prepared(), RunFolder.create(path))


def in_a_fork(path: Path) -> int:
    """The process id of a fork that trains."""
    child = os.fork()
    if child:
        return child
    try:
        train(path)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def position(path: Path) -> tuple[int, int]:
    """Where the newest state stands; it must load."""
    folder = RunFolder(path)
    if not states.found(folder):
        return 0, 0
    state = states.load(folder)
    return state["epoch"], state["step"]


def main(root: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    generator = random.Random(seed)
    whole, broken = root / "whole", root / "broken"
    began = time.monotonic()
    os.waitpid(in_a_fork(whole), 0)
    length = time.monotonic() - began
    done = 0
    while done < kills:
        child = in_a_fork(broken)
        time.sleep(generator.uniform(0.02, 0.35) * length)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):  # it had come to its end: once more from the beginning
            assert os.WEXITSTATUS(status) == 0
            compare(whole, broken)
            for entry in broken.iterdir():
                entry.unlink()
            continue
        done += 1
        print("killed", done, "state", *position(broken), flush=True)
    assert not (broken / "summary.json").exists()
    _, status = os.waitpid(in_a_fork(broken), 0)
    assert status == 0
    compare(whole, broken)
    print("equal after", kills, "kills", flush=True)


def compare(whole: Path, broken: Path) -> None:
    """Both checkpoints, and what was measured, byte for byte; nothing temporary is left."""
    for name in ("model.safetensors", "model-ema.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    logs = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (whole, broken)]
    assert without_times(logs[0]) == without_times(logs[1])
    assert not [entry.name for entry in broken.iterdir() if TEMPORARY in entry.name]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
