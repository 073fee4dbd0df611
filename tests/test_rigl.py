"""RigL against an oracle in plain loops, over whole runs in float64, and ERK against the authors' procedure."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import attach
from lbc_cli.methods.rigl import RigL, layer_counts
from tests.unstructured import EPOCHS, LAYERS, STEPS, TARGETS, Masked, batches, kept_of, learning_rate, network, ranked


def erk_densities(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """As `get_mask_random_numpy` and `get_sparsities_erdos_renyi` of the authors go about it, in floats."""
    dense: set[str] = set()
    while True:
        divisor, rhs, raw = 0.0, 0.0, {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            if name in dense:
                rhs -= size * sparsity
            else:
                rhs += size * (1 - sparsity)
                raw[name] = sum(shape) / size
                divisor += raw[name] * size
        epsilon = rhs / divisor
        most = max(raw.values())
        if most * epsilon <= 1:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense |= {name for name, value in raw.items() if value == most}


class PaperRigL(Masked):
    """Algorithm 1, weight by weight; the optimizer's update follows the change."""

    def change(self, time: Fraction, t_end: int, alpha: float) -> None:
        fraction = alpha / 2 * (1 + math.cos(math.pi * float(time / t_end)))
        for name in TARGETS:
            mask, weight = self.masks[name].flatten(), self.weights[name].detach().flatten()
            gradient = self.dense_grads[name].flatten()
            kept = [place for place in range(len(mask)) if mask[place]]
            number = math.floor(fraction * len(kept))
            by_size = ranked(float(weight[place].abs()) if mask[place] else -1.0 for place in range(len(mask)))
            staying = set(by_size[: len(kept) - number])
            others = [place for place in range(len(mask)) if place not in staying]
            order = ranked(float(gradient[place].abs()) for place in others)
            grown = {others[rank] for rank in order[:number]}
            after = staying | grown
            self.forget(name, set(kept) ^ after)
            self.masks[name] = torch.tensor([float(place in after) for place in range(len(mask))]).double()
            self.masks[name] = self.masks[name].reshape(self.weights[name].shape)
            self.weights[name].grad.mul_(self.masks[name])


def compare(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    *,
    accumulate: int = 1,
    skip: int = 0,
    zero: bool = False,
    clip: float = 0.0,
    **options: Any,
) -> RigL:
    """Train both in step: masks equal and weights to 1e-12 after every update."""
    options = {"every": 3, "alpha": 0.5, "t_end": 4, "sparsity": 0.7, **options}
    model = network()
    optimizer = make(model.parameters())
    pruner = attach(model, optimizer, method="rigl", epochs=EPOCHS, layers=LAYERS, **options)
    assert isinstance(pruner, RigL)
    oracle = PaperRigL(copy.deepcopy(model), make)
    pruner.begin_epoch(0)
    oracle.masks = {name: mask.double() for name, mask in pruner.masks().items()}  # drawn at random
    updates, per_epoch, batch = 0, 0, 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        inside = 0
        for images, labels in batches(epoch, 2 * STEPS):
            batch += 1
            (nn.functional.cross_entropy(model(images), labels) / accumulate).backward()
            oracle.backward(lambda f, x=images, y=labels: nn.functional.cross_entropy(f(x), y) / accumulate)
            if batch % accumulate:
                continue
            if skip and batch % skip == 0:
                optimizer.zero_grad(set_to_none=not zero)
                oracle.clear()
                continue
            updates += 1
            optimizer.param_groups[0]["lr"] = learning_rate(updates)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                nn.utils.clip_grad_norm_(list(oracle.weights.values()), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not zero)
            if updates % options["every"] == 0 and epoch < options["t_end"]:
                time = epoch + Fraction(min(inside, per_epoch - 1), per_epoch) if per_epoch else Fraction(epoch)
                oracle.change(time, options["t_end"], options["alpha"])
            inside += 1
            oracle.step(learning_rate(updates))
            assert_same(pruner, oracle)
        per_epoch = inside
    assert pruner.phase == "final"
    return pruner


def assert_same(pruner: RigL, oracle: PaperRigL) -> None:
    effective = oracle.effective()
    for target in pruner.targets:
        mask = pruner.masks()[target.name]
        assert torch.equal(mask, oracle.masks[target.name].bool())
        assert int(mask.sum()) == pruner.counts[target.name]
        assert (target.weight.detach() - effective[target.name]).abs().max().item() <= 1e-12


