"""From a dense model with N:M weights to one whose layers execute them; what cannot is kept dense, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lbc_cli.errors import TargetError, did_you_mean
from lbc_cli.runtime.executors import DENSE, Executor
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.trace import Shape


@dataclass(frozen=True, slots=True)
class Executed:
    """How a layer of a converted model is executed."""

    name: str
    shape: Shape
    variant: str
    """Dense, or the way by name: "cusparselt", "cutlass:im2col"."""
    reason: str
    """Why it is dense, "" if it is sparse."""


def convert(
    model: nn.Module,
    layers: Sequence[Layer],
    executors: Sequence[Executor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    choices: Mapping[str, str] | None = None,
) -> tuple[nn.Module, list[Executed]]:
    """A copy of a model that executes its sparse weights.

    Args:
        model: dense, in eval mode; it is not changed.
        layers: its layers, from `find_layers`.
        executors: a layer without a choice of its own takes the first that can run it.
        dtype: of weights and activations.
        device: where it goes.
        choices: layer name -> "dense" or a variant of one of the executors, as measured.

    Returns:
        The model, channels last, and how each of its layers is executed.

    Raises:
        TargetError: if a choice names no layer, or what its layer cannot do.
    """
    _check_choices(choices or {}, layers)
    converted = copy.deepcopy(model).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
    report = []
    for layer in layers:
        ways, reason = ways_of(layer, executors)
        variant = choose(layer, ways, (choices or {}).get(layer.name))
        if variant != DENSE:
            converted.set_submodule(layer.name, ways[variant].build(layer, variant, dtype=dtype, device=device))
        elif ways:
            reason = "measured: dense is faster"
        report.append(Executed(layer.name, layer.shape, variant, "" if variant != DENSE else reason))
    return converted.eval(), report


def ways_of(layer: Layer, executors: Sequence[Executor]) -> tuple[dict[str, Executor], str]:
    """The variants that a layer can run as, the preferred one first, and why there are none ("" if there are)."""
    if layer.reason:
        return {}, layer.reason
    obstacles = [executor.obstacle(layer) for executor in executors]
    ways = {
        variant: executor
        for executor, obstacle in zip(executors, obstacles, strict=True)
        if not obstacle
        for variant in executor.variants(layer)
    }
    return ways, "" if ways else "; ".join(dict.fromkeys(obstacles))


def choose(layer: Layer, ways: Mapping[str, Executor], choice: str | None) -> str:
    """The variant to take: the choice, else the preferred one, else dense.

    Raises:
        TargetError: if the choice is none that the layer has.
    """
    if choice is not None and choice not in (DENSE, *ways):
        raise TargetError(f"{layer.name} cannot run as {choice!r}: it has {', '.join([DENSE, *ways])}")
    return choice or next(iter(ways), DENSE)


def _check_choices(choices: Mapping[str, str], layers: Sequence[Layer]) -> None:
    names = [layer.name for layer in layers]
    for name in choices:
        if name not in names:
            raise TargetError(
                f"a choice is given for {name!r}: the model has no such layer.{did_you_mean(name, names)}"
            )
