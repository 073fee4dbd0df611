"""Exports: one contract for every format, then what each promises by itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from lbc_cli import checkpoint, models
from lbc_cli.cli import app
from lbc_cli.errors import CheckpointError, LbcError, OutputError, UsageError, VerificationError
from lbc_cli.exports import FORMATS, ExportOptions, export, run
from lbc_cli.exports.base import ExportedLayer, Job, Written
from lbc_cli.exports.staging import staged
from lbc_cli.exports.timm import timm_config
from lbc_cli.patterns import Pattern
from lbc_cli.targets import find_targets
from lbc_cli.verifier import Finding, Report, verify
from tests.checkpoints import FakePruner, small_checkpoint

BASE = ["timm", "dense", "semi-structured"]  # those that need no extra


def save_timm(path: Path, arch: str = "test_resnet", pattern: str = "2:4", **options: Any) -> nn.Module:
    """A checkpoint of a small timm model with magnitude masks."""
    torch.manual_seed(0)
    metrics = options.pop("metrics", None)
    dtype = options.pop("dtype", torch.float32)
    model = models.create(arch, **options).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[operator, union-attr]
    targets = find_targets(model, Pattern.parse(pattern)).targets
    pruner = FakePruner(model, {target.name: str(target.pattern) for target in targets})
    checkpoint.save(model, path, pruner=pruner, metrics=metrics)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_timm(path, num_classes=10)
    return path


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder with the SHA-256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- every format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASE)
def test_every_format_writes_what_verifies_against_the_checkpoint(saved: Path, tmp_path: Path, name: str) -> None:
    result = export(saved, name, tmp_path / "out", options=ExportOptions())
    assert result.path == tmp_path / "out"
    assert result.format == name
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert result.verified.ok
    assert result.verified.path == str(tmp_path / "out")
    assert result.verified.against is not None
    assert result.verified.against["different"] == 0
    manifest = checkpoint.read_manifest(saved)
    assert {layer.name for layer in result.layers if layer.pattern} == set(manifest.sparse)
    assert {layer.name for layer in result.verified.layers} == set(manifest.sparse)
    assert result.bytes == sum(
        path.stat().st_size for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")] if path.is_file()
    )
    again = verify(tmp_path / "out", layers=dict.fromkeys(manifest.sparse, "2:4"), against=saved)
    assert again.ok


@pytest.mark.parametrize("name", BASE)
def test_every_format_is_deterministic_and_names_its_own_place(saved: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "a.safetensors"
    source.write_bytes(saved.read_bytes())
    first = export(source, name).path
    assert first.parent == tmp_path
    assert first.name.startswith("a")
    before = files(first) if first.is_dir() else first.read_bytes()
    second = export(source, name, tmp_path / "b").path
    assert (files(second) if second.is_dir() else second.read_bytes()) == before


@pytest.mark.parametrize("name", [*BASE, "onnx"])
def test_nothing_is_overwritten(saved: Path, tmp_path: Path, name: str) -> None:
    taken = tmp_path / "taken.onnx"
    for make in (lambda: taken.write_text("mine"), lambda: taken.symlink_to(tmp_path / "nowhere"), taken.mkdir):
        make()
        with pytest.raises(OutputError, match=r"taken\.onnx exists and is not overwritten"):
            export(saved, name, taken)
        assert [entry.name for entry in tmp_path.iterdir()] == ["taken.onnx"]
        taken.rmdir() if taken.is_dir() else taken.unlink()
    with pytest.raises(OutputError, match=r"there is no folder .*: create it"):
        export(saved, name, tmp_path / "no" / "out.onnx")


@pytest.mark.parametrize("name", BASE)
def test_what_does_not_verify_is_removed(
    saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, **options: Any) -> Report:
        assert path.exists()
        return Report(str(path), findings=[Finding("pattern", "fc", "a group uses three")])

    monkeypatch.setattr(run, "verify", failing)
    with pytest.raises(VerificationError, match="a group uses three; it was removed"):
        export(saved, name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_weight_in_an_artefact_is_found_before_it_gets_its_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = Job.tensors

    def wrong(job: Job) -> Any:
        for name, tensor in tensors(job):
            yield name, tensor.clone().fill_(2) if name == "fc.bias" else tensor

    monkeypatch.setattr(Job, "tensors", wrong)
    for name in BASE:
        with pytest.raises(VerificationError, match=r"fc\.bias differs"):
            export(saved, name, tmp_path / "out", options=ExportOptions(check=False))
        assert list(tmp_path.iterdir()) == []


def test_files_that_are_still_in_training_are_refused(tmp_path: Path) -> None:
    model = models.create("test_resnet")
    name = find_targets(model, Pattern(2, 4)).targets[0].name
    checkpoint.save(model, tmp_path / "m.safetensors", pruner=FakePruner(model, {name: "2:4"}, phase="training"))
    for name in FORMATS:
        with pytest.raises(UsageError, match=r"saved while training .epoch 3.: its groups still have several"):
            export(tmp_path / "m.safetensors", name, tmp_path / "out")


def test_what_is_no_checkpoint_is_told_from_what_is_damaged(saved: Path, tmp_path: Path) -> None:
    for name in BASE:
        export(saved, name, tmp_path / f"{name}.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x07")
    for other, what in {
        "timm.safetensors": "is a folder",
        "dense.safetensors": "is no checkpoint of lbc",
        "semi-structured.safetensors": "is an export already",
        "weights.pth": "is a file of torch.save",
        "graph.onnx": "is an ONNX file",
        "gone": "no such file",
    }.items():
        with pytest.raises(UsageError, match=what) as error:
            export(tmp_path / other, "dense", tmp_path / "out")
        assert other == "gone" or "`lbc convert " in str(error.value)
    content = bytearray(saved.read_bytes())
    content[20] ^= 1
    like_a_pickle = (0x280).to_bytes(8, "little") + b"{" + bytes(700)
    for damaged in (bytes(content), saved.read_bytes()[:-1], b"", b"abc", b"\xff" * 200, like_a_pickle):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(CheckpointError):
            export(tmp_path / "damaged", "dense", tmp_path / "out")
    content = bytearray(saved.read_bytes())
    content[-100] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    for name in BASE:
        with pytest.raises(CheckpointError, match="does not match its SHA-256"):
            export(tmp_path / "damaged", name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_formats_and_options_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no format 'tim': there are timm, dense, .* Did you mean 'timm'"):
        export(saved, "tim", tmp_path / "out")
    for name, exporter in FORMATS.items():
        with pytest.raises(UsageError, match=f"format {name} cannot have --dtype 'int4'"):
            export(saved, name, tmp_path / "out", options=ExportOptions(dtype="int4"))
        assert exporter.name == name
        assert exporter.description
        assert exporter.runs_on
    with pytest.raises(UsageError, match="semi-structured cannot have --dtype 'float32'"):
        export(saved, "semi-structured", tmp_path / "out", options=ExportOptions(dtype="float32"))


# --- dense -----------------------------------------------------------------------------------------------------------


def test_dense_holds_every_tensor_bit_for_bit_under_its_own_key(tmp_path: Path) -> None:
    model = small_checkpoint(tmp_path / "m.safetensors")
    result = export(tmp_path / "m.safetensors", "dense")
    tensors = load_file(result.path)
    assert list(tensors) == sorted(tensors, key=lambda key: (tensors[key].dtype != torch.int64, key))
    assert set(tensors) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    raw = result.path.read_bytes()
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "timm"])
def test_floats_are_rounded_to_the_dtype_asked_for(saved: Path, tmp_path: Path, name: str, dtype: str) -> None:
    result = export(saved, name, tmp_path / "out", options=ExportOptions(dtype=dtype))
    tensors = load_file(result.path / "model.safetensors" if name == "timm" else result.path)
    for key, tensor in checkpoint.read(saved).tensors.items():
        wanted = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
        assert tensors[key].dtype == wanted
        assert torch.equal(tensors[key], tensor.to(wanted))
    assert bool(result.notes) == (dtype != "float32")


def test_a_weight_that_a_dtype_cannot_hold_is_refused_and_small_ones_are_counted(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[:, 0] = torch.tensor([1e5, 1e-9, float("inf"), float("nan")])
    pruner = FakePruner(model, {"weight": "1:4"})
    checkpoint.save(model, tmp_path / "m.safetensors", pruner=pruner)
    with pytest.raises(
        UsageError, match="tensor weight holds 100000, which float16 cannot: its largest number is 65504"
    ):
        export(tmp_path / "m.safetensors", "dense", options=ExportOptions(dtype="float16"))
    model.weight.data[0, 0] = 1.0
    checkpoint.save(model, tmp_path / "n.safetensors")
    (note,) = _cast_notes(tmp_path / "n.safetensors")
    assert note.startswith("tensors rounded from float32 to float16: the largest change is ")
    assert note.endswith("; 1 of them became 0")


def _cast_notes(path: Path) -> tuple[str, ...]:
    from lbc_cli.exports.cast import Caster

    cast = Caster.to("float16")
    for name, tensor in checkpoint.stream(path):
        rounded = cast(name, tensor)
        assert torch.equal(rounded.isinf(), tensor.isinf())
    return cast.notes()


def test_dense_streams_and_never_holds_the_model(tmp_path: Path) -> None:
    """80 MB of weights in 20 layers; the process may grow by far less."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(20))

    model = Deep()
    checkpoint.save(model, tmp_path / "m.safetensors", pruner=FakePruner(model, {"layers.0.weight": "2:4"}))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import torch, lbc_cli.checkpoint.reader, lbc_cli.checkpoint.tensors, lbc_cli.exports.cast\n"
        "from lbc_cli.exports.base import ExportOptions, Job\n"
        "from lbc_cli.exports.dense import write_dense\n"
        "from lbc_cli.checkpoint import read_manifest\n"
        "source = Path(sys.argv[1])\n"
        "job = Job(source, read_manifest(source), ExportOptions())\n"
        "status = lambda key: int(Path('/proc/self/status').read_text().split(key)[1].split()[0])\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = status('VmRSS:')\n"
        "write_dense(job, Path(sys.argv[2]))\n"
        "print((status('VmHWM:') - before) / 1024)\n"
    )
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory can only be measured where /proc/self/clear_refs can be written")
    command = [sys.executable, "-c", code, str(tmp_path / "m.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60
    assert (tmp_path / "out.safetensors").stat().st_size > 80e6


# --- timm ------------------------------------------------------------------------------------------------------------

PLAIN_TIMM = (
    "import sys\n"
    "sys.modules['lbc_cli'] = None\n"
    "import timm, torch\n"
    "for folder, images, logits in zip(*[iter(sys.argv[1:])] * 3):\n"
    "    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()\n"
    "    torch.save(model(torch.load(images)), logits)\n"
)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "other classes": ("test_resnet", {"num_classes": 10}, (3, 64, 64)),
    "grey": ("test_resnet", {"kwargs": {"in_chans": 1}}, (1, 64, 64)),
    "five channels": ("test_resnet", {"kwargs": {"in_chans": 5}, "num_classes": 3}, (5, 64, 64)),
    "sides and pooling": ("test_vit", {"kwargs": {"img_size": [96, 64], "global_pool": "avg"}}, (3, 96, 64)),
    "image size": ("test_vit", {"image_size": 32, "num_classes": 10}, (3, 32, 32)),
    "any size": ("test_vit", {"kwargs": {"dynamic_img_size": True}}, (3, 160, 160)),
    "dropout": ("test_efficientnet", {"drop_rate": 0.2, "drop_path_rate": 0.1}, (3, 64, 64)),
    "no head": ("test_convnext", {"num_classes": 0}, (3, 64, 64)),
    "label offset": ("test_byobnet", {}, (3, 64, 64)),
}


def test_plain_timm_without_lbc_computes_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    wanted: dict[str, Tensor] = {}
    arguments: list[str] = []
    for number, (case, (arch, options, size)) in enumerate(MODELS.items()):
        source = tmp_path / f"{number}.safetensors"
        save_timm(source, arch, **options)
        folder = export(source, "timm").path
        images = torch.randn(2, *size)
        torch.save(images, tmp_path / f"{number}.in")
        with torch.no_grad():
            wanted[case] = checkpoint.load(source)(images)
        arguments += [str(folder), str(tmp_path / f"{number}.in"), str(tmp_path / f"{number}.out")]
    done = subprocess.run([sys.executable, "-c", PLAIN_TIMM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for number, case in enumerate(MODELS):
        assert torch.equal(torch.load(tmp_path / f"{number}.out"), wanted[case]), case


def test_the_configuration_says_how_the_model_was_trained(tmp_path: Path) -> None:
    pixels = {
        "channels": 3, "height": 48, "width": 64, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip
    metrics = {"pixels": pixels, "class_names": ["cat", "dog"]}
    save_timm(tmp_path / "m.safetensors", "test_resnet.r160_in1k", num_classes=2, metrics=metrics)
    folder = export(tmp_path / "m.safetensors", "timm").path
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["num_classes"] == 2
    assert config["label_names"] == ["cat", "dog"]
    assert config["model_args"] == {}
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 48, 64]
    assert {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")} == {
        key: pixels[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    }
    assert cfg["first_conv"] == "conv1.0"
    assert not {"url", "hf_hub_id", "tag", "license", "test_input_size", "label_offset", "file", "source"} & set(cfg)
    loaded = models.from_folder(folder)
    assert list(models.data_config(loaded)["mean"]) == [0.1, 0.2, 0.3]
    assert list(models.data_config(loaded)["input_size"]) == [3, 48, 64]


def test_the_configuration_without_a_recipe_is_that_of_the_model() -> None:
    model = models.create("test_vit", image_size=64)
    config = timm_config(model, "test_vit.r160_in1k", {"img_size": 64})
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["model_args"] == {"img_size": 64}
    five = timm_config(models.create("test_resnet", kwargs={"in_chans": 5}), "test_resnet", {"in_chans": 5})
    assert five["pretrained_cfg"]["first_conv"] is None  # timm 1.0.20 would start a stem of 5 channels anew
    assert five["pretrained_cfg"]["input_size"][0] == 5
    assert "label_names" not in timm_config(model, "test_vit", {}, {"class_names": ["one"]})


def test_weights_that_timm_would_change_are_noticed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_folder = models.from_folder

    def changing(folder: Path) -> nn.Module:
        model = from_folder(folder)
        with torch.no_grad():
            model.get_parameter("conv1.0.weight")[0, 0, 0, 0] += 1
        return model

    monkeypatch.setattr(models, "from_folder", changing)
    with pytest.raises(VerificationError, match=r"timm loads conv1\.0\.weight with other values"):
        export(saved, "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_timm_s_are_sent_to_dense(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="does not come from a timm model: export it with --format dense"):
        export(tmp_path / "m.safetensors", "timm")


# --- staging ---------------------------------------------------------------------------------------------------------


def test_what_lies_beside_an_artefact_moves_with_it_and_stale_scratch_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".m.onnx.lbc-tmp-999999999"
    stale.mkdir()
    (stale / "m.onnx").write_text("half")
    with staged(tmp_path / "m.onnx") as scratch:
        assert not stale.exists()
        scratch.write_text("graph")
        scratch.with_name("m.onnx.data").write_text("weights")
        assert not (tmp_path / "m.onnx").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_a_place_that_is_taken_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(OutputError, match="m exists"), staged(tmp_path / "m"):
        pytest.fail("it was not refused")


def test_a_companion_that_is_taken_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_text("mine")

    def make() -> None:
        with staged(tmp_path / "m.onnx") as scratch:
            scratch.write_text("graph")
            scratch.with_name("m.onnx.data").write_text("weights")

    with pytest.raises(OutputError, match=r"m\.onnx\.data exists"):
        make()
    assert files(tmp_path) == {"m.onnx.data": hashlib.sha256(b"mine").hexdigest()}


def test_a_failure_within_leaves_nothing(tmp_path: Path) -> None:
    def make(failure: Exception) -> None:
        with staged(tmp_path / "m") as scratch:
            scratch.mkdir()
            (scratch / "file").write_text("x")
            raise failure

    with pytest.raises(RuntimeError, match="stop"):
        make(RuntimeError("stop"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        make(OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


# --- the command -----------------------------------------------------------------------------------------------------


def lbc(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_exports_reports_and_refuses(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    code, shown, _ = lbc("export", saved, "--format", "semi-structured", "--out", out)
    assert code == 0
    assert "Export: semi-structured" in shown
    assert "stem: it sees the image" in shown
    assert "tensors rounded from float32 to bfloat16" in shown
    assert shown.rstrip().endswith("sparse layers verified")
    code, shown, error = lbc("export", saved, "--format", "semi-structured", "--out", out)
    assert (code, shown) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_command_prints_json(saved: Path, tmp_path: Path) -> None:
    code, shown, _ = lbc("export", saved, "--format", "dense", "--out", tmp_path / "d", "--dtype", "float16", "--json")
    assert code == 0
    result = json.loads(shown)
    assert result["schema"] == 1
    assert result["path"] == str(tmp_path / "d")
    assert result["bytes"] == (tmp_path / "d").stat().st_size
    assert result["verified"]["ok"] is True
    assert {layer["stored"] for layer in result["layers"]} == {"dense"}


def test_the_command_lists_the_formats() -> None:
    code, shown, _ = lbc("export", "--list")
    assert code == 0
    for name in FORMATS:
        assert name in shown
    code, shown, _ = lbc("export", "--list", "--json")
    assert [entry["name"] for entry in json.loads(shown)] == list(FORMATS)
    assert lbc("export", "--list", "--format", "dense")[0] == 2


@pytest.mark.parametrize("arguments", [[], ["--format", "dense"], ["file"], ["no-such", "--format", "dense"]])
def test_the_command_says_what_is_missing(arguments: list[str]) -> None:
    code, shown, error = lbc("export", *arguments)
    assert (code, shown) == (2, "")
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_the_formats_are_listed_without_torch() -> None:
    code = (
        "import sys\n"
        "from lbc_cli.exports import FORMATS\n"
        "assert FORMATS['dense'].dtypes\n"
        "assert not {'torch', 'timm', 'onnx', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_new_format_is_one_object(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an exporter must do is what `Exporter` says, and no more."""

    class Copy:
        name, description, runs_on, extra, dtypes = "copy", "the same again", "lbc", None, ()

        def default_path(self, source: Path) -> Path:
            return source.with_name("copy.safetensors")

        def write(self, job: Job, out: Path) -> Written:
            out.write_bytes(job.source.read_bytes())
            return Written((ExportedLayer("fc.weight", (10, 96), "", "dense", "classifier"),), ("a note",))

    monkeypatch.setitem(FORMATS, "copy", Copy())
    result = export(saved, "copy", tmp_path / "c.safetensors")
    assert result.verified.ok
    assert result.notes == ("a note",)
    with pytest.raises(LbcError, match="none: it is the checkpoint's"):
        export(saved, "copy", tmp_path / "d", options=ExportOptions(dtype="float16"))
