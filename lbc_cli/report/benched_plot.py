"""Inference benches as a figure: throughput over batch size, and the speed-up of every layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from lbc_cli.report.benched import hardware
from lbc_cli.report.formats import plural
from lbc_cli.report.plots import BLUE, GREY, STYLE, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lbc_cli.bench.results import BatchResult, InferenceBench, LayerResult


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
    counts = list(dict.fromkeys(result.threads for result in bench.batches))
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        height = 3.6 + 0.17 * len(able)
        width = 4.8 * max(2, len(counts) + bool(able))
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels: list[Axes] = list(figure.subplots(1, len(counts) + bool(able), squeeze=False)[0])
        for axes, threads in zip(panels, counts, strict=False):
            _draw_throughput(axes, [result for result in bench.batches if result.threads == threads], threads)
        if able:
            _draw_layers(panels[-1], bench, able)
        figure.suptitle(f"{bench.setup.source} · {bench.pattern}", x=0.012, ha="left", fontweight="bold")
        figure.supxlabel(_footnote(bench), x=0.012, ha="left", fontsize=7.5, color=GREY)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _footnote(bench: InferenceBench) -> str:
    found = bench.environment
    dtype = str(bench.setup.dtype).removeprefix("torch.")
    warning = "; ".join(note for note in bench.notes if note.startswith(("the reference", "no sparse")))
    return f"{hardware(bench)}, torch {found['torch']}, {dtype}, medians" + (f"; {warning}" if warning else "")


def _draw_throughput(axes: Axes, rows: Sequence[BatchResult], threads: int | None) -> None:
    rows = sorted(rows, key=lambda row: row.batch)
    for name, colour, dashes in (("dense", BLUE, "--"), ("dense bf16", GREY, ":"), ("sparse", VERMILLION, "-")):
        found = [result for result in rows if name in result.sides]
        if found:
            y = [result.sides[name].images_per_second for result in found]
            axes.plot([result.batch for result in found], y, dashes, marker="o", color=colour, label=name)
    axes.set_title("Throughput" if threads is None else f"Throughput, {plural(threads, 'thread')}")
    axes.set_xlabel("batch")
    axes.set_ylabel("images per second")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def _draw_layers(axes: Axes, bench: InferenceBench, layers: Sequence[LayerResult]) -> None:
    names: list[Any] = [layer.name for layer in layers]
    speedups = [layer.speedup or 0.0 for layer in layers]
    colours = [VERMILLION if layer.variant != "dense" else GREY for layer in layers]
    axes.barh(range(len(names)), speedups, color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, linewidth=0.8)
    where = [f"batch {bench.layers_at[0]}"] if bench.layers_at else []
    where += [plural(bench.layers_at[1], "thread")] if bench.layers_at and bench.layers_at[1] else []
    axes.set_title(f"Speed-up per layer, {', '.join(where)}" if where else "Speed-up per layer")
    axes.set_xlabel("dense time / sparse time (grey: runs dense)")
