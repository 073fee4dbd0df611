"""What the tables show, as plain data that the command line fills in; JSON prints it as it is.

Shapes are [O, I, *K], densities shares of one, sizes bytes, times seconds, MACs multiply-adds per image. `None` is
"not known" or "not run", and is shown as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """A sparse layer."""

    name: str
    """Parameter name."""
    shape: tuple[int, ...]
    pattern: str
    """N:M or N:M/V, as applied to this layer; "" for an unstructured method."""
    density: float | None
    """Share kept: planned at the end (None: only training will tell), or measured now."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedView:
    """A layer that stays dense."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochView:
    """What the schedule says about an epoch."""

    epoch: int
    """Counted from 0."""
    density: float | None
    """At most, over all sparse layers; None where only training will tell."""
    survivors: Mapping[str, int]
    """Pattern -> candidates (or weights) alive per group."""
    lr: float
    """Learning rate at the first update of the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostView:
    """Savings on paper: counted, not measured."""

    parameters_dense: int
    parameters_sparse: int | None
    """Parameters that are not removed."""
    macs_dense: int | None = None
    macs_sparse: int | None = None
    training_share: float | None = None
    """Multiply-adds of the whole training, a teacher's included, over those of dense training."""
    training_macs: int | None = None
    """Multiply-adds of dense training on as many images."""
    teacher_share: float = 0.0
    """The teacher's part of `training_share`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """What a run would do."""

    title: str
    """Model, pattern and method."""
    facts: Mapping[str, str]
    """Label -> value: recipe, data, device, updates, run folder."""
    layers: Sequence[LayerView]
    skipped: Sequence[SkippedView]
    schedule: Sequence[EpochView]
    memory: Mapping[str, int]
    """Bytes the method adds at its peak: score, momentum, mask, candidates."""
    cost: CostView


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryView:
    """How a run ended."""

    title: str
    results: Mapping[str, float | None]
    """Metric -> value as in the epoch's record: top1 and top5 in percent, val_loss; ema_... for averaged weights."""
    layers: Sequence[LayerView]
    skipped: Sequence[SkippedView]
    memory: Mapping[str, int]
    cost: CostView
    dense_bytes: int | None
    """Size of the weights stored dense."""
    file_bytes: int | None
    """Size of the checkpoint as written."""
    times: Mapping[str, float]
    """What -> seconds: total, training, evaluation, ..."""
    verified: bool | None
    """None where the file was not verified."""
    findings: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """What -> path."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Label -> value: hardware, versions, seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedLayerView:
    """A sparse layer of a file, as the verifier saw it."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    density: float
    groups: int
    violations: int
    """Groups or elements with an error."""
    under_filled: int = 0
    """Groups that keep fewer than the pattern allows: valid, but capacity that is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedLayerView:
    """A layer of a file that was pruned without a pattern, as the verifier saw it."""

    name: str
    shape: tuple[int, ...]
    density: float
    nonzeros: int
    claimed: int
    """Non-zeros that the file claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViolationView:
    """A group that breaks its pattern."""

    layer: str
    place: str
    """As "(o=3, k=(1, 2), i=8..11)"."""
    group: int
    """Its number in the layer, in the order (o, k, i)."""
    used: int
    """Positions in use."""
    values: str
    """The group's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyView:
    """What the verifier says about a file."""

    path: str
    ok: bool
    layers: Sequence[CheckedLayerView]
    findings: Sequence[str]
    """What is wrong, one line each."""
    warnings: Sequence[str] = ()
    """What is worth knowing, one line each."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Label -> value: format, method, phase, digest."""
    counted: Sequence[CountedLayerView] = ()
    """Layers that were pruned without a pattern."""
    skipped: Sequence[SkippedView] = ()
    """Weights of which no pattern is asked."""
    violations: Sequence[ViolationView] = ()
    """The first violating groups of each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """Times of one kind of training step."""

    name: str
    """"dense", or method and pattern."""
    median: float
    """Seconds."""
    first_quartile: float
    third_quartile: float
    peak_bytes: int | None = None
    """Peak memory; None where it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBenchView:
    """Measured: a dense training step beside a method's."""

    title: str
    images: int
    """Per step."""
    steps: int
    """Timed steps of each kind, interleaved."""
    dense: StepTiming
    method: StepTiming
    hooks: float
    """Median seconds per step spent in the method's hooks."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Label -> value: hardware, versions, settings."""

    @property
    def overhead(self) -> float:
        """By how much the method's median step is longer, as a share of the dense one."""
        return self.method.median / self.dense.median - 1

    @property
    def hooks_share(self) -> float:
        """Time in the hooks over the time of a dense step."""
        return self.hooks / self.dense.median
