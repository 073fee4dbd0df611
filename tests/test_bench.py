"""The bench: clocks that time the method's hooks and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from lbc_cli import bench
from lbc_cli.bench import HookClock, StepSetup, StepTimes, train_bench
from lbc_cli.engine import peak_memory
from lbc_cli.errors import LbcError, UsageError


def test_a_clock_counts_only_what_stands_between_its_marks() -> None:
    clock = HookClock(torch.device("cpu"))
    weight = nn.Parameter(torch.ones(3))
    weight.register_hook(clock.mark)
    weight.register_hook(lambda grad: time.sleep(0.02))
    weight.register_hook(clock.mark)
    weight.register_hook(lambda grad: time.sleep(0.2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_pre_hook(clock.mark)
    optimizer.register_step_pre_hook(lambda *_: time.sleep(0.02))
    optimizer.register_step_pre_hook(clock.mark)
    weight.sum().backward()
    optimizer.step()
    assert 0.04 <= clock.take() < 0.15
    assert clock.take() == 0.0


def test_quartiles_of_known_times() -> None:
    assert StepTimes("x", (4.0, 1.0, 3.0, 2.0, 5.0), 0).quartiles == (2.0, 3.0, 4.0)
    assert StepTimes("x", (7.0,), 0).quartiles == (7.0, 7.0, 7.0)


def test_the_methods_memory_and_both_peaks_are_measured() -> None:
    setup = StepSetup(model="test_resnet", batch=2, image_size=32, steps=2, warmup=1, pattern="4:8")
    result = train_bench(setup)
    assert len(result.dense.seconds) == len(result.method.seconds) == len(result.hooks) == 2
    assert result.memory["score"] == result.memory["momentum"] == 4 * result.memory["mask"]
    assert result.memory["candidates"] > result.memory["mask"]  # 70 candidates: 9 bytes for 8 weights
    assert result.removal > 0
    assert result.state_bytes > sum(result.memory.values())
    assert result.state_seconds > 0
    assert result.dense.peak_bytes is not None
    assert result.dense.peak_bytes > 50_000_000  # a process with torch loaded


def test_the_peak_is_not_that_of_the_process_that_measures() -> None:
    ballast = torch.ones(300_000_000, dtype=torch.uint8)
    small = train_bench(StepSetup(model="test_resnet", batch=2, image_size=32, steps=1, warmup=0)).dense.peak_bytes
    own = peak_memory(torch.device("cpu"))
    assert small is not None
    assert own is not None
    assert small < own - 150_000_000
    assert ballast[-1] == 1


def test_settings_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        train_bench(StepSetup(model="test_resnet", steps=0))
    with pytest.raises(LbcError, match="Did you mean"):
        train_bench(StepSetup(model="test_resnet", method="lcb"))


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="amp = 'x': one of off, bfloat16, float16"):
        StepSetup(model="test_resnet", amp="x")
    with pytest.raises(UsageError, match="does not run on an input of 3 x 8 x 8"):
        train_bench(StepSetup(model="inception_v3", image_size=8, batch=2, steps=1, warmup=0))


def test_the_names_are_there_and_load_torch_only_when_used() -> None:
    for name in bench.__all__:
        assert getattr(bench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bench.nothing  # noqa: B018
    code = "import sys, lbc_cli.bench; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