def sgd(**kwargs: Any) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)


@pytest.mark.parametrize("every", [1, 3, 5])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_equals_the_paper(every: int, distribution: str) -> None:
    pruner = compare(MOMENTUM, every=every, distribution=distribution)
    assert pruner._changes == 4 * 2 * STEPS // every


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": 0.05, "t_end": 5}, {"sparsity": 0.9}, {"t_end": 1}])
def test_equals_the_paper_for_every_option(options: dict[str, Any]) -> None:
    compare(MOMENTUM, **options)


@pytest.mark.parametrize(
    "how",
    [
        {"accumulate": 2},
        {"zero": True},
        {"zero": True, "accumulate": 2, "every": 1},
        {"skip": 3},
        {"skip": 4, "accumulate": 2, "zero": True},
        {"clip": 0.05},
    ],
    ids=str,
)
def test_equals_the_paper_under_the_habits_of_training_loops(how: dict[str, Any]) -> None:
    compare(MOMENTUM, **how)


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
    compare(make)


SHAPES = {
    "conv": (64, 32, 3, 3),
    "down": (64, 32, 1, 1),
    "wide": (256, 64, 1, 1),
    "deep": (128, 128, 3, 3),
    "tiny": (8, 4),
    "fc": (100, 512),
}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 0.98])
def test_erk_is_that_of_the_authors(sparsity: float) -> None:
    counts = layer_counts(SHAPES, Fraction(str(sparsity)), "erk")
    expected = erk_densities(SHAPES, sparsity)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    for name, size in sizes.items():
        assert abs(counts[name] - expected[name] * size) <= 1.001
        assert 0 < counts[name] <= size
    assert sum(counts.values()) == kept_of(sum(sizes.values()), str(sparsity))
    assert counts["tiny"] == 32
    uniform = layer_counts(SHAPES, Fraction(str(sparsity)), "uniform")
    assert sum(uniform.values()) == sum(counts.values())
    assert all(abs(uniform[name] - (1 - sparsity) * size) <= 1 for name, size in sizes.items())


def begun(seed: int = 0, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, RigL]:
    model = network()
    torch.manual_seed(seed)
    optimizer = MOMENTUM(model.parameters())
    pruner = attach(model, optimizer, method="rigl", epochs=EPOCHS, layers=LAYERS, **options)
    assert isinstance(pruner, RigL)
    state = torch.get_rng_state()
    pruner.begin_epoch(0)
    assert torch.equal(torch.get_rng_state(), state), "other random numbers are as without it"
    return model, optimizer, pruner


def test_first_masks_follow_from_the_seed_and_not_from_the_weights() -> None:
    first, same, other = (begun(seed)[2].masks() for seed in (0, 0, 1))
    assert all(torch.equal(mask, same[name]) for name, mask in first.items())
    assert any(not torch.equal(mask, other[name]) for name, mask in first.items())
    torch.manual_seed(7)
    layer = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 2))  # the first numbers of the seed become its weights
    weight = layer[0].weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.manual_seed(7)
    pruner = attach(layer, optimizer, method="rigl", epochs=4, sparsity=0.5, layers={"0": "sparse"})
    pruner.begin_epoch(0)
    kept = weight[pruner.masks()["0.weight"]]
    assert abs(kept.mean().item()) < 4 * weight.std().item() / math.sqrt(kept.numel())


def backward(model: nn.Module, epoch: int = 0) -> None:
    images, labels = next(batches(epoch))
    nn.functional.cross_entropy(model(images), labels).backward()


def test_nobody_else_sees_the_dense_gradient() -> None:
    """Neither norms before the step, nor the optimizer; it is held for the change and no longer."""
    model, optimizer, pruner = begun(every=2)
    held = []
    for _ in range(4):
        backward(model)
        for target in pruner.targets:
            grad = target.weight.grad
            assert grad is not None
            assert (grad[~pruner.masks()[target.name]] == 0).all()
        held.append((pruner.memory_bytes()["dense gradient"] > 0, pruner._due))
        before = pruner.masks()
        optimizer.step()
        grown = {name: mask & ~before[name] for name, mask in pruner.masks().items()}
        for target in pruner.targets:
            assert (target.weight[grown[target.name]] == 0).all()
            assert (optimizer.state[target.weight]["momentum_buffer"][grown[target.name]] == 0).all()
        optimizer.zero_grad()
    assert [due for _, due in held] == [False, True, False, True]
    assert held[0] == (False, False)


