"""Choosing by measurement: what the times say, what is stored, and when a stored plan may be used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lbc_cli import runtime
from lbc_cli.checkpoint import save
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.runtime import loading
from lbc_cli.runtime import tune as module
from lbc_cli.runtime.clock import Times, interleaved
from lbc_cli.runtime.executors import EXECUTORS
from lbc_cli.runtime.layers import SparseConv2d
from lbc_cli.runtime.loading import identity, open_model
from lbc_cli.runtime.prepare import Prepared, prepare
from lbc_cli.runtime.tune import Plan, fastest, find_plan, key_for, plan_file, read_plans, save_plan, tune
from tests.checkpoints import FakePruner
from tests.test_runtime import CPU, pruned, relative, sample_for

REFERENCE = [EXECUTORS["reference"]]


def times(*milliseconds: float) -> Times:
    return Times(tuple(value / 1000 for value in milliseconds))


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    model, patterns = pruned("test_resnet", "2:4", torch.float32)
    return prepare(model, patterns, sample_for(model, 32, torch.float32))


def scripted(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], Times]) -> list[list[str]]:
    """Give out times instead of measuring; returns what was asked."""
    asked: list[list[str]] = []

    def instead(calls: Mapping[str, Any], device: torch.device, **options: Any) -> dict[str, Times]:
        for call in calls.values():
            call()  # it must at least run
        asked.append(list(calls))
        return {name: answer(name) for name in calls}

    monkeypatch.setattr(module, "interleaved", instead)
    return asked


def run(prepared: Prepared) -> Plan:
    return tune(prepared, REFERENCE, batch=2, dtype=torch.float32, device=CPU)


def test_every_candidate_runs_once_a_round_in_turn() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    taken = interleaved(calls, CPU, rounds=3, warmup=1)
    assert order == list("ab") + list("aabb") * 3  # a timed call follows an untimed one of its own
    assert {name: len(value.seconds) for name, value in taken.items()} == {"a": 3, "b": 3}
    with pytest.raises(UsageError, match="CUDA graphs need a CUDA device, not cpu"):
        interleaved(calls, CPU, rounds=3, graphs=True)
    with pytest.raises(UsageError, match="rounds = 0"):
        interleaved(calls, CPU, rounds=0)


def test_time_runs_out_after_three_rounds_at_the_earliest() -> None:
    assert len(interleaved({"a": lambda: None}, CPU, rounds=100, seconds=0)["a"].seconds) == 3


def test_sparse_must_be_clearly_faster() -> None:
    dense = times(10, 11, 12, 13, 14)
    assert fastest({"dense": dense, "x": times(5, 6, 7, 8, 9)}) == "x"
    assert fastest({"dense": dense, "x": times(9, 10, 11, 12, 13)}) == "dense"
    assert fastest({"dense": dense, "x": times(20, 20, 20), "y": times(1, 1, 1)}) == "y"
    assert fastest({"dense": dense}) == "dense"


def test_the_reference_never_wins_by_itself(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scripted(monkeypatch, lambda name: times(1, 1, 1) if name == "dense" else times(3, 3, 3))
    plan = run(prepared)
    assert set(plan.choices.values()) == {"dense"}
    assert plan.verdict == "0 of 14 layers are faster sparse"
    assert list(plan.model) == ["dense"]
    assert asked[-1] == ["dense"]
    assert len(asked) - 1 < len(plan.choices)  # layers of one shape are measured once


def test_faster_variants_are_chosen_layer_by_layer(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"reference:shifts": 0.5, "reference": 2.0, "tuned": 0.5}
    scripted(monkeypatch, lambda name: times(*[fast.get(name, 1.0)] * 3))
    plan = run(prepared)
    shapes = {layer.name: layer.shape for layer in prepared.layers()}
    for name, choice in plan.choices.items():
        assert choice == ("reference:shifts" if shapes[name][2:] == (3, 3) else "dense")
    converted, _ = prepared.sparse(REFERENCE, dtype=torch.float32, device=CPU, choices=plan.choices)
    sample = prepared.sample.float()
    with torch.inference_mode():
        assert relative(converted(sample), prepared.model(sample)) <= 1e-5


def test_a_kernel_that_cannot_run_a_layer_is_named_and_left_out(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SparseConv2d.forward

    def picky(self: SparseConv2d, images: torch.Tensor) -> torch.Tensor:
        if self.form == "shifts":
            raise RuntimeError("cuSPARSELt: not supported\nfor this shape")
        return forward(self, images)

    monkeypatch.setattr(SparseConv2d, "forward", picky)
    scripted(monkeypatch, lambda name: times(*[{"dense": 1.0}.get(name, 0.5)] * 3))
    plan = run(prepared)
    assert {why for ways in plan.failed.values() for why in ways.values()} == {
        "cuSPARSELt: not supported for this shape"
    }
    assert all(set(ways) == {"reference:shifts"} for ways in plan.failed.values())
    assert all("reference:shifts" not in ways for ways in plan.seconds.values())
    assert "reference:shifts" not in plan.choices.values()


def test_a_model_that_is_not_faster_stays_dense(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda name: times(2, 2, 2) if name in ("dense", "tuned") else times(1, 1, 1))
    plan = run(prepared)
    assert set(plan.choices.values()) == {"dense"}
    assert plan.verdict.endswith("but the whole model is not: everything stays dense")


def test_plans_come_back_and_hold_for_their_key_only(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch, lambda name: times(1, 2, 3))
    file = tmp_path / "m.safetensors"
    plan = run(prepared)
    assert save_plan(file, plan) == tmp_path / "m.tuned.json"
    assert find_plan(file, plan.key) == plan
    assert plan.key == key_for(prepared, batch=2, dtype=torch.float32, device=CPU)
    for change in ({"batch": 3}, {"dtype": "bfloat16"}, {"torch": "1.0"}, {"device": "H200"}, {"weights": "ab"}):
        assert find_plan(file, dataclasses.replace(plan.key, **change)) is None
    other = dataclasses.replace(plan, key=dataclasses.replace(plan.key, batch=8))
    save_plan(file, other)
    save_plan(file, plan)
    assert sorted(entry.key.batch for entry in read_plans(file)) == [2, 8]
    assert set(json.loads(plan_file(file).read_text())["plans"][0]) == {
        "key", "choices", "seconds", "model", "verdict", "failed",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2, "plans": []}', '{"schema": 1, "plans": [{"key": {}}]}'])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.tuned.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no plan file"):
        read_plans(tmp_path / "m.safetensors")


def test_a_real_measurement_on_this_machine(prepared: Prepared) -> None:
    plan = tune(prepared, REFERENCE, batch=1, dtype=torch.float32, device=CPU, rounds=3, seconds=0.01)
    assert set(plan.choices) == set(plan.seconds)
    assert all(0 < low <= middle <= high for ways in plan.seconds.values() for low, middle, high in ways.values())


def test_a_model_is_loaded_as_it_was_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, patterns = pruned("test_resnet", "2:4", torch.float32)
    file = tmp_path / "m.safetensors"
    save(model, file, pruner=FakePruner(model, {name: str(pattern) for name, pattern in patterns.items()}))
    with pytest.raises(UsageError, match=r"no plan for batch 4, .*lbc bench .* --tune --batch 4"):
        runtime.load(file, runtime="reference", tuned_for=4)
    scripted(monkeypatch, lambda name: times(*[{"reference": 2.0, "dense": 1.0}.get(name, 0.5)] * 3))
    opened = open_model(file)
    plan = tune(opened, REFERENCE, batch=4, dtype=torch.float32, device=CPU, weights=identity(file))
    save_plan(file, plan)
    loaded = runtime.load(file, runtime="reference", tuned_for=4)
    chosen = {entry.name: entry.variant for entry in runtime.executed(loaded)}
    assert {name: chosen[name] for name in plan.choices} == plan.choices
    assert "reference:im2col" in chosen.values()
    with pytest.raises(UsageError, match="exclude each other"):
        runtime.load(file, runtime="reference", tuned_for=4, choices={})


def test_a_plan_may_name_another_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, patterns = pruned("test_resnet", "1:4/64", torch.float32)
    file = tmp_path / "m.safetensors"
    save(model, file, pruner=FakePruner(model, {name: str(pattern) for name, pattern in patterns.items()}))
    both = [EXECUTORS["reference"], EXECUTORS["vector-reference"]]
    scripted(monkeypatch, lambda name: times(*[1.0 if name == "dense" else 0.2 if "vector" in name else 0.5] * 3))
    plan = tune(open_model(file), both, batch=4, dtype=torch.float32, device=CPU, weights=identity(file))
    assert {choice.partition(":")[0] for choice in plan.choices.values()} == {"reference", "vector-reference"}
    save_plan(file, plan)
    monkeypatch.setattr(loading, "usable_executors", lambda device, dtype: both)
    loaded = runtime.load(file, runtime="reference", tuned_for=4)
    chosen = {entry.name: entry.variant for entry in runtime.executed(loaded)}
    assert {name: chosen[name] for name in plan.choices} == plan.choices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tuned_model_is_no_slower_on_a_gpu() -> None:
    from lbc_cli.runtime.executors import usable_executors

    device = torch.device("cuda")
    model, patterns = pruned("vit_small_patch16_224", "2:4", torch.float32)
    prepared = prepare(model, patterns, sample_for(model, 0, torch.float32))
    executors = usable_executors(device, torch.bfloat16)
    plan = tune(prepared, executors, batch=32, dtype=torch.bfloat16, device=device)
    if any(choice != "dense" for choice in plan.choices.values()):
        assert plan.model["tuned"][1] <= plan.model["dense"][2]
