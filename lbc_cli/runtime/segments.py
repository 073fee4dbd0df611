"""Sparse convolutions that follow one another, as one call of the kernels.

Between two layers Python takes as long as a small layer does, and a fresh tensor for every result keeps each out of the
cache that the last one warmed. A segment is a piece of the graph that consists of sparse convolutions alone: their
results live in one arena, where a result takes the place of those that nothing reads any more, and the kernels run
through all of them in one call. Results are those of the single layers, bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from ctypes import Array
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lbc_cli.runtime import cpu_ops
from lbc_cli.runtime.cpu_layers import CpuConv2d
from lbc_cli.runtime.native import library

_LINE = 16  # floats of a cache line: results begin at its start
_SHAPES = 32  # kinds of input whose numbers are remembered
Shape = tuple[int, ...]


class Step(NamedTuple):
    """One layer of a segment. Values are numbered: the inputs first, then the result of every step."""

    source: int
    residual: int | None


class Numbers(NamedTuple):
    """A segment for inputs of one shape: everything but pointers."""

    weights: Array[library.Weight]
    calls: Array[library.Call]
    shapes: list[Shape]
    """Of every step's result."""
    offsets: list[int | None]
    """Of every step's result in the arena, in floats; None: it leaves the segment and has its own memory."""
    floats: int
    """Size of the arena."""


