"""Models to prune, with weights of a choice."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbc_cli import models, weights
from lbc_cli.errors import UsageError

PRETRAINED, RANDOM = "pretrained", "random"


@dataclass(frozen=True, slots=True)
class Start:
    """A model, and where its weights come from.

    Attributes:
        model: on the CPU.
        arch: timm name, with its tag if one was given.
        origin: of the weights, for people: "pretrained", "random, seed 0", a file's name.
        kept: what the origin's checkpoint says that stays true: "pixels", "class_names".
        notes: what reading did to the weights.
        seconds: what making it took.
    """

    model: nn.Module
    arch: str
    origin: str
    kept: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def from_name(
    name: str,
    *,
    weights: str | os.PathLike[str] = PRETRAINED,
    seed: int = 0,
    key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Start:
    """A timm model with weights of a choice.

    Args:
        name: timm name.
        weights: "pretrained" (timm's own), "random", or a file.
        seed: of random weights; the global generator is left as it was.
        key: entry of a `torch.save` file that holds the weights.
        kwargs: further arguments of `timm.create_model`.

    Raises:
        ModelError: for an unknown model, or weights that cannot be had or do not fit.
        UsageError, CheckpointError: from reading the file.
    """
    began = time.perf_counter()
    models.check_name(name)
    if str(weights) not in (PRETRAINED, RANDOM):
        return from_weights(read(Path(weights), key), name, kwargs, began)
    if key is not None:
        raise UsageError(f"key {key!r} names an entry of a weight file: there is none with weights={str(weights)!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        instead = "name a file with --weights"
        model = models.create(name, pretrained=str(weights) == PRETRAINED, kwargs=kwargs, instead=instead)
    origin = f"timm's {name}" if str(weights) == PRETRAINED else f"random, seed {seed}"
    return Start(model, name, origin, seconds=time.perf_counter() - began)


def from_file(
    path: str | os.PathLike[str], *, key: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> Start:
    """The model that a file or folder names, with its weights.

    Raises:
        UsageError: if it names none, or is not there.
        CheckpointError: if it is damaged, or refused because reading it could run code.
    """
    began = time.perf_counter()
    found = read(Path(path), key)
    if found.arch is None:
        raise UsageError(
            f"{path} does not say which model it is: name the model, and give the file as its weights (--weights)"
        )
    return from_weights(found, None, kwargs, began)


def read(path: Path, key: str | None) -> weights.Weights:
    """Read a weight file or folder; see `weights.read`."""
    return weights.read(path, key=key)


def from_weights(found: weights.Weights, name: str | None, kwargs: Mapping[str, Any] | None, began: float) -> Start:
    """The model around weights that were read.

    Args:
        found: from `read`.
        name: timm name; None: the one that the file gives.
        kwargs: further arguments of `timm.create_model`.
        began: when reading them began, by `time.perf_counter`.

    Raises:
        ModelError: if the weights do not fit the model.
    """
    model = weights.create(found, name, kwargs=kwargs)
    record = models.created(model)
    assert record is not None
    kept = {key: found.metrics[key] for key in ("pixels", "class_names") if key in found.metrics}
    return Start(model, record.arch, found.path.name, kept, found.notes, time.perf_counter() - began)
