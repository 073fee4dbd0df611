"""The semi-structured export: equal to torch's conversion bit for bit, exact weights back, and every damage found."""

from __future__ import annotations

import ast
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import lbc_cli.verifier
from lbc_cli import checkpoint, models
from lbc_cli.checkpoint.container import encode_header, opened
from lbc_cli.errors import CheckpointError, ModelError, PatternError, UsageError
from lbc_cli.exports import ExportOptions, ExportResult, export
from lbc_cli.exports.semi_structured import load, load_tensors, read_manifest
from lbc_cli.exports.semi_structured.layout import decode, encode, from_matrix, is_canonical, misfit, to_matrix
from lbc_cli.exports.semi_structured.manifest import Layer
from lbc_cli.exports.semi_structured.reader import as_cutlass
from lbc_cli.patterns import Pattern, holds
from lbc_cli.runtime.backends import Cutlass
from lbc_cli.targets import find_targets
from lbc_cli.verifier import verify
from tests.checkpoints import FakePruner, canonical, sealed

SPELLED = {torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int8}


def two_of_four(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, dense: float = 0.8) -> Tensor:
    """A matrix with at most two of four; some groups have fewer."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    values = torch.randint(1, 100, (rows, -(-columns // 4), 4), generator=generator)
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    kept = torch.rand(values.shape, generator=generator)
    mask = torch.zeros_like(values, dtype=torch.bool).scatter(-1, kept.topk(2, -1).indices, True)
    mask &= torch.rand(values.shape, generator=generator) < dense
    return torch.where(mask, values * signs, 0).reshape(rows, -1)[:, :columns].contiguous().to(dtype)


def padded(matrix: Tensor) -> Tensor:
    rows, columns = Layer(tuple(matrix.shape), SPELLED[matrix.dtype], "2:4").padded
    return nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.view(BITS[one.dtype]), two.view(BITS[two.dtype]))


@pytest.mark.parametrize("dtype", SPELLED)
@pytest.mark.parametrize(
    "shape", [(32, 128), (64, 64), (96, 448), (1, 4), (33, 68), (1000, 260), (10, 30), (130, 4100)]
)
def test_the_layout_is_what_torch_makes_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = two_of_four(shape, dtype)
    full = padded(matrix)
    packed, meta = encode(matrix, (full.shape[0], full.shape[1]))
    theirs, their_meta = sparse_semi_structured_from_dense_cutlass(full)
    assert same_bits(packed, theirs)
    assert meta.dtype == their_meta.dtype
    assert torch.equal(meta, their_meta)
    assert same_bits(decode(theirs, their_meta), full)
    assert same_bits(sparse_semi_structured_to_dense_cutlass(packed, meta), full)
    assert is_canonical(matrix, packed, meta)
    assert not is_canonical(matrix, packed, meta.flipud())


@pytest.mark.parametrize("dtype", SPELLED)
def test_every_group_that_can_be_is_coded_as_torch_does_and_as_written_down(dtype: torch.dtype) -> None:
    written = {(): 14, (2,): 14, (3,): 14, (2, 3): 14, (1,): 9, (1, 2): 9, (1, 3): 13, (0,): 8, (0, 2): 8}
    written |= {(0, 1): 4, (0, 3): 12}
    for places, code in written.items():
        matrix = torch.zeros(32, 128, dtype=dtype)
        for place in places:
            matrix[5, 40 + place] = place + 1
        packed, meta = encode(matrix, (32, 128))
        assert torch.equal(meta, sparse_semi_structured_from_dense_cutlass(matrix)[1])
        assert slow_codes(meta)[5][10] == code
        assert packed[5, 20:22].tolist() == [
            (code % 4 + 1) * (code % 4 in places),
            (code // 4 + 1) * (code // 4 in places),
        ]


def slow_codes(meta: Tensor) -> list[list[int]]:
    """Codes of every quad, word for word as the specification puts it."""
    m, columns = meta.shape
    e, r_size = (4, 32) if meta.dtype == torch.int16 else (8, 16)
    flat = [word % (1 << (4 * e)) for word in meta.flatten().tolist()]
    rows = []
    for r in range(m):
        codes = []
        for w in range(columns):
            s = (r // r_size) * r_size + (r % 8) * (r_size // 8) + (r % r_size) // 8
            t = w % 2
            if s % 2 and t == 0:
                s, t = s - 1, 1
            elif s % 2 == 0 and t:
                s, t = s + 1, 0
            word = flat[(w // 2) * 2 * m + 2 * s + t]
            codes += [word >> (4 * place) & 15 for place in range(e)]
        rows.append(codes)
    return rows


@pytest.mark.parametrize("dtype", SPELLED)
def test_the_order_of_the_codes_is_what_the_specification_says(dtype: torch.dtype) -> None:
    matrix = two_of_four((64, 384), dtype, dense=1.0)
    _, meta = encode(matrix, (64, 384))
    for row, codes in zip(matrix.reshape(64, -1, 4).tolist(), slow_codes(meta), strict=True):
        for quad, code in zip(row, codes, strict=True):
            assert [place for place in range(4) if quad[place]] == [code % 4, code // 4]


def test_negative_zeros_nan_payloads_and_subnormals_survive_where_torch_alone_would_lose_them() -> None:
    bits = torch.zeros(32, 64, dtype=torch.int16)
    bits[0, :4] = torch.tensor([-0x8000, 0, 0, 0x3C00])  # -0.0 and 1.0
    bits[1, :4] = torch.tensor([0, 0x7E01, -0x8000, 0])  # a NaN with a payload and -0.0
    bits[2, :4] = torch.tensor([0, 0, 1, -0x7FFF])  # subnormals
    matrix = bits.view(torch.float16)
    packed, meta = encode(matrix, (32, 64))
    assert same_bits(decode(packed, meta), matrix)
    assert same_bits(sparse_semi_structured_to_dense_cutlass(packed, meta), matrix)
    assert not same_bits(
        sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(matrix)), matrix
    )


def test_three_of_four_are_refused_where_torch_prunes_silently() -> None:
    matrix = two_of_four((40, 72), torch.bfloat16, dense=0.0)
    matrix[37, 66:69] = 1  # two groups: two and one
    assert misfit(matrix) is None
    matrix[37, 64] = 1
    assert misfit(matrix) == (37, 64)
    with pytest.raises(PatternError, match=r"fc: row 37, columns 64\.\.67 hold \[1\.0, 0\.0, 1\.0, 1\.0\]: 2:4"):
        encode(matrix, (64, 128), "fc")


@pytest.mark.parametrize("shape", [(3, 8), (6, 8, 5), (4, 8, 3, 2), (2, 4, 2, 3, 2)])
def test_kernels_are_laid_out_with_input_channels_innermost(shape: tuple[int, ...]) -> None:
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    matrix = to_matrix(weight)
    kernel = list(itertools.product(*map(range, shape[2:])))
    for o, i, (k, place) in itertools.product(range(shape[0]), range(shape[1]), enumerate(kernel)):
        assert matrix[o, k * shape[1] + i] == weight[(o, i, *place)]
    assert torch.equal(from_matrix(matrix, shape), weight)


def test_a_convolution_is_a_product_with_patches_in_that_order() -> None:
    conv = nn.Conv2d(8, 6, (3, 2), padding=1, stride=2, bias=False)
    image = torch.randn(2, 8, 9, 7)
    patches = nn.functional.unfold(image, (3, 2), padding=1, stride=2)
    patches = patches.reshape(2, 8, 6, -1).transpose(1, 2).reshape(2, 48, -1)
    expected = conv(image).flatten(2)
    torch.testing.assert_close(to_matrix(conv.weight) @ patches, expected)


# --- files -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers that fit, that are padded, and that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(40, 70, 3)
        self.fc1 = nn.Linear(120, 63)
        self.grouped = nn.Conv2d(64, 64, 3, groups=2)
        self.odd = nn.Conv2d(6, 64, 3)
        self.tiny = nn.Linear(8, 4)
        self.norm = nn.BatchNorm2d(70)
        self.fc = nn.Linear(33, 10)


def save_net(path: Path, patterns: dict[str, str], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    checkpoint.save(model, path, pruner=FakePruner(model, patterns), metrics={"top1": 1.0}, recipe="seed = 1\n")
    return model


def save_timm(path: Path, arch: str, pattern: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(arch, kwargs=kwargs).to(dtype)
    targets = find_targets(model, Pattern.parse(pattern)).targets
    checkpoint.save(model, path, pruner=FakePruner(model, {t.name: str(t.pattern) for t in targets}))
    return model


def run(path: Path, dtype: str | None = None) -> ExportResult:
    return export(path, "semi-structured", options=ExportOptions(dtype=dtype))


def stored(result: ExportResult) -> dict[str, str]:
    """Layer -> why it is dense, "" if it is not."""
    return {layer.name: layer.reason for layer in result.layers}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("exported") / "net.safetensors"
    model = save_net(path, {"conv.weight": "2:4", "fc1.weight": "1:4/3"})
    return run(path).path, model


def test_weights_come_back_bit_for_bit_and_the_report_says_what_is_dense(tmp_path: Path) -> None:
    patterns = dict.fromkeys(["conv.weight", "fc1.weight", "grouped.weight", "tiny.weight"], "2:4") | {
        "odd.weight": "1:2"
    }
    model = save_net(tmp_path / "net.safetensors", patterns, torch.float16)
    result = run(tmp_path / "net.safetensors")
    assert result.path == tmp_path / "net-semi-structured.safetensors"
    assert stored(result) == {
        "conv.weight": "",
        "fc1.weight": "",
        "grouped.weight": "",  # not to be known without a model; a note says so
        "odd.weight": "6 input channels, not a multiple of 4",
        "tiny.weight": "padded to 32 x 64 it would take no less than dense",
        "fc.weight": "dense in the checkpoint",
    }
    assert any("taken to be ungrouped" in note for note in result.notes)
    tensors = load_tensors(result.path)
    assert sorted(tensors) == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor), name
    assert result.verified.ok
    assert result.verified.kind == "semi-structured"
    assert result.verified.against is not None
    assert result.verified.against["equal"] == len(tensors)
    assert result.bytes == result.path.stat().st_size


def test_a_float32_checkpoint_is_rounded_and_says_so(tmp_path: Path) -> None:
    model = save_net(tmp_path / "net.safetensors", {"conv.weight": "2:4"}, torch.float32)
    for dtype, wanted in ((None, torch.bfloat16), ("float16", torch.float16)):
        result = run(tmp_path / "net.safetensors", dtype)
        assert read_manifest(result.path).rounded_from == ("F32",)
        assert any(f"float32 to {str(wanted)[6:]}" in note for note in result.notes)
        for name, tensor in load_tensors(result.path).items():
            before = model.state_dict()[name]
            assert torch.equal(tensor, before.to(wanted) if before.is_floating_point() else before)
        result.path.unlink()


def test_float64_and_float8_become_bfloat16_and_int8_stays(tmp_path: Path) -> None:
    save_net(tmp_path / "d.safetensors", {"conv.weight": "2:4"}, torch.float64)
    assert load_tensors(run(tmp_path / "d.safetensors").path)["conv.weight"].dtype == torch.bfloat16

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = two_of_four((48, 240), torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.scale = nn.Parameter(torch.ones(48))

    whole = Whole()
    checkpoint.save(whole, tmp_path / "i.safetensors", pruner=FakePruner(whole, {"weight": "2:4"}))
    result = run(tmp_path / "i.safetensors")
    assert read_manifest(result.path).infos["weight.meta"].dtype == "I32"
    tensors = load_tensors(result.path)
    assert torch.equal(tensors["weight"], whole.weight)
    assert tensors["scale"].dtype == torch.float32
    assert result.notes == ()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "1:16", "1:2"])
def test_patterns_within_two_of_four_go_through_on_models(tmp_path: Path, pattern: str) -> None:
    model = save_timm(tmp_path / "m.safetensors", "test_resnet", pattern, torch.float16)
    result = run(tmp_path / "m.safetensors")
    sparse = [layer for layer in result.layers if layer.stored == "semi-structured 2:4"]
    assert sparse
    assert all(layer.pattern == pattern for layer in sparse)
    loaded = load(result.path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float16)
    assert torch.equal(loaded(image), model.eval()(image))


def test_other_patterns_are_decided_on_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():  # 4:8 as two of four twice, and as anything else
        model.conv.weight.copy_(from_matrix(two_of_four((70, 360), torch.float32), (70, 40, 3, 3)))
        model.conv.weight[0, 1, 2, 2] = 0.0
    pruner = FakePruner(model, {"conv.weight": "4:8", "grouped.weight": "4:8"})
    checkpoint.save(model, tmp_path / "m.safetensors", pruner=pruner)
    found = stored(run(tmp_path / "m.safetensors"))
    assert found["conv.weight"] == ""
    assert "4:8, but not 2:4: (o=0, k=(0, 0), i=" in found["grouped.weight"]
    assert holds(model.conv.weight, Pattern(2, 4))


def test_the_model_tells_grouped_convolutions_stem_and_classifier(tmp_path: Path) -> None:
    model = save_timm(tmp_path / "m.safetensors", "regnety_002", "2:4")
    found = stored(run(tmp_path / "m.safetensors"))
    grouped = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert grouped
    for name in grouped:
        assert "groups: not one matrix product" in found[f"{name}.weight"]
    assert "classifier" in found.values()
    assert "stem: it sees the image" in found.values()


def test_without_a_layer_that_fits_nothing_is_written(tmp_path: Path) -> None:
    save_net(tmp_path / "net.safetensors", {"tiny.weight": "2:4"})
    with pytest.raises(UsageError, match=r"no layer can be stored semi-structured .tiny\.weight: padded to 32 x 64"):
        run(tmp_path / "net.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


def test_sparse_layers_take_nine_sixteenths_in_16_bit(tmp_path: Path) -> None:
    save_timm(tmp_path / "m.safetensors", "resnet10t", "2:4", num_classes=10)
    result = run(tmp_path / "m.safetensors")
    assert result.checks["stored share of 2:4 layers"] <= 0.57
    manifest = read_manifest(result.path)
    aligned = [layer for layer in manifest.layers.values() if layer.matrix == layer.padded]
    for layer in aligned:
        packed, meta = layer.stored()
        assert packed.num_bytes + meta.num_bytes == layer.matrix[0] * layer.matrix[1] * 2 * 9 // 16
    assert aligned


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    save_net(tmp_path / "net.safetensors", {"conv.weight": "2:4"})
    first = export(tmp_path / "net.safetensors", "semi-structured", tmp_path / "a.safetensors").path.read_bytes()
    second = export(tmp_path / "net.safetensors", "semi-structured", tmp_path / "b.safetensors").path.read_bytes()
    assert first == second
    with opened(tmp_path / "a.safetensors") as (_, header):
        manifest = read_manifest(tmp_path / "a.safetensors")
        assert encode_header(header.tensors, manifest.to_metadata()) == first[: header.data_start]


def test_loading_needs_a_model_and_sparse_tensors_need_a_gpu(exported: tuple[Path, nn.Module]) -> None:
    with pytest.raises(ModelError, match="does not say which model it is: use load_tensors"):
        load(exported[0])
    with pytest.raises(UsageError, match="compute on a CUDA GPU"):
        load_tensors(exported[0], "cpu", as_sparse=True)


def test_a_gpu_that_torchs_kernels_are_not_for_is_named(
    exported: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    with pytest.raises(UsageError, match=r"compute capability 8\.x, H100 has 9\.0: use as_sparse=False"):
        load_tensors(exported[0], as_sparse=True)


def test_stored_tensors_are_those_of_the_torch_class(exported: tuple[Path, nn.Module]) -> None:
    path, model = exported
    with opened(path) as (file, header):
        raw = path.read_bytes()
        for name, layer in read_manifest(path).layers.items():
            begin = header.begins[f"{name}.packed"]
            packed, meta = (
                torch.frombuffer(bytearray(raw[start : start + info.num_bytes]), dtype=dtype).reshape(info.shape)
                for start, info, dtype in (
                    (begin, header.tensors[f"{name}.packed"], torch.bfloat16),
                    (header.begins[f"{name}.meta"], header.tensors[f"{name}.meta"], torch.int16),
                )
            )
            sparse = as_cutlass(packed, meta)
            assert isinstance(sparse, torch.sparse.SparseSemiStructuredTensorCUTLASS)
            dense = padded(to_matrix(dict(model.named_parameters())[name].detach()))
            assert tuple(sparse.shape) == layer.padded
            assert torch.equal(sparse.to_dense(), dense)
        assert file


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sparse_tensors_multiply_on_a_gpu(exported: tuple[Path, nn.Module]) -> None:
    path, model = exported
    if Cutlass().why_not(torch.device("cuda"), torch.float16):
        with pytest.raises(UsageError, match=r"are for compute capability 8\.x, .* use as_sparse=False"):
            load_tensors(path, as_sparse=True)
        return
    sparse = load_tensors(path, as_sparse=True)["fc1.weight"]
    dense = model.get_parameter("fc1.weight").detach().cuda()
    features = torch.randn(64, 120, dtype=torch.bfloat16, device="cuda")
    wide = nn.functional.pad(features, (0, sparse.shape[1] - 120))
    torch.testing.assert_close(nn.functional.linear(wide, sparse)[:, :63], features @ dense.T, rtol=2e-2, atol=2e-2)


# --- damage ----------------------------------------------------------------------------------------------------------


def rejected(path: Path) -> None:
    """Neither the reader nor the verifier takes it, and neither fails otherwise."""
    with pytest.raises(CheckpointError):
        load_tensors(path)
    assert not verify(path).ok


def test_every_flipped_bit_is_found(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    content = exported[0].read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(3)
    places = [draw.randrange(8 * length) for _ in range(150)]
    places += [draw.randrange(8 * length, 8 * len(content)) for _ in range(150)]
    path = tmp_path / "flipped.safetensors"
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        rejected(path)


def test_a_file_whose_own_key_is_damaged_is_no_plain_file(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    content = exported[0].read_bytes()
    damaged = content.replace(b'"semi_structured', b'"semi_structurec')
    assert damaged != content
    (tmp_path / "d").write_bytes(damaged)
    assert not verify(tmp_path / "d").ok


def test_cut_and_extended_files_are_refused(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    content = exported[0].read_bytes()
    draw = random.Random(4)
    for _ in range(40):
        at = draw.randrange(len(content))
        for damaged in (content[:at], content + bytes(1 + at % 64), content[:at] + bytes(len(content) - at)):
            if damaged != content:
                (tmp_path / "damaged.safetensors").write_bytes(damaged)
                rejected(tmp_path / "damaged.safetensors")


Mutation = Callable[[dict[str, Any], dict[str, Any], bytearray], None]


def put(*path: Any) -> Mutation:
    """Set a member of the manifest: the last of `path` is the value."""

    def mutate(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
        place = manifest
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return mutate


def poke(name: str, index: int, value: int) -> Mutation:
    """Set a byte of a tensor."""

    def mutate(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
        begin, end = header[name]["data_offsets"]
        data[begin + index % (end - begin)] = value

    return mutate


def drop(name: str) -> Mutation:
    """Remove a tensor from header, manifest and data."""

    def mutate(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
        begin, end = header.pop(name)["data_offsets"]
        del data[begin:end], manifest["tensors"][name]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]

    return mutate


def retype(name: str, dtype: str) -> Mutation:
    def mutate(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
        header[name]["dtype"] = manifest["tensors"][name]["dtype"] = dtype

    return mutate


def forget(*path: str) -> Mutation:
    def mutate(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
        place = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return mutate


def unpad(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
    """A weight in the padding: the last stored element of the last row."""
    poke("conv.weight.packed", -1, 0x3F)(header, manifest, data)


MUTATIONS: dict[str, Mutation] = {
    "version": put("version", 2),
    "version as true": put("version", True),
    "layout": put("layout", "cusparselt"),
    "extra member": put("more", 1),
    "no member": forget("rounded_from"),
    "arch is a number": put("model", "arch", 3),
    "model lacks a member": forget("model", "task"),
    "shape": put("layers", "conv.weight", "shape", [70, 36, 3, 3]),
    "transposed shape": put("layers", "fc1.weight", "shape", [120, 63]),
    "shape beside the matrix": put("layers", "fc1.weight", "shape", [60, 120]),
    "columns less than they are": put("layers", "fc1.weight", "shape", [63, 116]),
    "huge shape": put("layers", "fc1.weight", "shape", [0, 10**12]),
    "flat shape": put("layers", "fc1.weight", "shape", [7560]),
    "other dtype": put("layers", "fc1.weight", "dtype", "F16"),
    "impossible dtype": put("layers", "fc1.weight", "dtype", "F32"),
    "pattern not held": put("layers", "conv.weight", "pattern", "1:4"),
    "vector not held": put("layers", "conv.weight", "pattern", "2:4/70"),
    "impossible pattern": put("layers", "conv.weight", "pattern", "4:4"),
    "pattern that does not divide": put("layers", "conv.weight", "pattern", "2:32"),
    "pattern spelled otherwise": put("layers", "conv.weight", "pattern", "2:4/1"),
    "pattern of a dense layer, not held": put("dense", "fc.weight", "pattern", "1:3"),
    "dense without a reason": put("dense", "fc.weight", {"pattern": None}),
    "dense that is not there": put("dense", "gone.weight", {"why": "", "pattern": None}),
    "dense not listed": forget("dense", "fc.weight"),
    "dense and sparse": put("dense", "conv.weight", {"why": "", "pattern": None}),
    "layer forgotten": forget("layers", "conv.weight"),
    "layer that is not there": put("layers", "gone.weight", {"shape": [32, 64], "dtype": "BF16", "pattern": "2:4"}),
    "rounded from nothing known": put("rounded_from", ["F31"]),
    "rounded from text": put("rounded_from", "F32"),
    "rounded unsorted": put("rounded_from", ["F64", "F32"]),
    "origin without digest": put("checkpoint", "sha256", "none"),
    "origin lacks a member": forget("checkpoint", "recipe"),
    "epoch as text": put("checkpoint", "epoch", "3"),
    "packed missing": drop("conv.weight.packed"),
    "meta missing": drop("conv.weight.meta"),
    "bias missing in the manifest": forget("tensors", "fc.bias"),
    "unsigned metadata": retype("conv.weight.meta", "U16"),
    "packed as float16": retype("conv.weight.packed", "F16"),
    "code 0": poke("conv.weight.meta", 0, 0x00),
    "code 15": poke("fc1.weight.meta", 7, 0xFF),
    "code not ascending": poke("conv.weight.meta", 9, 0x11),
    "code not canonical": poke("fc1.weight.meta", -1, 0x44),
    "padding": unpad,
    "padded rows": poke("fc1.weight.packed", 63 * 128 + 9, 0x3F),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_breaks_the_specification_is_refused_however_it_is_sealed(
    exported: tuple[Path, nn.Module], tmp_path: Path, mutation: str
) -> None:
    header, manifest, data = opened_parts(exported[0])
    MUTATIONS[mutation](header, manifest, data)
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(reseal(header, manifest, data))
    assert not verify(path).ok
    if "not held" not in mutation:  # that the weights hold what is claimed is the verifier's business
        with pytest.raises(CheckpointError):
            load_tensors(path)


def test_resealing_alone_changes_nothing(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    (tmp_path / "same.safetensors").write_bytes(reseal(*opened_parts(exported[0])))
    assert (tmp_path / "same.safetensors").read_bytes() == exported[0].read_bytes()
    assert verify(tmp_path / "same.safetensors").ok


def opened_parts(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytearray]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["semi_structured"]), bytearray(content[8 + length :])


def reseal(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> bytes:
    """A file around these parts with every digest recomputed, as someone who tampers with it would."""
    content = sealed(header, manifest, data, lambda value: canonical(value))
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    header["__metadata__"] = {
        "format": "pt",
        "semi_structured": metadata["lbc"],
        "semi_structured.sha256": metadata["lbc.sha256"],
    }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def test_an_injected_weight_is_found_where_it_is(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """1:4 in vectors of three, stored where 2:4 has room for a second element: the claimed pattern finds it."""
    header, manifest, data = opened_parts(exported[0])
    for byte in (1, 3):  # row 4, quad 0: both elements, whatever its code
        poke("fc1.weight.packed", 128 * 4 + byte, 0x3F)(header, manifest, data)
    path = tmp_path / "injected.safetensors"
    path.write_bytes(reseal(header, manifest, data))
    found = verify(path)
    assert not found.ok
    assert [(finding.rule, finding.tensor) for finding in found.findings] == [("pattern", "fc1.weight")]
    assert found.findings[0].groups[0].outputs == (3, 5)
    assert found.findings[0].groups[0].inputs == (0, 3)


def test_a_demanded_pattern_is_checked_too(exported: tuple[Path, nn.Module]) -> None:
    assert verify(exported[0], layers={"fc1": "2:4", "conv": "2:4"}).ok
    report = verify(exported[0], layers={"conv": "1:4"})
    assert [(finding.rule, finding.tensor) for finding in report.findings] == [("pattern", "conv.weight")]


def imported(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_verifier_reads_the_layout_without_the_writer_and_without_torch() -> None:
    folder = Path(lbc_cli.verifier.__file__).parent
    for name in ("semi_structured.py", "semi_rules.py"):
        for module in imported(folder / name):
            assert not module.startswith(("torch", "lbc_cli.exports", "lbc_cli.checkpoint", "lbc_cli.packing")), module