class Segment(nn.Module):
    """Sparse convolutions in a fixed order.

    Args:
        layers: float32, each called once.
        steps: what each reads.
        inputs: number of tensors that come from outside.
        outputs: values that leave the segment.
    """

    def __init__(self, layers: Sequence[CpuConv2d], steps: Sequence[Step], inputs: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.steps, self.inputs, self.outputs = list(steps), inputs, list(outputs)
        self._numbers: dict[Any, Numbers] = {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[n, c, h, w] each, to [n, c, h, w] each; one tensor where one leaves the segment."""
        plain = all(type(value) is Tensor and value.stride(1) == 1 for value in inputs)
        found = self._at_once(inputs) if plain and not torch.compiler.is_compiling() else self._one_by_one(inputs)
        return found[0] if len(found) == 1 else tuple(found)

    def _one_by_one(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = list(inputs)
        for layer, step in zip(self.layers, self.steps, strict=True):
            values.append(layer(values[step.source], None if step.residual is None else values[step.residual]))
        return [values[number] for number in self.outputs]

    def _at_once(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        layers: list[CpuConv2d] = list(self.layers)  # type: ignore[arg-type]
        for step, layer in zip(self.steps, layers, strict=True):
            if step.source < self.inputs:
                layer.check(inputs[step.source])
        numbers = self._numbers_for(layers, inputs)
        arena = torch.empty(numbers.floats + _LINE)
        begin = arena.data_ptr() + -arena.data_ptr() % (4 * _LINE)
        places = [value.data_ptr() for value in inputs]
        results: dict[int, Tensor] = {}
        for offset, shape in zip(numbers.offsets, numbers.shapes, strict=True):
            if offset is None:
                out = torch.empty(shape, memory_format=torch.channels_last)
                results[len(places)] = out
            places.append(out.data_ptr() if offset is None else begin + 4 * offset)
        calls = type(numbers.calls).from_buffer_copy(numbers.calls)
        _, isa, fork = cpu_ops.settings()
        threads = torch.get_num_threads()
        for number, (layer, step, call) in enumerate(zip(layers, self.steps, calls, strict=True)):
            call.x, call.out = places[step.source], places[self.inputs + number]
            call.values, call.index = layer.values.data_ptr(), layer.index.data_ptr()
            call.bias = None if layer.bias is None else layer.bias.data_ptr()
            call.residual = None if step.residual is None else places[step.residual]
            call.isa, call.threads, call.fork = isa, threads, fork
        cpu_ops.check_status(library.kernels().lbc_run_all(len(calls), numbers.weights, calls))
        return [results[number] for number in self.outputs]

    def _numbers_for(self, layers: Sequence[CpuConv2d], inputs: Sequence[Tensor]) -> Numbers:
        key = tuple((value.shape, value.stride()) for value in inputs)
        if key not in self._numbers:
            if len(self._numbers) >= _SHAPES:
                self._numbers.clear()
            self._numbers[key] = describe(layers, self.steps, inputs, self.outputs)
        return self._numbers[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_numbers": {}}


def describe(
    layers: Sequence[CpuConv2d], steps: Sequence[Step], inputs: Sequence[Tensor], outputs: Sequence[int]
) -> Numbers:
    """The numbers of a segment for inputs of these shapes and strides.

    Raises:
        ValueError: if shapes do not fit.
    """
    shapes: list[Shape] = [tuple(value.shape) for value in inputs]
    strides: list[Shape] = [value.stride() for value in inputs]
    calls = (library.Call * len(steps))()
    for number, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        walk = tuple(layer.walk(shapes[step.source]))
        template, shape = cpu_ops.shaped(layer.packing, walk, shapes[step.source], strides[step.source])
        calls[number] = template
        calls[number].relu = layer.relu
        if step.residual is not None:
            if shapes[step.residual] != shape:
                raise ValueError(f"the residual is {list(shapes[step.residual])}, the result {list(shape)}")
            image, _, row, pixel = strides[step.residual]
            calls[number].residual_image, calls[number].residual_row, calls[number].residual_pixel = image, row, pixel
        shapes.append(shape)
        strides.append((template.out_image, 1, template.out_row, template.out_pixel))
    weights = (library.Weight * len(steps))(*(library.Weight(*layer.packing) for layer in layers))
    offsets, floats = place(shapes[len(inputs) :], steps, len(inputs), outputs)
    return Numbers(weights, calls, shapes[len(inputs) :], offsets, floats)


def place(
    shapes: Sequence[Shape], steps: Sequence[Step], inputs: int, outputs: Sequence[int]
) -> tuple[list[int | None], int]:
    """Where every step's result lies in the arena: at the first gap that no living result needs.

    Args:
        shapes: of every step's result.
        steps: what each reads.
        inputs: number of values before the steps' results.
        outputs: values that leave the segment.

    Returns:
        Offsets in floats, None for what leaves the segment; and the size of the arena.
    """
    last = {number: at for at, step in enumerate(steps) for number in step if number is not None}
    living: list[tuple[int, int, int]] = []  # begin, end, the step of its last reader
    offsets: list[int | None] = []
    size = 0
    for at, shape in enumerate(shapes):
        number = inputs + at
        if number in outputs:
            offsets.append(None)
            continue
        living = sorted(block for block in living if block[2] >= at)
        needed = -(-torch.Size(shape).numel() // _LINE) * _LINE
        begin = 0
        for first, end, _ in living:
            if first - begin >= needed:
                break
            begin = max(begin, end)
        living.append((begin, begin + needed, last.get(number, at)))
        offsets.append(begin)
        size = max(size, begin + needed)
    return offsets, size


def segment(traced: fx.GraphModule) -> int:
    """Put segments in the place of sparse convolutions that follow one another, in place.

    Returns:
        How many there are.
    """
    found = [run for run in _runs(traced) if len(run) > 1]
    for number, run in enumerate(found):
        _replace(traced, run, f"segment{number}")
    return len(found)


def _runs(traced: fx.GraphModule) -> Iterator[list[fx.Node]]:
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    run: list[fx.Node] = []
    for node in traced.graph.nodes:
        layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        fits = isinstance(layer, CpuConv2d) and layer.dtype == torch.float32 and targets.count(node.target) == 1
        if fits and not node.kwargs:
            run.append(node)
            continue
        yield run
        run = []
    yield run


def _replace(traced: fx.GraphModule, run: Sequence[fx.Node], name: str) -> None:
    inside = set(run)
    read = dict.fromkeys(arg for node in run for arg in node.args if isinstance(arg, fx.Node))
    inputs = [node for node in read if node not in inside]
    numbers = {node: at for at, node in enumerate([*inputs, *run])}
    steps = [_step(node, numbers) for node in run]
    leaving = [node for node in run if set(node.users) - inside]
    layers = [traced.get_submodule(str(node.target)) for node in run]
    piece = Segment(layers, steps, len(inputs), [numbers[node] for node in leaving])  # type: ignore[arg-type]
    traced.add_submodule(name, piece.eval())
    with traced.graph.inserting_before(run[0]):
        whole = traced.graph.call_module(name, tuple(inputs))
        parts = [traced.graph.call_function(operator.getitem, (whole, at)) for at in range(len(leaving))]
    for node, part in zip(leaving, parts, strict=True):
        node.replace_all_uses_with(whole if len(leaving) == 1 else part)
    for node in reversed(run):
        traced.graph.erase_node(node)
    for part in [node for node in parts if not node.users]:
        traced.graph.erase_node(part)
    traced.delete_all_unused_submodules()


def _step(node: fx.Node, numbers: dict[fx.Node, int]) -> Step:
    source, *rest = node.args
    assert isinstance(source, fx.Node)
    residual = rest[0] if rest else None
    return Step(numbers[source], numbers[residual] if isinstance(residual, fx.Node) else None)
