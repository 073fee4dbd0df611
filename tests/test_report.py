import io
import json
import math
import os
import pty
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lbc_cli.errors import ModelError, RecipeError
from lbc_cli.report import (
    CheckedLayerView,
    Console,
    CostView,
    EpochView,
    LayerView,
    PlanView,
    SkippedView,
    StepTiming,
    SummaryView,
    TrainBenchView,
    TrainingProgress,
    Verbosity,
    VerifyView,
    curves,
    format_error,
    formats,
    print_error,
    print_json,
    print_plan,
    print_summary,
    print_train_bench,
    print_verify,
    task,
    train_bench_record,
)
from lbc_cli.report.describe import verify_view
from lbc_cli.report.plots import points, removal_span
from lbc_cli.report.progress import EpochTable, format_epoch
from lbc_cli.verifier import Finding, Report

LAYERS = [
    LayerView(name="layer1.0.conv1.weight", shape=(64, 64, 3, 3), pattern="2:4", density=0.5),
    LayerView(name="layer1.0.conv2.weight", shape=(24, 64, 3, 3), pattern="2:4/8", density=0.499997, note="vector 8"),
]
SKIPPED = [
    SkippedView(name="conv1.weight", shape=(64, 3, 7, 7), reason="stem"),
    *(SkippedView(name=f"blocks.{i}.dw.weight", shape=(8, 1, 3, 3), reason="depthwise") for i in range(9)),
]
COST = CostView(parameters_dense=11_700_000, parameters_sparse=5_850_000, macs_dense=1_820_000_000)
MEMORY = {"score": 4_000_000, "mask": 1_000_000}


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def streams(verbosity: int = 0, width: int | None = None) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(verbosity, stdout=out, stderr=err, width=width), out, err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Console, Terminal]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    err = Terminal()
    return Console(stdout=io.StringIO(), stderr=err, width=80), err


def plan() -> PlanView:
    alive, density = [6, 6, 3, 1], [1.0, 1.0, 0.83, 0.5]
    schedule = [
        EpochView(epoch=e, density=density[min(e, 3)], survivors={"2:4": alive[min(e, 3)]}, lr=0.1 / (e + 1))
        for e in range(10)
    ]
    return PlanView(
        title="resnet18, 2:4, lbc",
        facts={"recipe": "digits", "model": "resnet18[in1k]"},
        layers=LAYERS,
        skipped=SKIPPED,
        schedule=schedule,
        memory=MEMORY,
        cost=COST,
    )


def summary(verified: bool | None = True, findings: Sequence[str] = ()) -> SummaryView:
    return SummaryView(
        title="resnet18, 2:4, lbc",
        results={"top1": 98.125, "val_loss": 0.0712, "ema_top1": None},
        layers=LAYERS,
        skipped=SKIPPED,
        memory=MEMORY,
        cost=COST,
        dense_bytes=46_800_000,
        file_bytes=26_000_000,
        times={"total": 203.0},
        verified=verified,
        findings=findings,
        files={"checkpoint": "runs/x/model.safetensors"},
    )


def bench() -> TrainBenchView:
    return TrainBenchView(
        title="resnet50",
        images=16,
        steps=20,
        dense=StepTiming(name="dense", median=2.0, first_quartile=1.9, third_quartile=2.2, peak_bytes=1 << 30),
        method=StepTiming(name="lbc 2:4", median=2.1, first_quartile=2.0, third_quartile=2.3),
        hooks=0.05,
    )


