"""ONNX exports: the graph against onnxruntime and torch, its initializers against the checkpoint, TensorRT's advice."""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lbc_cli import checkpoint, models
from lbc_cli.errors import UsageError, VerificationError
from lbc_cli.exports import ExportOptions, ExportResult, export, onnx_graph, tensorrt
from lbc_cli.exports import onnx as format_onnx
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.targets import find_targets
from lbc_cli.verifier import verify
from lbc_cli.verifier.onnx import onnx_contents
from tests.checkpoints import FakePruner, small_checkpoint

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# A ResNet of bottlenecks with grouped 3x3 convolutions, small enough to export in seconds.
GROUPED = {"layers": [1, 1, 1, 1], "channels": [64, 64, 64, 64], "cardinality": 4, "base_width": 32, "num_classes": 5}
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "num_classes": 2}
SIDE = 64


@dataclass
class Exported:
    model: nn.Module
    source: Path
    path: Path
    result: ExportResult

    @property
    def graph(self) -> Any:
        return onnx.load(self.path).graph

    @property
    def initializers(self) -> dict[str, Any]:
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self.graph.initializer}


def sparse_model(name: str, pattern: str, **kwargs: Any) -> tuple[nn.Module, FakePruner]:
    """A model whose norms have statistics, so that they matter, and a pruner that has masked it."""
    torch.manual_seed(0)
    model = models.create(name, kwargs=kwargs).eval()
    for buffer, tensor in model.named_buffers():
        if buffer.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif buffer.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return model, FakePruner(
        model, {t.name: str(t.pattern) for t in find_targets(model, Pattern.parse(pattern)).targets}
    )


def saved(folder: Path, name: str, pattern: str, side: int = SIDE, **kwargs: Any) -> tuple[nn.Module, Path]:
    model, pruner = sparse_model(name, pattern, **kwargs)
    pixels = {"channels": 3, "height": side, "width": side, "mean": [0.1, 0.2, 0.3]}
    checkpoint.save(model, folder / "m.safetensors", pruner=pruner, metrics={"pixels": pixels})  # type: ignore[arg-type]
    return model, folder / "m.safetensors"


def exported(folder: Path, name: str, pattern: str, dtype: str | None = None, **kwargs: Any) -> Exported:
    model, source = saved(folder, name, pattern, **kwargs)
    result = export(source, "onnx", folder / "m.onnx", options=ExportOptions(dtype))
    return Exported(model, source, folder / "m.onnx", result)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("resnet"), "test_resnet", "2:4")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("vit"), "test_vit", "2:4", "float16", img_size=SIDE)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("grouped"), "resnext50_32x4d", "4:8", **GROUPED)


DIFFERENCE = "largest logit difference, relative to the largest logit"


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_initializers_are_the_parameters_bit_for_bit(resnet: Exported) -> None:
    found = resnet.initializers
    for name, tensor in resnet.model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert found[name].tobytes() == tensor.numpy().tobytes(), name
    assert verify(resnet.path, layers={"*": "2:4", "fc": "dense"}, against=resnet.source).ok
    counted = resnet.result.verified.against or {}
    assert (counted["equal"], counted["different"], counted["missing"]) == (counted["tensors"], 0, 0)
    assert counted["digest"]


def test_the_verifier_names_one_changed_bit(resnet: Exported, tmp_path: Path) -> None:
    model = onnx.load(resnet.path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "layer2.0.conv1.weight"]
    data = bytearray(tensor.raw_data)
    data[-1] ^= 1
    tensor.raw_data = bytes(data)
    onnx.save(model, tmp_path / "m.onnx")
    findings = verify(tmp_path / "m.onnx", against=resnet.source).findings
    assert [(finding.rule, finding.tensor, finding.count) for finding in findings] == [("against", tensor.name, 1)]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_gives_torchs_logits(resnet: Exported, batch: int) -> None:
    images = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        expected = resnet.model(images)
    found = logits(resnet.path, images)
    assert found.shape == expected.shape == (batch, 1000)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_the_result_tells_what_was_measured(resnet: Exported, vit: Exported, grouped: Exported) -> None:
    for made in (resnet, grouped):
        assert 0 <= float(made.result.checks[DIFFERENCE]) < 1e-5
        assert made.result.bytes == made.path.stat().st_size
        assert made.result.verified.ok
        assert len(made.result.layers) == len(made.result.verified.layers) > 4
    assert 0 < float(vit.result.checks[DIFFERENCE]) < 5e-3


