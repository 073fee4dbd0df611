"""Estimates for GPUs that are not at hand: what a datasheet allows a model, layer by layer and end to end.

No measurement: `datasheets` gives rates, `work` what each layer computes and moves, and a product takes as long as the
longer of its two parts at full rate, after the copies that come before it:

    seconds = copies / bandwidth + max(operations / peak, bytes / bandwidth)

Whatever is no linear or convolution layer comes from `operators` and takes the same time dense and sparse. There are
three scopes end to end: "layers" (linear and convolution layers only), "products" (and attention, all else fused away)
and "all" (every other operator a pass through memory, as in eager execution).

Not counted: launches (they dominate at batch 1), caches (small layers may never reach memory), tiles that do not divide
the work, clocks below boost, epilogues. Kernels reach different shares of peak, sparse ones mostly smaller ones: the
speed-ups are estimates of what the hardware allows, not predictions.

`Estimate.record()` is the JSON form. Times are in seconds, traffic in bytes, rates per second; a multiply-add is two
operations. Every figure that is estimated has a key that begins with `estimate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lbc_cli.bench.datasheets import SPARSE_PEAK, Gpu, find_gpu
from lbc_cli.bench.operators import Operator
from lbc_cli.bench.work import (
    Form,
    Work,
    obstacle_24,
    obstacle_vector,
    work_24,
    work_dense,
    work_vector,
)
from lbc_cli.errors import UsageError
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.trace import Shape

Scope = Literal["layers", "products", "all"]
NOTE = "an estimate from datasheet peaks and bandwidths, not a measurement: kernels, launches and clocks will differ"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to execute a layer, all of its calls together.

    Attributes:
        operations: as `Work` has them.
        bytes: moved and copied.
        estimate_seconds: estimated time.
        bound: what the estimate hangs on.
    """

    operations: int
    bytes: int
    estimate_seconds: float
    bound: Literal["compute", "memory"]


@dataclass(frozen=True, slots=True)
class LayerEstimate:
    """A layer's estimates.

    Attributes:
        pattern: what its weight holds, None: nothing.
        dense: executed densely.
        ways: "2:4" and "vector", where possible; empty if neither is.
        reason: why `ways` is empty, "" if it is not.
    """

    name: str
    shape: Shape
    pattern: str | None
    dense: Way
    ways: Mapping[str, Way]
    reason: str

    @property
    def sparse(self) -> Way:
        """The sparse way with the shortest estimate, dense if there is none."""
        return min(self.ways.values(), key=lambda way: way.estimate_seconds, default=self.dense)

    @property
    def best(self) -> Way:
        """The way with the shortest estimate, dense or sparse."""
        return min(self.dense, self.sparse, key=lambda way: way.estimate_seconds)

    @property
    def estimate_speedup(self) -> float:
        """Dense over the best sparse way, estimated; 1 for layers that stay dense or are not called."""
        return _ratio(self.dense.estimate_seconds, self.sparse.estimate_seconds)


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Estimated seconds of a whole batch.

    Attributes:
        scope: what is counted besides linear and convolution layers.
        estimate_dense_seconds: every layer dense.
        estimate_sparse_seconds: every layer that can be is sparse.
        estimate_best_seconds: for every layer the shorter estimate.
    """

    scope: Scope
    estimate_dense_seconds: float
    estimate_sparse_seconds: float
    estimate_best_seconds: float

    @property
    def estimate_sparse_speedup(self) -> float:
        """Dense over sparse, estimated."""
        return _ratio(self.estimate_dense_seconds, self.estimate_sparse_seconds)

    @property
    def estimate_best_speedup(self) -> float:
        """Dense over the best choice per layer, estimated; at least 1."""
        return _ratio(self.estimate_dense_seconds, self.estimate_best_seconds)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A model on a GPU, on paper.

    Attributes:
        layers: in the model's order.
        others: operators that are no such layers; () if they were not counted: then there is one scope, "layers".
    """

    gpu: Gpu
    batch: int
    dtype: torch.dtype
    form: Form
    layers: tuple[LayerEstimate, ...]
    others: tuple[Operator, ...]

    def end_to_end(self) -> tuple[EndToEnd, ...]:
        """Estimates of the whole model, one for each scope, the narrowest first."""
        scopes: tuple[Scope, ...] = get_args(Scope) if self.others else ("layers",)
        return tuple(self._total(scope) for scope in scopes)

    def _total(self, scope: Scope) -> EndToEnd:
        beside = sum(self._operator_seconds(other) for other in self.others if _counts(other, scope))
        dense, sparse, best = (
            sum(way.estimate_seconds for way in ways) + beside
            for ways in zip(*((layer.dense, layer.sparse, layer.best) for layer in self.layers), strict=True)
        )
        return EndToEnd(scope, dense, sparse, best)

    def _operator_seconds(self, operator: Operator) -> float:
        # What runs between int8 products runs in a floating-point type; attention has its 16-bit products there.
        dtype = self.dtype if self.dtype.is_floating_point else torch.bfloat16
        return Work(operator.operations, operator.moved).estimate_seconds(self.gpu, dtype)

    def record(self) -> dict[str, Any]:
        """The estimate for JSON; every figure that is estimated has a key that says so."""
        return {
            "estimate_note": NOTE,
            "estimate_gpu": self.gpu.product,
            "estimate_source": self.gpu.source,
            "estimate_peak_flops": self.gpu.peak(self.dtype),
            "estimate_sparse_peak_flops": SPARSE_PEAK * self.gpu.peak(self.dtype),
            "estimate_bandwidth": self.gpu.bandwidth,
            "estimate_form": self.form,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "estimate_layers": [_layer_record(layer) for layer in self.layers],
            "estimate_end_to_end": [self._total_record(total) for total in self.end_to_end()],
        }

    def _total_record(self, total: EndToEnd) -> dict[str, Any]:
        return {
            "scope": total.scope,
            "estimate_dense_seconds": total.estimate_dense_seconds,
            "estimate_sparse_seconds": total.estimate_sparse_seconds,
            "estimate_best_seconds": total.estimate_best_seconds,
            "estimate_sparse_speedup": total.estimate_sparse_speedup,
            "estimate_best_speedup": total.estimate_best_speedup,
            "estimate_dense_images_per_second": _ratio(self.batch, total.estimate_dense_seconds),
            "estimate_best_images_per_second": _ratio(self.batch, total.estimate_best_seconds),
        }


