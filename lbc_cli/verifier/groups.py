"""The rule itself: at most N positions in use in every group of M input channels, in any layout. numpy only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lbc_cli.verifier.bits import Bits, Census, shown
from lbc_cli.verifier.report import GROUPS_SHOWN, Finding, LayerReport, Report, Violation


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
    first: list[Violation] = field(default_factory=list)
    """The first violations, `GROUPS_SHOWN` at the most."""
    census: Census = field(default_factory=Census)


def settle(name: str, shape: tuple[int, ...], rule: Rule, tally: Tally, report: Report) -> None:
    """Report a tensor whose groups were all counted: its line, its violations, its odd values.

    Args:
        name: the tensor's.
        shape: [O, I, *K].
        rule: what its groups were checked against.
        tally: what was counted.
        report: updated in place.
    """
    report.layers.append(LayerReport(name, shape, str(rule), tally.census.density, tally.groups, tally.under_filled))
    add_violations(name, rule, tally, report)
    report.findings += value_findings(name, tally.census, sparse=True)


def add_violations(name: str, rule: Rule, tally: Tally, report: Report) -> None:
    """Report the groups of a tensor that break a rule, if any do."""
    if tally.violations:
        message = (
            f"{name}: {tally.first[0]}: {rule} allows {rule.n} of {rule.m}; {tally.violations} of {tally.groups} "
            f"groups violate it"
        )
        report.add(Finding("pattern", name, message, tally.violations, groups=tuple(tally.first)))


def violation(
    rule: Rule, row: int, position: int, group: int, kernel: tuple[int, ...], inputs: int, used: int
) -> Violation:
    """Name a group by numbers.

    Args:
        rule: N:M/V.
        row: number of the vector: of the output channel where V is 1.
        position: index into the flattened K.
        group: number along the input channels.
        kernel: K.
        inputs: I.
        used: positions in use.
    """
    k = tuple(int(axis) for axis in np.unravel_index(position, kernel)) if kernel else ()
    number = (row * math.prod(kernel) + position) * (inputs // rule.m) + group
    outputs = (row * rule.v, row * rule.v + rule.v - 1)
    return Violation(number, outputs, k, (group * rule.m, group * rule.m + rule.m - 1), used)


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
    counts = count_used(used)
    wrong = counts > rule.n
    tally.groups += counts.size
    tally.under_filled += int(np.count_nonzero(counts < rule.n))
    tally.violations += int(np.count_nonzero(wrong))
    if len(tally.first) < GROUPS_SHOWN and wrong.any():
        values = bits.reshape(split.shape)
        for o, k, i in np.argwhere(wrong.swapaxes(1, 2))[: GROUPS_SHOWN - len(tally.first)].tolist():
            rows_shown = tuple(shown(row, dtype) for row in values[o, :, i, :, k])
            found = violation(rule, first + o, k, i, kernel, inputs, int(counts[o, i, k]))
            tally.first.append(dataclasses.replace(found, values=rows_shown))


def count_used(used: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """How many of the M positions of each group are in use: bool [rows, I/M, M, prod(K)] -> [rows, I/M, prod(K)]."""
    rows, groups, m, positions = used.shape
    if m in (4, 8) and positions == 1 and used.flags.c_contiguous:
        # A group is a word of bytes that are 0 or 1; times 1 1 1 1, the topmost byte is their sum.
        words = used.reshape(-1).view(f"u{m}")
        ones = words.dtype.type(int.from_bytes(bytes([1] * m), "little"))
        sums: NDArray[np.uint8] = (words * ones >> words.dtype.type(8 * (m - 1))).astype(np.uint8)
        return sums.reshape(rows, groups, 1)
    counts = np.zeros((rows, groups, positions), np.uint8)
    for member in range(m):
        counts += used[:, :, member]
    return counts


def value_findings(name: str, census: Census, *, sparse: bool) -> list[Finding]:
    """What is odd about the values of a tensor: NaN, infinities and, in sparse ones, -0.0."""
    found = []
    if census.nans:
        found.append(Finding("nan", name, f"{name} holds {census.nans} NaN", census.nans))
    if census.infinities:
        # A dense buffer may hold infinities on purpose, as attention masks do.
        message = f"{name} holds {census.infinities} Inf"
        found.append(Finding("infinity", name, message, census.infinities, "error" if sparse else "warning"))
    if sparse and census.negative_zeros:
        message = f"{name} holds -0.0 ({census.negative_zeros} in all), which some sparse kernels do not take for zero"
        found.append(Finding("negative-zero", name, message, census.negative_zeros, "warning"))
    return found
