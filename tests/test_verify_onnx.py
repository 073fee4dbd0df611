"""ONNX files under verification: axes, spellings of tensors, files that mean harm. The onnx package is the oracle."""

from __future__ import annotations

import itertools
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier import Report, onnx_file, protobuf, verify
from lbc_cli.verifier.bits import FORMATS
from lbc_cli.verifier.onnx import onnx_contents
from lbc_cli.verifier.protobuf import varints

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Array = NDArray[Any]
FLOAT = TensorProto.FLOAT


def sparse(shape: tuple[int, ...], seed: int = 0, n: int = 2, m: int = 4) -> Array:
    """A weight [O, I, *K] with exactly N positions of every M input channels in use."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    grouped = np.moveaxis(weight, 1, -1).reshape(-1, m)
    for row in grouped:
        row[rng.permutation(m)[: m - n]] = 0
    moved = tuple(shape[axis] for axis in (0, *range(2, len(shape)), 1))
    return np.ascontiguousarray(np.moveaxis(grouped.reshape(moved), -1, 1))


def graph(nodes: list[Any], tensors: dict[str, Array], **more: Any) -> Any:
    initializers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in tensors.items()]
    return helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, None)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        initializers,
        **more,
    )


def write(path: Path, body: Any, **more: Any) -> Path:
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], **more)
    path.write_bytes(model.SerializeToString())
    return path


def rules(report: Report) -> list[str]:
    return [finding.rule for finding in report.findings]


# What each graph does with a weight [O, I], or [O, I, *K]: how it stores it, and its nodes.
Layout = tuple[Callable[[Array], Array], list[Any]]
NODE = helper.make_node
LINEAR: dict[str, Layout] = {
    "Gemm": (lambda w: w.T, [NODE("Gemm", ["x", "w"], ["y"])]),
    "Gemm transB": (lambda w: w, [NODE("Gemm", ["x", "w"], ["y"], transB=1)]),
    "Gemm, weight first": (lambda w: w, [NODE("Gemm", ["w", "x"], ["y"])]),
    "Gemm transA, weight first": (lambda w: w.T, [NODE("Gemm", ["w", "x"], ["y"], transA=1)]),
    "MatMul": (lambda w: w.T, [NODE("MatMul", ["x", "w"], ["y"])]),
    "MatMul, weight first": (lambda w: w, [NODE("MatMul", ["w", "x"], ["y"])]),
    "Transpose": (lambda w: w, [NODE("Transpose", ["w"], ["t"], perm=[1, 0]), NODE("MatMul", ["x", "t"], ["y"])]),
    "Transpose without perm": (lambda w: w, [NODE("Transpose", ["w"], ["t"]), NODE("MatMul", ["x", "t"], ["y"])]),
    "Transpose to Gemm": (lambda w: w.T, [NODE("Transpose", ["w"], ["t"]), NODE("Gemm", ["x", "t"], ["y"], transB=1)]),
    "two transpositions": (
        lambda w: w.T,
        [NODE("Transpose", ["w"], ["t"]), NODE("Transpose", ["t"], ["u"]), NODE("MatMul", ["x", "u"], ["y"])],
    ),
    "Identity and Cast": (
        lambda w: w.T,
        [NODE("Identity", ["w"], ["i"]), NODE("Cast", ["i"], ["c"], to=10), NODE("MatMul", ["x", "c"], ["y"])],
    ),
}
CONV: dict[str, Layout] = {
    "Conv": (lambda w: w, [NODE("Conv", ["x", "w"], ["y"])]),
    "grouped Conv": (lambda w: w, [NODE("Conv", ["x", "w"], ["y"], group=2)]),
    "Conv, channels last": (
        lambda w: w.transpose(2, 3, 1, 0),
        [NODE("Transpose", ["w"], ["t"], perm=[3, 2, 0, 1]), NODE("Conv", ["x", "t"], ["y"])],
    ),
    "Conv, two rotations": (
        lambda w: w.transpose(2, 3, 0, 1),
        [
            NODE("Transpose", ["w"], ["t"], perm=[1, 2, 3, 0]),
            NODE("Transpose", ["t"], ["u"], perm=[1, 2, 3, 0]),
            NODE("Conv", ["x", "u"], ["y"]),
        ],
    ),
    "Conv, a swap and a rotation": (
        lambda w: w.transpose(1, 2, 3, 0).transpose(1, 0, 2, 3),
        [
            NODE("Transpose", ["w"], ["t"], perm=[1, 0, 2, 3]),
            NODE("Transpose", ["t"], ["u"], perm=[3, 0, 1, 2]),
            NODE("Conv", ["x", "u"], ["y"]),
        ],
    ),
}
CASES = {name: (layout, (6, 16)) for name, layout in LINEAR.items()} | {
    name: (layout, (6, 8, 2, 3)) for name, layout in CONV.items()
}


@pytest.mark.parametrize(("layout", "shape"), CASES.values(), ids=CASES.keys())
def test_the_axis_of_input_channels(layout: Layout, shape: tuple[int, ...], tmp_path: Path) -> None:
    store, nodes = layout
    weight = sparse(shape)
    good = verify(write(tmp_path / "m.onnx", graph(nodes, {"w": store(weight)})), pattern="2:4")
    assert good.ok, good.findings
    assert [(layer.name, layer.shape, layer.groups) for layer in good.layers] == [("w", shape, weight.size // 4)]

    (content,) = [content for content in onnx_contents(tmp_path / "m.onnx") if content.name == "w"]
    assert (content.shape, content.weight) == (shape, True)
    assert b"".join(content.chunks()) == weight.tobytes()

    place = (5, 13) if len(shape) == 2 else (5, 6, 1, 2)
    group = (place[0], slice(place[1] // 4 * 4, place[1] // 4 * 4 + 4), *place[2:])
    weight[group] = [1.0, 2.0, 0.0, 3.0]
    bad = verify(write(tmp_path / "m.onnx", graph(nodes, {"w": store(weight)})), pattern="2:4")
    assert rules(bad) == ["pattern"]
    (violation,) = bad.findings[0].groups
    assert (violation.outputs, violation.kernel) == ((place[0], place[0]), place[2:])
    assert (violation.inputs, violation.used) == ((group[1].start, group[1].start + 3), 3)
    assert "w: group (o=5" in bad.findings[0].message


@pytest.mark.parametrize("layout", LINEAR.values(), ids=LINEAR.keys())
def test_zeros_along_the_wrong_axis_are_found(layout: Layout, tmp_path: Path) -> None:
    store, nodes = layout
    wrong = sparse((16, 16)).T
    assert not verify(write(tmp_path / "m.onnx", graph(nodes, {"w": store(wrong)})), pattern="2:4").ok


def test_vectors_and_globs(tmp_path: Path) -> None:
    nodes = [NODE("Conv", ["x", "a.weight"], ["h"]), NODE("Conv", ["h", "b.weight"], ["y"], group=2)]
    row = sparse((1, 8, 1, 1))
    path = write(
        tmp_path / "m.onnx",
        graph(nodes, {"a.weight": np.tile(row, (12, 1, 1, 1)), "b.weight": sparse((12, 8, 1, 1), 5, 1)}),
    )
    report = verify(path, layers={"a": "2:4/4", "b": "1:4/4"})
    assert {layer.name: layer.pattern for layer in report.layers} == {"a.weight": "2:4/4", "b.weight": "1:4/2"}
    assert [finding.tensor for finding in report.findings] == ["b.weight"]
    assert verify(path, layers={"a": "2:4/4", "b": "dense"}).ok


def quantised(zero: int | None) -> tuple[list[Any], dict[str, Array]]:
    weight = (sparse((6, 16)) * 8).astype(np.int8)
    tensors: dict[str, Array] = {"w": weight.T, "s": np.float32([0.5])}
    if zero is not None:
        tensors["z"] = np.int8([zero])
    inputs = ["w", "s", *(["z"] if zero is not None else [])]
    return [NODE("DequantizeLinear", inputs, ["d"]), NODE("MatMul", ["x", "d"], ["y"])], tensors


@pytest.mark.parametrize("zero", [None, 0])
def test_quantised_weights(zero: int | None, tmp_path: Path) -> None:
    nodes, tensors = quantised(zero)
    report = verify(write(tmp_path / "m.onnx", graph(nodes, tensors)), pattern="2:4")
    assert report.ok
    assert [layer.shape for layer in report.layers] == [(6, 16)]


def body(name: str) -> Any:
    branch = [helper.make_tensor_value_info("b", FLOAT, None)]
    weights = [numpy_helper.from_array(sparse((6, 16)), name)]
    return helper.make_graph([NODE("Gemm", ["x", name], ["b"], transB=1)], "b", [], branch, weights)


SQUARE = sparse((16, 16))
NOT_WEIGHTS: dict[str, tuple[Any, str]] = {
    "zero point": (graph(*quantised(3)), "quantised with a zero point that is not 0"),
    "embedding": (graph([NODE("Gather", ["w", "x"], ["y"])], {"w": SQUARE}), "used by Gather"),
    "reshaped": (
        graph(
            [NODE("Reshape", ["w", "s"], ["r"]), NODE("Conv", ["x", "r"], ["y"])],
            {"w": SQUARE, "s": np.int64([16, 16, 1, 1])},
        ),
        "used by Reshape",
    ),
    "two axes": (
        graph([NODE("MatMul", ["x", "w"], ["h"]), NODE("Gemm", ["h", "w"], ["y"], transB=1)], {"w": SQUARE}),
        "different axes",
    ),
    "batch": (graph([NODE("MatMul", ["x", "w"], ["y"])], {"w": np.stack([SQUARE, SQUARE])}), "batch of matrices"),
    "constants": (graph([NODE("MatMul", ["v", "w"], ["y"])], {"v": SQUARE, "w": SQUARE}), "another constant"),
    "transposed convolution": (
        graph([NODE("ConvTranspose", ["x", "w"], ["y"])], {"w": SQUARE.reshape(16, 16, 1, 1)}),
        "used by ConvTranspose",
    ),
    "groups that do not divide": (
        graph([NODE("Conv", ["x", "w"], ["y"], group=3)], {"w": SQUARE.reshape(16, 16, 1, 1)}),
        "does not go into 3 groups",
    ),
    "no groups": (graph([NODE("Conv", ["x", "w"], ["y"], group=0)], {"w": SQUARE.reshape(16, 16, 1, 1)}), "0 groups"),
    "transposed beyond its shape": (
        graph([NODE("Transpose", ["w"], ["t"], perm=[0, 0]), NODE("MatMul", ["x", "t"], ["y"])], {"w": SQUARE}),
        "does not fit its shape",
    ),
    "other domain": (graph([NODE("Conv", ["x", "w"], ["y"], domain="acme")], {"w": SQUARE}), "used by acme.Conv"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_weight_is_listed_with_the_reason(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", NOT_WEIGHTS[name][0])
    report = verify(path, pattern="2:4")
    assert NOT_WEIGHTS[name][1] in next(dense.why for dense in report.dense if dense.name == "w")
    assert rules(report) == ["pattern"]
    assert "no tensor can hold 2:4" in report.findings[0].message
    assert not any(content.weight for content in onnx_contents(path))


def test_an_embedding_that_is_also_the_classifier_is_a_weight(tmp_path: Path) -> None:
    nodes = [NODE("Gather", ["w", "x"], ["h"]), NODE("Gemm", ["h", "w"], ["y"], transB=1)]
    assert verify(write(tmp_path / "m.onnx", graph(nodes, {"w": SQUARE})), pattern="2:4").ok


def test_bodies_functions_and_constants(tmp_path: Path) -> None:
    constant = numpy_helper.from_array(sparse((6, 16), 3), "")
    nodes = [
        NODE("Constant", [], ["c"], value=constant),
        NODE("Gemm", ["x", "c"], ["h"], transB=1),
        NODE("If", ["x"], ["y"], then_branch=body("then"), else_branch=body("else")),
        NODE("Mine", ["x", "w"], ["q"], domain="own"),
    ]
    function = helper.make_function(
        "own", "Mine", ["a", "b"], ["r"], [NODE("MatMul", ["a", "b"], ["r"])], [helper.make_opsetid("", 18)]
    )
    path = write(tmp_path / "m.onnx", graph(nodes, {"w": SQUARE}), functions=[function])
    report = verify(path, pattern="2:4")
    assert report.ok
    assert sorted(layer.name for layer in report.layers) == ["c", "else", "then"]
    assert [dense.why for dense in report.dense] == [
        "used by own.Mine, which the file defines itself: not the weight of a Conv, Gemm or MatMul"
    ]
    write(path, graph([NODE("If", ["x"], ["y"], then_branch=body("w"), else_branch=body("w"))], {}))
    assert verify(path, pattern="2:4").ok
    with pytest.raises(CheckpointError, match="two graphs of the file have a tensor called w"):
        list(onnx_contents(path))


def test_further_names_are_compared_too(tmp_path: Path) -> None:
    """Exporters keep one initializer of several that are shared, or just equal, and alias the others."""
    nodes = [
        NODE("Identity", ["a.weight"], ["b.weight"]),
        NODE("MatMul", ["x", "a.weight"], ["h"]),
        NODE("MatMul", ["h", "b.weight"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", graph(nodes, {"a.weight": SQUARE.T}))
    found = {content.name: (content.weight, b"".join(content.chunks())) for content in onnx_contents(path)}
    assert found == {"a.weight": (True, SQUARE.tobytes()), "b.weight": (False, SQUARE.tobytes())}
    both = {name: torch.from_numpy(SQUARE) for name in ("a.weight", "b.weight")}
    save_file({name: tensor.clone() for name, tensor in both.items()}, tmp_path / "m.safetensors")
    assert verify(path, pattern="2:4", against=tmp_path / "m.safetensors").ok
    assert [layer.name for layer in verify(path, pattern="2:4").layers] == ["a.weight"]


# How tensors are spelled.

NUMPY = {
    "F32": FLOAT, "F64": TensorProto.DOUBLE, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16,
    "F8_E4M3": TensorProto.FLOAT8E4M3FN, "F8_E5M2": TensorProto.FLOAT8E5M2, "C64": TensorProto.COMPLEX64,
    "I8": TensorProto.INT8, "I16": TensorProto.INT16, "I32": TensorProto.INT32, "I64": TensorProto.INT64,
    "U8": TensorProto.UINT8, "U16": TensorProto.UINT16, "U32": TensorProto.UINT32, "U64": TensorProto.UINT64,
    "BOOL": TensorProto.BOOL,
}  # fmt: skip


@pytest.mark.parametrize("dtype", NUMPY)
def test_every_dtype_raw_and_typed(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 2 if dtype == "BOOL" else 256, 15 * FORMATS[dtype].size, np.uint8).tobytes()
    plain = TensorProto(name="raw", data_type=NUMPY[dtype], dims=[3, 5], raw_data=raw)
    bits = np.frombuffer(raw, f"<u{FORMATS[dtype].size}")
    typed = TensorProto(name="typed", data_type=NUMPY[dtype], dims=[3, 5])
    if dtype in ("F32", "C64"):
        typed.float_data.extend(np.frombuffer(raw, "<f4").tolist())
        plain.raw_data = raw = np.array(list(typed.float_data), "<f4").tobytes()  # protobuf may quieten a NaN
    elif dtype == "F64":
        typed.double_data.extend(np.frombuffer(raw, "<f8").tolist())
        plain.raw_data = raw = np.array(list(typed.double_data), "<f8").tobytes()
    elif dtype in ("U32", "U64"):
        typed.uint64_data.extend(bits.tolist())
    elif dtype[0] == "I":
        (typed.int64_data if dtype == "I64" else typed.int32_data).extend(
            bits.view(f"<i{FORMATS[dtype].size}").tolist()
        )
    else:
        typed.int32_data.extend(bits.tolist())
    model = helper.make_graph([], "g", [], [], [plain, typed])
    write(tmp_path / "m.onnx", model)
    found = {content.name: content for content in onnx_contents(tmp_path / "m.onnx")}
    for name in ("raw", "typed"):
        assert (found[name].dtype, found[name].shape) == (dtype, (3, 5))
        assert b"".join(found[name].chunks()) == raw


@pytest.mark.parametrize("number", [TensorProto.STRING, TensorProto.INT4, TensorProto.COMPLEX128, 77])
def test_dtypes_that_are_not_read_are_said_to_be_so(number: int, tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=number, dims=[4, 4])
    body = helper.make_graph([NODE("MatMul", ["x", "w"], ["y"])], "g", [], [], [tensor])
    report = verify(write(tmp_path / "m.onnx", body), pattern="2:4")
    assert [dense.why for dense in report.dense] == [f"elements of ONNX's data type {number} are not read"]
    assert not report.ok


def test_sparse_initializers_are_not_read(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.float32([1.0]), "w")
    entry = helper.make_sparse_tensor(values, numpy_helper.from_array(np.int64([3])), [4, 4])
    body = helper.make_graph([NODE("MatMul", ["x", "w"], ["y"])], "g", [], [], [], sparse_initializer=[entry])
    report = verify(write(tmp_path / "m.onnx", body), pattern="2:4")
    assert [(dense.name, dense.why, dense.shape) for dense in report.dense] == [("w", "a sparse initializer", (4, 4))]


def test_odd_values_are_reported(tmp_path: Path) -> None:
    weight = sparse((4, 8))
    weight[0, 0], weight[1, 1], weight[weight == 0] = np.nan, np.inf, -0.0
    nodes = [NODE("Gemm", ["x", "w"], ["y"], transB=1)]
    report = verify(write(tmp_path / "m.onnx", graph(nodes, {"w": weight, "b": np.float32([np.nan])})), pattern="4:8")
    assert {(finding.rule, finding.tensor) for finding in report.findings} >= {
        ("nan", "w"),
        ("nan", "b"),
        ("infinity", "w"),
    }
    assert ("negative-zero", "warning") in {(finding.rule, finding.level) for finding in report.findings}


def test_varints_against_the_onnx_package(tmp_path: Path) -> None:
    rng = random.Random(2)
    numbers = [rng.getrandbits(rng.randrange(1, 65)) for _ in range(500)] + [0, 127, 128, 2**64 - 1]
    data = TensorProto(uint64_data=numbers).SerializeToString()
    assert varints(data[data.index(data[1:2]) + 2 :] if data[1] < 128 else data[3:]).tolist() == numbers
    for bad in (b"\x80", b"\x01" * 3 + b"\xff", b"\xff" * 10 + b"\x01"):
        with pytest.raises(CheckpointError):
            varints(bad)
    assert varints(b"").tolist() == []


# External data.


def external(path: Path, **entries: str) -> Path:
    """A graph whose one weight, [6, 16] float32, lies outside."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[6, 16], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return write(path, helper.make_graph([NODE("Gemm", ["x", "w"], ["y"], transB=1)], "g", [], [], [tensor]))


