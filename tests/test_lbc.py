"""LBC with one score per weight against the paper's materialised score matrix, over whole runs in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbc_cli
from lbc_cli import patterns
from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import attach
from lbc_cli.methods.lbc import Lbc, expected_density
from lbc_cli.patterns import Pattern
from tests.reference import PaperLbc

EPOCHS, STEPS = 6, 4
TARGETS = ("1.weight", "5.weight")
LAYERS = {"0": "dense", "7": "dense"}


def network(seed: int = 0) -> nn.Sequential:
    """A stem, a convolution and a linear layer to sparsify (16 output channels or more, 32 inputs), a classifier."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 32, 3),
        nn.Conv2d(32, 16, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.Tanh(),
        nn.Linear(32, 5),
    ]
    return nn.Sequential(*layers).double()


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + epoch)
    return [
        (
            torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(0, 5, (6,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def learning_rate(step: int) -> float:
    """Warm-up from 0, then cosine: every kind of change a scheduler makes."""
    total, warm = EPOCHS * STEPS, 5
    return 0.2 * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm))))


def sgd(**kwargs: Any) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


def compare(
    pattern: str,
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    *,
    accumulate: int = 1,
    clip: float = 0.0,
    skip: int = 0,
    rule: Any = "sgd",
    score_decay: float | None = None,
    **options: Any,
) -> None:
    """Train both in step; alive sets and masks must be equal at every epoch, weights to 1e-12 after every update."""
    model = network()
    wanted = Pattern.parse(pattern)
    optimizer = make(model.parameters())
    pruner = attach(model, optimizer, pattern=wanted, epochs=EPOCHS, layers=LAYERS, **options)
    assert isinstance(pruner, Lbc)
    assert [t.name for t in pruner.targets] == list(TARGETS)
    oracle = PaperLbc(
        copy.deepcopy(model),
        dict.fromkeys(TARGETS, (wanted.n, wanted.m, wanted.vector)),
        make,
        t_i=pruner.ramp.t_i,
        t_f=pruner.ramp.t_f,
        rounding=pruner.ramp.rounding,
        singles=options.get("removal") == "weights",
        rule=rule,
        score_decay=score_decay,
    )
    step = 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        oracle.begin_epoch(epoch)
        assert_same_candidates(pruner, oracle)
        for number, (images, labels) in enumerate(batches(epoch)):
            loss = nn.functional.cross_entropy(model(images), labels) / accumulate
            loss.backward()
            oracle.backward(lambda f, x=images, y=labels: nn.functional.cross_entropy(f(x), y) / accumulate)
            if (number + 1) % accumulate:
                continue
            step += 1
            if skip and step % skip == 0:  # as a training loop does on a bad batch
                optimizer.zero_grad()
                oracle.optimizer.zero_grad()
                continue
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(learning_rate(step), clip)
            assert_same_weights(model, oracle)
    assert pruner.phase == "final"
    for name in TARGETS:
        patterns.check_mask(pruner.masks()[name], wanted)


def assert_same_candidates(pruner: Lbc, oracle: PaperLbc) -> None:
    for target in pruner.targets:
        layer, state = oracle.layers[target.name], pruner._state[target.name]
        assert torch.equal(pruner.masks()[target.name], layer.mask.bool())
        if state.alive is not None:
            bits = patterns.unpack_bits(state.alive, len(layer.subsets))
            assert [set(row.nonzero()[:, 0].tolist()) for row in bits] == layer.alive
        assert all(len(living) == state.count for living in layer.alive)


def assert_same_weights(model: nn.Module, oracle: PaperLbc) -> None:
    effective = oracle.effective()
    for name, weight in model.named_parameters():
        assert (weight.detach() - effective[name]).abs().max().item() <= 1e-12, name


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)


@pytest.mark.parametrize(
    "pattern", ["2:4", "1:4", "2:8", "1:16", "4:8", "2:4/4", "1:16/4", "2:4/16", "1:4/16", "4:8/16"]
)
def test_equals_the_paper_for_every_pattern(pattern: str) -> None:
    compare(pattern, MOMENTUM)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 1e-2},
        {"weight_decay": 1e-2},
        {"momentum": 0.9, "weight_decay": 1e-3, "maximize": True},
        {"momentum": 0.9, "weight_decay": 1e-3, "foreach": True},
        {"momentum": 0.9, "weight_decay": 1e-3, "fused": True},
    ],
    ids=str,
)
def test_equals_the_paper_for_every_linear_optimizer(kwargs: dict[str, Any]) -> None:
    compare("2:4", sgd(**kwargs))


@pytest.mark.parametrize(
    "options", [{"t_f": 0}, {"t_i": 2, "t_f": 4}, {"t_i": 3, "t_f": 3}, {"t_i": 1, "t_f": 5}], ids=str
)
@pytest.mark.parametrize("rounding", ["survivors", "removals"])
def test_equals_the_paper_for_every_schedule(options: dict[str, int], rounding: str) -> None:
    compare("2:4", MOMENTUM, rounding=rounding, **options)


@pytest.mark.parametrize(
    "how", [{"accumulate": 2}, {"clip": 0.05}, {"skip": 3}, {"accumulate": 2, "clip": 0.05, "skip": 2}], ids=str
)
def test_equals_the_paper_under_the_habits_of_training_loops(how: dict[str, Any]) -> None:
    compare("2:8", MOMENTUM, **how)


@pytest.mark.parametrize("pattern", ["8:16", "16:32", "2:4", "4:8/4"])
def test_removal_of_single_weights_equals_its_oracle(pattern: str) -> None:
    compare(pattern, MOMENTUM, removal="weights")


