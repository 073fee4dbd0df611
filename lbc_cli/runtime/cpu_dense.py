"""The dense layers of a model on a CPU: oneDNN with weights that it has put in order once, and a ReLU in the same pass.

Eager torch reorders the weight of a convolution at every call, and reads its result again for the ReLU. The operators
here are those that torch.compile uses for frozen models. Where they are missing, under torch.compile and torch.export
the layer runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in a dtype on this processor; not in bfloat16 on those that have AVX2 alone."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class PackedLayer(nn.Module):
    """A dense linear layer or convolution of the same call.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`; kept, and executed where packed weights cannot be.

    Attributes:
        relu: whether results below 0 become 0.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.relu = False
        self._packed: Tensor | None = None  # opaque: no buffer, never copied, made from the first input

    def forward(self, inputs: Tensor) -> Tensor:
        """As the dense layer, and the ReLU."""
        if type(inputs) is not Tensor or torch.compiler.is_compiling() or torch.is_grad_enabled():
            result: Tensor = self.layer(inputs)
            return functional.relu(result) if self.relu else result
        if isinstance(self.layer, nn.Conv2d):
            return self._convolve(self.layer, inputs)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.layer.weight, inputs[..., 0].numel())
        operator = torch.ops.mkldnn._linear_pointwise
        return _tensor(operator(inputs, self._packed, self.layer.bias, self._activation, [], ""))

    def _convolve(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        numbers = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if self._packed is None:
            opaque = conv.weight.to_mkldnn()
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            self._packed = reorder(opaque, *numbers, list(images.shape))
        operator = torch.ops.mkldnn._convolution_pointwise
        return _tensor(operator(images, self._packed, conv.bias, *numbers, self._activation, [], ""))

    @property
    def _activation(self) -> str:
        return "relu" if self.relu else "none"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def packed(layer: nn.Module) -> nn.Module:
    """A layer with packed weights, or the layer itself where oneDNN does not take it.

    Args:
        layer: in eval mode, on the CPU; subclasses of torch's own layers stay as they are.
    """
    if type(layer) not in (nn.Linear, nn.Conv2d) or not _operators():
        return layer
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = layer.weight
    if weight.device.type != "cpu" or not packs(weight.dtype) or not _takes(layer):
        return layer
    return PackedLayer(layer).eval()


def pack_dense_layers(model: nn.Module, names: list[str]) -> None:
    """Pack the dense layers of a model, in place.

    Args:
        model: in eval mode, on the CPU.
        names: of the modules that are called; a weight that only others read is left alone.
    """
    for name in names:
        module = model.get_submodule(name)
        better = packed(module)
        if better is not module:
            model.set_submodule(name, better)


def _takes(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _operators() -> bool:
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    reorders = hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    names = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
    return there and reorders and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
