"""Models on the CPU kernels: conversion, fusion, segments, slices, packed dense layers, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli import runtime
from lbc_cli.checkpoint import save
from lbc_cli.errors import PatternError, UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.runtime import cpu, fuse, segments, slices
from lbc_cli.runtime.cpu_dense import PackedLayer, packed
from lbc_cli.runtime.cpu_layers import CpuConv2d, CpuLayer, CpuLinear, shared_by
from lbc_cli.runtime.executors import EXECUTORS, choose_executors
from lbc_cli.runtime.matrix import Geometry
from lbc_cli.runtime.native import library
from lbc_cli.runtime.prepare import prepare
from lbc_cli.runtime.segments import Segment, Step, place
from lbc_cli.runtime.trace import trace
from lbc_cli.runtime.tune import tune
from tests.checkpoints import FakePruner
from tests.test_runtime import CPU, MODELS, pruned, relative, sample_for, sparse

KERNELS = [EXECUTORS["cpu"]]
PATTERNS = ("2:4", "1:4", "2:8", "1:16", "2:4/16", "1:4/32", "4:8", "3:8")
pytestmark = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))


def conv(
    shape: tuple[int, ...], pattern: str = "1:4", *, stride: int = 1, padding: int = 0, seed: int = 0
) -> CpuConv2d:
    weight = sparse(shape, pattern, torch.float32, seed)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(seed + 1))
    geometry = Geometry((shape[2], shape[3]), (stride, stride), (padding, padding), (1, 1))
    return CpuConv2d(weight, bias, Pattern.parse(pattern), geometry).eval()


def images(*shape: int, seed: int = 5) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last)


def check_model(name: str, pixels: int, pattern: str) -> None:
    model, patterns = pruned(name, pattern, torch.float32)
    sample = sample_for(model, pixels, torch.float32, batch=3)
    with torch.inference_mode():
        expected = model(sample)
        prepared = prepare(model, patterns, sample[:1])
        for fused in (True, False):
            converted, report = prepared.sparse(KERNELS, dtype=torch.float32, device=CPU, fuse=fused)
            assert sum(entry.variant == "cpu" for entry in report) > 0
            assert relative(converted(sample), expected) <= 1e-5, f"fused={fused}"


# Those whose single images take long on two cores are left to the slow test.
QUICK = [name for name in MODELS if not name.startswith(("densenet", "swin", "ghostnet", "xcit"))]


@pytest.mark.parametrize(
    ("name", "pattern"), [(name, PATTERNS[number % len(PATTERNS)]) for number, name in enumerate(QUICK)]
)
def test_outputs_are_those_of_the_dense_model(name: str, pattern: str) -> None:
    check_model(name, MODELS[name], pattern)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pattern"), list(itertools.product(MODELS, PATTERNS)))
def test_every_model_with_every_pattern(name: str, pattern: str) -> None:
    """20 models x 8 patterns: `pytest -m slow tests/test_cpu_runtime.py`."""
    check_model(name, MODELS[name], pattern)


# Loading.


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, patterns = pruned("test_resnet", "1:4", torch.float32, num_classes=10)
    save(model, tmp_path / "m.safetensors", pruner=FakePruner(model, {name: str(p) for name, p in patterns.items()}))
    return tmp_path / "m.safetensors"


def test_a_checkpoint_runs_on_the_cpu_kernels(checkpoint: Path) -> None:
    dense = runtime.load(checkpoint)
    converted = runtime.load(checkpoint, runtime="cpu")
    sample = sample_for(dense, 0, torch.float32, batch=2)
    with torch.inference_mode():
        expected = dense(sample)
        assert relative(converted(sample), expected) <= 1e-5
        half = runtime.load(checkpoint, runtime="cpu", dtype=torch.bfloat16)
        assert half(sample.bfloat16()).dtype == torch.bfloat16
        assert relative(half(sample.bfloat16()).float(), expected) <= 3e-2
    assert {entry.variant for entry in runtime.executed(converted)} == {"cpu", "dense"}
    done = runtime.fusion(converted)
    assert done is not None
    assert done.relus > 0
    assert done.sums > 0
    assert done.segments > 0
    assert not done.reason
    assert runtime.fusion(dense) is None


def test_a_model_that_is_not_fused_keeps_its_class(checkpoint: Path) -> None:
    plain = runtime.load(checkpoint, runtime="cpu", fuse=False)
    assert type(plain).__name__ == "ResNet"
    assert runtime.fusion(plain) is None
    fused = runtime.load(checkpoint, runtime="cpu")
    sample = sample_for(plain, 0, torch.float32, batch=2)
    with torch.inference_mode():
        assert relative(fused(sample), plain(sample)) <= 1e-6
    layers = [module for module in plain.modules() if isinstance(module, CpuLayer)]
    dense = runtime.load(checkpoint)
    assert layers
    for name, module in plain.named_modules():
        if isinstance(module, CpuLayer):
            assert torch.equal(module.weight == 0, dense.get_submodule(name).weight == 0)  # batch norms scale the rest


def test_compiled_exported_and_copied(checkpoint: Path) -> None:
    converted = runtime.load(checkpoint, runtime="cpu")
    sample = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        expected = converted(sample)
        compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
        assert relative(compiled(sample), expected) <= 1e-6
        assert torch.equal(copy.deepcopy(converted)(sample), expected)
    exported = torch.export.export(converted, (sample,))
    assert relative(exported.module()(sample), expected) <= 1e-6


def test_layers_that_are_faster_dense_stay_dense_when_measured(checkpoint: Path) -> None:
    prepared = runtime.open_model(checkpoint)
    plan = tune(prepared, KERNELS, batch=1, dtype=torch.float32, device=CPU, rounds=3, seconds=0.05)
    assert set(plan.choices.values()) <= {"cpu", "dense"}
    assert all({"cpu", "dense"} <= set(times) for times in plan.seconds.values())
    name = next(iter(plan.choices))
    dense = runtime.load(checkpoint, runtime="cpu", choices={name: "dense"})
    assert {entry.variant for entry in runtime.executed(dense) if entry.name == name} == {"dense"}


# What is refused.


def test_dtypes_devices_and_patterns_without_a_kernel(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"no kernel for torch\.float16: it has float32, and bfloat16"):
        runtime.load(checkpoint, runtime="cpu", dtype=torch.float16)
    with pytest.raises(UsageError, match="runs on a CPU, not on cuda"):
        runtime.load(checkpoint, runtime="cpu", device="cuda")
    obstacle = cpu.CpuKernels().obstacle(_layer(nn.Linear(24, 8), Pattern.parse("6:12")))
    assert obstacle == "6:12: the CPU kernels have M = 4, 8, 16, 32"


def _layer(module: nn.Module, pattern: Pattern) -> Any:
    from lbc_cli.runtime.layer import Layer

    return Layer("fc", module, pattern, (), (), "")


def test_weights_that_do_not_hold_their_pattern_are_named() -> None:
    layer = _layer(nn.Linear(24, 8), Pattern.parse("2:4"))
    with pytest.raises(PatternError, match=r"fc: the weight does not hold 2:4: one too many at \[0, 2, 0, 0\]"):
        cpu.CpuKernels().build(layer, "cpu", dtype=torch.float32, device=CPU)


def test_a_processor_without_vector_units_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "isas", lambda: ("portable",))
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"neither AVX-512 nor AVX2.*LBC_CPU_ISA=portable runs them all the same"):
        choose_executors("cpu", CPU, torch.float32)
    monkeypatch.setenv(library.ISA_VARIABLE, "portable")
    assert [executor.name for executor in choose_executors("cpu", CPU, torch.float32)] == ["cpu"]


def test_missing_kernels_are_said_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_missing", lambda: "the CPU kernels are not built: to build them: make")
    with pytest.raises(UsageError, match=r"not built: to build them: make.*without a runtime everything runs dense"):
        choose_executors("cpu", CPU, torch.float32)


def test_a_layer_takes_its_own_dtype_and_no_gradient() -> None:
    layer = conv((16, 16, 1, 1))
    with pytest.raises(ValueError, match=r"inputs are torch\.float64, the layer was made for torch\.float32"):
        layer(images(1, 16, 4, 4).double())
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(images(1, 16, 4, 4).requires_grad_())


@pytest.mark.parametrize(("vector", "width"), [(1, 1), (8, 1), (16, 16), (48, 16), (32, 32), (96, 32), (128, 32)])
def test_shared_masks_take_the_widest_kernel_that_divides(vector: int, width: int) -> None:
    assert shared_by(Pattern(1, 4, vector)) == width


# Fusion.


class Blocks(nn.Module):
    """Residual blocks of every kind that fusion meets."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 1)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.fourth = nn.Conv2d(32, 32, 1)
        self.narrow = nn.Conv2d(32, 32, 3, stride=1, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))  # a ReLU
        y = self.drop(self.second(x))
        x = self.act(y + x)  # a sum, then a ReLU
        z = self.third(x)
        x = functional.relu(z) + z  # read twice: neither
        scale = self.fourth(x.mean((2, 3), keepdim=True))
        x = x + scale  # a sum that broadcasts: not fused
        x = self.narrow(x)
        x += 1.0  # a sum with a number: not fused
        return torch.relu(x)


