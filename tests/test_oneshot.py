"""`lbc prune` and `lbc convert`: what they write is what was asked, verified, and never by halves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import lbc_cli
from lbc_cli import checkpoint, models, oneshot
from lbc_cli.cli import app
from lbc_cli.errors import (
    CheckpointError,
    LbcError,
    MethodError,
    ModelError,
    OutputError,
    PatternError,
    TargetError,
    UsageError,
    VerificationError,
)
from lbc_cli.patterns import Pattern, check_mask, holds, magnitude_mask
from lbc_cli.targets import find_targets
from lbc_cli.verifier import verify
from tests.foreign import authors_forward, authors_layer, bitmask_layer, under

TINY = "test_resnet"
CONV = "layer1.0.conv1.weight"


def start(**kwargs: Any) -> oneshot.Start:
    return oneshot.from_name(TINY, weights="random", seed=3, kwargs={"num_classes": 5, **kwargs})


def model_state(seed: int = 3) -> dict[str, Tensor]:
    made = oneshot.from_name(TINY, weights="random", seed=seed, kwargs={"num_classes": 5})
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def sparse_state(pattern: str = "2:4", negative_zeros: bool = False) -> dict[str, Tensor]:
    """Weights that hold N:M in every layer that can take it, as `w * mask` leaves them."""
    made = start()
    state = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    for target in find_targets(made.model, Pattern.parse(pattern)).targets:
        mask = magnitude_mask(target.weight, target.pattern)
        weight = state[target.name]
        state[target.name] = weight * mask if negative_zeros else weight.masked_fill(~mask, 0)
    return state


def lbc(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def only_line(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


# Pruning


def slow_magnitude(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask in plain loops: the n largest of m consecutive input channels, the lower position first."""
    out, inputs, *kernel = weight.shape
    flat = weight.reshape(out, inputs, math.prod(kernel))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    for o in range(out):
        for k in range(flat.shape[2]):
            for begin in range(0, inputs, m):
                group = flat[o, begin : begin + m, k].abs().tolist()
                for position in sorted(range(m), key=lambda i: (-group[i], i))[:n]:
                    kept[o, begin + position, k] = True
    return kept.reshape(weight.shape)


def test_magnitude_keeps_the_largest_and_nothing_else_changes(tmp_path: Path) -> None:
    before = model_state()
    outcome = oneshot.prune(start(), pattern="2:4", out=tmp_path / "m.safetensors")
    after = checkpoint.read(outcome.path).tensors
    names = [layer.name for layer in outcome.layers]
    assert CONV in names
    for name, tensor in before.items():
        if name in names:
            mask = slow_magnitude(tensor, 2, 4)
            assert torch.equal(after[name], tensor.masked_fill(~mask, 0))
            assert not torch.signbit(after[name][~mask]).any()
        else:
            assert torch.equal(after[name], tensor)
    layer = next(layer for layer in outcome.layers if layer.name == CONV)
    share = before[CONV][slow_magnitude(before[CONV], 2, 4)].abs().sum() / before[CONV].abs().sum()
    assert layer.magnitude == pytest.approx(float(share))
    assert (layer.density, layer.pattern) == (0.5, "2:4")


def calibrated(method: str) -> dict[str, Any]:
    """What a method needs besides a pattern, in its smallest form."""
    if not oneshot.SCORES[method].needs_images:
        return {}
    return {"data": "digits", "calibration": 6, "device": "cpu", "overrides": ("data.image_size=32",)}


