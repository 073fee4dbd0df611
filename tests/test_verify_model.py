"""Names and shapes against timm, and timm's own folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from lbc_cli import models
from lbc_cli.checkpoint import save
from lbc_cli.errors import ModelError, TargetError, UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.targets import find_targets
from lbc_cli.verifier import Report, verify
from tests.checkpoints import FakePruner


def sparse_model(name: str = "test_resnet", pattern: str = "2:4", **kwargs: Any) -> tuple[torch.nn.Module, FakePruner]:
    torch.manual_seed(0)
    model = models.create(name, kwargs=kwargs)
    selection = find_targets(model, Pattern.parse(pattern))
    return model, FakePruner(model, {target.name: str(target.pattern) for target in selection.targets})


def plain_file(path: Path, model: torch.nn.Module) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def problems(report: Report) -> dict[str, str]:
    return {finding.tensor: finding.message for finding in report.findings if finding.level == "error"}


# --model.


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_mambaout"])
def test_a_dense_file_of_a_model(name: str, tmp_path: Path) -> None:
    model, pruner = sparse_model(name)
    report = verify(plain_file(tmp_path / "m", model), pattern="2:4", model=name)
    assert report.ok
    assert report.findings == []
    assert {layer.name for layer in report.layers} == {target.name for target in pruner.targets}
    reasons = {skipped.name: skipped.reason for skipped in find_targets(model, Pattern(2, 4)).skipped}
    assert {dense.name: dense.why for dense in report.dense if dense.name in reasons} == reasons
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert report.model == {"name": name, "kwargs": {}, "parameters": parameters}


def test_the_model_decides_where_names_mislead(tmp_path: Path) -> None:
    """By its name alone the stem of a model with 4 channels is a layer, and is dense for timm."""
    model, _ = sparse_model("test_resnet", in_chans=4)
    path = plain_file(tmp_path / "m", model)
    assert not verify(path, pattern="2:4").ok
    report = verify(path, pattern="2:4", model="test_resnet")
    assert report.ok
    why = {dense.name: dense.why for dense in report.dense}
    assert why["conv1.0.weight"].startswith("stem")
    assert why["fc.weight"] == "classifier"


def test_layers_and_model_together(tmp_path: Path) -> None:
    model, _ = sparse_model("test_resnet")
    path = plain_file(tmp_path / "m", model)
    report = verify(path, pattern="2:4", layers={"layer1": "dense", "layer2.*": "2:4"}, model="test_resnet")
    assert report.ok
    assert {dense.why for dense in report.dense if dense.name.startswith("layer1")} == {"dense by layers: 'layer1'"}
    only = verify(path, layers={"layer4": "2:4"}, model="test_resnet")
    assert only.ok
    assert {layer.name.split(".")[0] for layer in only.layers} == {"layer4"}
    with pytest.raises(TargetError, match="layr4"):
        verify(path, layers={"layr4": "2:4"}, model="test_resnet")


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path) -> None:
    model, _ = sparse_model("test_resnet")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del tensors["layer2.0.conv1.weight"], tensors["bn1.num_batches_tracked"]
    tensors["extra.weight"] = torch.zeros(4, 4)
    tensors["layer1.0.bn1.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "m")
    found = problems(verify(tmp_path / "m", pattern="2:4", model="test_resnet"))
    assert set(found) == {"layer2.0.conv1.weight", "extra.weight", "layer1.0.bn1.bias"}
    assert "test_resnet has layer2.0.conv1.weight, which" in found["layer2.0.conv1.weight"]
    assert found["extra.weight"].endswith("extra.weight, which test_resnet lacks")
    assert found["layer1.0.bn1.bias"] == "layer1.0.bn1.bias is [7]: test_resnet has [32]"


def test_wrapped_models_are_recognised(tmp_path: Path) -> None:
    model, _ = sparse_model("test_resnet")
    save_file({f"module.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "m")
    report = verify(tmp_path / "m", model="test_resnet")
    assert any('without "module."' in message for message in problems(report).values())


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"num_classes": 10}, "num_classes=10"), ({"num_classes": 0}, "num_classes=0"), ({"in_chans": 1}, "in_chans=1")],
)
def test_another_head_or_stem_is_explained(kwargs: dict[str, int], said: str, tmp_path: Path) -> None:
    model, _ = sparse_model("test_resnet", **kwargs)
    report = verify(plain_file(tmp_path / "m", model), pattern="2:4", model="test_resnet")
    assert report.ok
    (finding,) = report.findings
    assert (finding.rule, finding.level) == ("model", "warning")
    assert said in finding.message
    assert (report.model or {})["kwargs"] == kwargs


def test_a_checkpoint_brings_its_arguments(tmp_path: Path) -> None:
    model, pruner = sparse_model("test_vit", num_classes=7, img_size=96)
    save(model, tmp_path / "m", pruner=pruner)
    report = verify(tmp_path / "m", model="test_vit")
    assert report.findings == []
    assert (report.model or {})["kwargs"] == {"num_classes": 7, "img_size": 96}
    why = {dense.name: dense.why for dense in report.dense}
    assert why["patch_embed.proj.weight"].startswith("stem")
    assert why["pos_embed"].startswith("not a convolution or linear layer")
    other = verify(tmp_path / "m", model="test_resnet")
    assert not other.ok
    assert "says that it is test_vit" in next(f.message for f in other.findings if f.level == "warning")


def test_unknown_models(tmp_path: Path) -> None:
    model, _ = sparse_model("test_resnet")
    with pytest.raises(ModelError, match="test_resnet"):
        verify(plain_file(tmp_path / "m", model), model="test_resnt")


# Folders.


def folder(path: Path, **kwargs: Any) -> Path:
    model, _ = sparse_model("test_resnet", **kwargs)
    arguments = {key: value for key, value in kwargs.items() if key != "num_classes"}
    save_for_hf(model, path, model_args=arguments, safe_serialization=True)
    return path


def test_a_folder_that_timm_wrote(tmp_path: Path) -> None:
    folder(tmp_path / "f", num_classes=5)
    report = verify(tmp_path / "f", pattern="2:4", model="test_resnet")
    assert report.findings == []
    assert (report.kind, report.ok, (report.model or {})["kwargs"]["num_classes"]) == ("folder", True, 5)
    assert timm.create_model(f"local-dir:{tmp_path / 'f'}", pretrained=True).num_classes == 5
    with pytest.raises(UsageError, match="--pattern"):
        verify(tmp_path / "f")
    model, pruner = sparse_model("test_resnet", num_classes=5)
    save(model, tmp_path / "m", pruner=pruner)
    compared = verify(tmp_path / "f", against=tmp_path / "m")
    assert compared.ok
    assert (compared.against or {})["kind"] == "packed"


def test_violations_in_a_folder(tmp_path: Path) -> None:
    weights = folder(tmp_path / "f") / "model.safetensors"
    tensors = load_file(weights)
    tensors["layer1.0.conv1.weight"][3, 0:4, 1, 2] = 1
    save_file(tensors, weights)
    (finding,) = verify(tmp_path / "f", pattern="2:4").findings
    assert "layer1.0.conv1.weight: group (o=3, k=(1, 2), i=0..3) uses 4 positions" in finding.message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"architecture": 3}', '{"architecture": "a", "architecture": "b"}', "[" * 100_000, '{"a": NaN}'],
)
def test_damaged_configs(text: str, tmp_path: Path) -> None:
    (folder(tmp_path / "f") / "config.json").write_text(text)
    (finding,) = verify(tmp_path / "f", pattern="2:4").findings
    assert (finding.rule, finding.level) == ("file", "error")
    assert "config.json" in finding.message


def test_folders_that_are_none(tmp_path: Path) -> None:
    path = folder(tmp_path / "f")
    content = (path / "model.safetensors").read_bytes()
    (path / "pytorch_model.bin").write_bytes(b"PK")
    report = verify(path, pattern="2:4")
    assert [(finding.rule, finding.level) for finding in report.findings] == [("folder", "warning")]
    (path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds pytorch_model.bin: .*lbc convert"):
        verify(path, pattern="2:4")
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match="several files"):
        verify(path, pattern="2:4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="not a timm folder"):
        verify(tmp_path / "empty")
    (path / "model.safetensors").write_bytes(content[:-8])
    assert "cut off" in verify(path, pattern="2:4").findings[0].message


def test_a_folder_with_a_packed_checkpoint_is_of_no_use_to_timm(tmp_path: Path) -> None:
    model, pruner = sparse_model("test_resnet")
    save(model, tmp_path / "model.safetensors", pruner=pruner)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    report = verify(tmp_path, pattern="2:4")
    assert any(finding.rule == "folder" and "lbc export" in finding.message for finding in report.findings)


@pytest.mark.parametrize("name", ["m.pth", "m.pt", "m.bin", "m.tar"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / name)
    with pytest.raises(UsageError, match="pickle"):
        verify(tmp_path / name, pattern="2:4")
