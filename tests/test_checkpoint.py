import errno
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lbc_cli
from lbc_cli.checkpoint import load, load_state, read, read_manifest, save, save_state, stream
from lbc_cli.checkpoint.architecture import uninitialised
from lbc_cli.checkpoint.files import atomic_write_bytes, atomic_write_text, remove_stale
from lbc_cli.errors import CheckpointError, ModelError, OutputError, UsageError, VerificationError
from lbc_cli.patterns import Pattern
from lbc_cli.targets import find_targets
from tests.checkpoints import (
    MUTATIONS,
    PATTERNS,
    SPELLINGS,
    FakePruner,
    SmallNet,
    parts,
    sealed,
    small_checkpoint,
    small_model,
)
from tests.golden.encoder import FOLDER, golden
from tests.test_packing import same_bits

GOLDEN = sorted(golden())


def assert_same_tensors(a: Any, b: Any) -> None:
    assert set(a) == set(b)
    assert all(same_bits(a[name], b[name]) for name in a)


# The format.


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_are_what_the_slow_encoder_says(name: str) -> None:
    assert (FOLDER / name).read_bytes() == golden()[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_read_and_written_again_are_the_same_bytes(name: str, tmp_path: Path) -> None:
    checkpoint = read(FOLDER / name)
    model = Holder(checkpoint.tensors)
    pruner = FakePruner(nn.Module(), {})
    pruner.method, pruner.epoch = "lbc", 7
    sparse = checkpoint.manifest.sparse
    pruner.targets = tuple(Entry(key, Pattern(s.n, s.m, s.vector)) for key, s in sparse.items())
    kept = {key: kept_positions(FOLDER / name, key) for key in sparse}
    pruner._masks = kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lbc_cli.checkpoint.writer.environment", lambda: {"torch": "2.10.0"})
        metrics = {"top1": 61.5, "loss": float("nan")}
        save(model, tmp_path / "again", pruner=pruner, metrics=metrics, recipe=checkpoint.manifest.recipe)
    assert (tmp_path / "again").read_bytes() == (FOLDER / name).read_bytes()


class Holder(nn.Module):
    """A module whose state is a given dictionary."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return dict(self.tensors)


class Entry:
    structured = True

    def __init__(self, name: str, pattern: Pattern) -> None:
        self.name, self.pattern = name, pattern


def kept_positions(path: Path, name: str) -> torch.Tensor:
    """The mask that a file's index stands for, read bit by bit."""
    entry = read_manifest(path).sparse[name]
    with safe_open(path, "pt") as file:
        index = file.get_tensor(name + ".nm_index")
    bits = max(1, (entry.m - 1).bit_length())
    mask = torch.zeros(entry.shape, dtype=torch.bool)
    out, inp, *kernel = entry.shape
    for o in range(out):
        for k in np.ndindex(*kernel):
            row = index[(o // entry.vector, *k)].tolist()
            for code in range(inp // entry.m * entry.n):
                places = range(code * bits, code * bits + bits)
                position = sum((row[at // 8] >> (at % 8) & 1) << i for i, at in enumerate(places))
                mask[(o, code // entry.n * entry.m + position, *k)] = True
    return mask


def test_golden_special_values_survive() -> None:
    weight = read(FOLDER / "linear-2_4-f32.safetensors").tensors["fc.weight"].view(torch.int32).reshape(-1)
    found = {value % (1 << 32) for value in weight.tolist()}
    assert {0x80000000, 0x7FC00001, 0xFFC12345, 0x00000001, 0x7F800000} <= found


def test_any_safetensors_reader_opens_the_file(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        assert set(file.metadata()) == {"format", "lbc", "lbc.sha256"}
        assert file.get_tensor("fc1.weight.nm_values").shape == (4, 2, 3)
        assert file.get_tensor("conv.weight.nm_index").shape == (2, 1, 3, 1)
    save_file(load_file(tmp_path / "m"), tmp_path / "theirs")
    assert tensor_order(tmp_path / "m") == tensor_order(tmp_path / "theirs")


def test_dtype_order_is_that_of_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", minversion="0.8")  # the first to know all of them
    names = "float64 float32 bfloat16 float16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 complex64"
    names += " float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    tensors = {f"{i % 3}{name}": torch.ones(3).to(getattr(torch, name)) for i, name in enumerate(names.split())}
    save(Holder(tensors), tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs")
    assert tensor_order(tmp_path / "ours") == tensor_order(tmp_path / "theirs")
    assert_same_tensors(read(tmp_path / "ours").tensors, tensors)


def tensor_order(path: Path) -> list[str]:
    header = parts_of_header(path.read_bytes())
    return [name for name in header if name != "__metadata__"]


def parts_of_header(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_same_content_same_bytes(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "a")
    small_checkpoint(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Saving.


def test_round_trip_of_a_small_model(tmp_path: Path) -> None:
    model = small_checkpoint(tmp_path / "m")
    checkpoint = read(tmp_path / "m")
    assert_same_tensors(checkpoint.tensors, model.state_dict())
    manifest = checkpoint.manifest
    assert (manifest.method, manifest.phase, manifest.epoch) == ("magnitude", "final", 3)
    assert manifest.metrics == {"top1": 12.5}
    assert manifest.recipe == "seed = 1\n"
    assert manifest.sparse["conv.weight"].vector == 3
    assert manifest == read_manifest(tmp_path / "m")
    fresh = load(tmp_path / "m", model=small_model(seed=9))
    assert not fresh.training
    assert_same_tensors(fresh.state_dict(), model.state_dict())


def test_environment_names_no_host_or_path(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    environment = read_manifest(tmp_path / "m").environment
    assert environment["torch"] == torch.__version__
    assert environment["lbc"] == lbc_cli.__version__
    assert str(Path.home()) not in json.dumps(environment)
    assert os.uname().nodename not in environment.values()


def test_an_extra_weight_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = small_model()
    pruner = FakePruner(model, PATTERNS)
    with torch.no_grad():
        model.fc1.weight[2, 8:] = 1
    with pytest.raises(VerificationError, match=r"fc1\.weight: group \(o=2, k=\(\), i=8\.\.15\)"):
        save(model, tmp_path / "m", pruner=pruner)
    assert list(tmp_path.iterdir()) == []


def test_training_phase_stores_dense_tensors(tmp_path: Path) -> None:
    model = small_model()
    pruner = FakePruner(model, PATTERNS, phase="training")
    with torch.no_grad():
        model.fc1.weight.fill_(1)
    save(model, tmp_path / "m", pruner=pruner)
    manifest = read_manifest(tmp_path / "m")
    assert (manifest.phase, manifest.sparse) == ("training", {})
    assert_same_tensors(read(tmp_path / "m").tensors, model.state_dict())


def test_other_tensors_can_be_saved_in_place_of_the_models(tmp_path: Path) -> None:
    model = small_model()
    pruner = FakePruner(model, PATTERNS)
    average = {name: value * 2 for name, value in model.state_dict().items()}
    save(model, tmp_path / "m", pruner=pruner, tensors=average)
    assert_same_tensors(read(tmp_path / "m").tensors, average)
    average["fc1.weight"] = average["fc1.weight"] + 1
    with pytest.raises(VerificationError):
        save(model, tmp_path / "n", pruner=pruner, tensors=average)
    with pytest.raises(UsageError, match=r"fc\.bias"):
        save(model, tmp_path / "n", tensors={k: v for k, v in average.items() if k != "fc.bias"})


def test_unstructured_counts(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.fc1.weight[:, :7] = 0
    save(model, tmp_path / "m", unstructured=["fc1.weight"])
    assert read_manifest(tmp_path / "m").unstructured == {"fc1.weight": 4 * 9}


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        save(small_model(1), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    save(small_model(1), tmp_path / "m", overwrite=True)
    assert (tmp_path / "m").read_bytes() != before


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models(wrap: Any, tmp_path: Path) -> None:
    model = small_model()
    pruner = FakePruner(model, PATTERNS)
    save(wrap(model), tmp_path / "m", pruner=pruner)
    assert_same_tensors(read(tmp_path / "m").tensors, model.state_dict())
    filled = load(tmp_path / "m", model=wrap(small_model(4)))
    assert torch.equal(next(filled.parameters()), next(model.parameters()))


def test_odd_tensors(tmp_path: Path) -> None:
    """Strides, scalars, empty and shared tensors."""
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(4, 6).t())
    model.b = model.a
    model.register_buffer("scalar", torch.tensor(3))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("last", torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last))
    save(model, tmp_path / "m")
    assert_same_tensors(read(tmp_path / "m").tensors, model.state_dict())
    other = nn.Module()
    other.a = nn.Parameter(torch.zeros(6, 4))
    other.b = other.a
    for name in ("scalar", "empty", "last"):
        other.register_buffer(name, torch.zeros_like(getattr(model, name)))
    load(tmp_path / "m", model=other)
    assert other.a is other.b
    assert torch.equal(other.a, model.a)


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="complex128"):
        save(Holder({"w": torch.zeros(2, dtype=torch.complex128)}), tmp_path / "m")
    with pytest.raises(UsageError, match="meta"):
        save(Holder({"w": torch.zeros(2, device="meta")}), tmp_path / "m")
    with pytest.raises(UsageError, match="reserved"):
        save(Holder({"w.nm_index": torch.zeros(2)}), tmp_path / "m")
    pruner = FakePruner(nn.Module(), {})
    pruner.targets, pruner._masks = (Entry("w", Pattern(2, 4)),), {"w": torch.ones(1, 4) > 2}
    with pytest.raises(UsageError, match="reserved"):
        save(Holder({"w": torch.zeros(1, 4), "w.nm_index": torch.zeros(2)}), tmp_path / "m", pruner=pruner)
    with pytest.raises(UsageError, match="called"):
        save(Holder({"../w": torch.zeros(2)}), tmp_path / "m")
    with pytest.raises(UsageError, match="does not describe"):
        save(small_model(), tmp_path / "m", arch={"arch": "resnet18"})
    with pytest.raises(UsageError, match="cannot be saved"):
        save(small_model(), tmp_path / "m", metrics={"top1": object()})
    assert list(tmp_path.iterdir()) == []


# Loading.


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_timm_models_come_back_without_being_named(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).to(memory_format=torch.channels_last).eval()
    targets = find_targets(model, Pattern(2, 4)).targets
    assert targets
    pruner = FakePruner(model, {target.name: "2:4" for target in targets})
    lbc_cli.save(model, tmp_path / "m", pruner=pruner)
    loaded = lbc_cli.load(tmp_path / "m")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    image = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.allclose(loaded(image), model(image), atol=1e-5)
    assert read_manifest(tmp_path / "m").arch == name


def test_arguments_that_change_tensors_come_back(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=5, in_chans=1, img_size=64, global_pool="avg")
    save(model, tmp_path / "m")
    assert_same_tensors(load(tmp_path / "m").state_dict(), model.state_dict())


def test_dtypes_of_the_file_win(tmp_path: Path) -> None:
    model = small_model().to(torch.bfloat16)
    save(model, tmp_path / "m")
    assert_same_tensors(load(tmp_path / "m", model=small_model(1)).state_dict(), model.state_dict())


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    with pytest.raises(ModelError, match=r"load\(path, model=my_model\)"):
        load(tmp_path / "m")
    other = SmallNet()
    other.fc = nn.Linear(4, 9)
    with pytest.raises(ModelError, match=r"fc\.\w+ has shape \[3"):
        load(tmp_path / "m", model=other)
    other.extra = nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"extra\.bias is only in the model"):
        load(tmp_path / "m", model=other)


def test_unknown_architecture(tmp_path: Path) -> None:
    save(small_model(), tmp_path / "m", arch={"arch": "resnet81", "kwargs": {}, "task": None})
    with pytest.raises(ModelError, match="resnet81"):
        load(tmp_path / "m")


def test_integer_weights_come_back_without_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    head = torch.randint(-127, 128, model.fc.weight.shape, dtype=torch.int8)
    model.fc.weight = nn.Parameter(head, requires_grad=False)
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert not loaded.fc.weight.requires_grad
    assert loaded.conv1[0].weight.requires_grad


def test_a_stream_is_in_the_order_of_a_dense_file(tmp_path: Path) -> None:
    model = small_model()
    model.half = nn.Linear(4, 4, dtype=torch.float16)
    model.register_buffer("bits", torch.tensor([True, False]))
    save(model, tmp_path / "m", pruner=FakePruner(model, {**PATTERNS, "half.weight": "1:2"}))
    save_file(model.state_dict(), tmp_path / "theirs")
    streamed = list(stream(tmp_path / "m"))
    assert [name for name, _ in streamed] == tensor_order(tmp_path / "theirs")
    assert_same_tensors(dict(streamed), model.state_dict())
    assert list(read_manifest(tmp_path / "m").dense) == tensor_order(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.float8_e5m2])
def test_packed_tensors_of_any_place_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Index before values, after them, or with other tensors in between."""
    tensors = {name: torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).to(dtype) for name in "abc"}
    pruner = FakePruner(nn.Module(), {})
    pruner.targets = tuple(Entry(name, Pattern(2, 4)) for name in "ac")
    pruner._masks = {name: tensors[name].view(torch.uint8) != 0 for name in "ac"}
    save(Holder(tensors), tmp_path / "m", pruner=pruner)
    assert_same_tensors(read(tmp_path / "m").tensors, tensors)


def test_a_model_in_use_gets_nothing_of_a_damaged_file(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    content = bytearray((tmp_path / "m").read_bytes())
    content[-1] ^= 1  # the last tensor
    (tmp_path / "m").write_bytes(content)
    model = small_model(seed=5)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(tmp_path / "m", model=model)
    assert_same_tensors(model.state_dict(), small_model(seed=5).state_dict())
    header, manifest, data = parts(bytes(content))
    entry = header["conv.weight.nm_index"]["data_offsets"]
    data[entry[0]] = 0xFF  # positions 3, 3: sound digests, but no encoding
    (tmp_path / "m").write_bytes(sealed(header, manifest, data))
    with pytest.raises(CheckpointError, match="keeps positions"):
        load(tmp_path / "m", model=model)
    assert_same_tensors(model.state_dict(), small_model(seed=5).state_dict())


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    with torch.device("meta"):
        model = SmallNet()
    with pytest.raises(ModelError, match="to_empty"):
        load(tmp_path / "m", model=model)


def test_a_file_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """An error, not a signal: files are read, not mapped."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(400)))
    save(model, tmp_path / "m")
    tensors = stream(tmp_path / "m")
    next(tensors)
    os.truncate(tmp_path / "m", 1 << 20)
    with pytest.raises(CheckpointError, match="cut off"):
        list(tensors)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_created_without_values_buffers_are_as_ever(name: str) -> None:
    """Parameters come from the file; tables and the like, which no file holds, must be there."""
    usual = timm.create_model(name)
    state = torch.get_rng_state()
    with uninitialised():
        bare = timm.create_model(name)
    assert torch.equal(torch.get_rng_state(), state), "a parameter was still filled with random numbers"
    saved = set(usual.state_dict())
    for key, buffer in usual.named_buffers():
        if key not in saved:
            assert torch.equal(dict(bare.named_buffers())[key], buffer)
    assert {key: value.shape for key, value in bare.state_dict().items()} == {
        key: value.shape for key, value in usual.state_dict().items()
    }


def test_e8m0_cannot_be_sparse(tmp_path: Path) -> None:
    """Zero bytes are 2 ** -127 there."""
    small_checkpoint(tmp_path / "m")
    header, manifest, data = parts((tmp_path / "m").read_bytes())
    manifest["sparse"]["fc1.weight"]["dtype"] = "F8_E8M0"
    assert refused(tmp_path / "d", sealed(header, manifest, data))
    with pytest.raises(CheckpointError, match="has no zero"):
        read(tmp_path / "d")


def test_no_such_file(tmp_path: Path) -> None:
    for call in (read, read_manifest, load, load_state):
        with pytest.raises(UsageError, match="no such file"):
            call(tmp_path / "none")
        with pytest.raises(UsageError, match="is not a file"):
            call(tmp_path)


# Damage.


def flips(content: bytes, first: int, last: int, count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    damaged = []
    for _ in range(count):
        changed = bytearray(content)
        changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(changed))
    return damaged


def refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        read(path)
    except CheckpointError:
        return True
    return False


def test_every_bit_flip_is_detected(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for damaged in flips(content, 0, start, 1000, 1) + flips(content, start, len(content), 1000, 2):
        assert refused(tmp_path / "d", damaged)


def test_cut_off_extended_and_zeroed_files_are_refused(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    rng = random.Random(3)
    for _ in range(200):
        at = rng.randrange(len(content) - 1)
        assert refused(tmp_path / "d", content[:at])
        assert refused(tmp_path / "d", content + bytes(at % 64 + 1))
        assert refused(tmp_path / "d", content[:at] + bytes(len(content) - at))
    assert refused(tmp_path / "d", b"")


@pytest.mark.parametrize("name", MUTATIONS)
def test_tampering_with_new_digests_is_refused(name: str, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    header, manifest, data = parts((tmp_path / "m").read_bytes())
    assert not refused(tmp_path / "d", sealed(header, manifest, data)), "sealing itself must be harmless"
    MUTATIONS[name](header, manifest, data)
    assert refused(tmp_path / "d", sealed(header, manifest, data))


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_the_manifest_are_refused(name: str, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    assert refused(tmp_path / "d", sealed(*parts((tmp_path / "m").read_bytes()), spell=SPELLINGS[name]))


def test_other_spellings_are_refused(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    length = int.from_bytes(content[:8], "little")
    raw, data = content[8 : 8 + length].rstrip(), content[8 + length :]

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + data

    spellings = [
        raw + b" " * (-len(raw) % 8 + 8),
        raw + b"\n" * (-len(raw) % 8),
        json.dumps(json.loads(raw)).encode(),
        raw[:-1] + b',"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        raw[:-1] + b',"fc.bias":' + json.dumps(json.loads(raw)["fc.bias"], separators=(",", ":")).encode() + b"}",
    ]
    for text in spellings:
        assert refused(tmp_path / "d", with_header(text))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 5_000_000,
        b'{"a":' * 1_000_000,
        b'{"__metadata__":{}}',
        b"[]",
        b"3",
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"format":"\\ud800"}}',
        b"\xff\xfe",
    ],
    ids=range(9),
)
def test_hostile_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    assert refused(tmp_path / "d", len(header).to_bytes(8, "little") + header)


def test_huge_headers_are_refused_without_reading_them(tmp_path: Path) -> None:
    with (tmp_path / "d").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="200000000"):
        read_manifest(tmp_path / "d")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert refused(tmp_path / "d", b"\xff" * 64)


# Run state.


def test_run_state_round_trip(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "model": model.state_dict(),
        "rng": {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": torch.arange(4).to(torch.uint32)},
        "numbers": [0, -1, 2**80, True, None, 0.1, float("inf"), -0.0, "é\n", (1, (2.5, [])), {}, {1: "a", "1": "b"}],
        "best": float("-inf"),
        "nan": float("nan"),
    }
    save_state(tmp_path / "s", state)
    found = load_state(tmp_path / "s")
    assert_same_state(found, state)
    first = (tmp_path / "s").read_bytes()
    save_state(tmp_path / "s", found)
    assert (tmp_path / "s").read_bytes() == first
    fresh = torch.optim.AdamW(small_model(5).parameters(), lr=1.0)
    fresh.load_state_dict(found["optimizer"])
    random.setstate(found["rng"]["python"])
    assert fresh.param_groups[0]["lr"] == 1e-3


def assert_same_state(a: Any, b: Any) -> None:
    if isinstance(b, torch.Tensor):
        assert same_bits(a, b.detach())
    elif isinstance(b, dict):
        assert [*a] == [*b]
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in b:
            assert_same_state(a[key], b[key])
    elif isinstance(b, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same_state(left, right)
    else:
        assert type(a) is type(b)
        assert repr(a) == repr(b)


def test_damaged_run_states_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"a": torch.randn(50), "b": [1.5, (2, {3: torch.ones(3)})]})
    content = (tmp_path / "s").read_bytes()
    for damaged in [*flips(content, 0, len(content), 1000, 4), content[:-1], content + b"\0", b"", bytes(100)]:
        (tmp_path / "d").write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_state(tmp_path / "d")


def test_checkpoints_and_run_states_are_not_mixed_up(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    save_state(tmp_path / "s", {})
    with pytest.raises(CheckpointError, match="is not a run state"):
        load_state(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read(tmp_path / "s")


@pytest.mark.parametrize("value", [object(), np.float64(1), np.zeros(2), {(1, 2): 3}, {1, 2}, b"x", 1j, "\ud800"])
def test_what_a_run_state_cannot_hold(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"state\['a'\]"):
        save_state(tmp_path / "s", {"a": value})
    assert list(tmp_path.iterdir()) == []


def test_cyclic_state(tmp_path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(UsageError, match="deeper"):
        save_state(tmp_path / "s", cycle)


# Atomic writes.


def test_failing_writes_leave_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_checkpoint(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def disk_full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, disk_full)
            with pytest.raises(OutputError, match="No space left on device") as caught:
                save(small_model(1), tmp_path / "m", overwrite=True)
        assert "\n" not in str(caught.value)
        assert (tmp_path / "m").read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_head_that_is_known_last_takes_the_place_of_the_first_bytes(tmp_path: Path) -> None:
    pieces = iter([b"....", b"rest"])
    atomic_write_bytes(tmp_path / "f", pieces, head=lambda: b"head")
    assert (tmp_path / "f").read_bytes() == b"headrest"


def test_interrupted_writes_leave_nothing(tmp_path: Path) -> None:
    def chunks() -> Any:
        yield b"half"
        raise KeyboardInterrupt

    atomic_write_bytes(tmp_path / "f", b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(tmp_path / "f", chunks())
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"f": b"old"}


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        save(small_model(), tmp_path / "none" / "m")
    with pytest.raises(OutputError, match="exists"):
        save(small_model(), tmp_path, overwrite=True)


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:3]))
    atomic_write_bytes(tmp_path / "f", [b"abcdefgh", bytearray(b""), memoryview(b"ij")])
    assert (tmp_path / "f").read_bytes() == b"abcdefghij"


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "f", "é")
    finally:
        os.umask(old)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "f").read_bytes() == "é".encode()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_stale_temporaries_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    stale = tmp_path / f".f.lbc-tmp-{gone.pid}"
    own = tmp_path / f".f.lbc-tmp-{os.getpid()}"
    running = tmp_path / f".f.lbc-tmp-{os.getppid()}"
    others = [tmp_path / f".g.lbc-tmp-{gone.pid}", tmp_path / ".f.lbc-tmp-x", tmp_path / "f"]
    for path in (stale, own, running, *others):
        path.write_bytes(b"")
    assert sorted(remove_stale(tmp_path / "f")) == sorted([stale, own])
    assert all(path.exists() for path in (running, *others))


def test_killed_while_saving_the_last_file_still_loads(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    script = (
        "import os, sys\nfrom lbc_cli.checkpoint.files import atomic_write_bytes\n"
        "def chunks():\n    yield b'x' * 1000\n    os.kill(os.getpid(), 9)\n"
        "atomic_write_bytes(sys.argv[1], chunks())\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m")], check=False)
    assert run.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "m").read_bytes() == before
    read(tmp_path / "m")
    save(small_model(2), tmp_path / "m", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_manifest_and_files_load_no_torch() -> None:
    script = (
        "import sys, lbc_cli.checkpoint.files, lbc_cli.checkpoint.container, lbc_cli.checkpoint.contents\n"
        "from lbc_cli.checkpoint import read_manifest\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