@pytest.mark.parametrize("method", oneshot.SCORES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4/8", "3:8/4", "1:16"])
def test_every_method_keeps_exactly_n_and_leaves_positive_zeros(tmp_path: Path, method: str, pattern: str) -> None:
    made = start(num_classes=10)
    targets = find_targets(made.model, Pattern.parse(pattern)).targets
    outcome = oneshot.prune(made, pattern=pattern, out=tmp_path / "m.safetensors", method=method, **calibrated(method))
    for target in targets:
        check_mask(target.weight != 0, target.pattern)
        assert not torch.signbit(target.weight[target.weight == 0]).any()
    manifest = checkpoint.read_manifest(outcome.path)
    assert (manifest.method, manifest.phase, manifest.epoch) == (method, "final", None)
    assert set(manifest.sparse) == {target.name for target in targets}
    report = verify(outcome.path)
    assert report.ok
    assert not report.findings
    loaded = lbc_cli.load(outcome.path)
    assert all(holds(loaded.get_parameter(target.name), target.pattern) for target in targets)


def test_layers_have_their_own_patterns_and_dense_ones_their_reasons(tmp_path: Path) -> None:
    layers = {"layer4.*": "1:4", "layer3.0.conv2": "dense"}
    outcome = oneshot.prune(start(), pattern="2:4/16", layers=layers, out=tmp_path / "m.safetensors")
    patterns = {layer.name: layer.pattern for layer in outcome.layers}
    assert patterns["layer4.0.conv1.weight"] == "1:4/16"
    assert patterns[CONV] == "2:4/16"
    reasons = {skipped.name: skipped.reason for skipped in outcome.skipped}
    assert reasons["layer3.0.conv2.weight"] == "dense by layers: 'layer3.0.conv2'"
    assert reasons["fc.weight"] == "classifier"
    assert any(reason.startswith("stem") for reason in reasons.values())


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    files = []
    for number, seed in enumerate((3, 3, 4)):
        made = oneshot.from_name(TINY, weights="random", seed=seed)
        path = tmp_path / f"{number}.safetensors"
        oneshot.prune(made, pattern="2:4", out=path)
        files.append(checkpoint.read(path).tensors)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert not torch.equal(files[0][CONV], files[2][CONV])


def test_weights_come_from_files_and_keep_their_dtype(tmp_path: Path) -> None:
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in model_state().items()}
    save_file(state, tmp_path / "plain.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        made = oneshot.from_name(TINY, weights=tmp_path / name)
        outcome = oneshot.prune(made, pattern="2:4", out=tmp_path / f"{name}.out")
        stored = checkpoint.read(outcome.path).tensors
        assert stored[CONV].dtype == torch.bfloat16
        assert torch.equal(stored[CONV], state[CONV].masked_fill(~slow_magnitude(state[CONV], 2, 4), 0))
        assert outcome.origin == name


def test_a_checkpoint_is_pruned_further_and_what_it_says_of_its_images_stays(tmp_path: Path) -> None:
    first = start()
    metrics = {"pixels": {"channels": 3, "mean": [0.5]}, "class_names": ["a", "b"], "top1": 70.0}
    checkpoint.save(first.model, tmp_path / "dense.safetensors", metrics=metrics)
    again = oneshot.from_file(tmp_path / "dense.safetensors")
    assert again.arch == TINY
    outcome = oneshot.prune(again, pattern="1:4", out=tmp_path / "m.safetensors")
    manifest = checkpoint.read_manifest(outcome.path)
    assert manifest.kwargs["num_classes"] == 5
    assert manifest.metrics["pixels"] == metrics["pixels"]
    assert manifest.metrics["class_names"] == ["a", "b"]
    assert "top1" not in manifest.metrics, "it was measured before the pruning"


def test_how_images_are_prepared_is_written_for_models_of_timm(tmp_path: Path) -> None:
    outcome = oneshot.prune(start(), pattern="2:4", out=tmp_path / "m.safetensors")
    pixels = checkpoint.read_manifest(outcome.path).metrics["pixels"]
    config = models.data_config(models.create(TINY))
    assert (pixels["channels"], pixels["height"], pixels["width"]) == tuple(config["input_size"])
    assert tuple(pixels["mean"]) == tuple(config["mean"])
    assert pixels["crop_pct"] == config["crop_pct"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"pattern": "4:2"}, PatternError, "N must be"),
        ({"method": "magnitud"}, MethodError, r"unknown method 'magnitud'.*Did you mean 'magnitude'"),
        ({"layers": {"nothing": "1:4"}}, TargetError, "matches no layer"),
        ({"pattern": "3:7"}, TargetError, "no layer takes 3:7"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], kind: type[LbcError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        oneshot.prune(start(), **{"pattern": "2:4", "out": tmp_path / "m.safetensors", **arguments})
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_ranked_are_refused(tmp_path: Path) -> None:
    made = start()
    with torch.no_grad():
        made.model.get_parameter(CONV)[0, 0, 0, 0] = math.nan
    with pytest.raises(ModelError, match=r"layer1\.0\.conv1\.weight holds NaN or Inf"):
        oneshot.prune(made, pattern="2:4", out=tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [(CONV, math.nan), (CONV, math.inf), ("bn1.running_var", math.nan)])
def test_converting_names_the_tensor_that_no_verification_would_pass(tmp_path: Path, name: str, value: float) -> None:
    state = sparse_state()
    place = tuple(state[name].nonzero()[0].tolist())
    state[name][place] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=f"{name} holds NaN or Inf: nothing was written; .*w.safetensors"):
        oneshot.convert(tmp_path / "w.safetensors", model=TINY, pattern="2:4", out=tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_the_method_is_checked_before_any_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot, "from_name", lambda *args, **kwargs: pytest.fail("weights were fetched"))
    result = lbc("prune", TINY, "--pattern", "2:4", "--method", "magnitud", "--out", tmp_path / "m")
    assert result.exit_code == 2, result.output
    assert "Did you mean 'magnitude'" in only_line(result)


