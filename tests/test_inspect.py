from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lbc_cli.checkpoint import read_manifest, save, save_state
from lbc_cli.checkpoint.container import TensorInfo, encode_header
from lbc_cli.checkpoint.contents import read_contents
from lbc_cli.checkpoint.manifest import Manifest, Sparse, Stored
from lbc_cli.cli import app
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.report.inspected import recipe_of
from tests.checkpoints import PATTERNS, FakePruner, parts, sealed, small_checkpoint, small_model


def lbc(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def as_json(path: Path) -> Any:
    result = lbc(path, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    small_checkpoint(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_what_a_checkpoint_holds(file: Path) -> None:
    contents = read_contents(file)
    assert contents.manifest == read_manifest(file)
    assert contents.file_bytes == file.stat().st_size
    held = {tensor.name: tensor for tensor in contents.tensors}
    assert set(held) == set(small_model().state_dict())
    conv = held["conv.weight"]
    assert (conv.pattern, conv.shape, conv.dtype) == ("2:4/3", (6, 8, 1, 3), "F32")
    # 3 positions x 6 rows x 4 kept values of 4 bytes; 2 vectors x 3 positions x 1 byte of codes.
    assert (conv.stored_bytes, conv.dense_bytes) == (3 * 6 * 4 * 4 + 2 * 3, 6 * 8 * 3 * 4)
    assert [tensor.name for tensor in contents.sparse] == list(PATTERNS)
    assert held["norm.num_batches_tracked"].shape == ()
    total = contents.header_bytes + sum(tensor.stored_bytes for tensor in contents.tensors)
    assert total == contents.file_bytes


def test_tables(file: Path) -> None:
    result = lbc(file)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "method magnitude" in lines
    assert "phase final" in lines
    assert "epoch 3" in lines
    assert "metrics top-1 12.50 %" in lines
    assert "recipe 1 line; --recipe prints it" in lines
    assert "conv.weight 6x8x1x3 2:4/3 F32 294 B 576 B 51.0 %" in lines
    assert "fc1.weight 4x16 3:8 F32 108 B 256 B 42.2 %" in lines
    assert "fc.weight 3x4 F32 48 B" in lines
    assert not any(line.startswith("fc.bias") for line in lines)
    assert any(line.startswith("packed 2 208 402 B 832 B") for line in lines)
    assert "fc.bias 3 F32 12 B" in [" ".join(line.split()) for line in lbc(file, "-v").stdout.splitlines()]


def test_json(file: Path) -> None:
    record = as_json(file)
    assert record["schema"] == 1
    assert record["kind"] == "checkpoint"
    assert record["model"] == {"arch": None, "kwargs": {}, "task": None}
    assert (record["method"], record["phase"], record["epoch"]) == ("magnitude", "final", 3)
    assert record["recipe"] == "seed = 1\n"
    assert record["environment"]["torch"] == torch.__version__
    by_name = {tensor["name"]: tensor for tensor in record["tensors"]}
    assert by_name["fc1.weight"] == {
        "name": "fc1.weight",
        "shape": [4, 16],
        "dtype": "F32",
        "pattern": "3:8",
        "nonzeros": None,
        "stored_bytes": 108,
        "dense_bytes": 256,
    }
    assert by_name["fc.bias"]["pattern"] is None
    assert record["totals"]["packed"] == {"tensors": 2, "elements": 208, "stored_bytes": 402, "dense_bytes": 832}
    everything = record["totals"]["all"]
    assert everything["stored_bytes"] + record["header_bytes"] == record["file_bytes"] == file.stat().st_size


def test_recipe(file: Path, tmp_path: Path) -> None:
    result = lbc(file, "--recipe")
    assert (result.exit_code, result.stdout) == (0, "seed = 1\n")
    save(small_model(), tmp_path / "none")
    result = lbc(tmp_path / "none", "--recipe")
    assert result.exit_code == 2
    assert "holds no recipe" in result.stderr
    assert lbc(file, "--recipe", "--json").exit_code == 2


def test_a_recipe_that_a_terminal_would_obey_is_refused(tmp_path: Path) -> None:
    save(small_model(), tmp_path / "m", recipe='a = "\x1b]0;x\x07"\n')
    with pytest.raises(CheckpointError, match="control characters"):
        recipe_of(read_contents(tmp_path / "m"))


def test_words_of_a_file_cannot_command_the_terminal(tmp_path: Path) -> None:
    save(small_model(), tmp_path / "m", metrics={"pixels": {"\x1b[31mred": "\x1b[2J\n"}}, recipe="a = 1\n")
    result = lbc(tmp_path / "m")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout


def test_unstructured_and_training_phase(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.fc1.weight[:, :8] = 0
    save(model, tmp_path / "u", unstructured=["fc1.weight"])
    assert {t["name"]: t["nonzeros"] for t in as_json(tmp_path / "u")["tensors"]}["fc1.weight"] == 32
    assert "50.0 %" in lbc(tmp_path / "u").stdout
    save(model, tmp_path / "t", pruner=FakePruner(model, PATTERNS, phase="training"))
    assert "masks are not final yet" in lbc(tmp_path / "t").stdout


def test_safetensors_of_others(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros(5, dtype=torch.int8), "s": torch.zeros((), dtype=torch.bool)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"note": "x" * 500, "format": "pt"})
    record = as_json(tmp_path / "theirs.safetensors")
    assert record["kind"] == "safetensors"
    assert record["model"] is None
    assert record["metadata"]["format"] == "pt"
    found = {t["name"]: (t["dtype"], t["shape"], t["stored_bytes"], t["pattern"]) for t in record["tensors"]}
    assert found == {"b": ("F32", [2, 3], 24, None), "a": ("I8", [5], 5, None), "s": ("BOOL", [], 1, None)}
    text = lbc(tmp_path / "theirs.safetensors").stdout
    assert "not a checkpoint of lbc" in text
    assert "500 characters" in text


def test_headers_of_other_writers(tmp_path: Path) -> None:
    """Spaces, any order, no metadata: valid safetensors, but not what we write."""
    second = b'"a": {"data_offsets":[1,3],"dtype":"F16","shape":[1]}'
    header = b'{ "z": {"shape":[1],"dtype":"U8","data_offsets":[0, 1]}, ' + second + b" }"
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    assert [tensor.name for tensor in read_contents(tmp_path / "f").tensors] == ["z", "a"]
    for wrong in (b"[0, 2]", b"[1, 2]", b"[0,-1]", b'"0,1" ', b"[0, 1, 1]"[:6]):
        bad = header.replace(b"[0, 1]", wrong, 1)
        (tmp_path / "f").write_bytes(len(bad).to_bytes(8, "little") + bad + bytes(3))
        with pytest.raises(CheckpointError):
            read_contents(tmp_path / "f")


def test_run_states(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"model": {"w": torch.zeros(3)}, "epoch": 2})
    record = as_json(tmp_path / "s")
    assert record["kind"] == "run state"
    assert record["totals"]["all"]["elements"] == 3
    assert "run state of lbc" in lbc(tmp_path / "s").stdout


def test_a_file_whose_manifest_another_program_dropped(file: Path, tmp_path: Path) -> None:
    save_file(load_file(file), tmp_path / "again.safetensors")
    result = lbc(tmp_path / "again.safetensors")
    assert result.exit_code == 3
    assert "no manifest" in result.stderr


def test_what_is_no_safetensors_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "new.pth")
    torch.save({"w": torch.zeros(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "graph.onnx").write_bytes(bytes(64))
    (tmp_path / "folder").mkdir()
    expected = {
        "new.pth": "is a file of torch.save",
        "old.pth": "is a file of torch.save",
        "graph.onnx": "is an ONNX file",
        "folder": "name the file in it, such as",
    }
    for name, words in expected.items():
        result = lbc(tmp_path / name)
        assert (result.exit_code, result.stdout) == (2, ""), name
        assert words in result.stderr, name
        assert len(result.stderr.strip().splitlines()) == 1, name


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "m").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert as_json(tmp_path / "m")["totals"]["all"]["elements"] == 1


def test_damage_is_one_line_and_exit_code_3(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    header, manifest, data = parts(content)
    manifest["sparse"]["fc1.weight"]["pattern"] = "2:8"
    length = int.from_bytes(content[:8], "little")
    spaced = content[8 : 8 + length] + b" " * 8
    damaged = {
        "another spelling": len(spaced).to_bytes(8, "little") + spaced + content[8 + length :],
        "cut off": content[:-1],
        "header cut off": content[:100],
        "flipped digest": content.replace(b'"lbc.sha256":"', b'"lbc.sha256":"0', 1)[: len(content)],
        "tampered": sealed(header, manifest, bytes(data)),
        "empty": b"",
        "zeros": bytes(64),
    }
    for name, wrong in damaged.items():
        (tmp_path / "d").write_bytes(wrong)
        result = lbc(tmp_path / "d")
        assert result.exit_code == 3, name
        assert len(result.stderr.strip().splitlines()) == 1, name
        assert result.stdout == "", name


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        assert lbc(path).exit_code == 2
        with pytest.raises(UsageError):
            read_contents(path)


def huge_file(path: Path, layers: int = 300, size: int = 8192) -> int:
    """A sparse file (of zeros that no disk holds) with the header of a model of 2:4 layers; returns its size."""
    sparse = {f"blocks.{i}.weight": Sparse(2, 4, 1, (size, size), "F32") for i in range(layers)}
    infos: dict[str, TensorInfo] = {}
    for name, entry in sparse.items():
        infos[name + ".nm_values"], infos[name + ".nm_index"] = entry.stored()
    infos |= {f"blocks.{i}.bias": TensorInfo("F32", (size,)) for i in range(layers)}
    stored = {name: Stored(info, "0" * 64) for name, info in infos.items()}
    manifest = Manifest(sparse=sparse, tensors=stored, recipe="seed = 1\n" * 100, method="lbc", epoch=119)
    header = encode_header(infos, manifest.to_metadata())
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(info.num_bytes for info in infos.values()))
    return path.stat().st_size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_half_a_second_whatever_the_size(tmp_path: Path) -> None:
    """43 GB in 300 packed layers. Processor time, which another process on the machine cannot stretch."""
    path = tmp_path / "huge.safetensors"
    assert huge_file(path) > 40e9
    script = (
        "import re, sys, resource\n"
        "from lbc_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'timm', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(usage.ru_utime + usage.ru_stime, peak, file=sys.stderr)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path / "pyc")  # an installed package has its modules compiled

    def measure(*arguments: str) -> tuple[float, float]:
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        seconds, kilobytes = map(float, done.stderr.split())
        return seconds, kilobytes

    help_alone = min(measure("inspect", "--help") for _ in range(3))[0]
    for option in ([], ["--json"], ["--recipe"]):
        measured = [measure("inspect", str(path), *option) for _ in range(3)]
        assert max(kilobytes for _, kilobytes in measured) < 150_000
        # Half a second; on a slow machine, by the time that a page of help takes there (a fifth of a second elsewhere).
        assert min(measured)[0] <= max(0.5, 4 * help_alone), option
