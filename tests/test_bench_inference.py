"""`lbc bench`: what is compared, what is claimed, and that nothing is claimed without a kernel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lbc_cli.bench import inference as module
from lbc_cli.bench import layers, results, turns, ways
from lbc_cli.bench.inference import inference_bench, open_source
from lbc_cli.bench.layers import LayerBench
from lbc_cli.bench.notes import Notes
from lbc_cli.bench.results import InferenceBench, InferenceSetup, Side
from lbc_cli.bench.sides import weight_bytes
from lbc_cli.bench.verdict import verdict
from lbc_cli.bench.whole_gpu import measure_gpu
from lbc_cli.checkpoint import save
from lbc_cli.errors import UsageError, VerificationError
from lbc_cli.report import Console
from lbc_cli.report.benched import print_bench
from lbc_cli.report.benched_plot import draw_bench
from lbc_cli.runtime import open_model
from lbc_cli.runtime.clock import Times
from lbc_cli.runtime.executors import EXECUTORS
from lbc_cli.runtime.tune import Plan, key_for
from tests.checkpoints import FakePruner
from tests.test_cli import lbc, only_line
from tests.test_runtime import CPU, pruned

QUICK = {"image_size": 64, "rounds": 3, "seconds": 0.01, "threads": (1,)}


@pytest.fixture(scope="module")
def result() -> InferenceBench:
    setup = InferenceSetup(source="test_resnet", runtime="reference", batches=(1, 2), **QUICK)  # type: ignore[arg-type]
    return inference_bench(setup)


def test_the_whole_bench_runs_on_the_reference(result: InferenceBench) -> None:
    assert [entry.batch for entry in result.batches] == [1, 2]
    for entry in result.batches:
        assert set(entry.sides) - {results.BF16} == {"dense", "sparse"}
        assert entry.threads == 1
        assert entry.difference is not None
        assert 0 <= entry.difference <= 1e-4
        for side in entry.sides.values():
            assert side.images_per_second == pytest.approx(entry.batch / side.quartiles[1])
        assert entry.speedup == entry.sides["dense"].quartiles[1] / entry.sides["sparse"].quartiles[1]
    assert "reference decodes" in result.notes[0]
    assert {side.mode.split()[0] for entry in result.batches for side in entry.sides.values()} <= {"eager", "packed"}
    assert result.verdict == "nothing sparse was measured: cpu has no sparse kernel here"
    assert result.plans == ()


def test_every_layer_is_listed_with_its_work(result: InferenceBench) -> None:
    layers = {layer.name: layer for layer in result.layers}
    assert layers["conv1.0"].reason == "3 input channels: not a multiple of 4"
    assert layers["conv1.0"].speedup is None
    point = layers["layer3.0.conv3"]
    assert point.shape == (192, 48, 1, 1)
    pixels = 2 * 4 * 4  # two images of 64 pixels behind a stride of 16
    assert point.operations == pytest.approx(2 * pixels * 192 * 48)
    assert set(point.times) == {"dense", "reference"}
    assert set(layers["layer4.0.conv1"].times) == {"dense", "reference:im2col", "reference:shifts"}


def test_compressed_weights_are_counted_compressed(result: InferenceBench) -> None:
    dense, sparse = (result.batches[0].sides[name].weight_bytes for name in ("dense", "sparse"))
    prepared = open_source(result.setup)
    own = sum(value.nbytes for value in prepared.model.parameters())
    assert dense == own
    converted, _ = prepared.sparse([EXECUTORS["reference"]], dtype=torch.float32, device=CPU)
    assert sparse == weight_bytes(converted) < dense


def test_json_holds_everything_that_its_documentation_names(result: InferenceBench) -> None:
    record = json.loads(json.dumps(result.as_dict()))
    assert set(record) == {
        "schema", "source", "pattern", "device", "dtype", "image_size", "folded", "executors", "measured_peak",
        "peak_source", "permuted_peak", "environment", "notes", "batches", "layers_at", "layers", "verdict", "estimate",
    }  # fmt: skip
    assert set(record["batches"][0]) == {
        "batch", "threads", "difference", "sides", "speedup", "spread", "bf16_over_sparse",
    }  # fmt: skip
    assert set(record["batches"][0]["sides"]["dense"]) == {
        "mode", "quartiles", "images_per_second", "peak_bytes", "weight_bytes", "modes", "dtype",
    }  # fmt: skip
    assert set(record["layers"][0]) == {
        "name", "shape", "pattern", "variant", "reason", "operations", "moved_bytes", "times", "rivals", "density",
        "speedup", "achieved", "share_of_peak", "rates",
    }  # fmt: skip
    documented = [*record, *record["batches"][0], *record["batches"][0]["sides"]["dense"], *record["layers"][0]]
    assert [name for name in documented if name not in (results.__doc__ or "")] == []
    assert record["schema"] == 2
    assert record["layers_at"] == {"batch": 2, "threads": 1}
    assert record["environment"]["clocks"].keys() == {"before", "after"}


def test_without_a_kernel_dense_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_executors", lambda device, dtype: [])
    found = inference_bench(InferenceSetup(source="test_resnet", per_layer=False, **QUICK))  # type: ignore[arg-type]
    assert set(found.batches[0].sides) - {results.BF16} == {"dense"}
    assert found.batches[0].speedup is None
    assert "no speed-up is claimed" in found.notes[0]


def test_outputs_are_compared_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lbc_cli.runtime.backends import ReferenceOperand

    decode = ReferenceOperand.dense
    monkeypatch.setattr(ReferenceOperand, "dense", lambda self: 1.01 * decode(self))

    def never(*args: object, **options: object) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(ways, "interleaved", never)
    monkeypatch.setattr(turns, "interleaved", never)
    setup = InferenceSetup(source="test_resnet", runtime="reference", per_layer=False, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(
        VerificationError, match=r"sparse \(eager NHWC\) outputs differ from dense .* nothing was timed"
    ):
        inference_bench(setup)


def test_random_models_hide_no_layer_behind_zeros() -> None:
    prepared = open_source(InferenceSetup(source="test_resnet", image_size=64))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = prepared.model(images)
        for layer in prepared.layers():
            weight = layer.weight
            kept = weight.clone()
            weight.zero_()
            assert not torch.equal(prepared.model(images), before), layer.name
            weight.copy_(kept)


def side(median: float, mode: str = "eager", dtype: str = "float32") -> Side:
    return Side(mode, (median, median, median), 1 / median, None, 1, {}, dtype)


def fast() -> Any:
    return type("Fast", (), {"measured": True})()


def test_the_verdict_names_who_is_faster() -> None:
    cuda = torch.device("cuda")
    found = results.BatchResult(8, 0.0, {"dense": side(2.0), "sparse": side(1.0)})
    assert verdict([found], [], [fast()], cuda) == "batch 8: sparse is faster (2.00x, spread 0.0%)"
    slower = results.BatchResult(1, 0.0, {"dense": side(1.0), "sparse": side(2.0)})
    assert "slower (0.50x" in verdict([slower], [], [fast()], cuda)


def test_two_runs_agree_within_their_spread() -> None:
    setup = InferenceSetup(source="test_resnet", image_size=64, rounds=15, per_layer=False, threads=(1,))
    ratios = []
    for _ in range(3):  # a machine that is busy with something else may fall between the two runs
        first, second = (inference_bench(setup).batches[0] for _ in range(2))
        low, high = sorted(entry.sides["dense"].quartiles[1] for entry in (first, second))
        ratios.append(high / low / (1 + 2 * (first.spread + second.spread)))
        if ratios[-1] <= 1.25:
            return
    raise AssertionError(f"medians of two runs lie further apart than their spreads: {ratios}")


def test_tables_and_figure(result: InferenceBench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_bench(Console(), result)
    printed = capsys.readouterr().out
    assert "End to end, as measured" in printed
    assert "dense (3 input channels: not a multiple of 4): conv1.0" in printed
    assert draw_bench(result, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lbc"], "--method belongs to training: add --train"),
        (["--train", "--dtype", "float16"], "--dtype belongs to inference: drop it, or --train"),
        (["--batch", "1,x"], "--batch 1,x: give numbers of images"),
        (["--batch", "1,2", "--train"], "--train measures one batch size: 2 are given"),
        (["--dtype", "flaot32"], "Did you mean 'float32'?"),
        (["--modes", "lazy"], "some of eager, compiled are needed"),
        (["--modes", "onnxruntime"], "some of eager, compiled are needed, onnxruntime beside them"),
        (["--threads", "0"], "--threads 0: give numbers of threads, such as 1,4"),
        (["--threads", "two"], "--threads two: give numbers of threads"),
        (["--threads", "1,9999"], "the number of cores that this process may use"),
        (["--threads", "1", "--train"], "--threads belongs to inference: drop it, or --train"),
        (["--threads", "1", "--estimate", "h200"], "--threads belongs to measurements on a CPU: drop --estimate"),
        (["--runtime", "vektor"], "unknown runtime 'vektor'"),
        (["--runtime", "semi-structured"], "cannot run here"),
        (["--tune"], "--tune stores its choices beside a file: test_resnet is none"),
        (["--estimate", "b200"], "b200"),
        (["--estimate", "h200", "--plot", "x.png"], "nothing was measured, so there is nothing to draw"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = lbc("bench", "test_resnet", "--device", "cpu", "--image-size", "64", *arguments)
    assert done.exit_code == 2, done.output
    assert message in only_line(done)


def test_estimates_stand_apart_from_measurements() -> None:
    done = lbc("bench", "test_vit", "--estimate", "h200", "--batch", "8", "--dtype", "bfloat16", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert ", as measured" not in done.stdout
    assert "speed-up (estimate)" in done.stdout
    assert "nothing was measured" in done.stdout
    record = json.loads(
        lbc("bench", "test_vit", "--estimate", "h200", "--batch", "8", "--device", "cpu", "--json").stdout
    )
    assert record["batches"] == []
    assert record["estimate"]["fused"]["estimate_gpu"].startswith("H200")


def test_a_checkpoint_is_measured_as_it_is(tmp_path: Path) -> None:
    model, patterns = pruned("test_resnet", "1:4", torch.float32)
    save(model, tmp_path / "m.safetensors", pruner=FakePruner(model, {name: str(p) for name, p in patterns.items()}))
    prepared = open_model(tmp_path / "m.safetensors", image_size=64)
    assert {str(layer.pattern) for layer in prepared.layers() if layer.pattern} == {"1:4"}
    for more, message in {
        ("--pattern", "2:4"): "--pattern belongs to a model by name",
        ("--tune", "--no-layers"): "drop --no-layers",
        ("--tune", "--dtype", "float64"): "cpu has no sparse kernel in torch.float64 here: nothing to choose from",
        ("--tune", "--runtime", "reference"): "nothing to choose from",
    }.items():
        refused = lbc("bench", tmp_path / "m.safetensors", "--device", "cpu", *more)
        assert refused.exit_code == 2, refused.output
        assert message in only_line(refused)
    options = ["--runtime", "reference", "--image-size", "64", "--batch", "1", "--rounds", "3", "--no-layers", "--json"]
    options += ["--modes", "eager", "--threads", "1"]
    done = lbc("bench", tmp_path / "m.safetensors", "--device", "cpu", *options)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["source"] == str(tmp_path / "m.safetensors")
    assert record["pattern"] == "1:4"
    assert record["layers"] == []
    with pytest.raises(UsageError, match="at least one batch"):
        InferenceSetup(source="x", batches=())


def test_a_file_that_is_not_there_is_no_model_name() -> None:
    done = lbc("bench", "runs/gone.safetensors", "--device", "cpu")
    assert done.exit_code == 2
    assert only_line(done).endswith("runs/gone.safetensors: no such file")


def test_vector_wise_weights_are_counted_as_they_are_kept() -> None:
    setup = InferenceSetup(source="test_resnet", pattern="1:4/64", image_size=64)
    prepared = open_source(setup)
    executor = EXECUTORS["vector-reference"]
    converted, report = prepared.sparse([executor], dtype=torch.float32, device=CPU)
    plain = sum(value.nbytes for value in prepared.model.parameters())
    kept = sum(math.prod(entry.shape) for entry in report if entry.variant != "dense")
    assert kept
    assert plain - 4 * kept < weight_bytes(converted) < plain


def test_layers_run_as_they_do_at_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, layer = module.CpuBench.measure, "layer4.0.conv1"

    def only_at_two(bench: Any, batch: int, choices: Any) -> Any:
        names = [entry.name for entry in bench.prepared.layers() if not entry.reason]
        return measure(bench, batch, {} if batch == 2 else dict.fromkeys(names, "dense"))

    monkeypatch.setattr(module.CpuBench, "measure", only_at_two)
    setup = InferenceSetup(source="test_resnet", runtime="reference", batches=(2, 1), **QUICK)  # type: ignore[arg-type]
    assert {entry.name: entry.variant for entry in inference_bench(setup).layers}[layer] == "reference:im2col"


def test_the_times_shown_for_a_gpu_are_those_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def noting(layer: Any, ways: Any, *rest: Any) -> Any:
        timed.append(layer.name)
        return {name: Times((1.0,)) for name in ("dense", *ways)}, {}

    monkeypatch.setattr(layers, "time_layer", noting)
    setup = InferenceSetup(source="test_vit", runtime="reference", device=torch.device("cuda"))
    prepared, executors = open_source(setup), [EXECUTORS["reference"]]
    chosen = {"blocks.0.attn.proj": {"dense": (1.0, 2.0, 3.0), "reference": (4.0, 5.0, 6.0)}}
    bench = LayerBench(setup, prepared, executors, 1, Notes())
    found = {layer.name: layer for layer in bench.measure([], chosen, lambda line: None)}
    assert found["blocks.0.attn.proj"].times == chosen["blocks.0.attn.proj"]
    assert found["blocks.0.attn.proj"].rivals == {}
    # Of six equal blocks one is measured: its proj is known, its qkv and fc1 have one shape.
    assert timed == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "head"]


def test_two_dense_sides_are_not_compared_in_words() -> None:
    found = results.BatchResult(8, 0.0, {"dense": side(1.0), "sparse": side(2.0)}, 1)
    said = verdict([found], [], [fast()], CPU, [(8, 1)])
    assert said == "batch 8, 1 thread: nothing is faster sparse, so that everything runs dense"


def test_a_plan_that_is_all_dense_is_told_by_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_dense(setup: Any, prepared: Any, executors: Any, batch: int, progress: Any) -> Plan:
        names = [entry.name for entry in prepared.layers() if not entry.reason]
        choices = dict.fromkeys(names, "dense") if batch == 2 else {}
        return Plan(key_for(prepared, batch=batch, dtype=torch.float32, device=CPU), choices or {"x": "y"}, {}, {}, "")

    told: list[Any] = []
    monkeypatch.setattr(module, "_plan", all_dense)
    monkeypatch.setattr(
        module.CpuBench, "measure", lambda bench, batch, choices: (results.BatchResult(batch, 0, {}, 1), [])
    )
    monkeypatch.setattr(module, "verdict", lambda *arguments: told.append(arguments[-1]) or "")
    setup = InferenceSetup(source="test_resnet", batches=(1, 2), per_layer=False, **QUICK)  # type: ignore[arg-type]
    inference_bench(setup)
    assert told == [[(2, 1)]]


def test_what_runs_on_gpus_measures_each_mode_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = InferenceSetup(source="test_resnet", image_size=64, rounds=1)
    prepared, executors = open_source(setup), [EXECUTORS["reference"]]
    with torch.inference_mode():
        found, executed = measure_gpu(setup, prepared, executors, 2, None, lambda line: None)
        alone, _ = measure_gpu(setup, prepared, [], 2, None, lambda line: None)
    assert {name: list(side.modes) for name, side in found.sides.items()} == {"dense": ["eager"], "sparse": ["eager"]}
    assert found.threads is None
    assert found.difference is not None
    assert any(entry.variant.startswith("reference") for entry in executed)
    assert alone.difference is None
    assert list(alone.sides) == ["dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_bench_on_a_gpu() -> None:
    setup = InferenceSetup(
        source="vit_small_patch16_224",
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        batches=(1, 32),
        modes=("eager", "compiled"),
        estimate="h200",
    )
    found = inference_bench(setup)
    assert all(entry.sides["sparse"].peak_bytes for entry in found.batches)
    assert found.batches[-1].sides["sparse"].weight_bytes < found.batches[-1].sides["dense"].weight_bytes
