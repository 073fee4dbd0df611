"""The ways to run a single layer densely on a CPU, beside the model's own (channels last, weights packed for oneDNN).

    eager                a linear layer as it is
    eager NCHW           a convolution as it is
    eager NHWC           the same, channels last
    linear               a 1 x 1 convolution of stride 1 as torch's product with rows of pixels
    packed linear        the same with weights packed for oneDNN
    onnxruntime          a graph of this layer alone, float32
    onnxruntime linear   the same, as a product with rows of pixels

Inputs are in each way's own layout: nothing is converted inside a call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lbc_cli.bench.notes import Notes, reason_of
from lbc_cli.bench.onnx_graphs import layer_graph, session_call, why_no_onnxruntime
from lbc_cli.bench.results import NCHW, NHWC, ONNXRUNTIME
from lbc_cli.runtime.cpu_dense import packed
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.matrix import geometry_of

Run = Callable[[], Tensor]
One = Callable[[nn.Module, Tensor], Run]
"""Prepares one call: a dense module and its input; gives what is timed."""


def dense_rivals(
    layer: Layer, inputs: Sequence[Tensor], notes: Notes, *, onnxruntime: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """Calls that run a layer on all of its inputs, by the name of the way.

    Args:
        layer: any; one that is not torch's own linear layer or convolution has no rivals.
        inputs: of each of its calls, channels last, in the dtype to compute in.
        notes: told what cannot run, and why.
        onnxruntime: whether to take it in.

    Returns:
        Calls whose results have any layout and, for rows of pixels, any shape of the same order of elements.
    """
    if not _is_plain(layer.module):
        return {}
    module = copy.deepcopy(layer.module).to(device=inputs[0].device, dtype=inputs[0].dtype).eval()
    found: dict[str, Callable[[], list[Tensor]]] = {}
    for name, prepare in _ways(module, onnxruntime and not why_no_onnxruntime(inputs[0].dtype)):
        try:
            runs = [prepare(module, value) for value in inputs]
            for run in runs:
                run()
            found[name] = partial(_run_all, runs)
        except RuntimeError as error:  # what libraries cannot do, they say only when asked
            notes.add(f"{name} is left out for some layers: {reason_of(error)}", layer.name)
    return found


def _run_all(runs: Sequence[Run]) -> list[Tensor]:
    return [run() for run in runs]


def _is_plain(module: nn.Module) -> bool:
    """Whether it is torch's own linear layer or 2-D convolution, padded with zeros by numbers."""
    if isinstance(module, nn.Conv2d):
        own = type(module).forward is nn.Conv2d.forward
        return own and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _ways(module: nn.Module, onnxruntime: bool) -> Iterator[tuple[str, One]]:
    if not isinstance(module, nn.Conv2d):
        yield "eager", partial
        if onnxruntime:
            yield ONNXRUNTIME, _graph_of_rows
        return
    yield NCHW, lambda module, value: partial(module, value.contiguous())
    yield NHWC, lambda module, value: partial(copy.deepcopy(module).to(memory_format=torch.channels_last), value)
    if onnxruntime:
        yield ONNXRUNTIME, _graph
    geometry = geometry_of(module)
    if geometry.pointwise and geometry.stride == (1, 1) and not any(geometry.padding) and module.groups == 1:
        yield "linear", lambda module, value: partial(_linear(module), _rows(module, value))
        yield "packed linear", lambda module, value: partial(packed(_linear(module)), _rows(module, value))
        if onnxruntime:
            yield f"{ONNXRUNTIME} linear", _graph_of_rows


def _rows(module: nn.Module, value: Tensor) -> Tensor:
    """[n, I]: the input's pixels or vectors, a view."""
    last = value.permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else value
    return last.reshape(-1, last.shape[-1])


def _linear(conv: nn.Module) -> nn.Linear:
    """A 1 x 1 convolution as a linear layer."""
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    found.weight = nn.Parameter(weight.detach().flatten(1).contiguous(), requires_grad=False)
    if isinstance(bias, Tensor):
        found.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return found.eval()


def _graph(module: nn.Module, images: Tensor) -> Run:
    plain = images.contiguous()
    shape = tuple(module(images).shape)
    graph = layer_graph(module, tuple(plain.shape), shape, rows=False)
    return session_call(graph, plain, shape, torch.get_num_threads())


def _graph_of_rows(module: nn.Module, value: Tensor) -> Run:
    rows = _rows(module, value).contiguous()
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = (len(rows), len(weight))
    graph = layer_graph(module, tuple(rows.shape), shape, rows=True)
    return session_call(graph, rows, shape, torch.get_num_threads())
