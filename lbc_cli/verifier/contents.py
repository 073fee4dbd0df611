"""What an artefact holds, whatever its container: named dense tensors, read in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """A tensor as a model would receive it.

    Attributes:
        name: the parameter's, or the buffer's.
        dtype: safetensors' spelling.
        shape: [O, I, *K] for the weight of a linear or convolution layer, however the container stores it.
        chunks: gives its dense bytes from the start: little-endian, row-major in `shape`, in pieces of any size.
        weight: whether the container itself tells that it is the weight of a linear or convolution layer.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes]]
    weight: bool = False
