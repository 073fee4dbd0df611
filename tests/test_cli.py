"""The command line as its users meet it: results on stdout, one line for a mistake, exit codes, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import lbc_cli
from lbc_cli.cli import app
from lbc_cli.recipe import shipped_recipes, shipped_sweeps

TINY = ["--set", "data.image_size=32", "--set", "data.batch_size=64", "--set", "schedule.warmup_epochs=1"]


def lbc(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def only_line(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One real run on the bundled digits, of a network small enough for a test."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    sets = ["--set", "data.batch_size=32", "--set", "optimizer.lr=0.1"]
    return folder, lbc("train", "test_resnet", "--data", "digits", "--epochs", "6", "--out", folder, *sets)


def test_a_run_on_the_digits_learns_and_is_verified(digits_run: tuple[Path, Result]) -> None:
    folder, result = digits_run
    assert result.exit_code == 0, result.output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["verified"] is True
    assert summary["density"] == 0.5
    assert set(summary["layers"].values()) == {0.5}
    assert summary["last"]["top1"] > 60  # ten classes
    assert "recipe digits: made for the data set digits" in result.stderr
    assert "verified" in result.stdout


def test_the_run_folder_tells_the_whole_story(digits_run: tuple[Path, Result]) -> None:
    folder, _ = digits_run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "curves.png", "environment.json", "metrics-steps.csv", "metrics.csv", "metrics.jsonl", "model.safetensors",
        "recipe.toml", "report.html", "state-previous.safetensors", "state.safetensors", "summary.json",
    }  # fmt: skip
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "--epochs" in (folder / "recipe.toml").read_text()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == list(range(6))
    assert len((folder / "metrics.csv").read_text().splitlines()) == 7


def test_what_was_trained_verifies_loads_and_is_what_it_was(digits_run: tuple[Path, Result]) -> None:
    import torch

    folder, _ = digits_run
    checked = lbc("verify", folder / "model.safetensors")
    assert checked.exit_code == 0, checked.output
    report = json.loads(lbc("verify", folder / "model.safetensors", "--json").stdout)
    assert report["ok"] is True
    assert len(report["layers"]) > 3
    model = lbc_cli.load(folder / "model.safetensors")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_damaged_checkpoint_exits_with_3(digits_run: tuple[Path, Result], tmp_path: Path) -> None:
    data = bytearray((digits_run[0] / "model.safetensors").read_bytes())
    data[-5] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    result = lbc("verify", damaged)
    assert result.exit_code == 3
    assert "SHA-256" in result.stdout


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate(("1", "1", "2")):
        out = tmp_path / str(number)
        result = lbc("train", "test_resnet", "--smoke", "--data", "digits", "--seed", seed, "--out", out)
        assert result.exit_code == 0, result.output
        files.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))
        for name in ("seconds", "images_per_second", "data_wait", "memory"):
            files[-1].pop(name)
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_resumed_runs_end_bit_identical(tmp_path: Path) -> None:
    """Killed after two of four epochs, as a preempted machine would, and resumed."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["train", "test_resnet", "--data", "digits", "--epochs", "4", *TINY, "--set", "train.ema=true"]
    assert lbc(*command, "--out", whole).exit_code == 0
    process = subprocess.Popen([sys.executable, "-m", "lbc_cli", *command, "--out", str(cut)], stderr=subprocess.PIPE)
    wait_for_epochs(cut / "metrics.jsonl", 2)
    process.kill()
    process.communicate()
    assert not (cut / "model.safetensors").exists()
    result = lbc("train", "--resume", cut)
    assert result.exit_code == 0, result.output
    from lbc_cli.checkpoint import read

    for name in ("model.safetensors", "model-ema.safetensors"):
        first, second = read(whole / name).tensors, read(cut / name).tensors
        assert all((first[key] == second[key]).all() for key in first)
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), "the manifest too"
    assert epoch_values(whole) == epoch_values(cut)
    assert "has ended" in only_line(lbc("train", "--resume", cut))


