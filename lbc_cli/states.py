"""The saved states of a run: the newest, and the one before it.

    state.safetensors            the newest
    state-previous.safetensors   the one before
    state-next.safetensors       only for the moment between its writing and its taking the place of the newest

A new state is on the disk, complete, before an older one moves: whatever ends the process, the newest complete state is
found again. A full disk or a folder that can no longer be written leaves both as they were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbc_cli.checkpoint import load_state, save_state
from lbc_cli.errors import CheckpointError, OutputError
from lbc_cli.runs import RunFolder

State = dict[str, Any]


def save(folder: RunFolder, state: Mapping[str, Any]) -> None:
    """Write a state; the newest becomes the one before.

    Raises:
        UsageError: for a value that cannot be stored, with its place.
        OutputError: if it cannot be written; the states that were there are as they were.
    """
    save_state(folder.state_next, dict(state))
    try:
        _turn(folder)
    except OSError as error:
        raise OutputError(
            f"{folder.state_next} is written, but cannot take its place: {error.strerror or error}; it is found there"
        ) from error


def _turn(folder: RunFolder) -> None:
    """Let the written state take its place."""
    if folder.state.exists():
        os.replace(folder.state, folder.state_previous)  # noqa: PTH105 (as in checkpoint.files)
    os.replace(folder.state_next, folder.state)  # noqa: PTH105


def found(folder: RunFolder) -> list[Path]:
    """The states of a folder, the newest first."""
    return [path for path in (folder.state_next, folder.state, folder.state_previous) if path.is_file()]


def load(folder: RunFolder, *, previous: bool = False) -> State:
    """Read the newest state, or the one before it.

    Args:
        folder: of the run.
        previous: take the one before, whether the newest is good or not.

    Raises:
        OutputError: if there is none.
        CheckpointError: if it is damaged; the message says whether there is one before it.
    """
    paths = found(folder)
    if not paths:
        raise OutputError(f"{folder.path} has no {folder.state.name}: that run ended before its first state was saved")
    if previous and len(paths) == 1:
        raise OutputError(f"{folder.path} has one state only, {paths[0].name}: there is none before it")
    path = paths[1] if previous else paths[0]
    try:
        state = load_state(path)
        if not isinstance(state, dict) or not {"epoch", "step", "ranks", "batch_size", "teacher"} <= state.keys():
            raise CheckpointError("it is not the state of a run: it has no place to go on from")
    except CheckpointError as error:
        remedy = "start a new run"
        if not previous and len(paths) > 1:
            remedy = f"go on from the state before it, {paths[1].name}, with --previous-state"
        raise CheckpointError(f"{path} is damaged: {error}; {remedy}") from error
    return state
