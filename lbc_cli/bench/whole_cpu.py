"""A whole model on a CPU: sparse beside every way of `ways` to run it densely, and dense bfloat16 beside both.

The fastest of them is dense. Sparse runs channels last, eager and compiled; bfloat16 in every way that has no other
layout, on images that are bfloat16 already. All have the same weights, batch norms folded. Nothing is timed before its
outputs were compared; all is timed in one run, in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbc_cli.bench.notes import Notes
from lbc_cli.bench.onnx_graphs import Graphs
from lbc_cli.bench.results import (
    BF16,
    COMPILED,
    CPU_WAYS,
    NHWC,
    ONNXRUNTIME,
    PACKED,
    TOLERANCE,
    BatchResult,
    InferenceSetup,
    Side,
)
from lbc_cli.bench.sides import check_agreement, difference_of, side_of, weight_bytes
from lbc_cli.bench.turns import in_turns
from lbc_cli.bench.verdict import row_name
from lbc_cli.bench.ways import (
    CPU,
    Ways,
    add_compiled,
    add_contiguous,
    add_onnxruntime,
    dense_ways,
    faster_layout,
    mode_of,
    slice_size,
)
from lbc_cli.errors import UsageError
from lbc_cli.runtime.clock import Times
from lbc_cli.runtime.convert import Executed
from lbc_cli.runtime.cpu_dense import packs
from lbc_cli.runtime.executors import Executor
from lbc_cli.runtime.fuse import fusion
from lbc_cli.runtime.prepare import Prepared
from lbc_cli.runtime.tune import example


@dataclass(frozen=True, slots=True)
class CpuBench:
    """Measures rows of a table, each one batch with one number of threads.

    Attributes:
        setup: what is measured.
        prepared: the model.
        executors: of the sparse side; none: dense alone.
        graphs: of the model, for onnxruntime.
        notes: told what could not be run, and why.
        progress: told a line per step.
    """

    setup: InferenceSetup
    prepared: Prepared
    executors: Sequence[Executor]
    graphs: Graphs
    notes: Notes
    progress: Callable[[str], None]

    def measure(self, batch: int, choices: Mapping[str, str] | None) -> tuple[BatchResult, list[Executed]]:
        """Time one batch with as many threads as torch is set to use; under `inference_mode`.

        Args:
            batch: images at once.
            choices: per layer; None: every layer that can runs sparse.

        Raises:
            VerificationError: if outputs differ beyond what their dtype explains.
            UsageError: if none of the modes asked for can be run.
        """
        threads = torch.get_num_threads()
        place = row_name(batch, threads)
        torch._dynamo.reset()  # each row is compiled for its own number of threads
        sides, executed = self._sides(batch, choices, place)
        difference = self._compare(sides, place)
        if COMPILED in self.setup.modes:
            self.progress(f"{place}: compiling")
            self._compile(sides, slice_size(self.prepared, batch), place)
            difference = self._compare(sides, place)
        self.progress(f"{place}: timing")
        found = self._time(self._wanted(sides), batch)
        torch._dynamo.reset()
        return BatchResult(batch, difference, found, threads), executed

    def _sides(
        self, batch: int, choices: Mapping[str, str] | None, place: str
    ) -> tuple[dict[str, Ways], list[Executed]]:
        """Everything but what is compiled."""
        setup = self.setup
        images = example(tuple(self.prepared.sample.shape), batch, setup.dtype, CPU)
        sides = {"dense": dense_ways(self.prepared, images, self.notes, f"dense, {place}")}
        add_contiguous(sides["dense"], self.prepared)
        if ONNXRUNTIME in setup.modes:
            self.progress(f"{place}: {ONNXRUNTIME}")
            at_once = slice_size(self.prepared, batch)
            add_onnxruntime(sides["dense"], self.graphs, at_once, self.notes, f"dense, {place}")
        executed: list[Executed] = []
        if self.executors:
            model, executed = self.prepared.sparse(self.executors, dtype=setup.dtype, device=CPU, choices=choices)
            sides["sparse"] = Ways(setup.dtype, weight_bytes(model))
            sides["sparse"].add(PACKED if fusion(model) else NHWC, model, images)
        if setup.dtype != torch.bfloat16:
            self._add_bfloat16(sides, images, place)
        return sides, executed

    def _add_bfloat16(self, sides: dict[str, Ways], images: Tensor, place: str) -> None:
        if not packs(torch.bfloat16):
            self.notes.add(f"{BF16} is left out: oneDNN has no bfloat16 on this processor")
            return
        sides[BF16] = dense_ways(self.prepared, images.to(torch.bfloat16), self.notes, f"{BF16}, {place}")

    def _compile(self, sides: Mapping[str, Ways], at_once: int, place: str) -> None:
        """Add compiled ways; where that fails, a note."""
        add_compiled(sides["dense"], faster_layout(sides["dense"]), at_once, self.notes, f"dense, {place}")
        if BF16 in sides:
            add_compiled(sides[BF16], NHWC, at_once, self.notes, f"{BF16}, {place}")
        # A reference stays slow: it is compiled only where nothing else is asked for.
        if "sparse" in sides and (any(e.measured for e in self.executors) or "eager" not in self.setup.modes):
            (layout,) = sides["sparse"].models
            images = sides["sparse"].models[layout][1]
            add_compiled(sides["sparse"], layout, len(images), self.notes, f"sparse, {place}")

    def _compare(self, sides: Mapping[str, Ways], place: str) -> float | None:
        """The largest difference of outputs in the dtype of the comparison.

        bfloat16 is compared with it too. What is too far off there is left out with a note: it says nothing of the
        comparison itself.
        """
        for ways in sides.values():
            ways.run_new()
        own = {name: ways for name, ways in sides.items() if name != BF16}
        outputs = {f"{name} ({way})": output for name, ways in own.items() for way, output in ways.outputs.items()}
        difference = check_agreement(self.setup.source, outputs, self.setup.dtype)
        if BF16 in sides:
            self._drop_far(sides[BF16], sides["dense"].outputs[NHWC], place)
        return difference

    def _drop_far(self, ways: Ways, expected: Tensor, place: str) -> None:
        for way in list(ways.runs):
            off = difference_of(expected, ways.outputs[way])
            if not off <= TOLERANCE[torch.bfloat16]:
                self.notes.add(f"{BF16} ({way}) is left out: its outputs are off by {off:.2g} of the largest", place)
                del ways.runs[way]

    def _wanted(self, sides: Mapping[str, Ways]) -> dict[str, Ways]:
        """Only the modes that were asked for, and the sides that have any of them.

        Raises:
            UsageError: if a side of the comparison is left with none.
        """
        for name, ways in sides.items():
            ways.runs = {way: run for way, run in ways.runs.items() if mode_of(way) in self.setup.modes}
            if not ways.runs and name != BF16:
                modes, why = ", ".join(self.setup.modes), "; ".join(self.notes.lines())
                raise UsageError(f"modes {modes}: {name} runs in none of them here: {why}")
        return {name: ways for name, ways in sides.items() if ways.runs}

    def _time(self, sides: Mapping[str, Ways], batch: int) -> dict[str, Side]:
        keys = [(way, name) for way in CPU_WAYS for name, ways in sides.items() if way in ways.runs]
        calls = {f"{name}: {way}": sides[name].runs[way] for way, name in keys}
        foreign = {f"{name}: {way}" for way, name in keys if mode_of(way) == ONNXRUNTIME}
        pools = [
            {name: call for name, call in calls.items() if (name in foreign) is theirs} for theirs in (False, True)
        ]
        timed = in_turns(pools, CPU, rounds=self.setup.rounds, seconds=10 * self.setup.seconds)
        taken: dict[str, dict[str, Times]] = {name: {} for name in sides}
        for way, name in keys:
            taken[name][way] = timed[f"{name}: {way}"]
        return {
            name: side_of(taken[name], batch, ways.dtype, weights=ways.weights, peak=None)
            for name, ways in sides.items()
        }
