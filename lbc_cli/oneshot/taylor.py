"""First-order Taylor scores: how much the loss would change without a weight, squared.

Source: P. Molchanov, A. Mallya, S. Tyree, I. Frosio and J. Kautz, "Importance Estimation for Neural Network Pruning",
CVPR 2019, Eq. 8: the change of the loss without weight w is estimated by its first-order term, squared,

    score(w) = (w dL/dw)^2,   averaged over the images.

The square rather than the absolute value, which the paper weighs in its appendix, is its published method.

Deviations: they score whole filters and average over minibatches, we score single weights and take the gradient of
one image at a time. The gradient of a minibatch depends on its length and vanishes on average in a trained network;
the mean over single images does neither, and is w^2 times the diagonal of the empirical Fisher matrix. The pruning is
in one shot, where theirs alternates with training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbc_cli.errors import MethodError
from lbc_cli.oneshot.choice import Calibration, Chosen, Masker, mask_by
from lbc_cli.targets import Target
from lbc_cli.tasks import Classification


def by_taylor(targets: Sequence[Target], calibration: Calibration | None, mask: Masker = mask_by) -> Chosen:
    """Keep the weights of largest (w dL/dw)^2; L is the cross-entropy of one image.

    Args:
        targets: the weights, [O, I, *K] each.
        calibration: model, images and labels.
        mask: from the scores to what stays.

    Raises:
        MethodError: if a weight takes no part in the loss, or a gradient is not finite.
    """
    assert calibration is not None
    squares = _squared_gradients([target.name for target in targets], calibration)
    masks = {}
    for target, square in zip(targets, squares, strict=True):
        scores = square.cpu().double() * target.weight.detach().double() ** 2 / len(calibration.images)
        masks[target.name] = mask(scores, target)
    return Chosen(masks)


def _squared_gradients(names: Sequence[str], calibration: Calibration) -> list[Tensor]:
    """The sum over the images of (dL/dw)^2, float32 [O, I, *K] for each name."""
    model, task = calibration.model, Classification()
    parameters = [model.get_parameter(name) for name in names]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for done, (image, label) in enumerate(calibration.batches(1)):
        calibration.progress("gradients, images", done, len(calibration.images))
        loss, _ = task.training_loss(model, image, label)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, total, gradient in zip(names, sums, gradients, strict=True):
            if gradient is None:
                raise MethodError(
                    f"taylor needs the gradient of every sparse layer: {name} takes no part in the loss; leave it "
                    f"dense with --layers '{name}=dense'"
                )
            total.addcmul_(gradient, gradient)
    return sums
