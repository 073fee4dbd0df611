"""The layers of a model one by one: dense beside every sparse variant and, on a CPU, every other dense way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lbc_cli.bench.dense_layers import dense_rivals
from lbc_cli.bench.notes import Notes, reason_of
from lbc_cli.bench.results import ONNXRUNTIME, InferenceSetup, LayerResult, Quartiles
from lbc_cli.bench.sides import check_agreement
from lbc_cli.bench.turns import in_turns
from lbc_cli.bench.work import work_dense
from lbc_cli.runtime.convert import Executed, ways_of
from lbc_cli.runtime.executors import DENSE, Executor
from lbc_cli.runtime.layer import Layer
from lbc_cli.runtime.prepare import Prepared
from lbc_cli.runtime.tune import dense_module, example, time_layer, work_of

Times = Mapping[str, Quartiles]
Run = Callable[[], list[Tensor]]


@dataclass(frozen=True, slots=True)
class LayerBench:
    """Measures every layer of a model at one batch.

    Attributes:
        setup: what is measured.
        prepared: the model.
        executors: whose variants compete.
        batch: images at once.
        notes: told what could not be run, and why.
    """

    setup: InferenceSetup
    prepared: Prepared
    executors: Sequence[Executor]
    batch: int
    notes: Notes

    def measure(
        self, executed: Sequence[Executed], seconds: Mapping[str, Times], progress: Callable[[str], None]
    ) -> list[LayerResult]:
        """All layers, with what they do in the converted model; those of one shape are measured once.

        Args:
            executed: how each layer runs in the whole model; those that are missing run densely.
            seconds: times by which variants were chosen, shown as they are on a GPU. A CPU's layers are measured
                again, in one run with the other dense ways.
            progress: told a line per layer.

        Raises:
            VerificationError: if outputs differ beyond what their dtype explains.
        """
        ran = {entry.name: entry for entry in executed}
        on_cpu = self.setup.device.type == "cpu"
        known: dict[tuple[object, ...], tuple[Times, Times]] = {}
        found = []
        for layer in self.prepared.layers():
            if not layer.inputs:
                continue
            ways, reason = ways_of(layer, self.executors)
            same = work_of(layer, ways)
            given = None if on_cpu else seconds.get(layer.name)
            if given is None and same not in known:
                progress(f"layer {layer.name}")
                known[same] = self._time_all(layer, ways) if on_cpu else (self._time(layer, ways), {})
            times, rivals = (given, {}) if given is not None else known[same]
            found.append(self._result(layer, ran.get(layer.name), reason, times, rivals))
        return found

    def _time(self, layer: Layer, ways: Mapping[str, Executor]) -> Times:
        setup = self.setup
        times, _ = time_layer(layer, ways, self.batch, setup.dtype, setup.device, setup.rounds, setup.seconds)
        return {name: value.quartiles for name, value in times.items()}

    def _time_all(self, layer: Layer, ways: Mapping[str, Executor]) -> tuple[Times, Times]:
        """Times of dense and the variants, and those of the other dense ways."""
        setup, image = self.setup, isinstance(layer.module, nn.Conv2d)
        inputs = [example(shape, self.batch, setup.dtype, setup.device) for shape in layer.inputs]
        inputs = inputs if image else [value.contiguous() for value in inputs]  # vectors, whatever their number of axes
        own = self._own(layer, ways, inputs)
        rivals = dense_rivals(layer, inputs, self.notes, onnxruntime=ONNXRUNTIME in setup.modes)
        expected = _flat(own[DENSE](), image)
        for name, call in (*own.items(), *rivals.items()):
            check_agreement(f"{setup.source}, {layer.name}", {DENSE: expected, name: _flat(call(), image)}, setup.dtype)
        foreign = {name: call for name, call in rivals.items() if name.startswith(ONNXRUNTIME)}
        native = {name: call for name, call in rivals.items() if name not in foreign}
        timed = in_turns((own | native, foreign), setup.device, rounds=setup.rounds, seconds=setup.seconds)
        quartiles = {name: value.quartiles for name, value in timed.items()}
        return {name: quartiles[name] for name in own}, {name: quartiles[name] for name in rivals}

    def _own(self, layer: Layer, ways: Mapping[str, Executor], inputs: Sequence[Tensor]) -> dict[str, Run]:
        """What competes in the model: dense as it is there, and the sparse variants."""
        dtype, device = self.setup.dtype, self.setup.device
        found: dict[str, Run] = {DENSE: partial(_run, dense_module(layer, dtype=dtype, device=device), inputs)}
        for name, executor in ways.items():
            try:
                call = partial(_run, executor.build(layer, name, dtype=dtype, device=device), inputs)
                call()
                found[name] = call
            except (RuntimeError, NotImplementedError) as error:  # as in `time_layer`
                self.notes.add(f"{name} cannot run a layer: {reason_of(error)}", layer.name)
        return found

    def _result(self, layer: Layer, ran: Executed | None, reason: str, times: Times, rivals: Times) -> LayerResult:
        shapes = zip(layer.inputs, layer.outputs, strict=True)
        batch, dtype = self.batch, self.setup.dtype
        work = [work_dense(layer, (batch * i[0], *i[1:]), (batch * o[0], *o[1:]), dtype) for i, o in shapes]
        sparse = layer.pattern is not None and len(times) > 1
        return LayerResult(
            name=layer.name,
            shape=layer.shape,
            pattern=str(layer.pattern or DENSE),
            variant=ran.variant if ran else DENSE,
            reason=ran.reason if ran else reason,
            operations=sum(int(part.operations) for part in work),
            moved_bytes=sum(int(part.moved) for part in work),
            times=times,
            rivals=rivals,
            density=layer.pattern.n / layer.pattern.m if sparse and layer.pattern else 1.0,
        )


def _run(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [module(value) for value in inputs]


def _flat(outputs: Sequence[Tensor], image: bool) -> Tensor:
    """Outputs as one vector; images pixel by pixel, as rows of pixels are."""
    return torch.cat([(value.movedim(1, -1) if image and value.dim() == 4 else value).flatten() for value in outputs])
