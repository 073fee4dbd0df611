"""The page of a run: complete, self-contained, harmless whatever the names in it, and there however the run ends."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lbc_cli import training
from lbc_cli.checkpoint import load_state
from lbc_cli.engine import NullReporter
from lbc_cli.errors import DivergenceError, Interrupted, OutputError
from lbc_cli.locks import is_locked, locked
from lbc_cli.recipe import resolve
from lbc_cli.report.charts import chart, charts, tick_label, ticks
from lbc_cli.report.live import LivePage, run_observed, run_page
from lbc_cli.report.page import RunPage, Setting, render, write_page
from lbc_cli.report.plots import PANELS, removal_span
from lbc_cli.report.views import CostView, LayerView, SkippedView
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from tests.test_engine import same
from tests.test_resume import stop_at

COST = CostView(parameters_dense=1000, parameters_sparse=500, macs_dense=10_000, macs_sparse=5000)
EVIL = "<script>alert('x')</script>\"&"


class Reading(HTMLParser):
    """Tags, attributes and text of a page; every tag that opens must close."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text.replace("<wbr>", ""))  # where a line may break says nothing
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


EPOCHS = [
    {"kind": "epoch", "epoch": e, "train_loss": 2 / (e + 1), "top1": 50.0 + e, "density": 1 - e / 8, "lr": 0.1}
    for e in range(5)
]


def page(**more: Any) -> RunPage:
    whole: dict[str, Any] = {
        "title": "net · lbc 2:4",
        "status": "done",
        "facts": {"data": "digits"},
        "results": {"top1": 98.5, "val_loss": 0.1},
        "best": ("best top-1, epoch 4", "98.75 %"),
        "epochs": EPOCHS,
        "layers": [LayerView(name="a.weight", shape=(8, 16, 3, 3), pattern="2:4", density=0.5)],
        "skipped": [SkippedView(name="fc.weight", shape=(10, 8), reason="classifier")],
        "cost": COST,
        "dense_bytes": 4000,
        "file_bytes": 2100,
        "memory": {"score": 512, "mask": 128},
        "measured": {"training and evaluation": "1 min 01 s"},
        "settings": [Setting(key="train.epochs", value="4", default="120", origin="--epochs")],
        "recipe": "epochs = 4",
        "environment": {"torch": "2"},
        "command": "lbc train net",
        "verified": True,
        "checked": {"groups checked": "288"},
    }
    return RunPage(**{**whole, **more})


def test_a_page_says_everything_and_fetches_nothing() -> None:
    text = render(page())
    found = Reading(text)
    for word in (
        "98.50 %", "98.75 %", "best top-1, epoch 4", "8x16x3x3", "2:4", "288", "classifier", "50.0 %", "1 min 01 s",
        "--epochs", "120", "lbc train net", "ok: 1 sparse layer verified", "Loss", "Learning rate",
    ):  # fmt: skip
        assert word in found.text, word
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?\s*(?:https?:|//)", text)
    assert [tag for tag, _ in found.tags if tag in ("script", "link", "iframe", "object", "form", "img", "use")] == []
    metas = [attributes for tag, attributes in found.tags if tag == "meta"]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_cannot_put_anything_into_the_page() -> None:
    def shown(text: str) -> RunPage:
        return page(
            title=text,
            message=text,
            progress=text,
            facts={text: text},
            layers=[LayerView(name=text, shape=(4, 4), pattern="2:4", density=0.5, note=text)],
            skipped=[SkippedView(name=text, shape=(4,), reason=text)],
            settings=[Setting(key=text, value=text, default=text, origin=text)],
            recipe=text,
            environment={text: text},
            command=text,
            warnings=[text],
            findings=[text],
            checked={text: text},
        )

    text = render(shown(EVIL))
    found = Reading(text)
    assert "<script" not in text
    assert found.text.count("alert('x')") == 22
    plain = Reading(render(shown("word")))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attributes) for _, attributes in found.tags] == [sorted(attributes) for _, attributes in plain.tags]


