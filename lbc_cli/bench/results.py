"""What an inference bench measures, and what it gives back.

As JSON (schema 2, `InferenceBench.as_dict`; times in seconds, sizes in bytes, rates in operations per second):

    schema, source, pattern, device, dtype, image_size, folded, executors
    measured_peak, peak_source, permuted_peak   as in `machine.Peak`; null if nothing was measured
    environment   versions, hardware, clocks before and after; of a CPU, what it has for bfloat16
    notes         what a reader must know
    batches       a row for each batch and, on a CPU, number of threads: [{batch, threads, difference, sides:
                  {dense|sparse|dense bf16: {mode, quartiles, images_per_second, peak_bytes, weight_bytes,
                  modes: {way: [q1, median, q3]}, dtype}}, speedup, spread, bf16_over_sparse}]; the ways are eager and
                  compiled on a GPU, and those of `ways` on a CPU
    layers_at     {batch, threads} of `layers`
    layers        [{name, shape, pattern, variant, reason, operations, moved_bytes, times: {variant: [q1, median, q3]},
                  rivals: {way: [q1, median, q3]}, density, speedup, achieved, share_of_peak, rates: {dense, sparse,
                  done}}]; rivals are other ways to run the layer densely, as in `dense_layers`
    verdict       where sparse pays here, in words
    estimate      {im2col|fused: as in `roofline`}, at the largest batch: convolutions as 2:4 kernels can run them
                  today, and as a fused implicit GEMM would; empty unless asked for. Estimates, never measurements

Schema 1 had a row per batch, the model's own dense execution alone, and no bfloat16 beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lbc_cli.bench.machine import Peak, core_count
from lbc_cli.bench.roofline import Estimate
from lbc_cli.errors import UsageError
from lbc_cli.runtime.executors import DENSE
from lbc_cli.runtime.trace import Shape
from lbc_cli.runtime.tune import Plan

SCHEMA = 2
MODES = ("eager", "compiled")
ONNXRUNTIME = "onnxruntime"
CPU_MODES = (*MODES, ONNXRUNTIME)
NCHW, NHWC, PACKED, COMPILED = "eager NCHW", "eager NHWC", "packed", "compiled"
SLICED = " sliced"
CPU_WAYS = (NCHW, NHWC, PACKED, COMPILED, COMPILED + SLICED, ONNXRUNTIME, ONNXRUNTIME + SLICED)
"""To run a whole model on a CPU, as in `ways`."""
BF16 = "dense bf16"
"""The side that stands beside a comparison in another dtype on a CPU."""
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
        threads: on a CPU, each measured with every batch; (): one, and all that torch is set to use.
        image_size: side in pixels; 0: the model's own.
        modes: of MODES, on a CPU of CPU_MODES; the best one counts, on both sides.
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
    threads: tuple[int, ...] = ()
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
        known = MODES if self.device.type == "cuda" else CPU_MODES
        if not set(self.modes) & set(MODES) or set(self.modes) - set(known):
            beside = "" if known is MODES else f", {ONNXRUNTIME} beside them"
            raise UsageError(f"modes = {list(self.modes)}: some of {', '.join(MODES)} are needed{beside}")
        if self.dtype not in TOLERANCE:
            raise UsageError(f"dtype {self.dtype}: one of {', '.join(str(name) for name in TOLERANCE)}")
        if self.threads:
            self._check_threads()

    def _check_threads(self) -> None:
        cores = core_count()
        if self.device.type != "cpu":
            raise UsageError(f"threads = {list(self.threads)}: they are a CPU's, and {self.device} is none")
        if min(self.threads) < 1 or max(self.threads) > cores:
            raise UsageError(
                f"threads = {list(self.threads)}: from 1 to {cores}, the number of cores that this process may use"
            )

    def thread_counts(self) -> tuple[int | None, ...]:
        """What every batch is measured with; (None,) on a GPU."""
        if self.device.type != "cpu":
            return (None,)
        return tuple(dict.fromkeys(self.threads or (1, min(torch.get_num_threads(), core_count()))))


@dataclass(frozen=True, slots=True)
class Side:
    """The best way to run the whole model on one side of a comparison, at one batch."""

    mode: str
    """The fastest of `modes`."""
    quartiles: Quartiles
    images_per_second: float
    peak_bytes: int | None
    """Of the device, above what was there before the call; None where it is not known."""
    weight_bytes: int
    modes: Mapping[str, Quartiles]
    """Every way that was timed."""
    dtype: str
    """Of weights and activations."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One batch size; `sparse` is missing from `sides` where no kernel is there."""

    batch: int
    difference: float | None
    """Largest difference between outputs of one dtype, relative to the largest logit; None of a single way."""
    sides: Mapping[str, Side]
    threads: int | None = None
    """Of a CPU."""

    @property
    def speedup(self) -> float | None:
        """Median of dense over median of sparse."""
        return self.ratio("dense", "sparse")

    @property
    def bf16_over_sparse(self) -> float | None:
        """Median of sparse over median of dense in bfloat16: above 1 where the latter is faster."""
        return self.ratio("sparse", BF16)

    @property
    def spread(self) -> float:
        """Half the distance between quartiles, relative to the median: the larger of dense and sparse."""
        return self.spread_of("dense", "sparse")

    def ratio(self, slow: str, fast: str) -> float | None:
        """Median of one side over that of another; None where one of them was not measured."""
        if slow not in self.sides or fast not in self.sides:
            return None
        return self.sides[slow].quartiles[1] / self.sides[fast].quartiles[1]

    def spread_of(self, *names: str) -> float:
        """The larger spread of those of these sides that were measured."""
        found = [self.sides[name].quartiles for name in names if name in self.sides]
        return max(((high - low) / 2 / median for low, median, high in found), default=0.0)


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer at one batch and number of threads, all of its calls together."""

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
    """Of "dense", which is what runs in the model, and of every sparse variant."""
    rivals: Mapping[str, Quartiles] = field(default_factory=dict)
    """Of other ways to run it densely."""
    density: float = 1.0
    """Share of the weights that the pattern keeps."""

    @property
    def best_dense(self) -> tuple[str, Quartiles]:
        """The fastest dense way and its times."""
        ways = {DENSE: self.times[DENSE], **self.rivals}
        return min(ways.items(), key=lambda way: way[1][1])

    @property
    def best_sparse(self) -> tuple[str, Quartiles] | None:
        """The fastest sparse variant and its times; None where there is none."""
        sparse = [way for way in self.times.items() if way[0] != DENSE]
        return min(sparse, key=lambda way: way[1][1], default=None)

    @property
    def speedup(self) -> float | None:
        """The fastest dense way over the fastest sparse variant; None where there is none."""
        sparse = self.best_sparse
        return None if sparse is None else self.best_dense[1][1] / sparse[1][1]

    def achieved(self) -> float:
        """Dense operations per second in the time of the variant that runs."""
        return self.operations / self.times.get(self.variant, self.times[DENSE])[1]

    def rates(self) -> dict[str, float | None]:
        """Operations per second: of dense at its fastest; of sparse, counted as dense's; of sparse, done in fact."""
        sparse = self.best_sparse
        counted = None if sparse is None else self.operations / sparse[1][1]
        done = None if counted is None else counted * self.density
        return {"dense": self.operations / self.best_dense[1][1], "sparse": counted, "done": done}


