"""The pattern along the other axis: at most N of M consecutive output channels in use (`lbc verify --transposable`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lbc_cli.verifier.artefact import Artefact, contents
from lbc_cli.verifier.bits import FORMATS, Census, count, unsigned
from lbc_cli.verifier.choice import parse_rule
from lbc_cli.verifier.contents import Content
from lbc_cli.verifier.groups import Rule
from lbc_cli.verifier.report import Finding, Report


def check_transposed(artefact: Artefact, report: Report) -> None:
    """Check every layer that holds a pattern along its output channels too.

    Args:
        artefact: open.
        report: of the same artefact, its layers checked; updated in place.
    """
    rules = {layer.name: parse_rule(layer.pattern) for layer in report.layers}
    if not rules:
        told = "no layer holds a pattern, so that none holds it along the output channels"
        report.add(Finding("transposed", "", told))
    for content in contents(artefact):
        if rule := rules.get(content.name):
            _check(content, rule, report)


def _check(content: Content, rule: Rule, report: Report) -> None:
    out, inputs, *kernel = content.shape
    if out % rule.m:
        message = f"{content.name} has {out} output channels, no multiple of {rule.m}: it cannot be {rule} along them"
        report.add(Finding("transposed", content.name, message))
        return
    wrong, first = 0, ""
    for number, used in enumerate(_used(content, rule.m)):  # [I * prod(K)]: positions in use, of M output channels
        places = np.flatnonzero(used > rule.n)
        if places.size and not wrong:
            i, k = divmod(int(places[0]), math.prod(kernel))
            at = tuple(int(axis) for axis in np.unravel_index(k, kernel)) if kernel else ()
            first = f"(o={number * rule.m}..{number * rule.m + rule.m - 1}, k={at}, i={i}) uses {used[places[0]]}"
        wrong += int(places.size)
    if wrong:
        groups = out // rule.m * inputs * math.prod(kernel)
        message = (
            f"{content.name}: {first}: {rule} allows {rule.n} of {rule.m} along the output channels too; {wrong} of "
            f"{groups} groups violate it"
        )
        report.add(Finding("transposed", content.name, message, wrong))


def _used(content: Content, m: int) -> Iterator[NDArray[np.int64]]:
    """For M output channels after the other how many of them each (i, k) uses: int [I * prod(K)]."""
    row = math.prod(content.shape[1:])
    size = m * row * FORMATS[content.dtype].size
    held = bytearray()
    for piece in content.chunks():
        held += piece
        while len(held) >= size:
            bits = unsigned(bytes(held[:size]), content.dtype).reshape(m, row, 1)
            yield count(bits, content.dtype, Census()).reshape(m, row).sum(axis=0)
            del held[:size]
