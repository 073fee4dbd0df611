"""The channel spaces of a model, found on its torch.fx graph.

The model is traced once and then run once, node by node, on a batch of two black images, so that every shape is known;
`rules` says what each node does to the dimensions of its tensors.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target

from lbc_cli.errors import ModelError
from lbc_cli.permute.rules import Call, Labelled, apply, labelled_in, unknown
from lbc_cli.permute.spaces import Places, fix

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Subclasses with a forward of their own that still multiply by the weight as it is stored.
_PLAIN_CONVOLUTIONS = frozenset({"Conv2dSame", "Conv2dSameExport"})
_ONE_TO_ONE = (
    *(nn.Identity, nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.CELU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Softplus, nn.Softsign),
    *(nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
    *(nn.LogSigmoid, nn.LogSoftmax, nn.Sigmoid, nn.Softmax, nn.Tanh),
)
_SPATIAL = (
    nn.Upsample,
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own and those that timm registers as opaque."""

    def __init__(self, opaque: tuple[type[nn.Module], ...], functions: tuple[Any, ...]) -> None:
        super().__init__(autowrap_functions=functions)
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        if isinstance(m, self._opaque):
            return True
        return type(m).__module__.startswith("torch.nn") and not isinstance(m, _CONTAINERS)


def find_places(model: nn.Module, images: Tensor) -> Places:
    """Where the channels of a model are, and which of them go together.

    Args:
        model: in eval mode; run once and left as it is.
        images: [B, C, H, W] as the model takes them, B > 1.

    Raises:
        ModelError: if torch.fx cannot trace the model, or it does not run on these images.
    """
    module = _traced(model)
    places = Places(model)
    walk = _Walk(module, places)
    try:
        with torch.no_grad():
            walk.run(images)
    except ModelError:
        raise
    except Exception as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise ModelError(
            f"channels cannot be permuted: the traced model does not run on {size}: {_cause(error)}"
        ) from error
    return places