def test_nothing_is_overwritten_and_the_folder_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("precious")
    for action in (
        lambda: oneshot.prune(start(), pattern="2:4", out=path),
        lambda: oneshot.convert(path, out=path, model=TINY),
    ):
        with pytest.raises(OutputError, match="is not overwritten"):
            action()
    assert path.read_text() == "precious"
    with pytest.raises(OutputError, match="there is no folder"):
        oneshot.prune(start(), pattern="2:4", out=tmp_path / "absent" / "m.safetensors")


def test_a_file_that_fails_its_verification_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path) -> Any:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return verify(path)

    monkeypatch.setattr("lbc_cli.oneshot.writing.verify", damaged)
    with pytest.raises(VerificationError, match="it was removed"):
        oneshot.prune(start(), pattern="2:4", out=tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


# Converting


@pytest.mark.parametrize("container", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_weights_that_hold_the_pattern_are_packed_unchanged(tmp_path: Path, container: str, pattern: str) -> None:
    state, path = sparse_state(pattern, negative_zeros=True), tmp_path / container
    if container.endswith("pth"):
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        save_file(state, path)
    outcome = oneshot.convert(path, out=tmp_path / "packed", model=TINY, pattern=pattern)
    stored = checkpoint.read(outcome.path)
    assert all(torch.equal(stored.tensors[name], tensor) for name, tensor in state.items())
    assert {layer.pattern for layer in outcome.layers} == {pattern}
    assert not torch.signbit(stored.tensors[CONV][state[CONV] == 0]).any()
    negative = sum(int(((t == 0) & torch.signbit(t)).sum()) for n, t in state.items() if n in stored.manifest.sparse)
    assert negative > 100
    assert outcome.notes == (f"{negative} zeros were -0.0 and became +0.0",)
    loaded = lbc_cli.load(outcome.path)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), lbc_cli.load(path, model=TINY)(image))


def test_weights_that_do_not_hold_it_are_refused_by_name_place_and_values(tmp_path: Path) -> None:
    state = sparse_state()
    weight = state["layer3.0.conv2.weight"]
    weight[7, 8:12, 1, 2] = torch.tensor([0.5, -0.25, 0.125, 0.0])
    weight[9, 4:8, 0, 0] = 1.0
    save_file(state, tmp_path / "x.safetensors")
    arguments: dict[str, Any] = {"out": tmp_path / "packed", "model": TINY, "pattern": "2:4"}
    with pytest.raises(VerificationError) as caught:
        oneshot.convert(tmp_path / "x.safetensors", **arguments)
    message = str(caught.value)
    assert "layer3.0.conv2.weight: group (o=7, k=(1, 2), i=8..11) holds [0.5 -0.25 0.125 0]" in message
    assert "2:4 keeps at most 2 of 4; 2 of 5184 groups violate it" in message
    assert "--layers 'GLOB=dense'" in message
    assert f"lbc prune MODEL --weights {tmp_path / 'x.safetensors'}" in message
    assert not (tmp_path / "packed").exists()
    listed = oneshot.convert(tmp_path / "x.safetensors", layers={"layer3.0.conv2": "dense"}, **arguments)
    assert torch.equal(checkpoint.read(listed.path).tensors["layer3.0.conv2.weight"], weight)


def test_layers_alone_make_everything_else_dense(tmp_path: Path) -> None:
    save_file(sparse_state("1:4"), tmp_path / "x.safetensors")
    arguments: dict[str, Any] = {"model": TINY}
    with pytest.raises(UsageError, match="does not say which pattern it holds"):
        oneshot.convert(tmp_path / "x.safetensors", out=tmp_path / "packed", **arguments)
    outcome = oneshot.convert(
        tmp_path / "x.safetensors", out=tmp_path / "packed", layers={"layer1.*": "1:4"}, **arguments
    )
    assert {layer.name for layer in outcome.layers} == {CONV, "layer1.0.conv2.weight"}


def test_groups_with_room_are_filled_up(tmp_path: Path) -> None:
    state = sparse_state("1:4")
    state[CONV][0] = 0
    save_file(state, tmp_path / "x.safetensors")
    outcome = oneshot.convert(tmp_path / "x.safetensors", out=tmp_path / "packed", model=TINY, pattern="2:4")
    assert torch.equal(checkpoint.read(outcome.path).tensors[CONV], state[CONV])
    assert verify(outcome.path).ok


