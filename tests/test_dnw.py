"""DNW against an oracle: autograd through a straight-through function, top-k in plain loops, over whole runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import attach
from lbc_cli.methods.dnw import Dnw
from tests.unstructured import EPOCHS, LAYERS, TARGETS, batches, kept_of, learning_rate, network, ranked


class ChooseTopEdges(torch.autograd.Function):
    """The authors' function: the largest weights forward, the gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: int) -> Tensor:
        flat = weight.flatten()
        out = torch.zeros_like(flat)
        for place in ranked(flat.abs().tolist())[:keep]:
            out[place] = flat[place]
        return out.reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class PaperDnw:
    """Dense leaves under torch's optimizer; the sparse weights exist only in the forward pass."""

    def __init__(self, model: nn.Module, make: Any, sparsity: str) -> None:
        self.model, self.weights = model, dict(model.named_parameters())
        self.optimizer = make(list(self.weights.values()))
        self.keep = {name: kept_of(self.weights[name].numel(), sparsity) for name in TARGETS}

    def effective(self) -> dict[str, Tensor]:
        return {
            name: ChooseTopEdges.apply(weight, self.keep[name]) if name in TARGETS else weight
            for name, weight in self.weights.items()
        }

    def backward(self, images: Tensor, labels: Tensor, accumulate: int) -> None:
        outputs = torch.func.functional_call(self.model, self.effective(), (images,))
        (nn.functional.cross_entropy(outputs, labels) / accumulate).backward()


def sgd(**kwargs: Any) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)


@pytest.mark.parametrize(
    ("make", "sparsity", "accumulate", "clip"),
    [
        (MOMENTUM, 0.5, 1, 0.0),
        (MOMENTUM, 0.9, 1, 0.0),
        (MOMENTUM, 0.8, 2, 0.0),
        (MOMENTUM, 0.8, 1, 0.05),
        (sgd(), 0.8, 1, 0.0),
        (sgd(momentum=0.9, nesterov=True, weight_decay=1e-2), 0.8, 2, 0.1),
        (lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.05), 0.8, 1, 0.0),
    ],
)
def test_equals_the_paper(make: Any, sparsity: float, accumulate: int, clip: float) -> None:
    model = network()
    optimizer = make(model.parameters())
    pruner = attach(model, optimizer, method="dnw", epochs=EPOCHS, layers=LAYERS, sparsity=sparsity)
    oracle = PaperDnw(copy.deepcopy(model), make, str(sparsity))
    step = moved = 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for number, (images, labels) in enumerate(batches(epoch), 1):
            (nn.functional.cross_entropy(model(images), labels) / accumulate).backward()
            oracle.backward(images, labels, accumulate)
            if number % accumulate:
                continue
            step += 1
            before = pruner.masks()
            for which, trained in ((optimizer, model), (oracle.optimizer, oracle.model)):
                which.param_groups[0]["lr"] = learning_rate(step)
                if clip:
                    nn.utils.clip_grad_norm_(trained.parameters(), clip)
                which.step()
                which.zero_grad()
            effective = oracle.effective()
            for name, weight in model.named_parameters():
                assert (weight.detach() - effective[name].detach()).abs().max().item() <= 1e-12
            for name, mask in pruner.masks().items():
                assert torch.equal(mask, effective[name] != 0)
                assert int(mask.sum()) == oracle.keep[name]
                moved += int((mask & ~before[name]).sum())
    assert pruner.phase == "final"
    assert moved > 0, "weights came back"


def test_density_is_exact_from_the_first_epoch_and_known_for_every_layer() -> None:
    model = network()
    pruner = attach(model, MOMENTUM(model.parameters()), method="dnw", epochs=EPOCHS, layers=LAYERS, sparsity=0.8)
    assert isinstance(pruner, Dnw)
    assert pruner.phase == "training"
    pruner.begin_epoch(0)
    assert pruner.phase == "final"
    assert pruner.densities() == pruner.planned_densities() == pruner.planned_layers(3)
    assert pruner.density() == pruner.planned_density(0) == (63 + 44) / 535
    assert pruner.step_shares({"x": 0.1}) == {"x": pytest.approx((2 * 0.1 + 1) / 3)}


def test_what_cannot_be_ranked_or_kept_is_refused() -> None:
    model = network()
    with pytest.raises(MethodError, match=r"keeps none of the 220 weights of 5\.weight"):
        attach(model, MOMENTUM(model.parameters()), method="dnw", epochs=2, layers=LAYERS, sparsity=0.998)
    pruner = attach(model, MOMENTUM(model.parameters()), method="dnw", epochs=2, layers=LAYERS)
    model[1].weight.data[0, 0] = float("inf")
    with pytest.raises(DivergenceError, match=r"1\.weight are not finite"):
        pruner.begin_epoch(0)
