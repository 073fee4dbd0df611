"""Whether two artefacts hold the same weights."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lbc_cli.checkpoint import read, save
from lbc_cli.errors import UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.verifier import Report, verify
from lbc_cli.verifier.artefact import contents, open_artefact
from lbc_cli.verifier.bits import narrowed, unsigned
from tests.checkpoints import FakePruner, FakeTarget, parts, sealed, small_checkpoint
from tests.test_packing import random_bits, sparse_weight
from tests.test_verifier import dense_file


def restored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in read(path).tensors.items()}


def findings(report: Report, rule: str = "against") -> list[str]:
    return [finding.message for finding in report.findings if finding.rule == rule]


def test_a_checkpoint_and_its_dense_twin_hold_the_same_weights(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    dense_file(tmp_path / "d", restored(tmp_path / "m"))
    for one, two in (("m", "d"), ("d", "m"), ("m", "m"), ("d", "d")):
        report = verify(tmp_path / one, against=tmp_path / two)
        assert report.ok
        assert report.against is not None
        assert {key: report.against[key] for key in ("different", "missing", "extra", "rounded")} == dict.fromkeys(
            ("different", "missing", "extra", "rounded"), 0
        )
        assert report.against["tensors"] == report.against["equal"] == len(restored(tmp_path / "m"))
        assert (report.against["kind"], report.against["path"]) == (
            {"m": "packed", "d": "dense"}[two],
            str(tmp_path / two),
        )


def test_the_digest_is_that_of_the_weights_and_not_of_the_container(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    tensors = restored(tmp_path / "m")
    dense_file(tmp_path / "d", tensors)
    lines = [
        f"{name}\t{'I64' if tensor.dtype == torch.int64 else 'F32'}\t{list(tensor.shape)}\t"
        f"{hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}\n"
        for name, tensor in sorted(tensors.items())
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    for one, two in (("m", "d"), ("d", "m")):
        assert (verify(tmp_path / one, against=tmp_path / two).against or {})["digest"] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("pattern", ["2:4", "1:4/2", "3:5", "4:16/3", "7:32", "1:2"])
def test_packed_tensors_are_restored_as_the_reader_restores_them(
    dtype: torch.dtype, pattern: str, tmp_path: Path
) -> None:
    """The verifier's own restoring agrees with the reader, bit for bit: NaN payloads, -0.0, partly filled groups."""
    parsed = Pattern.parse(pattern)
    model = torch.nn.Module()
    weight, mask = sparse_weight(parsed, (12, parsed.m * 3, 2, 3), dtype, 5)
    model.weight = torch.nn.Parameter(weight, requires_grad=False)
    pruner = FakePruner(model, {})
    pruner.targets, pruner._masks = (FakeTarget("weight", parsed),), {"weight": mask}
    save(model, tmp_path / "m", pruner=pruner)
    with open_artefact(tmp_path / "m") as artefact:
        (content,) = contents(artefact)
        found = b"".join(content.chunks())
    assert content.shape == tuple(weight.shape)
    assert found == weight.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_single_differing_element_is_located(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    for name, place, where in (
        ("conv.weight", (3, 5, 0, 2), "(o=3, i=5, k=(0, 2))"),
        ("fc1.weight", (2, 7), "(o=2, i=7, k=())"),
        ("norm.running_mean", (4,), "[4]"),
    ):
        tensors = restored(tmp_path / "m")
        was = float(tensors[name][place])
        tensors[name][place] = 0.625
        dense_file(tmp_path / "d", tensors)
        report = verify(tmp_path / "m", against=tmp_path / "d")
        (message,) = findings(report)
        assert f"{name} differs from" in message
        assert f"at {where}, [{was:.6g}] here and [0.625] there; 1 of {tensors[name].numel()} elements" in message
        assert report.against is not None
        assert (report.against["different"], report.against["digest"]) == (1, None)


def test_bits_count_not_numbers(tmp_path: Path) -> None:
    dense_file(tmp_path / "a", {"w.weight": torch.tensor([[0.0, 1.0]])})
    dense_file(tmp_path / "b", {"w.weight": torch.tensor([[-0.0, 1.0]])})
    assert "[0] here and [-0] there" in findings(verify(tmp_path / "a", against=tmp_path / "b"))[0]
    payloads = [struct.unpack("<f", struct.pack("<I", bits)) for bits in (0x7FC00001, 0x7FC00002)]
    for name, payload in zip("cd", payloads, strict=True):
        dense_file(tmp_path / name, {"w.weight": torch.tensor([payload])})
    assert findings(verify(tmp_path / "c", against=tmp_path / "d"))
    assert not findings(verify(tmp_path / "c", against=tmp_path / "c"))


def test_differences_are_counted_across_blocks(tmp_path: Path) -> None:
    one = torch.randn(700, 900)
    two = one.clone()
    two.view(-1)[[300_000, 600_001, 629_999]] += 1
    dense_file(tmp_path / "a", {"w.weight": one})
    dense_file(tmp_path / "b", {"w.weight": two})
    (finding,) = verify(tmp_path / "a", against=tmp_path / "b").findings
    assert finding.count == 3
    assert f"(o={300_000 // 900}, i={300_000 % 900}, k=())" in finding.message


def test_missing_extra_and_misshapen_tensors(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    tensors = restored(tmp_path / "m")
    tensors["more.weight"] = torch.zeros(2, 2)
    del tensors["norm.bias"], tensors["norm.num_batches_tracked"]
    tensors["fc1.weight"] = tensors["fc1.weight"].reshape(16, 4).contiguous()
    tensors["fc.bias"] = tensors["fc.bias"].to(torch.int32)
    dense_file(tmp_path / "d", tensors)
    report = verify(tmp_path / "m", against=tmp_path / "d")
    found = {finding.tensor: finding for finding in report.findings}
    assert "lacks norm.bias, norm.num_batches_tracked" in found["norm.bias"].message
    assert found["norm.bias"].count == 2
    assert f"{tmp_path / 'm'} lacks more.weight" in found["more.weight"].message
    assert "F32 [4, 16]" in found["fc1.weight"].message
    assert "F32 [16, 4]" in found["fc1.weight"].message
    assert "I32 [3]" in found["fc.bias"].message
    assert report.against is not None
    assert {key: report.against[key] for key in ("different", "missing", "extra")} == {
        "different": 2,
        "missing": 2,
        "extra": 1,
    }


# Rounding.


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_rounded_twins_are_told_from_different_ones(target: torch.dtype, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    tensors = restored(tmp_path / "m")
    halves = {name: tensor.to(target) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    dense_file(tmp_path / "d", halves)
    for one, two in (("m", "d"), ("d", "m")):
        report = verify(tmp_path / one, against=tmp_path / two)
        assert report.ok
        assert [(finding.rule, finding.level) for finding in report.findings] == [("rounded", "warning")]
        assert report.findings[0].count == len(tensors) - 1
        assert report.against is not None
        assert (report.against["equal"], report.against["digest"]) == (1, None)
    step = halves["fc1.weight"][0].view(torch.int16)
    step[step.ne(0).nonzero()[0]] += 1
    dense_file(tmp_path / "d", halves)
    report = verify(tmp_path / "m", against=tmp_path / "d")
    assert [finding.tensor for finding in report.findings if finding.level == "error"] == ["fc1.weight"]


NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


ROUNDINGS = [
    (torch.float64, torch.float32),
    (torch.float64, torch.float16),
    (torch.float64, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("source", "target"), ROUNDINGS)
def test_rounding_is_torchs(source: torch.dtype, target: torch.dtype) -> None:
    values = random_bits((20_000,), source, 3)
    exact = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 65504.0, 65519.9, 65520.0, 3.39e38, 1e-40, 6e-8, 2.9e-8])
    ties = torch.arange(0x3F800000, 0x3F800000 + 0x40000, 0x1000, dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, exact.to(source), ties.to(source), torch.tensor([torch.inf, -torch.inf]).to(source)])
    bits = unsigned(values.view(torch.uint8).numpy().tobytes(), NAMES[source])
    found, nans = narrowed(bits, NAMES[source], NAMES[target])
    expected = values.to(target)
    assert np.array_equal(nans, expected.isnan().numpy())
    spelled = unsigned(expected.view(torch.uint8).numpy().tobytes(), NAMES[target])
    assert np.array_equal(found[~nans], spelled[~nans])


def test_half_and_bfloat16_are_compared_as_numbers(tmp_path: Path) -> None:
    values = torch.tensor([[0.5, -2.0, 0.0, float("nan")]])
    dense_file(tmp_path / "a", {"w.weight": values.half()})
    dense_file(tmp_path / "b", {"w.weight": values.bfloat16()})
    assert not findings(verify(tmp_path / "a", against=tmp_path / "b"))
    dense_file(tmp_path / "b", {"w.weight": torch.tensor([[0.5, -2.0, -0.0, 1.0]]).bfloat16()})
    assert "2 of 4 elements differ" in findings(verify(tmp_path / "a", against=tmp_path / "b"))[0]


# Damage, and other kinds.


def test_a_damaged_twin_is_not_compared(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-1])
    header, manifest, data = parts(content)
    at = len(content) - len(data) + header["fc.bias"]["data_offsets"][0]
    (tmp_path / "flip").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    begin = header["fc1.weight.nm_index"]["data_offsets"][0]
    data[begin] = 0
    (tmp_path / "tampered").write_bytes(sealed(header, manifest, data))
    for name in ("cut", "flip", "tampered"):
        (message,) = findings(verify(tmp_path / "m", against=tmp_path / name))
        assert message.startswith(f"{tmp_path / name} is damaged: ")
        report = verify(tmp_path / name, against=tmp_path / "m")
        assert not report.ok
        assert report.against is None
    with pytest.raises(UsageError, match="no such file"):
        verify(tmp_path / "m", against=tmp_path / "none")


def test_what_breaks_its_pattern_can_still_be_compared(tmp_path: Path) -> None:
    save_file({"w.weight": torch.ones(4, 4)}, tmp_path / "m")
    report = verify(tmp_path / "m", pattern="2:4", against=tmp_path / "m")
    assert [finding.rule for finding in report.findings] == ["pattern"]
    assert (report.against or {})["equal"] == 1


def test_the_semi_structured_export_of_a_checkpoint_holds_its_weights(tmp_path: Path) -> None:
    from lbc_cli.exports import ExportOptions, export

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 5)).to(torch.bfloat16)
    save(model, tmp_path / "m.safetensors", pruner=FakePruner(model, {"0.weight": "2:4"}))
    done = export(tmp_path / "m.safetensors", "semi-structured", options=ExportOptions())
    report = verify(done.path, against=tmp_path / "m.safetensors")
    assert report.kind == "semi-structured"
    assert report.ok
    assert (report.against or {})["equal"] == 4
    assert verify(tmp_path / "m.safetensors", against=done.path).ok


