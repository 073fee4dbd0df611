"""The sparse runtime on its reference back end: the modules, padding and choices that run on a GPU, without the GPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli import runtime
from lbc_cli.checkpoint import save
from lbc_cli.errors import ModelError, TargetError, UsageError
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.runtime.backends import Cutlass, Reference
from lbc_cli.runtime.executors import EXECUTORS, Products, choose_executors, usable_executors
from lbc_cli.runtime.layers import SparseConv2d, SparseLinear
from lbc_cli.runtime.matrix import Geometry, patches, shifts, weight_from_matrix, weight_matrix
from lbc_cli.runtime.prepare import Prepared, prepare
from lbc_cli.runtime.trace import trace
from lbc_cli.targets import find_targets
from tests.checkpoints import FakePruner

CPU = torch.device("cpu")
REFERENCE = [EXECUTORS["reference"]]
PATTERNS = ("2:4", "1:4", "2:8", "1:16", "4:8", "3:8")
# Families that differ in how they call their layers; names with a size run at that many pixels.
MODELS = {
    "resnet10t": 64, "resnet18": 64, "test_resnet": 0, "test_vit": 0, "test_efficientnet": 0, "dla34": 64,
    "mobilenetv3_small_050": 64, "tf_efficientnet_b0": 64, "convnext_atto": 64, "swin_tiny_patch4_window7_224": 0,
    "swinv2_cr_tiny_ns_224": 0, "deit_tiny_patch16_224": 0, "levit_128s": 0, "mobilevit_xxs": 64,
    "xcit_nano_12_p16_224": 0, "regnety_002": 64, "mixer_s32_224": 0, "poolformer_s12": 64, "ghostnet_050": 64,
    "densenet121": 64,
}  # fmt: skip


def sparse(shape: tuple[int, ...], pattern: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return weight.masked_fill(~magnitude_mask(weight, Pattern.parse(pattern)), 0)


def pruned(name: str, pattern: str, dtype: torch.dtype, **kwargs: Any) -> tuple[nn.Module, dict[str, Pattern]]:
    """A timm model with random weights, random batch-norm statistics and magnitude masks."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    targets = find_targets(model, Pattern.parse(pattern)).targets
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # heads and gates that begin with zeros would hide everything before them
                parameter.normal_(std=0.05)
        for target in targets:
            target.weight.masked_fill_(~magnitude_mask(target.weight, target.pattern), 0)
    return model, {target.name: target.pattern for target in targets}


def sample_for(model: nn.Module, pixels: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index, misc, union-attr]
    size = (pixels, pixels) if pixels else (height, width)
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


