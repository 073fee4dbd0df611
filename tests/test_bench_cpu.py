"""`lbc bench` on a CPU: rivals run the same weights, none disturbs another while it is timed, none is lost silently."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli.bench import compiling, dense_layers, inference, machine, onnx_graphs, results, turns, ways, whole_cpu
from lbc_cli.bench.dense_layers import dense_rivals
from lbc_cli.bench.inference import inference_bench
from lbc_cli.bench.layers import LayerBench
from lbc_cli.bench.machine import clocks, measured_peak
from lbc_cli.bench.notes import Notes
from lbc_cli.bench.onnx_graphs import Graphs
from lbc_cli.bench.results import BF16, CPU_MODES, BatchResult, InferenceBench, InferenceSetup, LayerResult, Side
from lbc_cli.bench.turns import in_turns
from lbc_cli.bench.verdict import verdict
from lbc_cli.bench.ways import mode_of, packed_model, slice_size
from lbc_cli.bench.whole_cpu import CpuBench
from lbc_cli.errors import UsageError, VerificationError
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.report import Console
from lbc_cli.report.benched import print_bench
from lbc_cli.report.benched_plot import draw_bench
from lbc_cli.runtime import cpu_dense
from lbc_cli.runtime.clock import Times
from lbc_cli.runtime.cpu_dense import PackedLayer, packs
from lbc_cli.runtime.executors import EXECUTORS
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.prepare import Prepared, prepare
from lbc_cli.runtime.slices import Sliced
from lbc_cli.runtime.tune import Plan, key_for
from tests.test_cli import lbc
from tests.test_runtime import CPU

REFERENCE = [EXECUTORS["reference"]]
needs_bf16 = pytest.mark.skipif(not packs(torch.bfloat16), reason="oneDNN has no bfloat16 on this processor")


class Small(nn.Module):
    """Convolutions of every kind, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.point = nn.Conv2d(16, 32, 1, bias=False)
        self.groups = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(32, 16, 3, padding=2, dilation=2)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        inner = functional.relu(self.point(functional.relu(self.stem(images))))
        return self.head(functional.relu(self.wide(self.groups(inner))).mean((2, 3)))


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    model = Small().eval()
    pattern = Pattern.parse("2:4")
    for name in ("point", "wide", "head"):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data.masked_fill_(~magnitude_mask(weight.data, pattern), 0)
    patterns = {f"{name}.weight": pattern for name in ("point", "wide", "head")}
    return prepare(model, patterns, torch.randn(1, 3, 20, 20))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setup_for(**options: Any) -> InferenceSetup:
    return InferenceSetup(source="small", rounds=1, seconds=0.01, threads=(1,), **options)


def bench_for(prepared: Prepared, notes: Notes, executors: Any = REFERENCE, **options: Any) -> CpuBench:
    return CpuBench(setup_for(**options), prepared, executors, Graphs(prepared), notes, lambda line: None)


def eager_instead(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, bool]]:
    """Stand in for compiling; returns dtype and whether channels last, of what was compiled."""
    asked: list[tuple[torch.dtype, bool]] = []

    def instead(model: nn.Module, images: Tensor, *, at_once: int) -> Callable[[], Tensor]:
        asked.append((images.dtype, images.is_contiguous(memory_format=torch.channels_last)))
        return lambda: model(images)

    monkeypatch.setattr(ways, "compiled_call", instead)
    return asked


def scripted(monkeypatch: pytest.MonkeyPatch, target: Any, seconds: Mapping[str, float]) -> None:
    """Give out times by name, 1 s by default, in place of measuring."""

    def instead(pools: Any, device: torch.device, **options: Any) -> dict[str, Times]:
        return {name: Times((seconds.get(name, 1.0),)) for pool in pools for name in pool}

    monkeypatch.setattr(target, "in_turns", instead)


