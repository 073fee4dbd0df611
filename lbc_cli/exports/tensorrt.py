"""What TensorRT can make of the zeros in an ONNX graph. TensorRT itself is not run here.

Its sparse tactics want at most 2 non-zeros in every 4 consecutive input channels, at each kernel position, of an
ungrouped convolution or a matrix product with constant weights, in half precision or int8 (NVIDIA's developer guide,
"Sparsity"; https://github.com/NVIDIA/TensorRT/issues/2310 and others for groups and sizes). Whether they are then used
is TensorRT's choice: it times them against dense ones when it builds the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lbc_cli.patterns import Pattern, holds

FEW_CHANNELS = 256
"""Below, sparse tactics are seldom the faster ones."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether sparse tactics can serve one weight."""

    possible: bool
    why: str
    """Why not, or why it seldom pays; "" if nothing speaks against it."""


def fit(weight: Tensor, groups: int = 1) -> Fit:
    """Judge one weight by its values.

    Args:
        weight: [O, I, *K], I the input channels of one group.
        groups: of the convolution.
    """
    if groups != 1:
        return Fit(False, "grouped convolution: dense in TensorRT")
    if weight.shape[1] % 4:
        return Fit(False, "input channels not a multiple of 4: dense in TensorRT")
    if not holds(weight, Pattern(2, 4)):
        return Fit(False, "not 2:4: dense in TensorRT")
    few = weight.shape[1] < FEW_CHANNELS
    return Fit(True, f"fewer than {FEW_CHANNELS} input channels: seldom pays in TensorRT" if few else "")


def notes(fits: Sequence[Fit], file: str, shape: tuple[int, int, int], *, half: bool) -> tuple[str, ...]:
    """Sentences for the user.

    Args:
        fits: one for each sparse layer.
        file: name of the ONNX file.
        shape: (C, H, W) of an image.
        half: whether the graph is float16, else float32.
    """
    possible = [found for found in fits if found.possible]
    few = sum(bool(found.why) for found in possible)
    seldom = f", though in {few} of them they seldom pay (fewer than {FEW_CHANNELS} input channels)" if few else ""
    applies = f"TensorRT's sparse tactics can apply to {len(possible)} of {len(fits)} sparse layers"
    told = [f"{applies}{seldom}; TensorRT was not run"]
    if possible:
        told.append(command(file, shape, half=half))
        if not half:
            told.append("TensorRT 11 takes types from the graph and has no --fp16: export with --dtype float16 for it")
    return tuple(told)


def command(file: str, shape: tuple[int, int, int], *, half: bool) -> str:
    """The line that builds an engine; arguments as for `notes`."""
    size = "x".join(map(str, shape))
    shapes = " ".join(
        f"--{which}Shapes=images:{batch}x{size}" for which, batch in (("min", 1), ("opt", 8), ("max", 32))
    )
    return f"trtexec --onnx={file} --sparsity=enable {'--stronglyTyped' if half else '--fp16'} {shapes}"
