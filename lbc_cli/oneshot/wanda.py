"""Wanda scores: magnitude times the norm of what the weight is multiplied by.

Source: M. Sun, Z. Liu, A. Bair and J. Z. Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
ICLR 2024 (arXiv:2306.11695), Eq. 1, and its N:M variant, which compares within groups of M inputs of one output:

    score(w_oj) = |w_oj| * ||X_j||_2        X_j: input j of the layer over all calibration inputs

The paper has linear layers; for a convolution an input j is a channel at a kernel position, and its norm runs over the
output pixels, zeros of the padding included: that is the column of the layer as a matrix product. Nothing is updated.

Deviation: the norms are those of the dense model, from one pass over the images. The paper's code prunes block after
block and passes the inputs through the blocks that are pruned already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbc_cli.errors import MethodError
from lbc_cli.oneshot.choice import Calibration, Chosen, Masker, mask_by
from lbc_cli.oneshot.inputs import Seen, Watch, from_order, not_seen
from lbc_cli.targets import Target

BATCH = 32


def by_wanda(targets: Sequence[Target], calibration: Calibration | None, mask: Masker = mask_by) -> Chosen:
    """Keep the weights of largest |w| ||x||.

    Args:
        targets: the weights, [O, I, *K] each.
        calibration: model and images; the labels play no part.
        mask: from the scores to what stays.

    Raises:
        MethodError: if a layer's inputs cannot be seen, or are not finite.
    """
    assert calibration is not None
    squares = _squared_norms([target.name for target in targets], calibration)
    masks = {}
    for target in targets:
        if target.name not in squares:
            raise MethodError(not_seen("wanda", target.name))
        norms = squares[target.name].sqrt().cpu()  # [G, K * I]
        rows = norms.repeat_interleave(target.weight.shape[0] // len(norms), dim=0)
        scores = target.weight.detach().double().abs() * from_order(rows, target.weight.shape)
        masks[target.name] = mask(scores, target)
    return Chosen(masks)


@torch.no_grad()
def _squared_norms(names: Sequence[str], calibration: Calibration) -> dict[str, Tensor]:
    """Name -> float64 [G, K * I], the squared norm of each input of the layer, for every layer that was seen."""
    squares: dict[str, Tensor] = {}

    def note(name: str, seen: Seen) -> None:
        squares[name] = squares[name] + seen.squares() if name in squares else seen.squares()

    done = 0
    weights = {name: calibration.model.get_parameter(name) for name in names}
    with Watch(weights, note):
        for images, _ in calibration.batches(BATCH):
            calibration.progress("norms of inputs, images", done, len(calibration.images))
            calibration.model(images)
            done += len(images)
    return squares
