"""Which constants of an ONNX graph are weights, and where their output and input channels are.

    Conv     W [O, I / groups, *K]
    Gemm     B [I, O], with transB [O, I]; A likewise where B is computed
    MatMul   B [I, O]; A [O, I] where B is computed

A constant is followed to its operator through what moves or keeps zeros: Identity, Cast, Transpose, and QuantizeLinear
and DequantizeLinear whose zero point is 0. Through anything else it is not followed, and said to be so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from lbc_cli.verifier.onnx_data import elements
from lbc_cli.verifier.onnx_file import Graph, Model, Node, Tensor

_KEEPS_ZEROS = frozenset({"Identity", "Cast", "CastLike"})
_QUANTISES = frozenset({"QuantizeLinear", "DequantizeLinear"})
_FOLLOWED = _KEEPS_ZEROS | _QUANTISES | {"Transpose"}
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_STEPS = 64
_ZERO_POINTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the graph and what it is there for."""

    tensor: Tensor
    axes: tuple[int, ...] | None
    """Of a weight: which stored axes are its O, I, *K; None for any other constant."""
    groups: int = 1
    """Convolution groups; I counts the channels of one."""
    why: str = ""
    """Why it is no weight, "" if it is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[O, I, *K] of a weight, else as stored."""
        stored = self.tensor.shape
        return stored if self.axes is None else tuple(stored[axis] for axis in self.axes)


@dataclass(slots=True)
class _Uses:
    """What the graph does with one tensor."""

    products: set[tuple[tuple[int, ...], int]] = field(default_factory=set)
    """Axes and groups, one entry for each way in which it is multiplied by."""
    obstacles: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    """Operators that take it for something else."""


def aliases(model: Model, known: Iterable[Constant]) -> Iterator[Constant]:
    """Tensors under the further names that `Identity` gives them, as exporters do with parameters that layers share."""
    roles = {id(constant.tensor): constant for constant in known}
    for graph in model.graph.walk():
        for node in graph.nodes:
            if node.op == "Identity" and node.inputs and len(node.outputs) == 1:
                tensor = _source(graph, node.inputs[0], ("Identity",))[0]
                if tensor is not None:
                    role = roles[id(tensor)]
                    yield dataclasses.replace(role, tensor=dataclasses.replace(tensor, name=node.outputs[0]))


def constants(model: Model) -> Iterator[Constant]:
    """Every tensor of a model, in the order of the file, with its role."""
    uses: dict[int, _Uses] = {}
    graphs = list(model.graph.walk())
    for graph in graphs:
        for node in graph.nodes:
            for place, name in enumerate(node.inputs):
                _note(graph, node, place, name, model, uses)
    for graph in graphs:
        for tensor in graph.tensors.values():
            yield _role(tensor, uses.get(id(tensor), _Uses()))


def _role(tensor: Tensor, uses: _Uses) -> Constant:
    if tensor.unread:
        return Constant(tensor, None, why=tensor.unread)
    if len(uses.products) == 1 and not uses.obstacles:
        axes, groups = next(iter(uses.products))
        return Constant(tensor, axes, groups)
    if len(uses.products) > 1:
        return Constant(tensor, None, why="multiplied along different axes: its input channels are ambiguous")
    if uses.obstacles:
        return Constant(tensor, None, why=min(uses.obstacles))
    used = ", ".join(sorted(uses.others)[:3]) or "nothing"
    return Constant(tensor, None, why=f"used by {used}: not the weight of a Conv, Gemm or MatMul")


def _note(graph: Graph, node: Node, place: int, name: str, model: Model, uses: dict[int, _Uses]) -> None:
    """Note what a node does with the constant behind one of its inputs."""
    if place == 0 and node.op in _FOLLOWED:
        direct = graph.find(name)[1]
        if isinstance(direct, Tensor):
            uses.setdefault(id(direct), _Uses()).others.add(node.op)
        return
    tensor, moves, obstacle = _source(graph, name)
    if tensor is None:
        return
    found = uses.setdefault(id(tensor), _Uses())
    if node.op in model.functions or node.op not in _PRODUCTS or place > 1:
        inside = ", which the file defines itself" if node.op in model.functions else ""
        found.others.add(f"{node.op}{inside}")
        return
    outcome = obstacle or _two_constants(graph, node, place) or _orient(node, place, tensor, moves)
    if isinstance(outcome, str):
        found.obstacles.add(outcome)
    else:
        found.products.add(outcome)


def _two_constants(graph: Graph, node: Node, place: int) -> str:
    """Gemm and MatMul of two constants have no input channels; "" if the other factor is computed."""
    if node.op == "Conv" or len(node.inputs) < 2:
        return ""
    other = _source(graph, node.inputs[1 - place])[0]
    return "" if other is None else f"multiplied by another constant, {other.name}"


def _orient(node: Node, place: int, tensor: Tensor, moves: list[tuple[int, ...]]) -> tuple[tuple[int, ...], int] | str:
    """The axes that are O, I, *K and the groups, or why there are none."""
    axes = tuple(range(len(tensor.shape)))
    for move in reversed(moves):
        order = move or tuple(reversed(range(len(axes))))
        if sorted(order) != list(range(len(axes))):
            return f"transposed by {list(order)[:8]}, which does not fit its shape"
        axes = tuple(axes[axis] for axis in order)
    if node.op == "Conv":
        return _orient_conv(node, place, tensor, axes)
    if len(axes) != 2:
        return "one dimension" if len(axes) < 2 else "a batch of matrices, one for each item"
    transposed = any(node.numbers.get("transB" if place else "transA", ())) if node.op == "Gemm" else False
    return (axes if transposed == bool(place) else axes[::-1]), 1


def _orient_conv(node: Node, place: int, tensor: Tensor, axes: tuple[int, ...]) -> tuple[tuple[int, ...], int] | str:
    if place != 1:
        return "the image of a Conv"
    groups = (node.numbers.get("group") or (1,))[0]
    if len(axes) < 3 or groups < 1 or tensor.shape[axes[0]] % groups:
        return f"weight of a Conv, but {list(tensor.shape)} does not go into {groups} groups of channels"
    return axes, groups


def _source(
    graph: Graph, name: str, through: Collection[str] = _FOLLOWED
) -> tuple[Tensor | None, list[tuple[int, ...]], str]:
    """Follow a name back to a constant.

    Returns:
        The constant, if there is one; the transpositions on the way, last first, each () for a reversal of all axes;
        and what keeps the constant from being a weight, or "".
    """
    moves: list[tuple[int, ...]] = []
    obstacle = ""
    for _ in range(_STEPS):
        graph, found = graph.find(name)
        if isinstance(found, Tensor):
            return found, moves, obstacle
        if found is None or not found.inputs or found.op not in through:
            return None, moves, obstacle
        if found.op == "Transpose":
            moves.append(found.numbers.get("perm", ()))
        elif found.op in _QUANTISES:
            obstacle = obstacle or _zero_point(graph, found)
        name = found.inputs[0]
    return None, moves, obstacle


def _zero_point(graph: Graph, node: Node) -> str:
    """Why 0 may not stand for zero behind a quantisation, "" if it does."""
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    if not name:
        return ""
    found = graph.find(name)[1]
    if not isinstance(found, Tensor) or found.unread or np.prod(found.shape, dtype=float) > _ZERO_POINTS:
        return "quantised with a zero point that is not known"
    return "quantised with a zero point that is not 0" if any(block.any() for block in elements(found)) else ""
