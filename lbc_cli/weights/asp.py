"""Checkpoints of models under apex ASP: the weights as they are, and a buffer with the mask of each.

    X.weight               as trained; ASP zeroes the masked weights after every optimizer step
    X.__weight_mma_mask    same shape: the mask; all ones before compute_sparse_masks()

The masks are taken out, so that the names fit the model. They are not applied: ASP's forward pass does not apply them
either, and weights that escaped them must show (some training loops update behind ASP's back). Zeros left by `w * mask`
may be -0.0. `X.__weight_mma_pruned_p`, copies of what was pruned, go as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lbc_cli.errors import CheckpointError
from lbc_cli.patterns import Pattern, check_mask, check_shape
from lbc_cli.weights.base import Decoded

MASK, PRUNED = "_mma_mask", "_mma_pruned_p"
PATTERN = Pattern(2, 4)


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any weight has a mask of ASP beside it."""
    return any(_weight_of(name, MASK) in tensors for name in tensors)


def decode(tensors: Mapping[str, Tensor]) -> Decoded:
    """Take the masks out.

    Raises:
        CheckpointError: if a mask has another shape than its weight.
    """
    patterns: dict[str, Pattern] = {}
    masks: dict[str, Tensor] = {}
    notes: list[str] = []
    helpers = {name for name in tensors if any(_weight_of(name, ending) in tensors for ending in (MASK, PRUNED))}
    for name in sorted(helpers):
        owner = _weight_of(name, MASK)
        if owner not in tensors:
            continue
        mask = tensors[name].to(torch.bool)
        if mask.shape != tensors[owner].shape:
            raise CheckpointError(f"{name} is {list(mask.shape)}, its weight {list(tensors[owner].shape)}")
        if not _is_24(mask):
            notes.append(f"{owner}: ASP's mask is not {PATTERN} along the input channels: no pattern")
        elif stray := int(((tensors[owner] != 0) & ~mask).sum()):
            patterns[owner] = PATTERN
            notes.append(f"{owner}: {stray} weights outside ASP's mask are not zero: the mask was not kept to")
        else:
            patterns[owner], masks[owner] = PATTERN, mask
    plain = {name: tensor for name, tensor in tensors.items() if name not in helpers}
    return Decoded(tensors=plain, patterns=patterns, masks=masks, notes=tuple(notes))


def _weight_of(name: str, ending: str) -> str:
    """The parameter that a buffer of ASP belongs to, "" if it is none: X.__weight_mma_mask -> X.weight."""
    layer, _, last = name.rpartition(".")
    if not last.startswith("__") or not last.endswith(ending):
        return ""
    parameter = last.removeprefix("__").removesuffix(ending)
    return f"{layer}.{parameter}" if layer else parameter


def _is_24(mask: Tensor) -> bool:
    try:
        check_shape(mask.shape, PATTERN)
        check_mask(mask, PATTERN)
    except ValueError:
        return False
    return True
