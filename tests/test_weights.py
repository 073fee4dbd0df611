"""Foreign weights: read exactly, or refused in one line; nothing in them is ever run."""

from __future__ import annotations

import argparse
import collections
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import lbc_cli
from lbc_cli import checkpoint, models, weights
from lbc_cli.errors import CheckpointError, LbcError, ModelError, UsageError
from lbc_cli.patterns import Pattern, check_mask, magnitude_mask
from lbc_cli.weights import bitmask
from lbc_cli.weights.conversion import kept_mask
from tests.checkpoints import FakePruner
from tests.foreign import Runs, authors_forward, authors_layer, bitmask_layer, under

TINY = "test_resnet"


def tiny(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.create(TINY, num_classes=5, kwargs=kwargs)


def state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tiny().state_dict().items()}


def same(first: dict[str, Tensor] | Any, second: dict[str, Tensor] | Any) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def refused(path: Path, kind: type[LbcError] = CheckpointError, **kwargs: Any) -> str:
    """The one line with which reading is refused."""
    with pytest.raises(kind) as caught:
        weights.read(path, **kwargs)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Plain safetensors


def test_any_safetensors_file_is_read_whatever_its_order_and_metadata(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4, dtype=torch.bfloat16),
        "a": torch.tensor(-0.0),
        "none": torch.empty(0, 5),
        "n": torch.arange(4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"epoch": "3"})
    found = weights.read(tmp_path / "x.safetensors")
    assert found.kind == "dense"
    assert same(found.tensors, tensors)
    assert math.copysign(1, float(found.tensors["a"])) == -1
    reordered = {"one": tensors["b"], "two": tensors["b"] + 1}
    header = {
        "two": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]},
        "one": {"shape": [3, 4], "data_offsets": [24, 48], "dtype": "BF16"},
    }
    raw = json.dumps(header, indent=1).encode()
    data = b"".join(reordered[name].view(torch.uint8).numpy().tobytes() for name in header)
    (tmp_path / "y.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert same(weights.read(tmp_path / "y.safetensors").tensors, reordered)


def test_what_wrappers_leave_in_names_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for names, expected in [
        (["module.fc.weight", "module.fc.bias"], {"fc.weight", "fc.bias"}),
        (["module.module.a", "module.module.b"], {"a", "b"}),
        (["_orig_mod.fc.weight", "_orig_mod.b"], {"fc.weight", "b"}),
        (["module._orig_mod.a", "module.b"], {"a", "b"}),
        (["module.a", "b"], {"module.a", "b"}),
    ]:
        save_file({name: torch.tensor([i]) for i, name in enumerate(names)}, path)
        assert set(weights.read(path).tensors) == expected
    save_file({"_orig_mod.a": torch.ones(1), "a": torch.ones(1)}, path)
    assert "two tensors are called a" in refused(path)


def _file(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def _entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "huge header": ((10**15).to_bytes(8, "little") + b"{}", "claims a header of 1000000000000000 bytes"),
    "not JSON": (_file(b"{nothing}"), "not valid JSON"),
    "a list": (_file(b"{[]"), "not valid JSON"),
    "repeated key": (_file(b'{"a":{},"a":{}}'), "appears twice"),
    "deep nesting": (_file(b'{"a":' * 100_000), "not valid JSON"),
    "unknown dtype": (_file({"a": _entry("F31", [1], 0, 4)}, bytes(4)), "unknown dtype 'F31'"),
    "negative size": (_file({"a": _entry("U8", [-1], 0, 1)}, bytes(1)), "not a list of sizes"),
    "huge empty shape": (_file({"a": _entry("U8", [0, 10**12], 0, 0)}), "is beyond"),
    "overlap": (
        _file({"a": _entry("U8", [4], 0, 4), "b": _entry("U8", [4], 2, 6)}, bytes(6)),
        "without gap or overlap",
    ),
    "gap": (_file({"a": _entry("U8", [4], 1, 5)}, bytes(5)), "without gap or overlap"),
    "cut off": (_file({"a": _entry("U8", [4], 0, 4)}, bytes(3)), "cut off or extended"),
    "extended": (_file({"a": _entry("U8", [4], 0, 4)}, bytes(5)), "cut off or extended"),
    "offsets": (_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, "1"]}}, bytes(1)), "two positions"),
    "metadata": (_file({"__metadata__": {"a": 1}}), "not an object of strings"),
    "no tensors": (_file({"__metadata__": {}}), "holds no tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors_are_refused(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert message in refused(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(5), "b": torch.randn(3, 2)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)


# Pickles


def test_the_state_dict_is_found_where_scripts_put_it(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.pth", {"a": torch.randn(2), "b": torch.tensor(1)}
    contents: list[Any] = [
        tensors,
        collections.OrderedDict(tensors),
        {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in tensors.items()},
        {"state_dict": tensors, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        {"model": tensors, "args": argparse.Namespace(lr=0.1), "best": 1.5},
        {"model": {"state_dict": tensors}},
        {"model_ema": tensors, "model": None},
        {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
    ]
    for content in contents:
        for legacy in (False, True):
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            found = weights.read(path)
            assert same(found.tensors, tensors)
            assert not any(isinstance(tensor, nn.Parameter) for tensor in found.tensors.values())


def test_of_several_models_one_must_be_named(tmp_path: Path) -> None:
    path, plain, average = tmp_path / "x.pth", {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    torch.save({"model": plain, "model_ema": average, "epoch": 3}, path)
    assert "several models ('model', 'model_ema'): say which with --key" in refused(path, UsageError)
    assert same(weights.read(path, key="model_ema").tensors, average)
    assert same(weights.read(path, key="model").tensors, plain)
    message = refused(path, UsageError, key="model_em")
    assert "no state dict 'model_em': it has model, model_ema. Did you mean 'model_ema'" in message
    save_file(plain, tmp_path / "x.safetensors")
    assert "no entries" in refused(tmp_path / "x.safetensors", UsageError, key="model")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["inside", "alone"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, legacy: bool, place: str) -> None:
    path, proof = tmp_path / "x.pth", tmp_path / "proof"
    bad = Runs(str(proof))
    content = bad if place == "alone" else {"state_dict": {"a": torch.zeros(2)}, "args": bad}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refused(path)
    assert "refused, since reading it could run code" in message
    assert "system" in message
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file does not do what this test thinks"


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt")
    assert "torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict(), path)" in message


def test_tensors_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for odd, message in [
        (torch.zeros(1).expand(1 << 40), "more than the file stores"),
        (torch.eye(3).to_sparse(), "only plain dense tensors"),
        (torch.empty(3, device="meta"), "only plain dense tensors"),
        (3, "is a int: only tensors are read"),
    ]:
        torch.save({"state_dict": {"good": torch.ones(1), "odd": odd}}, path)
        assert message in refused(path)


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for content, message in [([1, 2], "holds a list"), ({"epoch": 3}, "no state dict among its entries (epoch)")]:
        torch.save(content, path)
        assert message in refused(path)
    path.write_bytes(b"no pickle at all")
    refused(path)
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in refused(path)
    (tmp_path / "x.txt").write_text("no weights")
    assert "neither safetensors nor" in refused(tmp_path / "x.txt")
    assert "no such weight file" in refused(tmp_path / "absent.pth", UsageError)


# timm's folders


def folder(path: Path, config: Any | None = None, weights_name: str = "model.safetensors") -> dict[str, Tensor]:
    path.mkdir(exist_ok=True)
    tensors = state()
    if weights_name.endswith("bin"):
        torch.save(tensors, path / weights_name)
    else:
        save_file(tensors, path / weights_name)
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tensors


PREPARED = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 0.7}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_timm_folder_says_which_model_it_is(tmp_path: Path, name: str) -> None:
    config = {"architecture": TINY, "num_classes": 5, "pretrained_cfg": {**PREPARED, "tag": "x"}}
    tensors = folder(tmp_path / "m", config, name)
    found = weights.read(tmp_path / "m")
    assert (found.arch, found.kwargs) == (TINY, {"num_classes": 5})
    model = lbc_cli.load(tmp_path / "m")
    assert same(model.state_dict(), tensors)
    assert not model.training
    prepared = models.data_config(model)
    assert (list(prepared["mean"]), prepared["crop_pct"], prepared["input_size"]) == ([0.1, 0.2, 0.3], 0.7, (3, 96, 96))


def test_folders_in_the_older_style_and_with_arguments(tmp_path: Path) -> None:
    folder(tmp_path / "old", {"architecture": TINY, "num_classes": 5, **PREPARED, "global_pool": "max"})
    assert weights.read(tmp_path / "old").kwargs == {"num_classes": 5, "global_pool": "max"}
    config = {"architecture": TINY, "pretrained_cfg": {"num_classes": 5}, "model_args": {"drop_rate": 0.5}}
    folder(tmp_path / "new", config)
    assert weights.read(tmp_path / "new").kwargs == {"num_classes": 5, "drop_rate": 0.5}
    folder(tmp_path / "fixed", {"architecture": TINY, "pretrained_cfg": {**PREPARED, "fixed_input_size": True}})
    assert weights.read(tmp_path / "fixed").kwargs == {"img_size": [96, 96]}


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "a folder without weights" in refused(tmp_path / "empty", ModelError)
    (tmp_path / "empty" / "model.safetensors.index.json").write_text("{}")
    assert "spread over several files" in refused(tmp_path / "empty", ModelError)
    for config, message in [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ({"architecture": TINY, "model_args": 3}, "must be tables"),
        ({"architecture": TINY, "mean": "grey"}, "mean = grey is no setting for images"),
        ({"architecture": TINY, "input_size": [3, -1, 8]}, "input_size"),
    ]:
        folder(tmp_path / "bad", config)
        assert message in refused(tmp_path / "bad")
    folder(tmp_path / "plain")
    with pytest.raises(ModelError, match="does not say which model it is"):
        weights.load(tmp_path / "plain")
    assert same(weights.load(tmp_path / "plain", model=TINY).state_dict(), state())


# The LBC authors' checkpoints


def _groups(shape: tuple[int, ...], m: int) -> int:
    return math.prod(shape) // m


@pytest.mark.parametrize("shape", [(6, 8, 3, 3), (4, 16), (5, 8, 1, 1), (4, 8, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
@pytest.mark.parametrize("left", [1, 2])
def test_the_authors_masks_are_those_of_their_forward_pass(
    tmp_path: Path, shape: tuple[int, ...], n: int, m: int, left: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    candidates = math.comb(m, n)
    alive = [torch.randperm(candidates, generator=generator)[:left].tolist() for _ in range(_groups(shape, m))]
    layer = authors_layer(torch.randn(shape, generator=generator), n, m, alive)
    stored = {**under("module.layer1.0.conv1", layer), "module.fc.weight": torch.randn(3, 4)}
    torch.save({"state_dict": stored, "best_acc": torch.tensor([70.5]), "epoch": 120, "args.k": 5}, tmp_path / "m.pt")
    found = weights.read(tmp_path / "m.pt")
    name = "layer1.0.conv1.weight"
    assert found.kind == "lbc-authors"
    assert set(found.tensors) == {name, "fc.weight"}
    assert found.patterns == {name: Pattern(n, m)}
    expected = authors_forward(layer)
    assert torch.equal(found.tensors[name], expected)
    assert not torch.signbit(found.tensors[name][expected == 0]).any()
    assert torch.equal(found.masks[name], expected != 0)
    assert bool(found.notes) == (left > 1)


def test_scores_that_cancel_out_remove_a_position_as_in_their_forward_pass(tmp_path: Path) -> None:
    layer = authors_layer(torch.ones(1, 4), 2, 4, [[]])
    layer["alpha"][0, 0], layer["alpha"][0, 1] = 1.0, -1.0  # positions 0, 1 and 0, 2: the sum at 0 is zero
    save_file(under("fc1", layer), tmp_path / "x.safetensors")
    found = weights.read(tmp_path / "x.safetensors")
    assert found.tensors["fc1.weight"].tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert torch.equal(found.tensors["fc1.weight"], authors_forward(layer))


def test_groups_that_straddle_positions_are_masked_but_claim_no_pattern(tmp_path: Path) -> None:
    shape = (4, 6, 2, 1)
    layer = authors_layer(torch.randn(shape), 2, 4, [[i % 6] for i in range(_groups(shape, 4))])
    save_file(under("conv", layer), tmp_path / "x.safetensors")
    found = weights.read(tmp_path / "x.safetensors")
    flat = (layer["alpha"] @ layer["index_list"]).reshape(4, 2, 1, 6).permute(0, 3, 1, 2) != 0
    assert torch.equal(found.tensors["conv.weight"], torch.where(flat, layer["weight"], 0.0))
    assert found.patterns == {}
    assert "straddle" in found.notes[0]


def _change(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def apply(layer: dict[str, Tensor]) -> None:
        for name, change in changes.items():
            if change is None:
                del layer[name]
            else:
                layer[name] = change(layer[name])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(weight=None), r"has no fc1\.weight"),
        (_change(alpha=lambda alpha: alpha[:-1].clone()), r"fc1\.alpha is \[7, 6\]: \[8, 6\] belong"),
        (_change(alpha=lambda alpha: alpha / 0), "not finite"),
        (_change(weight=lambda weight: weight.to(torch.int8)), "real numbers are needed"),
        (_change(index_list=lambda index: index * 2), "not a table of 0 and 1"),
        (_change(index_list=lambda index: index[:-1].clone()), "holds 5 candidates: 2:4 has 6"),
        (_change(index_list=lambda index: index[[0, 0, 1, 2, 3, 4]].clone()), "holds 6 candidates: 2:4 has 6"),
        (_change(index_list=lambda index: torch.eye(6)[:, :4].clone()), "no N:M pattern"),
        (_change(index_list=lambda index: torch.ones(1, 4)), "no N:M pattern"),
    ],
)
def test_damaged_files_of_the_authors_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    layer = authors_layer(torch.randn(4, 8), 2, 4, [[i % 6] for i in range(8)])
    other = authors_layer(torch.randn(4, 8), 2, 4, [[0]] * 8)
    change(layer)
    save_file({**under("fc1", layer), **under("fc0", other)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        weights.read(tmp_path / "x.safetensors")


# sparse-24-bitmask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(8, 16), (5, 12), (3, 4), (7, 20), (4, 6)])
def test_bitmask_weights_are_restored_bit_for_bit(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = torch.randn(shape)
    fours = dense.reshape(1, -1)
    dense = torch.where(magnitude_mask(fours, Pattern(2, 4)), fours, 0.0).reshape(shape).to(dtype)
    dense.view(torch.uint8)[0, : dense.element_size() * 3] = 0  # a group with room
    layer = bitmask_layer(dense.float())
    layer["compressed"] = layer["compressed"].to(dtype)
    save_file({**under("blocks.0.fc1", layer), "norm.bias": torch.ones(3)}, tmp_path / "x.safetensors")
    found = weights.read(tmp_path / "x.safetensors")
    assert found.kind == "sparse-24-bitmask"
    assert set(found.tensors) == {"blocks.0.fc1.weight", "norm.bias"}
    restored = found.tensors["blocks.0.fc1.weight"]
    assert restored.dtype == dtype
    assert torch.equal(restored.view(torch.uint8), dense.view(torch.uint8))
    assert (found.patterns == {"blocks.0.fc1.weight": Pattern(2, 4)}) == (shape[1] % 4 == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(shape=None), r"has no fc\.shape"),
        (_change(shape=lambda shape: torch.tensor([4, 24])), "do not hold half of 4 x 24"),
        (_change(shape=lambda shape: torch.tensor([-4, -12])), "two sizes are needed"),
        (_change(shape=lambda shape: torch.tensor([2**40, 2**40])), "two sizes are needed"),
        (_change(shape=lambda shape: shape.float()), "two sizes are needed"),
        (_change(compressed=lambda values: values[:, :-1].clone()), "do not hold half"),
        (_change(compressed=lambda values: values.reshape(-1)), "do not hold half"),
        (_change(bitmask=lambda bits: bits[:, :1].clone()), r"the bitmask is torch.uint8 \[4, 1\]"),
        (_change(bitmask=lambda bits: bits.to(torch.int32)), "the bitmask is torch.int32"),
        (_change(bitmask=lambda bits: bits | torch.tensor([0, 16], dtype=torch.uint8)), "padding must be zero"),
        (_change(bitmask=lambda bits: bits | torch.tensor([4, 0], dtype=torch.uint8)), "keeps 3 of the four"),
        (_change(bitmask=lambda bits: bits & 0), r"keeps 0 of the four weights from \(0, 0\) on"),
    ],
)
def test_damaged_bitmask_files_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    layer = bitmask_layer(torch.arange(48.0).reshape(4, 12).flip(1))
    change(layer)
    save_file({**under("fc", layer), **under("other", bitmask_layer(torch.ones(2, 8)))}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        weights.read(tmp_path / "x.safetensors")


def test_every_flipped_bit_of_a_bitmask_is_noticed() -> None:
    layer = under("fc", bitmask_layer(torch.randn(4, 12)))
    bitmask.decode(layer)
    for row in range(4):
        for bit in range(16):
            flipped = layer["fc.bitmask"].clone()
            flipped[row, bit // 8] ^= 1 << bit % 8
            with pytest.raises(CheckpointError):
                bitmask.decode({**layer, "fc.bitmask": flipped})


@pytest.mark.parametrize("relative", ["fc.row_offsets", "fc.weight_scale", "other.weight_packed"])
def test_relatives_of_the_bitmask_layout_are_refused(relative: str) -> None:
    with pytest.raises(CheckpointError, match="only sparse-24-bitmask of plain weights"):
        bitmask.decode({**under("fc", bitmask_layer(torch.randn(4, 8))), relative: torch.ones(1)})
    with pytest.raises(CheckpointError, match="stored dense and packed at once"):
        bitmask.decode({**under("fc", bitmask_layer(torch.randn(4, 8))), "fc.weight": torch.ones(4, 8)})


# apex ASP


def test_masks_of_asp_are_taken_out_and_kept_in_mind(tmp_path: Path) -> None:
    weight = torch.randn(4, 8, 3, 3)
    mask = magnitude_mask(weight, Pattern(2, 4))
    stray = weight * mask
    stray[~mask] = torch.where(torch.arange(int((~mask).sum())) == 5, 1.0, 0.0)
    tensors = {
        "a.weight": weight * mask, "a.__weight_mma_mask": mask,
        "b.weight": stray, "b.__weight_mma_mask": mask.to(torch.uint8),
        "c.weight": weight, "c.__weight_mma_mask": torch.ones_like(mask), "c.__weight_mma_pruned_p": weight,
        "d.bias": torch.ones(2),
    }  # fmt: skip
    torch.save({"state_dict": tensors}, tmp_path / "x.pth.tar")
    found = weights.read(tmp_path / "x.pth.tar")
    assert found.kind == "asp"
    assert set(found.tensors) == {"a.weight", "b.weight", "c.weight", "d.bias"}
    assert torch.equal(found.tensors["b.weight"], stray)
    assert set(found.patterns) == {"a.weight", "b.weight"}
    assert set(found.masks) == {"a.weight"}
    assert torch.equal(found.masks["a.weight"], mask)
    assert any("1 weights outside ASP's mask" in note for note in found.notes)
    assert any(note.startswith("c.weight: ASP's mask is not 2:4") for note in found.notes)
    tensors["a.__weight_mma_mask"] = mask[:2]
    torch.save(tensors, tmp_path / "x.pth")
    assert "a.__weight_mma_mask is [2, 8, 3, 3]" in refused(tmp_path / "x.pth")


# Models around weights


def test_our_checkpoints_load_as_before_and_give_what_they_say(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "model.safetensors"
    name = "layer1.0.conv1.weight"
    checkpoint.save(model, path, pruner=FakePruner(model, {name: "2:4/2"}))
    found = weights.read(path)
    assert (found.kind, found.arch, found.patterns) == ("checkpoint", TINY, {name: Pattern(2, 4, 2)})
    for loaded in (lbc_cli.load(path), lbc_cli.load(path, model=TINY), lbc_cli.load(path, model=tiny())):
        assert same(loaded.state_dict(), model.state_dict())
        assert not loaded.training
    with pytest.raises(ModelError, match="is a test_resnet, not a resnet18"):
        lbc_cli.load(path, model="resnet18")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    for action in (weights.read, lbc_cli.load):
        with pytest.raises(CheckpointError, match="SHA-256"):
            action(path)
    weights.read(path, check_digests=False)


def test_weights_keep_their_dtype_and_tied_parameters_stay_tied(tmp_path: Path) -> None:
    tensors = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in state().items()}
    del tensors["bn1.num_batches_tracked"]
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = lbc_cli.load(tmp_path / "x.safetensors", model=TINY)
    assert models.created(loaded).kwargs == {"num_classes": 5}  # type: ignore[union-attr]
    assert loaded.get_parameter("fc.weight").dtype == torch.bfloat16
    assert torch.equal(loaded.get_parameter("fc.weight"), tensors["fc.weight"])

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    tied = Tied()
    torch.save({name: tensor + 1 for name, tensor in tied.state_dict().items()}, tmp_path / "tied.pt")
    assert lbc_cli.load(tmp_path / "tied.pt", model=tied) is tied
    assert tied.a.weight is tied.b.weight


def test_weights_that_do_not_fit_leave_the_model_alone(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "x.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name: tensor + 1 for name, tensor in before.items()}
    for name, tensor, message in [
        ("fc.weight", torch.ones(5, 3), r"fc\.weight is \[5, 3\] there"),
        ("fc.weight", changed["fc.weight"].to(torch.int8), "quantised weights are not read"),
        ("extra", torch.ones(1), "unexpected extra"),
    ]:
        save_file({**changed, name: tensor}, path)
        with pytest.raises(ModelError, match=message):
            lbc_cli.load(path, model=model)
        assert same(model.state_dict(), before)
    save_file(changed, path)
    with pytest.raises(ModelError, match="does not say which model it is: name it"):
        lbc_cli.load(path)
    with pytest.raises(ModelError, match="Did you mean"):
        lbc_cli.load(path, model="test_resnett")


def test_arguments_follow_from_the_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grey = models.create(TINY, num_classes=7, kwargs={"in_chans": 1})
    save_file(grey.state_dict(), tmp_path / "x.safetensors")
    assert same(lbc_cli.load(tmp_path / "x.safetensors", model=TINY).state_dict(), grey.state_dict())
    assert models.arguments_from(TINY, grey.state_dict()) == {"num_classes": 7, "in_chans": 1}
    assert models.arguments_from("deit_tiny_distilled_patch16_224", {"head.weight": torch.ones(4, 3)}) == {
        "num_classes": 4
    }


# Masks of weights that are sparse already


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(2, 4, 1), (1, 4, 2), (3, 8, 1), (2, 8, 3)]), st.booleans())
def test_masks_hold_every_weight_in_use_and_exactly_n(seed: int, numbers: tuple[int, int, int], known: bool) -> None:
    pattern = Pattern(*numbers)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, 2, generator=generator)
    full = magnitude_mask(weight, pattern)
    weight = torch.where(full & (torch.rand(weight.shape, generator=generator) < 0.7), weight, 0.0)
    mask = kept_mask(weight, pattern, full if known else None)
    check_mask(mask, pattern)
    assert not (weight[~mask] != 0).any()
    if known:
        assert torch.equal(mask, full)