def records(epochs: int = 6) -> list[dict[str, Any]]:
    density = [1.0, 0.83, 0.66, 0.5]
    made: list[dict[str, Any]] = []
    for e in range(epochs):
        made.append({"kind": "step", "epoch": e, "loss": 9.0, "lr": 9.0})
        made.append(
            {"kind": "epoch", "epoch": e, "train_loss": 2 / (e + 1), "val_loss": None if e == 1 else 2.5 / (e + 1)}
            | {"top1": 90.0 - 50 / (e + 1), "density": density[min(e, 3)], "lr": 0.1 - 0.01 * e}
            | {"images_per_second": 812.0, "seconds": 4.2}
        )
    return made


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (formats.format_bytes, 0, "0 B"),
        (formats.format_bytes, 1023, "1023 B"),
        (formats.format_bytes, 1536, "1.50 KiB"),
        (formats.format_bytes, 45_800_000, "43.7 MiB"),
        (formats.format_bytes, None, "-"),
        (formats.format_count, 640, "640"),
        (formats.format_count, 11_689_512, "11.7 M"),
        (formats.format_count, 999_999, "1.00 M"),
        (formats.format_count, 999_499, "999 k"),
        (formats.format_count, 9_999, "10.0 k"),
        (formats.format_count, 812.34, "812"),
        (formats.format_count, 6.63, "6.63"),
        (formats.format_bytes, 1024 * 1024 - 1, "1.00 MiB"),
        (formats.format_seconds, 0.9999, "1.00 s"),
        (formats.format_seconds, 9.999, "10.0 s"),
        (formats.format_seconds, 0.25, "250 ms"),
        (formats.format_count, 1_814_073_344, "1.81 G"),
        (formats.format_seconds, 0, "0 s"),
        (formats.format_seconds, 3.5e-5, "35.0 us"),
        (formats.format_seconds, 0.0042, "4.20 ms"),
        (formats.format_seconds, 59.97, "1 min 00 s"),
        (formats.format_seconds, 247, "4 min 07 s"),
        (formats.format_seconds, 3599.8, "1 h 00 min"),
        (formats.format_seconds, 7500, "2 h 05 min"),
        (formats.format_seconds, 3 * 86400 + 4 * 3600, "3 d 04 h"),
        (formats.format_seconds, math.inf, "-"),
        (formats.format_left, 6.2, "7 s"),
        (formats.format_left, 59.2, "1 min 00 s"),
        (formats.format_left, 247, "4 min 07 s"),
        (formats.format_left, None, "-"),
        (formats.format_percent, 0.1234, "12.3 %"),
        (formats.format_accuracy, 98.126, "98.13 %"),
        (formats.format_density, 0.5, "0.5000"),
        (formats.format_density, 0.499997, "0.499997"),
        (formats.format_number, math.nan, "nan"),
        (formats.format_rate, 1.2e-5, "1.2e-05"),
        (formats.format_shape, (64, 3, 7, 7), "64x3x7x7"),
        (formats.one_line, "a\n  b\x1b[31m\tc", "a b\\x1b[31m\\tc"),
    ],
)
def test_formats(function: Callable[[Any], str], value: Any, expected: str) -> None:
    assert function(value) == expected


def test_ratios_without_a_whole_are_missing() -> None:
    assert formats.format_ratio(1, 2) == "50.0 %"
    assert formats.format_ratio(1, 0) == formats.format_ratio(None, 2) == formats.format_change(1.0, 0.0) == "-"
    assert formats.format_change(1.021, 1.0) == "+2.1 %"


def test_results_go_to_stdout_and_talk_to_stderr() -> None:
    console, out, err = streams()
    console.result("result [bold]literal[/bold] :smile:")
    console.info("info")
    console.detail("detail")
    console.warning("careful\nnow")
    assert out.getvalue() == "result [bold]literal[/bold] :smile:\n"
    assert err.getvalue() == "info\nwarning: careful now\n"


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        (Verbosity.QUIET, "warning: w\n"),
        (Verbosity.NORMAL, "i\nwarning: w\n"),
        (Verbosity.VERBOSE, "d\ni\nwarning: w\n"),
    ],
)
def test_verbosity(verbosity: int, expected: str) -> None:
    console, out, err = streams(verbosity)
    for level in ("detail", "info", "warning"):
        console.message(level[0], level)
    console.result("r")
    assert (err.getvalue(), out.getvalue()) == (expected, "r\n")


