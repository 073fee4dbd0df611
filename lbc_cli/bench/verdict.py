"""What a bench has shown, in one sentence: per row who is faster, against whom, and what layers say."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from lbc_cli.bench.results import BF16, BatchResult, LayerResult
from lbc_cli.runtime.executors import DENSE, Executor

Row = tuple[int, int | None]
"""Batch and threads."""


def verdict(
    results: Sequence[BatchResult],
    layers: Sequence[LayerResult],
    executors: Sequence[Executor],
    device: torch.device,
    all_dense: Collection[Row] = (),
) -> str:
    """Where sparse pays.

    Args:
        results: every row.
        layers: of one row.
        executors: that ran.
        device: where.
        all_dense: rows whose plan found nothing that is faster sparse.
    """
    if not results:
        return "nothing was measured"
    if not any(executor.measured for executor in executors):
        return f"nothing sparse was measured: {device} has no sparse kernel here"
    parts = [_row(result, (result.batch, result.threads) in all_dense) for result in results]
    able = [layer for layer in layers if layer.speedup is not None]
    return "; ".join(parts + (_of_layers(able, weighted=device.type == "cpu") if able else []))


def row_name(batch: int, threads: int | None) -> str:
    """A row by name: "batch 8", "batch 8, 2 threads"."""
    if threads is None:
        return f"batch {batch}"
    return f"batch {batch}, {threads} thread{'' if threads == 1 else 's'}"


def _row(result: BatchResult, all_dense: bool) -> str:
    where = row_name(result.batch, result.threads)
    if all_dense:  # sparse is a dense model then: any difference is another way to run it, or noise
        return f"{where}: nothing is faster sparse, so that everything runs dense"
    ratio = result.speedup or 1.0
    word = _word(ratio, result.spread)
    if result.threads is None:
        return f"{where}: sparse is {word} ({ratio:.2f}x, spread {result.spread:.1%})"
    than = "with" if word == "level" else "than"
    said = f"{where}: sparse is {word} {than} dense ({result.sides['dense'].mode}): {ratio:.2f}x, "
    said += f"spread {result.spread:.1%}"
    beside = result.bf16_over_sparse
    if beside is not None and _word(beside, result.spread_of("sparse", BF16)) == "faster":
        said += f", but {BF16} ({result.sides[BF16].mode}) is faster than sparse: {beside:.2f}x"
    return said


def _word(ratio: float, spread: float) -> str:
    return "faster" if ratio - 1 > spread else "slower" if 1 - ratio > spread else "level"


def _of_layers(able: Sequence[LayerResult], *, weighted: bool) -> list[str]:
    wins = [layer for layer in able if layer.variant != DENSE]
    logs = [math.log(layer.speedup or 1.0) for layer in able]
    mean = math.exp(sum(logs) / len(able))
    said = f"{len(wins)} of {len(able)} sparse layers run sparse, {mean:.2f}x in the geometric mean"
    if weighted:
        seconds = [layer.best_dense[1][1] for layer in able]
        share = sum(log * time for log, time in zip(logs, seconds, strict=True)) / sum(seconds)
        said += f" against the best dense way of each, {math.exp(share):.2f}x weighted by its time"
    parts = [said]
    lost = [layer for layer in able if layer.variant == DENSE]
    if lost:
        small = min(lost, key=lambda layer: layer.operations)
        parts.append(f"{len(lost)} stay dense because dense is as fast there, the smallest {small.name}")
    return parts
