"""An ONNX file: its graphs, nodes and tensors, by an own reading of `onnx.proto`, which loads no tensor.

The fields of the format that matter here, by their numbers:

    ModelProto    graph 7, opset_import 8, functions 25
    GraphProto    node 1, initializer 5, sparse_initializer 15
    NodeProto     input 1, output 2, op_type 4, attribute 5, domain 7
    Attribute     name 1, i 3, t 5, g 6, ints 8, graphs 11
    TensorProto   dims 1, data_type 2, segment 3, float_data 4, int32_data 5, int64_data 7, name 8, raw_data 9,
                  double_data 10, uint64_data 11, external_data 13, data_location 14

Tensors lie in the file or, as external data, in files beside it; those must lie in the file's own folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.bits import FORMATS
from lbc_cli.verifier.protobuf import Field, Wire
from lbc_cli.verifier.source import ELEMENT_LIMIT

NODE_LIMIT = 1 << 20
_DEPTH_LIMIT = 16
_BYTES = 2

# ONNX's number of a data type -> safetensors' name, and the field that holds its elements where raw_data does not.
_DTYPES: dict[int, tuple[str, int]] = {
    1: ("F32", 4), 2: ("U8", 5), 3: ("I8", 5), 4: ("U16", 5), 5: ("I16", 5), 6: ("I32", 5), 7: ("I64", 7),
    9: ("BOOL", 5), 10: ("F16", 5), 11: ("F64", 10), 12: ("U32", 11), 13: ("U64", 11), 14: ("C64", 4),
    16: ("BF16", 5), 17: ("F8_E4M3", 5), 18: ("F8_E4M3FNUZ", 5), 19: ("F8_E5M2", 5), 20: ("F8_E5M2FNUZ", 5),
    24: ("F8_E8M0", 5),
}  # fmt: skip
_RAW, _TYPED = 9, (4, 5, 7, 10, 11)
_AS_VARINTS = (5, 7, 11)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant of the graph, and where its elements are."""

    name: str
    dtype: str
    """safetensors' name; "" if `unread`."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    varints: bool = False
    """Whether the elements are protobuf's varints and not little-endian bytes."""
    unread: str = ""
    """Why the elements cannot be read, "" if they can."""


@dataclass(frozen=True, slots=True)
class Node:
    """An operator."""

    op: str
    """With its domain in front unless that is ONNX's own."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, tuple[int, ...]]
    """Attributes that are integers, alone or as a list."""


@dataclass(slots=True, eq=False)
class Graph:
    """A graph, or the body of a control-flow operator, which also sees the names of the graph around it."""

    outer: Graph | None
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    producers: dict[str, Node] = field(default_factory=dict)
    bodies: list[Graph] = field(default_factory=list)

    def find(self, name: str) -> tuple[Graph, Tensor | Node | None]:
        """What a name stands for and where it was found; None for an input or a name that is not there."""
        graph: Graph | None = self
        while graph is not None:
            found = graph.tensors.get(name) or graph.producers.get(name)
            if found is not None:
                return graph, found
            graph = graph.outer
        return self, None

    def walk(self) -> Iterator[Graph]:
        """This graph and every body in it."""
        yield self
        for body in self.bodies:
            yield from body.walk()


@dataclass(frozen=True, slots=True)
class Model:
    """What an ONNX file holds."""

    graph: Graph
    functions: frozenset[str]
    """Operators that the file itself defines, named as `Node.op`."""


def read_model(path: Path) -> Model:
    """Read everything but the tensors' elements.

    Raises:
        CheckpointError: if the file is damaged, or not ONNX.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return _Reader(Wire(file), path).model()


