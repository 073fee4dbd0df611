"""Dense training: the baseline of every comparison, in the same engine.

Nothing is removed and nothing is remembered; the hooks fire over an empty set of targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli.methods.base import MethodOptions, Pruner, State
from lbc_cli.targets import Selection, Target


class DenseOptions(MethodOptions):
    """Dense training has no options."""


class Dense(Pruner):
    """The pruner that removes nothing."""

    method: ClassVar[str] = "dense"

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, selection: Selection, epochs: int, options: DenseOptions
    ) -> None:
        super().__init__(optimizer, Selection((), ()), epochs)

    def removed(self, target: Target) -> Tensor | None:
        """Nothing is removed."""
        return None

    def planned_survivors(self, epoch: int) -> dict[str, int]:
        """No pattern, no survivors to count."""
        return {}

    def planned_density(self, epoch: int) -> float:
        """All weights are kept."""
        return 1.0

    def planned_memory(self) -> dict[str, int]:
        """Nothing is held."""
        return {}

    def memory_bytes(self) -> dict[str, int]:
        """Nothing is held."""
        return {}

    @property
    def phase(self) -> Literal["training", "final"]:
        """Dense weights are always as they will be shipped."""
        return "final"

    def _schedule(self, epoch: int) -> None:
        return

    def _learn(self, targets: Sequence[Target], grads: Sequence[Tensor], group: dict[str, Any]) -> None:
        return

    def _method_state(self) -> State:
        return {}

    def _load_method_state(self, state: State) -> None:
        return
