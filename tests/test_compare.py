"""Runs side by side."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lbc_cli.cli import app
from lbc_cli.comparing import compare
from lbc_cli.errors import UsageError
from lbc_cli.locks import locked
from lbc_cli.recipe import resolve
from lbc_cli.runs import RunFolder


def run_in(path: Path, top1: list[float], *, done: bool = True, how: str = "", **flags: Any) -> RunFolder:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = RunFolder.create(path)
    folder.write_recipe(resolve("digits", flags={"model.name": "resnet18", **flags}).text)
    log = folder.metrics()
    for epoch, value in enumerate(top1):
        phase = "training" if epoch == 0 else "final"
        values = {"top1": value, "val_loss": 1 / value, "seconds": 2.0, "density": 0.5}
        log.append("epoch", epoch=epoch, phase=phase, images_per_second=100.0 * (epoch + 1), **values)
    if done:
        folder.write_summary({"seed": 0})
    if how:
        folder.write_ended({"how": how, "message": "m"})
    return folder


def lbc(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, args)])


def test_runs_are_compared_by_what_they_came_to_and_where_they_differ(tmp_path: Path) -> None:
    run_in(tmp_path / "a", [99.0, 50.0, 70.0, 60.0])
    run_in(tmp_path / "b", [40.0], done=False, how="diverged", **{"optimizer.lr": 0.2, "sparsity.vector": 16})
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert [run.name for run in found.runs] == ["a", "b"]
    assert [run.state for run in found.runs] == ["done", "diverged"]
    assert found.differing == ("optimizer.lr",)  # a vector length is a part of the pattern's column
    first, second = found.runs
    assert (first.last("top1"), first.best("top1"), first.seconds) == (60.0, 70.0, 8.0)  # 99 had masks that moved
    assert (first.best("val_loss"), first.images_per_second) == (1 / 70, 250.0)
    assert (second.last("top1"), second.best("top1")) == (40.0, None)
    assert (first.pattern, second.pattern) == ("2:4", "2:4/16")


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({}, "2:4"),
        ({"sparsity.pattern": "1:4/8"}, "1:4/8"),
        ({"method.name": "dense"}, None),
        ({"method.name": "gmp", "method.sparsity": 0.9}, "sparsity 0.9"),
        ({"method.name": "str"}, None),
        ({"sparsity.budget.flops": 0.25}, "flops 0.25"),
    ],
)
def test_the_pattern_of_a_run_is_what_was_asked_for(flags: dict[str, Any], wanted: str | None, tmp_path: Path) -> None:
    run_in(tmp_path / "a", [], **flags)
    assert compare([tmp_path / "a"]).runs[0].pattern == wanted


def test_options_that_another_method_lacks_are_no_differences(tmp_path: Path) -> None:
    run_in(tmp_path / "a", [1.0])
    run_in(tmp_path / "b", [1.0], **{"method.name": "dense"})
    assert compare([tmp_path]).differing == ()
    run_in(tmp_path / "c", [1.0], **{"method.t_f": 3})
    assert compare([tmp_path]).differing == ("method.t_f",)


def test_a_folder_of_runs_stands_for_all_of_them_and_names_tell_them_apart(tmp_path: Path) -> None:
    for place in ("one/x", "two/x", "two/y"):
        run_in(tmp_path / place, [10.0])
    found = compare([tmp_path / "one", tmp_path / "two", tmp_path / "two/y"])
    assert [run.name for run in found.runs] == ["one/x", "two/x", "two/y"]


def test_the_state_of_a_run_is_that_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    folder = run_in(tmp_path / "a", [10.0], done=False)

    def state() -> str:
        return compare([folder.path]).runs[0].state

    assert state() == "interrupted", "killed: it could not say so"
    with locked(folder.path, "another run"):
        assert state() == "running"
    monkeypatch.setattr("lbc_cli.locks._flock", None)
    assert state() == "not ended", "nobody can tell"
    folder.write_ended({"how": "failed", "message": "m"})
    assert state() == "failed"
    folder.write_summary({"seed": 0})
    assert state() == "done"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", b"{", "summary.json cannot be read"),
        ("summary.json", b"[]", "is not an object"),
        ("ended.json", b"\xff", "ended.json cannot be read"),
        ("recipe.toml", b"what = 1", "is not the recipe of a run: it has no model.name"),
        ("recipe.toml", b"[model]\nname = 3\n", "it has no model.name"),
        ("recipe.toml", b"[model", "recipe.toml cannot be read"),
        ("recipe.toml", b"\xff", "recipe.toml cannot be read"),
        ("metrics.jsonl", b"none\n", "metrics.jsonl:1: not a metrics record"),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_line_and_exit_2(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    folder = run_in(tmp_path / "a", [10.0], done=False)
    (folder.path / name).write_bytes(content)
    result = lbc(folder.path)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert words in line


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        compare([tmp_path / "missing"])
    with pytest.raises(UsageError, match="holds no run"):
        compare([tmp_path])
    assert lbc(tmp_path).exit_code == 2


def test_the_command_prints_tables_and_json(tmp_path: Path) -> None:
    run_in(tmp_path / "a", [10.0, 30.0])
    run_in(tmp_path / "b", [20.0], **{"train.epochs": 9, "optimizer.lr": 0.2, "train.seed": 4})
    printed = lbc(tmp_path / "a", tmp_path / "b").output
    for word in ("20.00 %", "1/9", "2/24", "Settings that differ", "optimizer.lr", "all with model resnet18"):
        assert word in printed
    heads = next(line for line in printed.splitlines() if line.startswith("run")).split()
    assert heads == ["run", "epochs", "seed", "density", "top-1", "best", "val", "loss", "images/s", "time", "state"]
    assert "train.epochs" not in printed, "it has a column"
    alone = lbc(tmp_path / "a").output
    assert "resnet18" in next(line for line in alone.splitlines() if line.startswith("a "))
    told = json.loads(lbc(tmp_path, "--json").stdout)
    assert told["b"]["settings"] == {"optimizer.lr": 0.2}
    assert (told["b"]["planned_epochs"], told["a"]["best_top1"], told["a"]["last_top1"]) == (9, 30.0, 30.0)


def test_the_metric_has_columns_and_a_direction(tmp_path: Path) -> None:
    run_in(tmp_path / "a", [10.0, 40.0, 20.0])
    printed = lbc(tmp_path / "a", "--metric", "val_loss").output
    row = next(line for line in printed.splitlines() if line.startswith("a ")).split()
    assert {"0.0500", "0.0250"} <= set(row)
    result = lbc(tmp_path / "a", "--metric", "top2")
    assert result.exit_code == 2
    assert "no run has it; there are density, images_per_second" in result.stderr
    assert "Did you mean 'top1'?" in result.stderr
    run_in(tmp_path / "new", [], done=False)
    assert lbc(tmp_path / "new").exit_code == 0
    assert "no run has an epoch behind it" in lbc(tmp_path / "new", "--plot", tmp_path / "x.png").stderr


def test_the_table_is_written_as_csv_and_markdown(tmp_path: Path) -> None:
    run_in(tmp_path / "a", [10.0, 30.0])
    run_in(tmp_path / "b|c", [20.0], **{"optimizer.lr": 0.2})
    for suffix in ("csv", "md"):
        assert lbc(tmp_path, "--out", tmp_path / f"table.{suffix}").exit_code == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["last_top1"], row["optimizer.lr"]) for row in rows] == [
        ("a", "30.0", "0.05"), ("b|c", "20.0", "0.2")
    ]  # fmt: skip
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| run | model | method | pattern | epochs | seed | density | top-1 | best |")
    assert lines[3].startswith("| b\\|c | resnet18 | lbc | 2:4 | 1/24 | 0 |")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "must end in .csv, .md" in lbc(tmp_path, "--out", tmp_path / "table.xls").stderr


def test_the_plot_is_the_same_again_in_every_format(tmp_path: Path) -> None:
    for number in range(9):
        run_in(tmp_path / f"run{number}", [10.0 * number + 1, 20.0])
    for suffix, head in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        path = tmp_path / f"x.{suffix}"
        assert lbc(tmp_path, "--plot", path).exit_code == 0
        first = path.read_bytes()
        assert lbc(tmp_path, "--plot", path).exit_code == 0
        assert path.read_bytes() == first
        assert first.startswith(head)
    assert "must end in .png, .svg, .pdf" in lbc(tmp_path, "--plot", tmp_path / "x.gif").stderr


def test_runs_are_compared_without_torch(tmp_path: Path) -> None:
    run_in(tmp_path / "a", [10.0])
    code = (
        "import sys\nfrom pathlib import Path\nfrom lbc_cli.comparing import compare\n"
        "from lbc_cli.report.compared import comparison_record\n"
        "comparison_record(compare([Path(sys.argv[1])]))\n"
        "assert not {'torch', 'matplotlib', 'timm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