@needs_bf16
def test_every_dense_way_is_timed_and_the_fastest_is_dense(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = eager_instead(monkeypatch)
    scripted(monkeypatch, whole_cpu, {"dense: onnxruntime": 0.5, "sparse: eager NHWC": 0.25, "dense bf16: packed": 0.2})
    notes = Notes()
    with torch.inference_mode():
        found, executed = bench_for(prepared, notes, modes=CPU_MODES).measure(2, None)
    assert notes.lines() == ()
    assert list(found.sides["dense"].modes) == [way for way in results.CPU_WAYS if "sliced" not in way]
    assert found.sides["dense"].mode == "onnxruntime"
    assert found.sides["dense"].quartiles == (0.5, 0.5, 0.5)
    assert found.speedup == 2
    assert list(found.sides["sparse"].modes) == ["eager NHWC"]  # a reference is not worth compiling
    beside = found.sides[BF16]
    assert list(beside.modes) == ["eager NHWC", "packed", "compiled"]
    assert (beside.mode, beside.dtype) == ("packed", "bfloat16")
    assert found.bf16_over_sparse == pytest.approx(1.25)
    assert found.difference is not None
    assert 0 < found.difference < 1e-5
    assert (found.batch, found.threads) == (2, 1)
    assert [dtype for dtype, _ in compiled] == [torch.float32, torch.bfloat16]
    assert {entry.name for entry in executed if entry.variant != "dense"} == {"point", "wide", "head"}


def test_the_faster_layout_is_compiled(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = eager_instead(monkeypatch)
    scripted(monkeypatch, whole_cpu, {})
    for faster, channels_last in (("eager NCHW", False), ("eager NHWC", True)):
        times = {"eager NCHW": Times((2.0,)), "eager NHWC": Times((2.0,)), faster: Times((1.0,))}
        monkeypatch.setattr(ways, "interleaved", lambda calls, device, times=times, **options: times)
        compiled.clear()
        with torch.inference_mode():
            bench_for(prepared, Notes(), [], modes=("eager", "compiled")).measure(1, None)
        assert compiled[0] == (torch.float32, channels_last)


@needs_bf16
def test_what_cannot_run_is_said_and_left_out(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no working\nC++ compiler")

    monkeypatch.setattr(ways, "compiled_call", fails)
    monkeypatch.setattr(ways, "packed_model", fails)
    monkeypatch.setattr(onnx_graphs, "find_spec", lambda name: None)
    scripted(monkeypatch, whole_cpu, {})
    notes = Notes()
    with torch.inference_mode():
        found, _ = bench_for(prepared, notes, modes=CPU_MODES).measure(1, None)
        assert list(found.sides["dense"].modes) == ["eager NCHW", "eager NHWC"]
        with pytest.raises(UsageError, match=r"modes compiled: dense runs in none of them here: .*no working C\+\+"):
            bench_for(prepared, Notes(), modes=("compiled",)).measure(1, None)
    said = notes.lines()
    assert (
        "compiled is left out: no working C++ compiler (dense, batch 1, 1 thread; dense bf16, batch 1, 1 thread)"
        in said
    )
    assert (
        "packed is left out: no working C++ compiler (dense, batch 1, 1 thread; dense bf16, batch 1, 1 thread)" in said
    )
    assert any(line.startswith("onnxruntime is left out: onnxruntime, onnx, onnxscript not installed") for line in said)


def test_running_out_of_memory_is_no_note(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ways, "packed_model", fails)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"), torch.inference_mode():
        bench_for(prepared, Notes()).measure(1, None)


def test_a_rival_that_computes_something_else_stops_the_bench(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "compiled_call", lambda model, images, at_once: lambda: 1.001 * model(images))

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(whole_cpu, "in_turns", never)
    with pytest.raises(VerificationError, match=r"dense \(compiled\) outputs differ from"), torch.inference_mode():
        bench_for(prepared, Notes(), modes=("eager", "compiled")).measure(1, None)


@needs_bf16
def test_bfloat16_that_is_far_off_is_left_out_with_a_note(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(results.TOLERANCE, torch.bfloat16, 1e-6)
    scripted(monkeypatch, whole_cpu, {})
    notes = Notes()
    with torch.inference_mode():
        found, _ = bench_for(prepared, notes).measure(1, None)
    assert BF16 not in found.sides
    assert any(line.startswith("dense bf16 (packed) is left out: its outputs are off by") for line in notes.lines())


def test_a_comparison_in_bfloat16_has_no_second_bfloat16_side(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, whole_cpu, {})
    notes = Notes()
    with torch.inference_mode():
        modes = ("eager", "onnxruntime")
        found, _ = bench_for(prepared, notes, [], modes=modes, dtype=torch.bfloat16).measure(1, None)
    assert list(found.sides) == ["dense"]
    assert found.sides["dense"].dtype == "bfloat16"
    assert any("measured in float32 only, not in bfloat16" in line for line in notes.lines())


def test_compiling_freezes_and_stays_frozen_in_inference_mode() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    # A convolution by itself, channels last, needs no kernel of C++, which would take seconds to compile.
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    model = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    with torch.inference_mode():
        call = compiling.compiled_call(model, images, at_once=2)
        assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 1
        counters.clear()
        torch.testing.assert_close(call(), model(images))
        assert not counters["inductor"]  # nothing was compiled anew
    torch._dynamo.reset()


def test_a_compiler_that_is_missing_is_named(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        try:
            raise FileNotFoundError("no g++\nand a page of advice")
        except FileNotFoundError as error:
            raise RuntimeError("backend failed") from error

    monkeypatch.setattr(torch, "compile", lambda model, **options: fails)
    with pytest.raises(RuntimeError, match=r"cannot compile the model: FileNotFoundError: no g\+\+$"):
        compiling.compiled_call(nn.Identity(), torch.zeros(1), at_once=1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), pytest.param(torch.bfloat16, 2e-2, marks=needs_bf16)]
)
def test_packed_models_compute_the_same(prepared: Prepared, dtype: torch.dtype, tolerance: float) -> None:
    images = torch.randn(3, 3, 20, 20).to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = prepared.dense(dtype=dtype, device=CPU)(images)
        packed = packed_model(prepared, dtype)
        assert float((packed(images) - expected).abs().max()) <= tolerance * float(expected.abs().max())
    layers = [module for module in packed.modules() if isinstance(module, PackedLayer)]
    assert [module.relu for module in layers].count(True) == 3
    assert len(layers) == 5


def test_a_type_that_no_processor_packs(prepared: Prepared) -> None:
    with pytest.raises(RuntimeError, match="oneDNN packs none of its weights"):
        packed_model(prepared, torch.float64)


def test_on_a_processor_without_bfloat16_it_is_left_out_and_nothing_is_packed(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cpu_dense, whole_cpu):
        monkeypatch.setattr(module, "packs", lambda dtype: dtype == torch.float32)
    scripted(monkeypatch, whole_cpu, {})
    notes = Notes()
    with torch.inference_mode():
        found, _ = bench_for(prepared, notes).measure(1, None)
        model, _ = prepared.sparse(REFERENCE, dtype=torch.bfloat16, device=CPU)
        assert model(prepared.sample.bfloat16()).isfinite().all()
    assert BF16 not in found.sides
    assert notes.lines() == ("dense bf16 is left out: oneDNN has no bfloat16 on this processor",)
    assert not any(isinstance(module, PackedLayer) for module in model.modules())


@needs_bf16
def test_dense_ways_get_slices_too(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "images_at_once", lambda seen, batch: 3)
    assert [slice_size(prepared, batch) for batch in (1, 3, 4, 7, 9)] == [1, 3, 2, 1, 3]
    scripted(monkeypatch, whole_cpu, {"dense: onnxruntime sliced": 0.5})
    seen: list[int] = []

    def instead(model: nn.Module, images: Tensor, *, at_once: int) -> Callable[[], Tensor]:
        seen.append(at_once)
        return lambda: torch.cat([model(part) for part in images.split(at_once)])

    monkeypatch.setattr(ways, "compiled_call", instead)
    with torch.inference_mode():
        found, _ = bench_for(prepared, Notes(), [], modes=CPU_MODES).measure(4, None)
    assert list(found.sides["dense"].modes) == list(results.CPU_WAYS)
    assert found.sides["dense"].mode == "onnxruntime sliced"
    assert "compiled sliced" in found.sides[BF16].modes
    assert seen == [4, 2, 4, 2]
    assert {way: mode_of(way) for way in results.CPU_WAYS} == {
        **dict.fromkeys(("eager NCHW", "eager NHWC", "packed"), "eager"),
        **dict.fromkeys(("compiled", "compiled sliced"), "compiled"),
        **dict.fromkeys(("onnxruntime", "onnxruntime sliced"), "onnxruntime"),
    }


def test_slices_are_compiled_once_whoever_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    inner, images = nn.Conv2d(3, 4, 1).eval(), torch.randn(4, 3, 2, 2)
    with torch.inference_mode():
        for model, at_once in ((inner, 2), (Sliced(inner, 3), 4)):
            torch.testing.assert_close(compiling.compiled_call(model, images, at_once=at_once)(), inner(images))
    assert compiled == [inner, inner]


def test_every_rival_of_a_layer_computes_what_the_layer_does(prepared: Prepared) -> None:
    asked = {}
    for layer in prepared.layers():
        notes = Notes()
        value = torch.randn(2, *layer.inputs[0][1:])
        value = value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
        with torch.inference_mode():
            rivals = dense_rivals(layer, [value], notes, onnxruntime=True)
            expected = layer.module(value)
            rows = expected.movedim(1, -1).reshape(-1, layer.shape[0])
            for name, call in rivals.items():
                (result,) = call()
                close = rows if name.endswith("linear") or expected.dim() == 2 else expected
                torch.testing.assert_close(result, close, atol=1e-5, rtol=1e-4, msg=f"{layer.name}, {name}")
        assert notes.lines() == ()
        asked[layer.name] = list(rivals)
    convolution = ["eager NCHW", "eager NHWC", "onnxruntime"]
    assert asked == {
        "stem": convolution,
        "point": [*convolution, "linear", "packed linear", "onnxruntime linear"],
        "groups": convolution,
        "wide": convolution,
        "head": ["eager", "onnxruntime"],
    }


def test_a_rival_that_fails_is_noted_with_the_layers(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("not\nhere")

    monkeypatch.setattr(dense_layers, "session_call", fails)
    notes = Notes()
    for layer in prepared.layers():
        with torch.inference_mode():
            rivals = dense_rivals(layer, [torch.randn(1, *layer.inputs[0][1:])], notes, onnxruntime=True)
        assert not any(name.startswith("onnxruntime") for name in rivals)
    assert notes.lines()[0] == "onnxruntime is left out for some layers: not here (stem; point; groups; and 2 more)"


def test_layers_with_a_forward_of_their_own_have_no_rivals() -> None:
    own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})
    for module in (nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding_mode="reflect"), own(4, 4)):
        layer = Layer("x", module, None, ((1, 4, 8, 8),), ((1, 4, 8, 8),), "")
        assert dense_rivals(layer, [torch.zeros(1, 4, 8, 8)], Notes(), onnxruntime=True) == {}


def test_a_layer_is_compared_with_its_best_rival(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    from lbc_cli.bench import layers as module

    times = {"dense": 4.0, "eager NHWC": 2.0, "reference": 1.0, "reference:im2col": 1.0, "reference:shifts": 3.0}
    scripted(monkeypatch, module, {"eager NCHW": 3.0, "linear": 5.0, "packed linear": 5.0, **times})
    bench = LayerBench(setup_for(), prepared, REFERENCE, 2, Notes())
    # What a plan was made of does not count here: rivals and variants are timed in one run.
    with torch.inference_mode():
        found = {layer.name: layer for layer in bench.measure([], {"point": {"dense": (9, 9, 9)}}, lambda line: None)}
    point = found["point"]
    assert point.best_dense == ("eager NHWC", (2.0, 2.0, 2.0))
    assert point.best_sparse == ("reference", (1.0, 1.0, 1.0))
    assert point.speedup == 2
    assert point.operations == 2 * 2 * 100 * 32 * 16
    assert point.rates() == {"dense": 204800 / 2, "sparse": 204800, "done": 204800 / 2}
    assert (found["stem"].density, point.density) == (1, 0.5)
    assert found["stem"].rates()["sparse"] is None


def test_a_variant_that_computes_something_else_stops_the_bench(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbc_cli.runtime.backends import ReferenceOperand

    decode = ReferenceOperand.dense
    monkeypatch.setattr(ReferenceOperand, "dense", lambda self: 1.01 * decode(self))
    bench = LayerBench(setup_for(), prepared, REFERENCE, 1, Notes())
    with pytest.raises(VerificationError, match=r"small, point: reference outputs differ"), torch.inference_mode():
        bench.measure([], {}, lambda line: None)


def test_graphs_are_written_once_for_a_batch(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    with Graphs(prepared) as graphs:
        images = torch.randn(2, 3, 20, 20)
        with torch.inference_mode():
            path = graphs.file(images)
            assert graphs.file(images) is path
            result = onnx_graphs.session_call(path, images, (2, 10), 1)()
            torch.testing.assert_close(result, prepared.model(images), atol=1e-5, rtol=1e-4)
        assert path.exists()
        monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: 1 / 0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot express the model in ONNX: ZeroDivisionError"):
                graphs.file(torch.randn(1, 3, 20, 20))
    assert not path.exists()
    with pytest.raises(RuntimeError, match="refuses the graph"):
        onnx_graphs.session_call(b"nothing", images, (2, 10), 1)


def test_pools_have_their_turns_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []

    def instead(calls: Mapping[str, Any], device: torch.device, *, rounds: int, warmup: int, **rest: Any) -> Any:
        order.append(("".join(calls), rounds, warmup))
        return {name: Times((1.0,) * rounds) for name in calls}

    monkeypatch.setattr(turns, "interleaved", instead)
    monkeypatch.setattr(turns, "settle", lambda: order.append("|"))
    call = lambda: None  # noqa: E731
    pools: Any = ({"a": call, "b": call}, {}, {"x": call})
    torch.set_num_threads(2)
    found = in_turns(pools, CPU, rounds=7, seconds=1e9)
    # Two stretches, of four rounds and of three, each with a call that is not timed first.
    assert order == ["|", ("ab", 4, 3), "|", ("x", 4, 3), "|", ("ab", 3, 1), "|", ("x", 3, 1)]
    assert {name: len(times.seconds) for name, times in found.items()} == {"a": 7, "b": 7, "x": 7}
    assert len(in_turns(pools, CPU, rounds=7, seconds=0)["x"].seconds) == 4  # time has run out
    order.clear()
    in_turns(pools[:2], CPU, rounds=7, seconds=1e9)
    torch.set_num_threads(1)  # no thread waits for work
    in_turns(pools, CPU, rounds=7, seconds=1e9)
    assert order == [("ab", 7, 3), ("abx", 7, 3)]


def test_settling_waits_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.0, 0.002, 0.002, 0.004, 0.004, 0.0041])
    waits: list[float] = []
    monkeypatch.setattr(turns.time, "process_time", lambda: next(used))
    monkeypatch.setattr(turns.time, "sleep", waits.append)
    turns.settle()
    assert len(waits) == 3


def test_threads_are_rows_and_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def measure(bench: CpuBench, batch: int, choices: Any) -> Any:
        threads = torch.get_num_threads()
        seen.append((threads, batch))
        return BatchResult(batch, 0.0, {"dense": side(1, "packed"), "sparse": side(1, "packed")}, threads), []

    monkeypatch.setattr(CpuBench, "measure", measure)
    monkeypatch.setattr(results, "core_count", lambda: 4)
    setup = InferenceSetup(source="test_resnet", image_size=32, batches=(4, 1), threads=(2, 1, 2), per_layer=False)
    found = inference_bench(setup)
    assert seen == [(2, 4), (2, 1), (1, 4), (1, 1)]
    assert [(row.batch, row.threads) for row in found.batches] == [(4, 2), (4, 1), (1, 2), (1, 1)]
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(CpuBench, "measure", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inference_bench(setup)
    assert torch.get_num_threads() == 1


def test_every_row_has_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(prepared: Prepared, executors: Any, *, batch: int, **rest: Any) -> Plan:
        key = key_for(prepared, batch=batch, dtype=torch.float32, device=CPU)
        return Plan(key, {"layer1.0.conv1": f"{batch} on {torch.get_num_threads()}"}, {}, {}, "")

    def measure(bench: CpuBench, batch: int, choices: Any) -> Any:
        assert choices == {"layer1.0.conv1": f"{batch} on {torch.get_num_threads()}"}
        return row(2, 1, 3, 0.25 if batch == 2 else 0), []

    fast: Any = type("Fast", (), {"measured": True, "name": "fast"})()
    monkeypatch.setattr(inference, "usable_executors", lambda device, dtype: [fast])
    monkeypatch.setattr(inference, "tune", planned)
    monkeypatch.setattr(CpuBench, "measure", measure)
    monkeypatch.setattr(LayerBench, "measure", lambda *arguments: [])
    monkeypatch.setattr(results, "core_count", lambda: 2)
    found = inference_bench(InferenceSetup(source="test_resnet", image_size=32, batches=(1, 2), threads=(1, 2)))
    keys = [(plan.key.batch, plan.key.device.rpartition(", ")[2]) for plan in found.plans]
    assert keys == [(1, "1 threads"), (1, "2 threads"), (2, "1 threads"), (2, "2 threads")]
    assert found.layers_at == (2, 2)
    assert "times scatter widely: other work on this machine? (batch 2, 1 thread; batch 2, 2 threads)" in found.notes


def test_threads_by_default_are_one_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "core_count", lambda: 4)
    setup = InferenceSetup(source="x")
    for available, expected in ((1, (1,)), (3, (1, 3)), (64, (1, 4))):
        monkeypatch.setattr(torch, "get_num_threads", lambda available=available: available)
        assert setup.thread_counts() == expected
    assert InferenceSetup(source="x", device=torch.device("cuda")).thread_counts() == (None,)
    with pytest.raises(UsageError, match=r"threads = \[5\]: from 1 to 4, the number of cores"):
        InferenceSetup(source="x", threads=(5,))
    with pytest.raises(UsageError, match=r"threads = \[0\]: from 1 to 4"):
        InferenceSetup(source="x", threads=(0,))
    with pytest.raises(UsageError, match="they are a CPU's, and cuda is none"):
        InferenceSetup(source="x", threads=(1,), device=torch.device("cuda"))
    with pytest.raises(UsageError, match=r"some of eager, compiled are needed$"):
        InferenceSetup(source="x", modes=("onnxruntime",), device=torch.device("cuda"))


def side(median: float, mode: str, spread: float = 0.0, dtype: str = "float32") -> Side:
    quartiles = ((1 - spread) * median, median, (1 + spread) * median)
    return Side(mode, quartiles, 1 / median, None, 1, {mode: quartiles}, dtype)


def row(dense: float, sparse: float, bf16: float, spread: float = 0.0) -> BatchResult:
    sides = {"dense": side(dense, "onnxruntime"), "sparse": side(sparse, "compiled", spread)}
    return BatchResult(4, 0.0, {**sides, BF16: side(bf16, "packed", dtype="bfloat16")}, 2)


def layer(name: str, variant: str, seconds: float, rival: float, sparse: float) -> LayerResult:
    times = {"dense": (seconds,) * 3, "cpu": (sparse,) * 3}
    return LayerResult(name, (8, 8), "2:4", variant, "", 100, 1, times, {"packed": (rival,) * 3}, 0.5)


def test_the_verdict_says_against_whom_and_where_bfloat16_is_faster() -> None:
    fast: Any = type("Fast", (), {"measured": True})()
    start = "batch 4, 2 threads: sparse is "
    assert verdict([row(2, 1, 1.5)], [], [fast], CPU) == start + "faster than dense (onnxruntime): 2.00x, spread 0.0%"
    assert verdict([row(1, 2, 2)], [], [fast], CPU) == start + "slower than dense (onnxruntime): 0.50x, spread 0.0%"
    level = row(1.05, 1, 1, 0.1)
    assert verdict([level], [], [fast], CPU) == start + "level with dense (onnxruntime): 1.05x, spread 10.0%"
    said = verdict([row(2, 1, 0.5)], [], [fast], CPU)
    assert said.endswith("2.00x, spread 0.0%, but dense bf16 (packed) is faster than sparse: 2.00x")
    layers = [layer("a", "cpu", 9, 8, 2), layer("b", "dense", 2, 3, 2)]
    said = verdict([row(2, 1, 2)], layers, [fast], CPU)
    assert "1 of 2 sparse layers run sparse, 2.00x in the geometric mean against the best dense way of each" in said
    assert "3.03x weighted by its time" in said  # 4 ** (8 / 10)


def test_the_peak_is_that_of_registers_where_the_kernels_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from lbc_cli.runtime.native import library

    rates = type("Library", (), {"lbc_rate": staticmethod(lambda isa, kind: {(2, 0): 4e9, (2, 1): 1e9}[isa, kind])})
    monkeypatch.setattr(library, "why_missing", lambda: None)
    monkeypatch.setattr(library, "isas", lambda: ("avx512", "avx2", "portable"))
    monkeypatch.setattr(library, "kernels", lambda: rates)
    torch.set_num_threads(2)
    found = measured_peak(CPU, torch.float32)
    assert found == machine.Peak(256e9, "multiply-adds of avx512 registers, one thread's times 2", 64e9)
    assert found.share(128e9) == 0.5
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(machine, "_product", lambda device, dtype, size: 1e9)
    monkeypatch.setattr(machine, "_convolution", lambda device, dtype: 3e9)
    said = "a 3 x 3 convolution, the faster of matrix product and 3 x 3 convolution, one thread's times 2"
    assert measured_peak(CPU, torch.bfloat16) == machine.Peak(6e9, said)
    monkeypatch.setattr(library, "why_missing", lambda: "not built")
    assert measured_peak(CPU, torch.float32) == machine.Peak(6e9, said)
    monkeypatch.setattr(library, "why_missing", lambda: None)
    monkeypatch.setattr(library, "isas", lambda: ("portable",))
    assert measured_peak(CPU, torch.float32) == machine.Peak(6e9, said)


def test_the_machine_says_what_it_can() -> None:
    assert measured_peak(CPU, torch.float32).operations > 1e8
    assert machine._product(CPU, torch.float32, 64) > 0
    assert machine._convolution(CPU, torch.float32) > 1e8
    assert isinstance(clocks(CPU), dict)
    assert set(machine.bfloat16_support()) == {"avx512_bf16", "amx"}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> InferenceBench:
    monkeypatch.setattr(CpuBench, "measure", lambda bench, batch, choices: (row(2, 1, 0.5 if batch == 4 else 4), []))
    monkeypatch.setattr(results, "core_count", lambda: 2)
    found = [layer("stages.3.blocks.2.mlp.fc1", "cpu", 9e-3, 8e-3, 2e-3), layer("b", "dense", 2e-3, 3e-3, 2e-3)]
    monkeypatch.setattr(LayerBench, "measure", lambda *arguments: found)
    setup = InferenceSetup(source="test_resnet", image_size=32, batches=(4,), threads=(2,), runtime="reference")
    return inference_bench(setup)


def test_tables_fit_a_terminal(shown: InferenceBench, capsys: pytest.CaptureFixture[str]) -> None:
    print_bench(Console(), shown)
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines() if not line.startswith("note")) <= 140
    rows = [line.split() for line in printed.splitlines()]
    assert [
        "4",
        "2",
        "dense",
        "bf16",
        "packed",
        "500",
        "ms",
        "500",
        "ms",
        "-",
        "500",
        "ms",
        "2.0",
        "4.00x",
        "1",
        "B",
    ] in rows
    assert any(line[:4] == ["stages.3.blocks.2.mlp.fc1", "8x8", "8.00", "ms"] for line in rows)
    assert "avx512_bf16" in printed
    assert "medians at batch 4, 2 threads" in printed


def test_the_figure_has_a_panel_for_each_number_of_threads(shown: InferenceBench, tmp_path: Path) -> None:
    assert draw_bench(shown, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_measures_what_it_is_told() -> None:
    options = ["--image-size", "32", "--batch", "1,2", "--threads", "1", "--rounds", "1", "--modes", "eager"]
    done = lbc("bench", "test_resnet", "--device", "cpu", "--runtime", "reference", "--no-layers", "--json", *options)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert [(entry["batch"], entry["threads"]) for entry in record["batches"]] == [(1, 1), (2, 1)]
    assert "not asked for: compiled, onnxruntime; dense may be faster there" in record["notes"]
    assert record["layers_at"] is None
    assert record["peak_source"].endswith("one thread's times 1")
