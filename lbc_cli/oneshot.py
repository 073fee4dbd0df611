"""`lbc prune` and `lbc convert`: from a model or a weight file to a packed, verified checkpoint, without training.

    start = from_name("resnet50", weights="pretrained")     or from_file("dense.safetensors")
    outcome = prune(start, pattern="2:4", out="sparse.safetensors")
    outcome = convert("apex.pth", model="resnet50", pattern="2:4", out="packed.safetensors")

Pruning decides which weights stay; converting takes weights that hold N:M already as they are. Adding a method: a
function from the targets of a model to their masks, and a line in SCORES.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli import checkpoint, models, weights
from lbc_cli.checkpoint.files import check_free
from lbc_cli.data.transforms import Pixels
from lbc_cli.errors import MethodError, ModelError, UsageError, VerificationError, did_you_mean
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.targets import Selection, Skipped, Target, find_targets
from lbc_cli.verifier import Report, verify
from lbc_cli.weights.conversion import convert as find_masks

PRETRAINED, RANDOM = "pretrained", "random"
Masks = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Score:
    """A way to choose the weights that stay, in one shot.

    Attributes:
        description: one line for people.
        source: where it comes from.
        masks: parameter name -> bool mask of exactly N in every group, for the targets given.
    """

    description: str
    source: str
    masks: Callable[[tuple[Target, ...]], Masks]


def _by_magnitude(targets: tuple[Target, ...]) -> Masks:
    return {target.name: magnitude_mask(target.weight, target.pattern) for target in targets}


SCORES: dict[str, Score] = {
    "magnitude": Score("keep the largest magnitudes", "apex ASP (Mishra et al. 2021)", _by_magnitude),
}


def find_score(method: str) -> Score:
    """The score of that name.

    Raises:
        MethodError: if there is none.
    """
    if method not in SCORES:
        raise MethodError(f"unknown method {method!r}: one of {', '.join(SCORES)}.{did_you_mean(method, SCORES)}")
    return SCORES[method]


@dataclass(frozen=True, slots=True)
class Start:
    """A model, and where its weights come from.

    Attributes:
        model: on the CPU.
        arch: timm name, with its tag if one was given.
        origin: of the weights, for people: "pretrained", "random, seed 0", a file's name.
        kept: what the origin's checkpoint says that stays true: "pixels", "class_names".
        notes: what reading did to the weights.
        seconds: what making it took.
    """

    model: nn.Module
    arch: str
    origin: str
    kept: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """A layer as it was written.

    Attributes:
        density: share of the weights kept.
        magnitude: share of the sum of magnitudes kept; None where nothing was pruned.
        note: what differs from the request, or "".
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    density: float
    magnitude: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written.

    Attributes:
        dense_bytes: what the tensors take when stored dense.
        file_bytes: size of the checkpoint.
        seconds: what -> time, in order.
        report: the verifier's, on the file as written.
    """

    path: Path
    title: str
    method: str
    origin: str
    layers: tuple[PrunedLayer, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    dense_bytes: int
    file_bytes: int
    seconds: Mapping[str, float]
    report: Report


@dataclass(slots=True)
class _Pruned:
    """Targets with final masks, as saving expects them of a pruner, and what to report of them."""

    method: str
    selection: Selection
    final: Masks
    layers: tuple[PrunedLayer, ...]
    phase: str = "final"
    epoch: Any = None

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.selection.targets

    def masks(self) -> dict[str, Tensor]:
        return dict(self.final)

    def deployed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def from_name(
    name: str,
    *,
    weights: str | os.PathLike[str] = PRETRAINED,
    seed: int = 0,
    key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Start:
    """A timm model with weights of a choice.

    Args:
        name: timm name.
        weights: "pretrained" (timm's own), "random", or a file.
        seed: of random weights; the global generator is left as it was.
        key: entry of a `torch.save` file that holds the weights.
        kwargs: further arguments of `timm.create_model`.

    Raises:
        ModelError: for an unknown model, or weights that cannot be had or do not fit.
        UsageError, CheckpointError: from reading the file.
    """
    began = time.perf_counter()
    models.check_name(name)
    if str(weights) not in (PRETRAINED, RANDOM):
        return _from_weights(_read(Path(weights), key), name, kwargs, began)
    if key is not None:
        raise UsageError(f"key {key!r} names an entry of a weight file: there is none with weights={str(weights)!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.create(name, pretrained=str(weights) == PRETRAINED, kwargs=kwargs)
    origin = f"timm's {name}" if str(weights) == PRETRAINED else f"random, seed {seed}"
    return Start(model, name, origin, seconds=time.perf_counter() - began)


def from_file(
    path: str | os.PathLike[str], *, key: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> Start:
    """The model that a file or folder names, with its weights.

    Raises:
        UsageError: if it names none, or is not there.
        CheckpointError: if it is damaged, or refused because reading it could run code.
    """
    began = time.perf_counter()
    found = _read(Path(path), key)
    if found.arch is None:
        raise UsageError(
            f"{path} does not say which model it is: name the model, and give the file as its weights (--weights)"
        )
    return _from_weights(found, None, kwargs, began)


def prune(
    start: Start,
    *,
    pattern: str | Pattern,
    out: str | os.PathLike[str],
    layers: Mapping[str, str] | None = None,
    method: str = "magnitude",
) -> Outcome:
    """Prune a model to N:M in one shot, save it packed, and verify what was saved.

    Args:
        start: the model; its weights are pruned in place.
        pattern: N:M or N:M/V.
        out: the checkpoint; must not be there yet.
        layers: globs with "N:M", "N:M/V" or "dense"; the last that matches wins.
        method: one of SCORES.

    Raises:
        OutputError: if `out` is there, or cannot be written.
        MethodError, PatternError, TargetError: if method, pattern and model do not go together.
        VerificationError: if the file does not hold what it claims; it is removed then.
    """
    path = check_free(out)
    score = find_score(method)
    parsed = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    began = time.perf_counter()
    selection = find_targets(start.model, parsed, layers)
    magnitudes = [_magnitude(target) for target in selection.targets]
    masks = score.masks(selection.targets)
    rows = tuple(
        _apply(target, masks[target.name], magnitude)
        for target, magnitude in zip(selection.targets, magnitudes, strict=True)
    )
    seconds = {"model and weights": start.seconds, "scores and masks": time.perf_counter() - began}
    title = f"{start.arch} · {method} {parsed}"
    return _finish(start, title, _Pruned(method, selection, masks, rows), path, seconds, start.notes)


def convert(
    path: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    model: str | None = None,
    pattern: str | None = None,
    layers: Mapping[str, str] | None = None,
    key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Outcome:
    """Pack weights that hold N:M already, without changing any of them, and verify what was saved.

    Args:
        path: a weight file or folder.
        out: the checkpoint; must not be there yet.
        model: timm name; None: the one that the folder names.
        pattern: N:M or N:M/V of every layer that can take it; None: what the file claims, or `layers` alone.
        layers: globs with "N:M", "N:M/V" or "dense"; the last that matches wins.
        key: entry of a `torch.save` file that holds the weights.
        kwargs: further arguments of `timm.create_model`.

    Raises:
        OutputError: if `out` is there, or cannot be written.
        UsageError: if no model or pattern is known.
        CheckpointError: if the file is damaged, or refused because reading it could run code.
        VerificationError: if a layer does not hold its pattern.
    """
    target = check_free(out)
    began = time.perf_counter()
    found = _read(Path(path), key)
    if found.arch is None and model is None:
        raise UsageError(f"{path} does not say which model it is: name it with --model, such as resnet50")
    start = _from_weights(found, model, kwargs, began)
    began = time.perf_counter()
    converted = find_masks(start.model, found, pattern=pattern, layers=layers)
    rows = tuple(_row(entry, converted.masks[entry.name], None) for entry in converted.selection.targets)
    method = weights.LAYOUTS[found.kind].method if found.kind in weights.LAYOUTS else "unknown"
    seconds = {"model and weights": start.seconds, "patterns": time.perf_counter() - began}
    title = f"{start.arch} from {Path(path).name} ({found.kind})"
    pruned = _Pruned(method, converted.selection, converted.masks, rows)
    return _finish(start, title, pruned, target, seconds, (*converted.notes, *start.notes))


def _read(path: Path, key: str | None) -> weights.Weights:
    return weights.read(path, key=key)


def _from_weights(found: weights.Weights, name: str | None, kwargs: Mapping[str, Any] | None, began: float) -> Start:
    model = weights.create(found, name, kwargs=kwargs)
    record = models.created(model)
    assert record is not None
    kept = {key: found.metrics[key] for key in ("pixels", "class_names") if key in found.metrics}
    return Start(model, record.arch, found.path.name, kept, found.notes, time.perf_counter() - began)


def _magnitude(target: Target) -> float:
    """Sum of the magnitudes of a weight.

    Raises:
        ModelError: if the weight holds NaN or Inf.
    """
    total = float(torch.linalg.vector_norm(target.weight.detach(), 1, dtype=torch.float64))
    if not math.isfinite(total):
        raise ModelError(f"{target.name} holds NaN or Inf: such weights cannot be ranked; check where they are from")
    return total


@torch.no_grad()
def _apply(target: Target, mask: Tensor, magnitude: float) -> PrunedLayer:
    """Zero what is not kept; `magnitude` is that of the layer before."""
    target.weight.masked_fill_(~mask, 0)
    return _row(target, mask, _magnitude(target) / magnitude if magnitude else 1.0)


def _row(target: Target, mask: Tensor, magnitude: float | None) -> PrunedLayer:
    density = float(mask.sum()) / mask.numel()
    return PrunedLayer(target.name, tuple(target.weight.shape), str(target.pattern), density, magnitude, target.note)


def _finish(
    start: Start, title: str, pruned: _Pruned, path: Path, seconds: dict[str, float], notes: tuple[str, ...]
) -> Outcome:
    """Save, verify, and gather what there is to say."""
    _check_values(start, pruned)
    record = models.created(start.model)
    assert record is not None
    arch = {"arch": record.arch, "kwargs": dict(record.kwargs), "task": "classification"}
    metrics = {"pixels": _pixels(start.model), **start.kept, "origin": start.origin}
    began = time.perf_counter()
    checkpoint.save(start.model, path, pruner=pruned, arch=arch, metrics=metrics)
    saved = time.perf_counter()
    report = _verified(path)
    timed = {**seconds, "packing and writing": saved - began, "verifying": time.perf_counter() - saved}
    return Outcome(
        path=path,
        title=title,
        method=pruned.method,
        origin=start.origin,
        layers=pruned.layers,
        skipped=pruned.selection.skipped,
        notes=notes,
        dense_bytes=sum(t.numel() * t.element_size() for t in start.model.state_dict().values()),
        file_bytes=path.stat().st_size,
        seconds=timed,
        report=report,
    )


def _check_values(start: Start, pruned: _Pruned) -> None:
    """Refuse what no verification passes: NaN anywhere, Inf in a sparse weight; masks and buffers may hold Inf.

    Raises:
        ModelError: naming the first tensor.
    """
    sparse = {target.name for target in pruned.targets}
    for name, tensor in start.model.state_dict().items():
        if tensor.isnan().any() or (name in sparse and tensor.isinf().any()):
            raise ModelError(f"{name} holds NaN or Inf: nothing was written; check where {start.origin} comes from")


def _pixels(model: nn.Module) -> dict[str, Any]:
    """How images must be prepared for the model, as training records it."""
    config = models.data_config(model)
    channels, height, width = config["input_size"]
    pixels = Pixels(
        channels=int(channels),
        height=int(height),
        width=int(width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config.get("crop_mode") or "center"),
    )
    return asdict(pixels)


def _verified(path: Path) -> Report:
    """Verify what was written; a file that does not hold what it claims does not stay."""
    with _removed_on_failure(path):
        report = verify(path)
        if not report.ok:
            raise VerificationError(f"{path} did not hold what it claims: {report.findings[0].message}; it was removed")
        return report


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
