"""Inference benches as tables. What was measured and what was estimated never share a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from lbc_cli.report.benched_cpu import cpu_facts, cpu_layers, cpu_rows, cpu_ways
from lbc_cli.report.console import Console
from lbc_cli.report.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_seconds,
    format_shape,
)
from lbc_cli.report.tables import Columns, format_facts, table

if TYPE_CHECKING:
    from lbc_cli.bench.results import BatchResult, InferenceBench, LayerResult
    from lbc_cli.bench.roofline import Estimate


def print_bench(console: Console, bench: InferenceBench) -> None:
    """Print a bench to stdout."""
    console.result(*format_bench(bench))


def format_bench(bench: InferenceBench) -> list[RenderableType]:
    """A bench as tables: end to end, per layer, estimates, and what follows in words."""
    on_cpu = bench.setup.device.type == "cpu"
    parts: list[RenderableType] = [f"Inference: {bench.setup.source} · {bench.pattern}", _facts(bench)]
    if bench.batches:
        parts += [cpu_rows(bench), cpu_ways(bench)] if on_cpu else [_end_to_end(bench.batches)]
    if bench.layers:
        parts.append(cpu_layers(bench) if on_cpu else _layers(bench))
    if bench.estimates:
        parts += _estimates(bench.estimates["im2col"], bench.estimates["fused"])
    parts += [f"note: {note}" for note in bench.notes]
    parts.append(bench.verdict)
    return parts


def _facts(bench: InferenceBench) -> RenderableType:
    found = bench.environment
    height, width = bench.image_size
    ort = f", onnxruntime {found['onnxruntime']}" if found.get("onnxruntime") else ""
    facts = {
        "images": f"{height} x {width} pixels",
        "dtype": str(bench.setup.dtype).removeprefix("torch."),
        "fusion": f"{bench.folded} batch norms folded, on both sides",
        "kernels": ", ".join(bench.executors) or "none sparse",
        "peak": f"{format_count(bench.peak.operations)}FLOP/s, {bench.peak.source}" if bench.peak else "",
        **cpu_facts(bench),
        "hardware": hardware(bench),
        "versions": f"lbc {found['lbc']}, torch {found['torch']}{ort}, timm {found['timm']}",
    }
    return format_facts({name: value for name, value in facts.items() if value})


def hardware(bench: InferenceBench) -> str:
    """The GPU that was measured, or the CPU and its cores."""
    found, device = bench.environment, bench.setup.device
    if device.type == "cuda":
        return str(found["gpus"][device.index or 0])
    return f"{found['cpu']}, {found['cpus']} cores"


def _end_to_end(batches: Sequence[BatchResult]) -> RenderableType:
    columns: Columns = {
        "batch": "right",
        "side": "left",
        "mode": "left",
        "median": "right",
        "quartiles": "right",
        "images/s": "right",
        "speed-up": "right",
        "peak memory": "right",
        "weights": "right",
    }
    rows = []
    for result in batches:
        for name, side in result.sides.items():
            low, median, high = side.quartiles
            speedup = f"{result.speedup:.2f}x" if name == "sparse" and result.speedup else MISSING
            spread = f"{format_seconds(low)} - {format_seconds(high)}"
            memory = [format_bytes(side.peak_bytes), format_bytes(side.weight_bytes)]
            rate = f"{side.images_per_second:.1f}"
            rows.append([str(result.batch), name, side.mode, format_seconds(median), spread, rate, speedup, *memory])
    return table("End to end, as measured", columns, rows)


def _layers(bench: InferenceBench) -> RenderableType:
    columns: Columns = {
        "layer": "left",
        "shape": "left",
        "pattern": "left",
        "FLOPs": "right",
        "bytes": "right",
        "dense": "right",
        "sparse": "right",
        "speed-up": "right",
        "of peak": "right",
        "runs as": "left",
    }
    rows = [_layer_row(bench, layer) for layer in bench.layers]
    caption = f"medians at batch {max(bench.setup.batches)}; FLOPs of the dense product"
    return table("Layers, as measured", columns, rows, caption=caption)


def _layer_row(bench: InferenceBench, layer: LayerResult) -> list[str]:
    sparse = [times[1] for name, times in layer.times.items() if name != "dense"]
    return [
        layer.name,
        format_shape(layer.shape),
        layer.pattern,
        format_count(layer.operations),
        format_bytes(layer.moved_bytes),
        format_seconds(layer.times["dense"][1]),
        format_seconds(min(sparse)) if sparse else MISSING,
        f"{layer.speedup:.2f}x" if layer.speedup else MISSING,
        format_percent(bench.share_of_peak(layer)),
        layer.variant if not layer.reason else f"dense: {layer.reason}",
    ]


def _estimates(today: Estimate, fused: Estimate) -> list[RenderableType]:
    """Tables of estimates alone."""
    columns: Columns = {
        "layer": "left",
        "shape": "left",
        "dense (estimate)": "right",
        "sparse (estimate)": "right",
        "speed-up (estimate)": "right",
        "fused (estimate)": "right",
        "bound": "left",
    }
    rows = [
        [
            layer.name,
            format_shape(layer.shape),
            format_seconds(layer.dense.estimate_seconds),
            format_seconds(layer.sparse.estimate_seconds) if layer.ways else MISSING,
            _times(layer.estimate_speedup) if layer.ways else MISSING,
            _times(other.estimate_speedup) if layer.ways else MISSING,
            layer.sparse.bound if layer.ways else f"dense: {layer.reason}",
        ]
        for layer, other in zip(today.layers, fused.layers, strict=True)
    ]
    note = today.record()["estimate_note"]
    caption = f"fused: convolutions as an implicit GEMM, which no 2:4 kernel offers yet\n{note}"
    title = f"Layers, estimated for {today.gpu.product}, batch {today.batch}"
    return [table(title, columns, rows, caption=caption), _totals(today, fused)]


def _totals(today: Estimate, fused: Estimate) -> RenderableType:
    columns: Columns = {
        "counted": "left",
        "dense (estimate)": "right",
        "best (estimate)": "right",
        "speed-up (estimate)": "right",
        "fused (estimate)": "right",
        "images/s (estimate)": "right",
    }
    names = {"layers": "linear and convolution layers", "products": "and attention's products", "all": "and the rest"}
    rows = [
        [
            names[total.scope],
            format_seconds(total.estimate_dense_seconds),
            format_seconds(total.estimate_best_seconds),
            _times(total.estimate_best_speedup),
            _times(other.estimate_best_speedup),
            format_count(round(today.batch / total.estimate_best_seconds)),
        ]
        for total, other in zip(today.end_to_end(), fused.end_to_end(), strict=True)
    ]
    return table("End to end, estimated, each layer the faster way", columns, rows)


def _times(ratio: float) -> str:
    return f"{format_number(ratio, 2)}x"
