"""What every comparison of whole models needs: that outputs agree, what weights take, and a side from its times."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.bench.results import TOLERANCE, Side
from lbc_cli.errors import VerificationError
from lbc_cli.runtime.clock import Times


def difference_of(one: Tensor, other: Tensor) -> float:
    """The largest difference of two outputs, relative to the largest value of the first; NaN stays NaN."""
    expected, actual = one.double(), other.double()
    return float((actual - expected).abs().max() / expected.abs().max())


def check_agreement(where: str, outputs: Mapping[str, Tensor], dtype: torch.dtype) -> float | None:
    """Compare all outputs with one another.

    Args:
        where: begins the message.
        outputs: by what gave them; all computed in `dtype`.
        dtype: decides what rounding explains.

    Returns:
        The largest difference, relative to the largest value; None of a single output.

    Raises:
        VerificationError: naming the two that differ by more than rounding.
    """
    largest = None
    for (one, expected), (other, actual) in combinations(outputs.items(), 2):
        difference = difference_of(expected, actual)
        if not difference <= TOLERANCE[dtype]:
            raise VerificationError(
                f"{where}: {other} outputs differ from {one} ones by {difference:.2g} of the largest value: at most "
                f"{TOLERANCE[dtype]:g} is explained by {dtype}; nothing was timed"
            )
        largest = max(largest or 0.0, difference)
    return largest


def side_of(taken: Mapping[str, Times], batch: int, dtype: torch.dtype, *, weights: int, peak: int | None) -> Side:
    """A side of a comparison.

    Args:
        taken: the times of every way that it was run in.
        batch: images of a call.
        dtype: of weights and activations.
        weights: their bytes.
        peak: bytes of memory that a call takes, None where it is not known.
    """
    mode = min(taken, key=lambda name: taken[name].median)
    quartiles = taken[mode].quartiles
    return Side(
        mode=mode,
        quartiles=quartiles,
        images_per_second=batch / quartiles[1],
        peak_bytes=peak,
        weight_bytes=weights,
        modes={name: times.quartiles for name, times in taken.items()},
        dtype=str(dtype).removeprefix("torch."),
    )


def weight_bytes(model: nn.Module) -> int:
    """Memory of the weights as they are executed, compressed ones in their compressed form."""
    compressed: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in compressed)
        if not inside and hasattr(module, "stored_bytes"):
            compressed[name] = module
    parts = tuple(f"{name}." for name in compressed)
    plain: list[Tensor] = [value for name, value in model.named_parameters() if not name.startswith(parts)]
    plain += [module.bias for module in compressed.values() if module.bias is not None]
    return sum(value.nbytes for value in plain) + sum(int(module.stored_bytes()) for module in compressed.values())
