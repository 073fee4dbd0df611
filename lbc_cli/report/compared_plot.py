"""One metric of several runs over their epochs, as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from lbc_cli.comparing import Comparison
from lbc_cli.report.formats import one_line
from lbc_cli.report.plots import INK, STYLE, points
from lbc_cli.report.tables import result_label

# Okabe and Ito's colours; lines beyond them are dashed, then dotted
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_INSIDE = 6  # names of so many runs find room within the axes
SUFFIXES = (".png", ".svg", ".pdf")

Line = tuple[str, list[float], list[float]]


def plot_comparison(comparison: Comparison, metric: str, path: str | PathLike[str]) -> None:
    """Draw a metric of all runs over their epochs.

    Args:
        comparison: the runs, of which one has the metric at least.
        metric: a key of the epoch records, such as "top1".
        path: file, replaced at once; its suffix one of SUFFIXES.

    Raises:
        OutputError: if the file cannot be written.
    """
    from lbc_cli.checkpoint.files import atomic_write_bytes

    lines = [(one_line(run.name), *points(run.epochs, metric)) for run in comparison.runs]
    kind = Path(path).suffix.lower().removeprefix(".")
    atomic_write_bytes(path, [_figure([line for line in lines if line[1]], metric, kind)])


def _figure(lines: Sequence[Line], metric: str, kind: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, "svg.hashsalt": "lbc"})
        beside = len(lines) > _INSIDE
        height = max(5.2, 1.0 + 0.2 * len(lines)) if beside else 5.2
        figure = Figure(figsize=(9.6, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for number, (name, x, y) in enumerate(lines):
            dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
            mark = "o" if len(x) == 1 else None
            axes.plot(x, y, label=name, color=_COLOURS[number % len(_COLOURS)], linestyle=dash, marker=mark)
        label = result_label(metric)
        axes.set_title(label)
        axes.set_ylabel(f"{label} (%)" if "top" in metric else label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if beside:
            figure.legend(loc="outside right upper", labelcolor=INK, fontsize="small")
        else:
            axes.legend(loc="best", labelcolor=INK, fontsize="small")
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=_undated(kind))
    return buffer.getvalue()


def _undated(kind: str) -> dict[str, None]:
    """Metadata without a date or a version: the same runs give the same bytes."""
    return {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None, "Producer": None}}[kind]