def estimate(
    layers: Sequence[Layer],
    gpu: str,
    batch: int,
    dtype: torch.dtype,
    *,
    form: Form = "im2col",
    others: Sequence[Operator] = (),
) -> Estimate:
    """Estimate a model's layers on a GPU from its datasheet.

    Only shapes count, so that models on the "meta" device will do. Weights are looked at where a pattern does not imply
    2:4 and there is something to look at.

    Args:
        layers: from a trace of one image; the first dimension of every input and result is multiplied by `batch`, also
            of the few that do not grow with it, such as tables of relative positions.
        gpu: a key of `datasheets.GPUS`.
        batch: images.
        dtype: of weights and activations, results in int8 included.
        form: what sparse kernels do beside the product.
        others: from `other_operators`, for the same batch and type (for int8: in the type used between layers).

    Raises:
        UsageError: for an unknown GPU, type or form, a batch below 1, or a model without layers.
    """
    card = find_gpu(gpu)
    card.peak(dtype)
    if form not in get_args(Form):
        raise UsageError(f"form = {form!r}: one of {', '.join(get_args(Form))}")
    if batch < 1 or not layers:
        raise UsageError(f"nothing to estimate: {len(layers)} layers, batch {batch}; both must be at least 1")
    rows = tuple(_layer_estimate(layer, card, batch, dtype, form) for layer in layers)
    return Estimate(card, batch, dtype, form, rows, tuple(others))


def _layer_estimate(layer: Layer, gpu: Gpu, batch: int, dtype: torch.dtype, form: Form) -> LayerEstimate:
    calls = list(_calls(layer, batch))
    ways, obstacles = {}, []
    for name, why_not, work in (
        ("2:4", obstacle_24(layer, dtype), work_24),
        ("vector", obstacle_vector(layer), work_vector),
    ):
        if why_not:
            obstacles.append(why_not)
        else:
            ways[name] = _way([work(layer, *call, dtype, form) for call in calls], gpu, dtype)
    dense = _way([work_dense(layer, *call, dtype) for call in calls], gpu, dtype)
    reason = "" if ways else "; ".join(dict.fromkeys(obstacles))
    return LayerEstimate(layer.name, layer.shape, str(layer.pattern) if layer.pattern else None, dense, ways, reason)


def _calls(layer: Layer, batch: int) -> Iterator[tuple[Shape, Shape]]:
    """Shapes of input and result of every call, for a batch."""
    for inputs, outputs in zip(layer.inputs, layer.outputs, strict=True):
        yield (batch * inputs[0], *inputs[1:]), (batch * outputs[0], *outputs[1:])


def _way(works: Sequence[Work], gpu: Gpu, dtype: torch.dtype) -> Way:
    seconds = computing = 0.0
    for work in works:
        seconds += work.estimate_seconds(gpu, dtype)
        compute = work.compute_seconds(gpu, dtype)
        computing += compute if compute >= work.memory_seconds(gpu) else 0.0
    traffic = sum(work.moved + work.copied for work in works)
    bound: Literal["compute", "memory"] = "compute" if 2 * computing >= seconds else "memory"
    return Way(sum(work.operations for work in works), traffic, seconds, bound)


def _counts(operator: Operator, scope: Scope) -> bool:
    return scope == "all" or (scope == "products" and operator.operations > 0)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 1.0


def _way_record(way: Way) -> dict[str, Any]:
    return {
        "estimate_operations": way.operations,
        "estimate_bytes": way.bytes,
        "estimate_seconds": way.estimate_seconds,
        "estimate_bound": way.bound,
    }


def _layer_record(layer: LayerEstimate) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "pattern": layer.pattern,
        "reason": layer.reason,
        "estimate_dense": _way_record(layer.dense),
        "estimate_ways": {name: _way_record(way) for name, way in layer.ways.items()},
        "estimate_speedup": layer.estimate_speedup,
    }
