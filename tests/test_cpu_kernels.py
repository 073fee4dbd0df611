"""The compiled CPU kernels against a slow oracle in float64, on every instruction set that this processor has."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lbc_cli.errors import PatternError, UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.runtime import cpu_ops
from lbc_cli.runtime.cpu_layers import CpuConv2d, CpuLinear, shared_by
from lbc_cli.runtime.matrix import Geometry
from lbc_cli.runtime.native import library
from tests.cpu_oracle import convolve, kept, propagate, sparse_weight

pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))

ROOT = Path(__file__).parents[1]
HERE = library.isas() if library.why_missing() is None else ()
PATTERNS = [
    *((n, 4) for n in (1, 2, 3)),
    *((n, 8) for n in (1, 2, 3, 4, 5, 6, 7)),
    *((n, 16) for n in (1, 2, 3, 4, 7, 8, 11, 15)),
    *((n, 32) for n in (1, 2, 5, 8, 16, 23, 31)),
]
FEW = [(2, 4), (1, 8), (3, 16), (8, 32)]
POINTWISE = (1, 1, 1, 1, 0, 0, 0, 0)


def walk(
    stride: tuple[int, int] = (1, 1), dilation: tuple[int, int] = (1, 1), zeros: tuple[int, ...] = (0, 0, 0, 0)
) -> tuple[int, ...]:
    """Stride, dilation, zeros (top, left, bottom, right), as the operator takes them."""
    return (*stride, *dilation, *zeros)


class Shape(NamedTuple):
    out: int
    inputs: int
    """In groups of M input channels, or (negative) at least so many channels."""
    kernel: tuple[int, int]
    images: tuple[int, int, int]
    """Batch, height, width."""
    walk: tuple[int, ...] = POINTWISE

    def weight(self, m: int) -> tuple[int, int, int, int]:
        """[O, I, kh, kw]."""
        inputs = self.inputs * m if self.inputs > 0 else -(self.inputs // m) * m
        return self.out, inputs, *self.kernel


SHAPES = {
    "linear": Shape(40, 5, (1, 1), (1, 1, 37)),
    "linear, one row": Shape(33, 3, (1, 1), (1, 1, 1)),
    "linear, many inputs": Shape(17, -1300, (1, 1), (1, 1, 30)),
    "linear, inputs 4096 bytes apart": Shape(16, -1024, (1, 1), (1, 1, 29)),
    "1x1": Shape(48, 4, (1, 1), (2, 7, 9)),
    "1x1 of images of one pixel": Shape(20, 5, (1, 1), (3, 1, 1)),
    "1x1 stride 2": Shape(32, 3, (1, 1), (3, 9, 8), walk((2, 2))),
    "1x1 stride 3, 1": Shape(16, 4, (1, 1), (1, 7, 16), walk((3, 1))),
    "1x1 with zeros around": Shape(16, 4, (1, 1), (2, 3, 5), walk(zeros=(1, 2, 1, 2))),
    "1x1 with zeros after": Shape(16, 4, (1, 1), (2, 3, 5), walk(zeros=(0, 0, 2, 1))),
    "1x1 with zeros around, stride 2": Shape(16, 4, (1, 1), (2, 3, 5), walk((2, 2), zeros=(1, 1, 1, 1))),
    "3x3": Shape(20, 3, (3, 3), (2, 6, 11), walk(zeros=(1, 1, 1, 1))),
    "3x3 without zeros": Shape(16, 4, (3, 3), (2, 7, 17)),
    "3x3 stride 2": Shape(32, 2, (3, 3), (1, 9, 12), walk((2, 2), zeros=(1, 1, 1, 1))),
    "3x3 stride 1, 2": Shape(16, 2, (3, 3), (2, 5, 9), walk((1, 2), zeros=(1, 1, 1, 1))),
    "3x3 stride larger than the kernel": Shape(16, 2, (3, 3), (1, 14, 13), walk((5, 4))),
    "3x3, zeros after as TensorFlow has them": Shape(24, 3, (3, 3), (1, 8, 10), walk((2, 2), zeros=(0, 0, 1, 1))),
    "3x3, more zeros than pixels": Shape(16, 2, (3, 3), (1, 2, 1), walk(zeros=(4, 5, 3, 2))),
    "3x3 on one pixel": Shape(17, 2, (3, 3), (2, 1, 1), walk(zeros=(1, 1, 1, 1))),
    "3x3 on one row": Shape(16, 3, (3, 3), (1, 1, 23), walk(zeros=(1, 1, 1, 1))),
    "3x3 on one column": Shape(16, 3, (3, 3), (1, 15, 1), walk(zeros=(1, 1, 1, 1))),
    "3x3, many inputs": Shape(18, -360, (3, 3), (1, 4, 5), walk(zeros=(1, 1, 1, 1))),
    "5x5": Shape(16, 2, (5, 5), (1, 8, 9), walk(zeros=(2, 2, 2, 2))),
    "5x5, stride 2, zeros 1 before, 2 after": Shape(16, 2, (5, 5), (2, 8, 9), walk((2, 2), zeros=(1, 1, 2, 2))),
    "1x3": Shape(16, 3, (1, 3), (2, 4, 16), walk(zeros=(0, 1, 0, 1))),
    "3x1": Shape(16, 3, (3, 1), (2, 5, 7), walk(zeros=(1, 0, 1, 0))),
    "1x7": Shape(16, 2, (1, 7), (1, 3, 9), walk(zeros=(0, 3, 0, 3))),
    "2x2, stride 2": Shape(16, 4, (2, 2), (2, 8, 6), walk((2, 2))),
    "3x3, dilation 2": Shape(16, 3, (3, 3), (1, 9, 10), walk((1, 1), (2, 2), (2, 2, 2, 2))),
    "3x3, dilation 2, 3, without zeros": Shape(16, 2, (3, 3), (2, 7, 9), walk((1, 1), (2, 3))),
    "3x3, dilation larger than the image": Shape(16, 2, (3, 3), (1, 4, 5), walk((1, 1), (9, 7), (9, 7, 9, 7))),
    "one output channel": Shape(1, 4, (3, 3), (1, 4, 6), walk(zeros=(1, 1, 1, 1))),
    "blocks of outputs": Shape(130, 2, (1, 1), (1, 3, 5)),
}


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that this processor has, forced as a user would."""
    if request.param not in HERE:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    cpu_ops.settings.cache_clear()
    yield request.param
    cpu_ops.settings.cache_clear()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    """A layer, its input and what the oracle says, as numpy arrays."""

    weight: Any
    x: Any
    bias: Any
    residual: Any
    expected: Any
    """Without and with ReLU."""
    n: int
    m: int
    vector: int
    walk: tuple[int, ...]


