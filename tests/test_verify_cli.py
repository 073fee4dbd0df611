"""`lbc verify` as a user calls it."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from lbc_cli.accuracy import Accuracy
from lbc_cli.cli import app
from lbc_cli.data.transforms import Pixels
from tests.checkpoints import small_checkpoint
from tests.test_verifier import dense_file, sparse_tensors
from tests.test_verify_against import restored


def lbc(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def rows(result: Result) -> list[str]:
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_layers_with_why_and_first_violations_are_shown(tmp_path: Path) -> None:
    tensors = {**sparse_tensors(), "stem.weight": torch.randn(8, 3, 3, 3), "head.weight": torch.randn(3, 8)}
    tensors["b.weight"][2, 4:8] = 1
    result = lbc(dense_file(tmp_path / "m", tensors), "--pattern", "2:4")
    assert result.exit_code == 3
    lines = rows(result)
    assert "Layers that stay dense (2)" in lines
    assert "3 input channels, not a multiple of 4 1 stem.weight" in lines
    assert "classifier 1 head.weight" in lines
    assert "b.weight (o=2, k=(), i=4..7) 17 4 [1 1 1 1]" in lines
    assert lines[-1] == "violations: 1 finding"


def test_layers_option(tmp_path: Path) -> None:
    path = dense_file(tmp_path / "m", sparse_tensors())
    result = lbc(path, "--layers", "a=2:4", "--layers", "[bc]=dense", "--json")
    assert result.exit_code == 0
    assert [layer["name"] for layer in json.loads(result.stdout)["layers"]] == ["a.weight"]
    assert lbc(path, "--pattern", "2:4", "--layers", "b=1:4").exit_code == 3
    for wrong in ("a", "=2:4", "a=", "a=2", "zzz=2:4"):
        result = lbc(path, "--pattern", "2:4", "--layers", wrong)
        assert result.exit_code == 2, wrong
        assert len(result.stderr.strip().splitlines()) == 1


def test_against_and_model(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    tensors = restored(tmp_path / "m")
    dense_file(tmp_path / "d", tensors)
    result = lbc(tmp_path / "d", "--against", tmp_path / "m")
    assert result.exit_code == 0
    assert f"equal tensors {len(tensors)} of {len(tensors)} in both" in rows(result)
    assert rows(result)[-1] == "ok: no layer claims a pattern"
    parsed = json.loads(lbc(tmp_path / "d", "--against", tmp_path / "m", "--json").stdout)
    assert set(parsed["against"]) == {
        *("path", "kind", "tensors", "equal", "rounded"),
        *("different", "missing", "extra", "digest"),
    }
    tensors["fc.bias"][0] += 1
    dense_file(tmp_path / "d", tensors)
    assert lbc(tmp_path / "d", "--against", tmp_path / "m").exit_code == 3
    assert lbc(tmp_path / "d", "--against", tmp_path / "none").exit_code == 2
    result = lbc(tmp_path / "m", "--model", "test_resnet")
    assert result.exit_code == 3
    assert "model test_resnet" in " ".join(rows(result))
    assert lbc(tmp_path / "m", "--model", "test_resnot").exit_code == 2


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the measurement, which has tests of its own."""
    calls: list[dict[str, Any]] = []

    def measure(path: Path, data: str, **options: Any) -> Accuracy:
        calls.append({"path": path, "data": data, **options})
        pixels = Pixels(1, 32, 32, (0.5,), (0.5,), "bicubic", 1.0)
        return Accuracy(top1=76.5, top5=93.25, loss=1.0, images=360, data=data, pixels=pixels)

    module = ModuleType("lbc_cli.accuracy")
    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lbc_cli.accuracy", module)
    return calls


def test_accuracy_is_reported_and_may_be_demanded(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    small_checkpoint(tmp_path / "m")
    assert "accuracy top-1 76.50 %, top-5 93.25 % on 360 images of digits, 32 x 32 pixels" in rows(
        lbc(tmp_path / "m", "--data", "digits")
    )
    found = json.loads(lbc(tmp_path / "m", "--data", "digits", "--min-top1", "76.5", "--json").stdout)
    pixels = found["accuracy"].pop("pixels")
    assert found["accuracy"] == {"top1": 76.5, "top5": 93.25, "n": 360, "data": "digits"}
    assert (pixels["height"], pixels["mean"]) == (32, [0.5])
    assert (found["ok"], found["findings"]) == (True, [])
    result = lbc(tmp_path / "m", "--data", "digits", "--min-top1", "76.6", "--device", "cpu")
    assert result.exit_code == 3
    assert "top-1 is 76.50 % on 360 images of digits: 76.6 % is asked" in rows(result)
    assert (measured[-1]["path"], measured[-1]["data"], measured[-1]["device"]) == (
        str(tmp_path / "m"),
        "digits",
        "cpu",
    )


def test_a_plain_file_is_measured_without_a_pattern(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    path = dense_file(tmp_path / "m", sparse_tensors())
    assert lbc(path, "--data", "digits").exit_code == 0
    assert lbc(path, "--data", "digits", "--pattern", "1:4").exit_code == 3
    assert len(measured) == 1, "what violates its pattern is not measured"
    assert lbc(path).exit_code == 2


@pytest.mark.parametrize("option", ["--min-top1=0", "--set=a=b", "--device=cpu"])
def test_options_of_the_measurement_need_data(option: str, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    result = lbc(tmp_path / "m", option)
    assert result.exit_code == 2
    assert "--data" in result.stderr
    assert option.partition("=")[0] in result.stderr
