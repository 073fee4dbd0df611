"""The training loop: `fit`, `evaluate`, and resuming. It knows a pruner and a task by their protocols, none by name.

Rules of the loop

- Every random generator is seeded anew at the start of an epoch, as a pure function of (seed, epoch). So the state
  of an epoch boundary holds no generator, and a resumed run on the CPU ends bit for bit as an uninterrupted one.
- An update is made from `accumulate` batches; each weighs as many images as it has, so that the gradient is that of
  one large batch, the ragged last group of an epoch included.
- Loss and gradient norm are checked before the update. That is the one wait for the device in an update (a gradient
  scaler adds its own); metrics are summed on the device and read at log steps.
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