def test_the_graph_is_stated_and_plain(resnet: Exported) -> None:
    model = onnx.load(resnet.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    (images,), (out,) = model.graph.input, model.graph.output
    dims = [axis.dim_param or axis.dim_value for axis in images.type.tensor_type.shape.dim]
    assert (images.name, dims[1:], out.name) == ("images", [3, SIDE, SIDE], "logits")
    assert isinstance(dims[0], str)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Conv", "BatchNormalization", "Gemm"} <= kinds
    assert not kinds & {"CastLike", "Expand"}, "what the exporter leaves behind and no runtime needs"
    assert f"opset 18, float32, images [batch, 3, {SIDE}, {SIDE}]" in resnet.result.notes


def test_nothing_tells_where_it_was_made(resnet: Exported, vit: Exported) -> None:
    for made in (resnet, vit):
        content = made.path.read_bytes()
        for trace in (b"site-packages", b".py", str(Path.home()).encode(), str(made.path.parent).encode()):
            assert trace not in content


def test_metadata_say_what_it_is(resnet: Exported) -> None:
    held = {entry.key: entry.value for entry in onnx.load(resnet.path).metadata_props}
    assert set(held) == {"lbc.model", "lbc.manifest", "lbc.patterns", "lbc.preprocessing"}
    assert held["lbc.model"] == "test_resnet"
    assert held["lbc.manifest"] == verify(resnet.source).digest
    assert json.loads(held["lbc.patterns"])["layer2.0.conv1.weight"] == "2:4"
    preprocessing = json.loads(held["lbc.preprocessing"])
    assert preprocessing["mean"] == [0.1, 0.2, 0.3], "what the checkpoint was trained with"
    assert set(preprocessing) == {"mean", "std", "interpolation", "crop_pct", "crop_mode"}


def test_the_same_checkpoint_gives_the_same_bytes(resnet: Exported, tmp_path: Path) -> None:
    again = export(resnet.source, "onnx", tmp_path / "again.onnx", options=ExportOptions(check=False))
    assert again.path.read_bytes() == resnet.path.read_bytes()
    assert again.checks == {}


def test_float16_is_typed_throughout(vit: Exported) -> None:
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    inferred = onnx.shape_inference.infer_shapes(onnx.load(vit.path), strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.output)}
    assert kinds == {"images": half, "logits": half}
    assert {tensor.data_type for tensor in inferred.initializer} & {half, single} == {half}
    # The model itself resizes its position embedding in float32, once for all images.
    typed = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    heavy = ("Conv", "Gemm", "MatMul", "LayerNormalization", "Softmax", "Add")
    assert {typed[node.output[0]] for node in inferred.node if node.op_type in heavy} == {half}
    for name, tensor in vit.model.state_dict().items():
        assert vit.initializers[name].tobytes() == tensor.half().numpy().tobytes()
    assert [(f.rule, f.level) for f in vit.result.verified.findings] == [("rounded", "warning")]
    assert any("rounded from float32 to float16" in note for note in vit.result.notes)


def test_linear_weights_are_found_through_transpose(vit: Exported) -> None:
    assert {node.op_type for node in vit.graph.node} >= {"MatMul", "Transpose"}
    weights = {content.name: content.shape for content in onnx_contents(vit.path) if content.weight}
    assert weights["blocks.0.attn.qkv.weight"] == (192, 64)
    assert weights["head.weight"] == (1000, 64)
    assert set(weights) == {name for name, p in vit.model.named_parameters() if p.dim() > 1 and "token" not in name} - {
        "pos_embed"
    }


def test_grouped_convolutions_and_4_8(grouped: Exported) -> None:
    reasons = {layer.name: (layer.pattern, layer.reason) for layer in grouped.result.layers}
    assert reasons["layer1.0.conv2.weight"] == ("4:8", "grouped convolution: dense in TensorRT")
    assert reasons["layer1.0.conv3.weight"] == ("4:8", "not 2:4: dense in TensorRT")
    assert all(layer.stored == "dense" for layer in grouped.result.layers)
    applies = [note for note in grouped.result.notes if "sparse tactics can apply to" in note]
    assert applies == [
        f"TensorRT's sparse tactics can apply to 0 of {len(reasons)} sparse layers; TensorRT was not run"
    ]
    assert not any(note.startswith("trtexec") for note in grouped.result.notes)


