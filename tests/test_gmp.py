"""Gradual magnitude pruning against an oracle in plain loops, over whole runs in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli.errors import MethodError
from lbc_cli.methods import attach
from lbc_cli.methods.gmp import Gmp
from tests import unstructured as shared
from tests.unstructured import EPOCHS, LAYERS, STEPS, TARGETS, Masked, batches, kept_of, learning_rate, network, ranked


class PaperGmp(Masked):
    """Zhu and Gupta's schedule (Eq. 1) and the smallest weights, weight by weight; removed weights stay removed."""

    def prune(self, time: Fraction, t_i: int, t_f: int, sparsity: str, scope: str) -> None:
        share = Fraction(time >= t_f)
        if t_i < time < t_f:
            share = 1 - (1 - (time - t_i) / (t_f - t_i)) ** 3
        names = [(name,) for name in TARGETS] if scope == "layer" else [TARGETS]
        for together in names:
            places = [(name, place) for name in together for place in range(self.weights[name].numel())]
            sizes = [
                float(self.weights[name].detach().abs().flatten()[place]) if self.mask(name, place) else -1.0
                for name, place in places
            ]
            keep = kept_of(len(places), sparsity, share)
            for rank in ranked(sizes)[keep:]:
                name, place = places[rank]
                if self.mask(name, place):
                    self.masks[name].view(-1)[place] = 0
                    self.forget(name, [place])

    def mask(self, name: str, place: int) -> bool:
        return bool(self.masks[name].flatten()[place])


def compare(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    *,
    t_i: int = 0,
    t_f: int = 4,
    sparsity: float = 0.8,
    scope: str = "layer",
    every: int = 0,
) -> None:
    """Train both in step: masks must be equal after every update and at every epoch, weights to 1e-12."""
    model = network()
    optimizer = make(model.parameters())
    options = {"t_i": t_i, "t_f": t_f, "sparsity": sparsity, "scope": scope, "every": every}
    pruner = attach(model, optimizer, method="gmp", epochs=EPOCHS, layers=LAYERS, **options)
    oracle = PaperGmp(copy.deepcopy(model), make)
    wanted = (t_i, t_f, str(sparsity), scope)
    step = 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        oracle.prune(Fraction(epoch), *wanted)
        assert_same(pruner, oracle)
        for number, (images, labels) in enumerate(batches(epoch), 1):
            step += 1
            nn.functional.cross_entropy(model(images), labels).backward()
            oracle.backward(lambda f, x=images, y=labels: nn.functional.cross_entropy(f(x), y))
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(learning_rate(step))
            if every and number % every == 0 and epoch > 0:
                oracle.prune(epoch + Fraction(min(number, STEPS - 1), STEPS), *wanted)
            assert_same(pruner, oracle)
    assert pruner.phase == "final"
    kept = sum(int(mask.sum()) for mask in pruner.masks().values())
    sizes = [t.weight.numel() for t in pruner.targets]
    assert kept == (
        kept_of(sum(sizes), str(sparsity)) if scope == "global" else sum(kept_of(n, str(sparsity)) for n in sizes)
    )


def assert_same(pruner: Any, oracle: PaperGmp) -> None:
    effective = oracle.effective()
    for target in pruner.targets:
        assert torch.equal(pruner.masks()[target.name], oracle.masks[target.name].bool())
    weights = {t.name: t.weight for t in pruner.targets}
    for name, weight in weights.items():
        assert (weight.detach() - effective[name]).abs().max().item() <= 1e-12


def sgd(**kwargs: Any) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.97])
def test_equals_the_paper(scope: str, sparsity: float) -> None:
    compare(MOMENTUM, scope=scope, sparsity=sparsity)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_equals_the_paper_within_epochs(scope: str, every: int) -> None:
    compare(MOMENTUM, scope=scope, every=every, t_i=1, t_f=5)


@pytest.mark.parametrize("when", [(0, 0), (2, 2), (2, 5), (0, 5)])
def test_equals_the_paper_for_every_schedule(when: tuple[int, int]) -> None:
    compare(MOMENTUM, t_i=when[0], t_f=when[1], every=2)


