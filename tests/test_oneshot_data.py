"""`lbc prune` with images: calibration, accuracy before and after, renewed batch norms, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import lbc_cli
from lbc_cli import checkpoint, models, oneshot
from lbc_cli.accuracy import measure
from lbc_cli.cli import app
from lbc_cli.data.digits import open_digits
from lbc_cli.data.images import DataSource
from lbc_cli.errors import CheckpointError, DataError, LbcError, MethodError, ModelError, UsageError
from lbc_cli.oneshot import images as images_module
from lbc_cli.oneshot.batchnorm import batch_norms
from lbc_cli.oneshot.choice import Calibration
from lbc_cli.oneshot.images import Images, open_images
from lbc_cli.patterns import Pattern, holds
from lbc_cli.recipe import resolve
from lbc_cli.targets import find_targets
from lbc_cli.training import prepare
from tests.test_accuracy import PIXELS, fitted

CPU = torch.device("cpu")
SMALL = ("data.image_size=32",)
WITH_IMAGES = [name for name, score in oneshot.SCORES.items() if score.needs_images]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows some digits, and how its images are prepared."""
    path = tmp_path_factory.mktemp("oneshot") / "dense.safetensors"
    checkpoint.save(fitted(), path, metrics={"pixels": PIXELS, "class_names": [str(n) for n in range(10)]})
    return path


def lbc(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def only_line(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


def start(name: str = "test_resnet", **kwargs: Any) -> oneshot.Start:
    """A random model whose residual branches count from the beginning, where timm starts them at nothing."""
    made = oneshot.from_name(name, weights="random", seed=3, kwargs={"num_classes": 10, **kwargs})
    for norm in batch_norms(made.model).values():
        nn.init.ones_(norm.weight)
    return made


def opened(overrides: tuple[str, ...] = SMALL, kept: dict[str, Any] | None = None) -> Images:
    return open_images(start().model.eval(), "digits", kept=kept or {}, overrides=overrides, device=CPU)


# Calibration images


def test_calibration_images_are_those_of_the_training_split_as_evaluation_prepares_them() -> None:
    images = opened(tuple(f"data.{key}={PIXELS[key]}" for key in ("mean", "std", "crop_pct")) + SMALL)
    pictures, labels = images.calibration(1442, 0, lambda *_: None)
    source = open_digits()
    assert isinstance(source, DataSource)
    assert pictures.shape == (1442, 3, 32, 32)
    assert pictures.dtype == torch.float32
    expected = torch.stack([torch.as_tensor(source.train[i][1]) for i in range(1442)])
    assert torch.equal(labels.sort().values, expected.sort().values)
    darkest, brightest = (0 - 0.305) / 0.376, (1 - 0.305) / 0.376
    assert pictures.min() == pytest.approx(darkest)
    assert pictures.max() == pytest.approx(brightest)
    assert len({picture.numpy().tobytes() for picture in pictures}) > 1400, "each image once"


def test_the_choice_follows_from_the_seed() -> None:
    images = opened()
    chosen = [images.calibration(count, seed, lambda *_: None) for count, seed in [(64, 0), (64, 0), (64, 1), (32, 0)]]
    assert torch.equal(chosen[0][0], chosen[1][0])
    assert not torch.equal(chosen[0][0], chosen[2][0])
    assert torch.equal(chosen[3][1], chosen[0][1][:32]), "more images are added, not others"


def test_fewer_images_than_asked_for_are_refused_with_both_numbers(file: Path, tmp_path: Path) -> None:
    arguments = ["--pattern", "2:4", "--method", "wanda", "--data", "digits", "--calibration", "2000"]
    result = lbc("prune", file, *arguments, "--out", tmp_path / "m")
    assert result.exit_code == 2
    assert "2000 calibration images were asked for, the training split of digits has 1442" in only_line(result)
    assert not (tmp_path / "m").exists()


def test_a_stream_cannot_calibrate() -> None:
    images = opened()
    stream = DataSource(torch.utils.data.Dataset(), images.source.val, 10, None, "wds/shards")
    with pytest.raises(DataError, match="wds/shards is a stream: calibration images are chosen by number"):
        Images(stream, images.pixels, images.evaluation).calibration(2, 0, lambda *_: None)


def test_batches_hold_every_image_once_and_are_nearly_equal() -> None:
    pictures = torch.arange(130.0).reshape(130, 1, 1, 1)
    look = Calibration(nn.Identity(), pictures, torch.arange(130), CPU)
    batches = [*look.batches(64)]
    assert [len(batch) for batch, _ in batches] == [44, 43, 43]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), pictures)
    assert torch.equal(torch.cat([ids for _, ids in batches]), torch.arange(130))


