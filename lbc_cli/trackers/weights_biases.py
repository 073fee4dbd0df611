"""Weights & Biases: a run of its own service, or offline in `wandb/` of the run folder."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lbc_cli.trackers.reporting import Tell

if TYPE_CHECKING:
    from pathlib import Path

    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job

FOLDER = "wandb"
PATIENCE = 60.0  # seconds at the end for what is not uploaded yet; it stays on the disk


class Wandb:
    """A run of Weights & Biases, under one id however often it is resumed.

    Args:
        job: of the run.
        folder: of the run.
        done: updates behind it.
        tell: told where the run is to be seen.
    """

    def __init__(self, job: Job, folder: RunFolder, done: int, tell: Tell) -> None:
        import wandb

        track = job.resolved.recipe.track
        number = _run_id(folder.path / FOLDER / "run-id")
        # Said once, and in our own words; what the process prints is its own.
        settings: dict[str, Any] = {"silent": True, "console": "off"}
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):  # older ones wait for the network for ever
            settings["finish_timeout"] = PATIENCE
        self._run: Any = wandb.init(
            project=track.project,
            name=track.name or folder.path.resolve().name,
            id=number,
            resume=None if track.mode == "offline" else "allow" if done else "never",
            dir=str(folder.path),
            mode=track.mode,
            config=job.resolved.recipe.model_dump(mode="json"),
            notes=job.resolved.recipe.description or None,
            settings=wandb.Settings(**settings),
        )
        self._table = wandb.Table
        if track.mode == "offline":
            tell(f"to upload the offline run of W&B: wandb sync {folder.path / FOLDER}/offline-run-*-{number}", "info")
        else:
            tell(f"W&B: {self._run.url}", "info")

    def log(self, values: Mapping[str, float], update: int) -> None:
        """One point for each; W&B ignores those of an update that it has gone past, which were logged before."""
        self._run.log(dict(values), step=update)

    def densities(self, layers: Mapping[str, float], update: int) -> None:
        """A table of W&B's."""
        rows = [[name, density] for name, density in layers.items()]
        self._run.log({"layers": self._table(columns=["layer", "density"], data=rows)}, step=update)

    def close(self, *, well: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=0 if well else 1)


def _run_id(path: Path) -> str:
    """The id of the run, made when it begins and kept beside W&B's files.

    Not one that follows from the folder's name or place: those come again, in another container or after the folder was
    deleted, and W&B would take two runs for one.
    """
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    from lbc_cli.checkpoint.files import atomic_write_text

    number = secrets.token_hex(8)
    path.parent.mkdir(exist_ok=True)
    atomic_write_text(path, f"{number}\n")
    return number
