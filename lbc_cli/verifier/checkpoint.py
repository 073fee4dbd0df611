"""Checkpoints of lbc: the manifest's claims against the tensors that the file holds."""

from __future__ import annotations

import math
from collections import Counter

from lbc_cli.verifier.artefact import Artefact
from lbc_cli.verifier.choice import LayerRules
from lbc_cli.verifier.dense import check_dense, check_pattern, check_rule
from lbc_cli.verifier.groups import Rule
from lbc_cli.verifier.packed import check_packed
from lbc_cli.verifier.report import CountedReport, DenseReport, Finding, Report
from lbc_cli.verifier.rules import Claims, read_claims
from lbc_cli.verifier.source import Entry, Source


def check_checkpoint(artefact: Artefact, rules: LayerRules, report: Report) -> None:
    """Check a checkpoint.

    Args:
        artefact: open, of kind "packed".
        rules: what the tensors must hold beside what the manifest claims.
        report: updated in place.

    Raises:
        CheckpointError: if the manifest breaks a rule, so that nothing below it can be read.
    """
    source = artefact.source
    claims = read_claims(source)
    report.phase, report.method, report.digest = claims.phase, claims.method, claims.digest
    report.transposable = report.transposable or claims.transposable
    if claims.phase == "training":
        message = "saved while training: groups still have several candidates, so no pattern is claimed yet"
        report.add(Finding("phase", "", message, 1, "warning"))
    parts: set[str] = set()
    for tensor in claims.packed:
        found = check_packed(source, tensor, rules.demanded(tensor.name), report)
        for part, digest in zip((tensor.values.name, tensor.index.name), found, strict=True):
            _compare(part, digest, claims, report)
            parts.add(part)
    explained = _explaining(claims, rules)
    for entry in source.entries.values():
        if entry.name not in parts:
            _compare(entry.name, _check_other(source, entry, claims, rules, explained, report), claims, report)


def commonest_rule(claims: Claims) -> Rule | None:
    """The pattern that most of the packed tensors hold, None if there are none."""
    rules = Counter(tensor.rule for tensor in claims.packed).most_common(1)
    return rules[0][0] if rules else None


def _explaining(claims: Claims, rules: LayerRules) -> LayerRules:
    """The rules that tell why the dense layers of a checkpoint are: what is asked, else its commonest pattern."""
    return rules if rules.asked else LayerRules(commonest_rule(claims), rules.globs, rules.model)


def _check_other(
    source: Source, entry: Entry, claims: Claims, rules: LayerRules, explained: LayerRules, report: Report
) -> str:
    """Check a tensor that is not packed; gives its digest."""
    if claims.phase == "training" and rules.asked:
        return check_pattern(source, entry, rules, report)
    rule = rules.rule_for(entry.name, entry.shape)
    if rule is not None and rules.glob_for(entry.name) is not None:
        return check_rule(source, entry, rule, report)
    claimed = claims.unstructured.get(entry.name)
    digest, nonzeros = check_dense(source, entry, report, sparse=claimed is not None)
    if claimed is None:
        if len(entry.shape) > 1:
            why = explained.why_dense(entry.name, entry.shape) or "the checkpoint keeps it dense"
            report.dense.append(DenseReport(entry.name, why, entry.shape))
        return digest
    share = nonzeros / (math.prod(entry.shape) or 1)
    report.counted.append(CountedReport(entry.name, entry.shape, share, nonzeros, claimed))
    if claimed != nonzeros:
        message = f"{entry.name} has {nonzeros} non-zeros: the manifest says {claimed}"
        report.add(Finding("unstructured", entry.name, message))
    return digest


def _compare(name: str, digest: str, claims: Claims, report: Report) -> None:
    if digest != claims.digests[name]:
        report.add(Finding("digest", name, f"{name} does not match its SHA-256: the data are damaged"))
