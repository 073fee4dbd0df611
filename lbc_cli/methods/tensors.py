"""Small things that methods do with the tensors they hold: copies in a weight's own layout, and their size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def copy_like(weight: Tensor, values: Tensor) -> Tensor:
    """Values on the weight's device and, where they have its shape, in its memory format. Always a copy, never a leaf.

    A file keeps no memory format, and arithmetic on tensors of two formats is strided, and could round differently.

    Args:
        weight: [O, I, *K].
        values: any shape and dtype, which are kept.
    """
    if values.shape != weight.shape:
        return values.detach().to(weight.device, copy=True)
    return torch.empty_like(weight, dtype=values.dtype, requires_grad=False).copy_(values)


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the elements of all tensors that are there."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
