"""What a run costs on paper, worked out a second time from shapes and schedules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lbc_cli import accounting, flops, training
from lbc_cli.methods import attach
from lbc_cli.recipe import resolve
from lbc_cli.runs import RunFolder, read_epochs

EPOCHS = 10


def network() -> nn.Module:
    """Stem, two layers that can be sparse, classifier; 8 x 8 pixels all through but for the second layer's."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.Conv2d(32, 16, 1, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(256, 4),
    )


MACS = {"0.weight": 64 * 16 * 27, "1.weight": 64 * 32 * 144, "2.weight": 16 * 16 * 32, "4.weight": 256 * 4}
PARAMS = {"0.weight": 16 * 27, "1.weight": 32 * 144, "2.weight": 16 * 32, "4.weight": 256 * 4, "4.bias": 4}


def planned(method: str, pattern: str | None = "1:4", **options: Any) -> accounting.Account:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = attach(model, optimizer, pattern=pattern, method=method, epochs=EPOCHS, **options)
    return accounting.planned(flops.count(model, (3, 8, 8)), pruner)


def whole(shares: dict[str, float]) -> float:
    """The share of the whole network by hand."""
    return sum(macs * shares.get(name, 1.0) for name, macs in MACS.items()) / sum(MACS.values())


def ramp(t_i: int, t_f: int, total: int, final: int) -> list[int]:
    left = [1.0 if e <= t_i else 0.0 if e >= t_f else ((t_f - e) / (t_f - t_i)) ** 3 for e in range(EPOCHS)]
    return [final + math.ceil(round((total - final) * share, 9)) for share in left]


def test_the_model_in_use() -> None:
    account = planned("sr-ste", layers={"2": "1:16"})
    assert account.dense == flops.Totals(sum(MACS.values()), sum(PARAMS.values()))
    assert account.sparse is not None
    assert account.sparse.macs == (
        MACS["0.weight"] + MACS["1.weight"] // 4 + MACS["2.weight"] // 16 + MACS["4.weight"]
    )  # fmt: skip
    assert account.sparse.params == account.parameters == 16 * 27 + 32 * 36 + 16 * 2 + 256 * 4 + 4
    assert account.training_macs(1000) == 3000 * sum(MACS.values())
    assert account.record()["macs"] == {"dense": account.dense.macs, "sparse": account.sparse.macs}


def test_dense_training_costs_itself() -> None:
    account = planned("dense")
    assert account.training_share == 1.0
    assert account.sparse == account.dense


def test_srste_counts_one_pass_also_under_the_gradual_schedule() -> None:
    share = (1 / 4 + 2) / 3
    assert planned("sr-ste").training_share == pytest.approx(whole({"1.weight": share, "2.weight": share}))
    kept = ramp(2, 6, 4, 1)
    assert kept == [4, 4, 4, 3, 2, 2, 1, 1, 1, 1]
    mean = sum((k / 4 + 2) / 3 for k in kept) / EPOCHS
    gradual = planned("sr-ste", schedule="gradual", t_i=2, t_f=6)
    assert gradual.training_share == pytest.approx(whole({"1.weight": mean, "2.weight": mean}))


def test_lbc_counts_two_passes_layer_by_layer() -> None:
    # N = 1: as many weights of a group are alive as candidates.
    quarter, sixteenth = ramp(0, 5, 4, 1), ramp(0, 5, 16, 1)
    shares = {
        "1.weight": sum((2 * k / 4 + 1) / 3 for k in quarter) / EPOCHS,
        "2.weight": sum((2 * k / 16 + 1) / 3 for k in sixteenth) / EPOCHS,
    }
    assert planned("lbc", layers={"2": "1:16"}).training_share == pytest.approx(whole(shares))


def test_asp_costs_dense_training_and_then_its_density() -> None:
    mean = (4 * 1.0 + 6 * 0.25) / EPOCHS
    account = planned("asp", dense_epochs=4)
    assert account.training_share == pytest.approx(whole({"1.weight": mean, "2.weight": mean}))


def test_gmp_costs_its_density_layer_by_layer() -> None:
    share = [0.0 if e >= 5 else ((5 - e) / 5) ** 3 for e in range(EPOCHS)]
    mean = sum(0.2 + 0.8 * left for left in share) / EPOCHS
    account = planned("gmp", None, sparsity=0.8)
    assert account.training_share == pytest.approx(whole({"1.weight": mean, "2.weight": mean}), rel=1e-3)  # rounding


def test_a_teacher_adds_a_forward_pass() -> None:
    model = network()
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern="1:4", method="sr-ste", epochs=EPOCHS)
    cost = flops.count(model, (3, 8, 8))
    alone, taught = accounting.planned(cost, pruner), accounting.planned(cost, pruner, teacher_macs=600_000)
    assert alone.training_share is not None
    assert taught.training_share == pytest.approx(alone.training_share + 600_000 / (3 * sum(MACS.values())))
    assert taught.teacher_share == pytest.approx(600_000 / (3 * sum(MACS.values())))


def test_a_run_notes_what_its_epochs_cost_and_its_summary_their_mean(tmp_path: Path) -> None:
    sets = ["data.source=generated", "data.image_size=32", "data.batch_size=8", "schedule.warmup_epochs=0"]
    flags = {"model.name": "test_resnet", "train.epochs": 4, "sparsity.pattern": "1:4", "method.t_f": 2}
    job = training.prepare(resolve("digits", overrides=sets, flags=flags))
    folder = RunFolder.create(tmp_path / "run")
    outcome = training.run(job, folder)
    cost = job.cost
    sparse = sum(cost.macs[target.name] for target in job.pruner.targets) / cost.total_macs
    alive = [4, 2, 1, 1]
    expected = [1 - sparse + sparse * (2 * k / 4 + 1) / 3 for k in alive]
    noted = [record["step_share"] for record in read_epochs(folder.metrics_jsonl)]
    assert noted == pytest.approx(expected)
    assert outcome.account.training_share == pytest.approx(sum(expected) / 4)
    assert job.planned_account().training_share == pytest.approx(sum(expected) / 4)
    counted = json.loads(folder.summary.read_text())["counted"]
    assert counted["training_share"] == outcome.account.training_share
    assert counted["macs"]["dense"] == cost.total_macs
    assert job.images == 4 * 8 * 4
