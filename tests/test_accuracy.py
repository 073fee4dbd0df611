from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lbc_cli import models
from lbc_cli.accuracy import Accuracy, measure
from lbc_cli.checkpoint import save
from lbc_cli.data.digits import evaluation_mask, load_digits
from lbc_cli.errors import CheckpointError, DataError, ModelError, RecipeError, UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.targets import find_targets
from tests.checkpoints import FakePruner

MEAN, STD = [0.305], [0.376]
RECIPE = (
    '[data]\nsource = "digits"\nimage_size = 32\nmean = [0.305]\nstd = [0.376]\ninterpolation = "bilinear"\n'
    "crop_pct = 1.0\nworkers = 0\n"
)
PIXELS = {
    "channels": 3,
    "height": 32,
    "width": 32,
    "mean": MEAN * 3,
    "std": STD * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def images_of_digits(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """The evaluation images as the recipe prepares them, without any of the loaders."""
    images, labels = load_digits()
    kept = evaluation_mask(labels)
    grown = []
    for image in images[kept]:
        grey = ((image.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
        picture = Image.fromarray(grey).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        grown.append(np.asarray(picture, np.float32) / 255)
    stacked = torch.from_numpy(np.stack(grown)).permute(0, 3, 1, 2)
    return (stacked - MEAN[0]) / STD[0], torch.from_numpy(labels[kept].astype(np.int64))


def fitted(name: str = "test_resnet", **kwargs: Any) -> nn.Module:
    """A 2:4 model that knows some digits: its classifier is solved for, the rest is random."""
    torch.manual_seed(0)
    model = models.create(name, kwargs={"num_classes": 10, **kwargs}).eval()
    pruned(model)
    images, labels = images_of_digits()
    with torch.no_grad():
        if kwargs.get("in_chans") == 1:
            images = images[:, :1]
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        wanted = nn.functional.one_hot(labels, 10).float()
        solved = (torch.linalg.pinv(features[:200].double(), rtol=1e-5) @ wanted[:200].double()).float()
        classifier = model.get_classifier()  # type: ignore[operator]
        classifier.weight.copy_(4 * solved.T)
        classifier.bias.zero_()
    return model


def pruned(model: nn.Module) -> FakePruner:
    return FakePruner(model, {target.name: "2:4" for target in find_targets(model, Pattern(2, 4)).targets})


def expected(model: nn.Module) -> tuple[float, float, float]:
    """Top-1, top-5 and loss by hand, image by image."""
    images, labels = images_of_digits()
    with torch.no_grad():
        logits = model(images)
    ranks = [sum(float(v) > float(row[label]) for v in row) for row, label in zip(logits, labels, strict=True)]
    loss = -torch.log_softmax(logits.double(), 1)[torch.arange(len(labels)), labels].mean()
    right = [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)]
    return right[0], right[1], float(loss)


def assert_is(found: Accuracy, wanted: tuple[float, float, float]) -> None:
    assert (found.top1, found.top5) == pytest.approx(wanted[:2], abs=1e-9)
    assert found.loss == pytest.approx(wanted[2], rel=1e-4)
    assert (found.images, found.data) == (355, "digits")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fitted()


@pytest.fixture(scope="module")
def truth(model: nn.Module) -> tuple[float, float, float]:
    wanted = expected(model)
    assert 15 < wanted[0] < wanted[1] < 100, "the test must be able to tell one model from another"
    return wanted


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("accuracy") / "m.safetensors"
    save(model, path, pruner=pruned(model), recipe=RECIPE, metrics={"pixels": PIXELS})
    return path


def test_a_checkpoint_is_measured_as_its_training_did(file: Path, truth: tuple[float, float, float]) -> None:
    seen: list[int] = []
    found = measure(file, "digits", device="cpu", batch=50, progress=seen.append)
    assert_is(found, truth)
    assert seen == [50] * 7 + [5]
    assert found.pixels.mean == (0.305,) * 3


@pytest.mark.parametrize("known", ["recipe", "pixels"])
def test_either_note_of_training_is_enough(
    known: str, model: nn.Module, truth: tuple[float, float, float], tmp_path: Path
) -> None:
    notes: dict[str, Any] = {"recipe": {"recipe": RECIPE}, "pixels": {"metrics": {"pixels": PIXELS}}}[known]
    save(model, tmp_path / "m", **notes)
    assert_is(measure(tmp_path / "m", "digits", device="cpu"), truth)


def test_without_notes_images_are_the_models_own_and_can_be_set(
    model: nn.Module, truth: tuple[float, float, float], tmp_path: Path
) -> None:
    save(model, tmp_path / "m")
    own = measure(tmp_path / "m", "digits", device="cpu")
    assert own.pixels.height != 32
    assert own.top1 != pytest.approx(truth[0])
    overrides = ["data.image_size=32", "data.mean=[0.305]", "data.std=[0.376]", "data.crop_pct=1.0"]
    given = measure(tmp_path / "m", "digits", device="cpu", overrides=[*overrides, "data.interpolation=bilinear"])
    assert_is(given, truth)


def test_overrides_win_over_what_the_file_says(file: Path) -> None:
    assert measure(file, "digits", device="cpu", overrides=["data.image_size=40"]).pixels.height == 40


def test_plain_weights_with_a_named_model(model: nn.Module, truth: tuple[float, float, float], tmp_path: Path) -> None:
    overrides = [f"data.{key}={value}" for key, value in PIXELS.items() if key in ("mean", "std", "crop_pct")]
    overrides += ["data.image_size=32", "data.interpolation=bilinear"]
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        path = tmp_path / name
        assert_is(measure(path, "digits", model="test_resnet", device="cpu", overrides=overrides), truth)
    with pytest.raises(ModelError, match="which model it is"):
        measure(tmp_path / "w.pth", "digits", device="cpu")


@pytest.mark.parametrize("kind", ["timm", "semi-structured", "dense"])
def test_exports_score_as_their_checkpoint(
    kind: str, model: nn.Module, file: Path, truth: tuple[float, float, float], tmp_path: Path
) -> None:
    from lbc_cli.exports import ExportOptions, export

    path = tmp_path / ("m" if kind == "timm" else "m.safetensors")
    export(file, kind, path, options=ExportOptions())
    if kind == "dense":
        keys = ("mean", "std", "crop_pct", "interpolation")
        overrides = ["data.image_size=32", *(f"data.{key}={json.dumps(PIXELS[key])}" for key in keys)]
        assert_is(measure(path, "digits", model="test_resnet", device="cpu", overrides=overrides), truth)
        return
    found = measure(path, "digits", device="cpu")
    if kind == "timm":
        assert_is(found, truth)
    else:
        assert_is(found, expected(rounded(model)))
        with pytest.raises(UsageError, match="leave the model's name out"):
            measure(path, "digits", model="test_resnet", device="cpu")


def rounded(model: nn.Module) -> nn.Module:
    """The model with its tensors rounded to bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16).float()


def test_half_precision_weights_compute_in_float32(model: nn.Module, tmp_path: Path) -> None:
    save(rounded(model).to(torch.bfloat16), tmp_path / "m", recipe=RECIPE)
    assert_is(measure(tmp_path / "m", "digits", device="cpu"), expected(rounded(model)))


def test_grey_models_get_grey_images(tmp_path: Path) -> None:
    save(fitted(in_chans=1), tmp_path / "m", recipe=RECIPE)
    found = measure(tmp_path / "m", "digits", device="cpu")
    assert found.pixels.channels == 1
    assert found.top1 > 15


class Flat(nn.Module):
    """A linear classifier of 3 x 8 x 8 images; `normed` does itself what loaders usually do."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(192, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1))


def onnx_file(path: Path, *, batch: int | None = None, notes: dict[str, Any] | None = None, classes: int = 10) -> Flat:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    model = Flat(classes)
    arrays = {"w": model.fc.weight.detach().numpy(), "b": model.fc.bias.detach().numpy()}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1),
        ],
        "flat",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or "n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch or "n", classes])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if notes is not None:
        helper.set_model_props(proto, {"lbc.preprocessing": json.dumps(notes)})
    onnx.save(proto, path)
    return model


def expected_flat(model: nn.Module) -> float:
    images, labels = images_of_digits(8)
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).double().mean())


