"""Creating timm models: names, arguments, image sizes, weights, and a torchvision that does not match."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lbc_cli import models
from lbc_cli.errors import ModelError

TINY = "test_resnet"  # timm's own model for tests: 0.5 M parameters


def tiny(**kwargs: Any) -> nn.Module:
    return models.create(TINY, num_classes=5, **kwargs)


def one_line(caught: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_create_passes_every_argument_on() -> None:
    model = models.create("resnet18", num_classes=7, drop_rate=0.25, drop_path_rate=0.5, kwargs={"in_chans": 1})
    assert model.fc.out_features == 7
    assert model.drop_rate == 0.25
    assert max(m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath") == pytest.approx(0.5)
    assert model.conv1.in_channels == 1
    assert model.training
    record = models.created(model)
    assert record is not None
    assert record.arch == "resnet18"
    assert record.kwargs == {"num_classes": 7, "drop_rate": 0.25, "drop_path_rate": 0.5, "in_chans": 1}
    assert models.created(torch.compile(model)) is record
    assert models.created(nn.Linear(2, 2)) is None


def test_what_is_not_said_is_the_models_own() -> None:
    swin = models.create("test_vit")
    assert swin.num_classes == 1000
    record = models.created(swin)
    assert record is not None
    assert record.kwargs == {}


def test_the_record_is_enough_to_create_the_model_again() -> None:
    model = models.create("test_vit", num_classes=5, image_size=64)
    record = models.created(model)
    assert record is not None
    again = models.create(record.arch, kwargs=record.kwargs)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert models.input_size(again) == (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "has no model 'resnet5O'. Did you mean 'resnet50'"),
        ("ResNet50", "Did you mean 'resnet50'"),
        ("resnet50.a9_in1k", "resnet50 has no pretrained tag 'a9_in1k' .*Did you mean 'resnet50"),
        ("resnet50.", "resnet50 has no pretrained tag ''"),
        ("hf-hub:timm/resnet50", "not a timm model name"),
        ("xyzzyxyzzy", "has no model 'xyzzyxyzzy'"),
        ("", "has no model ''"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        models.create(name)
    one_line(caught)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (TINY, {"kwargs": {"widht": 3}}, r"takes no argument 'widht'"),
        ("test_vit", {"kwargs": {"depth": "many"}}, "test_vit"),
        ("vgg11", {"drop_path_rate": 0.1}, "vgg11 takes no argument 'drop_path_rate'"),
        (TINY, {"num_classes": 3, "kwargs": {"num_classes": 4}}, "num_classes is 3 and, in its kwargs, 4"),
        (TINY, {"kwargs": {"checkpoint_path": "x"}}, "'checkpoint_path' cannot be among"),
        (TINY, {"pretrained": True, "init": Path("x")}, "pretrained and init exclude each other"),
        (
            "test_vit",
            {"image_size": 64, "kwargs": {"img_size": 32}},
            "image_size is 64 and, in its kwargs, img_size 32",
        ),
    ],
)
def test_arguments_that_cannot_be(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        models.create(name, **arguments)
    one_line(caught)


@pytest.mark.parametrize("name", ["vgg11", "ghostnet_050", "densenet121"])
def test_no_stochastic_depth_is_what_models_without_it_have(name: str) -> None:
    with torch.device("meta"):
        model = models.create(name, drop_path_rate=0.0)
    record = models.created(model)
    assert record is not None
    assert record.kwargs == {}


def test_zero_stochastic_depth_overrides_the_models_own() -> None:
    def deepest(**kwargs: Any) -> list[float]:
        with torch.device("meta"):
            swin = models.create("swin_tiny_patch4_window7_224", **kwargs)
        return [m.drop_prob for m in swin.modules() if type(m).__name__ == "DropPath"]

    assert max(deepest()) == pytest.approx(0.1)
    assert not any(deepest(drop_path_rate=0.0))


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs", "img_size"),
    [
        ("vit_tiny_patch16_224", 96, {}, 96),
        ("vit_tiny_patch16_224", 224, {}, None),
        ("vit_tiny_patch16_224", 0, {}, None),
        ("vit_tiny_patch16_224", 96, {"img_size": [96, 96]}, [96, 96]),
        ("vit_tiny_patch16_224", 96, {"dynamic_img_size": True}, None),
        ("swin_tiny_patch4_window7_224", 256, {}, 256),
        ("levit_128", 128, {}, 128),
        ("resnet18", 64, {}, None),
        ("convnext_atto", 96, {}, None),
    ],
)
def test_image_size_reaches_models_that_are_built_for_one(
    name: str, image_size: int, kwargs: Mapping[str, Any], img_size: object
) -> None:
    from lbc_cli.flops import count

    with torch.device("meta"):
        model = models.create(name, image_size=image_size, kwargs=kwargs)
    record = models.created(model)
    assert record is not None
    assert record.kwargs.get("img_size") == img_size
    side = image_size or 224
    assert models.input_size(model) == (3, side, side)
    count(model, models.input_size(model))  # raises if the model does not run at that size


def test_data_config() -> None:
    config = models.data_config(models.create("vit_tiny_patch16_224"))
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert {"interpolation", "std", "crop_pct", "crop_mode"} < set(config)
    gray = models.create(TINY, image_size=32, kwargs={"in_chans": 1})
    assert models.input_size(gray) == (1, 32, 32)
    assert models.input_size(gray, 48) == (1, 48, 48)
    assert gray.pretrained_cfg["input_size"] == (3, 160, 160)
    assert models.data_config(nn.Linear(2, 2))["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("resnet50", "resnet"),
        ("resnet50.a1_in1k", "resnet"),
        ("deit_tiny_patch16_224", "deit"),
        ("vit_tiny_patch16_224", "vision_transformer"),
        ("convnext_atto", "convnext"),
    ],
)
def test_family(name: str, family: str) -> None:
    assert models.family(name) == family


def test_family_of_an_unknown_name() -> None:
    with pytest.raises(ModelError, match="Did you mean"):
        models.family("resnet5O")


def test_init_from_a_file_and_from_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = tiny()
    path = tmp_path / "start.safetensors"
    save_file(start.state_dict(), path)
    for init in (path, start.state_dict()):
        loaded = tiny(init=init)
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in start.state_dict().items())
    without_counters = {k: v for k, v in start.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert torch.equal(tiny(init=without_counters).fc.weight, start.fc.weight)


def test_init_reads_through_the_given_reader() -> None:
    state = tiny().state_dict()
    asked: list[Path] = []

    def read(path: Path) -> Mapping[str, Tensor]:
        asked.append(path)
        return state

    loaded = tiny(init=Path("packed.safetensors"), read=read)
    assert asked == [Path("packed.safetensors")]
    assert torch.equal(loaded.fc.weight, state["fc.weight"])


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != "conv1.0.weight"}


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{k}": v for k, v in state.items()}


def _reshaped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "conv1.0.weight": torch.zeros(1, 2)}


def _more_classes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    width = state["fc.weight"].shape[1]
    return {**state, "fc.weight": torch.zeros(1000, width), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"missing conv1\.0\.weight"),
        (_prefixed, r"missing conv1.* and \d+ more; unexpected module\..* and \d+ more"),
        (_reshaped, r"conv1\.0\.weight is \[1, 2\] there and \[\d+, 3, 3, 3\] in the model$"),
        (lambda state: _without(_more_classes(state)), r"and \[5\] in the model$"),  # the classes are not all of it
        (_more_classes, r"fc\.weight is \[1000, \d+\] there and \[5, \d+\] in the model.*another number of classes"),
    ],
)
def test_init_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(change(tiny().state_dict()), path)
    with pytest.raises(ModelError, match=message) as caught:
        tiny(init=path)
    assert str(path) in one_line(caught)


def test_weights_that_do_not_fit_leave_the_model_alone() -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError):
        models.load_weights(model, {k: v + 1 for k, v in _without(before).items()}, "these")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_init_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.safetensors: no such weight file"):
        tiny(init=tmp_path / "absent.safetensors")
    pickled = tmp_path / "weights.pth"
    torch.save(tiny().state_dict(), pickled)
    with pytest.raises(ModelError, match=r"weights\.pth cannot be read as safetensors .*save_file") as caught:
        tiny(init=pickled)
    one_line(caught)


def test_pretrained_where_there_are_no_weights() -> None:
    import timm

    trained = {name.partition(".")[0] for name in timm.list_pretrained()}
    name = next(name for name in timm.list_models("vit_*") if name not in trained)
    with pytest.raises(ModelError, match=f"timm has no pretrained weights for {name}: give init a file") as caught:
        models.create(name, pretrained=True)
    one_line(caught)


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.models._builder as builder

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the Hub\nand more lines")

    monkeypatch.setattr(builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(
        ModelError, match=r"pretrained weights for test_resnet \(OSError: We couldn't connect"
    ) as caught:
        models.create(TINY, pretrained=True)
    assert "check the network, or give init a file" in one_line(caught)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set, .*; unset it, or name another"):
        models.create(TINY, pretrained=True, instead="name another")


def test_the_hubs_retries_are_not_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import timm.models._builder as builder

    logger = logging.getLogger("huggingface_hub.utils._http")
    level = logger.getEffectiveLevel()

    def unreachable(*_: object, **__: object) -> None:
        logger.warning("Retrying in 8s [Retry 5/5].")
        raise OSError("no route")

    monkeypatch.setattr(builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(ModelError, match="no route"):
        models.create(TINY, pretrained=True)
    assert not caplog.records
    assert logger.getEffectiveLevel() == level


def test_pretrained_weights_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.models._builder as builder

    state = models.create(TINY).state_dict()
    monkeypatch.setattr(builder, "load_state_dict_from_hf", lambda *_, **__: dict(state))
    assert torch.equal(models.create(TINY, pretrained=True).fc.weight, state["fc.weight"])
    smaller = models.create(TINY, pretrained=True, num_classes=5)
    assert smaller.fc.out_features == 5
    assert torch.equal(smaller.conv1[0].weight, state["conv1.0.weight"])


def _broken_torchvision(folder: Path, code: str) -> None:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(code)


@pytest.mark.parametrize(
    "code",
    [
        'raise RuntimeError("operator torchvision::nms does not exist\\nmore")',
        'raise RuntimeError("PyTorch and torchvision were compiled with different CUDA major versions")',
        'raise ImportError("undefined symbol: _ZN3c10")',
    ],
)
def test_a_torchvision_that_does_not_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    from importlib import metadata

    _broken_torchvision(tmp_path, code)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="pip install --upgrade torch torchvision") as caught:
        tiny()
    message = one_line(caught)
    pair = f"torchvision {metadata.version('torchvision')} does not match torch {metadata.version('torch')}"
    assert message.startswith(pair)


def test_the_torchvision_check_comes_before_timm(tmp_path: Path) -> None:
    _broken_torchvision(tmp_path, 'raise RuntimeError("operator torchvision::nms does not exist")')
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lbc_cli import models\n"
        "assert 'timm' not in sys.modules\n"
        "try:\n    models.create('resnet18')\n"
        "except models.ModelError as error:\n    print(error)\n"
        "assert 'timm' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not match torch" in done.stdout
    assert "torchvision::nms" in done.stdout


def test_a_missing_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(models, "_version", lambda package: "" if package == "torchvision" else "2.0")
    with pytest.raises(ModelError, match="torchvision is missing"):
        models.check_torchvision()
