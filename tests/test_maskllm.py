"""MaskLLM against autograd through materialised soft masks, over whole runs in float64; and its draws."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli import checkpoint, patterns
from lbc_cli.errors import DivergenceError, MethodError
from lbc_cli.methods import attach
from lbc_cli.methods.gumbel import adam_step_, gumbel
from lbc_cli.methods.maskllm import MaskLlm
from lbc_cli.patterns import Pattern
from tests.reference import PaperMaskLlm, group_indices, magnitude_mask
from tests.test_lbc import EPOCHS, LAYERS, STEPS, TARGETS, batches, learning_rate, network

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
T_F = 4


def sgd(**kwargs: Any) -> Make:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)


def make(model: nn.Module, optimizer: torch.optim.Optimizer, pattern: str = "2:4", **options: Any) -> MaskLlm:
    given = {"t_f": T_F, **options}
    pruner = attach(model, optimizer, pattern=pattern, method="maskllm", epochs=EPOCHS, layers=LAYERS, **given)
    assert isinstance(pruner, MaskLlm)
    return pruner


def compare(pattern: str, optimizers: Make, *, accumulate: int = 1, within: float = 1e-10, **options: Any) -> None:
    """Train both in step, with the same noise: logits and weights equal after every update, masks exactly."""
    given = {"weights": "frozen", "hard": False, "regularisation": 0.01, "mask_lr": 0.02, **options}
    model = network()
    wanted = Pattern.parse(pattern)
    optimizer = optimizers(model.parameters())
    pruner = make(model, optimizer, pattern, **given)
    dense = copy.deepcopy(model)
    pruner.begin_epoch(0)
    oracle = PaperMaskLlm(
        dense,
        dict.fromkeys(TARGETS, (wanted.n, wanted.m, wanted.vector)),
        optimizers,
        {name: choice.logits for name, choice in pruner._choices.items()},
        frozen=given["weights"] == "frozen",
        hard=given["hard"],
        regularisation=given["regularisation"],
        mask_lr=given["mask_lr"],
    )
    step, likely = 0, []
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        if epoch == T_F:
            oracle.fix()
        done = 0
        for number, (images, labels) in enumerate(batches(epoch)):
            if number % accumulate == 0:
                follow(pruner, oracle, epoch, done, STEPS // accumulate)
                assert_same(model, pruner, oracle, within)
            (nn.functional.cross_entropy(model(images), labels) / accumulate).backward()
            oracle.backward(lambda f, x=images, y=labels: nn.functional.cross_entropy(f(x), y) / accumulate)
            if (number + 1) % accumulate:
                continue
            step += 1
            done += 1
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(learning_rate(step), 0.2)
            if epoch < T_F:
                likely.append(torch.cat([oracle.likely(name).flatten() for name in TARGETS]))
        assert_same(model, pruner, oracle, within) if epoch >= T_F else None
    assert any(not torch.equal(likely[0], mask) for mask in likely), "no mask moved: the comparison shows little"
    for name in TARGETS:
        assert torch.equal(pruner.masks()[name], oracle.final[name].bool())
        patterns.check_mask(pruner.masks()[name], wanted)


def follow(pruner: MaskLlm, oracle: PaperMaskLlm, epoch: int, done: int, steps: int) -> None:
    """Give the oracle the draw, and the schedules by their definition: linear in time, known after the first epoch."""
    share = (epoch + done / steps if epoch else 0.0) / T_F
    oracle.scale, oracle.temperature = 100 + 400 * share, 4 + (0.05 - 4) * share
    oracle.noise = {name: choice.noise.clone() for name, choice in pruner._choices.items()}


def assert_same(model: nn.Module, pruner: MaskLlm, oracle: PaperMaskLlm, within: float) -> None:
    effective = oracle.effective()
    for name, weight in model.named_parameters():
        assert (weight - effective[name]).abs().max().item() <= within, name
    for name, choice in pruner._choices.items():
        assert (choice.logits - oracle.logits[name]).abs().max().item() <= within
    with pruner.deployed():
        for target in pruner.targets:
            kept = oracle.final[target.name] if oracle.final else oracle.likely(target.name)
            assert torch.equal(pruner.masks()[target.name], kept.bool())
            assert (target.weight - oracle.weights[target.name] * kept).abs().max().item() <= within


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:16", "2:8", "2:4/4", "4:8/16"])
def test_equals_autograd_for_every_pattern(pattern: str) -> None:
    compare(pattern, MOMENTUM)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("weights", ["frozen", "trained"])
def test_equals_autograd_in_every_mode(weights: str, hard: bool) -> None:
    compare("2:4", MOMENTUM, weights=weights, hard=hard)


@pytest.mark.parametrize(
    "optimizers",
    [sgd(momentum=0.9, maximize=True), lambda p: torch.optim.AdamW(p, lr=0.2, weight_decay=0.05)],
    ids=["maximize", "adamw"],
)
def test_equals_autograd_under_every_optimizer(optimizers: Make) -> None:
    compare("1:4", optimizers, weights="trained", within=1e-8)


def test_batches_of_one_update_share_a_draw() -> None:
    compare("1:4", MOMENTUM, accumulate=2)


def test_without_regulariser_and_prior() -> None:
    compare("1:4", MOMENTUM, regularisation=0.0, prior=0.0)


def test_the_adam_rule_is_torchs() -> None:
    torch.manual_seed(0)
    mine = torch.randn(5, 3, dtype=torch.float64)
    parameter = nn.Parameter(mine.clone())
    adam = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    first, second = torch.zeros_like(mine), torch.zeros_like(mine)
    for step in range(1, 8):
        grad = torch.randn(5, 3, dtype=torch.float64)
        parameter.grad = grad.clone()
        adam.step()
        adam_step_(mine, first, second, grad, step=step, lr=0.1)
    torch.testing.assert_close(mine, parameter.detach(), rtol=1e-12, atol=0)


def test_the_noise_is_gumbels() -> None:
    noise = gumbel((1000, 400), torch.Generator().manual_seed(0), torch.float64)
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert (noise < 0).double().mean().item() == pytest.approx(1 / math.e, abs=0.005)
    choice = (torch.tensor([0.5, 0.3, 0.2]).log() + noise[:, :3]).argmax(dim=1)  # the Gumbel-max trick, on 1000 draws
    counts = choice.bincount() / len(choice)
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


def test_a_draw_of_zero_is_not_infinite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.zero_())
    assert gumbel((2, 3), torch.Generator(), torch.float32).isfinite().all()


def test_a_soft_mask_that_underflows_leaves_positive_zeros() -> None:
    model = network()
    pruner = make(model, torch.optim.SGD(model.parameters(), lr=0.1))
    pruner.begin_epoch(0)
    for choice in pruner._choices.values():
        choice.logits[:, 1:] = -1e6
    with torch.no_grad():
        pruner._refresh()
    for name in TARGETS:
        weight = model.get_parameter(name).detach()
        assert (weight == 0).double().mean() == 0.5
        assert not torch.signbit(weight[weight == 0]).any()


def test_logits_begin_near_the_magnitude_mask() -> None:
    """Against the definition, candidate by candidate."""
    starts = []
    for prior in (0.0, 3.0):
        model = network()
        pruner = make(model, torch.optim.SGD(model.parameters(), lr=0.1), prior=prior)
        pruner.begin_epoch(0)
        starts.append({name: choice.logits.clone() for name, choice in pruner._choices.items()})
    for name in TARGETS:
        plain, favoured = starts[0][name], starts[1][name]
        assert plain.mean().item() == pytest.approx(0, abs=0.001)
        assert plain.std().item() == pytest.approx(0.01, rel=0.1)
        weight = network().get_parameter(name).detach()
        groups = group_indices(tuple(weight.shape), 4, 1)[:, 0]
        mask = magnitude_mask(weight, 2, 4, 1).flatten()[groups]
        for column, members in enumerate(itertools.combinations(range(4), 2)):
            shared = mask[:, list(members)].sum(dim=1)
            expected = plain[:, column] + plain.std() * 3 * (shared - 1)
            torch.testing.assert_close(favoured[:, column], expected, rtol=1e-9, atol=1e-12)


def trained(**options: Any) -> tuple[nn.Sequential, MaskLlm]:
    """A run until just before t_f."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = make(model, optimizer, **options)
    for epoch in range(T_F):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model, pruner


