"""TensorBoard and W&B hear what the run's reporter hears, begin before it, and never end it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lbc_cli import training
from lbc_cli.cli import app
from lbc_cli.engine import NullReporter
from lbc_cli.errors import Interrupted, RecipeError, UsageError
from lbc_cli.recipe import resolve, schema
from lbc_cli.report.live import run_observed
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from lbc_cli.trackers import check_trackers
from tests.test_resume import stop_at


class Listening(NullReporter):
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def message(self, text: str, level: str = "info") -> None:
        self.said.append((level, text))

    @property
    def warnings(self) -> list[str]:
        return [text for level, text in self.said if level == "warning"]


def job(*tools: str, **flags: Any) -> training.Job:
    flags = {"model.name": "test_resnet", "data.source": "digits", "train.epochs": 3, "train.seed": 1, **flags}
    settings = ["data.batch_size=360", "schedule.warmup_epochs=1", "train.log_every=1"]
    return training.prepare(resolve("digits", overrides=[*settings, f"track.tools={json.dumps(tools)}"], flags=flags))


def run(trained: training.Job, folder: RunFolder, stop_after: int = 10_000) -> Listening:
    heard = Listening()
    run_observed(trained, folder, heard, stop=stop_at(stop_after))
    return heard


# What is asked for


def test_a_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package wandb: pip install 'lbc-cli\[wandb\]'"):
        check_trackers(schema.Track(tools=["wandb"]))
    check_trackers(schema.Track())


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_missing_package_ends_a_command_before_anything_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = tmp_path / "mine.toml"
    table = "[sweep]\nseeds = [0]\n" if command == "sweep" else ""
    recipe.write_text(f'extends = "digits"\n[model]\nname = "test_resnet"\n[track]\ntools = ["tensorboard"]\n{table}')
    given = [str(recipe)] if command == "sweep" else ["--recipe", str(recipe)]
    result = CliRunner().invoke(app, [command, *given])
    assert result.exit_code == 2, result.output
    assert "pip install 'lbc-cli[tensorboard]'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_what_is_for_wandb_alone_is_not_ignored_without_it() -> None:
    with pytest.raises(RecipeError, match=r'track.project: .*add "wandb" to them') as raised:
        resolve("digits", overrides=["track.project=p", "track.mode=offline", 'track.tools=["tensorboard"]'])
    assert len(raised.value.problems) == 2
    resolve("digits", overrides=["track.project=p", 'track.tools=["wandb"]'])


# TensorBoard


def read_back(folder: RunFolder) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder.path / "tensorboard"))
    found.Reload()
    return found


def text_of(found: Any, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in found.Tensors(f"{tag}/text_summary")]


def test_tensorboard_has_every_point_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(job("tensorboard"), folder, stop_after=6)
    heard = run(resume(folder), folder)
    assert heard.said == [("info", f"tensorboard --logdir {folder.path / 'tensorboard'}")]
    found = read_back(folder)
    assert [point.step for point in found.Scalars("step/loss")] == list(range(1, 13))
    assert [point.step for point in found.Scalars("epoch/top1")] == [4, 8, 12]
    log = [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]
    wanted = [record["top1"] for record in log if record["kind"] == "epoch"]
    assert [point.value for point in found.Scalars("epoch/top1")] == pytest.approx(wanted)
    tags = set(found.Tags()["scalars"])
    steps = {f"step/{key}" for key in ("lr", "density", "survivors.2_4", "images_per_second", "data_wait", "memory")}
    assert steps | {"epoch/density", "epoch/val_loss", "epoch/survivors.2_4", "epoch/number"} <= tags
    assert not {"step/epoch", "step/update"} & tags
    (recipe,) = text_of(found, "recipe")
    assert 'name = "test_resnet"' in recipe
    (layers,) = text_of(found, "layers")
    densities = json.loads(folder.summary.read_text())["layers"]
    assert all(f"| {name} | 0.5 |" in layers for name in densities)


def test_what_a_killed_run_logged_beyond_its_state_is_not_shown_twice(tmp_path: Path) -> None:
    """A state after update 4, points up to 6: the resumed run logs 5 and 6 once more."""
    pytest.importorskip("tensorboard")
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(job("tensorboard", **{"train.save_every": 1}), folder, stop_after=6)
    run(resume(folder, previous=True), folder)
    assert [point.step for point in read_back(folder).Scalars("step/loss")] == list(range(1, 13))


# Weights & Biases


class Fake(types.ModuleType):
    """As much of wandb as is used."""

    def __init__(self, *, broken_at: int = 10_000, unknown: bool = False) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.broken_at, self.unknown = broken_at, unknown
        self.url = "https://example.org/run"

    class Settings:
        model_fields: dict[str, Any] = {"finish_timeout": None}  # noqa: RUF012

        def __init__(self, **settings: Any) -> None:
            self.settings = settings

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            self.columns, self.data = columns, data

    def init(self, **options: Any) -> Fake:
        if self.unknown:
            raise RuntimeError("No API key configured.\nand more")
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if step >= self.broken_at:
            raise OSError("no route to host\nand more")
        self.calls.append(("log", (step, values)))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.calls if name == kind]


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **how: Any) -> Fake:
    fake = Fake(**how)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_points_by_update_and_the_same_id_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fake = RunFolder.create(tmp_path / "run"), fake_wandb(monkeypatch)
    with pytest.raises(Interrupted):
        run(job("wandb", **{"track.project": "p"}), folder, stop_after=6)
    assert run(resume(folder), folder).said == [("info", "W&B: https://example.org/run")]
    first, second = fake.of("init")
    assert first["id"] == second["id"] == (folder.path / "wandb" / "run-id").read_text().strip()
    assert (first["resume"], second["resume"]) == ("never", "allow")
    assert (first["project"], first["mode"], first["name"]) == ("p", "online", "run")
    assert first["config"]["model"]["name"] == "test_resnet"
    assert first["settings"].settings == {"silent": True, "console": "off", "finish_timeout": 60.0}
    assert [step for step, values in fake.of("log") if "step/loss" in values] == list(range(1, 13))
    assert fake.of("finish") == [1, 0]
    (last,) = [values["layers"] for step, values in fake.of("log") if "layers" in values and step == 12]
    assert last.columns == ["layer", "density"]
    assert {density for _, density in last.data} == {0.5}


def test_two_runs_in_one_place_are_two_runs_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers, whose run folders all have one path."""
    import shutil

    fake = fake_wandb(monkeypatch)
    for _ in range(2):
        folder = RunFolder.create(tmp_path / "run")
        run(job("wandb", **{"train.epochs": 2, "track.name": "mine"}), folder)
        shutil.rmtree(folder.path)
    first, second = fake.of("init")
    assert first["id"] != second["id"]
    assert first["name"] == "mine"


