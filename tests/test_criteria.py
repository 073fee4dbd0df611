"""The criteria of Table 6 in the place of LBC's score, against their materialised forms, over whole runs in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli import patterns
from lbc_cli.errors import MethodError
from lbc_cli.methods import attach
from lbc_cli.methods.lbc import Lbc
from lbc_cli.patterns import Pattern
from tests.reference import PaperCriteria
from tests.test_lbc import (
    EPOCHS,
    LAYERS,
    MOMENTUM,
    TARGETS,
    assert_same_candidates,
    assert_same_weights,
    batches,
    learning_rate,
    network,
    sgd,
)

OTHERS = pytest.mark.parametrize("criterion", ["inverse", "magnitude", "gradient"])


def compare(
    criterion: str,
    pattern: str = "2:4",
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = MOMENTUM,
    *,
    accumulate: int = 1,
    rule: Any = "sgd",
    **options: Any,
) -> None:
    """Train both in step; alive sets and masks must be equal at every epoch, weights to 1e-12 after every update."""
    model = network()
    wanted = Pattern.parse(pattern)
    optimizer = make(model.parameters())
    pruner = attach(model, optimizer, pattern=wanted, epochs=EPOCHS, layers=LAYERS, criterion=criterion, **options)
    assert isinstance(pruner, Lbc)
    oracle = PaperCriteria(
        criterion,
        copy.deepcopy(model),
        dict.fromkeys(TARGETS, (wanted.n, wanted.m, wanted.vector)),
        make,
        t_i=pruner.ramp.t_i,
        t_f=pruner.ramp.t_f,
        rounding=pruner.ramp.rounding,
        singles=options.get("removal") == "weights",
        rule=rule,
    )
    step = 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        oracle.begin_epoch(epoch)
        assert_same_candidates(pruner, oracle)
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
            assert_same_weights(model, oracle)
    for name in TARGETS:
        patterns.check_mask(pruner.masks()[name], wanted)


@OTHERS
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "2:8/16"])
def test_equals_the_materialised_criterion_for_every_pattern(criterion: str, pattern: str) -> None:
    compare(criterion, pattern)


@OTHERS
@pytest.mark.parametrize(
    "options",
    [{"t_i": 1, "t_f": 5, "rounding": "removals"}, {"removal": "weights"}],
    ids=str,
)
def test_equals_it_for_every_schedule(criterion: str, options: dict[str, Any]) -> None:
    compare(criterion, "2:4", **options)


@OTHERS
@pytest.mark.parametrize("kwargs", [{}, {"momentum": 0.9, "weight_decay": 1e-3, "maximize": True}], ids=str)
def test_equals_it_for_every_optimizer(criterion: str, kwargs: dict[str, Any]) -> None:
    compare(criterion, "1:4", sgd(**kwargs))


@OTHERS
def test_equals_it_under_adamw(criterion: str) -> None:
    compare(criterion, "1:4", lambda p: torch.optim.AdamW(p, lr=0.2, weight_decay=0.05), rule=(0.2, 2000.0))


@OTHERS
def test_a_gradient_of_several_batches_counts_once(criterion: str) -> None:
    compare(criterion, "1:4", accumulate=2)


def run(criterion: str) -> tuple[Lbc, nn.Module]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = attach(model, optimizer, epochs=EPOCHS, layers=LAYERS, criterion=criterion)
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert isinstance(pruner, Lbc)
    return pruner, model


def test_the_criteria_choose_differently() -> None:
    masks = [torch.cat([mask.flatten() for mask in run(name)[0].masks().values()]) for name in
             ("score", "inverse", "magnitude", "gradient")]  # fmt: skip
    agreement = [(masks[0] == mask).double().mean().item() for mask in masks]
    assert agreement[0] == 1
    assert agreement[1] < 0.4  # chance is 0.5
    assert all(0.4 < share < 0.95 for share in agreement[2:])


def test_the_magnitude_holds_nothing_and_the_gradient_no_momentum() -> None:
    model = network()
    plans = {}
    for criterion in ("score", "inverse", "magnitude", "gradient"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = attach(model, optimizer, epochs=EPOCHS, layers=LAYERS, criterion=criterion)
        plans[criterion] = pruner.planned_memory()
        pruner.detach()
    assert plans["score"] == plans["inverse"]
    assert plans["gradient"] == {**plans["score"], "momentum": 0}
    assert plans["magnitude"] == {**plans["gradient"], "score": 0}


@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_a_memory_of_scores_that_are_not_learned_is_refused(criterion: str) -> None:
    model = network()
    with pytest.raises(MethodError, match=rf'score_memory = 5 beside criterion = "{criterion}"'):
        attach(
            model, torch.optim.SGD(model.parameters()), epochs=4, layers=LAYERS, criterion=criterion, score_memory=5.0
        )


def test_an_unknown_criterion_names_those_there_are() -> None:
    model = network()
    with pytest.raises(MethodError, match=r"criterion = 'fisher'.*'score', 'inverse', 'magnitude' or 'gradient'"):
        attach(model, torch.optim.SGD(model.parameters()), epochs=4, layers=LAYERS, criterion="fisher")
