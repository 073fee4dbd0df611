"""A resumed run knows where its settings came from when it began."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbc_cli import training
from lbc_cli.errors import Interrupted
from lbc_cli.recipe import ResolvedRecipe, resolve
from lbc_cli.recipe.origins import read_files, read_origins, resolve_again
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from tests.test_resume import stop_at


def resolved() -> ResolvedRecipe:
    odd = ['sparsity.layers."layer4.*"="1:4"', 'description="a # b  # c"', 'model.kwargs={a = "x # y", b = [1, 2.5]}']
    return resolve("digits", overrides=odd, flags={"model.name": "resnet18", "train.seed": 3})


def test_origins_are_read_back_as_they_were_written() -> None:
    before = resolved()
    found = read_origins(before.text)
    set_somewhere = {key: origin for key, origin in before.provenance.items() if origin != "default"}
    assert set_somewhere.items() <= found.items()
    assert found['sparsity.layers."layer4.*"'] == "--set"
    assert found["description"] == "--set"
    assert found["train.seed"] == "--seed"
    assert read_files(before.text) == before.extends


def test_a_recipe_is_again_what_it_was(tmp_path: Path) -> None:
    before = resolved()
    path = tmp_path / "recipe.toml"
    path.write_text(before.text)
    again = resolve_again(path)
    assert (again.recipe, again.name, again.extends) == (before.recipe, "digits", before.extends)
    assert again.provenance == before.provenance
    assert again.text == before.text
    bare = resolve(flags={"model.name": "resnet18"})
    path.write_text(bare.text)
    assert (resolve_again(path).name, resolve_again(path).extends) == ("", ())


def test_a_recipe_that_was_edited_keeps_the_origins_that_it_still_has(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = resolved().text.replace("seed = 3  # --seed", "seed = 4").replace("hflip = 0.0", "hflip = 0.00")
    path.write_text(text.split("\n", 1)[1])
    again = resolve_again(path)
    assert "recipe.toml:" in again.provenance["train.seed"]
    assert "recipe.toml:" in again.provenance["augment.hflip"]  # not spelled as we spell it
    assert again.provenance["model.name"] == "MODEL"
    assert again.name == "recipe"


def test_a_resumed_run_and_one_that_is_extended_keep_their_origins(tmp_path: Path) -> None:
    flags = {"model.name": "test_resnet", "data.source": "digits", "train.epochs": 2}
    settings = ["data.batch_size=360", "schedule.warmup_epochs=1"]
    folder = RunFolder.create(tmp_path / "run")
    first = training.prepare(resolve("digits", overrides=settings, flags=flags))
    with pytest.raises(Interrupted):
        training.run(first, folder, stop=stop_at(2))
    again = resume(folder)
    assert again.resolved.provenance == first.resolved.provenance
    assert again.resolved.name == "digits"
    longer = resume(folder, extend_to=3)
    changed = {key for key, origin in longer.resolved.provenance.items() if origin != first.resolved.provenance[key]}
    assert changed == {"train.epochs", "method.t_f"}
