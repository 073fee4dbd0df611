"""SR-STE against an autograd function on dense parameters, over whole runs in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli.errors import MethodError
from lbc_cli.methods import attach, parse_options
from lbc_cli.methods.srste import SrSte
from lbc_cli.patterns import Pattern
from tests.reference import PaperSrSte
from tests.test_lbc import EPOCHS, LAYERS, TARGETS, batches, learning_rate, network

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def sgd(**kwargs: Any) -> Make:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)


def compare(pattern: str, make: Make, *, accumulate: int = 1, decay: float = 0.05, **options: Any) -> list[Tensor]:
    """Train both in step: masks equal, effective and dense weights to 1e-12, after every update.

    Returns:
        All masks in one, after every update.
    """
    model = network()
    wanted = Pattern.parse(pattern)
    optimizer = make(model.parameters())
    pruner = attach(
        model, optimizer, pattern=wanted, method="sr-ste", epochs=EPOCHS, layers=LAYERS, decay=decay, **options
    )
    assert isinstance(pruner, SrSte)
    nmv = dict.fromkeys(TARGETS, (wanted.n, wanted.m, wanted.vector))
    when = {"t_i": pruner.ramp.t_i, "t_f": pruner.ramp.t_f}
    oracle = PaperSrSte(copy.deepcopy(model), nmv, make, decay=decay, accumulate=accumulate, **when)
    masks, step = [], 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        oracle.begin_epoch(epoch)
        assert_same(model, pruner, oracle)
        for number, (images, labels) in enumerate(batches(epoch)):
            (nn.functional.cross_entropy(model(images), labels) / accumulate).backward()
            oracle.backward(lambda f, x=images, y=labels: nn.functional.cross_entropy(f(x), y) / accumulate)
            if (number + 1) % accumulate:
                continue
            step += 1
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(learning_rate(step))
            assert_same(model, pruner, oracle)
            masks.append(torch.cat([mask.flatten() for mask in pruner.masks().values()]))
    assert pruner.phase == "final"
    return masks


def assert_same(model: nn.Module, pruner: SrSte, oracle: PaperSrSte) -> None:
    effective = oracle.effective()
    for name, weight in model.named_parameters():
        assert (weight - effective[name]).abs().max().item() <= 1e-12, name
    for target in pruner.targets:
        assert torch.equal(pruner.masks()[target.name], oracle.masks[target.name].bool())
        assert (pruner.dense_of(target) - oracle.weights[target.name]).abs().max().item() <= 1e-12


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:16", "4:8", "2:4/4", "1:4/16"])
def test_equals_the_paper_for_every_pattern(pattern: str) -> None:
    masks = compare(pattern, MOMENTUM)
    if "/16" not in pattern:  # too few groups there
        assert any(not torch.equal(masks[0], mask) for mask in masks), "or the comparison would show little"


@pytest.mark.parametrize(
    "make",
    [
        sgd(),
        sgd(momentum=0.9, nesterov=True, weight_decay=1e-2),
        sgd(momentum=0.9, weight_decay=1e-3, maximize=True),
        sgd(momentum=0.9, weight_decay=1e-3, fused=True),
        lambda params: torch.optim.AdamW(params, lr=0.2, weight_decay=0.05),
        lambda params: torch.optim.RMSprop(params, lr=0.2, momentum=0.5),
    ],
    ids=["sgd", "nesterov", "maximize", "fused", "adamw", "rmsprop"],
)
def test_equals_the_paper_for_every_optimizer(make: Make) -> None:
    compare("2:4", make)


@pytest.mark.parametrize(
    "options", [{}, {"t_f": 0}, {"t_i": 2, "t_f": 4}, {"t_i": 1, "t_f": 5}, {"t_i": 3, "t_f": 3}], ids=str
)
def test_equals_the_paper_for_every_gradual_schedule(options: dict[str, int]) -> None:
    compare("2:8", MOMENTUM, schedule="gradual", **options)


def test_the_pull_is_counted_once_for_an_update_of_several_batches() -> None:
    compare("2:4", MOMENTUM, accumulate=2)


def test_plain_straight_through_training_has_no_pull() -> None:
    compare("2:4", MOMENTUM, decay=0.0)


def test_the_kept_weights_follow_the_cubic_schedule() -> None:
    """Table 5 at 1:4 with t_i = 30, t_f = 60 of 120 epochs, and 2:8."""
    ramp = parse_options("sr-ste", {"schedule": "gradual", "t_i": 30, "t_f": 60}).ramp(120)  # type: ignore[attr-defined]
    assert [ramp.survivors(epoch, 4, 1) for epoch in (0, 30, 31, 34, 40, 45, 59, 60, 119)] == [
        4,
        4,
        4,
        3,
        2,
        2,
        2,
        1,
        1,
    ]
    assert [ramp.survivors(epoch, 8, 2) for epoch in (30, 31, 45, 59, 60)] == [8, 8, 3, 3, 2]


def test_a_removed_weight_can_return() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = attach(model, optimizer, method="sr-ste", epochs=1, layers={"0": "2:4"}, decay=0.5)
    pruner.begin_epoch(0)
    assert model[0].weight.tolist() == [[4, 3, 0, 0]]
    model[0].weight.grad = torch.tensor([[0.0, 0.0, -3.0, 0.0]])
    optimizer.step()  # 2 - (-3 + 0.5 * 2) = 4, and 1 - 0.5 * 1 = 0.5
    assert model[0].weight.tolist() == [[4, 0, 4, 0]]
    assert pruner.dense_of(pruner.targets[0]).tolist() == [[4, 3, 4, 0.5]]  # type: ignore[attr-defined]


def test_the_default_decay_is_the_papers() -> None:
    assert parse_options("sr-ste", {}).model_dump()["decay"] == 2e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_f": 3}, 'beside schedule = "constant"'),
        ({"t_i": 3}, 'beside schedule = "constant"'),
        ({"schedule": "gradual", "t_f": EPOCHS}, "past the last epoch"),
        ({"decay": -1.0}, "greater than or equal to 0"),
        ({"decay": float("inf")}, "finite"),
        ({"schedule": "cubic"}, "schedule = 'cubic'"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MethodError, match=message):
        attach(model, optimizer, method="sr-ste", epochs=EPOCHS, layers=LAYERS, **options)
    assert not optimizer._optimizer_step_pre_hooks
