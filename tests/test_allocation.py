"""Patterns by budget: the choice against every choice, the budget kept, the recipe that says what was chosen."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lbc_cli import flops, models, training
from lbc_cli.allocation import Option, allocate, choose, lost_magnitude
from lbc_cli.cli import app
from lbc_cli.errors import RecipeError, TargetError, UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.recipe import resolve, schema
from lbc_cli.runs import RunFolder
from lbc_cli.targets import find_targets

# The choice


def brute_force(layers: list[list[Option]], limit: int) -> float:
    """The least sum of losses over every combination within the limit."""
    sums = [
        sum(option.loss for option in combination)
        for combination in itertools.product(*layers)
        if sum(option.cost for option in combination) <= limit
    ]
    return min(sums, default=float("inf"))


def some_layers(numbers: random.Random, unit: int) -> list[list[Option]]:
    """Two to five layers with two to four options, cheaper ones losing more."""
    layers = []
    for _ in range(numbers.randint(2, 5)):
        count = numbers.randint(2, 4)
        costs = sorted((unit * numbers.randint(1, 40) for _ in range(count)), reverse=True)
        losses = sorted(numbers.random() for _ in range(count))
        layers.append([Option(str(n), cost, loss) for n, (cost, loss) in enumerate(zip(costs, losses, strict=True))])
    return layers


@pytest.mark.parametrize("unit", [1, 7, 4096])
def test_no_choice_within_the_budget_loses_less(unit: int) -> None:
    numbers = random.Random(unit)
    for _ in range(150):
        layers = some_layers(numbers, unit)
        least = sum(min(o.cost for o in options) for options in layers)
        most = sum(max(o.cost for o in options) for options in layers)
        limit = numbers.randint(least, most + 2)
        chosen = [options[number] for options, number in zip(layers, choose(layers, limit), strict=True)]
        assert sum(option.cost for option in chosen) <= limit
        assert sum(option.loss for option in chosen) == pytest.approx(brute_force(layers, limit), abs=1e-12)


def test_coarse_cells_keep_the_budget_and_lose_little() -> None:
    numbers = random.Random(5)
    for _ in range(100):
        layers = some_layers(numbers, 1)
        least = sum(min(o.cost for o in options) for options in layers)
        limit = least + numbers.randint(0, 60)
        chosen = [o[n] for o, n in zip(layers, choose(layers, limit, cells=12), strict=True)]
        assert sum(option.cost for option in chosen) <= limit
        slack = (len(layers) + 1) * -(-(limit - least) // 11)
        tight = max(least, limit - slack)
        assert sum(option.loss for option in chosen) <= brute_force(layers, tight) + 1e-12


def test_without_room_the_cheapest_are_taken_and_less_is_refused() -> None:
    layers = [[Option("a", 9, 0.1), Option("b", 4, 0.5)], [Option("a", 7, 0.2), Option("b", 5, 0.9)]]
    assert choose(layers, 9) == [1, 1]
    assert choose(layers, 11) == [1, 0]
    assert choose(layers, 10**9) == [0, 0]
    with pytest.raises(ValueError, match="cost 9, more than 8"):
        choose(layers, 8)


def test_lost_magnitude_by_hand() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, -5.0, 0.0]])
    assert lost_magnitude(weight, Pattern(2, 4)) == pytest.approx(3 / 15)
    assert lost_magnitude(weight, Pattern(1, 4)) == pytest.approx(6 / 15)
    assert lost_magnitude(weight, Pattern(1, 4, 2)) == pytest.approx(1 - 7 / 15)  # the third column, for both rows
    assert lost_magnitude(torch.zeros(2, 4), Pattern(1, 4)) == 0.0
    with pytest.raises(UsageError, match="not finite"):
        lost_magnitude(torch.full((2, 4), torch.nan), Pattern(1, 4))


# A model


def sparsity(**table: Any) -> schema.Sparsity:
    return schema.Sparsity.model_validate(table)


def kept(model: nn.Module, cost: flops.Cost, layers: dict[str, str], kind: str) -> float:
    """The share of the whole model under these layers, from its targets alone."""
    targets = find_targets(model, Pattern(1, 2), layers).targets
    densities = {t.name: t.pattern.density for t in targets}
    total = getattr(flops.dense_totals(cost), "macs" if kind == "flops" else "params")
    return float(getattr(flops.sparse_totals(cost, densities), "macs" if kind == "flops" else "params") / total)


@pytest.mark.parametrize(("kind", "share"), [("flops", 0.3), ("flops", 0.45), ("params", 0.15), ("params", 0.4)])
def test_a_model_meets_its_budget_and_uses_it(kind: str, share: float) -> None:
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=10)
    cost = flops.count(model, (3, 32, 32))
    layers = allocate(model, cost, sparsity(budget={kind: share}))
    assert layers.keys() == {t.name for t in find_targets(model, Pattern(1, 16)).targets}
    assert len(set(layers.values())) > 1
    assert share - 0.02 < kept(model, cost, layers, kind) <= share


def test_a_layer_that_matters_keeps_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(16, 16, 1, bias=False) for _ in range(4)), nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randint(0, 2, (16, 16, 1, 1)) * 2.0 - 1)  # every weight is as large as any other
        model[2].weight.mul_(torch.rand(16, 16, 1, 1) ** 20)  # nearly sparse already
    layers = allocate(
        model, flops.count(model, (16, 2, 2)), sparsity(budget={"params": 0.6, "patterns": ["2:4", "1:16"]})
    )
    assert layers == {"1.weight": "2:4", "2.weight": "1:16", "3.weight": "2:4"}


def test_globs_stand_and_what_takes_no_pattern_stays_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 6, 1, bias=False),
        nn.Conv2d(6, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    cost = flops.count(model, (3, 1, 1))
    table = {"budget": {"params": 0.75, "patterns": ["2:4", "1:8"]}, "layers": {"1": "2:4", "6": "dense"}}
    layers = allocate(model, cost, sparsity(**table))
    assert layers.keys() == {"2.weight", "4.weight"}  # 3 has 6 inputs; 0, 1 and 6 are not to be chosen for
    total = 48 + 256 + 96 + 96 + 256 + 34
    assert 48 + 128 + 96 // 8 + 96 + 128 + 34 <= 0.75 * total < 48 + 128 + 96 + 96 + 256 + 34
    assert kept(model, cost, {**table["layers"], **layers}, "params") <= 0.75
    dense = allocate(model, cost, sparsity(budget={"params": 0.9, "patterns": ["dense", "1:8"]}))
    assert "dense" in dense.values()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"budget": {"flops": 0.05}},
            r"budget flops = 0.05 cannot be reached: with the sparsest of 2:4, 1:4, 1:8, 1:16 the model keeps 0\.\d+ "
            r"of its multiply-adds, 0\.\d+ of them in layers that stay as they are",
        ),
        ({"budget": {"params": 0.5, "patterns": ["1:31"]}}, "no layer that sparsity.layers leaves open takes any"),
    ],
)
def test_what_cannot_be_reached_is_one_line(table: dict[str, Any], words: str) -> None:
    model = models.create("test_resnet", num_classes=10)
    with pytest.raises(TargetError, match=words) as caught:
        allocate(model, flops.count(model, (3, 32, 32)), sparsity(**table))
    assert "\n" not in str(caught.value)


# A recipe


def job(*overrides: str, **flags: Any) -> training.Job:
    sets = ["data.source=generated", "data.image_size=32", "data.batch_size=8", "schedule.warmup_epochs=0"]
    base = {"model.name": "test_resnet", "train.epochs": 4, "sparsity.budget.flops": 0.45}
    return training.prepare(resolve("digits", overrides=[*sets, *overrides], flags={**base, **flags}))


def test_a_run_writes_what_was_chosen_into_its_recipe_and_does_not_choose_again(tmp_path: Path) -> None:
    first = job()
    layers = first.resolved.recipe.sparsity.layers
    assert layers == {t.name: str(t.pattern) for t in first.pruner.targets}
    name = next(iter(layers))
    assert first.resolved.provenance[f'sparsity.layers."{name}"'] == "budget flops = 0.45"
    assert first.title == "test_resnet · lbc, flops 0.45"
    assert first.default_folder == Path("runs/test_resnet-lbc-flops0.45")
    folder = RunFolder.create(tmp_path / "run")
    outcome = training.run(first, folder)
    assert outcome.account.sparse is not None
    assert outcome.account.sparse.macs <= 0.45 * outcome.account.dense.macs
    text = folder.recipe.read_text()
    assert "allocated = true  # budget flops = 0.45" in text
    assert f'"{name}" = "{layers[name]}"  # budget flops = 0.45' in text

    changed = {"train.seed": 9, "sparsity.budget.flops": None}  # other weights would choose otherwise
    again = training.prepare(resolve(folder.recipe, flags=changed))
    assert again.resolved.recipe.sparsity.layers == layers
    assert json.loads(folder.summary.read_text())["budget"] == "flops 0.45"


def test_globs_of_the_recipe_keep_their_origin_and_their_place() -> None:
    found = job('sparsity.layers."layer4*"="dense"', 'sparsity.layers."layer3*"="1:4"').resolved
    globs = list(found.recipe.sparsity.layers)
    assert globs[-2:] == ["layer4*", "layer3*"]
    assert found.provenance['sparsity.layers."layer3*"'] == "--set"


@pytest.mark.parametrize(
    ("flags", "overrides", "error", "words"),
    [
        ({"sparsity.budget.params": 0.5}, [], RecipeError, "flops and params exclude each other"),
        ({"method.name": "dense"}, [], RecipeError, "method dense takes no patterns: a budget does not apply"),
        ({"sparsity.budget.flops": 1.5}, [], RecipeError, "less than 1"),
        ({}, ['sparsity.budget.patterns=["4:2"]'], RecipeError, "keeps 4 of 2"),
        ({}, ['sparsity.budget.patterns=["dense"]'], RecipeError, "name at least one pattern"),
        ({}, ["sparsity.budget.flop=0.3"], RecipeError, "Did you mean 'flops'"),
        ({"sparsity.budget.flops": None}, ["sparsity.budget.allocated=true"], RecipeError, "no budget that chose"),
        ({"sparsity.pattern": "1:4"}, [], UsageError, "--pattern 1:4 and a budget exclude each other"),
    ],
)
def test_what_is_no_budget(flags: dict[str, Any], overrides: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        job(*overrides, **flags)


def test_a_plan_shows_the_choice() -> None:
    sets = ["--set", "sparsity.budget.params=0.3", "--set", "data.source=generated", "--set", "data.image_size=32"]
    result = CliRunner().invoke(app, ["train", "test_resnet", "--recipe", "digits", *sets, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert len({layer["pattern"] for layer in plan["layers"]}) > 1
    assert plan["cost"]["parameters_sparse"] <= 0.3 * plan["cost"]["parameters_dense"]
