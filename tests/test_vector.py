"""Vector-wise layers as gathered dense products, on the reference: tables, buffers, layers, executors."""

from __future__ import annotations

import copy
import importlib.util
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
from lbc_cli.errors import PatternError, TargetError, UsageError
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.runtime.executors import EXECUTORS, RUNTIMES, choose_executors
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.matrix import Geometry, weight_matrix
from lbc_cli.runtime.prepare import prepare
from lbc_cli.runtime.vector import VectorWise
from lbc_cli.runtime.vector_layers import VectorConv2d, VectorLinear, reference_product
from lbc_cli.runtime.vector_layout import (
    RUN,
    Layout,
    columns_of,
    image_buffer,
    kept_columns,
    rows_buffer,
    starts,
    steps,
    taps_of,
    tile_weights,
)
from lbc_cli.targets import find_targets
from tests.checkpoints import FakePruner

CPU = torch.device("cpu")
LAYOUTS: tuple[Layout, ...] = ("channels-first", "channels-last")
PATTERNS = ("1:4/64", "2:4/128", "1:16/64", "2:8/64")
CONVOLUTIONS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "1x1": ((1, 1), {}),
    "1x1 stride 2": ((1, 1), {"stride": 2}),
    "1x1 padded": ((1, 1), {"padding": 1}),
    "3x3": ((3, 3), {"padding": 1}),
    "3x3 strided, dilated": ((3, 3), {"stride": 2, "padding": (2, 1), "dilation": (2, 1)}),
    "3x3 uneven": ((3, 3), {"stride": (1, 3), "padding": (0, 2), "dilation": (1, 2)}),
    "1x3": ((1, 3), {"stride": (2, 1)}),
    "3x1": ((3, 1), {"padding": (1, 0), "dilation": (2, 1)}),
    "2x2 patches": ((2, 2), {"stride": 2}),
}


