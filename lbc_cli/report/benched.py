"""Inference benches as tables and as a figure. What was measured and what was estimated never share a column."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

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
from lbc_cli.report.plots import BLUE, GREY, STYLE, VERMILLION
from lbc_cli.report.tables import Columns, format_facts, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lbc_cli.bench.results import BatchResult, InferenceBench, LayerResult
    from lbc_cli.bench.roofline import Estimate


def print_bench(console: Console, bench: InferenceBench) -> None:
    """Print a bench to stdout."""
    console.result(*format_bench(bench))


def format_bench(bench: InferenceBench) -> list[RenderableType]:
    """A bench as tables: end to end, per layer, estimates, and what follows in words."""
    parts: list[RenderableType] = [f"Inference: {bench.setup.source} · {bench.pattern}", _facts(bench)]
    if bench.batches:
        parts.append(_end_to_end(bench.batches))
    if bench.layers:
        parts.append(_layers(bench))
    if bench.estimates:
        parts += _estimates(bench.estimates["im2col"], bench.estimates["fused"])
    parts += [f"note: {note}" for note in bench.notes]
    parts.append(bench.verdict)
    return parts


def _facts(bench: InferenceBench) -> RenderableType:
    found = bench.environment
    hardware = _hardware(bench)
    height, width = bench.image_size
    facts = {
        "images": f"{height} x {width} pixels",
        "dtype": str(bench.setup.dtype).removeprefix("torch."),
        "fusion": f"{bench.folded} batch norms folded, on both sides",
        "kernels": ", ".join(bench.executors) or "none sparse",
        "peak": f"{format_count(bench.measured_peak)}FLOP/s, a large matrix product" if bench.measured_peak else "",
        "hardware": hardware,
        "versions": f"lbc {found['lbc']}, torch {found['torch']}, timm {found['timm']}",
    }
    return format_facts({name: value for name, value in facts.items() if value})


def _hardware(bench: InferenceBench) -> str:
    """The GPU that was measured, or the CPU and its threads."""
    found, device = bench.environment, bench.setup.device
    if device.type == "cuda":
        return str(found["gpus"][device.index or 0])
    return f"{found['cpu']}, {found['threads']} threads"


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


def draw_bench(bench: InferenceBench, path: str | PathLike[str]) -> bool:
    """Draw speed-up per layer and throughput over batch size as a PNG.

    Returns:
        Whether there was anything to draw; if not, nothing is written.

    Raises:
        OutputError: if the file cannot be written.
    """
    if not bench.batches:
        return False
    from lbc_cli.checkpoint.files import atomic_write_bytes

    atomic_write_bytes(path, [_png(bench)])
    return True


def _png(bench: InferenceBench) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    able = [layer for layer in bench.layers if layer.speedup]
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        height = 3.6 + 0.17 * len(able)
        figure = Figure(figsize=(9.6, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels: list[Axes] = list(figure.subplots(1, 2 if able else 1, squeeze=False)[0])
        _draw_throughput(panels[0], bench)
        if able:
            _draw_layers(panels[1], able)
        figure.suptitle(f"{bench.setup.source} · {bench.pattern}", x=0.012, ha="left", fontweight="bold")
        figure.supxlabel(_footnote(bench), x=0.012, ha="left", fontsize=7.5, color=GREY)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _footnote(bench: InferenceBench) -> str:
    found = bench.environment
    hardware = _hardware(bench)
    dtype = str(bench.setup.dtype).removeprefix("torch.")
    warning = "; ".join(note for note in bench.notes if note.startswith(("the reference", "no sparse")))
    return f"{hardware}, torch {found['torch']}, {dtype}, medians" + (f"; {warning}" if warning else "")


def _draw_throughput(axes: Axes, bench: InferenceBench) -> None:
    for name, colour, dashes in (("dense", BLUE, "--"), ("sparse", VERMILLION, "-")):
        found = [result for result in bench.batches if name in result.sides]
        x = [result.batch for result in found]
        y = [result.sides[name].images_per_second for result in found]
        if x:
            axes.plot(x, y, dashes, marker="o", color=colour, label=name)
    axes.set_title("Throughput")
    axes.set_xlabel("batch")
    axes.set_ylabel("images per second")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def _draw_layers(axes: Axes, layers: Sequence[LayerResult]) -> None:
    names: list[Any] = [layer.name for layer in layers]
    speedups = [layer.speedup or 0.0 for layer in layers]
    colours = [VERMILLION if layer.variant != "dense" else GREY for layer in layers]
    axes.barh(range(len(names)), speedups, color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_title("Speed-up per layer")
    axes.set_xlabel("dense time / sparse time (grey: runs dense)")
