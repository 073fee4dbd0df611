import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lbc_cli.errors import CheckpointError, OutputError
from lbc_cli.patterns import Pattern
from lbc_cli.runs import (
    MetricsLog,
    RunFolder,
    check_free,
    default_name,
    plain,
    read_epochs,
    to_json,
    unique,
)


def epoch_values(epoch: int) -> dict[str, Any]:
    return {"train_loss": 1 / (epoch + 3), "survivors": {"2:4": 6 - epoch}, "top1": None if epoch % 2 else 50.0}


def write_epochs(log: MetricsLog, first: int, last: int) -> None:
    for epoch in range(first, last):
        log.append("step", epoch=epoch, step=1, loss=0.1 * epoch)
        log.append("epoch", epoch=epoch, **epoch_values(epoch))


def files_of(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.path.iterdir())}


@pytest.mark.parametrize(
    ("model", "method", "pattern", "expected"),
    [
        ("resnet18", "lbc", "2:4", "resnet18-lbc-2_4"),
        ("resnet18", "lbc", Pattern(2, 4, 16), "resnet18-lbc-2_4v16"),
        ("resnet18", "dense", None, "resnet18-dense"),
        ("hf_hub:timm/vit.augreg_in1k", "sr-ste", Pattern(1, 16), "hf_hub_timm_vit_augreg_in1k-sr-ste-1_16"),
        ("../../etc", "lbc", "2:4", "etc-lbc-2_4"),
        ("..", "lbc", "2:4", "unnamed-lbc-2_4"),
    ],
)
def test_default_name(model: str, method: str, pattern: Pattern | str | None, expected: str) -> None:
    assert default_name(model, method, pattern) == Path("runs") / expected


def test_unique_counts_up(tmp_path: Path) -> None:
    wanted = tmp_path / "net-lbc-2_4"
    assert unique(wanted) == wanted
    wanted.mkdir()
    (tmp_path / "net-lbc-2_4-1").write_text("a file counts too")
    assert unique(wanted) == tmp_path / "net-lbc-2_4-2"


def test_create_makes_parents_and_takes_an_empty_folder(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a" / "b" / "run")
    assert run.path.is_dir()
    assert RunFolder.create(run.path) == run


def test_create_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match=r"never overwritten.*--out$"):
        RunFolder.create(tmp_path / "run")
    assert files_of(RunFolder(tmp_path / "run")) == {"model.safetensors": b"precious"}
    (tmp_path / "run" / "recipe.toml").write_text("")
    with pytest.raises(OutputError, match=r"--out, or continue its run with --resume .*run$"):
        RunFolder.create(tmp_path / "run")


def test_create_refuses_a_file_and_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"the file .* exists"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(OutputError, match=r"file is not a folder.*--out"):
        RunFolder.create(tmp_path / "file" / "run")
    with pytest.raises(OutputError, match="--out"):
        RunFolder.create_unique(tmp_path / "file" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unwritable_place_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"no permission in .*--out"):
        check_free(tmp_path / "deep" / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(OutputError, match="Permission denied"):
        RunFolder.create(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_create_unique_never_shares_a_folder(tmp_path: Path) -> None:
    runs = [RunFolder.create_unique(tmp_path / "runs" / "net").path.name for _ in range(3)]
    assert runs == ["net", "net-1", "net-2"]


def test_open_wants_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no run folder"):
        RunFolder.open(tmp_path / "missing")
    with pytest.raises(OutputError, match=r"no recipe\.toml"):
        RunFolder.open(tmp_path)
    RunFolder(tmp_path).write_recipe("description = ''\n")
    assert RunFolder.open(tmp_path).path == tmp_path


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_summary({"b": math.nan, "a": (1, 2)})
    run.write_summary({"b": math.inf, "a": Path("x")})
    run.write_environment({"torch": "2"})
    assert json.loads(run.summary.read_text()) == {"a": "x", "b": None}
    assert set(files_of(run)) == {"summary.json", "environment.json"}


def test_to_json_is_stable_and_strict() -> None:
    @dataclass
    class Point:
        y: float
        x: tuple[int, ...]

    assert to_json(Point(math.nan, (1,))) == '{"x": [1], "y": null}'
    assert to_json({"b": {2, 1}, "a": "é"}) == to_json({"a": "é", "b": {1, 2}}) == '{"a": "é", "b": [1, 2]}'
    assert plain({1: True}) == {"1": True}
    with pytest.raises(TypeError, match="object has no JSON form"):
        to_json([object()])


def test_metrics_reach_both_files_at_once(tmp_path: Path) -> None:
    log = RunFolder(tmp_path).metrics()
    write_epochs(log, 0, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["epoch"]) for line in lines] == [("step", 0), ("epoch", 0), ("step", 1), ("epoch", 1)]
    assert lines == log.records
    assert lines[1]["train_loss"] == 1 / 3
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"epoch": "1", "train_loss": repr(1 / 4), "survivors.2:4": "5", "top1": ""}
    assert [row["top1"] for row in rows] == ["50.0", ""]


