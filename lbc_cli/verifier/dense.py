"""Dense tensors: their values, and the pattern where one is claimed or demanded."""

from __future__ import annotations

import math
import re

from lbc_cli.verifier.bits import FORMATS, count, unsigned
from lbc_cli.verifier.groups import Rule, Tally, check_groups, value_findings
from lbc_cli.verifier.report import DenseReport, Finding, Report
from lbc_cli.verifier.source import Entry, Source, Stream, row_blocks

# The last layer of a classifier stays dense by convention, in timm, torchvision and apex alike.
_CLASSIFIER = re.compile(r"(?:module\.)?(?:fc|heads?|head_dist|classifier|last_linear|logits)\.")


def why_dense(entry: Entry, rule: Rule) -> str:
    """Why no pattern is expected of a tensor, "" if one is."""
    if not entry.name.endswith("weight") or len(entry.shape) < 2:
        return "not the weight of a linear or convolution layer: 2 or more dimensions, and a name that ends in weight"
    if 0 in entry.shape:
        return "empty"
    if entry.shape[1] % rule.m:
        return f"{entry.shape[1]} input channels, not a multiple of {rule.m}"
    if _CLASSIFIER.match(entry.name):
        return "classifier"
    return ""


def check_dense(source: Source, entry: Entry, report: Report) -> tuple[str, int]:
    """Look at the values of a tensor that follows no pattern.

    Returns:
        SHA-256 of its bytes, and the number of its non-zeros.
    """
    stream, tally = Stream(source, entry), Tally()
    total = (entry.end - entry.begin) // FORMATS[entry.dtype].size
    for first, last in row_blocks(total, 1):
        count(unsigned(stream.read((last - first) * FORMATS[entry.dtype].size), entry.dtype), entry.dtype, tally.census)
    report.findings += value_findings(entry.name, tally.census, sparse=False)
    return stream.digest(), tally.census.nonzero


def check_pattern(source: Source, entry: Entry, rule: Rule, report: Report) -> str:
    """Check a dense tensor against a pattern, or say why none is expected of it.

    Returns:
        SHA-256 of its bytes.
    """
    if why := why_dense(entry, rule):
        report.dense.append(DenseReport(entry.name, why))
        return check_dense(source, entry, report)[0]
    out, inputs, *kernel = entry.shape
    rule = Rule(rule.n, rule.m, math.gcd(rule.v, out))
    stream, tally = Stream(source, entry), Tally()
    row = inputs * math.prod(kernel)
    for first, last in row_blocks(out, row, rule.v):
        bits = unsigned(stream.read((last - first) * row * FORMATS[entry.dtype].size), entry.dtype)
        bits = bits.reshape(last - first, inputs, -1)
        nonzero = count(bits, entry.dtype, tally.census)
        check_groups(nonzero, bits, entry.dtype, rule, first // rule.v, tuple(kernel), tally)
    if tally.violations:
        message = f"{entry.name}: {tally.first}; {tally.violations} of {tally.groups} groups violate it"
        report.add(Finding("pattern", entry.name, message, tally.violations))
    report.layers.append(tally.layer(entry.name, entry.shape, rule))
    report.findings += value_findings(entry.name, tally.census, sparse=True)
    return stream.digest()
