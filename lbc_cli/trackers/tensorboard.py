"""TensorBoard: event files in `tensorboard/` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lbc_cli.trackers.reporting import Tell

if TYPE_CHECKING:
    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job

FOLDER = "tensorboard"


class TensorBoard:
    """Event files that `tensorboard --logdir` shows; of several processes of one run, one after the other.

    Args:
        job: of the run, whose recipe is shown as text.
        folder: of the run.
        done: updates behind it: later ones in the folder are trained anew, and TensorBoard drops them.
        tell: told where the files are.
    """

    def __init__(self, job: Job, folder: RunFolder, done: int, tell: Tell) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder.path / FOLDER
        self._writer: Any = SummaryWriter(str(place), purge_step=done + 1 if done else None)
        if not done:
            self._writer.add_text("recipe", f"```toml\n{job.resolved.text}\n```")
        self._writer.flush()  # a place that cannot be written is said now
        tell(f"tensorboard --logdir {place}", "info")

    def log(self, values: Mapping[str, float], update: int) -> None:
        """One point for each."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace(":", "_"), value, update)

    def densities(self, layers: Mapping[str, float], update: int) -> None:
        """A table, as text."""
        rows = [f"| {name} | {density:.6g} |" for name, density in layers.items()]
        self._writer.add_text("layers", "\n".join(["| layer | density |", "|---|---|", *rows]), update)

    def close(self, *, well: bool) -> None:
        """Flush and close."""
        self._writer.close()
