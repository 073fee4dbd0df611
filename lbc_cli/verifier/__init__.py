"""`verify`: an independent reading of an artefact, which believes nothing that the writer's code says.

    artefact   what lies at a path: opened           choice    which tensor must hold which pattern
    source     the safetensors container             bits      numbers as bits
    rules      the manifest against the format       groups    N:M itself
    packed     packed tensors                        dense     dense tensors
    folder     timm folders                          contents  what every container gives: named dense tensors
    model      names and shapes against timm         against   the same weights in another artefact
    onnx       ONNX graphs                           report    what was found
    semi_structured    our semi-structured exports
    transposed         the pattern along the output channels, where it is asked

It shares no code with `packing`, `checkpoint` and `exports`, reads in small pieces, and never raises for a damaged
file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.verifier.against import compare
from lbc_cli.verifier.artefact import Artefact, open_artefact
from lbc_cli.verifier.checkpoint import check_checkpoint
from lbc_cli.verifier.choice import LayerRules
from lbc_cli.verifier.dense import check_pattern
from lbc_cli.verifier.folder import check_folder
from lbc_cli.verifier.model import check_model
from lbc_cli.verifier.onnx import verify_onnx
from lbc_cli.verifier.report import CountedReport, DenseReport, Finding, LayerReport, Report, Violation
from lbc_cli.verifier.semi_structured import verify_semi_structured
from lbc_cli.verifier.transposed import check_transposed

__all__ = ["CountedReport", "DenseReport", "Finding", "LayerReport", "Report", "Violation", "verify"]

# Findings after which a file's weights are not known, so that they cannot be compared.
_DAMAGE = frozenset({"file", "digest", "positions", "padding"})


def verify(
    path: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    layers: Mapping[str, str] | None = None,
    model: str | None = None,
    against: str | os.PathLike[str] | None = None,
    values_only: bool = False,
    transposable: bool = False,
) -> Report:
    """Verify an artefact: a checkpoint of lbc, a safetensors file, a timm folder, an ONNX file, an export of lbc.

    Args:
        path: the file, or the timm folder.
        pattern: N:M or N:M/V that every layer must hold. Checkpoints carry their own; other artefacts need one, here
            or in `layers`. In those, weights whose input channels M does not divide, and the classifier, are listed
            as dense.
        layers: globs over names of tensors, of layers and of modules around them, each with "N:M", "N:M/V" or
            "dense". The last that matches wins.
        model: timm name; names and shapes must be that model's, and it says which layers take the pattern.
        against: another artefact, of any kind, that must hold the same weights.
        values_only: without a pattern, look at the values of an artefact that carries none, instead of refusing it.
        transposable: every layer must hold its pattern along the output channels too. Checkpoints that claim it are
            held to it in any case.

    Returns:
        The report; `ok` is False if the file is damaged, violates a pattern, or differs from model or `against`.

    Raises:
        UsageError: if there is no such file, it is of no kind that can be verified, a pattern is none, a glob matches
            nothing, or an artefact that carries no pattern is given without one.
    """
    rules = LayerRules.parse(pattern, layers)
    report = Report(str(path), transposable=transposable)
    free = values_only or model is not None or against is not None
    try:
        with open_artefact(Path(path)) as artefact:
            report.kind = artefact.kind
            _verify(artefact, rules, model, free and not transposable, report)
            if report.transposable and not _DAMAGE & {finding.rule for finding in report.findings}:
                check_transposed(artefact, report)
            if against is not None:
                _check_against(artefact, Path(against), report)
    except CheckpointError as error:
        report.add(Finding("file", "", str(error)))
    except OSError as error:
        raise UsageError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    return report


def _verify(artefact: Artefact, rules: LayerRules, model: str | None, free: bool, report: Report) -> None:
    carries = artefact.kind in ("packed", "semi-structured")
    if not (carries or free or rules.asked):
        raise UsageError(
            f"{report.path} does not say which pattern it holds: name it with --pattern, such as 2:4, or, with "
            "--against, the checkpoint that it must equal"
        )
    if model is not None:
        rules = check_model(artefact, model, rules, report)
    _CHECKS[artefact.kind](artefact, rules, report)
    rules.check_globs(report)
    if rules.asked and not report.layers:
        counted = [f"{entry.name}: pruned without a pattern" for entry in report.counted]
        whys = counted + [f"{entry.name}: {entry.why}" for entry in report.dense]
        told = "; ".join(whys[:3]) or "it has no weights"
        report.add(Finding("pattern", "", f"no tensor can hold {rules.named()}: {told}"))


def _check_dense(artefact: Artefact, rules: LayerRules, report: Report) -> None:
    for entry in artefact.source.entries.values():
        check_pattern(artefact.source, entry, rules, report)


def _check_folder(artefact: Artefact, rules: LayerRules, report: Report) -> None:
    check_folder(artefact.path, artefact.source, report)
    _check_dense(artefact, rules, report)


def _check_onnx(artefact: Artefact, rules: LayerRules, report: Report) -> None:
    verify_onnx(artefact.path, rules, report)


def _check_semi_structured(artefact: Artefact, rules: LayerRules, report: Report) -> None:
    verify_semi_structured(artefact.source, rules if rules.asked else None, report)


_CHECKS: Mapping[str, Callable[[Artefact, LayerRules, Report], None]] = {
    "packed": check_checkpoint,
    "dense": _check_dense,
    "folder": _check_folder,
    "onnx": _check_onnx,
    "semi-structured": _check_semi_structured,
}


def _refuse_damage(artefact: Artefact) -> None:
    """Raise for what the comparison alone would not notice: digests that do not match, positions that cannot be."""
    if artefact.kind in ("packed", "semi-structured"):
        found = Report(str(artefact.path))
        _CHECKS[artefact.kind](artefact, LayerRules(), found)
        if damage := [finding.message for finding in found.findings if finding.rule in _DAMAGE]:
            raise CheckpointError(damage[0])


def _check_against(artefact: Artefact, path: Path, report: Report) -> None:
    """Compare with another artefact, once both are known to be undamaged."""
    if any(finding.rule in _DAMAGE for finding in report.findings):
        report.add(Finding("against", "", f"not compared with {path}, as {report.path} is damaged itself"))
        return
    try:
        with open_artefact(path) as other:
            _refuse_damage(other)
            compare(artefact, other, report)
    except CheckpointError as error:
        report.add(Finding("against", "", f"{path} is damaged: {error}"))
