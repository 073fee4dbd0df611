"""What an inference bench measures, and what it gives back.

As JSON (schema 1, `InferenceBench.as_dict`; times in seconds, sizes in bytes):

    schema, source, pattern, device, dtype, image_size, folded, executors, measured_peak
    environment   versions, hardware, clocks before and after
    notes         what a reader must know
    batches       [{batch, difference, sides: {dense|sparse: {mode, quartiles, images_per_second, peak_bytes,
                  weight_bytes, modes: {eager|compiled: [q1, median, q3]}}}, speedup, spread}]
    layers        [{name, shape, pattern, variant, reason, operations, moved_bytes, times: {variant: [q1, median, q3]},
                  speedup, achieved, share_of_peak}], at the largest batch
    verdict       where sparse pays here, in words
    estimate      {im2col|fused: as in `roofline`}, at the largest batch: convolutions as 2:4 kernels can run them
                  today, and as a fused implicit GEMM would; empty unless asked for. Estimates, never measurements
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lbc_cli.bench.roofline import Estimate
from lbc_cli.errors import UsageError
from lbc_cli.runtime.executors import DENSE
from lbc_cli.runtime.trace import Shape
from lbc_cli.runtime.tune import Plan

SCHEMA = 1
MODES = ("eager", "compiled")
Quartiles = tuple[float, float, float]
# Largest difference of the outputs, relative to the largest logit, by the dtype that both sides compute in.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSetup:
    """What is measured.

    Attributes:
        source: a file, or a timm name (random weights, magnitude masks).
        pattern: of a timm name's masks.
        runtime: whose kernels compete with dense; None: all that run here.
        dtype: of weights and activations.
        batches: images at once, each measured.
        image_size: side in pixels; 0: the model's own.
        modes: of MODES; the better one counts, on both sides.
        rounds: timed calls of each candidate.
        seconds: no further round of a candidate after that time.
        per_layer: time every layer too, and take the fastest way for each.
        estimate: a GPU of `datasheets` whose roofline is put beside, "" for none.
        measure: False: only the estimate.
    """

    source: str
    pattern: str = "2:4"
    runtime: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batches: tuple[int, ...] = (1,)
    image_size: int = 0
    modes: tuple[str, ...] = ("eager",)
    rounds: int = 20
    seconds: float = 2.0
    per_layer: bool = True
    estimate: str = ""
    measure: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UsageError: naming the option.
        """
        if not self.batches or min(self.batches) < 1:
            raise UsageError(f"batches = {list(self.batches)}: at least one batch of at least one image is needed")
        if not self.modes or set(self.modes) - set(MODES):
            raise UsageError(f"modes = {list(self.modes)}: some of {', '.join(MODES)} are needed")
        if self.dtype not in TOLERANCE:
            raise UsageError(f"dtype {self.dtype}: one of {', '.join(str(name) for name in TOLERANCE)}")


@dataclass(frozen=True, slots=True)
class Side:
    """One way to run the whole model, at one batch."""

    mode: str
    """The better of `modes`."""
    quartiles: Quartiles
    images_per_second: float
    peak_bytes: int | None
    """Of the device, above what was there before the call; None where it is not known."""
    weight_bytes: int
    modes: Mapping[str, Quartiles]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One batch size; `sparse` is missing from `sides` where no kernel is there."""

    batch: int
    difference: float | None
    """Largest difference of the outputs, relative to the largest logit."""
    sides: Mapping[str, Side]

    @property
    def speedup(self) -> float | None:
        """Median of dense over median of sparse."""
        if "sparse" not in self.sides:
            return None
        return self.sides["dense"].quartiles[1] / self.sides["sparse"].quartiles[1]

    @property
    def spread(self) -> float:
        """Half the distance between quartiles, relative to the median: the larger of both sides."""
        return max((side.quartiles[2] - side.quartiles[0]) / 2 / side.quartiles[1] for side in self.sides.values())


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer at the largest batch, all of its calls together."""

    name: str
    shape: Shape
    pattern: str
    variant: str
    reason: str
    operations: int
    """Of the dense product: multiplications and additions."""
    moved_bytes: int
    """Weights, inputs and outputs of the dense product, once each."""
    times: Mapping[str, Quartiles]

    @property
    def speedup(self) -> float | None:
        """Dense over the fastest sparse variant; None where there is none."""
        sparse = [times[1] for name, times in self.times.items() if name != DENSE]
        return self.times[DENSE][1] / min(sparse) if sparse else None

    def achieved(self) -> float:
        """Dense operations per second in the time of the variant that runs."""
        return self.operations / self.times.get(self.variant, self.times[DENSE])[1]


@dataclass(frozen=True, slots=True)
class InferenceBench:
    """Everything that was measured."""

    setup: InferenceSetup
    pattern: str
    """What the sparse weights hold, as they are: of a file, what the file says."""
    image_size: tuple[int, int]
    folded: int
    executors: tuple[str, ...]
    measured_peak: float | None
    """Operations per second of a large dense matrix product here; None if nothing was measured."""
    environment: Mapping[str, Any]
    batches: tuple[BatchResult, ...]
    layers: tuple[LayerResult, ...]
    notes: tuple[str, ...]
    verdict: str
    plans: tuple[Plan, ...] = ()
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """By the form of convolutions: "im2col" and "fused"."""

    def share_of_peak(self, layer: LayerResult) -> float | None:
        """What a layer achieves of the measured peak, in dense operations: above 1 only sparse ones can be."""
        return layer.achieved() / self.measured_peak if self.measured_peak else None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON's types; see the head of this module."""
        return {
            "schema": SCHEMA,
            "source": self.setup.source,
            "pattern": self.pattern,
            "device": str(self.setup.device),
            "dtype": str(self.setup.dtype).removeprefix("torch."),
            "image_size": list(self.image_size),
            "folded": self.folded,
            "executors": list(self.executors),
            "measured_peak": self.measured_peak,
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "batches": [
                {**dataclasses.asdict(result), "speedup": result.speedup, "spread": result.spread}
                for result in self.batches
            ],
            "layers": [
                {
                    **dataclasses.asdict(layer),
                    "speedup": layer.speedup,
                    "achieved": layer.achieved(),
                    "share_of_peak": self.share_of_peak(layer),
                }
                for layer in self.layers
            ],
            "verdict": self.verdict,
            "estimate": {form: estimated.record() for form, estimated in self.estimates.items()},
        }
