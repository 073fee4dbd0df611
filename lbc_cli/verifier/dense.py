"""Dense tensors: their values, and the pattern where one is asked."""

from __future__ import annotations

import math

from lbc_cli.verifier.bits import FORMATS, count, unsigned
from lbc_cli.verifier.choice import LayerRules
from lbc_cli.verifier.groups import Rule, Tally, check_groups, settle, value_findings
from lbc_cli.verifier.report import DenseReport, Report
from lbc_cli.verifier.source import Entry, Source, Stream, row_blocks


def check_dense(source: Source, entry: Entry, report: Report, *, sparse: bool = False) -> tuple[str, int]:
    """Look at the values of a tensor that follows no pattern.

    Args:
        source: the file.
        entry: the tensor.
        report: what is odd about the values is added.
        sparse: whether its zeros mean something, so that they must be +0.0.

    Returns:
        SHA-256 of its bytes, and the number of its non-zeros.
    """
    stream, tally = Stream(source, entry), Tally()
    size = FORMATS[entry.dtype].size
    for first, last in row_blocks((entry.end - entry.begin) // size, 1):
        count(unsigned(stream.read((last - first) * size), entry.dtype), entry.dtype, tally.census)
    report.findings += value_findings(entry.name, tally.census, sparse=sparse)
    return stream.digest(), tally.census.nonzero


def check_pattern(source: Source, entry: Entry, rules: LayerRules, report: Report) -> str:
    """Check a dense tensor against the pattern that is asked of it, or note why none is.

    Returns:
        SHA-256 of its bytes.
    """
    rule = rules.rule_for(entry.name, entry.shape)
    if rule is not None:
        return check_rule(source, entry, rule, report)
    if len(entry.shape) > 1:
        report.dense.append(DenseReport(entry.name, rules.why_dense(entry.name, entry.shape), entry.shape))
    return check_dense(source, entry, report)[0]


def check_rule(source: Source, entry: Entry, rule: Rule, report: Report) -> str:
    """Check every group of a dense tensor [O, I, *K] that M and V divide.

    Returns:
        SHA-256 of its bytes.
    """
    out, inputs, *kernel = entry.shape
    stream, tally = Stream(source, entry), Tally()
    row = inputs * math.prod(kernel)
    for first, last in row_blocks(out, row, rule.v):
        bits = unsigned(stream.read((last - first) * row * FORMATS[entry.dtype].size), entry.dtype)
        bits = bits.reshape(last - first, inputs, -1)
        nonzero = count(bits, entry.dtype, tally.census)
        check_groups(nonzero, bits, entry.dtype, rule, first // rule.v, tuple(kernel), tally)
    settle(entry.name, entry.shape, rule, tally, report)
    return stream.digest()
