"""What reading a weight file gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lbc_cli.checkpoint.manifest import Manifest
from lbc_cli.patterns import Pattern

CHECKPOINT = "checkpoint"
DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Tensors of a model, and what their file says of it."""

    path: Path
    kind: str
    """"checkpoint" (ours), "semi-structured" (our export), "dense", or a layout: how sparse weights are encoded."""
    tensors: Mapping[str, Tensor]
    """Name -> dense tensor on the CPU, [O, I, *K] for weights, in the file's dtype; what is masked is +0.0."""
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    """What the file claims of its sparse tensors; not checked."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> bool mask of the kept weights, where the file has one; a kept weight may be zero."""
    arch: str | None = None
    """The timm name, where the file gives one."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `timm.create_model` that belong to it."""
    images: Mapping[str, Any] = field(default_factory=dict)
    """How images must be prepared, as timm's `pretrained_cfg` says it, where the file does."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What our checkpoint, or the one behind an export, says was measured and how."""
    manifest: Manifest | None = None
    """Of one of our checkpoints."""
    notes: tuple[str, ...] = ()
    """What was done to the tensors on the way, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Tensors after a layout was resolved; members as in `Weights`."""

    tensors: Mapping[str, Tensor]
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def without_negative_zeros(weight: Tensor, kept: Tensor) -> Tensor:
    """The weight with +0.0 wherever it is not kept; multiplying by a mask would leave -0.0 behind."""
    return weight.masked_fill(~kept, 0)