def test_a_dropped_weight_leaves_no_momentum_and_a_grown_one_moves_with_the_next_update() -> None:
    model, optimizer, pruner = begun(every=2, alpha=0.9, sparsity=0.5)
    before: dict[str, Tensor] = {}
    for _ in range(2):
        before = pruner.masks()
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    grown = {name: mask & ~before[name] for name, mask in pruner.masks().items()}
    for target in pruner.targets:
        dropped = before[target.name] & ~pruner.masks()[target.name]
        assert 0 < dropped.sum() == grown[target.name].sum()
        assert (optimizer.state[target.weight]["momentum_buffer"][dropped] == 0).all()
        assert (target.weight[grown[target.name]] == 0).all()
    backward(model)
    optimizer.step()
    for target in pruner.targets:
        assert (target.weight[grown[target.name]] != 0).all()


def test_masks_stay_from_t_end_on_and_a_run_without_changes_says_so() -> None:
    model, optimizer, pruner = begun(every=1, t_end=2)
    seen = []
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        assert pruner.phase == ("final" if epoch >= 2 else "training")
        before = pruner.masks()["1.weight"]
        backward(model, epoch)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(not torch.equal(before, pruner.masks()["1.weight"]))
    assert seen == [True, True, False, False, False, False]
    model, optimizer, pruner = begun()
    backward(model)
    optimizer.step()
    with pytest.warns(UserWarning, match="the masks never changed: every = 100, but there were only 1 updates"):
        pruner.begin_epoch(EPOCHS - 1)


def test_a_resumed_run_knows_that_its_masks_have_changed(recwarn: pytest.WarningsRecorder) -> None:
    model, optimizer, pruner = begun(every=1, t_end=2)
    backward(model)
    optimizer.step()
    again = begun(every=1, t_end=2)[2]
    backward(model)  # an update that the saved run never made
    again.load_state_dict(copy.deepcopy(pruner.state_dict()))
    assert again.memory_bytes()["dense gradient"] == 0
    again.begin_epoch(2)
    assert not recwarn.list


def test_overflow_at_a_removed_weight_ranks_first_and_nan_last() -> None:
    model, optimizer, pruner = begun(every=1, alpha=0.5)
    target = pruner.targets[0]
    backward(model)
    places = (~pruner.masks()[target.name]).nonzero()
    pruner._gradients[target.name][tuple(places[3])] = float("inf")
    pruner._gradients[target.name][tuple(places[5])] = float("nan")
    optimizer.step()
    mask = pruner.masks()[target.name]
    assert mask[tuple(places[3])]
    assert not mask[tuple(places[5])]
    assert int(mask.sum()) == pruner.counts[target.name]
    target.weight.data[0, 0] = float("nan")
    backward(model)
    with pytest.raises(DivergenceError, match="not finite"):
        optimizer.step()


def test_training_costs_the_density_and_a_dense_gradient_now_and_then() -> None:
    pruner = begun(every=4, sparsity=0.8)[2]
    layers = pruner.planned_layers(0)
    assert layers == pruner.densities() == pruner.planned_layers(EPOCHS - 1)
    assert layers["5.weight"] != layers["1.weight"]
    assert pruner.step_shares({"x": 0.1}) == {"x": pytest.approx((3 * 0.1 + (2 * 0.1 + 1) / 3) / 4)}


@pytest.mark.parametrize("options", [{"t_end": 6}, {"every": 0}, {"alpha": 0.0}, {"distribution": "er"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    model = network()
    with pytest.raises(MethodError):
        attach(model, MOMENTUM(model.parameters()), method="rigl", epochs=EPOCHS, layers=LAYERS, **options)


def _process(rank: int, folder: str) -> None:
    """One of two processes with images and seeds of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = network()
        torch.manual_seed(rank)
        optimizer = MOMENTUM(model.parameters())
        pruner = attach(model, optimizer, method="rigl", epochs=4, layers=LAYERS, every=1, sparsity=0.7)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for epoch in range(2):
            pruner.begin_epoch(epoch)
            for images, labels in batches(10 * rank + epoch):
                nn.functional.cross_entropy(wrapped(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.save({"weights": model.state_dict(), "masks": pruner.masks()}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_processes_of_a_distributed_run_agree(tmp_path: Path) -> None:
    """First masks, and the gradients that decide what grows, though each process has only its own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for kind, tensors in one.items():
        assert all(torch.equal(tensor, two[kind][name]) for name, tensor in tensors.items())