def test_external_data(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    weight = sparse((6, 16))
    (tmp_path / "weights" / "d").write_bytes(b"12345678" + weight.tobytes() + b"!")
    path = external(tmp_path / "m.onnx", location="weights/d", offset="8", length="384")
    assert verify(path, pattern="2:4").ok
    assert [b"".join(content.chunks()) for content in onnx_contents(path)] == [weight.tobytes()]
    assert not verify(external(path, location="weights/d", offset="9"), pattern="2:4").ok


OUTSIDE: dict[str, tuple[dict[str, str], str]] = {
    "parent": ({"location": "../d"}, "only files beside it are read"),
    "parent inside": ({"location": "weights/../../d"}, "only files beside it are read"),
    "backslashes": ({"location": "..\\d"}, "only files beside it are read"),
    "absolute": ({"location": "/etc/hostname"}, "only files beside it are read"),
    "drive": ({"location": "C:\\d"}, "only files beside it are read"),
    "nothing": ({}, "only files beside it are read"),
    "link": ({"location": "link"}, "a link out of the folder"),
    "linked folder": ({"location": "folder/d"}, "a link out of the folder"),
    "folder": ({"location": "weights"}, "which is not there"),
    "missing": ({"location": "missing"}, "which is not there"),
    "name too long": ({"location": "x" * 4000}, "cannot be found"),
    "loop": ({"location": "loop"}, ""),
    "too short": ({"location": "short"}, "which has 10"),
    "offset beyond": ({"location": "d", "offset": "1000000"}, "which has 384"),
    "negative offset": ({"location": "d", "offset": "-384"}, "is no offset"),
    "huge offset": ({"location": "d", "offset": "9" * 40}, "is no offset"),
    "digits of another script": ({"location": "d", "offset": "\u0663"}, "is no offset"),
    "other length": ({"location": "d", "length": "380"}, "are bytes 0 to 380"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_external_data_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "weights").mkdir(parents=True)
    for place in (home / "d", tmp_path / "d"):
        place.write_bytes(sparse((6, 16)).tobytes())
    (home / "short").write_bytes(b"0123456789")
    (home / "link").symlink_to(tmp_path / "d")
    (home / "folder").symlink_to(tmp_path)
    (home / "loop").symlink_to(home / "loop")
    entries, message = OUTSIDE[name]
    report = verify(external(home / "m.onnx", **entries), pattern="2:4")
    assert rules(report)[0] == "file"
    assert message in report.findings[0].message


# Files that are damaged, or mean harm.


def varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + varint(value >> 7)) if value > 0x7F else bytes([value])


def field(number: int, payload: bytes) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def number(key: int, value: int) -> bytes:
    """A field that is an integer."""
    return varint(key << 3) + varint(value % (1 << 64))


OPSET = field(8, b"\x10\x12")
WEIGHT = field(8, b"w") + number(2, 1)
ONE = WEIGHT + number(1, 1) + field(9, b"1234")
INT32, INT64 = (field(8, b"w") + number(2, dtype) for dtype in (6, 7))
INT16 = field(8, b"w") + number(2, 5)


def one_tensor(tensor: bytes) -> bytes:
    return field(7, field(5, tensor)) + OPSET


NESTED = b""
for _ in range(40):
    NESTED = field(1, field(5, field(6, NESTED)))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no graph"),
    "text": (b"a model? no!", "not an ONNX file"),
    "no graph": (OPSET, "no graph"),
    "two graphs": (field(7, b"") * 2 + OPSET, "is repeated"),
    "a graph that is a number": (number(7, 3) + OPSET, "is no message"),
    "longer than the file": (field(7, b"123")[:-1] + OPSET, "begins no field that fits"),
    "endless number": (b"\xff" * 20, "does not end"),
    "group of protobuf": (b"\x3b\x3c" + OPSET, "begins no field that fits"),
    "field zero": (b"\x02\x00" + OPSET, "begins no field that fits"),
    "nested": (field(7, NESTED) + OPSET, "nested more than 16 deep"),
    "claims 10^10 elements": (one_tensor(WEIGHT + number(1, 10**5) * 2), "but has 0 bytes"),
    "claims 10^12 elements": (one_tensor(WEIGHT + number(1, 10**6) * 2), "impossible shape"),
    "claims 2^62 elements": (one_tensor(WEIGHT + number(1, 2**62)), "impossible shape"),
    "claims 0 x 10^12": (one_tensor(WEIGHT + number(1, 0) + number(1, 10**12)), "impossible shape"),
    "a negative size": (one_tensor(WEIGHT + number(1, -4)), "impossible shape"),
    "17 axes": (one_tensor(WEIGHT + number(1, 1) * 17), "impossible shape"),
    "no name": (one_tensor(number(2, 1) + number(1, 1) + field(9, b"1234")), "no name"),
    "a name with control characters": (one_tensor(field(8, b"w\x1b[2J") + number(2, 1)), "unprintable"),
    "a name that is no text": (one_tensor(field(8, b"\xff\xfe") + number(2, 1)), "not UTF-8"),
    "a name of a megabyte": (one_tensor(field(8, b"w" * (1 << 20)) + number(2, 1)), "at most 65536"),
    "two tensors of one name": (
        field(7, 2 * field(5, ONE)) + OPSET,
        "two tensors are called 'w'",
    ),
    "a tensor that is computed too": (
        field(7, field(5, ONE) + field(1, field(2, b"w") + field(4, b"Relu"))) + OPSET,
        "'w' is computed twice",
    ),
    "another Transpose": (field(7, b"") + OPSET + field(25, field(1, b"Transpose")), "own operator Transpose anew"),
    "data twice": (one_tensor(WEIGHT + number(1, 1) + field(9, b"1234") + field(4, b"1234")), "in several"),
    "data of another type": (one_tensor(WEIGHT + number(1, 2) + field(5, b"12")), "another field than its type"),
    "data in pieces": (one_tensor(WEIGHT + number(1, 2) + field(4, b"1234") * 2), "in pieces"),
    "two names": (one_tensor(WEIGHT + field(8, b"v") + number(1, 1) + field(9, b"1234")), "is repeated"),
    "integers too large": (one_tensor(INT16 + number(1, 1) + field(5, b"\xff\xff\x07")), "cannot hold"),
    "integers that do not end": (one_tensor(INT64 + number(1, 1) + field(7, b"\xff")), "does not end"),
    "fewer integers": (one_tensor(INT32 + number(1, 2) + field(5, b"\xff\x01")), "has 1 elements"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_bounded_memory(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    (tmp_path / "m.onnx").write_bytes(content)
    tracemalloc.start()
    report = verify(tmp_path / "m.onnx", pattern="2:4")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rules(report)[:1] == ["file"], report.findings
    assert message in report.findings[0].message
    assert peak < 4 << 20


def test_a_swarm_of_fields_and_nodes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(field(7, b"\x0a\x00" * 20_000) + OPSET)
    assert verify(path, values_only=True).ok
    monkeypatch.setattr(protobuf, "FIELD_LIMIT", 10_000)
    assert "more than 10000 fields" in verify(path, values_only=True).findings[0].message
    monkeypatch.undo()
    monkeypatch.setattr(onnx_file, "NODE_LIMIT", 10_000)
    assert "more than 10000 nodes" in verify(path, values_only=True).findings[0].message


def test_chains_in_circles_end(tmp_path: Path) -> None:
    nodes = [NODE("Identity", ["a"], ["b"]), NODE("Identity", ["b"], ["a"]), NODE("MatMul", ["x", "a"], ["y"])]
    start = time.perf_counter()
    assert verify(write(tmp_path / "m.onnx", graph(nodes, {})), values_only=True).ok
    assert time.perf_counter() - start < 5


def sound(path: Path) -> bytes:
    weights = {
        "conv.weight": sparse((8, 8, 3, 3)),
        "fc1.weight": sparse((4, 8)),
        "quantised": np.arange(32, dtype=np.int8).reshape(4, 8),
    }
    nodes = [
        NODE("Conv", ["x", "conv.weight"], ["h"], kernel_shape=[3, 3]),
        NODE("Gemm", ["h", "fc1.weight"], ["g"], transB=1),
        NODE("Transpose", ["quantised"], ["t"], perm=[1, 0]),
        NODE("Constant", [], ["s"], value=helper.make_tensor("", FLOAT, [], [0.5])),
        NODE("DequantizeLinear", ["t", "s"], ["d"]),
        NODE("MatMul", ["g", "d"], ["y"]),
    ]
    body = graph(nodes, weights)
    body.initializer.append(helper.make_tensor("typed", TensorProto.INT16, [4, 4], list(range(-8, 8))))
    return write(path, body).read_bytes()


def damaged(content: bytes, seed: int, number: int) -> list[bytes]:
    rng = random.Random(seed)
    found = []
    for kind in itertools.islice(itertools.cycle(range(4)), number):
        at, some = rng.randrange(len(content)), bytes(rng.randrange(256) for _ in range(rng.randrange(1, 6)))
        found.append(
            [
                content[:at],
                content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
                content[:at] + some + content[at:],
                content[:at] + content[at + len(some) :],
            ][kind]
        )
    return found


def test_damage_is_a_finding_and_what_is_accepted_is_what_the_onnx_package_reads(tmp_path: Path) -> None:
    """Both readings, which share no code, agree on every file that both accept."""
    content, path = sound(tmp_path / "m.onnx"), tmp_path / "m.onnx"
    refused = agreed = 0
    for bad in damaged(content, 21, 1200):
        path.write_bytes(bad)
        report = verify(path, values_only=True)
        refused += "file" in rules(report)
        try:
            ours = {c.name: (c.shape, b"".join(c.chunks())) for c in onnx_contents(path) if not c.weight}
        except CheckpointError:
            continue
        try:
            theirs = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(bad).graph.initializer}
        except Exception:  # protobuf's, numpy's and the package's own
            continue
        for name in theirs.keys() & ours.keys():
            if theirs[name].dtype.kind in "iuf":
                assert ours[name] == (theirs[name].shape, theirs[name].tobytes())
                agreed += 1
    assert refused > 500
    assert agreed > 250


def test_truncations_are_found(tmp_path: Path) -> None:
    content, path = sound(tmp_path / "m.onnx"), tmp_path / "m.onnx"
    for end in [*range(0, len(content), 4), len(content) - 1]:
        path.write_bytes(content[:end])
        assert not verify(path, pattern="2:4").ok


def test_an_extra_weight_is_found_wherever_it_is(tmp_path: Path) -> None:
    """400 files, each with one extra weight, caught and located."""
    rng = np.random.default_rng(5)
    layouts = list(CASES.values())
    for number in range(400):
        (store, nodes), shape = layouts[number % len(layouts)]
        weight = sparse(shape, number)
        zeros = np.argwhere(weight == 0)
        place = tuple(int(axis) for axis in zeros[rng.integers(len(zeros))])
        weight[place] = 1e-30
        report = verify(write(tmp_path / "m.onnx", graph(nodes, {"w": store(weight)})), pattern="2:4")
        assert [finding.count for finding in report.findings] == [1]
        (violation,) = report.findings[0].groups
        assert (violation.outputs[0], violation.inputs[0], violation.kernel) == (place[0], place[1] // 4 * 4, place[2:])


def test_memory_stays_flat(tmp_path: Path) -> None:
    weight = sparse((64, 512))
    nodes = [NODE("Gemm", ["x", "w"], ["y"], transB=1)]
    path = write(tmp_path / "m.onnx", graph(nodes, {"w": np.tile(weight, (256, 1))}))
    assert path.stat().st_size > 32 << 20
    tracemalloc.start()
    assert verify(path, pattern="2:4").ok
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
