"""Several ranks train what one process trains: the same images, masks and weights; and none is left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
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
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from lbc_cli import data
from lbc_cli.checkpoint import read
from lbc_cli.cli import app
from lbc_cli.data.order import EpochBatches, EpochSampler
from lbc_cli.distributed import Launch, World, launch, rank_device
from lbc_cli.errors import DataError, ModelError, UsageError
from lbc_cli.models import with_common_statistics
from lbc_cli.optim import scaled
from lbc_cli.recipe import resolve, schema
from lbc_cli.runs import RunFolder
from tests.ranks import METHODS
from tests.test_engine import without_times

needs_torchrun = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)
ROOT = Path(__file__).parents[1]


# The launch


def test_a_process_on_its_own_is_no_launch() -> None:
    assert launch({}) is None
    assert launch({"RANK": "0", "WORLD_SIZE": "1"}) is None
    # a batch script without srun: SLURM's numbers are those of the job, not of this process
    assert launch({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}) is None


def test_torchrun_counts_before_srun_and_srun_on_its_own() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    srun = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "2",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
        "SLURM_JOB_ID": "123456",
    }
    assert launch({**srun, **torchrun}) == Launch(3, 8, 1, "a", "1")
    assert launch(srun) == Launch(2, 4, 1, "10.0.0.1", "23456")
    assert launch({**srun, "MASTER_ADDR": "b", "MASTER_PORT": "7"}) == Launch(2, 4, 1, "b", "7")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "must be integers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2 of WORLD_SIZE = 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(env: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        launch(env)


def test_other_commands_than_train_refuse_to_run_once_for_every_rank() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    called = CliRunner().invoke(app, ["inspect", "x"], env=env)
    assert called.exit_code == 2
    assert "lbc inspect is for one process, and was started as one of 2" in called.output


def test_ranks_choose_their_devices() -> None:
    assert rank_device("auto", World()) is None
    assert rank_device("cpu", World(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(UsageError, match="each rank takes its own GPU"):
        rank_device("cuda:1", World(1, 2, 1))


def test_common_batch_norms_need_a_gpu() -> None:
    with pytest.raises(ModelError, match="CUDA only"):
        with_common_statistics(torch.nn.BatchNorm2d(2), torch.device("cpu"))


def test_the_learning_rate_follows_the_common_batch_where_it_is_told_to() -> None:
    def rate(ranks: int, *overrides: str) -> float:
        batch = ["data.batch_size=64", "train.accumulate=2", "optimizer.lr=0.1"]
        return scaled(resolve("digits", overrides=[*batch, *overrides]).recipe, ranks).lr

    assert rate(4) == 0.1
    assert rate(4, "optimizer.lr_base_size=256") == pytest.approx(0.2)
    assert rate(8, "optimizer.lr_base_size=256", "optimizer.lr_base_scale=sqrt") == pytest.approx(0.2)


# The images


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("repeats", [0, 3])
def test_the_parts_of_all_ranks_are_the_batches_of_one_process(ranks: int, repeats: int) -> None:
    common = EpochBatches(EpochSampler(1000, 7, repeats), 6 * ranks)
    parts = [EpochBatches(EpochSampler(1000, 7, repeats), 6, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(common)}
    joined = [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]
    assert joined == list(common)


def loaders(world: World, **more: Any) -> data.Loaders:
    source = data.generated_data(size=16, n=100, num_classes=4)
    settings = schema.Data(workers=0, **more)
    config = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    config["crop_pct"] = 1.0
    device = torch.device("cpu")
    return data.make_loaders(source, settings, schema.Augment(), data_config=config, device=device, seed=3, world=world)


def test_ranks_see_the_augmented_images_of_one_process_and_evaluate_each_once() -> None:
    whole = loaders(World(), batch_size=24, eval_batch_size=7)
    parts = [loaders(World(rank, 3), batch_size=8, eval_batch_size=7) for rank in range(3)]
    for each in (whole, *parts):
        each.set_epoch(2, 1)
    for common, *shares in zip(whole.train, *(part.train for part in parts), strict=True):
        assert torch.equal(common[0], torch.cat([share[0] for share in shares]))
        assert torch.equal(common[1], torch.cat([share[1] for share in shares]))
    images = torch.cat([batch[0] for batch in whole.val])
    for rank, part in enumerate(parts):
        assert torch.equal(torch.cat([batch[0] for batch in part.val]), images[rank::3])
        assert len(list(part.val)) == len(part.val)


def test_fewer_images_than_a_common_batch_are_refused() -> None:
    with pytest.raises(DataError, match=r"for each of 4 ranks; set data\.batch_size to at most 25"):
        loaders(World(1, 4), batch_size=32)


# Training


@pytest.fixture(scope="module", params=[2, 4])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("ranks")
    alone = [sys.executable, "-m", "tests.ranks", str(folder)]
    together = [*torchrun(request.param), "-m", "tests.ranks", str(folder)]
    for command in (alone, together):
        done = subprocess.run(command, cwd=ROOT, env=quiet_env(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder, request.param


def quiet_env() -> dict[str, str]:
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {key: value for key, value in os.environ.items() if key not in launched}
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # machines without a name for themselves
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def of(folder: Path, size: int, rank: int, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = load_file(folder / f"{size}-{rank}.safetensors")
    seen = json.loads((folder / f"{size}-{rank}.json").read_text())
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}, seen[
        name
    ]


@needs_torchrun
@pytest.mark.parametrize("name", [*METHODS, "accumulate"])
def test_ranks_train_what_one_process_trains(trained: tuple[Path, int], name: str) -> None:
    folder, size = trained
    alone, seen_alone = of(folder, 1, 0, name)
    for rank in range(size):
        found, seen = of(folder, size, rank, name)
        assert found.keys() == alone.keys()
        assert seen.get("memory") == seen_alone.get("memory")  # every rank holds the whole method
        for key, value in found.items():
            if key.startswith("mask."):
                assert torch.equal(value, alone[key]), key
            else:
                assert (value - alone[key]).abs().max() <= 1e-10, key
        for one, other in zip(seen["history"], seen_alone["history"], strict=True):
            for key in ("train_loss", "val_loss", "ema_loss"):
                assert one.get(key) == pytest.approx(other.get(key), abs=1e-10)
            assert one["top1"] == other["top1"]
            assert one["density"] == other["density"]


@needs_torchrun
def test_ranks_stop_together_and_go_on_with_the_same_bits(trained: tuple[Path, int]) -> None:
    folder, size = trained
    for rank in range(size):
        whole, seen = of(folder, size, rank, "whole")
        resumed, seen_resumed = of(folder, size, rank, "resumed")
        buffers = {key for key in whole if "running" in key}  # rank 0's count, before every pass
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]) or (rank and key in buffers), key
        assert without_times(seen["history"]) == without_times(seen_resumed["history"])
        said = of(folder, size, rank, "stopped")[1]
        assert "in epoch 1, after update 4 of 5" in said["said"]
        assert said["states"] == ([[1, 0], [1, 4]] if rank == 0 else [])


@needs_torchrun
def test_masks_that_differ_and_values_that_are_not_finite_stop_every_rank(trained: tuple[Path, int]) -> None:
    folder, size = trained
    for rank in range(size):
        said = of(folder, size, rank, "astray")[1]["said"]
        assert f"DistributedError: the masks at the start of epoch 3 differ between the ranks: {size - 1} of" in said
        poisoned = of(folder, size, rank, "poisoned")[1]
        assert poisoned["said"].startswith("DivergenceError: epoch 0, update 1 of 5")
        assert poisoned["unchanged"]


# The command line


TRAIN = ["train", "test_resnet", "--data", "digits", "--epochs", "8", "--set", "data.batch_size=32"]


@contextlib.contextmanager
def running(command: list[str], output: Path) -> Iterator[subprocess.Popen[str]]:
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=quiet_env(), stdout=file, stderr=file, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(what: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks, and of their loader processes, that train into a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if str(folder).encode() in command and b"torch.distributed.run" not in command:
                found.append(int(entry.name))
    return found


@needs_torchrun
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_signal_to_torchrun_saves_and_the_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole, stopped = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped")
    with running([*torchrun(2), "-m", "lbc_cli", *TRAIN, "--out", str(whole.path)], tmp_path / "w.txt") as process:
        assert process.wait(180) == 0, (tmp_path / "w.txt").read_text()[-3000:]
    command = [*torchrun(2), "-m", "lbc_cli", *TRAIN, "--out", str(stopped.path), "--set", "data.workers=1"]
    with running(command, tmp_path / "s.txt") as process:
        wait_for(lambda: len(steps(stopped)) >= 3)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    said = (tmp_path / "s.txt").read_text()
    assert re.search(r"interrupted (in|after) epoch \d+.*is saved", said), said[-3000:]
    wait_for(lambda: not ranks_of(stopped.path), 10)
    assert not stopped.summary.exists()
    again = [*torchrun(2), "-m", "lbc_cli", "train", "--resume", str(stopped.path)]
    with running(again, tmp_path / "r.txt") as process:
        assert process.wait(180) == 0, (tmp_path / "r.txt").read_text()[-3000:]
    tensors = [dict(read(folder.model).tensors) for folder in (whole, stopped)]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def steps(folder: RunFolder) -> list[str]:
    return folder.metrics_jsonl.read_text().splitlines() if folder.metrics_jsonl.exists() else []


@needs_torchrun
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_killed_rank_ends_all_and_one_process_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    command = [*torchrun(2), "-m", "lbc_cli", *TRAIN, "--out", str(folder.path), "--set", "train.save_steps=5"]
    with running([*command, "--epochs", "1000"], tmp_path / "k.txt") as process:
        wait_for(lambda: folder.state.exists() and len(steps(folder)) >= 2)
        victims = [pid for pid in ranks_of(folder.path) if rank_of(pid) == 1]
        os.kill(victims[0], signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(60) != 0
    wait_for(lambda: not ranks_of(folder.path), 60 - (time.monotonic() - began))
    alone = [sys.executable, "-m", "lbc_cli", "train", "--resume", str(folder.path)]
    with running(alone, tmp_path / "a.txt") as process:
        wait_for(lambda: "1 rank instead of 2: the same 64 images a batch" in (tmp_path / "a.txt").read_text())
        before = len(steps(folder))
        wait_for(lambda: len(steps(folder)) > before)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    assert "batch_size = 64  # --resume with 1 rank" in folder.recipe.read_text()


def rank_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
        return int(found[1]) if found else None
    return None
