"""The gathered dense product on tensor cores: one Triton kernel for linear layers and convolutions, in both layouts.

A program computes BLOCK_P output pixels x BLOCK_V output channels of one tile. For every BLOCK_K kept columns it reads
their taps, reads the pixels there (`vector_layout` says where), and multiplies by the tile's weights on the tensor
cores, in float32. Programs of the same pixels run one after the other, so that pixels are read from L2 by all but the
first. In channels-first buffers RUN neighbouring pixels of a column are one aligned vector: the compiler is told so,
and can copy them into shared memory asynchronously. In channels-last buffers every element is a load of its own.

It is an operator of its own for torch, opaque to torch.compile. The first call for a new kind of problem measures the
configurations: do it before capturing a CUDA graph. Under Triton's interpreter it runs on the CPU, in float16 and
float32 (the interpreter multiplies bfloat16 as integers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbc_cli.errors import UsageError
from lbc_cli.runtime.vector_layout import TILE, Walk

MAX_PIXELS = 2**31 - 512
"""Pixels are counted in 32 bits, up to the end of the last block."""


def _config(pixels: int, vector: int, columns: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_P": pixels, "BLOCK_V": vector, "BLOCK_K": columns}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# Reading taps before pixels takes two stages of the pipeline: 5 stages keep two to three blocks in flight, 7 one more.
CONFIGS = [
    _config(64, 64, 32, 4, 7),
    _config(32, 64, 64, 4, 5),
    _config(64, 64, 64, 4, 7),
    _config(128, 64, 32, 4, 7),
    _config(128, 64, 64, 4, 5),
    _config(256, 64, 64, 8, 5),
    _config(64, 128, 64, 4, 5),
    _config(128, 128, 64, 8, 5),
    _config(128, 128, 64, 8, 7),
    _config(256, 128, 64, 8, 5),
]


def fitting(configs: list[triton.Config], named: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """The configurations worth measuring for a problem: the first fits all, no other may be mostly empty.

    Args:
        configs: to choose from.
        named: the kernel's positional arguments by name.
        constants: its keyword arguments.
    """
    known = {**named, **constants}
    pixels, kept = max(64, 2 * known["pixels"]), max(32, 2 * known["kept"])
    # Without tensor cores every product is an instruction of its own: large blocks spill and compile for minutes.
    area = 64 * 128 if known["PRECISION"] == "ieee" else math.inf

    def fits(blocks: dict[str, int]) -> bool:
        p, v, k = blocks["BLOCK_P"], blocks["BLOCK_V"], blocks["BLOCK_K"]
        return known["V"] % v == 0 and p <= pixels and k <= kept and p * v <= area

    return [config for config in configs if fits(config.kwargs)]


# Integers are annotated as tensors on purpose: Triton would take `int` for 32 bits, whatever their value. The
# interpreter can time nothing: it takes the one configuration that fits all.
@triton.autotune(  # type: ignore[untyped-decorator]
    configs=CONFIGS[:1] if triton.knobs.runtime.interpret else CONFIGS,
    key=["channels", "kept", "magnitude", "V", "HAS_ROWS", "RUN", "PRECISION"],
    prune_configs_by={"early_config_prune": fitting},
)
@triton.jit(do_not_specialize=["magnitude"])  # type: ignore[untyped-decorator]
def gathered_kernel(
    buffer: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    output: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    kept: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    pitch: tl.tensor,
    image_step: tl.tensor,
    row_step: tl.tensor,
    pixel_step: tl.tensor,
    tap_step: tl.tensor,
    column_step: tl.tensor,
    magnitude: tl.tensor,
    V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """See `Walk` for the geometry; `pixels` are those computed, `magnitude` their order, for the tuner."""
    program = tl.program_id(0)
    blocks = channels // BLOCK_V
    first = program % blocks * BLOCK_V
    tile = first // V
    place = program // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    # Pixels beyond the end start over: they are read like any other, without a mask, and not stored.
    pixel = place % pixels
    image, y, x = pixel // (height * pitch), pixel // pitch % height, pixel % pitch
    start = image.to(tl.int64) * image_step + y.to(tl.int64) * row_step + x.to(tl.int64) * pixel_step
    if RUN > 1:
        start = tl.max_contiguous(tl.multiple_of(start, RUN), RUN)
    channel = first + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_P, BLOCK_V), dtype=tl.float32)
    for begin in range(0, kept, BLOCK_K):
        slot = begin + tl.arange(0, BLOCK_K)
        inside = slot < kept
        slot = tile * kept + slot
        step = tl.load(columns + slot, mask=inside, other=0).to(tl.int64) * column_step
        if HAS_ROWS:
            step += tl.load(rows + slot, mask=inside, other=0).to(tl.int64) * tap_step
        if RUN > 1:
            step = tl.multiple_of(step, RUN)
        # Past the last kept column the first input channel is read and multiplied by zero.
        gathered = tl.load(buffer + (start[:, None] + step[None, :]))
        kernel = tl.load(weights + (slot[:, None] * V + (channel - tile * V)[None, :]), mask=inside[:, None], other=0.0)
        total = tl.dot(gathered, kernel, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + channel)[None, :].to(tl.float32)
    row = ((image * height + y) * width + x).to(tl.int64)
    stored = (place < pixels) & (x < width)
    result = total.to(output.dtype.element_ty)
    tl.store(output + (row[:, None] * channels + channel[None, :]), result, mask=stored[:, None])


@torch.library.custom_op(
    "lbc::gathered_product",
    mutates_args=(),
    schema="(Tensor buffer, Tensor weights, Tensor? bias, Tensor rows, Tensor columns, SymInt[] walk) -> Tensor",
)
def _operator(
    buffer: Tensor, weights: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, walk: Sequence[int]
) -> Tensor:
    path = Walk(*walk)
    _check(path, weights)
    output = weights.new_empty(path.pixels, weights.shape[0] * weights.shape[2])
    if output.numel():
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(buffer):  # type: ignore[no-untyped-call]
            _launch((buffer, weights, weights if bias is None else bias, rows, columns, output), path, bias is not None)
    return output


@_operator.register_fake
def _(
    buffer: Tensor, weights: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, walk: Sequence[int]
) -> Tensor:
    return weights.new_empty(Walk(*walk).pixels, weights.shape[0] * weights.shape[2])


def gathered_product(
    buffer: Tensor, weights: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, walk: Sequence[int]
) -> Tensor:
    """The Triton kernel as a `Product`: float16, bfloat16 or float32, V a multiple of TILE.

    Raises:
        UsageError: for another V, or more pixels than 32 bits count.
    """
    output: Tensor = torch.ops.lbc.gathered_product(buffer, weights, bias, rows, columns, walk)
    return output


def _check(walk: Walk, weights: Tensor) -> None:
    if weights.shape[2] % TILE:
        raise UsageError(f"vector length {weights.shape[2]}: the vector kernel takes multiples of {TILE}")
    if walk.computed > MAX_PIXELS:
        raise UsageError(f"{walk.computed} output pixels at once: the vector kernel takes {MAX_PIXELS} at the most")


def _launch(tensors: tuple[Tensor, ...], walk: Walk, has_bias: bool) -> None:
    weights = tensors[1]
    tiles, kept, vector = weights.shape
    channels, pixels = tiles * vector, walk.computed

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(pixels, meta["BLOCK_P"]) * (channels // meta["BLOCK_V"]),)

    gathered_kernel[grid](
        *tensors,
        pixels,
        channels,
        kept,
        *walk[1:-1],
        pixels.bit_length(),
        V=vector,
        HAS_BIAS=has_bias,
        HAS_ROWS=walk.tap_step != 0,
        RUN=walk.run,
        PRECISION=_precision(weights.dtype),
    )


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch was told to. 16-bit types have no choice."""
    return "ieee" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"
