"""The rule itself: at most N positions in use in every group of M input channels, in any layout. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lbc_cli.verifier.bits import Bits, Census, shown
from lbc_cli.verifier.report import Finding, LayerReport


@dataclass(frozen=True, slots=True)
class Rule:
    """N:M over M consecutive input channels of V consecutive output channels."""

    n: int
    m: int
    v: int = 1

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f"/{self.v}" if self.v > 1 else "")

    def bits(self) -> int:
        """Bits of a position code."""
        return max(1, math.ceil(math.log2(self.m)))


@dataclass(slots=True)
class Tally:
    """What was counted over the groups of one tensor."""

    groups: int = 0
    under_filled: int = 0
    violations: int = 0
    first: str = ""
    """The first violation, for the message."""
    census: Census = field(default_factory=Census)

    def layer(self, name: str, shape: tuple[int, ...], rule: Rule) -> LayerReport:
        """The line of the report."""
        return LayerReport(name, shape, str(rule), self.census.density, self.groups, self.under_filled)


def place(rule: Rule, row: int, position: int, group: int, kernel: tuple[int, ...]) -> str:
    """A group as "(o=3, k=(1, 2), i=8..11)"; `row` counts vectors."""
    o = str(row) if rule.v == 1 else f"{row * rule.v}..{row * rule.v + rule.v - 1}"
    k = tuple(int(axis) for axis in np.unravel_index(position, kernel)) if kernel else ()
    return f"(o={o}, k={k}, i={group * rule.m}..{group * rule.m + rule.m - 1})"


def check_groups(
    nonzero: NDArray[np.bool_], bits: Bits, dtype: str, rule: Rule, first: int, kernel: tuple[int, ...], tally: Tally
) -> None:
    """Count the positions in use in the groups of some rows.

    Args:
        nonzero: bool [rows, I, prod(K)]; rows are whole vectors.
        bits: the elements, same shape, for the message.
        dtype: of the elements.
        rule: the pattern.
        first: number of the first vector.
        kernel: K.
        tally: updated in place.
    """
    rows, inputs, positions = nonzero.shape
    split = nonzero.reshape(rows // rule.v, rule.v, inputs // rule.m, rule.m, positions)
    used: NDArray[np.bool_] = split[:, 0] if rule.v == 1 else np.logical_or.reduce(split, axis=1)
    counts = np.zeros((len(used), inputs // rule.m, positions), np.uint8)
    for member in range(rule.m):
        counts += used[:, :, member]
    wrong = counts > rule.n
    tally.groups += counts.size
    tally.under_filled += int(np.count_nonzero(counts < rule.n))
    tally.violations += int(np.count_nonzero(wrong))
    if not tally.first and wrong.any():
        o, i, k = (int(axis) for axis in np.argwhere(wrong)[0])
        values = bits.reshape(split.shape)[o, :, i, :, k]
        listed = ", ".join(shown(row, dtype) for row in values[:4]) + (", ..." if rule.v > 4 else "")
        tally.first = (
            f"group {place(rule, first + o, k, i, kernel)} uses {int(counts[o, i, k])} positions, {listed}: "
            f"{rule} allows {rule.n} of {rule.m}"
        )


def value_findings(name: str, census: Census, *, sparse: bool) -> list[Finding]:
    """What is odd about the values of a tensor: NaN, infinities and, in sparse ones, -0.0."""
    found = []
    if census.nans:
        found.append(Finding("nan", name, f"{name} holds {census.nans} NaN", census.nans))
    if census.infinities:
        # A dense buffer may hold infinities on purpose, as attention masks do.
        message = f"{name} holds {census.infinities} infinities"
        found.append(Finding("infinity", name, message, census.infinities, "error" if sparse else "warning"))
    if sparse and census.negative_zeros:
        message = f"{name} holds {census.negative_zeros} times -0.0, which some sparse kernels do not take for zero"
        found.append(Finding("negative-zero", name, message, census.negative_zeros, "warning"))
    return found