def _traced(model: nn.Module) -> fx.GraphModule:
    from timm.models._features_fx import get_notrace_functions, get_notrace_modules

    tracer = _Tracer(tuple(get_notrace_modules()), tuple(get_notrace_functions()))
    parameters = list(inspect.signature(model.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    fixed = {p.name: p.default for p in parameters if p.kind in kinds and p.default is not inspect.Parameter.empty}
    try:
        graph = tracer.trace(model, concrete_args=fixed or None)
        return fx.GraphModule(model, graph)
    except Exception as error:  # tracing runs the model's own code on stand-ins: anything may come out
        raise ModelError(
            f"channels cannot be permuted: torch.fx cannot trace {type(model).__name__} ({_cause(error)}); "
            f"leave the permutation out"
        ) from error


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Walk(fx.Interpreter):
    """Runs a graph and labels the dimensions of everything that comes by."""

    def __init__(self, module: fx.GraphModule, places: Places) -> None:
        super().__init__(module)
        self._places = places
        self._labels: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, as the model computes it."""
        result = super().run_node(n)
        self._labels[n] = self._label(n, result)
        return result

    def _label(self, node: fx.Node, result: Any) -> Any:
        if node.op == "output":
            for operand in labelled_in(self._operands(node.args)):
                for dim in operand.dims:
                    fix(dim, "the model gives it out")
            return None
        if not isinstance(result, Tensor):
            return self._label_many(node, result)
        shape = tuple(result.shape)
        if node.op == "placeholder":
            return Labelled(shape, ("the image",) * len(shape))
        if node.op == "get_attr":
            return Labelled(shape, self._places.dims(result))
        if node.op == "call_module":
            call = self._module_call(node, shape)
        else:
            name = node.target if isinstance(node.target, str) else _name(node.target)
            call = Call(name, tuple(self._operands(node.args)), dict(self._operands(node.kwargs)), shape)
        taken = self._picked(node, call)
        return taken or Labelled(shape, apply(call))

    def _label_many(self, node: fx.Node, result: Any) -> Any:
        """A sequence of tensors: nothing is known of them. Shapes and numbers need no label."""
        if not isinstance(result, list | tuple) or not any(isinstance(entry, Tensor) for entry in result):
            return None
        name = node.target if isinstance(node.target, str) else _name(node.target)
        parts = []
        for entry in result:
            shape = tuple(entry.shape) if isinstance(entry, Tensor) else ()
            call = Call(name, tuple(self._operands(node.args)), dict(self._operands(node.kwargs)), shape)
            parts.append(Labelled(shape, unknown(call)))
        return parts

    def _picked(self, node: fx.Node, call: Call) -> Labelled | None:
        """One of a sequence of tensors."""
        if call.name == "getitem" and isinstance(call.args[0], list) and isinstance(call.args[1], int):
            found = call.args[0][call.args[1]]
            return found if isinstance(found, Labelled) else None
        return None

    def _operands(self, value: Argument) -> Any:
        """Arguments of a node, tensors as their labels and everything else as the values that they had."""

        def of(node: fx.Node) -> Any:
            label = self._labels.get(node)
            return self.env[node] if label is None else label

        return fx.node.map_arg(value, of)

    def _module_call(self, node: fx.Node, shape: tuple[int, ...]) -> Call:
        """A leaf module as the operator that it stands for."""
        module = self.fetch_attr(str(node.target))
        args = tuple(self._operands(node.args))
        name = _operator_of(module)
        if name is None or len(args) != 1 or node.kwargs:
            own = [self._labelled(tensor) for tensor in (*module.parameters(), *module.buffers())]
            return Call(type(module).__name__, (*args, *own), dict(self._operands(node.kwargs)), shape)
        return Call(name, (*args, *self._settings(name, module)), {}, shape)

    def _settings(self, name: str, module: Any) -> tuple[Any, ...]:
        """What the operator of a module takes besides its input, in the operator's order."""
        if name in ("linear", "prelu"):
            return tuple(map(self._labelled, (module.weight, getattr(module, "bias", None))))
        if name.startswith("conv"):
            fillers = (module.stride, module.padding, module.dilation, module.groups)
            return (self._labelled(module.weight), self._labelled(module.bias), *fillers)
        if name == "batch_norm":
            return tuple(map(self._labelled, (module.running_mean, module.running_var, module.weight, module.bias)))
        if name == "layer_norm":
            return (
                module.normalized_shape,
                self._labelled(module.weight),
                self._labelled(getattr(module, "bias", None)),
            )
        if name == "group_norm":
            return (module.num_groups, self._labelled(module.weight), self._labelled(module.bias))
        return ()

    def _labelled(self, tensor: Tensor | None) -> Labelled | None:
        return None if tensor is None else Labelled(tuple(tensor.shape), self._places.dims(tensor))


def _name(target: Target) -> str:
    return str(getattr(target, "__name__", target))


def _is_norm_act(module: nn.Module) -> bool:
    """Whether it is timm's batch norm with an activation that treats every element alike and has no parameters."""
    inside = list(module.children())
    return type(module).__name__ == "BatchNormAct2d" and all(_is_one_to_one(child) for child in inside)


def _is_one_to_one(module: nn.Module) -> bool:
    of_timm = type(module).__module__.startswith("timm.layers.activations")
    return isinstance(module, _ONE_TO_ONE) or (of_timm and not list(module.parameters()))


def _operator_of(module: nn.Module) -> str | None:
    """Name of the operator that a leaf module stands for, None if it is not known to stand for one."""
    kind = type(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or kind.__name__ in _PLAIN_CONVOLUTIONS
        return f"conv{module.weight.dim() - 2}d" if plain else None
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm) or _is_norm_act(module):
        return "batch_norm"
    if _is_one_to_one(module):
        return "relu"
    if kind in _SPATIAL:
        return "interpolate"
    simple: dict[type[nn.Module], str] = {
        nn.Linear: "linear",
        nn.LayerNorm: "layer_norm",
        nn.GroupNorm: "group_norm",
        nn.PReLU: "prelu",
        nn.Flatten: "flatten",
        nn.Unflatten: "unflatten",
    }
    return "layer_norm" if kind.__name__ == "RMSNorm" and kind.__module__.startswith("torch.nn") else simple.get(kind)
