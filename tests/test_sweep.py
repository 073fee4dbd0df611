"""Sweeps: a file becomes runs, runs become folders in processes of their own, folders become a table."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lbc_cli import training
from lbc_cli.checkpoint import read
from lbc_cli.cli import app
from lbc_cli.errors import OutputError, RecipeError, UsageError
from lbc_cli.recipe import resolve
from lbc_cli.runs import RunFolder
from lbc_cli.sweeps import RunState, Sweep, SweepFolder, Task, carry_out, check_files, read_sweep, summarise

BASE = 'extends = "digits"\n[model]\nname = "test_resnet"\n[augment]\nhflip = 0.0\n'
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the sweep file of the current folder, an empty one."""
    monkeypatch.chdir(tmp_path)

    def write_file(table: str) -> Path:
        path = tmp_path / "grid.toml"
        path.write_text(f"{BASE}[sweep]\n{table}\n")
        return path

    return write_file


def lbc(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def names(sweep: Sweep) -> list[str]:
    return [run.name for run in sweep.runs]


# The file


def test_every_combination_is_a_run_and_the_seeds_turn_slowest(write: Write) -> None:
    sweep = read_sweep(write('methods = ["lbc"]\nseeds = [3, 1]\npatterns = ["2:4", "1:4/8"]\noptimizer.lr = [0.1, 1]'))
    assert names(sweep) == [
        f"lbc-seed{seed}-{pattern}-lr{lr}" for seed in (3, 1) for pattern in ("2_4", "1_4v8") for lr in ("0.1", "1")
    ]
    assert sweep.headings == ("method", "pattern", "optimizer.lr")
    last = sweep.runs[-1]
    recipe = last.resolved.recipe
    assert (recipe.train.seed, recipe.sparsity.pattern, recipe.optimizer.lr) == (1, "1:4/8", 1.0)
    assert (recipe.method["name"], recipe.model.name, last.seed) == ("lbc", "test_resnet", 1)
    assert dict(last.labels) == {"method": "lbc", "pattern": "1:4/8", "optimizer.lr": "1"}
    assert last.resolved.provenance["optimizer.lr"] == "grid.toml:10"
    assert last.resolved.provenance["model.name"] == "grid.toml:3"
    assert last.resolved.provenance["data.source"].startswith("recipes/digits.toml:")


def test_a_method_without_a_pattern_is_run_once(write: Write) -> None:
    sweep = read_sweep(write('methods = ["dense", "lbc"]\npatterns = ["2:4", "1:4"]\nvectors = [1, 4]\nseeds = [0, 1]'))
    assert [name for name in names(sweep) if "dense" in name] == ["dense-seed0", "dense-seed1"]
    assert len(sweep.runs) == 2 * (1 + 4)
    assert sweep.runs[0].labels == {"method": "dense", "pattern": "-", "vector": "-"}


def test_methods_have_options_and_variants_change_several_keys(write: Write) -> None:
    sweep = read_sweep(
        write(
            'methods = ["lbc", { name = "lbc", t_f = 2, rounding = "removals" }]\n'
            'variants = [{ sparsity.pattern = "1:4" }, { name = "4 of 16", "sparsity.pattern" = "4:16", '
            '"method.removal" = "weights", sparsity.layers."layer4.*" = "dense" }]'
        )
    )
    assert names(sweep) == [
        "lbc-sparsity.pattern_1_4", "lbc-4_of_16", "lbc_t_f2_roundingremovals-sparsity.pattern_1_4",
        "lbc_t_f2_roundingremovals-4_of_16",
    ]  # fmt: skip
    assert sweep.headings == ("method", "variant")
    assert [run.labels["method"] for run in sweep.runs[1:3]] == ["lbc", "lbc t_f=2 rounding=removals"]
    recipe = sweep.runs[3].resolved.recipe
    assert recipe.method["t_f"] == 2
    assert (recipe.method["removal"], recipe.sparsity.pattern) == ("weights", "4:16")
    assert recipe.sparsity.layers == {"layer4.*": "dense"}
    assert sweep.runs[2].resolved.recipe.method["removal"] == "candidates"


def test_each_seed_begins_with_the_run_of_that_seed(write: Write) -> None:
    path = write('model.init = ["runs/a-seed{seed}.safetensors", ""]\nseeds = [2, 7]')
    sweep = read_sweep(path, overrides=["distill.teacher=t{seed}.safetensors"])
    found = [(run.resolved.recipe.model.init, run.resolved.recipe.distill.teacher) for run in sweep.runs]
    assert found == [
        (init, f"t{seed}.safetensors") for seed in (2, 7) for init in (f"runs/a-seed{seed}.safetensors", "")
    ]
    assert sweep.runs[0].resolved.provenance["model.init"] == "grid.toml:7"
    assert sweep.runs[0].resolved.provenance["distill.teacher"] == "--set"
    # The file does not hinder a smoke run, which may come before it.
    assert read_sweep(path, smoke=True).runs[0].resolved.recipe.model.init == ""


def test_files_of_runs_that_come_first_must_be_there(write: Write, tmp_path: Path) -> None:
    made = tmp_path / "a-seed2.safetensors"
    path = write(f'model.init = ["{tmp_path}/a-seed{{seed}}.safetensors"]\nseeds = [2, 7]')
    for more in ((), ("--dry-run",)):
        result = lbc("sweep", path, "--out", tmp_path / "out", *more)
        assert result.exit_code == 2
        assert f"model.init = '{made}' is not there, and 1 more: the runs that make such" in " ".join(
            result.stderr.split()
        )
    assert not (tmp_path / "out").exists()
    check_files(read_sweep(path, smoke=True).runs)
    made.touch()
    with pytest.raises(UsageError, match=r"a-seed7\.safetensors' is not there: the runs"):
        check_files(read_sweep(path).runs)


def test_sweeps_and_recipes_are_not_taken_for_each_other() -> None:
    for command, words in (
        (("sweep", "digits"), "digits is a recipe: lbc train --recipe digits"),
        (("train", "--recipe", "sweeps/methods"), "sweeps/methods is a sweep: lbc sweep sweeps/methods"),
        (("sweep", "sweeps/method"), "a shipped name: 9 in sweeps/ (lbc recipe list). Did you mean 'sweeps/methods'?"),
    ):
        result = lbc(*command)
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
    listed = json.loads(lbc("recipe", "list", "--json").stdout)
    assert listed["sweeps/methods"] == "Which method keeps most accuracy, with the same settings for all"


def test_names_stay_apart_and_short(write: Write) -> None:
    sweep = read_sweep(write('optimizer.name = ["sgd", "adamw"]\nschedule.name = ["cosine", "poly"]'))
    assert names(sweep)[0] == "optimizer.namesgd-schedule.namecosine"
    odd = read_sweep(write('train.device = ["a b", "a_b"]'))
    assert names(odd) == ["devicea_b", "devicea_b-2"]
    long = read_sweep(write(f'data.root = ["{"x" * 300}", "{"x" * 299}y"]'))
    assert all(len(name) <= 120 for name in names(long))
    assert len(set(names(long))) == 2


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("seeds = 3", "grid.toml:7: sweep.seeds: 3: must be a list"),
        ("seeds = []", "must be a list"),
        ("seeds = [0, 0]", "0 stands there twice"),
        ("seeds = [0]\ntrain.seed = [1]", "grid.toml:8: train.seed is varied twice"),
        ('methods = ["lbc"]\nmethod.name = ["dense"]', "method.name is varied twice"),
        ("methods = [{ t_i = 2 }]", "must be a name, or a table with one"),
        ("variants = [3]", "must be a table of keys"),
        ('variants = [{ name = "x" }]', "sets nothing"),
        ("optimizer.lrr = [1]", "grid.toml:7: optimizer.lrr: unknown key. Did you mean 'lr'?"),
        ('methods = ["lcb"]', "no method"),
        ('methods = ["dense"]\nmethod.t_i = [1]', "method 'dense' has no such option"),
        ("", "has no [sweep] table"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(write: Write, table: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_sweep(write(table))
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]


def test_overrides_hold_for_every_run_but_not_for_what_varies(write: Write) -> None:
    path = write("seeds = [0, 1]")
    assert all(run.resolved.recipe.train.epochs == 7 for run in read_sweep(path, overrides=["train.epochs=7"]).runs)
    with pytest.raises(UsageError, match=r"--set train.seed=3: the sweep varies train.seed"):
        read_sweep(path, overrides=["train.seed=3"])
    with pytest.raises(RecipeError, match=r"train.epoch: unknown key"):
        read_sweep(path, overrides=["train.epoch=7"])


def test_a_sweep_is_no_recipe_of_a_single_run(write: Write) -> None:
    result = lbc("train", "--recipe", write("seeds = [0, 1]"))
    assert result.exit_code == 2
    assert "sweep: a table of many runs: carry them out with lbc sweep FILE" in result.stderr


# The table


def test_means_and_deviations_are_those_of_the_textbook(write: Write) -> None:
    sweep = read_sweep(write('patterns = ["2:4", "1:4"]\nseeds = [0, 1, 2]'))
    values = {("2:4", 0): 90.0, ("2:4", 1): 93.0, ("2:4", 2): 96.0, ("1:4", 0): 50.0}
    summaries = {
        run.name: {
            "last": {"top1": top1, "val_loss": 1 / top1},
            "density": 0.5,
            "seconds": 60.0,
            "counted": {"training_share": 0.8},
        }
        for run in sweep.runs
        if (top1 := values.get((run.labels["pattern"], run.seed))) is not None
    }
    summary = summarise(sweep, summaries, {"1_4-seed1": "no luck"})
    first, second = summary.cells
    assert (first.n, first.missing, second.n, second.missing) == (3, 0, 1, 2)
    assert first.metric("top1").mean == pytest.approx((90 + 93 + 96) / 3)
    assert first.metric("top1").deviation == pytest.approx(math.sqrt(((90 - 93) ** 2 + 0 + (96 - 93) ** 2) / 2))
    assert (second.metric("top1").mean, second.metric("top1").deviation) == (50.0, None)
    files = dict(summary.files())
    rows = list(csv.DictReader(files["summary.csv"].splitlines()))
    assert [row["pattern"] for row in rows] == ["2:4", "1:4"]
    assert (float(rows[0]["top1_std"]), rows[1]["top1_std"], rows[1]["missing"]) == (3.0, "", "2")
    assert (
        "| 2:4 | 93.00 ± 3.00 | 0.0108 ± 0.0003 | 90.00, 93.00, 96.00 | 3 | 0.5000 | 80.0 % | 1 min 00 s |"
        in files["summary.md"].splitlines()
    )
    assert json.loads(files["summary.json"])["runs"]["1_4-seed1"]["error"] == "no luck"


# The runs


def run_sweep(path: Path, *more: str) -> Result:
    return lbc("sweep", path, "--smoke", "--jobs", "2", "--out", "all", *more)


def without_times(folder: Path) -> dict[str, Any]:
    """The summary without what was measured."""
    summary = json.loads((folder / "summary.json").read_text())
    for entry in [*summary["cells"], *summary["runs"].values()]:
        entry.pop("seconds", None)
    return dict(summary)


def test_a_sweep_goes_on_where_it_was_and_ends_the_same(write: Write, tmp_path: Path) -> None:
    path = write('methods = ["dense", "lbc"]\nseeds = [0, 1]')
    listed = run_sweep(path, "--dry-run", "--json")
    assert [run["state"] for run in json.loads(listed.stdout).values()] == ["to do"] * 4
    assert not (tmp_path / "all").exists()
    first = run_sweep(path)
    assert first.exit_code == 0, first.output
    assert "4/4" in first.stderr
    folder = tmp_path / "all"
    assert {p.name for p in folder.iterdir()} == {
        "dense-seed0", "dense-seed1", "lbc-seed0", "lbc-seed1",
        "summary.csv", "summary.json", "summary.md", "sweep.toml",
    }  # fmt: skip
    assert (folder / "lbc-seed1" / "curves.png").is_file()
    told = without_times(folder)
    alone = json.loads((folder / "lbc-seed1" / "summary.json").read_text())
    assert told["runs"]["lbc-seed1"]["top1"] == alone["last"]["top1"]
    assert told["cells"][1]["metrics"]["top1"]["values"][1] == alone["last"]["top1"]

    # Nothing is done twice; what is cut short is done again, and ends as it did.
    before = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in ("lbc-seed0", "lbc-seed1")}
    weights = (folder / "lbc-seed1" / "model.safetensors").read_bytes()
    for name in ("summary.json", "model.safetensors", "state.safetensors"):
        (folder / "lbc-seed1" / name).unlink()
    (folder / "dense-seed0" / "summary.json").unlink()
    states = json.loads(run_sweep(path, "--dry-run", "--json").stdout)
    assert {name: run["state"] for name, run in states.items()} == {
        "dense-seed0": "to go on", "lbc-seed0": "done", "dense-seed1": "done", "lbc-seed1": "to begin again"
    }  # fmt: skip
    again = run_sweep(path)
    assert again.exit_code == 0, again.output
    assert "2 of 4 runs are done already" in again.stderr
    assert (folder / "lbc-seed0" / "model.safetensors").stat().st_mtime_ns == before["lbc-seed0"]
    assert (folder / "lbc-seed1" / "model.safetensors").read_bytes() == weights
    assert without_times(folder) == told

    # A file that has grown adds runs; another recipe under the same name is refused; a damaged file is found.
    path.write_text(path.read_text().replace("[0, 1]", "[0]").replace("lbc", "lbc"))
    shrunk = run_sweep(path, "--dry-run")
    assert "left alone and out of the table: dense-seed1, lbc-seed1" in shrunk.stderr
    assert "the sweep file has changed" in shrunk.stderr
    path.write_text(path.read_text().replace("hflip = 0.0", "hflip = 0.5"))
    refused = run_sweep(path)
    assert refused.exit_code == 2
    assert "dense-seed0 was run with augment.hflip = 0.0, the sweep has 0.5 (and 1 runs more)" in refused.stderr
    path.write_text(path.read_text().replace("hflip = 0.5", "hflip = 0.0"))
    damaged = folder / "lbc-seed0" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    found = run_sweep(path)
    assert found.exit_code == 1
    assert "1 of 2 runs failed: lbc-seed0: its checkpoint does not verify: delete all/lbc-seed0" in found.stderr


def test_a_run_of_a_sweep_is_the_run_of_its_recipe(write: Write, tmp_path: Path) -> None:
    assert lbc("sweep", write("seeds = [5]"), "--smoke", "--out", "all").exit_code == 0
    recipe = tmp_path / "all" / "seed5" / "recipe.toml"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training.run(training.prepare(resolve(recipe)), RunFolder.create(tmp_path / "alone"))
    finally:
        torch.set_num_threads(threads)
    mine, other = (read(folder / "model.safetensors").tensors for folder in (recipe.parent, tmp_path / "alone"))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_patterns_that_a_budget_chose_are_no_change(write: Write, tmp_path: Path) -> None:
    path = write("sparsity.budget.params = [0.3]")
    assert run_sweep(path).exit_code == 0
    states = json.loads(run_sweep(path, "--dry-run", "--json").stdout)
    assert states["params0.3"]["state"] == "done"
    assert "allocated = true" in (tmp_path / "all" / "params0.3" / "recipe.toml").read_text()


def test_a_failing_run_does_not_stop_the_rest(write: Write, tmp_path: Path) -> None:
    result = run_sweep(write('patterns = ["2:31", "2:4"]\nseeds = [0]'))
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "1 of 2 runs failed: 2_31-seed0: no layer takes 2:31" in lines[0]
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert summary["runs"]["2_4-seed0"]["done"] is True
    assert "no layer takes" in summary["runs"]["2_31-seed0"]["error"]
    assert not (tmp_path / "all" / "2_31-seed0").exists()


def test_a_process_that_is_killed_is_a_failed_run(tmp_path: Path) -> None:
    def kill(name: str) -> None:
        for process in multiprocessing.active_children():
            if process.name == name:
                process.kill()

    task = Task("short", resolve("digits"), tmp_path / "short", resume=False)
    (end,) = carry_out([task], 1, started=kill)
    assert (end.name, end.outcome) == ("short", "failed")
    assert "its process was ended by SIGKILL (out of memory? try fewer --jobs)" in end.error


def gone(group: int) -> bool:
    """Whether no process of the group is left; the one that the others started from ends a moment later."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_all_runs_in_order_and_the_same_command_goes_on(write: Write, tmp_path: Path) -> None:
    path = write("seeds = [0, 1, 2]")
    path.write_text(
        path.read_text().replace("[augment]", "[train]\nepochs = 2000\n[data]\nsource = 'generated'\n[augment]")
    )
    command = [sys.executable, "-m", "lbc_cli", "sweep", str(path), "--jobs", "2", "--out", "all"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    logs = [tmp_path / "all" / f"seed{seed}" / "state.safetensors" for seed in (0, 1)]
    until = time.monotonic() + 300
    while not all(log.exists() for log in logs):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, said = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "interrupted after 0 of 3 runs; the same command goes on from there" in said
    assert gone(process.pid), "a process of the sweep outlived it"
    sweep = read_sweep(path)
    states = SweepFolder(tmp_path / "all").states(sweep)
    assert list(states.values()) == [RunState.RESUME, RunState.RESUME, RunState.NEW]


def test_one_sweep_at_a_time_works_in_a_folder_and_only_in_one_of_its_own(write: Write, tmp_path: Path) -> None:
    sweep = read_sweep(write("seeds = [0]"))
    folder = SweepFolder.create(tmp_path / "all", sweep)
    with folder.locked():
        result = run_sweep(tmp_path / "grid.toml")
    assert result.exit_code == 2
    assert "another lbc sweep is at work in all" in result.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(OutputError, match="never overwritten"):
        SweepFolder.create(tmp_path / "other", sweep)
    stranger = folder.path / "seed0" / "notes.txt"
    stranger.parent.mkdir()
    stranger.write_text("mine")
    result = run_sweep(tmp_path / "grid.toml")
    assert result.exit_code == 2
    assert "notes.txt is not of a run" in result.stderr
    assert stranger.read_text() == "mine"
