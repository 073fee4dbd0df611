"""`lbc bench`: what is compared, what is claimed, and that nothing is claimed without a kernel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lbc_cli.bench import inference as module
from lbc_cli.bench import results
from lbc_cli.bench.inference import inference_bench, open_source, weight_bytes
from lbc_cli.bench.machine import clocks, measured_peak
from lbc_cli.bench.results import InferenceBench, InferenceSetup, Side
from lbc_cli.checkpoint import save
from lbc_cli.errors import UsageError, VerificationError
from lbc_cli.report import Console
from lbc_cli.report.benched import draw_bench, print_bench
from lbc_cli.runtime import open_model
from lbc_cli.runtime.executors import EXECUTORS
from lbc_cli.runtime.tune import Plan, key_for
from tests.checkpoints import FakePruner
from tests.test_cli import lbc, only_line
from tests.test_runtime import CPU, pruned

QUICK = {"image_size": 64, "rounds": 3, "seconds": 0.01}


@pytest.fixture(scope="module")
def result() -> InferenceBench:
    setup = InferenceSetup(source="test_resnet", runtime="reference", batches=(1, 2), **QUICK)  # type: ignore[arg-type]
    return inference_bench(setup)


def test_the_whole_bench_runs_on_the_reference(result: InferenceBench) -> None:
    assert [entry.batch for entry in result.batches] == [1, 2]
    for entry in result.batches:
        assert set(entry.sides) == {"dense", "sparse"}
        assert entry.difference is not None
        assert 0 <= entry.difference <= 1e-4
        for side in entry.sides.values():
            assert side.images_per_second == pytest.approx(entry.batch / side.quartiles[1])
        assert entry.speedup == entry.sides["dense"].quartiles[1] / entry.sides["sparse"].quartiles[1]
    assert "reference decodes" in result.notes[0]
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
        "environment", "notes", "batches", "layers", "verdict", "estimate",
    }  # fmt: skip
    assert all(f"{name}" in (results.__doc__ or "") for name in record)
    assert set(record["batches"][0]) == {"batch", "difference", "sides", "speedup", "spread"}
    assert set(record["batches"][0]["sides"]["dense"]) == {
        "mode", "quartiles", "images_per_second", "peak_bytes", "weight_bytes", "modes",
    }  # fmt: skip
    assert record["schema"] == 1
    assert record["environment"]["clocks"].keys() == {"before", "after"}


def test_without_a_kernel_dense_is_measured_alone() -> None:
    found = inference_bench(InferenceSetup(source="test_resnet", per_layer=False, **QUICK))  # type: ignore[arg-type]
    assert set(found.batches[0].sides) == {"dense"}
    assert found.batches[0].speedup is None
    assert "no speed-up is claimed" in found.notes[0]


def test_outputs_are_compared_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lbc_cli.runtime.backends import ReferenceOperand

    decode = ReferenceOperand.dense
    monkeypatch.setattr(ReferenceOperand, "dense", lambda self: 1.01 * decode(self))

    def never(*args: object, **options: object) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(module, "interleaved", never)
    setup = InferenceSetup(source="test_resnet", runtime="reference", per_layer=False, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match=r"sparse outputs differ from dense ones by .* nothing was timed"):
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


def test_the_verdict_names_who_is_faster() -> None:
    def side(median: float) -> Side:
        return Side("eager", (median, median, median), 1 / median, None, 1, {})

    sides = {"dense": side(2.0), "sparse": side(1.0)}
    found = results.BatchResult(8, 0.0, sides)
    executor = type("Fast", (), {"measured": True})()
    assert module._verdict([found], [], [executor], CPU) == "batch 8: sparse is faster (2.00x, spread 0.0%)"
    slower = results.BatchResult(1, 0.0, {"dense": side(1.0), "sparse": side(2.0)})
    assert "slower (0.50x" in module._verdict([slower], [], [executor], CPU)


def test_two_runs_agree_within_their_spread() -> None:
    setup = InferenceSetup(source="test_resnet", image_size=64, rounds=15, per_layer=False)
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
    assert "dense: 3 input channels: not a multiple of 4" in printed
    assert draw_bench(result, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_the_machine_says_what_it_can() -> None:
    assert measured_peak(CPU, torch.float32) > 1e8
    assert isinstance(clocks(CPU), dict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lbc"], "--method belongs to training: add --train"),
        (["--train", "--dtype", "float16"], "--dtype belongs to inference: drop it, or --train"),
        (["--batch", "1,x"], "--batch 1,x: give numbers of images"),
        (["--batch", "1,2", "--train"], "--train measures one batch size: 2 are given"),
        (["--dtype", "flaot32"], "Did you mean 'float32'?"),
        (["--modes", "lazy"], "some of eager, compiled are needed"),
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
        ("--tune",): "cpu has no sparse kernel in torch.float32 here: nothing to choose from",
        ("--tune", "--runtime", "reference"): "nothing to choose from",
    }.items():
        refused = lbc("bench", tmp_path / "m.safetensors", "--device", "cpu", *more)
        assert refused.exit_code == 2, refused.output
        assert message in only_line(refused)
    options = ["--runtime", "reference", "--image-size", "64", "--batch", "1", "--rounds", "3", "--no-layers", "--json"]
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
    measure, layer = module._measure, "layer4.0.conv1"

    def only_at_two(*arguments: Any) -> Any:
        setup, prepared, executors, batch, _, progress = arguments
        names = [entry.name for entry in prepared.layers() if not entry.reason]
        choices = {} if batch == 2 else dict.fromkeys(names, "dense")
        plan = Plan(key_for(prepared, batch=batch, dtype=torch.float32, device=CPU), choices, {}, {}, "")
        return measure(setup, prepared, executors, batch, plan, progress)

    monkeypatch.setattr(module, "_measure", only_at_two)
    setup = InferenceSetup(source="test_resnet", runtime="reference", batches=(2, 1), **QUICK)  # type: ignore[arg-type]
    assert {entry.name: entry.variant for entry in inference_bench(setup).layers}[layer] == "reference:im2col"


def test_the_times_shown_are_those_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    once = module.time_layer

    def noting(layer: Any, *rest: Any) -> Any:
        timed.append(layer.name)
        return once(layer, *rest)

    monkeypatch.setattr(module, "time_layer", noting)
    setup = InferenceSetup(source="test_vit", runtime="reference", rounds=1, seconds=0.01)
    prepared, executors = open_source(setup), [EXECUTORS["reference"]]
    chosen = {"blocks.0.attn.proj": {"dense": (1.0, 2.0, 3.0), "reference": (4.0, 5.0, 6.0)}}
    layers = {layer.name: layer for layer in module._layers(setup, prepared, executors, 1, [], chosen)}
    assert layers["blocks.0.attn.proj"].times == chosen["blocks.0.attn.proj"]
    # Of six equal blocks one is measured: its proj is known, its qkv and fc1 have one shape.
    assert timed == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "head"]


def test_two_dense_sides_are_not_compared_in_words() -> None:
    prepared = open_source(InferenceSetup(source="test_resnet", image_size=64))
    plan = Plan(key_for(prepared, batch=8, dtype=torch.float32, device=CPU), {"a": "dense"}, {}, {}, "")
    sides = {name: Side("eager", (t, t, t), 1 / t, None, 1, {}) for name, t in {"dense": 1.0, "sparse": 2.0}.items()}
    executor = type("Fast", (), {"measured": True})()
    found = module._verdict([results.BatchResult(8, 0.0, sides)], [], [executor], CPU, [plan])
    assert found == "batch 8: nothing is faster sparse, so that everything runs dense"


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