class _Reader:
    def __init__(self, wire: Wire, path: Path) -> None:
        self._wire = wire
        self._path = path
        self._nodes = 0

    def model(self) -> Model:
        found = self._wire.message(0, self._wire.size, (8, 25), once=(7,))
        if 7 not in found or 8 not in found:
            raise CheckpointError("no graph, or no operator set: damaged, or not an ONNX file")
        functions = frozenset(self._function(field) for field in found.get(25, []))
        return Model(self._graph(_inside(found[7]), None, 0), functions)

    def _function(self, field: Field) -> str:
        found = self._wire.message(*_inside(field), (), once=(1, 10))
        domain, name = self._wire.text(found.get(10)), self._wire.text(found.get(1))
        if _operator(domain, name) == name:
            raise CheckpointError(f"the file defines ONNX's own operator {name} anew: its weights cannot be told")
        return _operator(domain, name)

    def _graph(self, span: tuple[int, int], outer: Graph | None, depth: int) -> Graph:
        if depth > _DEPTH_LIMIT:
            raise CheckpointError(f"graphs are nested more than {_DEPTH_LIMIT} deep")
        graph = Graph(outer)
        found = self._wire.message(*span, (1, 5, 15))
        for initializer in found.get(5, []):
            self._add(graph, self._tensor(initializer))
        for sparse in found.get(15, []):
            self._add(graph, self._sparse(sparse))
        for node in found.get(1, []):
            self._node(node, graph, depth)
        return graph

    def _add(self, graph: Graph, tensor: Tensor) -> None:
        if not tensor.name or tensor.name in graph.tensors or tensor.name in graph.producers:
            raise CheckpointError(f"two tensors are called {tensor.name!r}, or one has no name")
        graph.tensors[tensor.name] = tensor

    def _node(self, field: Field, graph: Graph, depth: int) -> None:
        self._nodes += 1
        if self._nodes > NODE_LIMIT:
            raise CheckpointError(f"the graph has more than {NODE_LIMIT} nodes")
        found = self._wire.message(*_inside(field), (1, 2, 5), once=(4, 7))
        inputs, outputs = (tuple(self._wire.text(name) for name in found.get(number, [])) for number in (1, 2))
        op = _operator(self._wire.text(found.get(7)), self._wire.text(found.get(4)))
        node = Node(op, inputs, tuple(filter(None, outputs)), {})
        for output in node.outputs:
            if output in graph.producers or output in graph.tensors:
                raise CheckpointError(f"{output!r} is computed twice")
        for attribute in found.get(5, []):
            self._attribute(attribute, graph, depth, node)
        graph.producers.update({output: node for output in node.outputs if output not in graph.tensors})
        graph.nodes.append(node)

    def _attribute(self, field: Field, graph: Graph, depth: int, node: Node) -> None:
        """Note an attribute: integers in the node, bodies and the value of a `Constant` node in the graph."""
        found = self._wire.message(*_inside(field), (8, 11), once=(1, 3, 5, 6))
        name = self._wire.text(found.get(1))
        if 3 in found or 8 in found:
            single = () if 3 not in found else (self._wire.number(found[3]),)
            if name in node.numbers:
                raise CheckpointError(f"the attribute {name!r} of a node is repeated")
            node.numbers[name] = single + self._wire.numbers(found.get(8, []))
        for body in (*([found[6]] if 6 in found else []), *found.get(11, [])):
            graph.bodies.append(self._graph(_inside(body), graph, depth + 1))
        if node.op == "Constant" and node.outputs and name == "value" and 5 in found:
            self._add(graph, self._tensor(found[5], node.outputs[0]))

    def _sparse(self, field: Field) -> Tensor:
        """A sparse initializer, which takes its name from its values; what it stands for is not read."""
        found = self._wire.message(*_inside(field), (3,), once=(1,))
        values = self._wire.message(*_inside(found[1]), (), once=(8,)) if 1 in found else {}
        shape = self._wire.numbers(found.get(3, []))
        return Tensor(self._wire.text(values.get(8)), "", shape, self._path, 0, 0, unread="a sparse initializer")

    def _tensor(self, field: Field, name: str = "") -> Tensor:
        wire = self._wire
        found = wire.message(*_inside(field), (1, 4, 5, 7, 10, 11, 13), once=(2, 3, 8, 9, 14))
        name = name or wire.text(found.get(8))
        shape = wire.numbers(found.get(1, []))
        if len(shape) > 16 or min(shape, default=0) < 0 or math.prod(size or 1 for size in shape) > ELEMENT_LIMIT:
            raise CheckpointError(f"tensor {name} has the impossible shape {str(list(shape))[:80]}")
        number = wire.number(found.get(2))
        if number not in _DTYPES or 3 in found:
            why = "it is stored in segments" if 3 in found else f"elements of ONNX's data type {number} are not read"
            return Tensor(name, "", shape, self._path, 0, 0, unread=why)
        dtype, typed = _DTYPES[number]
        size = math.prod(shape) * FORMATS[dtype].size
        if wire.number(found.get(14)) == 1:
            return self._external(name, dtype, shape, size, found.get(13, []))
        begin, end, varints = self._place(name, found, typed)
        # A varint has at least one byte: with that, a short file cannot claim many elements.
        if (end - begin != size) if not varints else (end - begin < math.prod(shape)):
            raise CheckpointError(f"tensor {name} is {dtype} {list(shape)}, but has {end - begin} bytes of data")
        return Tensor(name, dtype, shape, self._path, begin, end, varints)

    def _place(self, name: str, found: dict[int, Any], typed: int) -> tuple[int, int, bool]:
        """Where the elements stand in the file, and whether as varints."""
        filled = [number for number in _TYPED if any(part.end > part.begin for part in found.get(number, []))]
        if _RAW in found and found[_RAW].end > found[_RAW].begin:
            filled.append(_RAW)
        if not filled:
            return 0, 0, False
        if len(filled) > 1 or filled[0] not in (_RAW, typed):
            raise CheckpointError(f"tensor {name} has its data in another field than its type needs, or in several")
        parts = [found[_RAW]] if filled == [_RAW] else found[typed]
        if len(parts) > 1 or parts[0].kind != _BYTES:
            raise CheckpointError(f"tensor {name} has its data in pieces: save the file again with the onnx package")
        return parts[0].begin, parts[0].end, filled[0] in _AS_VARINTS

    def _external(self, name: str, dtype: str, shape: tuple[int, ...], size: int, entries: list[Field]) -> Tensor:
        told: dict[str, str] = {}
        for entry in entries:
            found = self._wire.message(*_inside(entry), (), once=(1, 2))
            key = self._wire.text(found.get(1))
            if key in told:
                raise CheckpointError(f"tensor {name} says {key!r} of its external data twice")
            told[key] = self._wire.text(found.get(2))
        try:
            file = self._beside(name, told.get("location", ""))
            held = file.stat().st_size
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"tensor {name}: its external data cannot be found: {error}") from error
        begin = _count(name, told.get("offset", "0"))
        end = begin + _count(name, told.get("length", str(size)))
        if end - begin != size or end > held:
            raise CheckpointError(
                f"tensor {name} is {dtype} {list(shape)}, but its external data are bytes {begin} to {end} of "
                f"{file.name}, which has {held}"
            )
        return Tensor(name, dtype, shape, file, begin, end)

    def _beside(self, name: str, location: str) -> Path:
        """The file that holds external data: it must lie in the folder of the model, links followed."""
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
        if not location or absolute or ".." in location.replace("\\", "/").split("/"):
            raise CheckpointError(f"tensor {name} has its data at {location[:80]!r}: only files beside it are read")
        folder = self._path.resolve().parent
        file = (self._path.parent / location).resolve()
        if not file.is_relative_to(folder):
            raise CheckpointError(f"tensor {name} has its data at {location[:80]!r}, a link out of the folder")
        if not file.is_file():
            raise CheckpointError(f"tensor {name} has its data at {location[:80]!r}, which is not there")
        return file


def _inside(field: Field) -> tuple[int, int]:
    if field.kind != _BYTES:
        raise CheckpointError(f"byte {field.begin}: field {field.number} is no message")
    return field.begin, field.end


def _operator(domain: str, op: str) -> str:
    return op if domain in ("", "ai.onnx") else f"{domain}.{op}"


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CheckpointError(f"tensor {name}: {text[:40]!r} is no offset or length of external data")
    return int(text)
