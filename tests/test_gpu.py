"""What only a CUDA device can show. Skipped where there is none: `pytest -m gpu`."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lbc_cli import checkpoint, patterns, states, training
from lbc_cli.bench import StepSetup, train_bench
from lbc_cli.errors import DivergenceError, Interrupted
from lbc_cli.methods import attach
from lbc_cli.patterns import Pattern
from lbc_cli.recipe import resolve
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder, read_epochs
from lbc_cli.smoke import smoke
from tests.test_distributed import quiet_env, torchrun
from tests.test_methods import EPOCHS, LAYERS, batches, network
from tests.test_resume import stop_at

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def train(device: torch.device, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = network(dtype).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    pruner = attach(model, optimizer, epochs=EPOCHS, layers=LAYERS, **options)
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch, dtype):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    return model.cpu(), {name: mask.cpu() for name, mask in pruner.masks().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"criterion": "gradient"},
        {"criterion": "magnitude"},
        {"method": "sr-ste"},
        {"method": "sr-ste", "pattern": "2:8", "schedule": "gradual"},
        {"method": "asp", "dense_epochs": 2},
    ],
    ids=str,
)
def test_masks_and_weights_are_those_of_the_cpu_in_float64(options: dict[str, Any]) -> None:
    on_cpu = train(torch.device("cpu"), torch.float64, **options)
    on_gpu = train(CUDA, torch.float64, **options)
    for name, mask in on_cpu[1].items():
        assert torch.equal(mask, on_gpu[1][name])
    for name, weight in on_cpu[0].named_parameters():
        torch.testing.assert_close(on_gpu[0].get_parameter(name), weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("weights", ["frozen", "trained"])
def test_masks_drawn_on_the_device_end_as_the_pattern_and_go_on_from_their_state(weights: str, hard: bool) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = network().to(CUDA)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        given = {"method": "maskllm", "weights": weights, "hard": hard}
        return model, optimizer, attach(model, optimizer, epochs=EPOCHS, layers=LAYERS, **given)

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Any, epochs: range) -> None:
        for epoch in epochs:
            pruner.begin_epoch(epoch)
            for images, labels in batches(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images.to(CUDA)), labels.to(CUDA)).backward()
                optimizer.step()

    first, second = start(), start()
    go_on(*first, range(1))
    for target, source in zip(second, first, strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(first[0][1].weight, second[0][1].weight)
    assert torch.equal(
        first[2].state_dict()["state"]["own"]["generator"], second[2].state_dict()["state"]["own"]["generator"]
    )
    go_on(*second, range(1, EPOCHS))
    patterns.check_mask(second[2].masks()["1.weight"], Pattern(2, 4))
    assert (second[0][1].weight[~second[2].masks()["1.weight"]] == 0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_in_float16_with_overflows(fused: bool) -> None:
    model = network().to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, fused=fused)
    pruner = attach(model, optimizer, epochs=EPOCHS, layers=LAYERS)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)  # overflows at first
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(images.to(CUDA)), labels.to(CUDA))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() < 2.0**24
    assert pruner.density() == 0.5
    assert (model[1].weight[~pruner.masks()["1.weight"]] == 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_whole_run_in_bfloat16(compiled: bool, tmp_path: Path) -> None:
    overrides = [
        "train.amp=bfloat16",
        "train.channels_last=true",
        "train.ema=true",
        f"train.compile={str(compiled).lower()}",
    ]
    flags = {"model.name": "test_resnet", "data.source": "digits", "train.device": "cuda"}
    job = training.prepare(smoke(resolve("digits", overrides=overrides, flags=flags)))
    outcome = training.run(job, RunFolder.create(tmp_path / "run"))
    assert outcome.report.ok
    assert outcome.ema_report is not None
    assert outcome.ema_report.ok
    model = checkpoint.load(tmp_path / "run" / "model.safetensors", device=CUDA)
    assert model(torch.zeros(1, 3, 64, 64, device=CUDA)).isfinite().all()


def test_the_bench_times_hooks_on_the_devices_clock() -> None:
    setup = StepSetup(
        model="resnet18", device=CUDA, batch=8, image_size=64, steps=3, amp="bfloat16", channels_last=True
    )
    result = train_bench(setup)
    assert all(0 < inside < whole for inside, whole in zip(result.hooks, result.method.seconds, strict=True))
    assert result.method.peak_bytes > result.dense.peak_bytes


def cuda_job(*overrides: str, **flags: Any) -> training.Job:
    values = {"model.name": "test_resnet", "data.source": "digits", "train.device": "cuda", "train.epochs": 3, **flags}
    settings = ["schedule.warmup_epochs=1", "train.log_every=1000", "train.amp=bfloat16", *overrides]
    return training.prepare(resolve("digits", overrides=settings, flags=values))


def test_a_run_stopped_in_mid_epoch_goes_on(tmp_path: Path) -> None:
    whole = training.run(cuda_job(), RunFolder.create(tmp_path / "whole")).result
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(Interrupted):
        training.run(cuda_job(), folder, stop=stop_at(30))
    resumed = training.run(resume(folder), folder).result
    assert [record["epoch"] for record in resumed.history] == [0, 1, 2]
    assert resumed.last["density"] == whole.last["density"] == 0.5
    assert resumed.last["top1"] == pytest.approx(whole.last["top1"], abs=5)


def test_divergence_is_noticed_an_update_later_and_never_saved(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    broken = cuda_job("optimizer.lr=1e30", "schedule.warmup_lr=1e29", "optimizer.weight_decay=0.0")
    with pytest.raises(DivergenceError, match="found after it, before anything was saved"):
        training.run(broken, folder)
    assert not states.found(folder)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_with_common_batch_norms_train_what_one_does(tmp_path: Path) -> None:
    command = ["train", "test_resnet", "--data", "digits", "--device", "cuda", "--epochs", "3"]
    command += ["--set", "train.sync_bn=true", "--set", "schedule.warmup_epochs=1"]
    for ranks in (1, 2):
        launcher = [sys.executable, "-m", "lbc_cli"] if ranks == 1 else [*torchrun(2), "-m", "lbc_cli"]
        out = ["--out", str(tmp_path / str(ranks)), "--set", f"data.batch_size={64 // ranks}"]
        done = subprocess.run([*launcher, *command, *out], env=quiet_env(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_epochs(RunFolder(tmp_path / str(ranks)).metrics_jsonl) for ranks in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], rel=0.02)
        assert second["density"] == first["density"]
