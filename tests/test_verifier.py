import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import lbc_cli
from lbc_cli.checkpoint import read, save, save_state
from lbc_cli.errors import PatternError, UsageError
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.targets import find_targets
from lbc_cli.verifier import Report, verify
from lbc_cli.verifier.bits import FORMATS, Census, count, unsigned
from tests.checkpoints import MUTATIONS, SPELLINGS, FakePruner, parts, sealed, small_checkpoint, small_model
from tests.golden.encoder import FOLDER, golden
from tests.test_checkpoint import flips
from tests.test_packing import DTYPES, random_bits, sparse_weight


def rules(report: Report) -> list[str]:
    return [finding.rule for finding in report.findings]


# Checkpoints.


def test_a_good_checkpoint(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    report = verify(tmp_path / "m")
    assert report.ok
    assert report.findings == []
    assert (report.kind, report.phase, report.method) == ("packed", "final", "magnitude")
    layers = {layer.name: layer for layer in report.layers}
    assert layers["fc1.weight"].density == 3 / 8
    assert (layers["fc1.weight"].groups, layers["conv.weight"].groups) == (8, 12)
    assert layers["conv.weight"].pattern == "2:4/3"
    assert layers["conv.weight"].shape == (6, 8, 1, 3)
    assert [dense.name for dense in report.dense] == ["fc.weight"]
    assert len(report.digest or "") == 64


@pytest.mark.parametrize("name", sorted(golden()))
def test_golden_files(name: str) -> None:
    report = verify(FOLDER / name)
    assert not [finding for finding in report.findings if finding.rule not in ("nan", "infinity", "negative-zero")]
    assert sum(layer.under_filled for layer in report.layers) > 0 or name.startswith("conv3d")


def test_odd_values_are_reported() -> None:
    report = verify(FOLDER / "linear-2_4-f32.safetensors")
    assert not report.ok
    found = {finding.rule: finding for finding in report.findings}
    assert found["nan"].count == 2
    assert found["infinity"].count == 2
    assert (found["negative-zero"].count, found["negative-zero"].level) == (1, "warning")
    assert {finding.tensor for finding in report.findings} == {"fc.weight"}


def test_json_is_stable(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    parsed = json.loads(verify(tmp_path / "m").to_json())
    assert set(parsed) == {
        *("schema", "ok", "path", "kind", "phase", "method", "digest"),
        *("findings", "layers", "counted", "dense", "model", "against", "accuracy", "transposable"),
    }
    assert set(parsed["layers"][0]) == {"name", "shape", "pattern", "density", "groups", "under_filled"}
    assert set(parsed["dense"][0]) == {"name", "why", "shape"}
    assert (parsed["schema"], parsed["model"], parsed["against"], parsed["accuracy"]) == (1, None, None, None)
    assert verify(tmp_path / "m").to_json() == verify(tmp_path / "m").to_json()


def test_training_phase_is_told_apart(tmp_path: Path) -> None:
    model = small_model()
    save(model, tmp_path / "m", pruner=FakePruner(model, {}, phase="training"))
    report = verify(tmp_path / "m")
    assert report.ok
    assert (report.phase, rules(report)) == ("training", ["phase"])
    demanded = verify(tmp_path / "m", pattern="2:4")
    assert not demanded.ok
    assert rules(demanded) == ["phase", "pattern", "pattern"]


def test_every_bit_flip_is_detected(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for damaged in flips(content, 0, start, 1000, 11) + flips(content, start, len(content), 1000, 12):
        (tmp_path / "d").write_bytes(damaged)
        assert not verify(tmp_path / "d", pattern="3:4").ok


def test_cut_off_extended_and_zeroed_files(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    rng = random.Random(13)
    for _ in range(150):
        at = rng.randrange(len(content) - 1)
        for damaged in (content[:at], content + bytes(at % 64 + 1), content[:at] + bytes(len(content) - at)):
            (tmp_path / "d").write_bytes(damaged)
            assert not verify(tmp_path / "d").ok


@pytest.mark.parametrize("name", MUTATIONS)
def test_tampering_with_new_digests_is_found(name: str, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    header, manifest, data = parts((tmp_path / "m").read_bytes())
    MUTATIONS[name](header, manifest, data)
    (tmp_path / "d").write_bytes(sealed(header, manifest, data))
    assert not verify(tmp_path / "d").ok


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_the_manifest_are_found(name: str, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    (tmp_path / "d").write_bytes(sealed(*parts((tmp_path / "m").read_bytes()), spell=SPELLINGS[name]))
    assert not verify(tmp_path / "d").ok


def test_index_mutations_with_new_digests(tmp_path: Path) -> None:
    """Reader and verifier, which share no code, agree on every single-bit change of every index."""
    small_checkpoint(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    header, _, _ = parts(content)
    bad = 0
    for name in ("conv.weight.nm_index", "fc1.weight.nm_index"):
        begin, end = header[name]["data_offsets"]
        for bit in range(begin * 8, end * 8):
            header, manifest, data = parts(content)
            data[bit // 8] ^= 1 << bit % 8
            (tmp_path / "d").write_bytes(sealed(header, manifest, data))
            report = verify(tmp_path / "d")
            try:
                read(tmp_path / "d")
                assert report.ok
            except lbc_cli.LbcError:
                bad += 1
                assert set(rules(report)) <= {"positions", "padding"}
                assert not report.ok
    assert bad > 50


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([1, 1, 4], r"group \(o=2, k=\(\), i=8\.\.15\) keeps positions \[1, 1, 4\]"),
        ([2, 1, 4], r"\[2, 1, 4\]"),
        ([7, 6, 5], r"\[7, 6, 5\]"),
    ],
)
def test_repeated_and_unsorted_positions_are_named(codes: list[int], message: str, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    header, manifest, data = parts((tmp_path / "m").read_bytes())
    begin, end = header["fc1.weight.nm_index"]["data_offsets"]
    width = (end - begin) // 4
    row = int.from_bytes(data[begin + 2 * width : begin + 3 * width], "little")
    row = row & 0x1FF | sum(code << (9 + 3 * slot) for slot, code in enumerate(codes))
    data[begin + 2 * width : begin + 3 * width] = row.to_bytes(width, "little")
    (tmp_path / "d").write_bytes(sealed(header, manifest, data))
    (finding,) = verify(tmp_path / "d").findings
    assert (finding.rule, finding.tensor, finding.count) == ("positions", "fc1.weight", 1)
    assert re.search(message, finding.message)


def test_unstructured_counts_are_checked(tmp_path: Path) -> None:
    save(small_model(), tmp_path / "m", unstructured=["fc1.weight"])
    assert verify(tmp_path / "m").ok
    header, manifest, data = parts((tmp_path / "m").read_bytes())
    manifest["unstructured"]["fc1.weight"] -= 1
    (tmp_path / "d").write_bytes(sealed(header, manifest, data))
    assert rules(verify(tmp_path / "d")) == ["unstructured"]


def test_another_pattern_can_be_demanded_of_a_checkpoint(tmp_path: Path) -> None:
    model = small_model()
    save(model, tmp_path / "m", pruner=FakePruner(model, {"conv.weight": "1:4", "fc1.weight": "1:8"}))
    for pattern in ("2:4", "1:4", "2:8", "4:8"):
        assert verify(tmp_path / "m", pattern=pattern).ok, pattern
    report = verify(tmp_path / "m", pattern="1:8")
    assert [finding.tensor for finding in report.findings] == ["conv.weight"]
    assert verify(tmp_path / "m", pattern="1:16").findings[0].tensor == "conv.weight"
    assert "not a multiple of 16" in verify(tmp_path / "m", pattern="1:16").findings[0].message
    vectors = verify(tmp_path / "m", pattern="1:4/3")
    assert not vectors.ok
    assert "o=0..2" in vectors.findings[0].message


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_models(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=7)
    pruner = FakePruner(model, {target.name: "2:4" for target in find_targets(model, Pattern(2, 4)).targets})
    save(model, tmp_path / "m", pruner=pruner)
    report = verify(tmp_path / "m")
    assert report.ok
    assert len(report.layers) == len(pruner.targets)
    assert all(layer.density == 0.5 and layer.under_filled == 0 for layer in report.layers)
    save_file(dict(read(tmp_path / "m").tensors), tmp_path / "dense")
    plain = verify(tmp_path / "dense", pattern="2:4")
    assert plain.ok
    assert {layer.name for layer in plain.layers} >= {layer.name for layer in report.layers}


# Dense files.


def dense_file(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def sparse_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {}
    for name, shape in {"a.weight": (6, 8, 3, 3), "b.weight": (12, 32), "c.weight": (4, 4, 5)}.items():
        weight = torch.randn(shape)
        found[name] = weight.masked_fill(~magnitude_mask(weight, Pattern(2, 4)), 0)
    return found


def test_a_dense_file_that_holds_the_pattern(tmp_path: Path) -> None:
    others = {
        "stem.weight": torch.randn(4, 3, 3, 3),
        "head.weight": torch.randn(5, 8),
        "pos_embed": torch.randn(1, 4, 8),
        "a.bias": torch.randn(6),
        "empty.weight": torch.zeros(0, 8),
    }
    report = verify(dense_file(tmp_path / "m", sparse_tensors() | others), pattern="2:4")
    assert report.ok
    assert report.kind == "dense"
    assert {layer.name for layer in report.layers} == set(sparse_tensors())
    why = {dense.name: dense.why for dense in report.dense}
    assert why["stem.weight"] == "3 input channels, not a multiple of 4"
    assert why["head.weight"] == "classifier"
    assert set(why) == {"stem.weight", "head.weight", "pos_embed", "empty.weight"}
    assert why["pos_embed"].startswith("not the weight")
    assert why["empty.weight"] == "empty"


def test_single_extra_non_zeros_are_caught_and_located(tmp_path: Path) -> None:
    rng = random.Random(7)
    for _ in range(200):
        tensors = sparse_tensors()
        name = rng.choice(sorted(tensors))
        weight = tensors[name]
        zeros = (weight == 0).nonzero()
        o, i, *k = zeros[rng.randrange(len(zeros))].tolist()
        weight[(o, i, *k)] = 1e-30
        report = verify(dense_file(tmp_path / "m", tensors), pattern="2:4")
        (finding,) = report.findings
        assert (finding.tensor, finding.count, finding.rule) == (name, 1, "pattern")
        kernel = f"({k[0]},)" if len(k) == 1 else str(tuple(k))
        assert f"group (o={o}, k={kernel}, i={i // 4 * 4}..{i // 4 * 4 + 3}) uses 3 positions" in finding.message
        assert "1e-30" in finding.message


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in (torch.bool, torch.complex64)])
@pytest.mark.parametrize("pattern", ["1:4", "3:5", "4:16/3", "16:32"])
def test_every_dtype_and_pattern(dtype: torch.dtype, pattern: str, tmp_path: Path) -> None:
    if "fnuz" in str(dtype):
        pytest.importorskip("safetensors", minversion="0.8")  # writes the file; older ones do not know the dtype
    parsed = Pattern.parse(pattern)
    shape = (6, parsed.m * 2, 1, 2)
    weight, mask = sparse_weight(parsed, shape, dtype, 3)
    weight = weight.view(torch.uint8).reshape(-1, dtype.itemsize)
    one = torch.ones(1).to(dtype).view(torch.uint8)
    weight = torch.where(mask.reshape(-1, 1), one, weight).reshape(-1).view(dtype).reshape(shape)
    report = verify(dense_file(tmp_path / "m", {"w.weight": weight}), pattern=pattern)
    assert report.findings == []
    assert report.layers[0].density == parsed.density
    assert report.layers[0].under_filled == 0
    full = torch.ones(shape).to(dtype)
    report = verify(dense_file(tmp_path / "m", {"w.weight": full}), pattern=pattern)
    assert report.findings[0].count == report.layers[0].groups == full.numel() // (parsed.m * parsed.vector)


def test_files_without_a_pattern_of_their_own_need_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--pattern"):
        verify(dense_file(tmp_path / "m", sparse_tensors()))
    save_state(tmp_path / "s", {})
    assert not verify(tmp_path / "s").ok


def test_nothing_to_check_is_not_success(tmp_path: Path) -> None:
    assert not verify(dense_file(tmp_path / "m", {"a.bias": torch.ones(3)}), pattern="2:4").ok


def test_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        verify(tmp_path / "none")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"give the checkpoint in it, .*run/model.safetensors"):
        verify(tmp_path / "run")
    save_file({"w": torch.zeros(8, 8)}, tmp_path / "odd.safetensors")
    assert "w: not the weight" in verify(tmp_path / "odd.safetensors", pattern="2:4").findings[0].message
    with pytest.raises(UsageError, match="is not a timm folder"):
        verify(tmp_path)
    with pytest.raises(PatternError):
        verify(dense_file(tmp_path / "m", sparse_tensors()), pattern="4:2")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 3_000_000,
        b"{}",
        b'{"a":{"dtype":"F32","shape":[0,1000000000000],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1,0],"data_offsets":[0,0]}}',
        b'{"../a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"Q4","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"a":1}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"lbc":"\\ud800","lbc.sha256":"","format":"pt"}}',
    ],
    ids=range(12),
)
def test_hostile_headers(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(len(header).to_bytes(8, "little") + header)
    assert not verify(tmp_path / "d", pattern="2:4").ok


def test_what_cannot_be_read_is_of_no_kind(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("a text of some length")
    report = verify(tmp_path / "d")
    assert (report.kind, rules(report)) == (None, ["file"])


# Numbers as bits.

FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


@pytest.mark.parametrize("name", FLOATS)
def test_census_agrees_with_torch(name: str) -> None:
    dtype = FLOATS[name]
    raw = random_bits((4096,), dtype, 1).view(torch.uint8)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0]).to(dtype).view(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.empty(0, dtype=torch.uint8)
    values = torch.cat([raw, special, every]).view(dtype)
    census = Census()
    nonzero = count(unsigned(values.view(torch.uint8).numpy().tobytes(), name), name, census)
    wide = values.to(torch.float64)
    assert torch.equal(torch.from_numpy(nonzero), wide != 0)
    assert census.nans == int(wide.isnan().sum())
    assert census.infinities == int(wide.isinf().sum())
    assert census.negative_zeros == int(((wide == 0) & wide.signbit()).sum())
    assert (census.elements, census.nonzero) == (values.numel(), int((wide != 0).sum()))


def test_every_format_is_known() -> None:
    from lbc_cli.checkpoint.container import DTYPES as STORED

    assert {name: form.size for name, form in FORMATS.items()} == STORED


def test_the_verifier_stands_on_its_own(tmp_path: Path) -> None:
    """No torch, no packing and no checkpoint code is needed to verify a checkpoint."""
    small_checkpoint(tmp_path / "m")
    script = (
        "import sys\nfrom lbc_cli.verifier import verify\nassert verify(sys.argv[1]).ok\n"
        "loaded = [name for name in sys.modules if name == 'torch' or name.startswith(('lbc_cli.p', 'lbc_cli.c'))]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "m")], check=True)


def test_reports_name_every_violation_once(tmp_path: Path) -> None:
    tensors: dict[str, Any] = sparse_tensors()
    tensors["b.weight"][:, :4] = 1
    report = verify(dense_file(tmp_path / "m", tensors), pattern="2:4")
    assert [(finding.tensor, finding.count) for finding in report.findings] == [("b.weight", 12)]
    assert "[1 1 1 1]" in report.findings[0].message
