"""From a recipe to a job: what `lbc train` builds, and what it takes from a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lbc_cli import checkpoint, training
from lbc_cli.errors import CheckpointError, ModelError, OutputError, RecipeError, UsageError
from lbc_cli.recipe import resolve
from lbc_cli.recipe.load import with_values
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from lbc_cli.smoke import smoke


def job(*overrides: str, **flags: Any) -> training.Job:
    base = {"model.name": "test_resnet", "data.source": "digits"}
    return training.prepare(smoke(resolve("digits", overrides=overrides, flags={**base, **flags})))


def test_smoke_passes_every_phase_of_the_schedule_and_says_where_its_values_come_from() -> None:
    smoked = smoke(resolve("imagenet-deit-small", flags={"model.name": "test_vit", "data.source": "digits"}))
    assert smoked.provenance["train.epochs"] == smoked.provenance["method.t_f"] == "--smoke"
    assert smoked.recipe.augment.mixup == 0.8  # what it is made of stays
    pruner = training.prepare(smoked).pruner
    counts = [pruner.planned_survivors(epoch)["2:4"] for epoch in range(smoked.recipe.train.epochs)]
    assert counts[0] == 6
    assert 1 < counts[1] < 6
    assert counts[2:] == [1, 1]


def test_smoke_refuses_what_it_would_have_to_ignore() -> None:
    base = {"model.name": "test_resnet", "data.source": "digits"}
    with pytest.raises(UsageError, match=r"--smoke sets train.epochs = 4 itself: drop it from --epochs"):
        smoke(resolve("digits", flags={**base, "train.epochs": 9}))
    with pytest.raises(UsageError, match=r"data.batch_size"):
        smoke(resolve("digits", overrides=["data.batch_size=3"], flags=base))
    assert smoke(resolve("digits", flags={**base, "train.epochs": 4})).recipe.train.epochs == 4


def test_values_replaced_in_a_resolved_recipe_are_checked() -> None:
    resolved = resolve("digits")
    changed = with_values(resolved, {"train.epochs": 7, "method.t_f": 3}, "here")
    assert (changed.recipe.train.epochs, changed.recipe.method["t_f"]) == (7, 3)
    assert changed.provenance["train.epochs"] == "here"
    assert resolved.recipe.train.epochs == 24
    with pytest.raises(RecipeError, match="epochs"):
        with_values(resolved, {"train.epochs": -1}, "here")


def test_a_run_starts_from_packed_and_from_plain_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first = job()
    first.pruner.begin_epoch(3)
    checkpoint.save(first.model, tmp_path / "packed.safetensors", pruner=first.pruner)
    save_file({k: v.contiguous() for k, v in first.model.state_dict().items()}, tmp_path / "plain.safetensors")
    for name in ("packed", "plain"):
        second = job("train.seed=9", **{"model.init": str(tmp_path / f"{name}.safetensors")})
        for key, value in first.model.state_dict().items():
            assert torch.equal(second.model.state_dict()[key], value)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        job(**{"model.init": str(tmp_path / "text.safetensors")})


def test_a_model_that_cannot_take_the_images_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ModelError, match=r"does not run on an input of 3 x 32 x 32.*set data.image_size"):
        training.prepare(resolve("digits", flags={"model.name": "inception_v3"}))


@pytest.mark.parametrize("override", ["train.seed=9223372036854775808", "train.epochs=1000001"])
def test_numbers_that_no_run_can_use_are_refused_with_the_recipe(override: str) -> None:
    with pytest.raises(RecipeError, match="must be less than"):
        resolve("digits", overrides=[override])


def test_learning_rates_of_a_plan_are_those_of_the_first_updates() -> None:
    planned = job("train.epochs=4")
    rates = planned.learning_rates()
    assert rates[0] == 0.0
    assert rates[1] == 0.05
    assert rates[1] > rates[2] > rates[3] > 0
    assert planned.optimizer.param_groups[0]["lr"] == 0.0


def test_one_model_is_created_from_one_seed() -> None:
    first, same, other = (job(**{"train.seed": seed}).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "words"), [("tpu", "write cpu"), ("meta", "not supported"), ("cuda:99", "CUDA devices")]
)
def test_a_device_that_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        training.choose_device(name)


def test_resuming_needs_a_state_and_a_run_that_has_not_ended(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_recipe(resolve("digits").text)
    with pytest.raises(OutputError, match="before its first state"):
        resume(folder)
    folder.write_summary({})
    with pytest.raises(OutputError, match="has ended"):
        resume(folder)


def test_dense_is_a_method_like_any_other(tmp_path: Path) -> None:
    dense = job(**{"method.name": "dense"})
    assert (dense.title, str(dense.default_folder)) == ("test_resnet · dense", "runs/test_resnet-dense")
    outcome = training.run(dense, RunFolder.create(tmp_path / "run"))
    assert outcome.report.ok
    assert not outcome.report.layers
    assert outcome.memory == {}
