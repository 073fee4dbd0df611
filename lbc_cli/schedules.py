"""How many candidates (or weights) of a group survive at each epoch, and the density that follows. Exact arithmetic.

Source: Eq. 6 of LBC, the cubic schedule of Zhu and Gupta (2017) applied to the candidates of a group. Epochs are
counted from 0; at t_i nothing has been removed yet, at t_f one candidate is left.

Eq. 6 rounds the number of removed candidates up; the authors' code rounds the number of survivors up. Both are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

from lbc_cli.errors import MethodError

Rounding = Literal["survivors", "removals"]


@dataclass(frozen=True, slots=True)
class Ramp:
    """The stretch of epochs over which weights are removed.

    Args:
        t_i: last epoch at which everything is alive.
        t_f: first epoch at which only the final set is alive; t_i = t_f removes all at once.
        rounding: which of the two numbers is rounded up.

    Raises:
        MethodError: unless 0 <= t_i <= t_f.
    """

    t_i: int
    t_f: int
    rounding: Rounding = "survivors"

    def __post_init__(self) -> None:
        if not 0 <= self.t_i <= self.t_f:
            raise MethodError(
                f"t_i = {self.t_i}, t_f = {self.t_f}: removal must begin at epoch 0 or later and end no earlier; "
                f"set 0 <= t_i <= t_f"
            )

    @classmethod
    def over(cls, epochs: int, t_i: int = 0, t_f: int | None = None, rounding: Rounding = "survivors") -> Ramp:
        """The ramp of a run: t_f is half the epochs, rounded down, unless given.

        Raises:
            MethodError: if t_f is not an epoch of the run, for then the final pattern would never be reached.
        """
        if epochs < 1:
            raise MethodError(f"epochs = {epochs}: a run has at least one epoch")
        end = max(t_i, epochs // 2) if t_f is None else t_f
        if end > epochs - 1:
            raise MethodError(
                f"t_f = {end} is past the last epoch, {epochs - 1} (epochs count from 0): the pattern would never be "
                f"reached; set t_f to {epochs - 1} or less"
            )
        return cls(t_i, end, rounding)

    def remaining(self, epoch: int | Fraction) -> Fraction:
        """(1 - x)^3 with x = (t - t_i) / (t_f - t_i): the exact share of the removable that is left at `epoch`.

        Args:
            epoch: counted from 0; a fraction is a time within an epoch.
        """
        if epoch >= self.t_f:
            return Fraction(0)
        if epoch <= self.t_i:
            return Fraction(1)
        return Fraction(self.t_f - epoch, self.t_f - self.t_i) ** 3

    def survivors(self, epoch: int, total: int, final: int = 1) -> int:
        """How many of `total` are alive at `epoch`, ending at `final`.

        Args:
            epoch: counted from 0.
            total: candidates C of a group, or M where weights are removed one by one.
            final: 1 for candidates, N for weights.

        Returns:
            Between `final` and `total`, never rising with the epoch.
        """
        share = self.remaining(epoch)
        if self.rounding == "survivors":
            return final + ceil((total - final) * share)
        return total - ceil((total - final) * (1 - share))