def wait_for_epochs(log: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().count('"kind": "epoch"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get that far")


def epoch_values(folder: Path) -> list[dict[str, Any]]:
    times = {"seconds", "images_per_second", "data_wait", "memory"}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def test_an_interrupted_run_saves_and_exits_with_130(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "test_resnet", "--data", "digits", "--epochs", "50", *TINY, "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "lbc_cli", *command], stderr=subprocess.PIPE, text=True)
    wait_for_epochs(out / "metrics.jsonl", 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1]
    assert (out / "state.safetensors").exists()
    assert (out / "curves.png").exists()


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = lbc("train", "resnet18", "--pattern", "1:4", "--data", "digits", "--dry-run")
    assert result.exit_code == 0, result.output
    for word in (
        "layer4.1.conv2.weight",
        "512x512x3x3",
        "classifier",
        "stem",
        "momentum",
        "MACs",
        "runs/resnet18-lbc-1_4",
    ):
        assert word in result.stdout
    assert not list(tmp_path.iterdir())
    plan = json.loads(lbc("train", "resnet18", "--data", "digits", "--dry-run", "--json").stdout)
    assert [e["survivors"]["2:4"] for e in plan["schedule"]] == [6, 5, 4, 4, 3] + 7 * [2] + 12 * [1]


def test_the_default_folder_is_numbered_and_an_existing_one_never_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert lbc("train", "test_resnet", "--data", "digits", "--smoke", "-q").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["test_resnet-lbc-2_4", "test_resnet-lbc-2_4-1"]
    before = (tmp_path / "runs/test_resnet-lbc-2_4/model.safetensors").read_bytes()
    result = lbc("train", "test_resnet", "--data", "digits", "--smoke", "--out", "runs/test_resnet-lbc-2_4")
    assert result.exit_code == 2
    assert "never overwritten" in only_line(result)
    assert (tmp_path / "runs/test_resnet-lbc-2_4/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["resnet81", "--data", "digits"], "no model 'resnet81'. Did you mean"),
        (["test_resnet", "--data", "digits", "--pattern", "two"], "not a pattern"),
        (["test_resnet", "--data", "digits", "--pattern", "4:4"], "less than M"),
        (["test_resnet", "--data", "digits", "--pattern", "1:64"], "32 at the most"),
        (["test_resnet", "--data", "digits", "--pattern", "16:32"], "601,080,390 candidates"),
        (["test_resnet", "--data", "digits", "--pattern", "2:31"], "no layer"),
        (["test_resnet", "--data", "digits", "--set", "sparsity.layers.nothing='2:4'"], "nothing"),
        (["test_resnet", "--data", "digits", "--set", "train.epoch=3"], "epoch"),
        (["test_resnet", "--data", "digits", "--set", "train.epochs=many"], "integer"),
        (["test_resnet", "--data", "digits", "--set", "epochs=3"], "train"),
        (["test_resnet", "--data", "digits", "--set", "train.epochs"], "KEY=VALUE"),
        (["test_resnet", "--data", "digits", "--epochs", "3", "--set", "train.epochs=4"], "disagree"),
        (["test_resnet", "--data", "digits", "--method", "lcb"], "Did you mean"),
        (["test_resnet", "--data", "digits", "--set", "method.t_f=99"], "past the last epoch"),
        (["test_resnet", "--data", "digits", "--recipe", "digit"], "Did you mean"),
        (["test_resnet", "--data", "digits", "--device", "cuda:99"], "CUDA devices"),
        (["test_resnet", "--data", "digits", "--device", "tpu"], "tpu"),
        (["test_resnet", "--data", "digits", "--init", "none.safetensors"], "no such weight file"),
        (["test_resnet", "--data", "digits", "--init", "x", "--pretrained"], "exclude each other"),
        (["test_resnet", "--data", "no/such/folder"], "no/such/folder"),
        (["test_resnet"], "--data"),
        (["--data", "somewhere"], "no model"),
        (["--resume", "nowhere"], "no run folder"),
        (["test_resnet", "--resume", "nowhere"], "drop model.name"),
        (["test_resnet", "--data", "digits", "-q", "-v"], "contradict"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line_and_writes_nothing(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lbc("train", *args)
    assert result.exit_code == 2, result.output
    assert words in only_line(result)
    assert not list(tmp_path.iterdir())


def test_all_problems_of_a_recipe_come_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('extends = "digits"\n[train]\nepoch = 3\nseed = "x"\n')
    result = lbc("train", "--recipe", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert "mine.toml:3" in lines[0]
    assert "mine.toml:4" in lines[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        result = lbc("train", "test_resnet", "--data", "digits", "--out", tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)
    assert result.exit_code == 2
    assert "no permission" in only_line(result)


def test_a_file_in_the_way_of_the_folder_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = lbc("train", "test_resnet", "--data", "digits", "--out", tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert "is not a folder" in only_line(result)


def test_a_torchvision_that_does_not_match_names_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = lbc("train", "test_resnet", "--data", "digits")
    assert result.exit_code == 2
    line = only_line(result)
    assert "pip install --upgrade torch torchvision" in line
    assert "torchvision" in line


def test_an_unexpected_error_says_so_and_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("lbc_cli.verifier.verify", broken)
    result = lbc("verify", "x")
    assert result.exit_code == 1
    assert "boom" in only_line(result)
    assert "Traceback" in lbc("verify", "x", "--debug").stderr


def test_verify_tells_a_missing_file_from_a_damaged_one(tmp_path: Path) -> None:
    assert lbc("verify", tmp_path / "none").exit_code == 2
    (tmp_path / "empty").write_bytes(b"")
    assert lbc("verify", tmp_path / "empty", "--pattern", "2:4").exit_code == 3


def test_recipes_can_be_listed_shown_and_described() -> None:
    listed = json.loads(lbc("recipe", "list", "--json").stdout)
    assert set(listed) == {*shipped_recipes(), *shipped_sweeps()}
    assert all(listed.values())
    shown = lbc("recipe", "show", "digits", "--set", "train.epochs=3").stdout
    assert "epochs = 3" in shown
    assert "--set" in shown
    schema = json.loads(lbc("recipe", "schema").stdout)
    assert "sparsity" in schema["properties"]


def test_bench_measures_a_step_of_each_kind() -> None:
    result = lbc(
        "bench", "test_resnet", "--train", "--batch", "2", "--image-size", "32", "--steps", "3", "--json", "-q"
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["dense"]["median"] > 0
    assert figures["hooks"] > 0
    assert figures["hooks"] < figures["method"]["median"]
    assert figures["dense"]["peak_bytes"] > 0
    assert figures["overhead"] == pytest.approx(figures["method"]["median"] / figures["dense"]["median"] - 1)
    assert lbc("bench", "test_resnet", "--steps", "3").exit_code == 2


def test_the_version_is_the_packages() -> None:
    assert lbc("--version").stdout == f"lbc {lbc_cli.__version__}\n"
