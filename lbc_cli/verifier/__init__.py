"""`verify`: an independent reading of an artefact, which believes nothing that the writer's code says.

    source    the container        rules     the manifest against the specification
    bits      numbers as bits      groups    N:M itself
    packed    packed tensors       dense     dense tensors
    report    what was found

It shares no code with `packing` and `checkpoint`, reads in small pieces, and never raises for a damaged file.
"""

from __future__ import annotations

import os
from pathlib import Path

from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.verifier.dense import check_dense, check_pattern
from lbc_cli.verifier.groups import Rule
from lbc_cli.verifier.packed import check_packed
from lbc_cli.verifier.report import DenseReport, Finding, LayerReport, Report
from lbc_cli.verifier.rules import Claims, is_ours, read_claims
from lbc_cli.verifier.source import Source, read_source

__all__ = ["DenseReport", "Finding", "LayerReport", "Report", "verify"]


def verify(path: str | os.PathLike[str], *, pattern: str | None = None) -> Report:
    """Verify a checkpoint of lbc, or any safetensors file against a pattern.

    Args:
        path: the file.
        pattern: N:M or N:M/V that every layer must hold. Checkpoints carry their own; other files need it. In those,
            weights whose input channels M does not divide, and the classifier, are listed as dense.

    Returns:
        The report; `ok` is False if the file is damaged or violates a pattern.

    Raises:
        UsageError: if there is no such file, the pattern is none, or a file that carries none is given without.
    """
    rule = None if pattern is None else _parse(pattern)
    target = Path(path)
    if not target.is_file():
        raise UsageError(f"{target}: {_not_a_file(target)}")
    report = Report(str(target))
    try:
        with target.open("rb") as file:
            _verify(read_source(file), rule, report)
    except CheckpointError as error:
        report.add(Finding("file", "", str(error)))
    except OSError as error:
        raise UsageError(f"{target}: cannot be read: {error.strerror or error}") from error
    return report


def _not_a_file(target: Path) -> str:
    if not target.exists():
        return "no such file"
    inside = target / "model.safetensors"
    return f"is not a file; give the checkpoint in it, {inside}" if inside.is_file() else "is not a file"


def _parse(pattern: str) -> Rule:
    from lbc_cli.patterns import Pattern

    parsed = Pattern.parse(pattern)
    return Rule(parsed.n, parsed.m, parsed.vector)


def _verify(source: Source, rule: Rule | None, report: Report) -> None:
    if is_ours(source):
        _verify_checkpoint(source, read_claims(source), rule, report)
    elif rule is None:
        raise UsageError(f"{report.path} does not say which pattern it holds: name it with --pattern, such as 2:4")
    else:
        report.kind = "dense"
        for entry in source.entries.values():
            check_pattern(source, entry, rule, report)
        if not report.layers:
            whys = "; ".join(f"{entry.name}: {entry.why}" for entry in report.dense[:3]) or "it has no tensors"
            report.add(Finding("pattern", "", f"no tensor can hold {rule}: {whys}"))


def _verify_checkpoint(source: Source, claims: Claims, rule: Rule | None, report: Report) -> None:
    report.phase, report.method, report.digest = claims.phase, claims.method, claims.digest
    if claims.phase == "training":
        message = "saved while training: groups still have several candidates, so no pattern is claimed yet"
        report.add(Finding("phase", "", message, 1, "warning"))
    parts: set[str] = set()
    for tensor in claims.packed:
        found = check_packed(source, tensor, rule, report)
        for part, digest in zip((tensor.values.name, tensor.index.name), found, strict=True):
            _compare(part, digest, claims, report)
            parts.add(part)
    for name in source.entries:
        if name not in parts:
            _compare(name, _check_other(source, name, claims, rule, report), claims, report)


def _check_other(source: Source, name: str, claims: Claims, rule: Rule | None, report: Report) -> str:
    """Check a tensor that is not packed; gives its digest."""
    entry = source.entries[name]
    if claims.phase == "training" and rule is not None:
        return check_pattern(source, entry, rule, report)
    digest, nonzeros = check_dense(source, entry, report)
    claimed = claims.unstructured.get(name)
    if len(entry.shape) > 1:
        report.dense.append(DenseReport(name, "stored dense" if claimed is None else "pruned without a pattern"))
    if claimed not in (None, nonzeros):
        message = f"{name} has {nonzeros} non-zeros: the manifest says {claimed}"
        report.add(Finding("unstructured", name, message))
    return digest


def _compare(name: str, digest: str, claims: Claims, report: Report) -> None:
    if digest != claims.digests[name]:
        report.add(Finding("digest", name, f"{name} does not match its SHA-256: the data are damaged"))