def test_deployed_shows_what_would_be_shipped_and_gives_the_draw_back() -> None:
    model, pruner = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(pruner.state_dict())
    assert not patterns.holds(model.get_parameter(TARGETS[0]), Pattern(2, 4))
    with pytest.raises(KeyboardInterrupt), pruner.deployed():  # noqa: PT012
        for target in pruner.targets:
            patterns.check_mask(pruner.masks()[target.name], target.pattern)
            assert patterns.holds(target.weight, target.pattern)
        assert pruner.density() == 0.5
        with pruner.deployed():
            pass
        assert patterns.holds(pruner.targets[0].weight, Pattern(2, 4)), "within another one it stays"
        raise KeyboardInterrupt
    assert pruner.density() == 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    again = pruner.state_dict()
    assert torch.equal(state["state"]["own"]["generator"], again["state"]["own"]["generator"])
    assert all(torch.equal(value, again["state"]["dense"][name]) for name, value in state["state"]["dense"].items())


def test_a_checkpoint_of_the_training_phase_holds_the_most_likely_masks(tmp_path: Any) -> None:
    model, pruner = trained()
    model.pretrained_cfg = {}
    checkpoint.save(model, tmp_path / "m.safetensors", pruner=pruner, arch={"arch": "x", "kwargs": {}, "task": "none"})
    tensors = checkpoint.read(tmp_path / "m.safetensors").tensors
    assert all(patterns.holds(tensors[name], Pattern(2, 4)) for name in TARGETS)