def test_metrics_write_what_is_not_finite_as_null(tmp_path: Path) -> None:
    log = RunFolder(tmp_path).metrics()
    log.append("epoch", epoch=0, loss=math.nan, bound=-math.inf)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "epoch", "epoch": 0, "loss": null, "bound": null}\n'


def test_a_new_column_rewrites_the_table(tmp_path: Path) -> None:
    log = RunFolder(tmp_path).metrics()
    log.append("epoch", epoch=0, loss=2.0)
    log.append("epoch", epoch=1, loss=1.0, top1=10.0)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss,top1\n0,2.0,\n1,1.0,10.0\n"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", {"epoch": tmp_path / "metrics.csv"})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: No space left.*--resume"):
        log.append("step", epoch=0, loss=1.0)


def test_a_new_log_never_overwrites_one(tmp_path: Path) -> None:
    write_epochs(RunFolder(tmp_path).metrics(), 0, 1)
    with pytest.raises(OutputError, match="never overwritten"):
        RunFolder(tmp_path).metrics()


@pytest.mark.parametrize("tail", ["", '{"kind": "step", "epo'])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path, tail: str) -> None:
    whole, stopped = RunFolder.create(tmp_path / "whole"), RunFolder.create(tmp_path / "stopped")
    write_epochs(whole.metrics(), 0, 5)
    write_epochs(stopped.metrics(), 0, 4)
    with stopped.metrics_jsonl.open("a") as file:
        file.write(tail)
    resumed = stopped.metrics((3, 0))
    assert [record["epoch"] for record in resumed.records] == [0, 0, 1, 1, 2, 2]
    write_epochs(resumed, 3, 5)
    assert files_of(stopped) == files_of(whole)


def test_read_epochs(tmp_path: Path) -> None:
    assert read_epochs(tmp_path / "metrics.jsonl") == []
    log = RunFolder(tmp_path).metrics()
    write_epochs(log, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ep')
    assert read_epochs(tmp_path / "metrics.jsonl") == log.epochs
    assert [record["epoch"] for record in log.epochs] == [0, 1]


def test_a_log_goes_on_within_an_epoch_after_the_updates_that_are_made(tmp_path: Path) -> None:
    log = RunFolder(tmp_path).metrics()
    for epoch in range(2):
        for step in (10, 20, 30):
            log.append("step", epoch=epoch, step=step, loss=1.0)
        log.append("epoch", epoch=epoch, loss=1.0)
    kept = RunFolder(tmp_path).metrics((1, 20)).records
    assert [(r["kind"], r["epoch"], r.get("step")) for r in kept] == [
        *(("step", 0, step) for step in (10, 20, 30)),
        ("epoch", 0, None),
        ("step", 1, 10),
        ("step", 1, 20),
    ]


def test_a_damaged_log_is_not_continued(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics_jsonl.write_text('{"kind": "epoch", "epoch": 0}\nnot json\n{"kind": "epoch", "epoch": 2}\n')
    before = files_of(run)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        run.metrics((2, 0))
    assert files_of(run) == before


def test_imports_neither_torch_nor_matplotlib() -> None:
    heavy = "{'torch', 'matplotlib', 'timm', 'numpy'}"
    code = f"import sys, lbc_cli.runs, lbc_cli.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("line", [b"\xff\xfe", b"garbage", b"[]", b'{"kind": "step"}'])
def test_a_damaged_line_of_the_log_is_named(line: bytes, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"kind": "epoch", "epoch": 0}\n' + line + b"\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: not a metrics record"):
        read_epochs(log)
