"""`lbc prune`: permute, choose, prune, renew the statistics, measure, and write."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli import models
from lbc_cli.accuracy import Accuracy
from lbc_cli.checkpoint.files import check_free
from lbc_cli.errors import MethodError, ModelError, UsageError
from lbc_cli.oneshot.batchnorm import check_batch_norms, recalibrate
from lbc_cli.oneshot.choice import Calibration, Chosen, Progress, transposable_mask_by, unheard
from lbc_cli.oneshot.images import Images, open_images
from lbc_cli.oneshot.outcome import Calibrated, Measured, Outcome, PrunedLayer
from lbc_cli.oneshot.scores import SCORES, find_score
from lbc_cli.oneshot.starts import Start
from lbc_cli.oneshot.writing import Pruned, finish, row
from lbc_cli.patterns import Pattern
from lbc_cli.permute import Permutation, permute
from lbc_cli.targets import Selection, Target, find_targets
from lbc_cli.training import choose_device
from lbc_cli.transposable import check_layers

CALIBRATION = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What pruning is asked to do besides choosing by a method.

    Raises:
        MethodError: for an unknown method, or one that needs data and has none.
        UsageError: for a setting that nothing would use.
    """

    method: str = "magnitude"
    """One of SCORES."""
    data: str | None = None
    """Source of images: measure before and after, and calibrate on its training split where that is needed."""
    calibration: int | None = None
    """Images to calibrate on; None: 512 where they are needed."""
    seed: int = 0
    """Of the choice of calibration images."""
    permute: bool = False
    """Permute channels first."""
    transposable: bool = False
    """Keep N of M along the output channels as well."""
    recalibrate_bn: bool = False
    """Renew the statistics of batch norms on the calibration images."""
    device: str | None = None
    """Where images are looked at; None: a GPU where there is one."""
    overrides: Sequence[str] = ()
    """"data.KEY=VALUE" each: how images are prepared."""

    def __post_init__(self) -> None:
        score = find_score(self.method)
        if self.transposable and not score.any_mask:
            raise MethodError(
                f"--transposable: --method {self.method} decides column by column, from what it kept before; choose "
                f"{', '.join(name for name, other in SCORES.items() if other.any_mask)}"
            )
        if self.data is None:
            if score.needs_images:
                raise MethodError(
                    f"--method {self.method} ranks weights by what images show: name the data with --data, such as "
                    f"--data digits"
                )
            self._refuse("needs images: name the data with --data")
        elif not self.calibrates and self.calibration is not None:
            raise UsageError(
                f"--calibration {self.calibration}: --method {self.method} looks at no images; leave it out, or add "
                f"--recalibrate-bn"
            )
        if self.calibration is not None and self.calibration < 1:
            raise UsageError(f"--calibration {self.calibration}: one image is the least")
        if self.recalibrate_bn and self.images < 2:
            raise UsageError("--recalibrate-bn needs two images at least: a variance over one is none")

    def _refuse(self, why: str) -> None:
        given = {
            "--calibration": self.calibration is not None,
            "--recalibrate-bn": self.recalibrate_bn,
            "--device": self.device is not None,
            "--set data.": bool(self.overrides),
        }
        if flag := next((flag for flag, said in given.items() if said), None):
            raise UsageError(f"{flag} {why}")

    @property
    def calibrates(self) -> bool:
        """Whether calibration images are looked at."""
        return find_score(self.method).needs_images or self.recalibrate_bn

    @property
    def images(self) -> int:
        """How many calibration images there are to be."""
        return CALIBRATION if self.calibration is None else self.calibration


def prune(
    start: Start,
    *,
    pattern: str | Pattern,
    out: str | os.PathLike[str],
    layers: Mapping[str, str] | None = None,
    method: str = "magnitude",
    data: str | None = None,
    calibration: int | None = None,
    seed: int = 0,
    permute: bool = False,
    transposable: bool = False,
    recalibrate_bn: bool = False,
    device: str | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = unheard,
) -> Outcome:
    """Prune a model to N:M in one shot, save it packed, and verify what was saved.

    Args:
        start: the model; its weights are pruned in place.
        pattern: N:M or N:M/V.
        out: the checkpoint; must not be there yet.
        layers: globs with "N:M", "N:M/V" or "dense"; the last that matches wins.
        method: one of SCORES.
        data: source of images, as in a recipe's data.source: the model is measured before and after, and methods that
            need images get them from its training split.
        calibration: how many images; None: 512 where any are needed.
        seed: of the choice of calibration images.
        permute: permute channels first, so that more magnitude is kept; the function stays what it is.
        transposable: keep N of M along the output channels as well.
        recalibrate_bn: renew the statistics of batch norms on the calibration images, after pruning.
        device: where images are looked at; None: a GPU where there is one.
        overrides: "data.KEY=VALUE" each: how images are prepared.
        progress: told what is done, how much of it, and how much there is.

    Raises:
        OutputError: if `out` is there, or cannot be written.
        MethodError, PatternError, TargetError: if method, pattern and model do not go together.
        UsageError: for a setting that nothing would use.
        DataError: if the data are missing, too few, or of other classes than the model.
        ModelError: if the model cannot be permuted, or its weights cannot be ranked.
        VerificationError: if the file does not hold what it claims; it is removed then.
    """
    path = check_free(out)
    request = Request(
        method=method,
        data=data,
        calibration=calibration,
        seed=seed,
        permute=permute,
        transposable=transposable,
        recalibrate_bn=recalibrate_bn,
        device=device,
        overrides=overrides,
    )
    parsed = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    work = _Work(start, request, find_targets(start.model, parsed, layers), progress)
    pruned, measured = work.run()
    seconds = {"model and weights": start.seconds, **work.seconds}
    title = f"{start.arch} · {method} {parsed}{' transposable' if transposable else ''}"
    return finish(start, title, pruned, path, seconds, (*work.notes, *start.notes), measured)


