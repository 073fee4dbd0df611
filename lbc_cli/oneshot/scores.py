"""The ways to choose the weights that stay, in one shot. Adding one: a function like these, and a line in SCORES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lbc_cli.errors import MethodError, did_you_mean
from lbc_cli.oneshot.choice import Calibration, Chosen, Masker
from lbc_cli.oneshot.sparsegpt import by_sparsegpt
from lbc_cli.oneshot.taylor import by_taylor
from lbc_cli.oneshot.wanda import by_wanda
from lbc_cli.patterns import magnitude_mask
from lbc_cli.targets import Target


@dataclass(frozen=True, slots=True)
class Score:
    """A way to choose the weights that stay.

    Attributes:
        description: one line for people.
        source: where it comes from.
        choose: from the targets of a model, and the calibration where it needs one, to what stays.
        needs_images: whether it looks at calibration images.
        any_mask: whether what stays follows from scores of the weights alone, so that any kind of mask can be drawn.
    """

    description: str
    source: str
    choose: Callable[..., Chosen]
    needs_images: bool = True
    any_mask: bool = True


def by_magnitude(
    targets: tuple[Target, ...], calibration: Calibration | None = None, mask: Masker | None = None
) -> Chosen:
    """Keep the weights of largest magnitude; nothing else is looked at."""
    if mask is not None:
        return Chosen({target.name: mask(target.weight.detach().double().abs(), target) for target in targets})
    return Chosen({target.name: magnitude_mask(target.weight, target.pattern) for target in targets})


SCORES: dict[str, Score] = {
    "magnitude": Score("keep the largest magnitudes", "apex ASP (Mishra et al. 2021)", by_magnitude, False),
    "taylor": Score("keep what the loss would miss most, to first order", "Molchanov et al. 2019", by_taylor),
    "wanda": Score("magnitude times the norm of the input", "Sun et al. 2023", by_wanda),
    "sparsegpt": Score(
        "second order, the kept weights make up for the others", "Frantar, Alistarh 2023", by_sparsegpt, any_mask=False
    ),
}


def find_score(method: str) -> Score:
    """The score of that name.

    Raises:
        MethodError: if there is none.
    """
    if method not in SCORES:
        raise MethodError(f"unknown method {method!r}: one of {', '.join(SCORES)}.{did_you_mean(method, SCORES)}")
    return SCORES[method]