def test_trtexec_lines(resnet: Exported, vit: Exported) -> None:
    (line,) = [note for note in resnet.result.notes if note.startswith("trtexec")]
    assert line.startswith("trtexec --onnx=m.onnx --sparsity=enable --fp16 --minShapes=images:1x3x64x64 ")
    assert any("TensorRT 11" in note for note in resnet.result.notes)
    (typed,) = [note for note in vit.result.notes if note.startswith("trtexec")]
    assert "--stronglyTyped" in typed
    assert "--fp16" not in typed


def test_one_of_four_runs_as_two_of_four(tmp_path: Path) -> None:
    made = exported(tmp_path, "test_resnet", "1:4", num_classes=3)
    assert {layer.pattern for layer in made.result.layers} == {"1:4"}
    assert {layer.reason for layer in made.result.layers} == {"fewer than 256 input channels: seldom pays in TensorRT"}


def test_fits_of_tensorrt() -> None:
    torch.manual_seed(0)

    def sparse(out: int, inputs: int, pattern: str, *kernel: int) -> torch.Tensor:
        weight = torch.randn(out, inputs, *kernel)
        return weight.masked_fill(~magnitude_mask(weight, Pattern.parse(pattern)), 0)

    assert tensorrt.fit(sparse(8, 256, "2:4", 3, 3)) == tensorrt.Fit(True, "")
    assert tensorrt.fit(sparse(8, 256, "2:8")) == tensorrt.Fit(True, "")
    assert tensorrt.fit(sparse(8, 256, "1:16")).possible
    few = tensorrt.fit(sparse(8, 252, "2:4"))
    assert (few.possible, few.why[:15]) == (True, "fewer than 256 ")
    assert "grouped" in tensorrt.fit(sparse(8, 256, "2:4", 1, 1), groups=2).why
    assert "multiple of 4" in tensorrt.fit(sparse(8, 6, "1:3")).why
    crowded = tensorrt.fit(sparse(8, 256, "4:8"))
    assert crowded == tensorrt.Fit(False, "not 2:4: dense in TensorRT")
    wrong_axis = sparse(256, 256, "2:4").T.contiguous()
    assert not tensorrt.fit(wrong_axis).possible
    fits = [tensorrt.Fit(True, ""), few, crowded]
    told = tensorrt.notes(fits, "a.onnx", (3, 8, 9), half=False)
    assert told[0].startswith("TensorRT's sparse tactics can apply to 2 of 3 sparse layers, though in 1 of them")
    assert "--optShapes=images:8x3x8x9" in told[1]


