"""What pruning and converting have to say when they are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lbc_cli.accuracy import Accuracy
from lbc_cli.permute import Permutation
from lbc_cli.targets import Skipped
from lbc_cli.verifier import Report


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """A layer as it was written.

    Attributes:
        density: share of the weights kept.
        magnitude: share of the sum of magnitudes that the kept weights had before; None where nothing was pruned.
        note: what differs from the request, or "".
        error: share of the squared output on the calibration images that is lost; None where the method does not know.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    density: float
    magnitude: float | None
    note: str = ""
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The images that pruning has looked at.

    Attributes:
        data: name of the data.
        images: how many, of the training split.
        seed: of the choice.
        uses: what they were for: a method's name, "batch norms".
    """

    data: str
    images: int
    seed: int
    uses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out on the way; None or 0 for what was not asked.

    Attributes:
        calibration: images that were looked at.
        permutation: the channels' new order.
        before, after: the accuracy of the dense and of the pruned model.
        batch_norms: how many got new statistics.
    """

    calibration: Calibrated | None = None
    permutation: Permutation | None = None
    before: Accuracy | None = None
    after: Accuracy | None = None
    batch_norms: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written.

    Attributes:
        dense_bytes: what the tensors take when stored dense.
        file_bytes: size of the checkpoint.
        seconds: what -> time, in order.
        report: the verifier's, on the file as written.
        measured: accuracies, permutation, calibration.
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
    measured: Measured = Measured()