# Accuracy before and after


@pytest.mark.parametrize("method", oneshot.SCORES)
def test_accuracies_are_those_of_lbc_verify(file: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "m.safetensors"
    arguments: list[str | Path] = ["--pattern", "1:4", "--data", "digits", "--device", "cpu", "--recalibrate-bn"]
    result = lbc(
        "prune", file, *arguments, "--method", method, "--calibration", "40", "--permute", "--out", out, "--json"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    before, after = (measure(path, "digits", device="cpu") for path in (file, out))
    for found, name in ((before, "before"), (after, "after")):
        shown = record["accuracy"][name]
        assert (shown["top1"], shown["top5"], shown["images"]) == (found.top1, found.top5, 355)
        assert shown["loss"] == pytest.approx(found.loss, rel=1e-6)
        assert shown["pixels"] == {**PIXELS, "mean": list(found.pixels.mean), "std": list(found.pixels.std)}
    assert before.loss != after.loss
    uses = ([method] if method in WITH_IMAGES else []) + ["batch norms"]
    assert record["calibration"] == {"data": "digits", "images": 40, "seed": 0, "uses": uses}
    assert record["batch_norms"] == len(batch_norms(lbc_cli.load(out)))
    assert record["permutation"]["before"] < record["permutation"]["after"]
    assert (record["layers"][0]["error"] is not None) == (method == "sparsegpt")
    metrics = checkpoint.read_manifest(out).metrics
    assert metrics["calibration"] == record["calibration"]
    assert metrics["permuted"] == 10
    assert metrics["class_names"][3] == "3"
    assert lbc("verify", out).exit_code == 0


def test_the_report_says_all_of_it(file: Path, tmp_path: Path) -> None:
    arguments = ["--pattern", "1:4", "--data", "digits", "--device", "cpu", "--recalibrate-bn", "--calibration", "16"]
    result = lbc("prune", file, *arguments, "--method", "sparsegpt", "--permute", "--out", tmp_path / "m")
    assert result.exit_code == 0, result.output
    for part in (
        "Accuracy on 355 images of digits, 32 x 32 pixels",
        "output lost",
        "Sets of channels (10), 10 permuted",
        "16 training images of digits, seed 0, for sparsegpt and batch norms",
        "largest Hessian: layer4.0.conv1.weight, 1728 x 1728 in float64",
        "10 of 10 sets of channels; kept |w| of all sparse layers",
        "accuracy before",
        "ok: 14 sparse layers verified",
    ):
        assert part in result.stdout, part


def test_without_data_nothing_is_measured(tmp_path: Path) -> None:
    result = lbc("prune", "test_resnet", "--weights", "random", "--pattern", "2:4", "--out", tmp_path / "m", "--json")
    record = json.loads(result.stdout)
    assert [record[key] for key in ("accuracy", "calibration", "permutation", "batch_norms")] == [None, None, None, 0]


def test_images_can_be_prepared_otherwise_and_the_file_remembers(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    settings = ["--set", "data.image_size=40", "--set", "drop_rate=0.1"]
    result = lbc("prune", file, "--pattern", "2:4", "--data", "digits", "--device", "cpu", *settings, "--out", out)
    assert result.exit_code == 0, result.output
    manifest = checkpoint.read_manifest(out)
    assert manifest.metrics["pixels"]["height"] == 40
    assert manifest.metrics["pixels"]["mean"] == list((0.305,) * 3)
    assert manifest.kwargs["drop_rate"] == 0.1
    assert measure(out, "digits", device="cpu").pixels.height == 40


@pytest.mark.parametrize("method", WITH_IMAGES)
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, method: str) -> None:
    files = []
    for number, seed in enumerate((0, 0, 5)):
        path = tmp_path / f"{number}"
        arguments: dict[str, Any] = {"data": "digits", "calibration": 4, "device": "cpu", "overrides": SMALL}
        oneshot.prune(start(), pattern="1:4", out=path, method=method, seed=seed, **arguments)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_weights_of_half_precision_are_pruned_as_they_are(tmp_path: Path) -> None:
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in start().model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    arguments: dict[str, Any] = {"data": "digits", "calibration": 4, "device": "cpu", "overrides": SMALL}
    for method in oneshot.SCORES:
        made = oneshot.from_name("test_resnet", weights=tmp_path / "w.safetensors", kwargs={"num_classes": 10})
        calibrating = {**arguments, "calibration": 4 if method in WITH_IMAGES else None}
        outcome = oneshot.prune(made, pattern="2:4", out=tmp_path / method, method=method, permute=True, **calibrating)
        loaded = lbc_cli.load(outcome.path)
        weight = loaded.get_parameter("layer1.0.conv2.weight")
        assert weight.dtype == torch.bfloat16
        assert holds(weight, Pattern(2, 4))
        assert outcome.measured.after is not None
        assert outcome.measured.after.top1 == measure(outcome.path, "digits", device="cpu").top1


def test_criteria_choose_differently(tmp_path: Path) -> None:
    kept = {}
    for method in oneshot.SCORES:
        made = start()
        more: dict[str, Any] = {"data": "digits", "calibration": 8, "device": "cpu", "overrides": SMALL}
        chosen = more if method in WITH_IMAGES else {}
        oneshot.prune(made, pattern="2:4", out=tmp_path / method, method=method, **chosen)
        kept[method] = made.model.get_parameter("layer3.0.conv2.weight") != 0
    for first in kept:
        for second in kept:
            assert torch.equal(kept[first], kept[second]) == (first == second)


# Batch norms


def test_statistics_are_the_mean_over_the_batches_of_the_pruned_model(tmp_path: Path) -> None:
    made = start()
    for norm in batch_norms(made.model).values():  # as if it had been trained
        nn.init.constant_(norm.running_mean, 3.0)
        norm.num_batches_tracked.fill_(7)
    dense = copy.deepcopy(made.model)
    arguments: dict[str, Any] = {"data": "digits", "calibration": 130, "device": "cpu", "overrides": SMALL}
    outcome = oneshot.prune(made, pattern="2:4", out=tmp_path / "m", recalibrate_bn=True, **arguments)
    assert outcome.measured.batch_norms == len(batch_norms(made.model)) == 15
    pictures, _ = opened().calibration(130, 0, lambda *_: None)
    batches = pictures.tensor_split(3)
    loaded = lbc_cli.load(outcome.path).train()
    means: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double().transpose(0, 1).flatten(1)
            means.setdefault(name, []).append(x.mean(1))
            variances.setdefault(name, []).append(x.var(1, unbiased=True))

        return note

    expected = {name: norm for name, norm in loaded.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    stored = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in expected.items()}
    for name, norm in expected.items():
        norm.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for batch in batches:
            loaded(batch)
    for name, (mean, variance) in stored.items():
        torch.testing.assert_close(mean, torch.stack(means[name]).mean(0).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, torch.stack(variances[name]).mean(0).float(), rtol=1e-4, atol=1e-6)
        assert int(made.model.get_buffer(f"{name}.num_batches_tracked")) == 3
        assert not torch.equal(mean, dense.get_buffer(f"{name}.running_mean"))
    others = {n for n, t in dense.named_parameters() if not torch.equal(t, made.model.get_parameter(n))}
    assert others == {target.name for target in find_targets(dense, Pattern(2, 4)).targets}


# Fine-tuning goes on from the file


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_training_starts_from_what_was_pruned(tmp_path: Path, method: str) -> None:
    made = start()
    more: dict[str, Any] = {"data": "digits", "calibration": 4, "device": "cpu", "overrides": SMALL}
    chosen = more if method in WITH_IMAGES else {}
    path = oneshot.prune(made, pattern="2:4", out=tmp_path / "m", method=method, permute=True, **chosen).path
    settings = ["model.name='test_resnet'", f"model.init='{path}'", "data.source='digits'", "data.workers=0"]
    asp = ["method.name='asp'", "sparsity.pattern='2:4'"]
    job = prepare(resolve(None, overrides=[*settings, *asp, "data.image_size=32", "train.device='cpu'"]))
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(job.model.state_dict()[name], tensor), name
    job.pruner.begin_epoch(0)
    for name, mask in job.pruner.masks().items():
        assert torch.equal(mask, made.model.get_parameter(name) != 0), name


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "taylor"], "--method taylor ranks weights by what images show: name the data with --data"),
        (["--method", "sparsgpt"], "Did you mean 'sparsegpt'"),
        (["--calibration", "8"], "--calibration needs images: name the data with --data"),
        (["--recalibrate-bn"], "--recalibrate-bn needs images"),
        (["--device", "cpu"], "--device needs images"),
        (["--set", "data.image_size=32"], "--set data. needs images"),
        (["--seed", "4"], "--seed is for random weights and calibration images"),
        (["--data", "digits", "--seed", "4"], "--seed is for random weights and calibration images"),
        (["--data", "digits", "--calibration", "8"], "--method magnitude looks at no images"),
        (["--data", "digits", "--recalibrate-bn", "--calibration", "1"], "needs two images at least"),
        (["--data", "digitz"], "Did you mean 'digits'"),
        (["--data", "digits", "--set", "data.nothing=1"], "nothing"),
        (["--data", "digits", "--device", "tpu"], "device 'tpu'"),
        (["--data", "digits", "--pattern", "2:5"], "no layer takes 2:5"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(file: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    pattern = [] if "--pattern" in arguments else ["--pattern", "2:4"]
    result = lbc("prune", file, *pattern, *arguments, "--out", tmp_path / "m")
    assert result.exit_code == 2, result.output
    assert message in only_line(result)
    assert not (tmp_path / "m").exists()


def test_requests_are_checked_before_any_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot, "from_name", lambda *args, **kwargs: pytest.fail("weights were fetched"))
    result = lbc("prune", "resnet50", "--pattern", "2:4", "--method", "wanda", "--out", tmp_path / "m")
    assert "name the data" in only_line(result)


def test_pretrained_weights_that_are_not_to_be_had_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = lbc("prune", "resnet18", "--pattern", "2:4", "--out", tmp_path / "m")
    assert result.exit_code == 2, result.output
    assert "cannot load timm's pretrained weights for resnet18" in only_line(result)


@pytest.mark.parametrize(
    ("made", "more", "kind", "message"),
    [
        (lambda: start("test_vit", img_size=32), {"recalibrate_bn": True}, MethodError, "test_vit has no batch norms"),
        (lambda: start(num_classes=7), {}, DataError, "tells 7 classes apart, digits has 10"),
        (
            lambda: start("vit_tiny_patch16_224"),
            {"overrides": SMALL},
            ModelError,
            r"cannot take images of 3 x 32 x 32 .*image_size",
        ),
        (lambda: start(num_classes=0), {}, DataError, "classes apart, digits has 10"),
    ],
)
def test_models_and_data_that_do_not_go_together(
    tmp_path: Path, made: Any, more: dict[str, Any], kind: type[LbcError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        oneshot.prune(made(), pattern="2:4", out=tmp_path / "m", data="digits", device="cpu", **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["mean", "crop_pct", "interpolation"])
def test_what_a_checkpoint_says_of_its_images_must_be_settings(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"the checkpoint says {key} ="):
        images_module._prepared({key: {"a": 1}})
    with pytest.raises(CheckpointError, match="the checkpoint says mean ="):
        images_module._prepared({"mean": ["x"]})


def test_only_data_settings_prepare_images() -> None:
    with pytest.raises(UsageError, match=r"train\.epochs=3: images are prepared by data\.KEY=VALUE only"):
        opened(("train.epochs=3",))


def test_the_generator_is_left_alone(tmp_path: Path) -> None:
    made = start()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    more: dict[str, Any] = {"data": "digits", "calibration": 4, "device": "cpu", "overrides": SMALL}
    oneshot.prune(made, pattern="2:4", out=tmp_path / "m", method="wanda", permute=True, recalibrate_bn=True, **more)
    assert torch.equal(torch.rand(2), expected)
    assert made.model.training
    assert models.created(made.model) is not None