NOTES = {"mean": MEAN * 3, "std": STD * 3, "crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center"}


@pytest.mark.parametrize("batch", [None, 1, 48])
def test_onnx_by_what_the_exporter_noted(batch: int | None, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = onnx_file(tmp_path / "m.onnx", batch=batch, notes=NOTES)
    found = measure(tmp_path / "m.onnx", "digits", device="cpu", batch=64)
    assert found.top1 == pytest.approx(expected_flat(model))
    assert (found.pixels.height, found.images) == (8, 355)


def test_onnx_that_says_nothing_of_its_images(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = onnx_file(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"give data\.mean, data\.std with --set"):
        measure(tmp_path / "m.onnx", "digits", device="cpu")
    overrides = ["data.mean=[0.305]", "data.std=[0.376]", "data.crop_pct=1.0", "data.interpolation=bilinear"]
    found = measure(tmp_path / "m.onnx", "digits", device="cpu", overrides=overrides)
    assert found.top1 == pytest.approx(expected_flat(model))


def test_onnx_exports_score_as_their_checkpoint(file: Path, truth: tuple[float, float, float], tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    from lbc_cli.exports import ExportOptions, export

    export(file, "onnx", tmp_path / "m.onnx", options=ExportOptions())
    assert_is(measure(tmp_path / "m.onnx", "digits", device="cpu"), truth)


def test_damaged_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="onnxruntime cannot read it"):
        measure(tmp_path / "m.onnx", "digits", device="cpu")
    onnx_file(tmp_path / "n.onnx", notes={"mean": "grey"})
    with pytest.raises(CheckpointError, match="no setting for images"):
        measure(tmp_path / "n.onnx", "digits", device="cpu")


def test_other_classes_are_refused(tmp_path: Path) -> None:
    save(models.create("test_resnet", num_classes=7), tmp_path / "m", recipe=RECIPE)
    with pytest.raises(DataError, match="tells 7 classes apart, digits has 10"):
        measure(tmp_path / "m", "digits", device="cpu")


def test_images_that_the_model_cannot_take(tmp_path: Path) -> None:
    save(models.create("vit_tiny_patch16_224", num_classes=10), tmp_path / "m")
    with pytest.raises(ModelError, match=r"cannot take images of 3 x 32 x 32 .* set data\.image_size"):
        measure(tmp_path / "m", "digits", device="cpu", overrides=["data.image_size=32"])


def test_what_cannot_be_asked(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.epochs=3: a measurement takes data"):
        measure(file, "digits", overrides=["train.epochs=3"])
    with pytest.raises(RecipeError, match="sise"):
        measure(file, "digits", overrides=["data.sise=3"])
    with pytest.raises(RecipeError, match="disagree"):
        measure(file, "digits", overrides=["data.source=other"])
    with pytest.raises(DataError, match="no such data"):
        measure(file, str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="no such"):
        measure(tmp_path / "none", "digits")
    with pytest.raises(UsageError, match="not supported"):
        measure(file, "digits", device="meta")
    with pytest.raises(ModelError, match="test_resnet"):
        measure(file, "digits", model="resnet18")


@pytest.mark.parametrize(
    ("notes", "match"),
    [
        ({"recipe": "data = 3\n"}, "a table is needed"),
        ({"recipe": "[data"}, "not TOML"),
        ({"recipe": '[data]\nmean = "grey"\n'}, "mean"),
        ({"metrics": {"pixels": {"std": [None]}}}, "std"),
        ({"metrics": {"pixels": {"interpolation": 3}}}, "interpolation"),
    ],
)
def test_notes_that_make_no_sense_are_refused(notes: dict[str, Any], match: str, tmp_path: Path) -> None:
    save(models.create("test_resnet", num_classes=10), tmp_path / "m", **notes)
    with pytest.raises((CheckpointError, RecipeError), match=match):
        measure(tmp_path / "m", "digits", device="cpu")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    model = models.create("test_resnet", num_classes=10)
    model.get_classifier().weight = nn.Parameter(torch.ones(10, 96, dtype=torch.int8), requires_grad=False)  # type: ignore[operator]
    save(model, tmp_path / "m", recipe=RECIPE)
    with pytest.raises(ModelError, match=r"torch\.int8: quantised"):
        measure(tmp_path / "m", "digits", device="cpu")
