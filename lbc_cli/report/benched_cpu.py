"""Tables of a bench on a CPU: a row for each batch and number of threads, every way to run it, layers in GFLOP/s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from lbc_cli.report.formats import (
    MISSING,
    format_bytes,
    format_count,
    format_percent,
    format_seconds,
    format_shape,
    plural,
)
from lbc_cli.report.tables import NAMES_SHOWN, Columns, table

if TYPE_CHECKING:
    from lbc_cli.bench.results import InferenceBench, LayerResult

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def cpu_facts(bench: InferenceBench) -> dict[str, str]:
    """What a CPU has for bfloat16, and the bound that permutations set."""
    facts = {}
    if bench.peak and bench.peak.permuted:
        share = format_percent(bench.peak.share(bench.peak.permuted), 0)
        facts["permuted"] = f"{format_count(bench.peak.permuted)}FLOP/s with a permutation for each of them, {share}"
    if found := bench.environment.get("bfloat16"):
        facts["bfloat16"] = ", ".join(f"{name}: {'yes' if has else 'no'}" for name, has in found.items())
    return facts


def cpu_rows(bench: InferenceBench) -> RenderableType:
    """End to end: the fastest way of each side, in a row for each batch and number of threads."""
    columns: Columns = {
        "batch": "right",
        "threads": "right",
        "side": "left",
        "dtype": "left",
        "fastest": "left",
        "median": "right",
        "quartiles": "right",
        "images/s": "right",
        "speed-up": "right",
        "weights": "right",
    }
    rows = []
    for result in bench.batches:
        for name, side in result.sides.items():
            low, median, high = side.quartiles
            ratio = result.ratio("dense", name)
            rows.append(
                [
                    str(result.batch),
                    str(result.threads),
                    name.removesuffix(" bf16"),
                    SHORT[side.dtype],
                    side.mode,
                    format_seconds(median),
                    f"{format_seconds(low)} - {format_seconds(high)}",
                    f"{side.images_per_second:.1f}",
                    MISSING if name == "dense" or ratio is None else f"{ratio:.2f}x",
                    format_bytes(side.weight_bytes),
                ]
            )
    dtype = SHORT[bench.batches[0].sides["dense"].dtype]
    return table("End to end, as measured", columns, rows, caption=f"speed-up: against dense {dtype} at its fastest")


def cpu_ways(bench: InferenceBench) -> RenderableType:
    """The median of every way that each side was run."""
    sides = [(result, name, side) for result in bench.batches for name, side in result.sides.items()]
    ways = list(dict.fromkeys(way for _, _, side in sides for way in side.modes))
    columns: Columns = {"batch": "right", "threads": "right", "side": "left", "dtype": "left"}
    columns = {**columns, **dict.fromkeys(ways, "right")}
    rows = [
        [
            str(result.batch),
            str(result.threads),
            name.removesuffix(" bf16"),
            SHORT[side.dtype],
            *(format_seconds(side.modes[way][1]) if way in side.modes else MISSING for way in ways),
        ]
        for result, name, side in sides
    ]
    return table("Every way, medians", columns, rows)


def cpu_layers(bench: InferenceBench) -> RenderableType:
    """Layers: the fastest dense way and the fastest sparse one, and what they reach of the machine."""
    columns: Columns = {
        "layer": "left",
        "shape": "left",
        "dense": "right",
        "by": "left",
        "sparse": "right",
        "speed-up": "right",
        "dense\nGFLOP/s": "right",
        "sparse\nGFLOP/s": "right",
        "done\nGFLOP/s": "right",
        "dense\nof peak": "right",
        "done\nof peak": "right",
        "runs as": "left",
    }
    rows = [_layer_row(bench, layer) for layer in bench.layers]
    batch, threads = bench.layers_at or (0, 0)
    caption = [
        f"medians at batch {batch}, {plural(threads or 0, 'thread')}; dense: the fastest way; in model: channels "
        "last, weights packed once; ort: onnxruntime",
        "GFLOP/s: operations of the dense product per second; done: those that the pattern keeps",
        *_reasons(bench.layers),
    ]
    return table("Layers, as measured", columns, rows, caption="\n".join(caption))


def _layer_row(bench: InferenceBench, layer: LayerResult) -> list[str]:
    way, dense = layer.best_dense
    sparse, rates = layer.best_sparse, layer.rates()
    return [
        layer.name,
        format_shape(layer.shape),
        format_seconds(dense[1]),
        "in model" if way == "dense" else way.replace("onnxruntime", "ort"),
        format_seconds(sparse[1][1]) if sparse else MISSING,
        f"{layer.speedup:.2f}x" if layer.speedup else MISSING,
        *(_giga(rates[name]) for name in ("dense", "sparse", "done")),
        *(_share(bench, rates[name]) for name in ("dense", "done")),
        layer.variant,
    ]


def _reasons(layers: Sequence[LayerResult]) -> list[str]:
    """Why layers run dense, a line for each reason."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason:
            found.setdefault(layer.reason, []).append(layer.name)
    return [f"dense ({reason}): {_some(names)}" for reason, names in found.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= NAMES_SHOWN else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _giga(rate: float | None) -> str:
    return MISSING if rate is None else f"{rate / 1e9:.1f}"


def _share(bench: InferenceBench, rate: float | None) -> str:
    return MISSING if rate is None or bench.peak is None else format_percent(bench.peak.share(rate), 0)