def blocks() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Blocks().eval()
    patterns = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = sparse(tuple(module.weight.shape), "1:4", torch.float32)
            patterns[f"{name}.weight"] = Pattern.parse("1:4")
    sample = images(2, 16, 9, 9)
    prepared = prepare(model, patterns, sample[:1])
    converted, _ = prepared.sparse(KERNELS, dtype=torch.float32, device=CPU, fuse=False)
    return converted, model, sample


def test_what_is_fused_and_what_is_not() -> None:
    converted, model, sample = blocks()
    with torch.inference_mode():
        plain, expected = converted(sample), model(sample)
        fused, done = fuse.fuse(converted, sample[:1])
        assert torch.equal(fused(sample), plain)
        assert relative(plain, expected) <= 1e-5
    assert (done.relus, done.sums, done.reason) == (2, 1, "")
    assert not [node for node in fused.graph.nodes if node.target == "drop"]


def test_a_layer_that_is_called_twice_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv((16, 16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x)) - self.layer(x + 1)

    model, sample = Twice().eval(), images(1, 16, 5, 5)
    with torch.inference_mode():
        expected = model(sample)
        fused, done = fuse.fuse(model, sample)
        assert torch.equal(fused(sample), expected)
    assert done.relus == 0


def test_an_operation_between_layer_and_sum_keeps_them_apart() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv((16, 16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            y = self.layer(x)
            x.add_(1.0)  # what the sum reads is not what it was when the layer ran
            return y + x

    model, sample = Between().eval(), images(1, 16, 5, 5)
    with torch.inference_mode():
        expected = model(sample)
        fused, done = fuse.fuse(model, sample)
        assert torch.equal(fused(sample), expected)
    assert done.sums == 0


def test_a_sum_in_place_that_somebody_notices_is_not_fused() -> None:
    class Noticed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv((16, 16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            before = x.view(x.shape)
            x += torch.relu(self.layer(x))
            return before - 1  # the sum was written into what this is a view of

    class Method(Noticed):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            before = x.view(x.shape)
            y = x.add_(self.layer(x))
            return before - y * 2

    for kind, reason in ((Noticed, "torch.fx traces Noticed to a graph that gives other results"), (Method, "")):
        model, sample = kind().eval(), images(1, 16, 5, 5).contiguous()
        with torch.inference_mode():
            expected = model(sample)
            fused, done = fuse.fuse(model, sample)
            assert torch.equal(fused(sample), expected), kind
        assert (done.sums, done.reason) == (0, reason)


def test_a_model_that_cannot_be_traced_runs_unfused_and_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv((16, 16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    model = Branching().eval()
    same, done = fuse.fuse(model, images(1, 16, 5, 5))
    assert same is model
    assert done.reason.startswith("torch.fx cannot trace Branching: ")


# Segments.


def living_sets(steps: Sequence[Step], inputs: int, outputs: Sequence[int]) -> list[set[int]]:
    """Values that some step from `at` on still reads, by brute force."""
    return [
        {n for later in steps[at:] for n in later if n is not None and n >= inputs} - set(outputs)
        for at in range(len(steps))
    ]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_result_takes_the_place_of_one_that_is_still_read(data: st.DataObject) -> None:
    count, inputs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    steps = [
        Step(data.draw(st.integers(0, inputs + at - 1)), data.draw(st.none() | st.integers(0, inputs + at - 1)))
        for at in range(count)
    ]
    sizes = [data.draw(st.integers(1, 60)) for _ in range(count)]
    outputs = [inputs + count - 1, *data.draw(st.lists(st.integers(inputs, inputs + count - 1), max_size=2))]
    offsets, floats = place([(1, size) for size in sizes], steps, inputs, outputs)
    spans = {inputs + at: range(o, o + sizes[at]) for at, o in enumerate(offsets) if o is not None}
    assert set(spans) == set(range(inputs, inputs + count)) - set(outputs)
    assert all(span.stop <= floats and span.start % 16 == 0 for span in spans.values())
    for at, living in enumerate(living_sets(steps, inputs, outputs)):
        written = inputs + at
        for number in living - {written}:
            if written in spans and number < written:
                assert not set(spans[written]) & set(spans[number]), f"step {at} writes over value {number}"


def a_segment() -> Segment:
    layers = [
        conv((32, 16, 1, 1), seed=1),
        conv((32, 32, 3, 3), "1:4/32", padding=1, seed=2),
        conv((48, 32, 1, 1), "2:8", stride=2, seed=3),
        conv((32, 32, 1, 1), "1:16", seed=4),
        conv((48, 48, 3, 3), "2:4", padding=1, seed=6),
    ]
    layers[1].relu = True
    steps = [Step(0, None), Step(2, None), Step(3, None), Step(3, 2), Step(4, 1)]
    return Segment(layers, steps, 2, [5, 6]).eval()


def test_a_segment_gives_what_its_layers_give() -> None:
    piece = a_segment()
    with torch.inference_mode():
        for batch, size in ((1, 8), (3, 6), (1, 8)):
            x, residual = images(batch, 16, size, size), images(batch, 48, size // 2, size // 2)
            expected = piece._one_by_one([x, residual])
            found = piece(x, residual)
            assert len(found) == 2
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
                assert one.is_contiguous(memory_format=torch.channels_last)
    assert len(piece._numbers) == 2
    assert copy.deepcopy(piece)._numbers == {}


def test_a_segment_takes_other_layouts_and_refuses_other_shapes() -> None:
    piece = a_segment()
    x, residual = images(1, 16, 8, 8), images(1, 48, 4, 4)
    with torch.inference_mode():
        expected = piece(x, residual)
        for one, other in zip(piece(x.contiguous(), residual.contiguous()), expected, strict=True):
            assert torch.equal(one, other)
        with pytest.raises(ValueError, match=r"the residual is \[1, 48, 5, 5\], the result \[1, 48, 4, 4\]"):
            piece(x, images(1, 48, 5, 5))
        with pytest.raises(ValueError, match=r"the input is \[1, 12, 8, 8\]: \[n, 16, h, w\] is needed"):
            piece(images(1, 12, 8, 8), residual)
        with pytest.raises(ValueError, match=r"the layer was made for torch\.float32"):
            piece(x.double(), residual)


def test_a_segment_is_found_in_a_graph() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (conv((16, 16, 1, 1), seed=n) for n in (1, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return self.c(y).flatten(1).sum(1) + y.flatten(1).sum(1)

    model, sample = Chain().eval(), images(2, 16, 5, 5)
    with torch.inference_mode():
        expected = model(sample)
        fused, done = fuse.fuse(model, sample)
        assert done.segments == 1
        assert torch.equal(fused(sample), expected)
    assert segments.segment(fused) == 0


# Slices.


def test_a_batch_in_slices_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x.mean((2, 3))

    sliced = slices.Sliced(Model(), 4)
    x = images(10, 3, 4, 4)
    assert torch.equal(sliced(x), x.mean((2, 3)))
    assert seen == [4, 3, 3]
    assert torch.equal(sliced(x[:4]), x[:4].mean((2, 3)))
    assert sliced(x[:0]).shape == (0, 3)


def test_the_size_of_a_slice_follows_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1))
    seen = trace(model, torch.randn(2, 4, 16, 16))
    monkeypatch.setattr(slices, "last_cache", lambda: 3 * 5 * 4 * (4 + 8) * 256 // 2)
    assert slices.images_at_once(seen, 2) == 5
    monkeypatch.setattr(slices, "last_cache", lambda: 1)
    assert slices.images_at_once(seen, 2) == 1


def test_sizes_of_caches_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, size in (("index0", "48K"), ("index1", "2M"), ("index2", "odd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(size + "\n")
    monkeypatch.setattr(slices, "_CACHE", tmp_path)
    slices.last_cache.cache_clear()
    try:
        assert slices.last_cache() == 2 << 20
        monkeypatch.setattr(slices, "_CACHE", tmp_path / "nothing")
        slices.last_cache.cache_clear()
        assert slices.last_cache() == 16 << 20
    finally:
        slices.last_cache.cache_clear()


def test_models_that_give_no_batch_are_not_sliced() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model, sample = Pair(), torch.randn(1, 3, 4, 4)
    assert slices.sliced(model, trace(model, sample), sample) is model


# Dense layers.


@pytest.mark.parametrize("relu", [False, True])
def test_packed_dense_layers_give_what_the_layers_give(relu: bool) -> None:
    torch.manual_seed(0)
    cases: list[tuple[nn.Module, Tensor]] = [
        (nn.Conv2d(3, 24, 7, 2, 3), images(2, 3, 33, 31)),
        (nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), images(1, 16, 9, 9)),
        (nn.Linear(40, 17), torch.randn(3, 5, 40)),
    ]
    for layer, inputs in cases:
        better = packed(layer.eval())
        assert isinstance(better, PackedLayer)
        better.relu = relu
        expected = (layer(inputs).relu() if relu else layer(inputs)).detach()
        assert relative(better(inputs).detach(), expected) <= 1e-6  # with gradients: as the layer is
        with torch.inference_mode():
            assert relative(better(inputs), expected) <= 1e-5
            assert relative(better(inputs[:1]), expected[:1]) <= 1e-5
            assert copy.deepcopy(better)._packed is None


def test_layers_that_cannot_be_packed_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    for layer in (
        Own(4, 4),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Linear(4, 4).double(),
        nn.ReLU(),
    ):
        assert packed(layer) is layer


def test_linear_layers_add_a_residual() -> None:
    weight = sparse((24, 32), "2:4", torch.float32)
    layer = CpuLinear(weight, None, Pattern.parse("2:4")).eval()
    x, residual = torch.randn(2, 7, 32), torch.randn(2, 7, 24)
    with torch.inference_mode():
        assert relative(layer(x, residual), functional.linear(x, weight) + residual) <= 1e-5
        assert layer(x[:0]).shape == (0, 7, 24)
    assert torch.equal(layer.weight, weight)
    assert layer.stored_bytes() < weight.nbytes
