import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lbc_cli.engine import StopOnSignal, make_deterministic
from lbc_cli.engine.control import peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def restored() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("restored")
def test_deterministic_mode_seeds_everything_and_convolutions_train_under_it() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    make_deterministic(3, CPU)
    first = draw()
    assert torch.are_deterministic_algorithms_enabled()
    make_deterministic(3, CPU)
    assert draw() == first
    make_deterministic(4, CPU)
    assert all(a != b for a, b in zip(draw(), first, strict=True))

    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 4, 3)
    )
    gradients = []
    for _ in range(2):
        net.zero_grad()
        torch.manual_seed(0)
        net(torch.randn(4, 3, 16, 16)).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.usefixtures("restored")
def test_cuda_keeps_its_fast_algorithms() -> None:
    make_deterministic(0, torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_leaves(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_handlers_return_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopOnSignal():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_peak_memory_is_that_of_the_process() -> None:
    before = peak_memory(CPU)
    assert before is not None
    assert before > 20 * 2**20
    block = torch.ones(64 * 2**20 // 4 * 4)
    after = peak_memory(CPU)
    assert after is not None
    assert after >= before
    assert after >= block.nbytes
