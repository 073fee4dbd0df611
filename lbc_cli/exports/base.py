"""What every export format has in common: its description, what it is given, what it gives back.

Each format is one module of this package, which ends in `EXPORTER = ...` and has a line in `registry`. It writes into a
scratch place under the final name; `lbc_cli.exports.export` verifies what stands there and only then gives it its final
name. Neither this module nor the formats import torch before they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lbc_cli.checkpoint import Manifest
    from lbc_cli.checkpoint.container import TensorInfo
    from lbc_cli.verifier import Report


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the caller may choose."""

    dtype: str | None = None
    """"float32", "float16" or "bfloat16"; None: as the format does by itself, usually the file's own."""
    check: bool = True
    """Run what was written where this machine can, and compare (beyond the verification, which always happens)."""


@dataclass(frozen=True, slots=True)
class ExportedLayer:
    """One weight that has groups, or could have had."""

    name: str
    """Of the parameter."""
    shape: tuple[int, ...]
    """[O, I, *K]"""
    pattern: str
    """N:M or N:M/V as the checkpoint states it; "" for a dense one."""
    stored: str
    """How the artefact holds it: "semi-structured 2:4", "dense"."""
    reason: str = ""
    """Why it is dense, or why what runs the format cannot use its zeros; "" otherwise."""


@dataclass(frozen=True, slots=True)
class Written:
    """What an exporter says of the artefact it wrote."""

    layers: tuple[ExportedLayer, ...]
    notes: tuple[str, ...] = ()
    """Sentences for the user: what was rounded, how to run it."""
    checks: Mapping[str, float | str] = field(default_factory=dict)
    """Comparisons made, such as "largest logit difference": 0.0."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A finished export."""

    path: Path
    format: str
    layers: tuple[ExportedLayer, ...]
    notes: tuple[str, ...]
    bytes: int
    """Of all its files."""
    verified: Report
    checks: Mapping[str, float | str]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON's types."""
        return {
            "schema": 1,
            "path": str(self.path),
            "format": self.format,
            "bytes": self.bytes,
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "pattern": layer.pattern,
                    "stored": layer.stored,
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
            "notes": list(self.notes),
            "checks": dict(self.checks),
            "verified": self.verified.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class Job:
    """The checkpoint to export. Its phase is "final"; its tensors are read, and their digests checked, on demand."""

    source: Path
    manifest: Manifest
    options: ExportOptions

    @property
    def patterns(self) -> dict[str, str]:
        """Name of each sparse parameter -> "N:M" or "N:M/V"."""
        return {
            name: entry.pattern + (f"/{entry.vector}" if entry.vector > 1 else "")
            for name, entry in self.manifest.sparse.items()
        }

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> dtype and shape of every tensor when dense, in the order of `tensors`."""
        return self.manifest.dense

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The dense tensors one after the other, so that only one need be in memory."""
        from lbc_cli import checkpoint

        yield from checkpoint.stream(self.source)

    def model(self) -> nn.Module:
        """The model on the CPU, in eval mode, in the file's dtypes.

        Raises:
            ModelError: if the checkpoint does not say which model it is.
        """
        from lbc_cli import checkpoint

        return checkpoint.load(self.source)


class Exporter(Protocol):
    """One format."""

    @property
    def name(self) -> str:
        """As `--format` takes it."""

    @property
    def description(self) -> str:
        """A phrase: what the artefact is."""

    @property
    def runs_on(self) -> str:
        """A phrase: what loads or runs it."""

    @property
    def extra(self) -> str | None:
        """The extra to install for it ("onnx"), None where the base install will do."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What `ExportOptions.dtype` may be; () where it cannot be chosen."""

    def default_path(self, source: Path) -> Path:
        """Where the artefact goes when the user does not say."""

    def write(self, job: Job, out: Path) -> Written:
        """Write the artefact: a file or a folder at `out`, or a file and others beside it that start with its name.

        `out` lies in an empty scratch folder and has the final name; what is beside it moves with it, and all of it is
        removed if anything is raised. The caller has checked `options.dtype` and that the checkpoint is final, and
        verifies the artefact afterwards: every pattern of `layers` whose `pattern` is not "", and every tensor against
        the checkpoint.

        Raises:
            UsageError: if this checkpoint cannot be exported so, or the extra is not installed.
            VerificationError: if a comparison fails.
        """