@dataclass(frozen=True, slots=True)
class InferenceBench:
    """Everything that was measured."""

    setup: InferenceSetup
    pattern: str
    """What the sparse weights hold, as they are: of a file, what the file says."""
    image_size: tuple[int, int]
    folded: int
    executors: tuple[str, ...]
    peak: Peak | None
    """What the machine can do; None if nothing was measured."""
    environment: Mapping[str, Any]
    batches: tuple[BatchResult, ...]
    layers: tuple[LayerResult, ...]
    notes: tuple[str, ...]
    verdict: str
    layers_at: tuple[int, int | None] | None = None
    """Batch and threads of `layers`."""
    plans: tuple[Plan, ...] = ()
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """By the form of convolutions: "im2col" and "fused"."""

    def share_of_peak(self, layer: LayerResult) -> float | None:
        """What a layer achieves of the peak, in dense operations: above 1 only sparse ones can be."""
        return self.peak.share(layer.achieved()) if self.peak else None

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
            "measured_peak": self.peak.operations if self.peak else None,
            "peak_source": self.peak.source if self.peak else None,
            "permuted_peak": self.peak.permuted if self.peak else None,
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "batches": [_row(result) for result in self.batches],
            "layers_at": dict(zip(("batch", "threads"), self.layers_at, strict=True)) if self.layers_at else None,
            "layers": [self._layer(layer) for layer in self.layers],
            "verdict": self.verdict,
            "estimate": {form: estimated.record() for form, estimated in self.estimates.items()},
        }

    def _layer(self, layer: LayerResult) -> dict[str, Any]:
        return {
            **dataclasses.asdict(layer),
            "speedup": layer.speedup,
            "achieved": layer.achieved(),
            "share_of_peak": self.share_of_peak(layer),
            "rates": layer.rates(),
        }


def _row(result: BatchResult) -> dict[str, Any]:
    derived = {"speedup": result.speedup, "spread": result.spread, "bf16_over_sparse": result.bf16_over_sparse}
    return {**dataclasses.asdict(result), **derived}
