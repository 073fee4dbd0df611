"""The ways to run a whole model on a CPU, each a call without arguments.

eager NCHW, eager NHWC   torch as it is, in both layouts
packed                   all that models with sparse layers get too: eager NHWC with weights packed once for oneDNN,
                         ReLUs in the layers before them, large batches in slices that fit the cache
compiled                 torch.compile with frozen weights; of the faster eager layout
onnxruntime              as in `onnx_graphs`, float32
... sliced               the same over slices of the batch, where it is larger than what the cache takes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lbc_cli.bench.compiling import compiled_call
from lbc_cli.bench.notes import Notes, reason_of
from lbc_cli.bench.onnx_graphs import Graphs, session_call, why_no_onnxruntime
from lbc_cli.bench.results import COMPILED, NCHW, NHWC, ONNXRUNTIME, PACKED, SLICED
from lbc_cli.bench.sides import weight_bytes
from lbc_cli.bench.turns import settle
from lbc_cli.runtime.clock import interleaved
from lbc_cli.runtime.cpu_dense import PackedLayer, pack_dense_layers
from lbc_cli.runtime.fuse import fuse
from lbc_cli.runtime.prepare import Prepared
from lbc_cli.runtime.slices import images_at_once, sliced

CPU = torch.device("cpu")
Run = Callable[[], Tensor]


@dataclass(slots=True)
class Ways:
    """One side of a comparison: the same weights in one dtype, run in several ways.

    Attributes:
        dtype: of weights and activations.
        weights: their bytes.
        runs: by the name of the way.
        models: of the eager ways, with the images in their layout.
        outputs: of the ways that have been run.
    """

    dtype: torch.dtype
    weights: int
    runs: dict[str, Run] = field(default_factory=dict)
    models: dict[str, tuple[nn.Module, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, model: nn.Module, images: Tensor) -> None:
        """Add an eager way."""
        self.runs[name], self.models[name] = partial(model, images), (model, images)

    def run_new(self) -> None:
        """Run what has not been run yet."""
        for name, run in self.runs.items():
            if name not in self.outputs:
                self.outputs[name] = run().clone()


def mode_of(way: str) -> str:
    """Which of the modes that can be asked for a way belongs to."""
    return next((mode for mode in (COMPILED, ONNXRUNTIME) if way.startswith(mode)), "eager")


def dense_ways(prepared: Prepared, images: Tensor, notes: Notes, place: str) -> Ways:
    """A dense side with its ways that are channels last and eager.

    Args:
        prepared: the model.
        images: channels last, in the dtype to compute in.
        notes: told if weights cannot be packed.
        place: side and row, for notes.
    """
    model = prepared.dense(dtype=images.dtype, device=CPU)
    ways = Ways(images.dtype, weight_bytes(model))
    ways.add(NHWC, model, images)
    try:
        ways.add(PACKED, packed_model(prepared, images.dtype), images)
        ways.runs[PACKED]()
    except (RuntimeError, AttributeError) as error:  # operators of torch that are not documented
        notes.add(f"{PACKED} is left out: {reason_of(error)}", place)
        ways.runs.pop(PACKED, None)
        ways.models.pop(PACKED, None)
    return ways


def packed_model(prepared: Prepared, dtype: torch.dtype) -> nn.Module:
    """The model densely, with everything that `Prepared.sparse` does beside sparse layers.

    Raises:
        RuntimeError: if no weight can be packed.
    """
    model = prepared.dense(dtype=dtype, device=CPU)
    pack_dense_layers(model, [name for name, use in prepared.seen.uses.items() if use.calls])
    if not any(isinstance(module, PackedLayer) for module in model.modules()):
        raise RuntimeError("oneDNN packs none of its weights")
    model, _ = fuse(model, prepared.sample.to(dtype))
    return sliced(model, prepared.seen, prepared.sample)


def add_contiguous(ways: Ways, prepared: Prepared) -> None:
    """Add the other eager layout."""
    images = ways.models[NHWC][1].contiguous()
    plain = prepared.dense(dtype=ways.dtype, device=CPU).to(memory_format=torch.contiguous_format)
    ways.add(NCHW, plain, images)


def add_onnxruntime(ways: Ways, graphs: Graphs, at_once: int, notes: Notes, place: str) -> None:
    """Add onnxruntime, of a side that has `NCHW`.

    Args:
        ways: to add to.
        graphs: of its model.
        at_once: images of a slice; as many as there are: none.
        notes: told why, where it cannot be run.
        place: side and row, for notes.
    """
    model, images = ways.models[NCHW]
    try:
        if reason := why_no_onnxruntime(ways.dtype):
            raise RuntimeError(reason)
        shape = tuple(model(images).shape)
        for size in dict.fromkeys((len(images), at_once)):
            name = ONNXRUNTIME if size == len(images) else f"{ONNXRUNTIME}{SLICED}"
            file = graphs.file(images[:size])
            ways.runs[name] = session_call(file, images, shape, torch.get_num_threads(), at_once=size)
    except RuntimeError as error:
        notes.add(f"{ONNXRUNTIME} is left out: {reason_of(error)}", place)


def add_compiled(ways: Ways, layout: str, at_once: int, notes: Notes, place: str) -> None:
    """Add compiled ways of an eager one; arguments as for `add_onnxruntime`."""
    model, images = ways.models[layout]
    try:
        for size in dict.fromkeys((len(images), at_once)):
            name = COMPILED if size == len(images) else f"{COMPILED}{SLICED}"
            ways.runs[name] = compiled_call(model, images, at_once=size)
    except RuntimeError as error:
        notes.add(f"{COMPILED} is left out: {reason_of(error)}", place)


def faster_layout(ways: Ways) -> str:
    """The faster one of two eager layouts, by a few calls."""
    settle()  # onnxruntime may have run just before
    times = interleaved({name: ways.runs[name] for name in (NCHW, NHWC)}, CPU, rounds=3, warmup=1)
    return min(times, key=lambda name: times[name].median)


def slice_size(prepared: Prepared, batch: int) -> int:
    """Images of a slice for dense ways: the largest equal slices of a batch that the cache takes."""
    most = min(batch, images_at_once(prepared.seen, len(prepared.sample)))
    return next(size for size in range(most, 0, -1) if batch % size == 0)
