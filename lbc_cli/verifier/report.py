"""What a verification has found. Nothing here reads a file or imports torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or worth knowing."""

    rule: str
    """Which rule: "header", "manifest", "digest", "positions", "pattern", "nan", ..."""
    tensor: str
    """The tensor that breaks it, "" for the file as a whole."""
    message: str
    """One line: where, the values met, the rule."""
    count: int = 1
    """How many groups or elements; the message shows the first."""
    level: Literal["error", "warning"] = "error"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """A tensor whose groups were checked."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    """N:M, or N:M/V for vector-wise masks."""
    density: float
    """Share of the weights that is not zero."""
    groups: int
    under_filled: int
    """Groups that use fewer than N positions: allowed, but capacity that is not used."""


@dataclass(frozen=True, slots=True)
class DenseReport:
    """A tensor to which no pattern applies."""

    name: str
    why: str


@dataclass(slots=True)
class Report:
    """Everything `verify` knows of one file."""

    path: str
    kind: Literal["packed", "dense"] = "packed"
    """A checkpoint of lbc, or any other safetensors file."""
    phase: str | None = None
    """Either "final" or "training"; None where the file does not say."""
    method: str | None = None
    digest: str | None = None
    """SHA-256 of the manifest: it identifies the content of a checkpoint."""
    findings: list[Finding] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    dense: list[DenseReport] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Note a finding; what breaks the same rule in the same tensor is counted with the first."""
        for number, known in enumerate(self.findings):
            if (known.rule, known.tensor) == (finding.rule, finding.tensor):
                self.findings[number] = dataclasses.replace(known, count=known.count + finding.count)
                return
        self.findings.append(finding)

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON's types; `schema` changes when a member changes its meaning."""
        return {"schema": SCHEMA, "ok": self.ok, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """The report as JSON, keys sorted."""
        return json.dumps(self.as_dict(), sort_keys=True, indent=2, ensure_ascii=False)