def vector_wise(shape: tuple[int, ...], pattern: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return weight.masked_fill(~magnitude_mask(weight, Pattern.parse(pattern)), 0)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def conv_of(weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Conv2d:
    out, inputs, *kernel = weight.shape
    conv = nn.Conv2d(inputs, out, tuple(kernel), bias=bias is not None, dtype=weight.dtype, **options)
    conv.weight.data.copy_(weight)
    if conv.bias is not None and bias is not None:
        conv.bias.data.copy_(bias)
    return conv.requires_grad_(False)


# What is kept, and where it lies.


@pytest.mark.parametrize("pattern", PATTERNS)
def test_kept_columns_are_those_in_use(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    weight = vector_wise((128, 32, 2, 3), pattern)
    columns = kept_columns(weight, parsed)
    assert columns.shape == (128 // parsed.vector, 6 * 32 * parsed.n // parsed.m)
    for tile, rows in zip(columns, weight_matrix(weight).split(parsed.vector), strict=True):
        assert tile.tolist() == rows.any(dim=0).nonzero()[:, 0].tolist()


def test_groups_not_full_keep_the_lowest_free_columns_too() -> None:
    weight = torch.zeros(64, 8)
    weight[3, 2] = weight[9, 7] = 1
    assert kept_columns(weight, Pattern.parse("2:4/64")).tolist() == [[0, 2, 4, 7]]


def test_weights_that_break_their_pattern_are_refused() -> None:
    weight = vector_wise((64, 8), "2:4/64")
    kept_columns(weight, Pattern.parse("2:4/64"))
    weight[17] = 1  # one row of the vector is enough
    with pytest.raises(PatternError, match=r"\[64, 8\] does not hold 2:4/64"):
        kept_columns(weight, Pattern.parse("2:4/64"))


geometries = st.builds(
    Geometry,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    same=st.booleans(),
)
images = st.tuples(st.integers(0, 3), st.sampled_from([4, 8]), st.integers(7, 19), st.integers(7, 19))


@settings(max_examples=60, deadline=None)
@given(geometry=geometries, shape=images, layout=st.sampled_from(LAYOUTS))
def test_every_kept_column_of_every_pixel_is_found(geometry: Geometry, shape: Any, layout: Layout) -> None:
    """Reading through the tables is im2col; nothing outside of the buffer is read, not for dropped pixels either."""
    batch = noise(*shape)
    kernel_columns = geometry.kernel[0] * geometry.kernel[1] * shape[1]
    every = torch.arange(kernel_columns)[None]
    taps = taps_of(every, shape[1], geometry, layout)
    assert torch.equal(columns_of(taps, shape[1], geometry, layout), every)
    buffer, walk = image_buffer(batch, geometry, layout)
    found = buffer.flatten()[starts(walk, CPU)[:, None] + steps(taps, walk)]
    identity = torch.eye(kernel_columns, dtype=torch.float64).reshape(kernel_columns, *geometry.kernel, shape[1])
    left, right, top, bottom = geometry.pads(*shape[2:])
    padded = functional.pad(batch, (left, right, top, bottom))
    expected = functional.conv2d(padded, identity.movedim(3, 1), None, geometry.stride, 0, geometry.dilation)
    assert torch.equal(found, expected.permute(0, 2, 3, 1).reshape(-1, kernel_columns))
    computed = starts(walk._replace(width=walk.pitch), CPU)
    if len(computed):
        assert int(computed.max() + steps(taps, walk).max()) < buffer.numel()


@settings(max_examples=40, deadline=None)
@given(geometry=geometries, shape=images)
def test_runs_of_pixels_are_aligned_and_side_by_side(geometry: Geometry, shape: Any) -> None:
    """What the compiler is told about channels-first buffers: it reads RUN elements at once on the strength of it."""
    every = torch.arange(geometry.kernel[0] * geometry.kernel[1] * shape[1])[None]
    _, walk = image_buffer(noise(*shape), geometry, "channels-first")
    assert walk.run == RUN
    runs = starts(walk._replace(width=walk.pitch), CPU).reshape(-1, RUN)
    assert torch.equal(runs - runs[:, :1], torch.arange(RUN).expand_as(runs))
    assert not (runs[:, 0] % RUN).any()
    assert not (steps(taps_of(every, shape[1], geometry, "channels-first"), walk) % RUN).any()


def test_rows_lie_as_they_are_or_turned() -> None:
    rows = noise(13, 8)
    last, walk = rows_buffer(rows, "channels-last")
    assert last.data_ptr() == rows.data_ptr()
    assert walk.pixels == walk.computed == 13
    first, walk = rows_buffer(rows, "channels-first")
    assert first.shape == (8, 16)
    assert torch.equal(first[:, :13], rows.t())
    assert (walk.pixels, walk.computed) == (13, 16)


def test_channels_last_images_are_not_copied_where_nothing_is_padded() -> None:
    batch = noise(2, 8, 5, 5).to(memory_format=torch.channels_last)
    buffer, _ = image_buffer(batch, Geometry((3, 3), (1, 1), (0, 0), (1, 1)), "channels-last")
    assert buffer.data_ptr() == batch.data_ptr()


def test_weights_of_a_tile_are_the_right_hand_side_of_its_product() -> None:
    taken = tile_weights(torch.arange(8.0).reshape(2, 4), torch.tensor([[1, 2]]))
    assert taken.tolist() == [[[1, 5], [2, 6]]]


# Layers on the reference.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("leading", [(1,), (2, 7), (3, 1, 5)])
def test_linear_layers(pattern: str, layout: Layout, leading: tuple[int, ...]) -> None:
    weight, bias = vector_wise((384, 48), pattern), noise(384)
    layer = VectorLinear(weight, bias, Pattern.parse(pattern), reference_product, layout)
    inputs = noise(*leading, 48)
    torch.testing.assert_close(layer(inputs), functional.linear(inputs, weight, bias), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.dense_weight(), weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, pattern: str, layout: Layout) -> None:
    kernel, options = CONVOLUTIONS[name]
    conv = conv_of(vector_wise((128, 32, *kernel), pattern), noise(128), **options)
    layer = VectorConv2d(conv.weight, conv.bias, Pattern.parse(pattern), reference_product, layout, Geometry.of(conv))
    batch = noise(3, 32, 9, 11)
    result = layer(batch)
    torch.testing.assert_close(result, conv(batch), rtol=1e-12, atol=1e-12)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.dense_weight(), conv.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_products_come_in_pieces(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbc_cli.runtime.vector_layers._GATHERED", 100)
    weight, inputs = vector_wise((64, 32), "1:4/64"), noise(101, 32)
    layer = VectorLinear(weight, None, Pattern.parse("1:4/64"), reference_product, layout)
    torch.testing.assert_close(layer(inputs), inputs @ weight.t(), rtol=1e-12, atol=1e-12)


def test_stored_bytes_are_the_kept_values_and_their_tables() -> None:
    weight = vector_wise((128, 64), "1:4/64", torch.float16)
    layer = VectorLinear(weight, None, Pattern.parse("1:4/64"), reference_product, "channels-last")
    assert layer.stored_bytes() == 128 * 16 * 2 + 2 * (2 * 16 * 4)
    assert layer.weight.dtype == torch.float16


def test_no_images_give_no_results() -> None:
    conv = conv_of(vector_wise((64, 16, 3, 3), "1:4/64"), None)
    for layout in LAYOUTS:
        layer = VectorConv2d(conv.weight, None, Pattern.parse("1:4/64"), reference_product, layout, Geometry.of(conv))
        assert layer(noise(0, 16, 5, 5)).shape == (0, 64, 3, 3)


def test_inputs_that_do_not_fit_are_refused_before_any_memory_is_read() -> None:
    conv = conv_of(vector_wise((64, 16, 3, 3), "1:4/64"), None)
    pattern = Pattern.parse("1:4/64")
    layer = VectorConv2d(conv.weight, None, pattern, reference_product, "channels-last", Geometry.of(conv))
    linear = VectorLinear(vector_wise((64, 16), "1:4/64"), None, pattern, reference_product, "channels-first")
    with pytest.raises(ValueError, match="has 8 channels, the layer 16"):
        layer(noise(1, 8, 5, 5))
    with pytest.raises(ValueError, match="has 32 channels, the layer 16"):
        linear(noise(1, 32))
    with pytest.raises(ValueError, match=r"\[2, 9\] are smaller than the kernel \(3, 3\)"):
        layer(noise(1, 16, 2, 9))
    with pytest.raises(ValueError, match=r"float32, weights torch\.float64"):
        linear(noise(1, 16, dtype=torch.float32))


# The executors.


def layer_of(pattern: str, weight: Tensor) -> Layer:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight.data.copy_(weight)
    return Layer("fc", module, Pattern.parse(pattern), (), (), "")


def test_obstacles_name_what_is_in_the_way() -> None:
    executor = EXECUTORS["vector-reference"]
    assert executor.obstacle(layer_of("2:4/64", vector_wise((128, 16), "2:4/64"))) == ""
    assert executor.obstacle(layer_of("2:4/192", vector_wise((192, 16), "2:4/192"))) == ""
    text = executor.obstacle(layer_of("2:4/32", vector_wise((128, 16), "2:4/32")))
    assert text == "2:4/32: masks are shared by 32 output channels, not by a multiple of 64"
    assert "by 1 output channels" in executor.obstacle(layer_of("2:4", vector_wise((128, 16), "2:4")))
    assert executor.obstacle(layer_of("2:4/64", vector_wise((128, 16), "2:4"))) == "its weights do not hold 2:4/64"
    assert executor.obstacle(layer_of("2:4/64", vector_wise((96, 16), "2:4"))) == "its weights do not hold 2:4/64"


def test_the_kernel_needs_a_gpu_and_the_reference_does_not() -> None:
    assert "needs a CUDA device" in str(EXECUTORS["vector"].why_not(CPU, torch.bfloat16))
    with pytest.raises(UsageError, match="runtime vector cannot run here: vector needs a CUDA device"):
        choose_executors("vector", CPU, torch.bfloat16)
    assert [found.name for found in choose_executors("vector-reference", CPU, torch.float64)] == ["vector-reference"]
    assert "not a floating-point type" in str(EXECUTORS["vector-reference"].why_not(CPU, torch.int8))
    assert RUNTIMES["vector"] == ("vector",)
    assert EXECUTORS["vector"].measured
    assert not EXECUTORS["vector-reference"].measured


def test_why_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    place, executor = torch.device("cuda"), VectorWise()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert executor.why_not(place, torch.float16) == "vector needs Triton, which is not installed: pip install triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert str(executor.why_not(place, torch.float16)).startswith("Tesla V100: vector needs the tensor cores of Ampere")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "no kernel for torch.float64" in str(executor.why_not(place, torch.float64))
    assert executor.why_not(place, torch.bfloat16) is None


def pruned(name: str, pattern: str) -> tuple[nn.Module, dict[str, Pattern]]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval().double()
    targets = find_targets(model, Pattern.parse(pattern)).targets
    with torch.no_grad():
        for parameter in model.parameters():
            # Layer scales begin near zero and heads with zeros: nothing behind them would be seen.
            if parameter.dim() == 1 or not parameter.any():
                parameter.uniform_(0.5, 1.5)
        for target in targets:
            target.weight.masked_fill_(~magnitude_mask(target.weight, target.pattern), 0)
    return model, {target.name: target.pattern for target in targets}


@pytest.mark.parametrize("variant", [f"vector-reference:{layout}" for layout in LAYOUTS])
@pytest.mark.parametrize(("name", "pixels"), [("resnet10t", 64), ("test_vit", 160)])
def test_whole_models_compute_what_the_dense_ones_do(name: str, pixels: int, variant: str) -> None:
    model, patterns = pruned(name, "1:4/64")
    sample = noise(1, 3, pixels, pixels)
    prepared = prepare(model, patterns, sample)
    executors = [EXECUTORS["vector-reference"]]
    _, plain = prepared.sparse(executors, dtype=torch.float64, device=CPU)
    choices = {layer.name: variant for layer in plain if layer.variant != "dense"}
    sparse, report = prepared.sparse(executors, dtype=torch.float64, device=CPU, choices=choices)
    assert {layer.variant for layer in report} == {"dense", variant}
    assert sum(pattern.vector % 64 == 0 for pattern in patterns.values()) == len(choices) > 4
    batch = noise(2, 3, pixels, pixels)
    expected = prepared.dense(dtype=torch.float64, device=CPU)(batch)
    error = (sparse(batch) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-12
    assert torch.equal(copy.deepcopy(sparse)(batch), sparse(batch))


def test_load_with_the_reference_of_the_vector_runtime(tmp_path: Path) -> None:
    model, patterns = pruned("test_vit", "1:4/64")
    path = tmp_path / "model.safetensors"
    save(model.float(), path, pruner=FakePruner(model, {name: str(pattern) for name, pattern in patterns.items()}))
    loaded = runtime.load(path, runtime="vector-reference")
    ways = {layer.variant for layer in runtime.executed(loaded)}
    assert ways == {"dense", "vector-reference:channels-first"}
    with pytest.raises(TargetError, match="cannot run as 'vector'"):
        runtime.load(path, runtime="vector-reference", choices={"blocks.0.mlp.fc1": "vector"})
