"""Remarks on a bench, each said once with the places that it holds for."""

from __future__ import annotations

import torch

from lbc_cli.errors import one_line

_SHOWN = 3


class Notes:
    """Collects remarks."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, text: str, place: str = "") -> None:
        """Add a remark, and a place that it holds for; "" for all."""
        places = self._places.setdefault(text, [])
        if place and place not in places:
            places.append(place)

    def lines(self) -> tuple[str, ...]:
        """The remarks in the order in which they were first made."""
        return tuple(f"{text} ({_some(places)})" if places else text for text, places in self._places.items())


def reason_of(error: Exception) -> str:
    """What a library says about what it cannot do, in one line of bounded length.

    Raises:
        Exception: the error itself where memory has run out: that is no matter of what a library can do.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        raise error
    return one_line(" ".join(str(error).split()), most=200)


def _some(places: list[str]) -> str:
    rest = len(places) - _SHOWN
    shown = places if rest <= 0 else places[:_SHOWN]
    return "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")