@pytest.mark.parametrize(
    "make",
    [
        sgd(),
        sgd(momentum=0.9, nesterov=True, weight_decay=1e-2),
        lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.05),
    ],
    ids=["plain", "nesterov", "adamw"],
)
def test_equals_the_paper_under_other_optimizers(make: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
    compare(make, every=1)


def run(every: int = 0, **options: Any) -> list[float]:
    """Densities after every begin of an epoch and every update."""
    model = network()
    optimizer = MOMENTUM(model.parameters())
    pruner = attach(model, optimizer, method="gmp", epochs=EPOCHS, layers=LAYERS, every=every, **options)
    seen = []
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        assert pruner.density() == pruner.planned_density(epoch)
        assert pruner.densities() == pruner.planned_layers(epoch)
        assert pruner.phase == ("final" if epoch >= options["t_f"] else "training")
        seen.append(pruner.density())
        for images, labels in batches(epoch):
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(pruner.density())
    return seen


def test_density_falls_within_epochs_and_never_rises() -> None:
    once, often = run(t_i=1, t_f=4), run(every=1, t_i=1, t_f=4)
    for seen in (once, often):
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] == pytest.approx(0.1, abs=0.005)
    assert len(set(once)) == 4
    assert len(set(often)) > 10
    assert often[:: STEPS + 1] == once[:: STEPS + 1]  # what an epoch begins with does not depend on `every`


def test_a_global_ranking_gives_layers_what_they_are_worth() -> None:
    model = network()
    model[5].weight.data *= 10
    pruner = attach(model, MOMENTUM(model.parameters()), method="gmp", epochs=2, layers=LAYERS, scope="global", t_f=0)
    assert set(pruner.planned_densities().values()) == {None}
    pruner.begin_epoch(0)
    densities = pruner.densities()
    assert densities["5.weight"] > 2 * densities["1.weight"]
    assert sum(int(mask.sum()) for mask in pruner.masks().values()) == kept_of(315 + 220, "0.9")
    with pytest.raises(MethodError, match="keeps none of 535 weights"):
        attach(network(), MOMENTUM(network().parameters()), method="gmp", epochs=2, layers=LAYERS, scope="global",
               sparsity=0.9999)  # fmt: skip


def test_a_state_within_an_epoch_goes_on_bit_for_bit() -> None:
    """Clock and masks are part of it."""
    ends = []
    for stop in (None, (2, 1)):
        model = network()
        optimizer = MOMENTUM(model.parameters())
        options: dict[str, Any] = {"method": "gmp", "epochs": EPOCHS, "layers": LAYERS, "every": 2, "t_f": 5}
        pruner = attach(model, optimizer, **options)
        for epoch in range(EPOCHS):
            pruner.begin_epoch(epoch)
            for number, (images, labels) in enumerate(batches(epoch)):
                if (epoch, number) == stop:
                    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
                    model = network(seed=1)
                    optimizer = MOMENTUM(model.parameters())
                    pruner = attach(model, optimizer, **options)
                    for part, state in zip((model, optimizer, pruner), saved, strict=True):
                        part.load_state_dict(state)
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_an_overflow_in_a_fused_optimizer_is_no_step() -> None:
    model = network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    pruner = attach(model, optimizer, method="gmp", epochs=4, layers=LAYERS, every=1)
    assert isinstance(pruner, Gmp)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    pruner.begin_epoch(0)
    for overflow in (False, True, False):
        optimizer.zero_grad()
        images, labels = next(shared.batches(0))
        scaler.scale(nn.functional.cross_entropy(model(images.float()), labels)).backward()
        if overflow:
            model[1].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert pruner.clock.steps == 2


@pytest.mark.parametrize(
    "options", [{"t_f": 4}, {"t_i": 3, "t_f": 1}, {"every": -1}, {"scope": "all"}, {"sparsity": 1}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    model = network()
    with pytest.raises(MethodError):
        attach(model, MOMENTUM(model.parameters()), method="gmp", epochs=4, layers=LAYERS, **options)
