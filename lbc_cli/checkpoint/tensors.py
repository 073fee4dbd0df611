"""Between torch tensors and the bytes that a container stores."""

from __future__ import annotations

import torch
from torch import Tensor

from lbc_cli.checkpoint.container import TensorInfo
from lbc_cli.errors import UsageError

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


def describe(tensor: Tensor, name: str) -> TensorInfo:
    """Dtype and shape as a container states them.

    Raises:
        UsageError: if the tensor is not a plain dense one, or safetensors has no name for its dtype.
    """
    if tensor.dtype not in _NAMES:
        raise UsageError(f"tensor {name} is {tensor.dtype}: safetensors cannot store it; convert it first")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise UsageError(f"tensor {name} is {kind}: only plain dense tensors can be stored")
    return TensorInfo(_NAMES[tensor.dtype], tuple(tensor.shape))


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major whatever its strides; a view of its memory where that will do."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def from_bytes(data: bytearray, info: TensorInfo) -> Tensor:
    """A tensor over these bytes (they are not copied), on the CPU."""
    dtype = _TYPES[info.dtype]
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(info.shape)