def _authors_file(path: Path, left: int) -> dict[str, Tensor]:
    """A checkpoint of the authors' for a network of ours; gives what its forward passes multiply by."""
    stored: dict[str, Tensor] = {}
    forward: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model_state().items():
        if name in (CONV, "layer1.0.conv2.weight"):
            alive = [torch.randperm(6, generator=generator)[:left].tolist() for _ in range(tensor.numel() // 4)]
            layer = authors_layer(tensor, 2, 4, alive)
            stored |= under(name.removesuffix(".weight"), layer)
            forward[name] = authors_forward(layer)
        else:
            stored[name] = forward[name] = tensor
    names = {f"module.{name}": tensor for name, tensor in stored.items()}
    torch.save({"state_dict": names, "best_acc_top1": torch.tensor([70.0]), "epoch": 120, "args.k": 5}, path)
    return forward


def test_a_checkpoint_of_the_authors_brings_its_pattern(tmp_path: Path) -> None:
    forward = _authors_file(tmp_path / "model_best.pt", left=1)
    outcome = oneshot.convert(tmp_path / "model_best.pt", out=tmp_path / "packed", model=TINY)
    stored = checkpoint.read(outcome.path)
    assert set(stored.manifest.sparse) == {CONV, "layer1.0.conv2.weight"}
    assert stored.manifest.method == "lbc"
    assert all(torch.equal(stored.tensors[name], tensor) for name, tensor in forward.items())
    assert {skipped.reason for skipped in outcome.skipped} == {"the file claims no pattern for it"}
    assert verify(outcome.path, pattern="2:4").ok


def test_a_checkpoint_of_the_authors_in_mid_training_is_refused(tmp_path: Path) -> None:
    forward = _authors_file(tmp_path / "model_last.pt", left=2)
    with pytest.raises(VerificationError, match=r"\d+ of 2304 groups still have several candidates"):
        oneshot.convert(tmp_path / "model_last.pt", out=tmp_path / "packed", model=TINY)
    assert not (tmp_path / "packed").exists()
    made = oneshot.from_name(TINY, weights=tmp_path / "model_last.pt")
    assert torch.equal(made.model.get_parameter(CONV), forward[CONV])
    assert oneshot.prune(made, pattern="2:4", out=tmp_path / "packed").report.ok


def test_a_bitmask_folder_is_packed_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "test_vit"
    vit = models.create(name, num_classes=5)
    state = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    stored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("blocks.0.") and tensor.dim() == 2:
            state[key] = tensor.masked_fill(~magnitude_mask(tensor, Pattern(2, 4)), 0)
            stored |= under(key.removesuffix(".weight"), bitmask_layer(state[key]))
        else:
            stored[key] = tensor
    folder = tmp_path / "vit"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 5}))
    outcome = oneshot.convert(folder, out=tmp_path / "packed")
    assert all(torch.equal(checkpoint.read(outcome.path).tensors[key], tensor) for key, tensor in state.items())
    assert len(outcome.layers) == 4


def test_our_semi_structured_export_is_read_and_packed_again(tmp_path: Path) -> None:
    from lbc_cli.exports import export

    arguments: dict[str, Any] = {"layers": {"layer1.*": "1:4"}}
    packed = oneshot.prune(start(), pattern="2:4", out=tmp_path / "m.safetensors", **arguments).path
    exported = export(packed, "semi-structured", tmp_path / "s.safetensors").path
    again = oneshot.convert(exported, out=tmp_path / "again.safetensors")
    first, second = checkpoint.read(packed), checkpoint.read(again.path)
    assert {name: entry.pattern for name, entry in second.manifest.sparse.items()} == {
        name: entry.pattern for name, entry in first.manifest.sparse.items()
    }
    for name, tensor in first.tensors.items():
        rounded = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(second.tensors[name].to(rounded.dtype), rounded)
    assert second.manifest.metrics["pixels"] == first.manifest.metrics["pixels"]
    content = bytearray(exported.read_bytes())
    content[-1] ^= 1
    exported.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        oneshot.from_file(exported)


def test_what_is_packed_already_or_names_no_model_is_not_converted(tmp_path: Path) -> None:
    oneshot.prune(start(), pattern="2:4", out=tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="already: there is nothing to convert"):
        oneshot.convert(tmp_path / "m.safetensors", out=tmp_path / "packed")
    save_file(sparse_state(), tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="name it with --model"):
        oneshot.convert(tmp_path / "x.safetensors", out=tmp_path / "packed", pattern="2:4")
    with pytest.raises(UsageError, match="give the file as its weights"):
        oneshot.from_file(tmp_path / "x.safetensors")


# The command line


