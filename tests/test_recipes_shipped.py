"""Every recipe that is shipped: it runs through every phase of its method, and fits the model that it is made for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lbc_cli import paper, training
from lbc_cli.cli import app
from lbc_cli.methods import METHODS
from lbc_cli.recipe import ResolvedRecipe, resolve, shipped_recipes, shipped_sweeps
from lbc_cli.runs import RunFolder, read_epochs
from lbc_cli.smoke import smoke
from lbc_cli.sweeps import read_sweep

ROOT = Path(__file__).parents[1]
PAPER = [name for name in shipped_recipes() if name.startswith("paper/")]
_DONE: dict[str, tuple[Any, list[dict[str, Any]]]] = {}


def smoke_of(name: str) -> ResolvedRecipe:
    """The smoke run of a recipe with a network small enough for a test."""
    small = "test_vit" if "deit" in name else "test_resnet"
    return smoke(resolve(name, flags={"model.name": small}))


def outcome_of(name: str, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """How a smoke run ended, and its epochs; recipes whose smoke runs are the same are run once."""
    resolved = smoke_of(name)
    values = resolved.recipe.model_dump(exclude={"description"})
    key = json.dumps(values, sort_keys=True)
    if key not in _DONE:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            run = RunFolder.create(folder)
            _DONE[key] = training.run(training.prepare(resolved), run), read_epochs(run.metrics_jsonl)
        finally:
            torch.set_num_threads(threads)
    return _DONE[key]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_runs_through_every_phase(name: str, tmp_path: Path) -> None:
    outcome, epochs = outcome_of(name, tmp_path / "run")
    recipe = smoke_of(name).recipe
    assert outcome.report.ok
    densities = [epoch["density"] for epoch in epochs]
    method, info = recipe.method, METHODS[recipe.method["name"]]
    if not info.sparse:
        assert densities == [1.0] * 4
        assert not outcome.report.layers
    elif info.structured:
        n, m = map(int, recipe.sparsity.pattern.split(":"))
        assert densities[-1] == n / m
        assert {layer.pattern for layer in outcome.report.layers} == {recipe.sparsity.pattern}
    elif "sparsity" in method:
        assert densities[-1] == pytest.approx(1 - method["sparsity"], abs=1e-3)
    if method["name"] in ("lbc", "gmp"):  # dense, between, done
        assert densities[0] == 1.0 > densities[1] > densities[2] == densities[3]
    elif method["name"] == "asp":
        assert densities[:2] == [1.0, 1.0]
    assert epochs[-1]["phase"] == "final"


@pytest.mark.parametrize("name", shipped_sweeps())
def test_every_sweep_resolves_and_one_run_of_it_works(name: str, tmp_path: Path) -> None:
    sweep = read_sweep(name, overrides=["data.source=digits"])
    assert {run.seed for run in sweep.runs} == {0, 1, 2}
    assert len({run.resolved.recipe.model.name for run in sweep.runs}) == 1  # all is compared on the same network
    short = read_sweep(name, smoke=True)
    assert len(short.runs) == len(sweep.runs)
    last = short.runs[-1].resolved
    outcome = training.run(training.prepare(last), RunFolder.create(tmp_path / "run"))
    assert outcome.report.ok


def test_a_smoke_run_takes_the_smallest_images_that_the_model_takes() -> None:
    assert smoke(resolve("imagenet-resnet50")).recipe.data.image_size == 32
    assert smoke(resolve("imagenet-deit-small")).recipe.data.image_size == 32
    assert smoke(resolve("imagenet-resnet50", flags={"model.name": "inception_v3"})).recipe.data.image_size == 96


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["paper/table1-resnet50-lbc-2_4", "paper/table4-rigl", "paper/table1-deit-small-lbc-2_4"]
)
def test_the_models_themselves_take_seconds(name: str, tmp_path: Path) -> None:
    start = time.process_time()
    outcome = training.run(training.prepare(smoke(resolve(name))), RunFolder.create(tmp_path / "run"))
    assert outcome.report.ok
    assert time.process_time() - start < 90


# The paper's tables


def test_every_row_of_the_tables_has_its_recipe() -> None:
    counted = {f"paper/{name}" for rows in paper.TABLES.values() for name in rows}
    sixth = {f"paper/table6-{name}" for name in ("dense", "magnitude", "gradient", "s-inverse", "s")}
    assert set(PAPER) == counted | sixth
    assert [len(rows) for rows in paper.TABLES.values()] == [17, 7, 8]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_is_short_and_says_what_it_is(name: str) -> None:
    text = shipped_recipes()[name].read_text()
    own = tomllib.loads(text)
    assert own.keys() <= {"extends", "description", "method", "sparsity", "train", "optimizer"}
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 20
    table, model, top1 = re.fullmatch(
        r"LBC paper, Table (\d): ([\w-]+), .*\((.*) % top-1 there\)", own["description"]
    ).groups()
    assert name.startswith(f"paper/table{table}-")
    recipe = resolve(name).recipe
    assert (
        recipe.model.name
        == {"ResNet-18": "resnet18", "ResNet-50": "resnet50", "DeiT-S": "deit_small_patch16_224"}[model]
    )
    printed = paper.TABLES.get(int(table), {}).get(name.removeprefix("paper/"))
    assert printed is None or f"{printed.top1:.1f}" == top1
    epochs = {"asp": 200, "str": 100}.get(recipe.method["name"], 300 if model == "DeiT-S" else 120)
    assert recipe.train.epochs == epochs


def test_the_settings_of_the_rows_are_those_of_the_tables() -> None:
    for name in PAPER:
        recipe = resolve(name).recipe
        method, pattern = recipe.method["name"], recipe.sparsity.pattern
        if found := re.search(r"-(lbc|sr-ste|asp)-(\d+)_(\d+)$", name):
            assert (method, pattern) == (found[1], f"{found[2]}:{found[3]}")
        if found := re.search(r"table5-(lbc|sr-ste)-(\d+)-(\d+)$", name):
            times = (recipe.method["t_i"], recipe.method["t_f"])
            assert (method, *times, pattern) == (found[1], int(found[2]), int(found[3]), "1:4")
            assert recipe.method.get("schedule", "gradual") == "gradual"
        if name.startswith("paper/table1") and method == "lbc":
            assert (recipe.method["t_i"], recipe.method["t_f"]) == (0, None)
    criteria = {
        name: resolve(f"paper/table6-{name}").recipe.method["criterion"]
        for name in ("s", "s-inverse", "magnitude", "gradient")
    }
    assert criteria == {"s": "score", "s-inverse": "inverse", "magnitude": "magnitude", "gradient": "gradient"}


@pytest.fixture(scope="module")
def rows() -> dict[str, paper.Row]:
    return {row.recipe.removeprefix("paper/"): row for table in paper.TABLES for row in paper.rows(table)}


def test_what_is_counted_agrees_with_the_paper_where_it_can(rows: dict[str, paper.Row]) -> None:
    dense, sparse = rows["table4-dense"], rows["table4-lbc-1_16"]
    assert (round(dense.params / 1e6, 1), round(dense.macs / 1e9, 2)) == (25.6, 4.09)
    assert round(sparse.weights / 1e6, 2) == sparse.printed.params == 3.52
    assert round(sparse.macs / 1e9, 2) == 0.37  # 0.44 there
    for name in ("dnw", "gmp", "rigl"):
        row = rows[f"table4-{name}"]
        assert row.weights / 1e6 == pytest.approx(row.printed.params, abs=0.006)
        assert row.macs / 1e9 == pytest.approx(row.printed.macs, abs=0.01)
    for name, row in rows.items():
        if "table1" in name and ("sr-ste" in name or "asp" in name):
            assert row.training_sparse == pytest.approx(row.printed.training, abs=0.011)
        elif name.endswith("dense"):
            assert row.training == row.training_sparse == 1.0
    assert rows["table4-str"].macs is None


def test_what_is_counted_follows_from_the_formulas(rows: dict[str, paper.Row]) -> None:
    cost, _ = paper._cost("resnet50")
    rest = cost.macs["conv1.weight"] + cost.macs["fc.weight"]

    def whole(share: float) -> float:
        return (rest + (cost.total_macs - rest) * share) / cost.total_macs

    for pattern in ("2_4", "1_4", "2_8", "1_16"):
        n, m = map(int, pattern.split("_"))
        row = rows[f"table1-resnet50-sr-ste-{pattern}"]
        assert row.training_sparse == pytest.approx((n / m + 2) / 3)
        assert row.training == pytest.approx(whole((n / m + 2) / 3))
    alive = [1 + -(-15 * (60 - epoch) ** 3 // 60**3) if epoch < 60 else 1 for epoch in range(120)]
    share = sum((2 * count / 16 + 1) / 3 for count in alive) / 120
    assert rows["table1-resnet50-lbc-1_16"].training == pytest.approx(whole(share))
    assert rows["table1-resnet50-asp-2_4"].training_sparse == pytest.approx((100 + 100 * 0.5) / 120)
    kept = [4 if e <= 30 else 1 + -(-3 * (60 - e) ** 3 // 30**3) if e < 60 else 1 for e in range(120)]
    gradual = sum((k / 4 + 2) / 3 for k in kept) / 120
    assert rows["table5-sr-ste-30-60"].training_sparse == pytest.approx(gradual)


def test_the_figures_are_printed_with_their_reasons() -> None:
    result = CliRunner().invoke(app, ["recipe", "paper", "--table", "4"])
    assert result.exit_code == 0, result.output
    assert re.search(r"table4-lbc-1_16 +71\.80 % +3\.52 M +3\.58 M +3\.52 M +0\.44 G +368 M", result.stdout)
    assert "how the paper comes to 0.44 G it does not say" in " ".join(result.stdout.split())
    figures = json.loads(CliRunner().invoke(app, ["recipe", "paper", "--table", "5", "--json"]).stdout)
    assert figures["5"]["rows"][0]["printed"]["training"] == 0.74
    wrong = CliRunner().invoke(app, ["recipe", "paper", "--table", "2"])
    assert wrong.exit_code == 2
    assert "what can be counted is in tables 1, 4, 5" in wrong.stderr


def test_the_figure_of_dense_training_is_rigls() -> None:
    """3.2e18 FLOPs are 32,000 updates of 4,096 images at 8.2e9 FLOPs, three times; 120 epochs are more."""
    cost, _ = paper._cost("resnet50")
    rigl = 3 * 8.2e9 * 32_000 * 4096
    assert rigl == pytest.approx(3.2e18, rel=0.01)
    assert 6 * cost.total_macs * 120 * paper.IMAGES == pytest.approx(3.77e18, rel=0.01)


# A package


def test_the_wheel_has_every_recipe(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    environment = {**os.environ, "LBC_KERNELS": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".toml")}
    assert inside >= {f"lbc_cli/recipes/{name}.toml" for name in shipped_recipes()}