# Matrices.


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([4, 8, 12]),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_convolutions_as_products(
    channels: int, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    weight = torch.randn(5, channels, *kernel, dtype=torch.float64)
    geometry = Geometry(kernel, stride, padding, dilation)
    expected = functional.conv2d(images, weight, None, stride, padding, dilation)
    assert geometry.output(*size) == tuple(expected.shape[2:])
    rows = expected.permute(0, 2, 3, 1).reshape(-1, 5)
    matrix = weight_matrix(weight)
    torch.testing.assert_close(patches(images, geometry) @ matrix.t(), rows, rtol=1e-12, atol=1e-12)
    parts = zip(shifts(images, geometry), torch.split(matrix, channels, dim=1), strict=True)
    torch.testing.assert_close(sum(part @ w.t() for part, w in parts), rows, rtol=1e-12, atol=1e-12)


def test_groups_of_a_convolution_stay_together() -> None:
    weight = sparse((3, 8, 3, 3), "2:4")
    matrix = weight_matrix(weight)
    assert ((matrix.reshape(3, -1, 4) != 0).sum(-1) <= 2).all()
    unfold_order = weight.reshape(3, -1)
    assert not ((unfold_order.reshape(3, -1, 4) != 0).sum(-1) <= 2).all()
    assert torch.equal(weight_from_matrix(matrix, (3, 8, 3, 3)), weight)


def test_a_pointwise_convolution_is_a_view() -> None:
    images = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    rows = patches(images, Geometry((1, 1), (1, 1), (0, 0), (1, 1)))
    assert rows.data_ptr() == images.data_ptr()


# Layers.


@pytest.mark.parametrize("multiples", [(16, 16), (32, 64)])
@pytest.mark.parametrize(("out", "inputs"), [(1000, 36), (7, 20), (32, 64)])
def test_linear_layers_of_odd_sizes(out: int, inputs: int, multiples: tuple[int, int]) -> None:
    weight, bias = sparse((out, inputs), "2:4"), torch.randn(out, dtype=torch.float64)
    layer = SparseLinear(weight, bias, Reference(multiples=multiples))
    assert layer.operand.rows % multiples[0] == layer.operand.columns % multiples[1] == 0
    images = torch.randn(2, 3, inputs, dtype=torch.float64)
    torch.testing.assert_close(layer(images), functional.linear(images, weight, bias), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.dense_weight(), weight)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("form", ["im2col", "shifts"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_convolutions_of_odd_sizes(form: Any, pattern: str) -> None:
    weight, bias = sparse((10, 12, 3, 3), pattern), torch.randn(10, dtype=torch.float64)
    geometry = Geometry((3, 3), (2, 1), (1, 2), (1, 2))
    layer = SparseConv2d(weight, bias, Reference(Pattern.parse(pattern)), geometry, form)
    images = torch.randn(2, 12, 9, 11, dtype=torch.float64).to(memory_format=torch.channels_last)
    expected = functional.conv2d(images, weight, bias, (2, 1), (1, 2), (1, 2))
    torch.testing.assert_close(layer(images), expected, rtol=1e-12, atol=1e-12)
    assert layer(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.dense_weight(), weight)


def test_a_bias_is_added_once_over_all_shifts() -> None:
    layer = SparseConv2d(
        torch.zeros(4, 4, 3, 3), torch.ones(4), Reference(), Geometry((3, 3), (1, 1), (1, 1), (1, 1)), "shifts"
    )
    assert torch.equal(layer(torch.randn(1, 4, 5, 5)), torch.ones(1, 4, 5, 5))


def test_compressed_weights_take_half_and_positions() -> None:
    layer = SparseLinear(sparse((64, 64), "2:4", torch.float32), None, Reference())
    assert layer.stored_bytes() == 64 * 32 * (4 + 1)


# Whole models.


def check_model(name: str, pixels: int, pattern: str, dtype: torch.dtype, limit: float) -> Prepared:
    model, patterns = pruned(name, pattern, dtype)
    sample = sample_for(model, pixels, dtype, batch=2)
    with torch.inference_mode():
        expected = model(sample)
    prepared = prepare(model, patterns, sample[:1])
    converted, report = prepared.sparse(REFERENCE, dtype=dtype, device=CPU)
    with torch.inference_mode():
        assert relative(converted(sample.to(memory_format=torch.channels_last)), expected) <= limit
        assert relative(prepared.dense(dtype=dtype, device=CPU)(sample), expected) <= limit
    assert sum(entry.variant != "dense" for entry in report) > 0
    assert all(bool(entry.reason) == (entry.variant == "dense") for entry in report)
    return prepared


@pytest.mark.parametrize(
    ("name", "pattern"), [(name, PATTERNS[number % len(PATTERNS)]) for number, name in enumerate(MODELS)]
)
def test_outputs_are_those_of_the_dense_model(name: str, pattern: str) -> None:
    check_model(name, MODELS[name], pattern, torch.float64, 1e-12)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_efficientnet", "convnext_atto"])
def test_outputs_in_float32(name: str) -> None:
    check_model(name, MODELS[name], "2:4", torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pattern"), list(itertools.product(MODELS, PATTERNS)))
def test_every_model_with_every_pattern(name: str, pattern: str) -> None:
    """All 20 models x 6 patterns in both types: `pytest -m slow tests/test_runtime.py`."""
    check_model(name, MODELS[name], pattern, torch.float64, 1e-12)
    check_model(name, MODELS[name], pattern, torch.float32, 1e-5)


def test_every_batch_norm_of_a_resnet_is_folded() -> None:
    prepared = check_model("resnet18", 64, "2:4", torch.float64, 1e-12)
    assert len(prepared.folded) == 20
    assert not [m for m in prepared.model.modules() if isinstance(m, nn.BatchNorm2d)]
    weight = prepared.model.get_submodule("layer1.0.conv1").weight
    assert isinstance(weight, Tensor)
    zeros = weight[weight == 0]
    assert zeros.numel() == weight.numel() // 2
    assert not torch.signbit(zeros).any()


class Branching(nn.Module):
    """A convolution whose result goes into a norm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 1)
        self.shared = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv(images)
        second = self.norm(first) + first
        return self.shared(self.again(second)) + self.shared(self.again(first))


def test_a_norm_is_folded_only_where_nothing_else_reads_the_convolution() -> None:
    model = Branching().eval().double()
    sample = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    seen = trace(model, sample)
    assert sorted(seen.uses["conv"].consumers) == ["", "again", "norm"]
    assert seen.uses["again"].calls == 2
    prepared = prepare(model, {}, sample)
    assert prepared.folded == []
    assert torch.equal(prepared.model(sample), model(sample))


def test_the_model_given_is_not_changed() -> None:
    model, patterns = pruned("test_resnet", "2:4", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare(model.train(), patterns, sample_for(model, 0, torch.float32))
    prepared.sparse(REFERENCE, dtype=torch.float64, device=CPU)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_stays_dense_says_why() -> None:
    model, patterns = pruned("regnety_002", "2:4", torch.float32)
    prepared = prepare(model, patterns, sample_for(model, 64, torch.float32))
    _, report = prepared.sparse(REFERENCE, dtype=torch.float32, device=CPU)
    reasons = {entry.name: entry.reason for entry in report}
    assert reasons["stem.conv"] == "3 input channels: not a multiple of 4"
    assert reasons["head.fc"] == "its weights are dense"
    assert reasons["s2.b1.conv2.conv"] == "grouped convolution: 7 groups"
    assert reasons["s2.b1.conv1.conv"] == ""


def test_weights_read_by_a_functional_call_stay_dense() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, images: Tensor) -> Tensor:
            return functional.linear(images, self.inner.weight, self.inner.bias)

    odd = Odd().eval()
    layers = prepare(odd, {"inner.weight": Pattern(2, 4)}, torch.randn(1, 8)).layers()
    assert [layer.reason for layer in layers] == ["its weight is used outside of its layer"]


def test_only_24_goes_through_24_kernels() -> None:
    executor = Products(Cutlass())
    for pattern, fits in {"2:4": True, "1:4": True, "2:8": True, "1:16": True, "4:8": False, "3:4": False}.items():
        model, patterns = nn.Sequential(nn.Linear(32, 16, bias=False)), {"0.weight": Pattern.parse(pattern)}
        with torch.no_grad():
            weight = torch.zeros(16, 32)
            first = Pattern.parse(pattern)
            weight.reshape(16, -1, first.m)[..., : first.n] = 1  # the first N of every group: 4:8 then has 4 of 4
            model[0].weight.copy_(weight)
        layer = prepare(model, patterns, torch.randn(1, 32)).layers()[0]
        assert (executor.obstacle(layer) == "") is fits, pattern


def test_choices_are_obeyed_or_refused() -> None:
    model, patterns = pruned("test_resnet", "2:4", torch.float32)
    prepared = prepare(model, patterns, sample_for(model, 0, torch.float32))
    name = next(layer.name for layer in prepared.layers() if not layer.reason and layer.shape[2:] == (3, 3))
    _, report = prepared.sparse(REFERENCE, dtype=torch.float32, device=CPU, choices={name: "reference:shifts"})
    assert {entry.variant for entry in report if entry.name == name} == {"reference:shifts"}
    converted, report = prepared.sparse(REFERENCE, dtype=torch.float32, device=CPU, choices={name: "dense"})
    assert {entry.reason for entry in report if entry.name == name} == {"measured: dense is faster"}
    assert isinstance(converted.get_submodule(name), nn.Conv2d)
    with pytest.raises(TargetError, match="cannot run as 'reference:matrix': it has dense, reference:im2col"):
        prepared.sparse(REFERENCE, dtype=torch.float32, device=CPU, choices={name: "reference:matrix"})
    with pytest.raises(TargetError, match="the model has no such layer"):
        prepared.sparse(REFERENCE, dtype=torch.float32, device=CPU, choices={"nowhere": "dense"})


def test_a_sample_that_does_not_fit_is_refused() -> None:
    model, patterns = pruned("test_vit", "2:4", torch.float32)
    with pytest.raises(ModelError, match=r"does not take images of \[1, 3, 50, 50\]"):
        prepare(model, patterns, torch.randn(1, 3, 50, 50))


def test_converted_models_compile_without_a_break() -> None:
    model, patterns = pruned("test_resnet", "2:4", torch.float32)
    sample = sample_for(model, 0, torch.float32)
    converted, _ = prepare(model, patterns, sample).sparse(REFERENCE, dtype=torch.float32, device=CPU)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert relative(compiled(sample), converted(sample)) <= 1e-6


# Back ends.


def test_without_a_gpu_no_sparse_kernel_is_claimed() -> None:
    assert usable_executors(CPU, torch.float16) == []
    assert {executor.name for executor in usable_executors(CPU, torch.bfloat16)} <= {"cpu"}
    with pytest.raises(
        UsageError, match=r"needs a CUDA device with sparse tensor cores, not cpu; .*reference runs any"
    ):
        choose_executors("semi-structured", CPU, torch.bfloat16)
    with pytest.raises(UsageError, match=r"unknown runtime 'semi_structured'.*Did you mean 'semi-structured'"):
        choose_executors("semi_structured", CPU, torch.bfloat16)
    with pytest.raises(UsageError, match="runtime reference has no back end 'cutlass'"):
        choose_executors("reference", CPU, torch.float32, "cutlass")


# Loading.


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    model, patterns = pruned("test_resnet", "1:4", torch.float32, num_classes=10)
    save(model, tmp_path / "m.safetensors", pruner=FakePruner(model, {name: str(p) for name, p in patterns.items()}))
    return tmp_path / "m.safetensors"


def test_a_checkpoint_becomes_a_model_that_executes_it(packed: Path) -> None:
    dense = runtime.load(packed)
    converted = runtime.load(packed, runtime="reference")
    sample = sample_for(dense, 0, torch.float32)
    with torch.inference_mode():
        assert relative(converted(sample), dense(sample)) <= 1e-5
    assert runtime.executed(dense) == ()
    variants = [entry.variant for entry in runtime.executed(converted)]
    assert variants.count("dense") == 2
    half = runtime.load(packed, runtime="reference", dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_options_that_need_a_runtime_are_refused_without_one(packed: Path) -> None:
    with pytest.raises(UsageError, match="backend needs a runtime"):
        runtime.load(packed, backend="cutlass")
    with pytest.raises(UsageError, match="cannot run here"):
        runtime.load(packed, runtime="semi-structured")


def test_a_dense_model_has_nothing_to_execute(tmp_path: Path) -> None:
    save(timm.create_model("test_resnet"), tmp_path / "d.safetensors")
    with pytest.raises(UsageError, match="none of its weights is sparse"):
        runtime.load(tmp_path / "d.safetensors", runtime="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_on_a_gpu_outputs_are_those_of_the_dense_model(name: str, backend: str) -> None:
    device = torch.device("cuda")
    if reason := EXECUTORS[backend].why_not(device, torch.float16):
        pytest.skip(reason)
    model, patterns = pruned(name, "2:4", torch.float32)
    sample = sample_for(model, 0, torch.float32, batch=8)
    prepared = prepare(model, patterns, sample[:1])
    images = sample.to(device, torch.float16).to(memory_format=torch.channels_last)
    converted, report = prepared.sparse([EXECUTORS[backend]], dtype=torch.float16, device=device)
    with torch.inference_mode():
        expected = prepared.dense(dtype=torch.float16, device=device)(images)
        assert relative(converted(images).float(), expected.float()) <= 2e-2
        compiled = torch.compile(converted, fullgraph=True)
        assert relative(compiled(images).float(), expected.float()) <= 2e-2
    assert {entry.variant.partition(":")[0] for entry in report} == {backend, "dense"}
    for entry in report:
        if entry.variant != "dense":
            layer = converted.get_submodule(entry.name)
            expected_weight = prepared.model.get_submodule(entry.name).weight.to(device, torch.float16)
            assert torch.equal(layer.weight, expected_weight)