def test_json_is_stable_and_bare() -> None:
    console, out, err = streams()
    print_json({"b": [math.nan, "[red]x[/red]"], "a": Path("p")}, console=console)
    print_json({"a": Path("p"), "b": [math.nan, "[red]x[/red]"]}, console=console)
    first, second = out.getvalue()[: len(out.getvalue()) // 2], out.getvalue()[len(out.getvalue()) // 2 :]
    assert first == second
    assert json.loads(first) == {"a": "p", "b": [None, "[red]x[/red]"]}
    assert not err.getvalue()


def test_views_are_json() -> None:
    console, out, _ = streams()
    print_json(plan(), console=console)
    read = json.loads(out.getvalue())
    assert read["layers"][0]["shape"] == [64, 64, 3, 3]
    assert read["schedule"][2]["survivors"] == {"2:4": 3}
    record = train_bench_record(bench())
    assert record["overhead"] == pytest.approx(0.05)
    assert record["hooks_share"] == pytest.approx(0.025)


def test_errors_are_one_line_each() -> None:
    assert format_error(ModelError("no model\n'resnet81'.")) == ("error: no model 'resnet81'.",)
    assert format_error(RecipeError(["a.toml:1: x", "a.toml:2: y"])) == ("error: a.toml:1: x", "error: a.toml:2: y")
    assert "a bug in lbc" in format_error(KeyError("k"))[0]


def test_errors_do_not_wrap_and_hide_the_traceback() -> None:
    console, out, err = streams(Verbosity.QUIET, width=40)
    error = ModelError("word " * 40 + "end")
    print_error(error, console=console)
    assert err.getvalue().count("\n") == 1
    assert not out.getvalue()
    try:
        raise error
    except ModelError as caught:
        print_error(caught, True, console=console)
    assert "Traceback (most recent call last)" in err.getvalue()


def test_errors_are_red_on_a_terminal_only(terminal: tuple[Console, Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    print_error(ModelError("no"), console=terminal[0])
    assert terminal[1].getvalue() == "\x1b[31merror: no\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    print_error(ModelError("no"), console=Console(stderr=plain))
    assert plain.getvalue() == "error: no\n"


def test_plan_shows_every_layer_and_groups_the_skipped() -> None:
    console, out, _ = streams()
    print_plan(console, plan())
    text = out.getvalue()
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "layer1.0.conv1.weight 64x64x3x3 2:4 0.5000" in lines
    assert "layer1.0.conv2.weight 24x64x3x3 2:4/8 0.499997 vector 8" in lines
    assert "depthwise 9 blocks.0.dw.weight, blocks.1.dw.weight, blocks.2.dw.weight and 6 more" in lines
    assert "model resnet18[in1k]" in lines
    assert {"0-1 1.0000 6 0.1 to 0.05", "2 0.8300 3 0.0333", "3-9 0.5000 1 0.025 to 0.01"} <= lines
    assert "parameters 11.7 M 5.85 M 50.0 %" in lines
    assert "MACs per image 1.82 G - -" in lines
    assert "total 4.77 MiB 10.7 %" in lines
    assert "\x1b" not in text


def test_summary_ends_with_the_verdict() -> None:
    for view, last in [
        (summary(), "ok: 2 sparse layers verified"),
        (summary(None), "not verified"),
        (summary(False, ["conv: 3 of 4"]), "violations: 1 finding"),
    ]:
        console, out, _ = streams()
        print_summary(console, view)
        lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
        assert lines[-1] == last
        assert "top-1 98.12 %" in lines
        assert "top-1 (EMA) -" in lines
        assert "checkpoint 44.6 MiB 24.8 MiB 55.6 %" in lines
        assert ("conv: 3 of 4" in lines) == (view.verified is False)


def test_verify_report_lists_layers_and_findings() -> None:
    layer = CheckedLayerView(name="fc.weight", shape=(8, 8), pattern="2:4", density=0.52, groups=16, violations=1)
    console, out, _ = streams()
    print_verify(console, VerifyView(path="m.safetensors", ok=False, layers=[layer], findings=["fc.weight: \x1b[0m"]))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "fc.weight 8x8 2:4 0.5200 16 1" in lines
    assert lines[-2:] == ["fc.weight: \\x1b[0m", "violations: 1 finding"]


def test_verify_report_shows_warnings_and_groups_that_are_not_full() -> None:
    layer = CheckedLayerView(
        name="fc.weight", shape=(8, 8), pattern="2:4", density=0.48, groups=16, violations=0, under_filled=3
    )
    console, out, _ = streams()
    print_verify(console, VerifyView(path="m", ok=True, layers=[layer], findings=[], warnings=["1 negative zero"]))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "layer shape pattern density groups not full violations" in lines
    assert "fc.weight 8x8 2:4 0.4800 16 3 0" in lines
    assert lines[-2:] == ["1 negative zero", "ok: 1 sparse layer verified"]


def test_verify_report_shows_warnings_beside_violations_and_counts_the_violations() -> None:
    report = Report("m.safetensors", "dense")
    report.add(Finding("negative-zero", "fc.weight", "fc.weight holds -0.0", level="warning"))
    report.add(Finding("nan", "fc.weight", "fc.weight holds 1 NaN"))
    console, out, _ = streams()
    print_verify(console, verify_view(report))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[-3:] == ["fc.weight holds -0.0", "fc.weight holds 1 NaN", "violations: 1 finding"]


def test_bench_table_compares_measured_steps() -> None:
    console, out, _ = streams()
    print_train_bench(console, bench())
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "dense 2.00 s 1.90 s - 2.20 s - 8.0 1.00 GiB" in lines
    assert "lbc 2:4 2.10 s 2.00 s - 2.30 s +5.0 % 7.6 -" in lines
    assert lines[-1] == "hooks: 50.0 ms a step, 2.5 % of a dense step"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    console, out, _ = streams(width=width)
    print_plan(console, plan())
    print_summary(console, summary())
    print_train_bench(console, bench())
    assert max(len(line) for line in out.getvalue().splitlines()) <= width
    assert "layer1.0.conv2.weight" in out.getvalue()


def drive(progress: TrainingProgress, clock: FakeClock, first_epoch: int = 0) -> None:
    progress.start({"epochs": 4, "first_epoch": first_epoch, "updates_per_epoch": 10, "device": "cpu", "amp": "off"})
    for record in [r for r in records(4) if r["kind"] == "epoch"][first_epoch:]:
        epoch = record["epoch"]
        facts = {"density": record["density"], "survivors": {"2:4": 3}, "phase": "training", "lr": 0.1}
        progress.epoch_started(epoch, 4, 10, facts)
        for step in range(1, 11):
            clock.now += 4
            step_record = {"epoch": epoch, "step": step, "steps": 10, "update": epoch * 10 + step, "loss": 1.5}
            progress.step({**step_record, "images_per_second": 64.0, "lr": 0.1, "grad_norm": None})
        progress.epoch_ended(record)
    progress.finish()


def test_progress_off_terminal_is_a_line_per_epoch_and_one_in_30_seconds() -> None:
    console, out, err = streams()
    clock = FakeClock()
    drive(TrainingProgress(console, clock=clock), clock)
    lines = err.getvalue().splitlines()
    assert len(lines) == 8
    assert lines[0] == "epoch 1/4, step 8/10: loss 1.5000, density 1.000, 64 images/s, 2 min 08 s left"
    assert lines[1] == (
        "epoch 1/4: loss 2.0000, val loss 2.5000, top-1 40.00 %, density 1.000, lr 0.1, images/s 812, "
        "time 4.20 s, 2 min 00 s left"
    )
    assert "left" not in lines[-1]
    assert "val loss" not in lines[3]
    assert not any(code in err.getvalue() for code in "\x1b\r")
    assert not out.getvalue()


def test_progress_of_a_resumed_run_counts_only_what_is_left() -> None:
    console, _, err = streams()
    clock = FakeClock()
    drive(TrainingProgress(console, clock=clock), clock, first_epoch=2)
    assert (
        err.getvalue()
        .splitlines()[0]
        .endswith("epoch 3/4, step 8/10: loss 1.5000, density 0.660, 64 images/s, 48 s left")
    )


def test_quiet_progress_says_warnings_only() -> None:
    console, _, err = streams(Verbosity.QUIET)
    clock = FakeClock()
    progress = TrainingProgress(console, clock=clock)
    drive(progress, clock)
    progress.message("hm", "warning")
    progress.message("hm", "info")
    assert err.getvalue() == "warning: hm\n"


def test_progress_on_a_terminal_shows_a_bar_and_a_table(terminal: tuple[Console, Terminal]) -> None:
    console, err = terminal
    clock = FakeClock()
    drive(TrainingProgress(console, clock=clock), clock)
    text = err.getvalue()
    assert text.count("val loss") == 1
    assert "  2/4    1.0000         -   65.00 %" in text
    assert "loss 1.5000 density 0.500 64 img/s 0 s left" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_the_terminal_is_given_back_after_an_error(terminal: tuple[Console, Terminal]) -> None:
    console, err = terminal
    progress = TrainingProgress(console)
    progress.start({"epochs": 1, "first_epoch": 0, "updates_per_epoch": 1})
    assert "\x1b[?25h" not in err.getvalue()
    with pytest.raises(KeyError), progress:
        progress.step({"epoch": 0})
    assert "\x1b[?25h" in err.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_epoch_table_keeps_to_the_width(width: int) -> None:
    grid = EpochTable(300, width, ema=True)
    record = {"epoch": 299, "train_loss": 1.0, "density": 0.5, "top1": 100.0, "seconds": 3700.0, "lr": 1.234e-5}
    assert len(grid.header()) == len(grid.row(record)) <= width
    assert grid.row(record).startswith("300/300    1.0000         -  100.00 %")


def test_epoch_table_has_a_column_for_averages_only_where_there_are_any() -> None:
    assert "EMA" in EpochTable(3, 140, ema=True).header()
    assert EpochTable(3, 90).header().split()[-1] == "top-5"


def test_a_dash_stands_for_an_epoch_without_evaluation() -> None:
    assert format_epoch({"epoch": 0, "train_loss": 1.0, "top1": None}, 2) == "epoch 1/2: loss 1.0000"


def test_task_speaks_now_and_then() -> None:
    console, out, err = streams()
    clock = FakeClock()
    with task(console, "checking images", 100, clock=clock) as advance:
        for _ in range(10):
            clock.now += 10
            advance(10)
    assert err.getvalue() == "checking images: 30 of 100\nchecking images: 60 of 100\nchecking images: 90 of 100\n"
    assert not out.getvalue()


def test_quiet_task_says_nothing() -> None:
    console, _, err = streams(Verbosity.QUIET)
    with task(console, "packing", interval=0) as advance:
        advance(1)
    assert not err.getvalue()


def test_a_real_terminal_is_live() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        console = Console(stderr=stream, stdout=io.StringIO())
        live, off = console.live, streams()[0].live
    os.close(leader)
    assert live == (os.environ.get("TERM", "") not in ("dumb", "unknown"))
    assert not off


def test_a_name_that_cannot_be_encoded_is_escaped() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(stdout=stream, stderr=io.StringIO())
    console.result("modèle \udcff")
    stream.flush()
    assert stream.buffer.getvalue() == b"mod\\xe8le \\udcff\n"  # type: ignore[attr-defined]


def test_points_are_those_of_epochs_with_values() -> None:
    assert points(records(3), "val_loss") == ([1.0, 3.0], [2.5, pytest.approx(2.5 / 3)])
    assert points(records(2), "lr") == ([1.0, 2.0], [0.1, pytest.approx(0.09)])


def test_removal_lasts_from_the_first_fall_to_the_last() -> None:
    assert removal_span(records(6)) == (1.5, 3.5)
    assert removal_span(records(2)) is None


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        return {tuple(colour) for colour in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()}


def test_curves_draw_every_series(tmp_path: Path) -> None:
    assert curves(records(), tmp_path / "curves.png", title="resnet18 $2:4$ lbc", footnote="torch 2")
    drawn = colours(tmp_path / "curves.png")
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (255, 255, 255)} <= drawn
    assert (0xCC, 0x79, 0xA7) not in drawn  # no top-5 was recorded


def test_curves_are_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        curves(records(), tmp_path / name, title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_curves_of_one_epoch_and_of_none(tmp_path: Path) -> None:
    assert curves([{"epoch": 0, "train_loss": 1.0}], tmp_path / "one.png")
    assert len(colours(tmp_path / "one.png")) > 2
    assert not curves([{"kind": "step", "epoch": 0, "train_loss": 1.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