@functools.cache
def case(name: str, n: int, m: int, vector: int, half: bool = False) -> Case:
    """Seeded by its arguments, and so the same for all instruction sets. With bias and residual."""
    shape = SHAPES[name]
    seed = [len(name), n, m, vector]
    weight = sparse_weight(shape.weight(m), n, m, vector, seed=sum(seed), ragged=n % 3 == 0)
    if half:
        weight = (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    random = np.random.default_rng(seed)
    batch, height, width = shape.images
    x = random.standard_normal((batch, weight.shape[1], height, width)).astype(np.float32)
    bias = random.standard_normal(shape.out).astype(np.float32)
    plain = convolve(x, weight, shape.walk, bias=bias)
    residual = random.standard_normal(plain.shape).astype(np.float32)
    return Case(weight, x, bias, residual, plain, n, m, vector, shape.walk)


class Packed(NamedTuple):
    values: Tensor
    index: Tensor
    packing: cpu_ops.Packing


def packed(weight: Any, n: int, m: int, vector: int = 1, *, stride: int = 1, half: bool = False) -> Packed:
    dense = torch.from_numpy(np.ascontiguousarray(weight)) if isinstance(weight, np.ndarray) else weight
    packing = cpu_ops.plan(tuple(dense.shape), n, m, vector, stride=stride, half=half)
    return Packed(*cpu_ops.pack(dense, packing), packing)


def run(
    x: Tensor,
    layer: Packed,
    geometry: Sequence[int] = POINTWISE,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    arguments = (layer.values, layer.index, bias, residual, list(layer.packing), list(geometry), relu)
    result: Tensor = torch.ops.lbc.nm_conv2d(x, *arguments)
    return result


def channels_last(x: Any) -> Tensor:
    return torch.from_numpy(x).contiguous(memory_format=torch.channels_last)


def error(actual: Tensor, expected: Any) -> float:
    """The largest difference, of the largest expected value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual.numpy().astype(float) - expected).max() / np.abs(expected).max())


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(one), bits(other))


# Against the oracle.


def test_the_oracle_is_a_convolution() -> None:
    random = np.random.default_rng(0)
    weight = sparse_weight((6, 8, 3, 2), 2, 4, 2, seed=1)
    x, bias = random.standard_normal((2, 8, 9, 7)), random.standard_normal(6)
    expected = nn.functional.conv2d(
        torch.from_numpy(x), torch.from_numpy(weight).double(), torch.from_numpy(bias), (2, 1), (2, 3), (1, 2)
    )
    around = walk((2, 1), (1, 2), (2, 3, 2, 3))
    residual = random.standard_normal(expected.shape)
    total = torch.relu(expected + torch.from_numpy(residual)).numpy()
    keep = kept(weight, 2, 4, 2)
    for oracle in (convolve, functools.partial(propagate, keep=keep)):
        np.testing.assert_allclose(oracle(x, weight, walk=around, bias=bias), expected.numpy(), rtol=1e-12, atol=1e-12)
        everything = oracle(x, weight, walk=around, bias=bias, residual=residual, relu=True)
        np.testing.assert_allclose(everything, total, rtol=1e-12, atol=1e-12)
    assert (weight != 0).reshape(6, 2, 4, 3, 2).sum(2).tolist() == np.full((6, 2, 3, 2), 2).tolist()
    assert ((weight[::2] != 0) == (weight[1::2] != 0)).all()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(isa: str, name: str) -> None:
    for (n, m), vector in itertools.product(FEW, (1, 16, 32)):
        seen = case(name, n, m, vector)
        layer = packed(seen.weight, n, m, vector, stride=seen.walk[1])
        x, bias, residual = channels_last(seen.x), torch.from_numpy(seen.bias), channels_last(seen.residual)
        assert error(run(x, layer, seen.walk, bias=bias), seen.expected) <= 1e-5, (n, m, vector)
        without = seen.expected - seen.bias.astype(float)[:, None, None]
        assert error(run(x, layer, seen.walk), without) <= 1e-5, (n, m, vector)
        added = seen.expected + seen.residual
        assert error(run(x, layer, seen.walk, bias=bias, residual=residual), added) <= 1e-5, (n, m, vector)
        positive = run(x, layer, seen.walk, bias=bias, residual=residual, relu=True)
        assert error(positive, added.clip(0)) <= 1e-5, (n, m, vector)


@pytest.mark.parametrize("name", ["linear", "1x1", "3x3", "linear, many inputs", "3x3, many inputs"])
def test_values_in_bfloat16(isa: str, name: str) -> None:
    for (n, m), vector in itertools.product(FEW, (1, 16, 32)):
        seen = case(name, n, m, vector, half=True)
        layer = packed(torch.from_numpy(seen.weight).bfloat16(), n, m, vector, half=True)
        assert layer.values.dtype == torch.bfloat16
        result = run(channels_last(seen.x), layer, seen.walk, bias=torch.from_numpy(seen.bias))
        assert error(result, seen.expected) <= 1e-5, (n, m, vector)


@pytest.mark.parametrize("nm", PATTERNS, ids=lambda nm: f"{nm[0]}:{nm[1]}")
def test_every_pattern_as_a_layer(isa: str, nm: tuple[int, int]) -> None:
    n, m = nm
    assert [shared_by(Pattern(n, m, vector)) for vector in (1, 8, 16, 32, 48, 64)] == [1, 1, 16, 32, 16, 32]
    for vector in (1, 16, 32, 48, 64):
        out = 2 * vector if vector > 1 else 21
        weight = torch.from_numpy(sparse_weight((out, 3 * m, 3, 2), n, m, vector, seed=vector))
        random = torch.Generator().manual_seed(n)
        x, bias = torch.randn(2, 3 * m, 5, 6, generator=random), torch.randn(out, generator=random)
        layer = CpuConv2d(weight, bias, Pattern(n, m, vector), Geometry((3, 2), (2, 1), (1, 1), (1, 1)))
        expected = convolve(x.numpy(), weight.numpy(), walk((2, 1), zeros=(1, 1, 1, 1)), bias=bias.numpy())
        assert error(layer(x), expected) <= 1e-5, vector
        assert same(layer.dense_weight(), weight)
        flat = weight[:, :, 0, 0].contiguous()
        rows = torch.randn(2, 5, 3 * m, generator=random)
        expected = rows.double().numpy() @ flat.double().numpy().T
        assert error(CpuLinear(flat, None, Pattern(n, m, vector))(rows), expected) <= 1e-5, vector


@pytest.mark.parametrize("vector", [1, 16, 32])
def test_every_width(isa: str, vector: int) -> None:
    """All numbers of pixels that a tile can have, in one row, in two and in several."""
    weight = sparse_weight((35, 20, 1, 1), 2, 4, vector, seed=3)
    layer = packed(weight, 2, 4, vector)
    wide = packed(sparse_weight((16, 16, 3, 3), 4, 8, vector, seed=4), 4, 8, vector)
    dense = cpu_ops.unpack(*wide).numpy()
    for width, height in itertools.product(range(1, 31), (1, 2, 3)):
        x = np.random.default_rng(width).standard_normal((1, 20, height, width)).astype(np.float32)
        assert error(run(channels_last(x), layer), convolve(x, weight, POINTWISE)) <= 1e-5, (height, width)
        around = walk(zeros=(1, 1, 1, 1))
        assert error(run(channels_last(x[:, :16]), wide, around), convolve(x[:, :16], dense, around)) <= 1e-5


@pytest.mark.parametrize("name", ["1x1", "3x3", "1x1 stride 2", "3x3 without zeros", "linear"])
def test_inputs_of_any_layout(isa: str, name: str) -> None:
    """Views, channel slices, a storage that begins one float later: pointers are aligned to floats alone."""
    for (n, m), vector in itertools.product(FEW, (1, 32)):
        seen = case(name, n, m, vector)
        layer = packed(seen.weight, n, m, vector)
        batch, channels, height, width = seen.x.shape
        x = torch.from_numpy(seen.x)
        bias, residual = torch.from_numpy(seen.bias), torch.from_numpy(seen.residual)
        expected = run(channels_last(seen.x), layer, seen.walk, bias=bias, residual=residual)
        assert error(expected, seen.expected + seen.residual) <= 1e-5
        larger = torch.full((batch, channels + 7, height + 2, width + 3), torch.nan)
        larger = larger.contiguous(memory_format=torch.channels_last)
        cut = larger[:, 3 : 3 + channels, 1:-1, 2:-1]
        cut.copy_(x)
        rows, columns = expected.shape[2:]
        room = torch.full((batch, rows + 1, columns + 2, len(bias) + 3), torch.nan)
        residual_cut = room[:, 1:, 1:-1, 2:-1].permute(0, 3, 1, 2)
        residual_cut.copy_(residual)
        shifted = torch.empty(x.numel() + 1)[1:].view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(x)
        strided_bias = torch.empty(2 * len(bias) + 1)[1::2].copy_(bias)
        assert shifted.data_ptr() % 64
        for view in (x, cut, shifted, x.expand(batch, -1, -1, -1), x.transpose(2, 3).contiguous().transpose(2, 3)):
            for addend in (residual, residual_cut):
                result = run(view, layer, seen.walk, bias=strided_bias, residual=addend)
                assert same(result, expected)
                assert result.is_contiguous(memory_format=torch.channels_last)


def test_inputs_that_share_memory(isa: str) -> None:
    """Expanded images, windows that overlap, a residual that is the input."""
    weight = sparse_weight((32, 32, 1, 1), 2, 4, 1, seed=5)
    layer = packed(weight, 2, 4)
    row = torch.randn(1, 32, 1, 1, generator=torch.Generator().manual_seed(0))
    for x in (
        row.expand(3, 32, 4, 5),
        row.expand(1, 32, 1, 17),
        torch.randn(200).as_strided((2, 32, 3, 4), (9, 1, 20, 2)),
    ):
        assert error(run(x, layer), convolve(x.numpy(), weight, POINTWISE)) <= 1e-5
        again = run(x, layer, residual=x, bias=x[0, :, 0, 0])
        alone = run(x.contiguous(), layer, residual=x.clone(), bias=x[0, :, 0, 0].clone())
        assert same(again, alone)


def test_an_empty_batch_gives_an_empty_result(isa: str) -> None:
    layer = packed(sparse_weight((20, 16, 3, 3), 2, 4, 1, seed=0), 2, 4)
    result = run(torch.empty(0, 16, 8, 9), layer, walk((2, 2), zeros=(1, 1, 1, 1)))
    assert result.shape == (0, 20, 4, 5)


# One result, whatever the threads, the batch and the tiles.


@pytest.mark.parametrize("name", [*SHAPES])
def test_threads_do_not_change_a_bit(isa: str, name: str) -> None:
    n, m = 2, 4
    for vector in (1, 16):
        seen = case(name, n, m, vector)
        layer = packed(seen.weight, n, m, vector)
        x, bias = channels_last(seen.x), torch.from_numpy(seen.bias)
        torch.set_num_threads(1)
        expected = run(x, layer, seen.walk, bias=bias)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert same(run(x, layer, seen.walk, bias=bias), expected), count


@pytest.mark.parametrize(
    ("out", "size", "images"),
    [(64, (24, 31), 1), (512, (3, 3), 1), (96, (9, 40), 5), (640, (1, 64), 1), (48, (1, 900), 1)],
)
def test_work_for_several_threads(isa: str, out: int, size: tuple[int, int], images: int) -> None:
    """Enough that threads share it, by pixels, by output channels and by both."""
    for vector, kernel in itertools.product((1, 32), (1, 3)):
        weight = sparse_weight((out, 64, kernel, kernel), 2, 4, vector, seed=1)
        layer = packed(weight, 2, 4, vector)
        around = walk(zeros=(kernel // 2,) * 4)
        x = torch.randn(images, 64, *size, generator=torch.Generator().manual_seed(0))
        results = []
        for count in (1, 2, 3, 4, 8):
            torch.set_num_threads(count)
            results.append(run(x, layer, around))
        assert all(same(result, results[0]) for result in results[1:])
        assert error(results[0], convolve(x.numpy(), weight, around)) <= 1e-5


def test_an_image_alone_and_in_a_batch(isa: str) -> None:
    names = ("1x1", "3x3", "1x1 stride 2", "5x5", "linear, many inputs", "3x3, many inputs")
    for (n, m), vector, name in itertools.product(FEW, (1, 16, 32), names):
        seen = case(name, n, m, vector)
        layer = packed(seen.weight, n, m, vector)
        x = torch.randn(5, *seen.x.shape[1:], generator=torch.Generator().manual_seed(0))
        together = run(x, layer, seen.walk)
        assert all(same(run(x[i : i + 1], layer, seen.walk)[0], together[i]) for i in range(5))
        assert same(run(x[1:4], layer, seen.walk), together[1:4])


def test_a_pixel_in_tiles_of_any_shape(isa: str) -> None:
    for kernel, vector in itertools.product((1, 3), (1, 16, 32)):
        layer = packed(sparse_weight((20, 32, kernel, kernel), 3, 8, vector, seed=0), 3, 8, vector)
        x = torch.randn(1, 32, 12, 34, generator=torch.Generator().manual_seed(0))
        whole = run(x, layer)
        for width, height in itertools.product(range(1, 32), (1, 2, 5)):
            part = run(x[:, :, : height + kernel - 1, : width + kernel - 1], layer)
            assert same(part, whole[:, :, :height, :width]), (height, width)


# NaN and Inf.


class Odd(NamedTuple):
    """A layer whose input holds one number that is not finite."""

    weight: Any
    x: Any
    walk: tuple[int, ...]
    expected: tuple[Any, Any]
    """Without and with ReLU."""


@functools.cache
def odd_cases(value: float, vector: int) -> list[Odd]:
    """Of 2:4 layers, with the number in the first, middle and last channels and at borders."""
    found = []
    for kernel, channels, ragged in ((1, 20, False), (3, 20, True), (3, 16, False), (1, 32, True)):
        weight = sparse_weight((18, channels, kernel, kernel), 2, 4, vector, seed=kernel, ragged=ragged)
        keep, around = kept(weight, 2, 4, vector), walk(zeros=(kernel // 2,) * 4)
        for channel, (row, column) in itertools.product((0, 3, channels - 1), ((0, 0), (2, 5), (4, 8))):
            x = np.random.default_rng(channel).standard_normal((2, channels, 5, 9)).astype(np.float32)
            x[1, channel, row, column] = value
            with np.errstate(invalid="ignore"):
                expected = propagate(x, weight, keep, around)
            found.append(Odd(weight, x, around, (expected, np.where(expected < 0, 0, expected))))
    return found


@pytest.mark.parametrize("vector", [1, 16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_the_outputs_that_keep_it(isa: str, vector: int, value: float) -> None:
    """And nothing else: no neighbour, no padding, no skipped channel. A kept 0.0 times Inf is NaN, as in dense."""
    reached = 0
    for odd in odd_cases(value, vector):
        layer = packed(odd.weight, 2, 4, vector)
        for relu, expected in zip((False, True), odd.expected, strict=True):
            result = run(channels_last(odd.x), layer, odd.walk, relu=relu).numpy()
            np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
            infinite = np.isinf(expected)
            np.testing.assert_array_equal(np.isinf(result), infinite)
            np.testing.assert_array_equal(result[infinite], expected[infinite])
            reached += (~np.isfinite(expected)).sum()
    assert reached > 100


def test_zeros_around_are_zeros_whatever_the_memory_held(isa: str) -> None:
    """The room for copied inputs is used again: what a call left there must not reach the next."""
    layers = [
        (packed(sparse_weight((16, channels, 3, 3), 2, 4, vector, seed=1), 2, 4, vector), channels)
        for channels, vector in itertools.product((16, 20, 52), (1, 16))
    ]
    for layer, channels in layers:
        run(torch.full((1, 64, 40, 40), torch.nan), packed(sparse_weight((16, 64, 3, 3), 2, 4, 1, seed=0), 2, 4),
            walk(zeros=(1, 1, 1, 1)))  # fmt: skip
        for height, width in ((1, 1), (4, 5), (7, 16)):
            x = torch.full((2, channels, height, width), 1e30)
            assert not run(x, layer, walk(zeros=(3, 2, 1, 4))).isnan().any()
            odd = torch.ones(1, channels, height, width)
            assert run(odd, layer, walk((2, 1), (1, 2), (2, 2, 2, 2))).isfinite().all()


def test_relu_bias_and_residual_keep_nan(isa: str) -> None:
    layer = packed(np.zeros((20, 16, 1, 1), np.float32), 2, 4)
    bias = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 2.0] * 4)
    x = torch.zeros(1, 16, 3, 5)
    result = run(x, layer, bias=bias, relu=True)[0, :, 1, 2]
    torch.testing.assert_close(result, torch.relu(bias), equal_nan=True, rtol=0, atol=0)
    residual = bias.view(1, 20, 1, 1).expand(1, 20, 3, 5)
    added = run(x, layer, residual=residual, relu=True)[0, :, 2, 4]
    torch.testing.assert_close(added, torch.relu(bias), equal_nan=True, rtol=0, atol=0)


# Packing.

ODD = np.array(
    [0x80000000, 0x7FC12345, 0xFFC54321, 0x7F800001, 0xFF812345, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000],
    np.uint32,
)
"""-0.0, NaN with payloads (quiet, signalling), subnormals, infinities."""


def odd_weight(shape: Sequence[int], n: int, m: int, vector: int, seed: int) -> Any:
    """Non-zeros of all kinds, groups with fewer than n, groups with none."""
    weight = sparse_weight(shape, n, m, vector, seed=seed, ragged=True)
    random = np.random.default_rng(seed)
    strange = (weight != 0) & (random.random(weight.shape) < 0.5)
    weight.view(np.uint32)[strange] = random.choice(ODD, int(strange.sum()))
    return weight


@pytest.mark.parametrize("nm", PATTERNS, ids=lambda nm: f"{nm[0]}:{nm[1]}")
def test_weights_survive_packing_bit_for_bit(nm: tuple[int, int]) -> None:
    n, m = nm
    for vector, out, (kh, kw), groups in itertools.product((1, 16, 32), (1, 37), ((1, 1), (2, 3)), (1, 3, 43)):
        weight = odd_weight((out, groups * m, kh, kw), n, m, vector, seed=out)
        layer = packed(weight, n, m, vector)
        np.testing.assert_array_equal(cpu_ops.unpack(*layer).numpy().view(np.uint32), weight.view(np.uint32))
        half = torch.from_numpy((weight.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)).view(torch.bfloat16)
        layer = packed(half, n, m, vector, half=True)
        back = cpu_ops.unpack(*layer).numpy().view(np.uint32)
        np.testing.assert_array_equal(back, half.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16)


@pytest.mark.parametrize("vector", [1, 16, 32])
@pytest.mark.parametrize("nm", [(2, 4), (1, 8), (7, 16), (3, 32)], ids=str)
def test_any_single_weight_too_many_is_found(nm: tuple[int, int], vector: int) -> None:
    n, m = nm
    out, channels = 35, 2 * m
    weight = sparse_weight((out, channels, 1, 2), n, m, vector, seed=0)
    packing = cpu_ops.plan(weight.shape, n, m, vector)
    places = [place for place in itertools.product(*map(range, weight.shape)) if not weight[place]]
    random = np.random.default_rng(0)
    for o, i, r, s in random.permutation(places)[:500]:
        spoilt = weight.copy()
        spoilt[o, i, r, s] = random.choice([1.0, -1.0, np.nan, 1e-45])
        first, group = o // vector * vector, i // m * m
        rows = spoilt[first : first + vector, group : group + m, r, s].view(np.uint32)
        fault = group + np.flatnonzero(rows.any(0))[n]
        lane = first + np.flatnonzero(rows[:, fault - group])[0]
        shared = f", shared by {vector} output channels" if vector > 1 else ""
        with pytest.raises(PatternError) as caught:
            cpu_ops.pack(torch.from_numpy(spoilt), packing)
        place = [int(lane), int(fault), int(r), int(s)]
        assert str(caught.value) == f"the weight does not hold {n}:{m}{shared}: one too many at {place}"
    values, index = cpu_ops.pack(torch.from_numpy(weight), packing)
    assert same(cpu_ops.unpack(values, index, packing), torch.from_numpy(weight))


@pytest.mark.parametrize("vector", [1, 16, 32])
@pytest.mark.parametrize("nm", [(2, 4), (1, 8), (7, 16), (3, 32)], ids=str)
def test_negative_zeros_are_zeros(nm: tuple[int, int], vector: int) -> None:
    """As `weight * mask` leaves them: too many for a group, they lose their sign; with room for them they keep it."""
    n, m = nm
    weight = sparse_weight((35, 2 * m, 1, 2), n, m, vector, seed=0)
    layer = packed(np.where(weight, weight, np.float32(-0.0)), n, m, vector)
    assert same(cpu_ops.unpack(*layer), torch.from_numpy(weight))
    lonely = np.zeros_like(weight)
    lonely[:, m - n : m] = -0.0
    assert same(cpu_ops.unpack(*packed(lonely, n, m, vector)), torch.from_numpy(lonely))


def test_subnormal_weights_survive_where_they_count_as_zero() -> None:
    weight = np.zeros((16, 16, 1, 1), np.float32)
    weight.view(np.uint32)[:, 2::4] = 1
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        layer = packed(weight, 1, 4)
    finally:
        torch.set_flush_denormal(False)
    assert same(cpu_ops.unpack(*layer), torch.from_numpy(weight))


HUGE = 2**62
HOSTILE: list[dict[str, Any]] = [
    *({"shape": (o, 16, 1, 1)} for o in (0, -1, -16, HUGE)),
    *({"shape": (16, i, 1, 1)} for i in (0, -4, 3, 18, HUGE)),
    *({"shape": (16, 16, k, 1)} for k in (0, -1, HUGE, 2**40)),
    *({"shape": (16, 16, 1, k)} for k in (0, -13, HUGE)),
    *(
        {"shape": (2**31, 2**32, 1, 1)},
        {"shape": (2**20, 2**20, 2**20, 4)},
        {"shape": (2**64 + 16, 16, 1, 1)},
        {"shape": (16 - 2**64, 16, 1, 1)},
    ),
    *({"n": n} for n in (0, -1, 4, 5, HUGE)),
    *({"m": m, "n": 1} for m in (0, 1, 2, 3, -4, 6, 12, 64, HUGE)),
    *({"vector": v} for v in (0, -1, 2, 8, 64, 17, HUGE)),
    *({"stride": s} for s in (0, -1, HUGE)),
    {"stride": -1, "shape": (16, 16, 1, 13)},
]


@pytest.mark.parametrize("numbers", HOSTILE, ids=str)
def test_numbers_without_a_kernel_are_refused(numbers: dict[str, Any]) -> None:
    given = {"shape": (16, 16, 1, 1), "n": 2, "m": 4, "vector": 1, "stride": 1, **numbers}
    with pytest.raises(UsageError, match="no CPU kernel"):
        cpu_ops.plan(**given)


# The operator.


def arguments(**changed: Any) -> dict[str, Any]:
    """Of a call that works, some of them changed."""
    layer = packed(sparse_weight((20, 16, 3, 3), 2, 4, 1, seed=0), 2, 4)
    given = {
        "x": torch.randn(2, 16, 5, 6),
        "values": layer.values,
        "index": layer.index,
        "bias": torch.randn(20),
        "residual": torch.randn(2, 20, 5, 6),
        "weight": list(layer.packing),
        "geometry": list(walk(zeros=(1, 1, 1, 1))),
        "relu": True,
    }
    return {**given, **{name: change(given[name]) if callable(change) else change for name, change in changed.items()}}


def place(at: int, value: int) -> Any:
    return lambda numbers: [*numbers[:at], value, *numbers[at + 1 :]]


REFUSED: dict[str, dict[str, Any]] = {
    "x in float64": {"x": lambda x: x.double()},
    "x in bfloat16": {"x": lambda x: x.bfloat16()},
    "x of 3 dimensions": {"x": lambda x: x[0]},
    "x with other channels": {"x": lambda x: x[:, :12]},
    "x smaller than the kernel": {"x": lambda x: x[..., :1], "geometry": list(POINTWISE), "residual": None},
    "values too few": {"values": lambda v: v[:-1]},
    "values too many": {"values": lambda v: torch.cat([v, v[:1]])},
    "values in float64": {"values": lambda v: v.double()},
    "values in bfloat16": {"values": lambda v: v.bfloat16()},
    "one value that is spread": {"values": lambda v: v[:1].expand(len(v))},
    "every second value": {"values": lambda v: v.repeat_interleave(2)[::2]},
    "index too short": {"index": lambda i: i[:-1]},
    "index in int64": {"index": lambda i: i.long()},
    "one byte that is spread": {"index": lambda i: i[:1].expand(len(i))},
    "bias too short": {"bias": lambda b: b[:-1]},
    "bias in float64": {"bias": lambda b: b.double()},
    "residual of another shape": {"residual": lambda r: r[:1]},
    "residual in bfloat16": {"residual": lambda r: r.bfloat16()},
    "no weight": {"weight": []},
    "a number of the weight missing": {"weight": lambda w: w[:-1]},
    "other output channels": {"weight": place(0, 36)},
    "other input channels": {"weight": place(1, 32)},
    "no chunk": {"weight": place(7, 0)},
    "a negative chunk": {"weight": place(7, -16)},
    "an odd chunk": {"weight": place(7, 8)},
    "a huge chunk": {"weight": place(7, HUGE)},
    "M of 0": {"weight": place(5, 0)},
    "N of 0": {"weight": place(4, 0)},
    "vector of 0": {"weight": place(6, 0)},
    "half of 2": {"weight": place(8, 2)},
    "a geometry too short": {"geometry": lambda g: g[:-1]},
    "a geometry too long": {"geometry": lambda g: [*g, 0]},
    **{f"{name} {value}": {"geometry": place(at, value), "residual": None}
       for name, at, value in (("stride_h", 0, 0), ("stride_h", 0, -1), ("stride_w", 1, 0), ("stride_w", 1, -1),
                               ("dilation_h", 2, 0), ("dilation_h", 2, -1), ("dilation_w", 3, -1),
                               ("top", 4, -1), ("left", 5, -1), ("bottom", 6, -1), ("right", 7, -2),
                               ("top", 4, HUGE), ("dilation_h", 2, HUGE))},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_do_not_fit_are_refused(name: str) -> None:
    call = arguments(**REFUSED[name])
    for function in (torch.ops.lbc.nm_conv2d, cpu_ops.nm_conv2d):
        with pytest.raises(ValueError):  # noqa: PT011 (each has a text of its own)
            function(**call)
    torch.ops.lbc.nm_conv2d(**arguments())


def test_numbers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="not the numbers of a packed weight"):
        cpu_ops.nm_conv2d(**arguments(weight=place(0, 2**64 + 20)))


@pytest.mark.parametrize("name", ["x", "values", "index", "bias", "residual"])
def test_tensors_of_another_device_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cpu"):
        cpu_ops.nm_conv2d(**arguments(**{name: lambda value: value.to("meta")}))


@pytest.mark.parametrize("name", ["x", "residual"])
def test_a_gradient_is_refused(name: str) -> None:
    call = arguments(**{name: lambda value: value.requires_grad_()})
    with torch.no_grad():
        torch.ops.lbc.nm_conv2d(**call)
    for function in (torch.ops.lbc.nm_conv2d, cpu_ops.nm_conv2d):
        with pytest.raises(RuntimeError, match="gradient"):
            function(**call)


def test_huge_steps_see_one_pixel(isa: str) -> None:
    """As in dense convolutions, where they are as pointless."""
    weight = sparse_weight((16, 16, 3, 3), 2, 4, 1, seed=0)
    x = torch.randn(2, 16, 4, 5, generator=torch.Generator().manual_seed(0))
    far = 2**31 - 1
    for stride in ((far, far), (far, 1), (7, far), (2**29 - 1, 2**29 + 1)):  # the last: 2^64 bytes of input
        around = walk(stride, zeros=(2, 2, 2, 2))
        assert error(run(x, packed(weight, 2, 4), around), convolve(x.numpy(), weight, around)) <= 1e-5


def test_a_copy_that_no_memory_holds_is_an_error(isa: str) -> None:
    """The zeros around an image are copied; their number may overflow any integer: 2^62 pixels here."""
    layer = packed(sparse_weight((16, 16, 2, 2), 2, 4, 1, seed=0), 2, 4)
    run(torch.randn(1, 16, 3, 3), layer, walk(zeros=(1, 1, 1, 1)))  # leaves some room behind
    for far in (2**30, 2**31 - 1):
        with pytest.raises(MemoryError):
            run(torch.randn(1, 16, 1, 1), layer, walk((1, 1), (far, far), (far, far, 0, 0)))


def test_packing_wants_the_weight_that_was_planned() -> None:
    packing = cpu_ops.plan((16, 16, 3, 3), 2, 4, 1)
    for shape in ((16, 16, 1, 1), (16, 16, 3, 2), (1, 16, 3, 3), (16, 16)):
        with pytest.raises(UsageError, match=r"\[16, 16, 3, 3\]"):
            cpu_ops.pack(torch.zeros(shape), packing)
    half = cpu_ops.plan((16, 16, 3, 3), 2, 4, 1, half=True)
    with pytest.raises(UsageError, match="bfloat16"):
        cpu_ops.pack(torch.full((16, 16, 3, 3), 0.1), half)
    values, index = cpu_ops.pack(torch.zeros(16, 16, 3, 3), packing)
    for odd in ((values[:-1], index), (values, index[:-1]), (values.bfloat16(), index), (values, index.long())):
        with pytest.raises(ValueError, match="packed weight"):
            cpu_ops.unpack(*odd, packing)


@pytest.mark.parametrize("half", [False, True])
def test_torch_checks_the_operator(half: bool) -> None:
    weight = torch.from_numpy(sparse_weight((20, 16, 3, 3), 2, 4, 1, seed=0))
    layer = packed(weight.bfloat16() if half else weight, 2, 4, half=half)
    numbers = list(layer.packing)
    around = list(walk((2, 1), zeros=(1, 1, 1, 1)))
    residual = torch.randn(2, 20, 3, 6).contiguous(memory_format=torch.channels_last)
    for x in (torch.randn(2, 16, 5, 6), channels_last(torch.randn(2, 16, 5, 6).numpy())):
        for bias, added, relu in ((None, None, False), (torch.randn(20), residual, True)):
            call = (x, layer.values, layer.index, bias, added, numbers, around, relu)
            result = torch.library.opcheck(torch.ops.lbc.nm_conv2d.default, call)
            assert set(result.values()) == {"SUCCESS"}, result
    single = packed(torch.zeros(1, 16, 1, 1), 2, 4)
    for size in ((1, 1), (1, 5), (4, 1)):
        call = (torch.randn(3, 16, *size), *single[:2], None, None, list(single.packing), list(POINTWISE), False)
        assert set(torch.library.opcheck(torch.ops.lbc.nm_conv2d.default, call).values()) == {"SUCCESS"}


class Net(nn.Module):
    """Layers of all kinds, as a converted model has them."""

    def __init__(self) -> None:
        super().__init__()
        pattern, around = Pattern(2, 4), Geometry((3, 3), (1, 1), (1, 1), (1, 1))
        self.one = CpuConv2d(torch.from_numpy(sparse_weight((32, 16, 3, 3), 2, 4, 1, seed=0)), None, pattern, around)
        self.two = CpuConv2d(torch.from_numpy(sparse_weight((32, 32, 3, 3), 2, 4, 1, seed=1)), None, pattern, around)
        same = Geometry((3, 3), (2, 2), (0, 0), (1, 1), same=True)
        self.three = CpuConv2d(torch.from_numpy(sparse_weight((24, 32, 3, 3), 2, 4, 1, seed=2)), None, pattern, same)
        flat = torch.from_numpy(sparse_weight((10, 24, 1, 1), 2, 4, 1, seed=3))[..., 0, 0]
        self.four = CpuLinear(flat, torch.randn(10), pattern)
        self.two.relu = True

    def forward(self, x: Tensor) -> Tensor:
        """[n, 16, h, w] to [n, 10]."""
        x = self.one(x)
        x = self.three(self.two(x, x))
        result: Tensor = self.four(x.flatten(2).transpose(1, 2)).mean(1)
        return result


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_models_compile_as_one_graph(backend: str) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for images, size in ((2, (8, 8)), (5, (8, 8)), (3, (9, 7))):
            x = torch.randn(images, 16, *size)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-6, atol=1e-6)


def test_models_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    dynamic = {"x": {0: torch.export.Dim("images")}}
    with torch.inference_mode():
        program = torch.export.export(net, (torch.randn(2, 16, 8, 8),), dynamic_shapes=dynamic)
        assert "torch.ops.lbc.nm_conv2d" in program.graph_module.code
        torch.export.save(program, tmp_path / "net.pt2")
        for given in (program, torch.export.load(tmp_path / "net.pt2")):
            for images in (2, 5):
                x = torch.randn(images, 16, 8, 8)
                torch.testing.assert_close(given.module()(x), net(x), rtol=0, atol=0)


# Processes and threads.


def in_a_process(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    cpu_ops.settings.cache_clear()
    code = (
        "from lbc_cli.runtime import cpu_ops\n"
        "from tests.test_cpu_kernels import case, channels_last, packed, run\n"
        "seen = case('3x3', 3, 16, 1)\n"
        "result = run(channels_last(seen.x), packed(seen.weight, 3, 16), seen.walk)\n"
        "print(cpu_ops.settings()[1], result.numpy().tobytes().hex())\n"
    )
    number, printed = in_a_process(code, LBC_CPU_ISA="portable").split()
    assert number == "0"
    seen = case("3x3", 3, 16, 1)
    result = run(channels_last(seen.x), packed(seen.weight, 3, 16), seen.walk)
    # Products and sums of the portable kernels are rounded one by one.
    assert (result.numpy().tobytes().hex() == printed) == (HERE == ("portable",))
    other = torch.frombuffer(bytearray.fromhex(printed), dtype=torch.float32).view(result.shape)
    torch.testing.assert_close(other, result, rtol=0, atol=1e-5)


def test_python_threads_call_at_once(isa: str) -> None:
    names = ["1x1", "3x3", "5x5", "linear, many inputs", "3x3, dilation 2", "1x1 stride 2"]
    seen = [case(name, 2, 4, vector) for name in names for vector in (1, 16)]
    layers = [packed(one.weight, one.n, one.m, one.vector) for one in seen]
    torch.set_num_threads(2)

    def one_of_many(number: int) -> bool:
        at = number % len(seen)
        return error(run(channels_last(seen[at].x), layers[at], seen[at].walk), seen[at].expected - bias(at)) <= 1e-5

    def bias(at: int) -> Any:
        return seen[at].bias.astype(float)[:, None, None]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one_of_many, range(200)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on() -> None:
    """As the workers of a DataLoader do, which use one thread each."""
    code = (
        "import os, torch\n"
        "from tests.test_cpu_kernels import case, channels_last, packed, run, same\n"
        "torch.set_num_threads(2)\n"
        "seen = case('3x3, many inputs', 2, 4, 1)\n"
        "layer, x = packed(seen.weight, 2, 4), channels_last(seen.x)\n"
        "expected = run(x, layer, seen.walk)\n"
        "children = []\n"
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        torch.set_num_threads(1)\n"
        "        os._exit(0 if same(run(x, layer, seen.walk), expected) else 1)\n"
        "    children.append(child)\n"
        "assert same(run(x, layer, seen.walk), expected)\n"
        "print([os.waitpid(child, 0)[1] for child in children])\n"
    )
    assert in_a_process(code).strip() == "[0, 0, 0]"


# Shapes that nobody thought of.


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, ...]:
    m = draw(st.sampled_from((4, 8, 16, 32)))
    n = draw(st.integers(1, m - 1))
    vector = draw(st.sampled_from((1, 16, 32)))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    shape = (draw(st.integers(1, 40)), m * draw(st.integers(1, 4)), *kernel)
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    zeros = draw(st.tuples(*[st.integers(0, 3)] * 4))
    least = [
        d * (k - 1) + 1 - z
        for d, k, z in zip(dilation, kernel, (zeros[0] + zeros[2], zeros[1] + zeros[3]), strict=True)
    ]
    height, width = (draw(st.integers(max(1, low), max(1, low) + 12)) for low in least)
    images = (draw(st.integers(0, 3)), shape[1], height, width)
    return n, m, vector, shape, images, walk(stride, dilation, zeros), draw(st.integers(0, 7)), draw(st.integers(1, 4))


def check_drawn(drawn: tuple[Any, ...]) -> None:
    n, m, vector, shape, images, around, extras, count = drawn
    random = np.random.default_rng(extras)
    weight = sparse_weight(shape, n, m, vector, seed=extras, ragged=bool(extras & 1))
    x = random.standard_normal(images).astype(np.float32)
    bias = random.standard_normal(shape[0]).astype(np.float32) if extras & 2 else None
    relu = bool(extras & 4)
    plain = convolve(x, weight, around, bias=bias)
    residual = random.standard_normal(plain.shape).astype(np.float32) if extras & 1 else None
    expected = convolve(x, weight, around, bias=bias, residual=residual, relu=relu)
    scale = max(np.abs(plain).max(initial=1e-30), 1.0 if residual is not None else 0)
    layer = packed(weight, n, m, vector, stride=around[1])
    torch.set_num_threads(count)
    for number in (library.ISAS[name] for name in HERE):
        cpu_ops.settings.cache_clear()
        entry = cpu_ops.settings()
        call = (channels_last(x), *layer[:2], None if bias is None else torch.from_numpy(bias))
        rest = (None if residual is None else torch.from_numpy(residual), list(layer.packing), list(around), relu)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_ops, "settings", lambda entry=entry, number=number: (entry[0], number, entry[2]))
            result = cpu_ops.nm_conv2d(*call, *rest)
        assert result.shape == expected.shape
        assert np.abs(result.numpy() - expected).max(initial=0) <= 1e-5 * scale


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(layers())
def test_drawn_layers(drawn: tuple[Any, ...]) -> None:
    check_drawn(drawn)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, database=None)
@given(layers())
def test_many_drawn_layers(drawn: tuple[Any, ...]) -> None:
    check_drawn(drawn)
