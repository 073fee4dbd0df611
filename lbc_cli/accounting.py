"""What a run costs on paper: parameters and multiply-adds, in use and in training, dense and sparse.

In use      every weight that takes part counts once per image: `flops.sparse_totals`.
In training a dense step is three times the forward pass; each weight costs the share of it that its density and the
            method's convention say, `flops.step_share`; the run costs the mean over its epochs, for as many images as
            dense training sees. A teacher adds its forward pass, a third of a step of its own.

Nothing here was measured, and dense kernels do not run faster for zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbc_cli import flops
from lbc_cli.flops import Cost, Totals
from lbc_cli.methods import Pruner

PASSES = 3  # of a training step: output, gradient of the input, gradient of the weight


@dataclass(frozen=True, slots=True)
class Account:
    """What a run costs on paper.

    Attributes:
        dense: the dense model, multiply-adds of one image.
        sparse: the model as it will be, or is, in the end; None where only training will tell.
        parameters: of the sparse model, also where only their sum is known; None where that is not either.
        training_share: of the multiply-adds of dense training on as many images, a teacher's included; None where only
            training will tell.
        teacher_share: the teacher's part of it.
    """

    dense: Totals
    sparse: Totals | None
    parameters: int | None
    training_share: float | None
    teacher_share: float = 0.0

    def training_macs(self, images: int) -> int:
        """Multiply-adds of dense training on so many images."""
        return PASSES * self.dense.macs * images

    def record(self) -> dict[str, Any]:
        """What a summary says of it: plain values."""
        return {
            "parameters": {"dense": self.dense.params, "sparse": self.parameters},
            "macs": {"dense": self.dense.macs, "sparse": None if self.sparse is None else self.sparse.macs},
            "training_share": self.training_share,
        }


def planned(cost: Cost, pruner: Pruner, *, teacher_macs: int = 0) -> Account:
    """What a run will cost.

    Args:
        cost: of the dense model.
        pruner: attached, not begun.
        teacher_macs: of a teacher's forward pass on one image; 0: no teacher.
    """
    shares = [_planned_share(cost, pruner, epoch) for epoch in range(pruner.epochs)]
    known = [share for share in shares if share is not None]
    mean = sum(known) / len(known) if len(known) == len(shares) else None
    return _account(cost, pruner.planned_densities(), _planned_parameters(cost, pruner), mean, teacher_macs)


def carried_out(
    cost: Cost, densities: Mapping[str, float], shares: Sequence[float], *, teacher_macs: int = 0
) -> Account:
    """What a run has cost.

    Args:
        cost: of the dense model.
        densities: name -> share of the weight that is kept now.
        shares: of every epoch, from `step_share`; none: not known.
        teacher_macs: as for `planned`.
    """
    sparse = flops.sparse_totals(cost, densities)
    return _account(cost, densities, sparse.params, sum(shares) / len(shares) if shares else None, teacher_macs)


def step_share(cost: Cost, pruner: Pruner, densities: Mapping[str, float]) -> float:
    """What a training step of the whole model costs at these densities, as a share of a dense step."""
    return flops.model_share(cost, pruner.step_shares(densities))


def planned_sparse_share(cost: Cost, pruner: Pruner) -> float | None:
    """What training will cost in the sparse layers alone, as a share of dense training; 1 where there are none."""
    sparse = sum(cost.macs[target.name] for target in pruner.targets)
    account = planned(cost, pruner)
    if account.training_share is None:
        return None
    return 1 - (1 - account.training_share) * cost.total_macs / sparse if sparse else 1.0


def _account(
    cost: Cost, densities: Mapping[str, float | None], parameters: int | None, share: float | None, teacher_macs: int
) -> Account:
    known = {name: density for name, density in densities.items() if density is not None}
    dense = flops.dense_totals(cost)
    taught = teacher_macs / (PASSES * dense.macs) if dense.macs else 0.0
    return Account(
        dense=dense,
        sparse=flops.sparse_totals(cost, known) if len(known) == len(densities) else None,
        parameters=parameters,
        training_share=None if share is None else share + taught,
        teacher_share=taught,
    )


def _planned_share(cost: Cost, pruner: Pruner, epoch: int) -> float | None:
    densities = pruner.planned_layers(epoch)
    known = {name: density for name, density in densities.items() if density is not None}
    return step_share(cost, pruner, known) if len(known) == len(densities) else None


def _planned_parameters(cost: Cost, pruner: Pruner) -> int | None:
    """Parameters in the end, also where only their sum is known before training."""
    densities = pruner.planned_densities()
    known = {name: density for name, density in densities.items() if density is not None}
    if len(known) == len(densities):
        return flops.sparse_totals(cost, known).params
    density = pruner.planned_density(pruner.epochs - 1)
    weights = sum(target.weight.numel() for target in pruner.targets)
    return None if density is None else cost.total_params - round(weights * (1 - density))
