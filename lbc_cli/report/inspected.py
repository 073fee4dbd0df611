"""What a file holds, as tables and as JSON: its own word, of which only the digest of the manifest was checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lbc_cli.checkpoint.contents import Contents, Held
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.report.console import Console
from lbc_cli.report.formats import (
    format_bytes,
    format_count,
    format_ratio,
    format_shape,
    one_line,
    plural,
)
from lbc_cli.report.tables import Align, Columns, format_facts, format_result, result_label, table

SCHEMA = 1
_SEMI_STRUCTURED = "semi_structured"
_METADATA_SHOWN = 8


def print_inspect(console: Console, contents: Contents, *, every: bool = False) -> None:
    """Print what a file holds to stdout.

    Args:
        console: where to.
        contents: of the file.
        every: list biases, norms and buffers one by one, too.
    """
    console.result(*format_inspect(contents, every=every))


def format_inspect(contents: Contents, *, every: bool = False) -> tuple[RenderableType, ...]:
    """Facts, the packed tensors, the dense ones, and what all of them take; arguments as for `print_inspect`."""
    shown = [tensor for tensor in contents.dense if every or len(tensor.shape) > 1]
    rest = [tensor for tensor in contents.dense if not every and len(tensor.shape) <= 1]
    return (
        Text(f"Inspect: {one_line(str(contents.path))}", style="bold"),
        format_facts({label: one_line(value) for label, value in _facts(contents).items()}),
        *([_format_packed(contents.sparse)] if contents.sparse else []),
        *([_format_dense(shown, rest)] if contents.dense else []),
        _format_totals(contents),
    )


def inspect_record(contents: Contents) -> dict[str, Any]:
    """What a file holds, as JSON prints it.

    Returns:
        schema (1), path, kind ("checkpoint", "run state" or "safetensors"), file_bytes, header_bytes, manifest_sha256;
        model, method, phase, epoch, metrics, recipe and environment of a checkpoint, null for others; metadata of
        others; tensors with name, shape, dtype, pattern, nonzeros, stored_bytes and dense_bytes; and their totals.
    """
    manifest = contents.manifest
    model = manifest and {"arch": manifest.arch, "kwargs": manifest.kwargs, "task": manifest.task}
    members = ("method", "phase", "epoch", "metrics", "recipe", "environment")
    return {
        "schema": SCHEMA,
        "path": str(contents.path),
        "kind": contents.kind,
        "file_bytes": contents.file_bytes,
        "header_bytes": contents.header_bytes,
        "manifest_sha256": contents.manifest_sha256 or None,
        "model": model,
        **{member: None if manifest is None else getattr(manifest, member) for member in members},
        "metadata": dict(contents.metadata) if contents.kind == "safetensors" else None,
        "tensors": [_tensor_record(tensor) for tensor in contents.tensors],
        "totals": {
            "all": _total_record(contents.tensors),
            "packed": _total_record(contents.sparse),
            "dense": _total_record(contents.dense),
        },
    }


def recipe_of(contents: Contents) -> str:
    """The recipe that a checkpoint comes from, as TOML.

    Raises:
        UsageError: if the file has none.
        CheckpointError: if it holds what no TOML can.
    """
    recipe = contents.manifest.recipe if contents.manifest is not None else ""
    if not recipe:
        what = "it was not saved by lbc train" if contents.manifest is not None else "only checkpoints of lbc have one"
        raise UsageError(f"{contents.path} holds no recipe: {what}")
    if not all(char.isprintable() or char in "\n\t" for char in recipe):
        raise CheckpointError(f"{contents.path}: the recipe holds control characters: no TOML does")
    return recipe


def _tensor_record(tensor: Held) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "pattern": tensor.pattern or None,
        "nonzeros": tensor.nonzeros,
        "stored_bytes": tensor.stored_bytes,
        "dense_bytes": tensor.dense_bytes,
    }


def _total_record(tensors: Sequence[Held]) -> dict[str, int]:
    return {
        "tensors": len(tensors),
        "elements": sum(math.prod(tensor.shape) for tensor in tensors),
        "stored_bytes": sum(tensor.stored_bytes for tensor in tensors),
        "dense_bytes": sum(tensor.dense_bytes for tensor in tensors),
    }


def _facts(contents: Contents) -> dict[str, str]:
    manifest = contents.manifest
    facts = {"kind": _kind(contents)}
    if manifest is None:
        return facts | _metadata_facts(contents)
    arguments = ", ".join(f"{key}={value}" for key, value in manifest.kwargs.items())
    arch = manifest.arch or "not named: saved from a model that timm did not create"
    facts |= {"model": f"{arch}({arguments})" if arguments else arch, "task": manifest.task or ""}
    facts |= {"method": manifest.method, "phase": _phase(manifest.phase)}
    facts |= {"epoch": "" if manifest.epoch is None else str(manifest.epoch)}
    facts |= _metric_facts(manifest.metrics)
    lines = manifest.recipe.count("\n")
    facts |= {"recipe": f"{plural(lines, 'line')}; --recipe prints it" if manifest.recipe else "none"}
    facts |= {"environment": _flat(manifest.environment), "manifest": f"sha256 {contents.manifest_sha256}"}
    return {label: value for label, value in facts.items() if value}


def _kind(contents: Contents) -> str:
    if contents.kind == "checkpoint":
        return "checkpoint of lbc, version 1; the manifest matches its digest, the tensors were not read"
    if contents.kind == "run state":
        return "run state of lbc: what `lbc train --resume` goes on from"
    if _SEMI_STRUCTURED in contents.metadata:
        return "semi-structured export of lbc, layers as T.packed and T.meta; `lbc verify` checks it"
    return "safetensors, not a checkpoint of lbc: no pattern is claimed; `lbc verify --pattern N:M` checks one"


def _phase(phase: str) -> str:
    return phase if phase == "final" else f"{phase}: masks are not final yet, so everything is stored dense"


def _metadata_facts(contents: Contents) -> dict[str, str]:
    """Short metadata of other writers; long ones by their size."""
    if contents.kind != "safetensors":
        return {}
    items = sorted(contents.metadata.items())
    facts = {
        f"metadata {key[:40]}": value if len(value) <= 120 else plural(len(value), "character")
        for key, value in items[:_METADATA_SHOWN]
    }
    if len(items) > _METADATA_SHOWN:
        facts["metadata"] = f"and {len(items) - _METADATA_SHOWN} more"
    return facts


def _metric_facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Numbers one by one; what belongs to the data in a line each."""
    numbers = {name: value for name, value in metrics.items() if type(value) in (int, float) and name != "epoch"}
    facts = {"metrics": ", ".join(f"{result_label(name)} {_metric(name, value)}" for name, value in numbers.items())}
    if isinstance(pixels := metrics.get("pixels"), Mapping):
        facts["images"] = _flat(pixels)
    if isinstance(names := metrics.get("class_names"), list):
        facts["classes"] = str(len(names))
    return facts


