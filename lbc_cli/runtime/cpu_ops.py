"""N:M products on a CPU as an operator of torch: `torch.ops.lbc.nm_conv2d`, opaque to torch.compile and torch.export.

    nm_conv2d(x, values, index, bias, residual, weight, geometry, relu) -> out

    x          float32 [n, I, h, w], channels last (others are copied first); for a linear layer [1, I, 1, rows]
    values     packed values, float32 or bfloat16; index: packed positions, uint8; of `pack`
    bias       float32 [O] or None
    residual   float32, of the shape of the result, added before the activation; or None
    weight     the fields of a `Packing`
    geometry   stride (h, w), dilation (h, w), zeros around (top, left, bottom, right)
    relu       whether negative results become 0
    out        float32 [n, O, h', w'], channels last

Every result is summed in one fixed order: it does not depend on the number of threads or images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import byref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbc_cli.errors import PatternError, UsageError
from lbc_cli.runtime.native import library

FLOAT = torch.float32
_FAR = 2**31 - 1


class Packing(NamedTuple):
    """A packed weight's numbers, as in `kernels.h`."""

    out: int
    inputs: int
    kh: int
    kw: int
    n: int
    m: int
    vector: int
    """1: a mask per output channel; 16 or 32: that many share one."""
    chunk: int
    """Input channels that are worked on at once."""
    half: int
    """1: values are stored in bfloat16."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[O, I, kh, kw]."""
        return self.out, self.inputs, self.kh, self.kw


def plan(shape: Sequence[int], n: int, m: int, vector: int, *, stride: int = 1, half: bool = False) -> Packing:
    """How a weight is packed.

    Args:
        shape: [O, I, kh, kw].
        n: kept weights of a group.
        m: consecutive input channels of a group.
        vector: 1, 16 or 32 output channels that share their masks.
        stride: along the width: what lies under a tile of output pixels.
        half: store values in bfloat16.

    Raises:
        UsageError: for numbers without a kernel, or where no kernels are built.
    """
    out, inputs, kh, kw = shape
    weight = library.Weight(out, inputs, kh, kw, n, m, vector, 0, int(half))
    numbers = (out, inputs, kh, kw, n, m, vector, stride)
    possible = 0 < min(numbers) <= max(numbers) <= _FAR  # beyond 64 bits ctypes would cut them off
    if not possible or library.kernels().lbc_plan(byref(weight), stride):
        raise UsageError(f"no CPU kernel for {n}:{m} of {list(shape)} with {vector} output channels to a mask")
    return Packing(out, inputs, kh, kw, n, m, vector, int(weight.chunk), int(half))


