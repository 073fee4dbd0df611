"""Packed tensors: positions decoded by an own reading of the specification, and the weights that they restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lbc_cli.verifier.bits import Bits, Positions, count, population, unsigned
from lbc_cli.verifier.groups import Rule, Tally, check_groups, place, value_findings
from lbc_cli.verifier.report import Finding, Report
from lbc_cli.verifier.source import Entry, Source, Stream, row_blocks


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """What the manifest says of a sparse tensor, and where its parts are."""

    name: str
    rule: Rule
    shape: tuple[int, ...]
    values: Entry
    index: Entry

    @property
    def kernel(self) -> tuple[int, ...]:
        """K."""
        return self.shape[2:]

    @property
    def positions(self) -> int:
        """prod(K)."""
        return math.prod(self.kernel)

    @property
    def groups(self) -> int:
        """I / M."""
        return self.shape[1] // self.rule.m


def check_packed(source: Source, tensor: PackedTensor, demanded: Rule | None, report: Report) -> tuple[str, str]:
    """Check one packed tensor from front to back.

    Args:
        source: the file.
        tensor: the tensor.
        demanded: a pattern that the restored weights must hold beside their own.
        report: findings and the layer's line are added.

    Returns:
        SHA-256 of the values and of the index.
    """
    values, index = Stream(source, tensor.values), Stream(source, tensor.index)
    own, other = Tally(), Tally()
    rule = tensor.rule
    asked = demanded if demanded is not None and not _implies(rule, demanded, tensor.shape) else None
    if asked is not None and tensor.shape[1] % asked.m:
        message = (
            f"{tensor.name} has {tensor.shape[1]} input channels, not a multiple of {asked.m}: {asked} cannot hold"
        )
        report.add(Finding("pattern", tensor.name, message))
        asked = None
    asked = asked and Rule(asked.n, asked.m, math.gcd(asked.v, tensor.shape[0]))
    step = math.lcm(rule.v, asked.v if asked else 1)
    for first, last in row_blocks(tensor.shape[0], tensor.positions * tensor.shape[1], step):
        codes = _read_codes(index, tensor, first // rule.v, last // rule.v, report)
        kept = unsigned(values.read((last - first) * _row_bytes(tensor)), tensor.values.dtype)
        shape = (last - first, tensor.positions, tensor.groups, rule.n)
        nonzero = count(kept, tensor.values.dtype, own.census).reshape(shape)
        sets = np.repeat(codes, rule.v, axis=0) if rule.v > 1 else codes
        _check_restored(nonzero, sets, tensor, first // rule.v, own)
        if asked:
            full, elements = _restored(nonzero, sets, kept.reshape(shape), rule.m)
            check_groups(full, elements, tensor.values.dtype, asked, first // asked.v, tensor.kernel, other)
    own.census.elements = math.prod(tensor.shape)
    _report(tensor, own, other, report)
    return values.digest(), index.digest()


def _implies(rule: Rule, demanded: Rule, shape: tuple[int, ...]) -> bool:
    """Whether holding `rule` is holding `demanded`."""
    return (rule.n, rule.m) == (demanded.n, demanded.m) and rule.v % math.gcd(demanded.v, shape[0]) == 0


def _row_bytes(tensor: PackedTensor) -> int:
    return (tensor.values.end - tensor.values.begin) // tensor.shape[0]


def _read_codes(index: Stream, tensor: PackedTensor, first: int, last: int, report: Report) -> NDArray[np.uint8]:
    """Codes of some rows of the index, [rows, prod(K), I/M, N], with the findings about them."""
    width = tensor.index.shape[-1]
    raw = np.frombuffer(index.read((last - first) * tensor.positions * width), np.uint8)
    bits = np.unpackbits(raw.reshape(last - first, tensor.positions, width), axis=-1, bitorder="little")
    size = tensor.rule.bits()
    used = tensor.groups * tensor.rule.n * size
    if bits[..., used:].any():
        message = f"{tensor.name}: the index has bits set after the last code of a row: padding must be zero"
        report.add(Finding("padding", tensor.name, message))
    coded = bits[..., :used].reshape(last - first, tensor.positions, tensor.groups, tensor.rule.n, size)
    codes = coded[..., 0].copy()
    for place_value in range(1, size):
        codes |= coded[..., place_value] << place_value
    _check_codes(codes, tensor, first, report)
    return codes


def _check_codes(codes: NDArray[np.uint8], tensor: PackedTensor, first: int, report: Report) -> None:
    """Exactly N distinct positions below M, ascending, in every group."""
    rule = tensor.rule
    wrong = codes[..., -1] >= rule.m
    for slot in range(rule.n):
        wrong |= codes[..., slot] >= rule.m
        if slot:
            wrong |= codes[..., slot] <= codes[..., slot - 1]
    if wrong.any():
        o, k, i = (int(axis) for axis in np.argwhere(wrong)[0])
        message = (
            f"{tensor.name}: group {place(rule, first + o, k, i, tensor.kernel)} keeps positions "
            f"{codes[o, k, i].tolist()}: {rule} needs {rule.n} different ones below {rule.m}, ascending"
        )
        report.add(Finding("positions", tensor.name, message, int(np.count_nonzero(wrong))))


def _as_sets(nonzero: NDArray[np.bool_], codes: NDArray[np.uint8]) -> Positions:
    """The positions at which a restored row is not zero, one set per group: [rows, prod(K), I/M]."""
    sets = np.zeros(codes.shape[:-1], np.uint32)
    for slot in range(codes.shape[-1]):
        sets |= nonzero[..., slot].astype(np.uint32) << (codes[..., slot] & 31)
    return sets


def _check_restored(
    nonzero: NDArray[np.bool_], codes: NDArray[np.uint8], tensor: PackedTensor, first: int, tally: Tally
) -> None:
    """The restored weights' own N:M, vectors taken together."""
    rule = tensor.rule
    sets = _as_sets(nonzero, codes)
    if rule.v > 1:
        sets = np.bitwise_or.reduce(sets.reshape(-1, rule.v, *sets.shape[1:]), axis=1)
    used = population(sets)
    wrong = used > rule.n
    tally.groups += used.size
    tally.under_filled += int(np.count_nonzero(used < rule.n))
    tally.violations += int(np.count_nonzero(wrong))
    if not tally.first and wrong.any():
        o, k, i = (int(axis) for axis in np.argwhere(wrong)[0])
        tally.first = f"group {place(rule, first + o, k, i, tensor.kernel)} uses {int(used[o, k, i])} positions: {rule}"


def _restored(
    nonzero: NDArray[np.bool_], codes: NDArray[np.uint8], kept: Bits, m: int
) -> tuple[NDArray[np.bool_], Bits]:
    """Dense rows, [rows, I, prod(K)]: what is not zero, and the elements."""
    rows, positions, groups, _ = codes.shape
    full = np.zeros((rows, positions, groups, 32), bool)
    elements = np.zeros(full.shape, kept.dtype)
    np.put_along_axis(full, codes.astype(np.int64), nonzero, axis=-1)
    np.put_along_axis(elements, codes.astype(np.int64), kept, axis=-1)
    shape = (rows, positions, groups * m)
    return full[..., :m].reshape(shape).swapaxes(1, 2), elements[..., :m].reshape(shape).swapaxes(1, 2)


def _report(tensor: PackedTensor, own: Tally, other: Tally, report: Report) -> None:
    report.layers.append(own.layer(tensor.name, tensor.shape, tensor.rule))
    for tally in (own, other):
        if tally.violations:
            message = f"{tensor.name}: {tally.first}; {tally.violations} of {tally.groups} groups violate it"
            report.add(Finding("pattern", tensor.name, message, tally.violations))
    report.findings += value_findings(tensor.name, own.census, sparse=True)