def test_shared_parameters_keep_every_name(tmp_path: Path) -> None:
    """The position encodings of CoaT are one module in several blocks: torch keeps one name, the checkpoint all."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1)
            self.second = nn.Sequential(nn.ReLU(), self.first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(x).mean((2, 3))

    model = Shared().eval()
    program = onnx_graph.trace(model, (4, 5, 6))
    onnx_graph.save(program, tmp_path / "m.onnx", {})
    held = {content.name: b"".join(content.chunks()) for content in onnx_contents(tmp_path / "m.onnx")}
    assert held["first.weight"] == held["second.1.weight"] == model.first.weight.detach().numpy().tobytes()
    assert held["first.bias"] == held["second.1.bias"]
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert {tensor.name for tensor in graph.initializer if "." in tensor.name} == {"first.weight", "first.bias"}
    images = torch.randn(3, 4, 5, 6)
    assert torch.allclose(logits(tmp_path / "m.onnx", images), model(images), atol=1e-6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """The smallest checkpoint there is, for what goes wrong."""
    return saved(tmp_path_factory.mktemp("small"), "resnet18", "2:4", 32, **SMALL)


def test_large_weights_go_beside(
    small: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    result = export(small[1], "onnx", tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert result.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert any("m.onnx.data: keep both" in note for note in result.notes)
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    assert verify(tmp_path / "m.onnx", values_only=True, against=small[1]).ok
    with (tmp_path / "m.onnx.data").open("r+b") as file:
        file.truncate(64)
    assert [finding.rule for finding in verify(tmp_path / "m.onnx", values_only=True).findings] == ["file"]


def test_nothing_is_left_of_what_fails(
    small: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    monkeypatch.setitem(format_onnx.TOLERANCE, "float32", -1.0)
    with pytest.raises(VerificationError, match=r"logits differ from torch's by .* more than -1"):
        export(small[1], "onnx", tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_sees_a_graph_that_computes_something_else(
    small: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model = copy.deepcopy(small[0])
    program = onnx_graph.trace(model, (3, 32, 32))
    onnx_graph.save(program, tmp_path / "m.onnx", {})
    assert onnx_graph.largest_difference(tmp_path / "m.onnx", model, (3, 32, 32)) < 1e-5
    model.get_buffer("bn1.running_mean").add_(0.01)
    assert 1e-4 < onnx_graph.largest_difference(tmp_path / "m.onnx", model, (3, 32, 32)) < 1
    model.get_parameter("fc.bias").data.fill_(float("nan"))
    assert onnx_graph.largest_difference(tmp_path / "m.onnx", model, (3, 32, 32)) == float("inf")


def test_missing_packages_are_named(
    small: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"onnx and onnxscript not installed.*pip install 'lbc-cli\[onnx\]'"):
        export(small[1], "onnx", tmp_path / "m.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(format_onnx, "find_spec", lambda name: None)
    result = export(small[1], "onnx", tmp_path / "m.onnx")
    assert result.checks == {DIFFERENCE: "not measured: onnxruntime is not installed"}


def test_refusals(small: tuple[nn.Module, Path], tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "own.safetensors")
    with pytest.raises(UsageError, match="does not come from a timm model: export it with --format dense"):
        export(tmp_path / "own.safetensors", "onnx")
    with pytest.raises(UsageError, match=r"name the file NAME\.onnx"):
        export(small[1], "onnx", tmp_path / "m.bin")
    with pytest.raises(UsageError, match="bfloat16"):
        export(small[1], "onnx", tmp_path / "m.onnx", options=ExportOptions("bfloat16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.safetensors"]


def test_weights_that_float16_cannot_hold(tmp_path: Path) -> None:
    model, pruner = sparse_model("resnet18", "2:4", **SMALL)
    model.get_buffer("bn1.running_var").fill_(1e6)
    checkpoint.save(model, tmp_path / "m.safetensors", pruner=pruner)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"bn1\.running_var holds 1e\+06, which float16 cannot"):
        export(tmp_path / "m.safetensors", "onnx", options=ExportOptions("float16"))


def test_a_model_that_onnx_cannot_express() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x[:, 0, :2, 0]) if float(x.sum()) > 0 else self.fc(x[:, 0, :2, 1])

    with pytest.raises(UsageError, match=r"cannot express this model in ONNX with a batch of any size: \w+") as caught:
        onnx_graph.trace(Branches().eval(), (3, 4, 4))
    assert "\n" not in str(caught.value)


def test_exports_are_silent(
    small: tuple[nn.Module, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    class Noisy(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("printed")
            warnings.warn("warned", stacklevel=1)
            logging.getLogger("torch.onnx").error("logged")
            sys.stderr.write("written")
            return super().forward(x)

    level = logging.root.manager.disable
    onnx_graph.trace(Noisy(3, 3, 1).eval(), (3, 4, 4))
    export(small[1], "onnx", tmp_path / "m.onnx")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not list(recwarn)
    assert logging.root.manager.disable == level


def test_bfloat16_checkpoints_become_float32_exactly(tmp_path: Path) -> None:
    model, pruner = sparse_model("resnet18", "2:4", **SMALL)
    checkpoint.save(model.to(torch.bfloat16), tmp_path / "m.safetensors", pruner=pruner)  # type: ignore[arg-type]
    made = export(tmp_path / "m.safetensors", "onnx", tmp_path / "m.onnx")
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert held["conv1.weight"].tobytes() == model.get_parameter("conv1.weight").float().detach().numpy().tobytes()
    assert not any("rounded" in note for note in made.notes)


def test_the_module_loads_no_torch() -> None:
    import subprocess

    code = (
        "import sys, lbc_cli.exports.onnx, lbc_cli.verifier.onnx; print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "resnext26ts", "regnetx_002", "mobilenetv3_small_050", "efficientvit_b0", "test_nfnet",
        "test_convnext", "test_byobnet", "test_vit3", "deit_tiny_distilled_patch16_224", "levit_128s", "coat_lite_tiny",
        "swin_tiny_patch4_window7_224", "maxvit_rmlp_pico_rw_256", "mixer_s32_224", "poolformer_s12",
    ],
)  # fmt: skip
def test_families_of_timm(name: str, dtype: str, tmp_path: Path) -> None:
    """About a quarter of an hour: pytest -m slow tests/test_onnx.py."""
    model, pruner = sparse_model(name, "2:4", num_classes=10)
    checkpoint.save(model, tmp_path / "m.safetensors", pruner=pruner)  # type: ignore[arg-type]
    result = export(tmp_path / "m.safetensors", "onnx", options=ExportOptions(dtype))
    assert float(result.checks[DIFFERENCE]) <= format_onnx.TOLERANCE[dtype]