def test_removal_of_weights_and_of_candidates_are_the_same_at_n_1() -> None:
    masks = []
    for removal in ("candidates", "weights"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = attach(model, optimizer, pattern="1:8", epochs=EPOCHS, layers=LAYERS, removal=removal)
        train(model, optimizer, pruner)
        masks.append(pruner.masks())
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in TARGETS)


def test_scores_under_adamw_follow_the_papers_rule() -> None:
    make = lambda params: torch.optim.AdamW(params, lr=0.2, weight_decay=0.05)  # noqa: E731
    compare("2:4", make, rule=(0.2, 2000.0))
    compare("2:4", make, rule=(0.2, 7.0), score_memory=7.0)


def test_score_memory_replaces_the_decay_of_the_scores() -> None:
    compare("2:4", MOMENTUM, score_memory=10.0, score_decay=0.1 / (0.2 * 10))
    compare("2:4", MOMENTUM, score_memory=math.inf, score_decay=0.0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Any, start: int = 0, stop: int = EPOCHS) -> None:
    for epoch in range(start, stop):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        MOMENTUM,
        lambda p: torch.optim.AdamW(p, lr=0.01, eps=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
    ],
    ids=["sgd", "adamw", "rmsprop", "adagrad"],
)
def test_removed_stays_removed_as_positive_zero(make: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
    model = network()
    optimizer = make(model.parameters())
    pruner = attach(model, optimizer, pattern="2:8", epochs=EPOCHS, layers=LAYERS)
    gone: dict[str, Tensor] = {}
    for epoch in range(EPOCHS):
        train(model, optimizer, pruner, epoch, epoch + 1)
        for name, mask in pruner.masks().items():
            weight = model.get_parameter(name).detach()
            assert not mask[gone[name]].any() if name in gone else True
            gone[name] = ~mask
            zeros = weight[gone[name]]
            assert torch.equal(zeros.view(torch.int64), torch.zeros_like(zeros, dtype=torch.int64))
            assert weight.isfinite().all()
    assert pruner.density() == 0.25


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "1:16"])
def test_ties_at_once_do_not_kill_input_channels(pattern: str) -> None:
    """With t_f = 0 every score ties: magnitude must decide, or the same positions survive in every group."""
    model = network().float()
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern=pattern, epochs=2, layers=LAYERS, t_f=0)
    weights = {t.name: t.weight.detach().clone() for t in pruner.targets}
    pruner.begin_epoch(0)
    for target in pruner.targets:
        mask = pruner.masks()[target.name]
        assert torch.equal(mask, patterns.magnitude_mask(weights[target.name], target.pattern))
        alive = mask.flatten(2).any(dim=2).any(dim=0) if mask.dim() > 2 else mask.any(dim=0)
        assert alive.double().mean().item() > 0.75  # position order would leave 1/16 to 1/2; chance alone leaves 0.87


def test_ties_go_to_magnitude_then_to_the_earlier_candidate() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -3, 2, 0], [1, 1, 1, 1], [0, 0, 5, 0], [-2, 2, 2, -2]]))
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, layers={"0": "2:4"})
    pruner.begin_epoch(0)
    assert pruner.masks()["0.weight"].int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]


def test_memory_is_two_floats_and_the_candidate_bits_and_is_given_back() -> None:
    model = network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = attach(model, optimizer, pattern="4:8", epochs=EPOCHS, layers=LAYERS)
    weights = sum(t.weight.numel() for t in pruner.targets)
    plan = pruner.planned_memory()
    assert plan["score"] + plan["momentum"] == 8 * weights
    assert plan["candidates"] == weights // 8 * 9  # ceil(70 / 8) bytes for 8 weights
    peak = dict.fromkeys(plan, 0)
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        images = [x.float() for x, _ in batches(epoch)]
        optimizer.zero_grad()
        model(images[0]).square().mean().backward()
        optimizer.step()
        peak = {kind: max(peak[kind], held) for kind, held in pruner.memory_bytes().items()}
    assert peak == plan
    assert pruner.memory_bytes() == {"score": 0, "momentum": 0, "candidates": 0, "mask": weights}


def test_too_many_candidates_are_refused_with_the_figure() -> None:
    model = network()
    with pytest.raises(
        MethodError, match=r"601,080,390 candidates.*bytes of bookkeeping per weight.*removal = .weights"
    ):
        attach(model, torch.optim.SGD(model.parameters()), pattern="16:32", epochs=4, layers=LAYERS)


def test_scores_that_are_not_finite_stop_the_removal() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = attach(model, optimizer, epochs=4, layers=LAYERS)
    pruner.begin_epoch(0)
    model(torch.full((2, 3, 8, 8), math.nan, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with pytest.raises(DivergenceError, match=r"scores of 1\.weight are not finite"):
        pruner.begin_epoch(1)


def test_planned_density_is_what_training_reaches() -> None:
    assert expected_density(Pattern(1, 4), 3) == 0.75
    assert expected_density(Pattern(2, 4), 6) == 1.0
    assert expected_density(Pattern(2, 4), 1) == 0.5
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = attach(model, optimizer, pattern="4:8", epochs=EPOCHS, layers=LAYERS)
    for epoch in range(EPOCHS):
        train(model, optimizer, pruner, epoch, epoch + 1)
        assert pruner.density() == pytest.approx(pruner.planned_density(epoch), abs=0.03)
    assert pruner.density() == pruner.planned_density(EPOCHS - 1) == 0.5


def test_the_library_in_five_lines() -> None:
    model = network()
    pruner = lbc_cli.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern="2:4", method="lbc", epochs=3)
    assert pruner.planned_survivors(0) == {"2:4": 6}
    assert pruner.planned_survivors(1) == {"2:4": 1}