@pytest.mark.parametrize("weights", ["frozen", "trained"])
def test_an_average_is_projected_onto_the_most_likely_masks(weights: str) -> None:
    given = network()
    model, pruner = trained(weights=weights)
    average = copy.deepcopy(model)
    pruner.project_(average)
    with pruner.deployed():
        for name, mask in pruner.masks().items():
            other = average.get_parameter(name)
            assert (other[~mask] == 0).all()
            if weights == "frozen":
                assert torch.equal(other[mask], given.get_parameter(name)[mask])


def test_frozen_weights_keep_their_bits_through_decay_and_momentum() -> None:
    given = network()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    pruner = make(model, optimizer)
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            if epoch >= T_F:
                assert all((model.get_parameter(name).grad == 0).all() for name in TARGETS), "they count in no norm"
            optimizer.step()
    for name, mask in pruner.masks().items():
        assert torch.equal(model.get_parameter(name)[mask], given.get_parameter(name)[mask])
        assert model.get_parameter(name) not in optimizer.state
    assert not torch.equal(model[0].weight, given[0].weight)


def test_the_seed_decides_the_draws_and_the_global_generator_is_left_alone() -> None:
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 5)
        before = torch.get_rng_state()
        model = network()
        torch.set_rng_state(before)
        pruner = make(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed)
        pruner.begin_epoch(0)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(model.get_parameter(TARGETS[0]).detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_logits_that_are_not_finite_are_not_made_masks() -> None:
    _, pruner = trained()
    pruner._choices[TARGETS[0]].logits[0, 0] = math.nan
    with pytest.raises(DivergenceError, match=r"logits of 1\.weight are not finite"):
        pruner.begin_epoch(T_F)


def test_memory_is_given_back_when_the_masks_are_fixed() -> None:
    _, pruner = trained()
    weights = sum(t.weight.numel() for t in pruner.targets)
    held = pruner.memory_bytes()
    assert held == {"logits": 12 * weights, "moments": 24 * weights, "noise": 12 * weights, "shadow": 8 * weights,
                    "mask": 0}  # fmt: skip
    pruner.begin_epoch(T_F)
    assert pruner.memory_bytes() == {"logits": 0, "moments": 0, "noise": 0, "shadow": 8 * weights, "mask": weights}


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("4:16", {}, r"4:16 has 1,820 candidates per group.* take 1,820 bytes per weight, 8.4 MB for 1.weight alone"),
        ("2:4", {"t_f": EPOCHS}, "past the last epoch"),
        ("2:4", {"temperature_end": 0.0}, "temperature_end = 0.0.*greater than 0"),
        ("2:4", {"weights": "thawed"}, "weights = 'thawed'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(pattern: str, options: dict[str, Any], message: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MethodError, match=message):
        make(model, optimizer, pattern, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_training_is_counted_dense_while_masks_are_soft() -> None:
    shares = {}
    for hard in (False, True):
        model = network()
        pruner = make(model, torch.optim.SGD(model.parameters(), lr=0.1), "1:4", hard=hard)
        layers = [pruner.planned_layers(epoch) for epoch in (T_F - 1, T_F)]
        shares[hard] = [list(pruner.step_shares(densities).values()) for densities in layers]
    assert shares == {False: [[1, 1], [0.25, 0.25]], True: [[0.5, 0.5], [0.5, 0.5]]}


def test_a_longer_vector_makes_room_for_more_candidates() -> None:
    model = network()
    make(model, torch.optim.SGD(model.parameters(), lr=0.1), "4:16/16")


def test_learned_masks_beat_the_magnitude_masks_they_began_with() -> None:
    """A trained network, its weights frozen and everything else untouched: only the choice of weights can help."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.randn(1000, 32, generator=generator)
    labels = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 5))(images).argmax(dim=1)
    dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))

    def epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for part in torch.randperm(1000, generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()

    def start(method: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = copy.deepcopy(dense)
        sparse = [model[0].weight, model[2].weight]
        others = [p for p in model.parameters() if all(p is not weight for weight in sparse)]
        optimizer = torch.optim.SGD([{"params": sparse, "lr": 0.05}, {"params": others, "lr": 0.0}])
        layers = {"0": "1:4", "4": "dense"}
        return model, optimizer, attach(model, optimizer, pattern="1:4", method=method, layers=layers, **options)

    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        epoch(dense, optimizer)
    pruned, _, pruner = start("asp", epochs=1)
    pruner.begin_epoch(0)
    learned, optimizer, pruner = start("maskllm", epochs=11, t_f=10)
    for number in range(10):
        pruner.begin_epoch(number)
        epoch(learned, optimizer)
    pruner.begin_epoch(10)
    losses = [nn.functional.cross_entropy(model(images), labels).item() for model in (dense, learned, pruned)]
    assert losses[0] < losses[1] < 0.7 * losses[2]