def onnx_twin(path: Path, tensors: dict[str, np.ndarray], out: str) -> None:
    """A graph that multiplies by `fc.weight`, transposed, and by nothing else."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    nodes = [helper.make_node("Gemm", ["x", "fc.weight"], ["y"], transB=1)]
    first, last = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", out))
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", [first], [last], initializer=constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def test_a_graph_must_hold_the_weights_and_may_lack_the_rest(tmp_path: Path) -> None:
    weight = np.arange(32, dtype=np.float32).reshape(4, 8)
    tensors = {
        "fc.weight": torch.from_numpy(weight),
        "norm.running_mean": torch.zeros(4),
        "norm.num_batches_tracked": torch.tensor(3),
    }
    dense_file(tmp_path / "d", tensors)
    onnx_twin(tmp_path / "m.onnx", {"fc.weight": weight, "constant": np.ones((2, 2), np.float32)}, "y")
    assert verify(tmp_path / "d", against=tmp_path / "m.onnx").ok
    assert verify(tmp_path / "m.onnx", against=tmp_path / "d").ok
    dense_file(tmp_path / "d", {**tensors, "conv.weight": torch.zeros(4, 4, 3, 3)})
    assert "lacks conv.weight" in findings(verify(tmp_path / "d", against=tmp_path / "m.onnx"))[0]
    dense_file(tmp_path / "d", {"norm.running_mean": torch.zeros(4)})
    assert "lacks fc.weight" in findings(verify(tmp_path / "m.onnx", against=tmp_path / "d"))[0]
    onnx_twin(tmp_path / "m.onnx", {"fc.weight": weight + (weight == 9)}, "y")
    dense_file(tmp_path / "d", tensors)
    assert "(o=1, i=1, k=())" in findings(verify(tmp_path / "d", against=tmp_path / "m.onnx"))[0]