def test_prune_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    common = ["--weights", "random", "--num-classes", "5", "--seed", "3", "--set", "drop_rate=0.1"]
    result = lbc("prune", TINY, "--pattern", "2:4", "--vector", "4", *common, "--out", path)
    assert result.exit_code == 0, result.output
    assert "ok: 14 sparse layers verified" in result.stdout
    assert "kept |w|" in result.stdout
    assert "classifier" in result.stdout
    assert f"{TINY}, weights: random, seed 3" in result.stderr
    assert checkpoint.read_manifest(path).kwargs == {"num_classes": 5, "drop_rate": 0.1}
    again = lbc("prune", path, "--pattern", "1:4", "--layers", "layer4.*=1:8", "--out", tmp_path / "n", "--json")
    record = json.loads(again.stdout)
    assert record["verified"] is True
    assert {layer["pattern"] for layer in record["layers"]} == {"1:4", "1:8"}
    assert set(record["dense"][0]) == {"name", "shape", "reason"}
    assert list(record["seconds"]) == sorted(
        ["model and weights", "scores and masks", "packing and writing", "verifying"]
    )
    assert lbc("verify", tmp_path / "n").exit_code == 0


def test_convert_from_the_command_line(tmp_path: Path) -> None:
    torch.save({"model": sparse_state(), "model_ema": model_state()}, tmp_path / "x.pth")
    common = ["convert", tmp_path / "x.pth", "--model", TINY, "--pattern", "2:4", "--out", tmp_path / "m"]
    assert "say which with --key" in only_line(lbc(*common))
    refused = lbc(*common, "--key", "model_ema")
    assert refused.exit_code == 3
    assert "keeps at most 2 of 4" in only_line(refused)
    result = lbc(*common, "--key", "model")
    assert result.exit_code == 0, result.output
    assert "ok: 14 sparse layers verified" in result.stdout
    assert "kept |w|" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TINY, "--out", "m"], "needs --pattern"),
        ([TINY, "--pattern", "2:4"], "needs --out"),
        ([TINY, "--pattern", "2:4/4", "--vector", "8", "--out", "m"], "disagree"),
        ([TINY, "--pattern", "2:4", "--layers", "layer4", "--out", "m"], "write GLOB=N:M"),
        ([TINY, "--pattern", "2:4", "--set", "img_size", "--out", "m"], "write KEY=VALUE"),
        ([TINY, "--pattern", "2:4", "--set", "a.b=1", "--out", "m"], "write KEY=VALUE"),
        ([TINY, "--pattern", "2:4", "--num-classes", "3", "--set", "num_classes=4", "--out", "m"], "given twice"),
        ([TINY, "--pattern", "2:4", "--seed", "1", "--out", "m"], "--seed is for random weights"),
        ([TINY, "--pattern", "2:4", "--weights", "absent.pth", "--out", "m"], "absent.pth: no such weight file"),
        ([TINY, "--pattern", "2:4", "--weights", "random", "--key", "ema", "--out", "m"], "there is none"),
        ([TINY, "--pattern", "2:4", "--method", "wnda", "--out", "m"], "Did you mean 'wanda'"),
        ([TINY, "--pattern", "2:4", "--method", "wanda", "--out", "m"], "name the data with --data"),
        (["absent.safetensors", "--pattern", "2:4", "--out", "m"], "absent.safetensors: no such weight file"),
        (["./x.pth", "--pattern", "2:4", "--weights", "random", "--out", "m"], "drop --weights"),
        (["test_resnett", "--pattern", "2:4", "--out", "m"], "Did you mean 'test_resnet'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lbc("prune", *arguments)
    assert result.exit_code == 2, result.output
    assert message in only_line(result)
    assert not (tmp_path / "m").exists()


def test_damaged_and_dangerous_files_exit_3(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pth")
    (tmp_path / "y.safetensors").write_bytes(b"\xff" * 64)
    for name, message in [("x.pth", "could run code"), ("y.safetensors", "cannot be read")]:
        result = lbc("prune", TINY, "--pattern", "2:4", "--weights", tmp_path / name, "--out", tmp_path / "m")
        assert result.exit_code == 3, result.output
        assert message in only_line(result)
    with pytest.raises(CheckpointError):
        oneshot.from_file(tmp_path / "y.safetensors")


def test_a_folder_is_a_file_unless_timm_has_a_model_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", TINY):
        (tmp_path / name).mkdir()
    assert "a folder without weights" in only_line(lbc("prune", "mine", "--pattern", "2:4", "--out", "m"))
    assert lbc("prune", TINY, "--pattern", "2:4", "--weights", "random", "--out", "m").exit_code == 0
