"""The training loop: `fit`, `evaluate`, and resuming. It knows a pruner and a task by their protocols, none by name.

Rules of the loop

- Every random generator is seeded anew before an update, as a pure function of (seed, epoch, update, rank), and order
  and augmentation are functions of (seed, epoch, place). So a state taken between any two updates holds no generator,
  and a resumed run on the CPU ends bit for bit as an uninterrupted one.
- With several ranks each update is that of one process with the common batch: rank r takes the r-th part of every
  batch, gradients are averaged, sums of losses and metrics added. Masks follow from the averaged gradients; a digest of
  them is compared at the start of every epoch. Rank 0 reports and saves, and its state is the state of the run.
- An update is made from `accumulate` batches; each weighs as many images as it has, so that the gradient is that of
  one large batch, the ragged last group of an epoch included.
- Loss and gradient norm are checked before the update; on a GPU without a gradient scaler before the next one, so that
  the host never waits for the device between log steps. Metrics are summed on the device and read at log steps.
- Update u, counted from 0, is made with the learning rate of u; see `optim`.
- Averaged weights are projected onto the masks at the end of every epoch, before they are evaluated or saved.
- "Best" compares only epochs whose masks are final: an earlier epoch scored with weights that were removed later.
"""

from lbc_cli.engine.control import StopOnSignal, make_deterministic, memory_advice, peak_memory
from lbc_cli.engine.evaluation import evaluate
from lbc_cli.engine.loop import fit
from lbc_cli.engine.protocols import (
    Batch,
    Batches,
    FitResult,
    FitSettings,
    Loaders,
    NullReporter,
    Pruner,
    Record,
    Reporter,
)

__all__ = [
    "Batch",
    "Batches",
    "FitResult",
    "FitSettings",
    "Loaders",
    "NullReporter",
    "Pruner",
    "Record",
    "Reporter",
    "StopOnSignal",
    "evaluate",
    "fit",
    "make_deterministic",
    "memory_advice",
    "peak_memory",
]
