"""Rounding weights to the dtype of an artefact, and what it did to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lbc_cli.checkpoint.container import TensorInfo
from lbc_cli.errors import UsageError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_SPELLED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(slots=True)
class Caster:
    """Rounds floating-point tensors to one dtype (nearest, ties to even); others pass as they are.

    Attributes:
        dtype: what to round to; None: nothing is touched.
        sources: dtypes that were rounded or widened.
        zeroed: weights that were not zero and became it.
        largest: the largest change of a number.
        value: the number that changed so.
    """

    dtype: torch.dtype | None
    sources: set[str] = field(default_factory=set)
    zeroed: int = 0
    largest: float = 0.0
    value: float = 0.0

    @classmethod
    def to(cls, name: str | None) -> Caster:
        """From the name of a dtype, such as "bfloat16"; None leaves every tensor as it is."""
        return cls(None if name is None else DTYPES[name])

    def info(self, stored: TensorInfo) -> TensorInfo:
        """Dtype and shape that a tensor will have."""
        if self.dtype is None or not stored.dtype.startswith(("F", "BF")):
            return stored
        return TensorInfo(_SPELLED[self.dtype], stored.shape)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in its new dtype.

        Raises:
            UsageError: if a finite value would become infinite.
        """
        if self.dtype in (None, tensor.dtype) or not tensor.dtype.is_floating_point:
            return tensor
        rounded = tensor.to(self.dtype)
        self.sources.add(_short(tensor.dtype))
        for before, after in _pieces(tensor, rounded):
            self._compare(name, before, after)
        return rounded

    def _compare(self, name: str, before: Tensor, after: Tensor) -> None:
        if not before.numel():
            return
        kind = torch.float64 if before.dtype == torch.float64 else torch.float32
        wide, back = before.to(kind), after.to(kind)
        change = (wide - back).abs()
        if not bool(change.max().isfinite()):
            _refuse_overflow(name, wide, after)
            change = change.nan_to_num(0.0)  # NaN and infinities stay what they were
        self.zeroed += int(wide.count_nonzero() - back.count_nonzero())
        at = change.reshape(-1).argmax()
        if float(change.reshape(-1)[at]) > self.largest:
            self.largest, self.value = float(change.reshape(-1)[at]), float(wide.reshape(-1)[at])

    def notes(self) -> tuple[str, ...]:
        """What the user should know of it; nothing if no weight changed."""
        if not self.sources or not self.largest:
            return ()
        sources = " and ".join(sorted(self.sources))
        zeroed = f"; {self.zeroed} of them became 0" if self.zeroed else ""
        return (
            f"tensors rounded from {sources} to {_short(self.dtype)}: the largest change is {self.largest:.3g}, of "
            f"{self.value:.6g}{zeroed}",
        )


def _refuse_overflow(name: str, wide: Tensor, after: Tensor) -> None:
    lost = wide.isfinite() & ~after.isfinite()
    if bool(lost.any()):
        raise UsageError(
            f"tensor {name} holds {wide[lost][0].item():.6g}, which {_short(after.dtype)} cannot: "
            f"its largest number is {torch.finfo(after.dtype).max:.6g}; choose another --dtype"
        )


def _pieces(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in pieces: the comparison in float64 should not take eight times a large layer."""
    return zip(torch.split(before.reshape(-1), 1 << 20), torch.split(after.reshape(-1), 1 << 20), strict=True)


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
