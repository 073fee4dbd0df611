"""Sums and ReLUs taken into the layers before them: one pass over the result instead of three.

The converted model is traced by torch.fx (timm's own list says which of its modules are to be left whole), and in its
graph

    layer -> ReLU                  becomes  layer with relu
    sparse layer -> sum            becomes  sparse layer with the other term as residual
    sparse layer -> sum -> ReLU    both

where nothing else reads what is replaced, where both terms of the sum have one shape and dtype, and where nothing is
computed between the layer and the sum: what a residual holds is then the same at both places. Nothing is removed as
dead: torch.fx takes an operation in place whose result nobody names for dead. It also takes `x += y` for `x = x + y`,
so that a model that relies on the difference is found by its result on the sample, and left unfused. Identities and
dropout, which do nothing in eval mode, go away. Sparse layers give the values of the unfused model, bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

from lbc_cli.runtime.cpu_dense import PackedLayer
from lbc_cli.runtime.cpu_layers import CpuLayer
from lbc_cli.runtime.segments import segment

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_IN_PLACE = (operator.iadd, "add_")
_RELUS = (functional.relu, torch.relu, torch.relu_, "relu", "relu_")
_NOTE = "_lbc_fusion"
_ATTRIBUTES = ("pretrained_cfg", "default_cfg", "num_classes", "num_features")


@dataclass(frozen=True, slots=True)
class Fusion:
    """What was fused.

    Attributes:
        relus: taken into a layer.
        sums: taken into a layer.
        segments: of sparse convolutions in one call.
        reason: why nothing could be fused, "" if the model was traced.
    """

    relus: int = 0
    sums: int = 0
    segments: int = 0
    reason: str = ""


class _Tracer(fx.Tracer):
    """Leaves sparse layers, and what timm cannot trace, whole."""

    def __init__(self) -> None:
        from timm.models import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._whole = (CpuLayer, PackedLayer, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return isinstance(m, self._whole) or bool(super().is_leaf_module(m, module_qualified_name))


def fuse(model: nn.Module, sample: Tensor) -> tuple[nn.Module, Fusion]:
    """Take sums and ReLUs into the sparse layers before them.

    Args:
        model: converted, in eval mode; it shares its layers with the result and is not to be used any more.
        sample: a batch as the model takes it, in its dtype.

    Returns:
        A model of the same call, and what was done; the model itself where it cannot be traced.
    """
    with torch.inference_mode():
        expected = model(sample)
        try:
            traced = fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
            ShapeProp(traced).propagate(sample)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            first = " ".join(str(error).split())[:200]
            return model, Fusion(reason=f"torch.fx cannot trace {type(model).__name__}: {first}")
        done = _rewrite(traced)
        if not _same(traced(sample), expected):
            for layer in model.modules():
                if isinstance(layer, CpuLayer | PackedLayer):
                    layer.relu = False
            return model, Fusion(reason=f"torch.fx traces {type(model).__name__} to a graph that gives other results")
    for name in _ATTRIBUTES:
        if hasattr(model, name):
            setattr(traced, name, getattr(model, name))
    return traced.eval(), done


def _rewrite(traced: fx.GraphModule) -> Fusion:
    _drop_identities(traced)
    sums = sum([_fuse_sum(traced, node) for node in _layers(traced, (CpuLayer,))])
    relus = sum([_fuse_relu(traced, node) for node in _layers(traced, (CpuLayer, PackedLayer))])
    segments = segment(traced)
    traced.graph.lint()
    traced.recompile()
    return Fusion(relus, sums, segments)


def _same(found: Any, expected: Any) -> bool:
    """Whether two results agree to rounding: dense layers may sum in another order once they are packed."""
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    limit = _TOLERANCE[expected.dtype] * float(expected.abs().max())
    return found.shape == expected.shape and bool((found - expected).abs().max() <= limit)


def note_fusion(model: nn.Module, done: Fusion) -> None:
    """Remember with a model what was fused in it."""
    setattr(model, _NOTE, done)


def fusion(model: nn.Module) -> Fusion | None:
    """What was fused in a model that executes CPU kernels; None for other models."""
    found: Fusion | None = getattr(model, _NOTE, None)
    return found


def _drop_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        module = _module(traced, node)
        if isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _layers(traced: fx.GraphModule, kinds: tuple[type[nn.Module], ...]) -> Iterator[fx.Node]:
    """The layers that are called once: what is fused into a layer holds for all of its calls."""
    nodes = [node for node in traced.graph.nodes if isinstance(_module(traced, node), kinds)]
    targets = [node.target for node in nodes]
    return (node for node in nodes if targets.count(node.target) == 1)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _fuse_sum(traced: fx.GraphModule, layer: fx.Node) -> bool:
    """Turn layer -> sum into the layer with a residual."""
    sum_node = _only_user(layer)
    if sum_node is None or sum_node.target not in _SUMS or sum_node is not layer.next:
        return False
    terms = sum_node.args
    if sum_node.kwargs or len(terms) != 2 or not all(isinstance(term, fx.Node) for term in terms):
        return False
    other = terms[0] if terms[1] is layer else terms[1]
    if other is layer or not isinstance(other, fx.Node) or _kind(other) != _kind(layer):
        return False
    if sum_node.target in _IN_PLACE and other is terms[0] and not _is_free(traced, other):
        return False
    layer.args = (layer.args[0], other)
    sum_node.replace_all_uses_with(layer)
    traced.graph.erase_node(sum_node)
    return True


def _is_free(traced: fx.GraphModule, term: fx.Node) -> bool:
    """Whether nobody would notice that a sum no longer writes into this term: a layer's own result, read once."""
    return isinstance(_module(traced, term), CpuLayer | PackedLayer) and len(term.users) == 1


def _fuse_relu(traced: fx.GraphModule, layer: fx.Node) -> bool:
    """Turn layer -> ReLU into the layer with relu."""
    user = _only_user(layer)
    if user is None:
        return False
    module = _module(traced, user)
    if not isinstance(module, nn.ReLU) and (user.op == "call_module" or user.target not in _RELUS):
        return False
    fused = _module(traced, layer)
    assert isinstance(fused, CpuLayer | PackedLayer)
    fused.relu = True
    user.replace_all_uses_with(layer)
    traced.graph.erase_node(user)
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _kind(node: fx.Node) -> tuple[Any, Any] | None:
    """Shape and dtype of what a node gives."""
    seen = node.meta.get("tensor_meta")
    return None if seen is None or not hasattr(seen, "shape") else (tuple(seen.shape), seen.dtype)
