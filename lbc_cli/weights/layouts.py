"""How foreign files encode sparse weights. A new layout: a module with `recognises` and `decode`, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lbc_cli.weights import asp, authors, bitmask
from lbc_cli.weights.base import Decoded


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to store sparse weights.

    Attributes:
        description: one line for people.
        recognises: whether tensors by these names are of this layout.
        decode: the tensors as the model has them; CheckpointError if they contradict the layout.
        method: what a checkpoint made from it gives as its method.
    """

    description: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    decode: Callable[[Mapping[str, Tensor]], Decoded]
    method: str


LAYOUTS: dict[str, Layout] = {
    "lbc-authors": Layout(
        "scores and dense weights of the LBC authors' code", authors.recognises, authors.decode, "lbc"
    ),
    "sparse-24-bitmask": Layout("compressed-tensors before 0.15", bitmask.recognises, bitmask.decode, "unknown"),
    "asp": Layout("weights of apex ASP with their masks", asp.recognises, asp.decode, "asp"),
}


def resolve(tensors: Mapping[str, Tensor]) -> tuple[str | None, Decoded]:
    """The layout of some tensors, None where they are plain weights, and what they are once it is resolved."""
    for name, layout in LAYOUTS.items():
        if layout.recognises(tensors):
            return name, layout.decode(tensors)
    return None, Decoded(tensors=tensors)
