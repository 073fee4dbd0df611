"""Packed tensors: positions decoded by an own reading of the specification, and the weights that they restore."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.bits import Bits, count, unsigned
from lbc_cli.verifier.groups import Rule, Tally, add_violations, check_groups, settle, violation
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
    def row(self) -> int:
        """Elements of an output channel, when dense."""
        return self.shape[1] * self.positions

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
    rule, dtype = tensor.rule, tensor.values.dtype
    asked = _asked(tensor, demanded, report)
    for first, last in row_blocks(tensor.shape[0], tensor.row, math.lcm(rule.v, asked.v if asked else 1)):
        codes, kept = _read_rows(values, index, tensor, first, last, report)
        nonzero = count(kept, dtype, own.census)
        _count_used(nonzero, rule, own)
        if asked:
            bits = _restored(codes, kept, rule.m)
            check_groups(_restored(codes, nonzero, rule.m), bits, dtype, asked, first // asked.v, tensor.kernel, other)
    own.census.elements = math.prod(tensor.shape)
    settle(tensor.name, tensor.shape, rule, own, report)
    if asked:
        add_violations(tensor.name, asked, other, report)
    return values.digest(), index.digest()


def restored_chunks(source: Source, tensor: PackedTensor) -> Iterator[bytes]:
    """The dense bytes of a packed tensor, [O, I, *K] in pieces of whole rows.

    Raises:
        CheckpointError: if the file is cut off, or a position is impossible.
    """
    values, index = Stream(source, tensor.values, hashed=False), Stream(source, tensor.index, hashed=False)
    report = Report("")
    for first, last in row_blocks(tensor.shape[0], tensor.row, tensor.rule.v):
        rows = _restored(*_read_rows(values, index, tensor, first, last, report), tensor.rule.m)
        if report.findings:
            raise CheckpointError(report.findings[0].message)
        yield rows.tobytes()


def _asked(tensor: PackedTensor, demanded: Rule | None, report: Report) -> Rule | None:
    """What must be counted beside the tensor's own rule, None where that says it all."""
    out, inputs = tensor.shape[:2]
    if demanded is None or _implies(tensor.rule, demanded, out):
        return None
    if inputs % demanded.m:
        message = f"{tensor.name} has {inputs} input channels, not a multiple of {demanded.m}: {demanded} cannot hold"
        report.add(Finding("pattern", tensor.name, message))
        return None
    return Rule(demanded.n, demanded.m, math.gcd(demanded.v, out))


def _implies(rule: Rule, demanded: Rule, out: int) -> bool:
    """Whether holding `rule` is holding `demanded`, over this many output channels."""
    return (rule.n, rule.m) == (demanded.n, demanded.m) and rule.v % math.gcd(demanded.v, out) == 0


def _read_rows(
    values: Stream, index: Stream, tensor: PackedTensor, first: int, last: int, report: Report
) -> tuple[NDArray[np.uint8], Bits]:
    """Positions and kept values of some output channels, both [rows, prod(K), I/M, N]."""
    rule = tensor.rule
    codes = _read_codes(index, tensor, first // rule.v, last // rule.v, report)
    codes = np.repeat(codes, rule.v, axis=0) if rule.v > 1 else codes
    return codes, unsigned(values.read((last - first) * _row_bytes(tensor)), tensor.values.dtype).reshape(codes.shape)


def _row_bytes(tensor: PackedTensor) -> int:
    return (tensor.values.end - tensor.values.begin) // tensor.shape[0]


def _read_codes(index: Stream, tensor: PackedTensor, first: int, last: int, report: Report) -> NDArray[np.uint8]:
    """Codes of some rows of the index, [rows, prod(K), I/M, N], with the findings about them."""
    width, size = tensor.index.shape[-1], tensor.rule.bits()
    used = tensor.groups * tensor.rule.n
    raw = np.frombuffer(index.read((last - first) * tensor.positions * width), np.uint8)
    every, rest = _codes(raw.reshape(last - first, tensor.positions, width), used, size)
    if rest:
        message = f"{tensor.name}: the index has bits set after the last code of a row: padding must be zero"
        report.add(Finding("padding", tensor.name, message))
    codes = every.reshape(last - first, tensor.positions, tensor.groups, tensor.rule.n)
    _check_codes(codes, tensor, first, report)
    return codes


def _codes(raw: NDArray[np.uint8], used: int, size: int) -> tuple[NDArray[np.uint8], bool]:
    """The first `used` codes of `size` bits of each row of bytes, and whether any bit after them is set."""
    if 8 % size == 0:  # Whole codes in a byte: each byte's are looked up together.
        every = np.take(_codes_of_bytes(size), raw).view(np.uint8)
        return every[..., :used], bool(every[..., used:].any())
    bits = np.unpackbits(raw, axis=-1, bitorder="little")
    coded = bits[..., : used * size].reshape(*raw.shape[:-1], used, size)
    codes = coded[..., 0].copy()
    for place in range(1, size):
        codes |= coded[..., place] << place
    return codes, bool(bits[..., used * size :].any())


@lru_cache
def _codes_of_bytes(size: int) -> NDArray[Any]:
    """For every byte its 8 / size codes, one byte each, together as one integer: [256]."""
    codes = np.arange(256, dtype=np.uint8)[:, None] >> np.arange(0, 8, size, dtype=np.uint8) & ((1 << size) - 1)
    return np.ascontiguousarray(codes.astype(np.uint8)).view(f"u{8 // size}").reshape(256)


def _check_codes(codes: NDArray[np.uint8], tensor: PackedTensor, first: int, report: Report) -> None:
    """Exactly N distinct positions below M, ascending, in every group."""
    rule = tensor.rule
    wrong = codes[..., -1] >= rule.m
    for slot in range(1, rule.n):
        wrong |= codes[..., slot] <= codes[..., slot - 1]
    if wrong.any():
        o, k, i = (int(axis) for axis in np.argwhere(wrong)[0])
        where = violation(rule, first + o, k, i, tensor.kernel, tensor.shape[1], rule.n)
        message = (
            f"{tensor.name}: group {where.place} keeps positions "
            f"{codes[o, k, i].tolist()}: {rule} needs {rule.n} different ones below {rule.m}, ascending"
        )
        report.add(Finding("positions", tensor.name, message, int(np.count_nonzero(wrong))))


def _count_used(nonzero: NDArray[np.bool_], rule: Rule, tally: Tally) -> None:
    """Count the positions in use per group; N codes cannot hold more than N, but fewer may be in use."""
    if rule.v > 1:
        nonzero = np.logical_or.reduce(nonzero.reshape(-1, rule.v, *nonzero.shape[1:]), axis=1)
    used = np.zeros(nonzero.shape[:-1], np.uint8)
    for slot in range(rule.n):
        used += nonzero[..., slot]
    tally.groups += used.size
    tally.under_filled += int(np.count_nonzero(used < rule.n))


def _restored(codes: NDArray[np.uint8], kept: NDArray[Any], m: int) -> NDArray[Any]:
    """Dense rows [rows, I, prod(K)]: each element of `kept` at its position, zero elsewhere."""
    rows, positions, groups, _ = codes.shape
    full = np.zeros(rows * positions * groups * m, kept.dtype)
    # A position that is M or more was reported already; it must only not land outside its group.
    places = np.minimum(codes, m - 1) + np.arange(0, full.size, m).reshape(rows, positions, groups, 1)
    full[places.reshape(-1)] = kept.reshape(-1)
    return np.ascontiguousarray(full.reshape(rows, positions, groups * m).swapaxes(1, 2))
