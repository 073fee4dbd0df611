"""`lbc_cli.load`: a file to a model that executes what the file keeps."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lbc_cli import models, weights
from lbc_cli.checkpoint import Manifest, read_manifest
from lbc_cli.checkpoint.manifest import sha256
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.runtime.backends import TWO_FOUR
from lbc_cli.runtime.convert import Executed
from lbc_cli.runtime.executors import RUNTIMES, choose_executors, usable_executors, why_not_24
from lbc_cli.runtime.layer import Layer, find_layers
from lbc_cli.runtime.prepare import Prepared, prepare
from lbc_cli.runtime.tune import find_plan, key_for, plan_file

_REPORT = "_lbc_executed"


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | str | None = None,
    runtime: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    choices: Mapping[str, str] | None = None,
    tuned_for: int | None = None,
    fold: bool = True,
    fuse: bool = True,
    image_size: int = 0,
    check_digests: bool = True,
) -> nn.Module:
    """Load a model for inference, dense or with layers that execute its sparse weights.

    Args:
        path: a checkpoint, or any other file of weights (then with `model`).
        model: the model to fill, or its timm name; None: the one that the file names.
        runtime: None: dense tensors, bit for bit. "semi-structured": 2:4 on sparse tensor cores. "vector":
            vector-wise N:M (V = 64, 128) on ordinary tensor cores. "cpu": any N:M with M = 4, 8, 16, 32 on the vector
            units of a CPU. "reference" and "vector-reference": modules on any device, for tests, not for speed.
        device: where the model goes.
        dtype: of weights and activations; None: the file's.
        backend: of the runtime: "cutlass" or "cusparselt"; None: the first that runs here, cuSPARSELt before CUTLASS.
        choices: layer name -> "dense" or a variant; None: every layer that can runs sparse.
        tuned_for: take the choices that were measured for this batch, from the plan beside the file; whatever
            runtime was the fastest for a layer.
        fold: fold batch norms into convolutions; only with a runtime.
        fuse: with the runtime "cpu", take sums and ReLUs into the layers before them and large batches in slices that
            fit the cache. The model is then one graph: it has the call, and not the methods, of its class.
        image_size: side in pixels for the look at the model; 0: its own.
        check_digests: compare the SHA-256 of every tensor.

    Returns:
        The model in eval mode. With a runtime its input should be channels last; `executed(model)` says what runs how.

    Raises:
        UsageError: for options that do not go together, or a runtime that this machine cannot run.
        CheckpointError: if the file is damaged or not canonical.
        ModelError: if the model is unknown or its tensors are others.
    """
    place = torch.device("cpu") if device is None else torch.device(device)
    if runtime is None:
        given = {"backend": backend, "choices": choices, "tuned_for": tuned_for}
        if extra := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{extra[0]} needs a runtime: one of {', '.join(RUNTIMES)}")
        filled = weights.load(path, model=model, device=device, check_digests=check_digests)
        return filled if dtype is None else filled.to(dtype)
    if dtype is not None:
        choose_executors(runtime, place, dtype, backend)  # what cannot run is said before the file is read
    prepared = open_model(path, model=model, fold=fold, image_size=image_size, check_digests=check_digests)
    kind = dtype or next(prepared.model.parameters()).dtype
    executors = choose_executors(runtime, place, kind, backend)
    if tuned_for is not None:
        choices = _measured(path, prepared, choices, batch=tuned_for, dtype=kind, device=place)
        # All that runs here has competed: the fastest way of a layer may be another runtime's.
        executors += [executor for executor in usable_executors(place, kind) if executor not in executors]
    converted, report = prepared.sparse(executors, dtype=kind, device=place, choices=choices, fuse=fuse)
    setattr(converted, _REPORT, tuple(report))
    return converted


def executed(model: nn.Module) -> tuple[Executed, ...]:
    """How each layer of a model from `load` with a runtime is executed; empty for other models."""
    report: tuple[Executed, ...] = getattr(model, _REPORT, ())
    return report


def _measured(
    path: str | os.PathLike[str],
    prepared: Prepared,
    choices: Mapping[str, str] | None,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Mapping[str, str]:
    if choices is not None:
        raise UsageError("choices and tuned_for exclude each other: give one of them")
    key = key_for(prepared, batch=batch, dtype=dtype, device=device, weights=identity(path))
    plan = find_plan(path, key)
    if plan is None:
        raise UsageError(
            f"{plan_file(path)} has no plan for batch {batch}, {key.image_size[0]} x {key.image_size[1]} pixels, "
            f"{key.dtype} on {key.device} with torch {key.torch}: measure one with "
            f"`lbc bench {path} --tune --batch {batch} --dtype {key.dtype}`"
        )
    return plan.choices


def identity(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a checkpoint's manifest, "" for a file without one."""
    manifest = _manifest(path)
    return "" if manifest is None else sha256(manifest.to_json().encode())


def open_model(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | str | None = None,
    fold: bool = True,
    image_size: int = 0,
    check_digests: bool = True,
) -> Prepared:
    """Load a model and prepare it for execution.

    Raises:
        UsageError: if none of its layers is sparse; else as for `load`.
    """
    filled = weights.load(path, model=model, check_digests=check_digests)
    sample = torch.randn(1, *models.input_size(filled, image_size), generator=torch.Generator().manual_seed(0))
    prepared = prepare(filled, {}, sample, fold=fold)
    patterns = _patterns(path) or _detected(prepared)
    if not patterns:
        manifest = _manifest(path)
        free = manifest is not None and manifest.unstructured
        why = "its weights are sparse without an N:M pattern" if free else "none of its weights is sparse"
        raise UsageError(f"{path}: {why}: nothing to execute; train it, or make it sparse with `lbc prune`")
    return dataclasses.replace(prepared, patterns=patterns)


def _manifest(path: str | os.PathLike[str]) -> Manifest | None:
    if not Path(path).is_file():
        return None
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def _patterns(path: str | os.PathLike[str]) -> dict[str, Pattern]:
    """What a checkpoint's manifest says; {} for files without one."""
    manifest = _manifest(path)
    listed = {} if manifest is None else manifest.sparse
    return {name: Pattern(entry.n, entry.m, entry.vector) for name, entry in listed.items()}


def _detected(prepared: Prepared) -> dict[str, Pattern]:
    """The weights that hold 2:4 and are not all zero, of a model that comes without a manifest."""
    layers = find_layers(prepared.model, prepared.seen, {f"{name}.weight": TWO_FOUR for name in prepared.seen.uses})
    return {f"{layer.name}.weight": TWO_FOUR for layer in layers if _is_sparse(layer)}


def _is_sparse(layer: Layer) -> bool:
    return not layer.reason and bool(layer.weight.any()) and not why_not_24(layer)
