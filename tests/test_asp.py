"""ASP against dense parameters under a mask in the forward pass, over whole runs in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli import patterns
from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import attach
from lbc_cli.patterns import Pattern
from tests.reference import PaperAsp
from tests.test_lbc import EPOCHS, LAYERS, TARGETS, batches, learning_rate, network

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def sgd(**kwargs: Any) -> Make:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)


def compare(pattern: str, make: Make, dense_epochs: int) -> None:
    """Train both in step: masks equal, weights to 1e-12, after every update."""
    model = network()
    wanted = Pattern.parse(pattern)
    optimizer = make(model.parameters())
    pruner = attach(
        model, optimizer, pattern=wanted, method="asp", epochs=EPOCHS, layers=LAYERS, dense_epochs=dense_epochs
    )
    nmv = dict.fromkeys(TARGETS, (wanted.n, wanted.m, wanted.vector))
    oracle = PaperAsp(copy.deepcopy(model), nmv, make, dense_epochs=dense_epochs)
    step = 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        oracle.begin_epoch(epoch)
        assert pruner.phase == ("final" if epoch >= dense_epochs else "training")
        for images, labels in batches(epoch):
            step += 1
            nn.functional.cross_entropy(model(images), labels).backward()
            oracle.backward(lambda f, x=images, y=labels: nn.functional.cross_entropy(f(x), y))
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(learning_rate(step))
            effective = oracle.effective()
            for name, weight in model.named_parameters():
                assert (weight - effective[name]).abs().max().item() <= 1e-12, name
            for name, mask in pruner.masks().items():
                assert torch.equal(mask, oracle.masks[name].bool())
    for name, mask in pruner.masks().items():
        patterns.check_mask(mask, wanted, name)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:16", "4:8", "16:32", "2:4/4"])
@pytest.mark.parametrize("dense_epochs", [0, 3])
def test_equals_masked_training_for_every_pattern(pattern: str, dense_epochs: int) -> None:
    compare(pattern, MOMENTUM, dense_epochs)


@pytest.mark.parametrize(
    "make",
    [
        sgd(),
        sgd(momentum=0.9, nesterov=True, weight_decay=1e-2),
        lambda params: torch.optim.AdamW(params, lr=0.2, weight_decay=0.05),
    ],
    ids=["sgd", "nesterov", "adamw"],
)
def test_equals_masked_training_for_every_optimizer(make: Make) -> None:
    compare("2:4", make, dense_epochs=2)


def test_weights_that_hold_the_pattern_keep_it() -> None:
    model = network()
    first = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), method="asp", epochs=1, layers=LAYERS)
    first.begin_epoch(0)
    again = copy.deepcopy(model)
    second = attach(again, torch.optim.SGD(again.parameters(), lr=0.1), method="asp", epochs=1, layers=LAYERS)
    second.begin_epoch(0)
    assert all(torch.equal(mask, second.masks()[name]) for name, mask in first.masks().items())
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


def test_skipping_the_epoch_of_the_pruning_does_not_skip_the_pruning() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = attach(model, optimizer, method="asp", epochs=EPOCHS, layers=LAYERS, dense_epochs=2)
    pruner.begin_epoch(1)
    assert pruner.density() == 1
    assert pruner.memory_bytes() == {"mask": 0}
    pruner.begin_epoch(4)
    assert pruner.density() == 0.5


def test_a_run_that_would_never_prune_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MethodError, match=r"dense_epochs = 6: a run of 6 epochs would never prune; set it to 5"):
        attach(model, optimizer, method="asp", epochs=6, layers=LAYERS, dense_epochs=6)
    assert not optimizer._optimizer_step_pre_hooks


def test_weights_that_are_not_finite_are_not_pruned() -> None:
    model = network()
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), method="asp", epochs=1, layers=LAYERS)
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(DivergenceError, match=r"1\.weight is not finite"):
        pruner.begin_epoch(0)


def test_nothing_remembers_a_removed_weight() -> None:
    """Neither the optimizer's momentum nor a gradient that was being accumulated when the weights were pruned."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = attach(model, optimizer, method="asp", epochs=2, layers=LAYERS, dense_epochs=1)
    pruner.begin_epoch(0)
    images, labels = batches(0)[0]
    for _ in range(2):
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    pruner.begin_epoch(1)
    for target in pruner.targets:
        removed = ~pruner.masks()[target.name]
        for memory in (optimizer.state[target.weight]["momentum_buffer"], target.weight.grad):
            assert (memory[removed] == 0).all()
            assert (memory[~removed] != 0).any()
