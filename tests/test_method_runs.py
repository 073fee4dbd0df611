"""`lbc train --smoke` for every structured method: every phase, stopped and resumed, to a verified checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbc_cli import training
from lbc_cli.errors import Interrupted, MethodError
from lbc_cli.methods import METHODS
from lbc_cli.recipe import resolve
from lbc_cli.recipe.load import with_values
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from lbc_cli.smoke import smoke

RUNS: tuple[tuple[str, list[str]], ...] = (
    *((name, []) for name, info in METHODS.items() if info.structured and info.sparse),
    ("sr-ste", ["method.schedule=gradual", "train.amp=bfloat16"]),
    ("asp", ["method.dense_epochs=2"]),
    ("maskllm", ["method.weights=trained", "method.hard=true", "train.ema=true"]),
    ("lbc", ["method.criterion=gradient"]),
)


def job(method: str, overrides: list[str], model: str = "test_vit", pattern: str = "2:4") -> training.Job:
    flags = {"model.name": model, "data.source": "digits", "sparsity.pattern": pattern, "method.name": method}
    resolved = smoke(resolve("digits", overrides=overrides, flags=flags))
    return training.prepare(with_values(resolved, {"train.save_every": 1}, "tests"))


@pytest.mark.parametrize(("method", "overrides"), RUNS, ids=lambda value: str(value))
def test_a_smoke_run_stopped_and_resumed_writes_the_same_bytes(
    method: str, overrides: list[str], tmp_path: Path
) -> None:
    whole = RunFolder.create(tmp_path / "whole")
    outcome = training.run(job(method, overrides), whole)
    assert outcome.report.ok
    assert [layer.density for layer in outcome.report.layers] == [0.5] * len(outcome.report.layers)
    assert outcome.report.layers
    assert "val_loss" in outcome.result.last
    folder = RunFolder.create(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        training.run(job(method, overrides), folder, stop=folder.state.is_file)
    training.run(resume(folder), folder)
    assert folder.model.read_bytes() == whole.model.read_bytes()


def test_a_method_that_cannot_take_the_pattern_says_so_before_anything_is_written() -> None:
    with pytest.raises(MethodError, match=r"4:16 has 1,820 candidates per group.*limit 256 bytes per weight"):
        job("maskllm", [], model="test_resnet", pattern="4:16")


def test_asp_goes_on_from_the_weights_of_another_run(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "first")
    training.run(job("dense", []), first)
    flags = {
        "model.name": "test_vit",
        "data.source": "digits",
        "method.name": "asp",
        "model.init": str(first.model),
    }
    second = RunFolder.create(tmp_path / "second")
    outcome = training.run(training.prepare(smoke(resolve("digits", flags=flags))), second)
    assert outcome.report.ok
    assert outcome.result.history[0]["density"] == 0.5
