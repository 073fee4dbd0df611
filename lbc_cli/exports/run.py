"""`export`: check the request, make the artefact in a scratch place, prove it, move it to its place."""

from __future__ import annotations

import dataclasses
import glob
import os
from pathlib import Path

from lbc_cli.checkpoint.contents import foreign_kind
from lbc_cli.checkpoint.files import check_free
from lbc_cli.checkpoint.manifest import Manifest, read_manifest
from lbc_cli.errors import CheckpointError, UsageError, VerificationError
from lbc_cli.exports.base import Exporter, ExportOptions, ExportResult, Job, Written
from lbc_cli.exports.registry import find_format
from lbc_cli.exports.staging import staged
from lbc_cli.verifier import Report, verify
from lbc_cli.verifier.rules import is_ours
from lbc_cli.verifier.semi_rules import is_semi_structured
from lbc_cli.verifier.source import read_source


def export(
    source: str | os.PathLike[str],
    format: str,  # noqa: A002 (the word of the command line)
    out: str | os.PathLike[str] | None = None,
    *,
    options: ExportOptions | None = None,
) -> ExportResult:
    """Export a checkpoint of lbc.

    Args:
        source: the checkpoint.
        format: one of `FORMATS`.
        out: the artefact; nothing may be there. None: beside the checkpoint, named after it and the format.
        options: what may be chosen.

    Returns:
        What was written; its verification holds.

    Raises:
        UsageError: if the checkpoint is none, is not final, or cannot be exported so.
        OutputError: if something is there already, or cannot be written.
        CheckpointError: if the checkpoint is damaged.
        VerificationError: if the artefact does not hold what the checkpoint does; it is removed.
    """
    exporter, chosen = find_format(format), options or ExportOptions()
    path = Path(source)
    _check_options(exporter, chosen)
    manifest = _final(path, _manifest(path))
    target = exporter.default_path(path) if out is None else Path(out)
    check_free(target)
    with staged(target) as scratch:
        written = exporter.write(Job(path, manifest, chosen), scratch)
        report = _verified(scratch, path, written, exporter)
        size = sum(file.stat().st_size for file in scratch.parent.rglob("*") if file.is_file())
    report.path = str(target)
    return ExportResult(target, exporter.name, written.layers, written.notes, size, report, written.checks)


def _check_options(exporter: Exporter, options: ExportOptions) -> None:
    if options.dtype is not None and options.dtype not in exporter.dtypes:
        known = ", ".join(exporter.dtypes) or "none: it is the checkpoint's"
        raise UsageError(f"format {exporter.name} cannot have --dtype {options.dtype!r}: there are {known}")


def _manifest(source: Path) -> Manifest:
    """The manifest of a checkpoint of lbc; what is something else is told apart from what is damaged.

    Raises:
        UsageError: if it is something else.
        CheckpointError: if it is damaged.
    """
    if source.is_dir():
        raise UsageError(f"{source} is a folder: {_REMEDY.format(source)}")
    try:
        return read_manifest(source)
    except CheckpointError:
        if other := _other_kind(source):
            raise UsageError(f"{source} is {other}: {_REMEDY.format(source)}") from None
        raise


_REMEDY = (
    "only checkpoints of lbc are exported; `lbc convert {} --model NAME --out FILE` makes one of weights that hold N:M"
)


def _other_kind(source: Path) -> str:
    """What a file is that is no checkpoint of lbc, "" if it may be a damaged one."""
    if foreign := foreign_kind(source):
        return foreign
    with source.open("rb") as file:
        try:
            header = read_source(file)
        except CheckpointError:
            return ""
    if is_semi_structured(header):
        return "an export already"
    return "" if is_ours(header) else "no checkpoint of lbc"


def _final(source: Path, manifest: Manifest) -> Manifest:
    if manifest.phase != "final":
        raise UsageError(
            f"{source} was saved while training (epoch {manifest.epoch}): its groups still have several candidates, so "
            "it holds no pattern yet; finish the run with `lbc train --resume` and export the final checkpoint"
        )
    return manifest


def _verified(artefact: Path, source: Path, written: Written, exporter: Exporter) -> Report:
    """Verify every pattern and every weight against the checkpoint.

    Raises:
        VerificationError: with the first finding.
    """
    layers = {"*": "dense"} | {glob.escape(layer.name): layer.pattern for layer in written.layers if layer.pattern}
    report = verify(artefact, layers=layers, against=source)
    if not report.ok:
        first = next(finding for finding in report.findings if finding.level == "error")
        raise VerificationError(
            f"the {exporter.name} export of {source} is not what it should be: {first.message}; it was removed; "
            "a bug in lbc"
        )
    report.findings[:] = [
        dataclasses.replace(finding, message=finding.message.replace(str(artefact), artefact.name))
        for finding in report.findings
    ]
    return report