def test_what_cannot_be_printed_is_escaped_and_a_page_is_always_utf_8(tmp_path: Path) -> None:
    write_page(page(title="a\udcffb\x00c\u202ed", command="x\x1b[31m"), tmp_path / "page.html")
    found = Reading((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert r"a\udcffb\x00c\u202ed" in found.text
    assert r"x\x1b[31m" in found.text


def test_what_is_counted_and_what_was_measured_share_no_table() -> None:
    tables = re.findall(r"<table>.*?</table>", render(page()), re.DOTALL)
    counted = [table for table in tables if "on paper" in table]
    timed = [table for table in tables if "1 min 01 s" in table]
    assert (len(counted), len(timed)) == (1, 1)
    assert counted != timed


def test_what_is_not_known_is_left_out_and_long_tables_are_folded() -> None:
    bare = Reading(render(RunPage(title="t", status="running", facts={})))
    for word in ("Savings", "verified", "Curves", "Warnings", "Memory"):
        assert word not in bare.text
    assert "as planned" in Reading(render(page(status="running", verified=None))).text
    layers = [LayerView(name=f"l{n}", shape=(4, 4), pattern="", density=None) for n in range(61)]
    assert "61 rows" in Reading(render(page(layers=layers))).text


def test_groups_are_counted_as_the_verifier_counts_them() -> None:
    for pattern, groups in (("2:4", 288), ("2:4/8", 36), ("1:16/2", 36), ("", None)):
        layer = LayerView(name="a", shape=(8, 16, 3, 3), pattern=pattern, density=0.5)
        cells = re.findall(r"<td[^>]*>(.*?)</td>", render(page(layers=[layer], skipped=[])))
        assert (str(groups) in cells) == (groups is not None), pattern


# Charts


def coordinates(drawn: str, kind: str) -> list[tuple[float, float]]:
    (group,) = re.findall(rf'<g class="{kind}">.*?</g></g>', drawn)
    return [(float(x), float(y)) for x, y in re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', group)]


def test_a_chart_puts_values_where_they_belong_and_says_them() -> None:
    records = [{"epoch": e, "train_loss": value} for e, value in enumerate([4.0, 3.0, 1.0])]
    drawn = chart(PANELS[0], records)
    Reading(drawn)
    (x0, y0), (x1, y1), (x2, y2) = coordinates(drawn, "blue")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y1 - y0) / (y2 - y1) == pytest.approx(1 / 2, abs=0.01)
    assert y0 < y1 < y2, "up is more"
    assert "<title>training, epoch 3: 1</title>" in drawn
    assert "legend" not in drawn, "one line needs none"


def test_held_values_change_between_epochs_and_the_removal_is_shaded() -> None:
    drawn = chart(PANELS[2], EPOCHS, removal_span(EPOCHS))
    assert re.search(r'class="line" d="M[\d.]+ [\d.]+H', drawn)
    assert 'class="shade"' in drawn
    assert "weights being removed" in drawn


def test_charts_are_those_that_have_values() -> None:
    assert len(charts(PANELS, EPOCHS)) == 4
    assert len(charts(PANELS, [{"epoch": 0, "train_loss": 1.0}])) == 1
    assert charts(PANELS, []) == []
    flat = charts(PANELS, [{"epoch": e, "train_loss": 0.0, "lr": 0.0} for e in range(300)])
    assert all("nan" not in drawn and "inf" not in drawn for drawn in flat)


@pytest.mark.parametrize(
    ("low", "high", "whole", "wanted"),
    [
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
        (0.0, 0.05, False, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (1, 3, True, [1, 2, 3]),
        (1, 1, True, [1]),
        (1, 120, True, [50, 100]),
        (-0.3, 2.4, False, [0, 1, 2]),
    ],
)
def test_ticks_are_round(low: float, high: float, whole: bool, wanted: list[float]) -> None:
    assert ticks(low, high, whole=whole) == pytest.approx(wanted)


@pytest.mark.parametrize(("value", "wanted"), [(0.1 + 0.2, "0.3"), (2500, "2500"), (250_000, "250k"), (3e-5, "3e-05")])
def test_tick_labels_are_short(value: float, wanted: str) -> None:
    assert tick_label(value) == wanted


# Of a run


def job(*overrides: str) -> training.Job:
    flags = {"model.name": "test_resnet", "data.source": "digits", "train.epochs": 4, "train.seed": 1}
    settings = ["data.batch_size=360", "schedule.warmup_epochs=1", "train.log_every=2", *overrides]
    return training.prepare(resolve("digits", overrides=settings, flags=flags))


class Listening(NullReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def message(self, text: str, level: str = "info") -> None:
        self.warnings += [text] if level == "warning" else []


def test_the_folder_of_a_run_has_page_curves_and_tables_however_it_ends(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(Interrupted):
        run_observed(job(), folder, NullReporter(), stop=stop_at(10))
    assert json.loads(folder.ended.read_text())["how"] == "interrupted"
    said = Reading(folder.report.read_text()).text
    for word in ("interrupted", "is saved, a resumed run goes on", "data.batch_size", "2 of 4 epochs", "as planned"):
        assert word in said, word
    assert folder.curves.is_file()
    assert is_locked(folder.path) is False

    run_observed(resume(folder), folder, NullReporter(), stop=lambda: False)
    assert not folder.ended.exists()
    summary = json.loads(folder.summary.read_text())
    found = Reading(folder.report.read_text())
    for word in ("verified", f"{summary['last']['top1']:.2f} %", "--epochs", "recipes/digits.toml:38", "0.5000"):
        assert word in found.text, word
    assert "recipe.toml:" not in found.text, "origins are those of the first start"
    assert found.text.count("images/s in training") == 2
    environment = json.loads(folder.environment.read_text())
    assert [later["torch"] for later in environment["resumed"]] == [environment["torch"]]
    with folder.metrics_steps.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [(str(e), str(s)) for e in range(4) for s in (2, 4)]
    wanted = ("loss", "lr", "density", "survivors.2:4", "images_per_second", "data_wait", "memory", "grad_norm")
    assert all(float(row[key]) >= 0 for row in rows for key in wanted)


def test_curves_and_page_are_drawn_as_the_run_goes_on_within_their_share_of_the_time(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    trained = job()
    training.run(trained, folder)
    now = [0.0]
    live = LivePage(trained, folder, clock=lambda: now[0])
    drawn: list[float] = []

    def draw(status: str, **more: Any) -> None:
        assert status == "running"
        drawn.append(now[0])
        now[0] += 2.0  # what drawing takes

    live._draw = draw  # type: ignore[method-assign]
    while now[0] < 1500:
        now[0] += 1.0
        live.epoch_ended({})
    assert drawn[0] == 30.0
    assert all(later - earlier >= 200 for earlier, later in pairwise(drawn))
    assert len(drawn) == 8


def test_a_run_goes_on_when_it_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, heard = RunFolder.create(tmp_path / "run"), Listening()
    monkeypatch.setattr("lbc_cli.report.live.INTERVAL", -1.0)
    monkeypatch.setattr("lbc_cli.report.live.SHARE", 1e9)
    calls = iter(range(100))

    def broken(*_: Any) -> None:
        if next(calls) < 3:
            raise RuntimeError("no fonts")

    monkeypatch.setattr("lbc_cli.report.live.run_curves", broken)
    run_observed(job(), folder, heard, stop=lambda: False)
    assert heard.warnings == ["the run cannot be drawn now, which is tried again later: no fonts"]
    assert next(calls) == 5, "drawn after each of four epochs, and at the end"
    assert "done" in Reading(folder.report.read_text()).text


def test_drawing_changes_nothing_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for name, interval in (("drawn", -1.0), ("not", 1e9)):
        folder = RunFolder.create(tmp_path / name)
        monkeypatch.setattr("lbc_cli.report.live.INTERVAL", interval)
        monkeypatch.setattr("lbc_cli.report.live.SHARE", 1e9)
        with pytest.raises(Interrupted):
            run_observed(job(), folder, NullReporter(), stop=stop_at(8))  # at an epoch's end, just drawn
        states.append(load_state(folder.state))
    assert same(*({**state, "history": None, "running": None} for state in states))


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    broken = job("optimizer.lr=1e30", "schedule.warmup_lr=1e29", "optimizer.weight_decay=0.0")
    with pytest.raises(DivergenceError):
        run_observed(broken, folder, NullReporter(), stop=lambda: False)
    assert json.loads(folder.ended.read_text())["how"] == "diverged"
    said = Reading(folder.report.read_text()).text
    assert "diverged" in said
    assert "loss and gradients must be finite" in said


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with locked(folder.path, "another run"), pytest.raises(OutputError, match="another run is at work"):
        run_observed(job(), folder, NullReporter(), stop=lambda: False)
    assert list(folder.path.iterdir()) == []


def test_settings_on_the_page_are_those_that_are_not_defaults(tmp_path: Path) -> None:
    found = run_page(job("train.clip_grad=2.0", "train.bce=false"), RunFolder.create(tmp_path / "run"), "running")
    settings = {setting.key: (setting.value, setting.default, setting.origin) for setting in found.settings}
    assert settings["train.clip_grad"] == ("2", "0", "--set")
    assert settings["model.name"] == ('"test_resnet"', '""', "MODEL")
    assert not {"train.compile", "train.bce", "method.t_f", "sparsity.pattern"} & settings.keys()


def test_a_folder_whose_name_is_not_utf_8_is_no_reason_to_fail(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run\udcff")
    run_observed(job("train.eval_every=4"), folder, NullReporter(), stop=lambda: False)
    assert r"run\udcff" in Reading(folder.report.read_text(encoding="utf-8")).text
