"""Where a run is, and the checks that let it go on from a saved state.

A position is an epoch and how many of its updates are made; together with the seed it fixes the order of the images,
their augmentation and every random number that is still to be drawn (see `data.rng`), so a state holds no generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lbc_cli.engine.protocols import FitSettings, Pruner
from lbc_cli.engine.updates import Updater
from lbc_cli.errors import CheckpointError, LbcError, UsageError

STATE_VERSION = 2
_KEYS = frozenset(
    {
        "version",
        "epoch",
        "step",
        "running",
        "updates",
        "updates_per_epoch",
        "ranks",
        "model",
        "optimizer",
        "pruner",
        "scaler",
        "ema",
        "history",
        "best",
    }
)


class Position(NamedTuple):
    """A moment between two updates.

    Attributes:
        epoch: in progress, or next where no update of it is made; counted from 0.
        step: updates of the epoch that are made.
    """

    epoch: int
    step: int

    def described(self, steps: int) -> str:
        """For a sentence: "in epoch 3, after update 5 of 20", "after epoch 2"."""
        if self.step:
            return f"in epoch {self.epoch}, after update {self.step} of {steps}"
        return f"after epoch {self.epoch - 1}" if self.epoch else "before the first update"


def until(saved: Position | None) -> str:
    """What is saved, and what becomes of it."""
    if saved is None:
        return "no state was saved yet, so a new run starts from the beginning"
    if saved.step:
        where = f"update {saved.step} of epoch {saved.epoch}"
        return f"the state after {where} is saved, a resumed run goes on from there"
    return f"the state after epoch {saved.epoch - 1} is saved, a resumed run goes on with epoch {saved.epoch}"


def mask_digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bits of all masks."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode() + b"\0")
        digest.update(np.packbits(masks[name].cpu().numpy()).tobytes())
    return digest.hexdigest()


def check(state: Mapping[str, Any], settings: FitSettings, steps: int) -> None:
    """Refuse a state that cannot be continued with these settings.

    Args:
        state: from `fit`.
        settings: of this run.
        steps: updates in an epoch of this run.

    Raises:
        CheckpointError: if it lacks something, or is of another version.
        UsageError: if it belongs to other settings.
    """
    missing = _KEYS - state.keys()
    if state.get("version") != STATE_VERSION or missing:
        found = f"it lacks {', '.join(sorted(missing))}" if missing else f"it has version {state['version']}"
        raise CheckpointError(f"the saved state cannot be continued: {found}; version {STATE_VERSION} is needed")
    compared = {
        "updates per epoch (from data, batch size, accumulation and ranks)": (state["updates_per_epoch"], steps),
        "train.ema": (state["ema"] is not None, settings.ema),
        "train.amp = 'float16'": (bool(state["scaler"]), settings.amp == "float16"),
    }
    for what, (saved, now) in compared.items():
        if saved != now:
            raise UsageError(f"the saved state has {what}: {saved}, this run {now}; resume with the same settings")
    if state["epoch"] + bool(state["step"]) > settings.epochs:
        begun = state["epoch"] + bool(state["step"])
        raise UsageError(f"the saved state is of {begun} epochs, train.epochs = {settings.epochs}")


def load(state: Mapping[str, Any], updater: Updater, pruner: Pruner) -> None:
    """Load weights, optimizer and masks: the pruner last, for it looks at weights and optimizer.

    Raises:
        UsageError: if they do not fit the model or the method.
    """
    try:
        updater.load_state_dict(state)
        pruner.load_state_dict(state["pruner"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, LbcError):
            raise
        # torch goes on for lines, with every parameter in them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
        raise UsageError(
            f"the saved state does not fit this run ({reason[:200]}): resume with the model, optimizer and "
            "settings that it was saved with"
        ) from error