@dataclass(frozen=True, slots=True)
class _View:
    """What there is to see a model by.

    Attributes:
        images: evaluation and training split, prepared for the model.
        looked_at: calibration images and their labels, where any are needed.
        device: where they are looked at.
    """

    images: Images
    looked_at: tuple[Tensor, Tensor] | None
    device: torch.device


@dataclass(slots=True)
class _Work:
    """One pruning, step by step."""

    start: Start
    request: Request
    selection: Selection
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def run(self) -> tuple[Pruned, Measured]:
        """Prune the model; what it became, and what was found out."""
        if self.request.transposable:
            check_layers(self.selection.targets)
        magnitudes = [_magnitude(target) for target in self.selection.targets]
        if self.request.recalibrate_bn:
            check_batch_norms(self.start.model, self.start.arch)
        view = self._open()
        before = self._measure(view, "accuracy before")
        permutation = self._permute()
        chosen = self._choose(view)
        rows = tuple(map(partial(_apply, chosen), self.selection.targets, magnitudes))
        renewed = self._recalibrate(view)
        after = self._measure(view, "accuracy after")
        calibrated = self._calibrated(view)
        measured = Measured(calibrated, permutation, before, after, renewed)
        facts = _facts(permutation, view, calibrated)
        transposable = self.request.transposable
        return Pruned(self.request.method, self.selection, chosen.masks, rows, facts, transposable), measured

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - began

    def _open(self) -> _View | None:
        """Open the data, if any are named, and read the calibration images, if any are needed."""
        request = self.request
        if request.data is None:
            return None
        device = choose_device(request.device or "auto")
        with self._timed("opening the data"):
            twin = _twin(self.start.model, torch.device("cpu"))
            kept, overrides = self.start.kept, request.overrides
            images = open_images(twin, request.data, kept=kept, overrides=overrides, device=device)
            looked_at = images.calibration(request.images, request.seed, self.progress) if request.calibrates else None
        return _View(images, looked_at, device)

    def _measure(self, view: _View | None, what: str) -> Accuracy | None:
        if view is None:
            return None
        with self._timed(what):
            return view.images.accuracy(_twin(self.start.model, view.device), view.device, self.progress)

    def _permute(self) -> Permutation | None:
        if not self.request.permute:
            return None
        with self._timed("permutation"):
            return permute(
                self.start.model,
                self.selection.targets,
                models.input_size(self.start.model),
                progress=lambda done, total: self.progress("permuting, sets of channels", done, total),
            )

    def _choose(self, view: _View | None) -> Chosen:
        """Decide what stays, by the method."""
        score = find_score(self.request.method)
        with self._timed("scores and masks"):
            calibration = self._calibration(view) if score.needs_images else None
            kind = (transposable_mask_by,) if self.request.transposable else ()
            chosen = score.choose(self.selection.targets, calibration, *kind)
        self.notes = chosen.notes
        return chosen

    def _recalibrate(self, view: _View | None) -> int:
        """Renew the statistics of the batch norms, if that is asked for; how many there are."""
        if not self.request.recalibrate_bn:
            return 0
        with self._timed("batch norms"):
            return recalibrate(self.start.model, self._calibration(view))

    def _calibration(self, view: _View | None) -> Calibration:
        """The model as it is now, and the images to look at it with."""
        assert view is not None
        assert view.looked_at is not None
        return Calibration(_twin(self.start.model, view.device), *view.looked_at, view.device, self.progress)

    def _calibrated(self, view: _View | None) -> Calibrated | None:
        if view is None or view.looked_at is None:
            return None
        request = self.request
        uses = [request.method] if find_score(request.method).needs_images else []
        uses += ["batch norms"] if request.recalibrate_bn else []
        return Calibrated(view.images.source.name, request.images, request.seed, tuple(uses))


def _twin(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy to work on, in float32 and eval mode."""
    return copy.deepcopy(model).float().eval().to(device)


def _facts(permutation: Permutation | None, view: _View | None, calibrated: Calibrated | None) -> dict[str, Any]:
    """What the checkpoint says of how it was made."""
    facts: dict[str, Any] = {}
    if permutation is not None:
        facts["permuted"] = permutation.permuted
    if view is not None:
        facts["pixels"] = dataclasses.asdict(view.images.pixels)
    if calibrated is not None:
        facts["calibration"] = dataclasses.asdict(calibrated)
    return facts


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
def _apply(chosen: Chosen, target: Target, magnitude: float) -> PrunedLayer:
    """Zero what is not kept, and give what is kept its new values; `magnitude` is that of the layer before."""
    mask = chosen.masks[target.name]
    target.weight.masked_fill_(~mask, 0)
    kept = _magnitude(target) / magnitude if magnitude else 1.0
    if target.name in chosen.weights:
        target.weight.copy_(chosen.weights[target.name])
    return row(target, mask, kept, chosen.errors.get(target.name))