def pack(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Values and index of a dense weight [O, I, kh, kw].

    Raises:
        PatternError: if a group holds more than N non-zeros.
        UsageError: for a weight of another shape than was planned, or one that values in bfloat16 would round.
    """
    native, (described, _, sizes) = library.kernels(), _described(*packing)
    if tuple(weight.shape) != packing.shape or (packing.half and weight.dtype != torch.bfloat16):
        planned = f"{list(packing.shape)}{' in bfloat16' if packing.half else ''}"
        raise UsageError(f"the weight is {weight.dtype} {list(weight.shape)}: {planned} was planned, pass that")
    dense = weight.detach().to("cpu", FLOAT).contiguous()
    values = torch.empty(sizes[0], dtype=torch.bfloat16 if packing.half else FLOAT)
    index = torch.empty(sizes[1], dtype=torch.uint8)
    fault = native.lbc_pack(byref(described), dense.data_ptr(), values.data_ptr(), index.data_ptr())
    if fault >= 0:
        place = [int(part) for part in torch.unravel_index(torch.tensor(fault), packing.shape)]
        shared = f", shared by {packing.vector} output channels" if packing.vector > 1 else ""
        raise PatternError(f"the weight does not hold {packing.n}:{packing.m}{shared}: one too many at {place}")
    return values, index


def unpack(values: Tensor, index: Tensor, packing: Packing) -> Tensor:
    """The dense weight, float32 [O, I, kh, kw]: bit for bit what was packed, but for -0.0 that found no room.

    Raises:
        ValueError: for values or an index that are not those of the packing.
    """
    native, (described, _, sizes) = library.kernels(), _described(*packing)
    _check_packed(values, index, packing, sizes)
    dense = torch.empty(packing.shape)
    native.lbc_unpack(byref(described), values.data_ptr(), index.data_ptr(), dense.data_ptr())
    return dense


@functools.lru_cache(maxsize=4096)
def _described(*numbers: int) -> tuple[library.Weight, Packing, tuple[int, int]]:
    """A packing for the kernels, and how many values and bytes of index it has.

    Raises:
        ValueError: for numbers that `plan` does not give.
    """
    native = library.kernels()
    if len(numbers) == len(Packing._fields) and 0 <= min(numbers) <= max(numbers) <= _FAR:
        weight = library.Weight(*numbers)
        sizes = int(native.lbc_values(byref(weight))), int(native.lbc_index_bytes(byref(weight)))
        if min(sizes) >= 0:
            return weight, Packing(*numbers), sizes
    raise ValueError(f"{list(numbers)} are not the numbers of a packed weight")


@functools.cache
def settings() -> tuple[Any, int, int | None]:
    """The function, the instruction set and the threads' entry: looked up once, as a call takes microseconds."""
    return library.kernels().lbc_run, library.chosen_isa(), library.fork()


def output_size(height: int, width: int, packing: Sequence[int], geometry: Sequence[int]) -> tuple[int, int]:
    """Height and width of the result.

    Raises:
        ValueError: for a geometry that is none.
    """
    steps, zeros = geometry[:4], geometry[4:]
    if len(geometry) != 8 or not (0 < min(steps) <= max(steps) <= _FAR and 0 <= min(zeros) <= max(zeros) <= _FAR):
        raise ValueError(
            f"the geometry is {list(geometry)}: four strides and dilations from 1 and four zeros from 0 are needed, "
            f"none above {_FAR}"
        )
    stride_h, stride_w, dilation_h, dilation_w, top, left, bottom, right = geometry
    return (
        (height + top + bottom - dilation_h * (packing[2] - 1) - 1) // stride_h + 1,
        (width + left + right - dilation_w * (packing[3] - 1) - 1) // stride_w + 1,
    )


def nm_conv2d(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: list[int],
    geometry: list[int],
    relu: bool,
) -> Tensor:
    """See the head of this module.

    Raises:
        UsageError: for an instruction set that LBC_CPU_ISA names and this processor has not.
        ValueError: for inputs that do not fit.
        RuntimeError: if a gradient is asked for.
        MemoryError: if there is none for the zeros around the images.
    """
    run, isa, fork = settings()
    described, packing, sizes = _described(*weight)
    _check(x, bias, residual, packing)
    _check_packed(values, index, packing, sizes)
    x = _channels_last(x)
    template, shape = shaped(packing, tuple(geometry), x.shape, x.stride())
    out = torch.empty(shape, dtype=FLOAT, memory_format=torch.channels_last)
    call = library.Call.from_buffer_copy(template)
    call.x, call.values, call.index, call.out = x.data_ptr(), values.data_ptr(), index.data_ptr(), out.data_ptr()
    if bias is not None:
        bias = bias.contiguous()
        call.bias = bias.data_ptr()
    if residual is not None:
        if residual.shape != out.shape or residual.dtype != FLOAT or not residual.is_cpu:
            found = f"{residual.dtype} {list(residual.shape)} on {residual.device}"
            raise ValueError(f"the residual is {found}, the result {FLOAT} {list(out.shape)} on a cpu")
        residual = _channels_last(residual)
        call.residual = residual.data_ptr()
        call.residual_image, _, call.residual_row, call.residual_pixel = residual.stride()
    call.relu, call.isa, call.threads, call.fork = relu, isa, torch.get_num_threads(), fork
    check_status(run(byref(described), byref(call)))
    return out


def check_status(failed: int) -> None:
    """Raise what the kernels say.

    Raises:
        MemoryError: if they found no memory.
        RuntimeError: if they have not the instruction set.
    """
    if failed == -2:
        raise MemoryError("no memory for the input of a CPU kernel")
    if failed:
        raise RuntimeError(f"the CPU kernel refused the call: {failed}")


@functools.lru_cache(maxsize=4096)
def shaped(
    packing: Packing, geometry: tuple[int, ...], shape: Sequence[int], strides: Sequence[int]
) -> tuple[library.Call, tuple[int, ...]]:
    """A call's numbers, all but pointers, for inputs of a shape and strides; and the shape of the result.

    Raises:
        ValueError: if the shape is none that the layer takes.
    """
    if len(shape) != 4 or shape[1] != packing.inputs:
        raise ValueError(f"the input is {list(shape)}: [n, {packing.inputs}, h, w] is needed")
    images, _, height, width = shape
    size = output_size(height, width, packing, geometry)
    if min(size) < (1 if height and width else 0):
        raise ValueError(f"images of {height} x {width} are smaller than the kernel {packing.kh} x {packing.kw}")
    image, _, row, pixel = strides
    rows, columns = size
    call = library.Call(images=images, in_h=height, in_w=width, out_h=rows, out_w=columns)
    call.x_image, call.x_row, call.x_pixel = image, row, pixel
    call.out_image, call.out_row, call.out_pixel = (step * packing.out for step in (rows * columns, columns, 1))
    call.stride_h, call.stride_w, call.dilation_h, call.dilation_w, call.pad_top, call.pad_left = geometry[:6]
    return call, (images, packing.out, rows, columns)


# Kernels read where the numbers say: nothing but these checks keeps them inside their tensors.
def _check(x: Tensor, bias: Tensor | None, residual: Tensor | None, packing: Packing) -> None:
    if x.dtype != FLOAT or x.dim() != 4 or not x.is_cpu:
        found, needed = f"{x.dtype} {list(x.shape)} on {x.device}", f"{FLOAT} [n, {packing.inputs}, h, w] on a cpu"
        raise ValueError(f"the input is {found}: {needed} is needed")
    if bias is not None and (bias.numel() != packing.out or bias.dtype != FLOAT or not bias.is_cpu):
        found, needed = f"{bias.dtype} {list(bias.shape)} on {bias.device}", f"{FLOAT} [{packing.out}] on a cpu"
        raise ValueError(f"the bias is {found}: {needed} is needed")
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        raise RuntimeError("N:M products on a CPU have no gradient: call them under torch.inference_mode()")


def _check_packed(values: Tensor, index: Tensor, packing: Packing, sizes: tuple[int, int]) -> None:
    kind = torch.bfloat16 if packing.half else FLOAT
    if (values.numel(), index.numel()) != sizes or values.dtype != kind or index.dtype != torch.uint8:
        raise ValueError(
            f"the packed weight has {values.numel()} values in {values.dtype} and {index.numel()} positions in "
            f"{index.dtype}: {sizes[0]} in {kind} and {sizes[1]} in torch.uint8 are needed"
        )
    if not (values.is_cpu and index.is_cpu and values.is_contiguous() and index.is_contiguous()):
        raise ValueError("the packed weight is not contiguous on a cpu: pass what `pack` gave")


def _channels_last(images: Tensor) -> Tensor:
    """Pixels whose channels lie side by side, in rows and images of any distance."""
    if images.stride(1) == 1 or images.shape[1] == 1:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: list[int],
    geometry: list[int],
    relu: bool,
) -> Tensor:
    size = output_size(x.shape[2], x.shape[3], weight, geometry)
    return x.new_empty((x.shape[0], weight[0], *size)).contiguous(memory_format=torch.channels_last)


_LIBRARY = torch.library.Library("lbc", "FRAGMENT")  # type: ignore[no-untyped-call]
# Not `custom_op`: its checks take longer than a small layer.
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "nm_conv2d(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? residual, int[] weight, int[] geometry, "
    "bool relu) -> Tensor"
)
_LIBRARY.impl("nm_conv2d", nm_conv2d, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("lbc::nm_conv2d", _fake, lib=_LIBRARY)