def test_the_checkpoint_is_on_the_disk_before_a_tool_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fake = RunFolder.create(tmp_path / "run"), fake_wandb(monkeypatch)
    there: list[bool] = []
    monkeypatch.setattr(fake, "finish", lambda exit_code: there.append(folder.summary.is_file()))
    run(job("wandb"), folder)
    assert there == [True]


def test_wandb_offline_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = RunFolder.create(tmp_path / "run")
    trained = job("wandb", **{"track.mode": "offline", "train.epochs": 2})
    heard = run(trained, folder)
    number = (folder.path / "wandb" / "run-id").read_text().strip()
    assert heard.warnings == []
    assert f"offline-run-*-{number}" in heard.said[0][1]
    (written,) = folder.path.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb")
    assert b"step/loss" in written.read_bytes()


# Tools that fail


def test_a_tool_that_fails_is_left_out_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fake = RunFolder.create(tmp_path / "run"), fake_wandb(monkeypatch, broken_at=3)
    heard = run(job("wandb"), folder)
    wanted = "wandb failed and is left out from here on, the run goes on: no route to host"
    assert heard.warnings == [wanted]
    assert wanted in folder.report.read_text()
    assert folder.summary.is_file()
    assert [step for step, _ in fake.of("log")] == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_tensorboard_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, count = RecordWriter.write, iter(range(10_000))

    def full(self: Any, data: bytes) -> None:
        if next(count) > 20:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    folder = RunFolder.create(tmp_path / "run")
    heard = run(job("tensorboard"), folder)
    assert len(heard.warnings) == 1
    assert "No space left on device" in heard.warnings[0]
    assert folder.summary.is_file()


def test_a_tool_that_cannot_begin_stops_a_new_run_but_not_one_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_wandb(monkeypatch, unknown=True)
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(UsageError, match=r"wandb cannot begin: No API key configured; .*'offline'"):
        run(job("wandb"), folder)
    assert not folder.path.exists(), "nothing is left of it"

    fake.unknown = False
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(job("wandb"), folder, stop_after=6)
    fake.unknown = True
    heard = run(resume(folder), folder)
    assert heard.warnings == ["wandb cannot go on and is left out, the run goes on: No API key configured"]
    assert folder.summary.is_file()
