"""The curves of a run as a PNG: loss, accuracy, density and learning rate over the epochs.

Drawn through matplotlib's object interface on Agg, without pyplot's global state and without a display; the same
records give the same bytes under the same matplotlib. Colours are Okabe and Ito's, which colour-blind people can tell
apart; the second line of a panel is dashed as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job

Records = Sequence[Mapping[str, Any]]

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, GREY, SHADE = "#222222", "#666666", "#E9EDF2"
MARKED = 40  # up to this many points a line shows each of them
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel.

    Args:
        key: in the records.
        label: in the legend.
        colour: of the line.
        dashed: told apart without colour as well.
        scale: factor from the record's unit to the axis's.
    """

    key: str
    label: str
    colour: str
    dashed: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot.

    Args:
        title: above it.
        unit: what its axis counts.
        series: its lines.
        bottom: where its axis begins; None leaves that to the values.
        held: whether a value holds for the whole epoch: drawn as steps, and where the epochs of removal are explained.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    bottom: float | None = None
    held: bool = False


PANELS = (
    Panel(
        "Loss",
        "mean loss",
        (Series("train_loss", "training", BLUE), Series("val_loss", "validation", VERMILLION, dashed=True)),
    ),
    Panel(
        "Validation accuracy",
        "accuracy (%)",
        (
            Series("top1", "top-1", VERMILLION),
            Series("top5", "top-5", PURPLE, dashed=True),
            Series("ema_top1", "top-1, EMA", GREEN),
        ),
    ),
    Panel(
        "Density of the sparse layers",
        "weights alive (%)",
        (Series("density", "density", GREEN, scale=100),),
        bottom=0.0,
        held=True,
    ),
    Panel("Learning rate", "learning rate", (Series("lr", "learning rate", BLUE),), bottom=0.0),
)


def points(records: Records, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """The epochs (counted from 1) at which the epoch records have a value, and the values."""
    epochs = [record for record in records if record.get("kind", "epoch") == "epoch"]
    known = [record for record in epochs if record.get(key) is not None]
    return [float(record["epoch"]) + 1 for record in known], [scale * float(record[key]) for record in known]


def removal_span(records: Records) -> tuple[float, float] | None:
    """From the first fall of the density to the last, on the axis of epochs; None unless there are two.

    An epoch reaches half a unit to both sides of its number, so the fall before epoch 7 is at 6.5.
    """
    x, y = points(records, "density")
    falls = [x[i] - 0.5 for i in range(1, len(y)) if y[i] < y[i - 1]]
    return (falls[0], falls[-1]) if len(falls) > 1 else None


def curves(records: Records, path: str | PathLike[str], *, title: str = "", footnote: str = "") -> bool:
    """Draw the curves of a run.

    Args:
        records: of a metrics log; those of steps are passed over, panels without values left out.
        path: PNG file, replaced at once.
        title: model, method and pattern.
        footnote: versions and hardware.

    Returns:
        Whether there was anything to draw; if not, nothing is written.

    Raises:
        OutputError: if the file cannot be written.
    """
    panels = [panel for panel in PANELS if any(points(records, series.key)[0] for series in panel.series)]
    if not panels:
        return False
    from lbc_cli.checkpoint.files import atomic_write_bytes

    atomic_write_bytes(path, [_png(panels, records, title, footnote)])
    return True


def run_curves(job: Job, folder: RunFolder) -> None:
    """Draw the curves of a run into its folder, if it got as far as an epoch.

    Raises:
        OutputError: if they cannot be written.
    """
    from lbc_cli.report.describe import versions
    from lbc_cli.runs import read_epochs

    footnote = f"{versions()}, seed {job.settings.seed}, {job.device}"
    title = f"{job.title} on {job.source.name}"
    curves(read_epochs(folder.metrics_jsonl), folder.curves, title=title, footnote=footnote)


def _png(panels: Sequence[Panel], records: Records, title: str, footnote: str) -> bytes:
    """The figure as the bytes of a PNG, without a date or a version in its metadata."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        rows = (len(panels) + 1) // 2
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.05)
        figure = Figure(figsize=(9.6, 0.9 + 3.1 * rows), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        _lay_out(figure, panels, records, title, footnote)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lay_out(figure: Figure, panels: Sequence[Panel], records: Records, title: str, footnote: str) -> None:
    """Place the panels two in a row, under the title and above the footnote."""
    columns = min(2, len(panels))
    last = max(points(records, "epoch")[0])
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot((len(panels) + 1) // 2, columns, place)
        _draw(axes, panel, records, removal_span(records))
        axes.set_xlim(0.5, last + 0.5)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    if footnote:
        figure.supxlabel(footnote, x=0.012, ha="left", fontsize=7.5, color=GREY)


def _draw(axes: Axes, panel: Panel, records: Records, removal: tuple[float, float] | None) -> None:
    """Draw one panel, the epochs of removal shaded."""
    from matplotlib.ticker import MaxNLocator

    if removal:
        label = "weights being removed" if panel.held else "_"
        axes.axvspan(*removal, color=SHADE, linewidth=0, zorder=0, label=label)
    for series in panel.series:
        _draw_line(axes, series, records, "steps-mid" if panel.held else "default")
    axes.set_title(panel.title)
    axes.set_xlabel("epoch")
    axes.set_ylabel(panel.unit)
    axes.set_ylim(bottom=panel.bottom)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best")


def _draw_line(axes: Axes, series: Series, records: Records, drawstyle: Literal["default", "steps-mid"]) -> None:
    """Draw one line where the records have values for it."""
    x, y = points(records, series.key, series.scale)
    if x:
        axes.plot(
            x,
            y,
            label=series.label,
            color=series.colour,
            linestyle=(0, (4, 1.5)) if series.dashed else "-",
            marker="o" if len(x) <= MARKED else None,
            drawstyle=drawstyle,
        )
