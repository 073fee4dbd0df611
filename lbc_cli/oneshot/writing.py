"""Masked models become packed checkpoints: saved, verified, and removed again if they do not hold what they claim."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lbc_cli import checkpoint, models
from lbc_cli.data.transforms import Pixels
from lbc_cli.errors import ModelError, VerificationError
from lbc_cli.oneshot.outcome import Measured, Outcome, PrunedLayer
from lbc_cli.oneshot.starts import Start
from lbc_cli.targets import Selection, Target
from lbc_cli.verifier import Report, verify


@dataclass(slots=True)
class Pruned:
    """Targets with final masks, as saving expects them of a pruner, and what to report of them.

    Attributes:
        method: as the checkpoint names it.
        selection: targets, and the layers that stay dense.
        final: parameter name -> bool mask.
        layers: to report.
        facts: what else the checkpoint says of itself.
        transposable: whether the masks hold their pattern along the output channels too.
    """

    method: str
    selection: Selection
    final: Mapping[str, Tensor]
    layers: tuple[PrunedLayer, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    transposable: bool = False
    phase: str = "final"
    epoch: Any = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """The sparse weights."""
        return self.selection.targets

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask."""
        return dict(self.final)

    def deployed(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to change: the weights are those to ship."""
        return contextlib.nullcontext()


def row(target: Target, mask: Tensor, magnitude: float | None, error: float | None = None) -> PrunedLayer:
    """What to report of a target; arguments as for `PrunedLayer`."""
    density = float(mask.sum()) / mask.numel()
    shape = tuple(target.weight.shape)
    return PrunedLayer(target.name, shape, str(target.pattern), density, magnitude, target.note, error)


def finish(
    start: Start,
    title: str,
    pruned: Pruned,
    path: Path,
    seconds: Mapping[str, float],
    notes: tuple[str, ...],
    measured: Measured | None = None,
) -> Outcome:
    """Save, verify, and gather what there is to say.

    Raises:
        ModelError: if a weight is not a number.
        OutputError: if `path` cannot be written.
        VerificationError: if the file does not hold what it claims; it is removed then.
    """
    _check_values(start, pruned)
    record = models.created(start.model)
    assert record is not None
    arch = {"arch": record.arch, "kwargs": dict(record.kwargs), "task": "classification"}
    metrics = {"pixels": pixels_of(start.model), **start.kept, "origin": start.origin, **pruned.facts}
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
        measured=measured or Measured(),
    )


def _check_values(start: Start, pruned: Pruned) -> None:
    """Refuse what no verification passes: NaN anywhere, Inf in a sparse weight; masks and buffers may hold Inf.

    Raises:
        ModelError: naming the first tensor.
    """
    sparse = {target.name for target in pruned.targets}
    for name, tensor in start.model.state_dict().items():
        if tensor.isnan().any() or (name in sparse and tensor.isinf().any()):
            raise ModelError(f"{name} holds NaN or Inf: nothing was written; check where {start.origin} comes from")


def pixels_of(model: nn.Module) -> dict[str, Any]:
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