def _metric(name: str, value: float) -> str:
    return format_result(name, value) if name.endswith(("top1", "top5", "loss")) else _short(value)


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items() if value not in (None, [], {}, ""))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + _flat(value) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _format_packed(tensors: Sequence[Held]) -> RenderableType:
    columns: Columns = {
        "tensor": "left",
        "shape": "left",
        "pattern": "left",
        "dtype": "left",
        "stored": "right",
        "dense": "right",
        "share": "right",
    }
    rows = [
        [
            tensor.name,
            format_shape(tensor.shape),
            tensor.pattern,
            tensor.dtype,
            format_bytes(tensor.stored_bytes),
            format_bytes(tensor.dense_bytes),
            format_ratio(tensor.stored_bytes, tensor.dense_bytes),
        ]
        for tensor in tensors
    ]
    return table(f"Packed tensors ({len(tensors)})", columns, rows)


def _format_dense(tensors: Sequence[Held], rest: Sequence[Held]) -> RenderableType:
    """A row per tensor, and one for the small ones; non-zeros have a column only where they are known."""
    columns: dict[str, Align] = {"tensor": "left", "shape": "left", "dtype": "left", "stored": "right"}
    counted = any(tensor.nonzeros is not None for tensor in tensors)
    if counted:
        columns["non-zero"] = "right"
    rows = [[t.name, format_shape(t.shape), t.dtype, format_bytes(t.stored_bytes), _nonzero(t)] for t in tensors]
    if rest:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in rest}))
        stored = format_bytes(sum(tensor.stored_bytes for tensor in rest))
        rows.append([f"and {plural(len(rest), 'vector')} and scalars", "", dtypes, stored, ""])
    cut = [row if counted else row[:-1] for row in rows]
    return table(f"Dense tensors ({len(tensors) + len(rest)})", columns, cut)


def _nonzero(tensor: Held) -> str:
    return "" if tensor.nonzeros is None else format_ratio(tensor.nonzeros, math.prod(tensor.shape))


def _format_totals(contents: Contents) -> RenderableType:
    columns: Columns = {
        "in all": "left",
        "tensors": "right",
        "elements": "right",
        "stored": "right",
        "dense": "right",
        "share": "right",
    }
    parts = {"packed": contents.sparse, "dense": contents.dense, "model": contents.tensors}
    rows = [
        _total(name, tensors) for name, tensors in parts.items() if tensors and (contents.sparse or name == "model")
    ]
    rows.append(["file, with its header", "", "", format_bytes(contents.file_bytes), "", ""])
    return table("", columns, rows)


def _total(name: str, tensors: Sequence[Held]) -> list[str]:
    total = _total_record(tensors)
    stored, dense = total["stored_bytes"], total["dense_bytes"]
    sizes = [format_bytes(stored), format_bytes(dense), format_ratio(stored, dense)]
    return [name, str(total["tensors"]), format_count(total["elements"]), *sizes]
