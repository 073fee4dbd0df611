"""What a verification has found. Nothing here reads a file or imports torch.

`Report.as_dict` is what `lbc verify --json` prints; `schema` changes when a member changes its meaning, not when one is
added. Version 1:

    schema    1
    ok        whether no finding is an error
    path      the artefact
    kind      "packed" (a checkpoint of lbc), "dense" (any other safetensors file), "folder" (timm's), "onnx",
              "semi-structured" (an export of lbc), null where the container is too damaged to tell
    phase     "final" or "training", null where the file does not say
    method    how it was pruned, null where the file does not say
    digest    SHA-256 of the manifest, null where there is none
    transposable  whether the patterns were checked along the output channels too: asked, or claimed by the checkpoint
    findings  list of {rule, tensor, message, count, level: "error" | "warning", groups}; tensor is "" for the file as a
              whole, groups lists the first violating groups: {number, outputs: [first, last], kernel: [...],
              inputs: [first, last], used, values: [one line for each output channel]}
    layers    list of {name, shape, pattern, density, groups, under_filled}: tensors whose groups were all checked
    counted   list of {name, shape, density, nonzeros, claimed}: weights pruned without a pattern, whose non-zeros the
              manifest gives
    dense     list of {name, why, shape}: weights of which no pattern is asked
    model     null, or {name, kwargs, parameters}: the timm model that names and shapes were compared with
    against   null, or {path, kind, tensors, equal, rounded, different, missing, extra, digest}: the other artefact;
              counts of tensors, and the SHA-256 of all weights, null unless both hold the same
    accuracy  null, or {top1, top5, n, data, pixels}: measured, in percent, over n images made into these pixels
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1
GROUPS_SHOWN = 5
"""How many violating groups of a tensor a finding lists; all are counted."""

Kind = Literal["packed", "dense", "folder", "onnx", "semi-structured"]


@dataclass(frozen=True, slots=True)
class Violation:
    """A group that breaks its pattern."""

    number: int
    """Of the group in its tensor, in the order (o, k, i)."""
    outputs: tuple[int, int]
    """First and last output channel."""
    kernel: tuple[int, ...]
    inputs: tuple[int, int]
    """First and last input channel."""
    used: int
    """Positions in use."""
    values: tuple[str, ...] = ()
    """The weights of each output channel, as text."""

    @property
    def place(self) -> str:
        """Where it is, as "(o=3, k=(1, 2), i=8..11)"."""
        first, last = self.outputs
        o = str(first) if first == last else f"{first}..{last}"
        return f"(o={o}, k={self.kernel}, i={self.inputs[0]}..{self.inputs[1]})"

    def __str__(self) -> str:
        listed = ", ".join(self.values[:4]) + (", ..." if len(self.values) > 4 else "")
        return f"group {self.place} uses {self.used} positions" + (f", {listed}" if listed else "")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or worth knowing."""

    rule: str
    """Which rule: "file", "digest", "positions", "padding", "pattern", "nan", "model", "against", ..."""
    tensor: str
    """The tensor that breaks it, "" for the file as a whole."""
    message: str
    """One line: where, the values met, the rule."""
    count: int = 1
    """How many groups or elements; the message shows the first."""
    level: Literal["error", "warning"] = "error"
    groups: tuple[Violation, ...] = ()
    """The first groups that violate a pattern."""


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
class CountedReport:
    """A tensor that was pruned without a pattern."""

    name: str
    shape: tuple[int, ...]
    density: float
    """Share of the weights that is not zero."""
    nonzeros: int
    claimed: int
    """Non-zeros according to the manifest."""


@dataclass(frozen=True, slots=True)
class DenseReport:
    """A tensor of two or more dimensions of which no pattern is asked."""

    name: str
    why: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Report:
    """Everything `verify` knows of one artefact."""

    path: str
    kind: Kind | None = None
    """None where the container is too damaged to tell."""
    phase: str | None = None
    """Either "final" or "training"; None where the file does not say."""
    method: str | None = None
    digest: str | None = None
    """SHA-256 of the manifest: it identifies the content of a checkpoint."""
    transposable: bool = False
    """The patterns are checked along the output channels too: that is asked, or the checkpoint claims it."""
    findings: list[Finding] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    counted: list[CountedReport] = field(default_factory=list)
    dense: list[DenseReport] = field(default_factory=list)
    model: dict[str, Any] | None = None
    """The timm model that names and shapes were compared with."""
    against: dict[str, Any] | None = None
    """What the comparison with another artefact counted."""
    accuracy: dict[str, Any] | None = None
    """What was measured on data."""

    def add(self, finding: Finding) -> None:
        """Note a finding; what breaks the same rule in the same tensor is counted with the first."""
        for number, known in enumerate(self.findings):
            if (known.rule, known.tensor, known.level) == (finding.rule, finding.tensor, finding.level):
                groups = (known.groups + finding.groups)[:GROUPS_SHOWN]
                self.findings[number] = dataclasses.replace(known, count=known.count + finding.count, groups=groups)
                return
        self.findings.append(finding)

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON's types, as the module describes them."""
        return {"schema": SCHEMA, "ok": self.ok, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """The report as JSON, keys sorted."""
        return json.dumps(self.as_dict(), sort_keys=True, indent=2, ensure_ascii=False)
