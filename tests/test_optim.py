import itertools
import math

import pytest
import torch
from torch import nn

from lbc_cli.errors import MethodError
from lbc_cli.optim import make_optimizer, make_scheduler, updates_per_epoch
from lbc_cli.recipe import schema


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def rates(schedule: schema.Schedule, epochs: int, updates: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make_scheduler(optimizer, schedule, epochs, updates)
    seen = []
    for update in range(epochs * updates + 1):
        scheduler.step_update(update)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize(("batches", "accumulate", "expected"), [(8, 1, 8), (8, 4, 2), (9, 4, 3), (1, 4, 1)])
def test_updates_per_epoch_counts_the_ragged_last_group(batches: int, accumulate: int, expected: int) -> None:
    assert updates_per_epoch(batches, accumulate) == expected


def test_the_papers_schedule_warms_up_from_zero_to_the_peak_and_ends_at_zero() -> None:
    lr = rates(schema.Schedule(), epochs=120, updates=10)
    warm, total = 50, 1200
    assert lr[0] == 0.0
    assert lr[1] == pytest.approx(0.002)
    assert lr[25] == pytest.approx(0.05)
    assert lr[50] == pytest.approx(0.1)
    # the middle of what follows the warm-up, then a quarter: (1 + cos(pi/4)) / 2 = 0.853553
    assert lr[625] == pytest.approx(0.05)
    assert lr[warm + 1150 // 4] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 287 / 1150)))
    assert lr[1199] == pytest.approx(1.8657e-7, rel=1e-3)
    assert lr[total] == 0.0
    expected = [
        0.1 * u / warm if u < warm else 0.05 * (1 + math.cos(math.pi * (u - warm) / (total - warm)))
        for u in range(total + 1)
    ]
    assert lr == pytest.approx(expected, abs=1e-15)
    assert max(abs(a - b) for a, b in itertools.pairwise(lr)) <= 0.002 + 1e-12  # no jump at the seam


def test_cosine_ends_at_min_lr_and_starts_at_warmup_lr() -> None:
    lr = rates(schema.Schedule(warmup_epochs=1, warmup_lr=0.01, min_lr=0.001), epochs=5, updates=4)
    assert lr[0] == pytest.approx(0.01)
    assert lr[2] == pytest.approx(0.055)
    assert lr[4] == pytest.approx(0.1)
    assert lr[12] == pytest.approx(0.001 + 0.099 / 2)
    assert lr[20] == pytest.approx(0.001)


def test_poly_and_tanh_start_after_the_warm_up() -> None:
    poly = rates(schema.Schedule(name="poly", warmup_epochs=1, decay_rate=2.0), epochs=5, updates=4)
    assert [poly[u] for u in (0, 4, 12, 20)] == pytest.approx([0.0, 0.1, 0.025, 0.0])
    tanh = rates(schema.Schedule(name="tanh", warmup_epochs=1), epochs=5, updates=4)
    assert tanh[4] == pytest.approx(0.05 * (1 - math.tanh(-7)))
    assert tanh[12] == pytest.approx(0.05 * (1 - math.tanh(-2)))


def test_steps_count_from_the_start_of_the_run_and_fall_on_the_epoch() -> None:
    step = rates(schema.Schedule(name="step", warmup_epochs=1, decay_epochs=3), epochs=7, updates=4)
    assert [step[u] for u in (2, 4, 11, 12, 23, 24)] == pytest.approx([0.05, 0.1, 0.1, 0.01, 0.01, 0.001])
    multi = rates(
        schema.Schedule(name="multistep", warmup_epochs=1, decay_milestones=[5, 3], decay_rate=0.5), epochs=7, updates=4
    )
    assert [multi[u] for u in (2, 4, 11, 12, 19, 20, 27)] == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_constant_warms_up_and_stays() -> None:
    lr = rates(schema.Schedule(name="constant", warmup_epochs=1), epochs=3, updates=2)
    assert lr == pytest.approx([0.0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_the_scheduler_leaves_update_zeros_rate_and_the_peak_in_the_groups() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    make_scheduler(optimizer, schema.Schedule(warmup_epochs=2), epochs=4, updates_per_epoch=3)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert optimizer.param_groups[0]["initial_lr"] == 0.3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "cosine", "decay_milestones": [2]}, "decay_milestones"),
        ({"name": "cosine", "decay_epochs": 2}, "decay_epochs"),
        ({"name": "cosine", "decay_rate": 0.2}, "decay_rate"),
        ({"name": "constant", "min_lr": 0.01}, "min_lr"),
        ({"name": "multistep", "decay_milestones": []}, "empty"),
        ({"name": "multistep", "decay_milestones": [3, 10]}, "has 10"),
        ({"name": "step", "decay_epochs": 10}, "never decay"),
        ({"name": "cosine", "warmup_epochs": 10}, "9 or less"),
        ({"name": "cosine", "warmup_epochs": 0, "warmup_lr": 0.01}, "no warm-up"),
        ({"name": "cosine", "warmup_lr": 0.2}, "is above"),
        ({"name": "cosine", "min_lr": 0.2}, "would rise"),
    ],
)
def test_a_schedule_setting_without_effect_is_refused(fields: dict[str, object], words: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(MethodError, match=words):
        make_scheduler(optimizer, schema.Schedule(**fields), epochs=10, updates_per_epoch=4)


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(("decay_1d", "expected"), [(False, 0.0), (True, 0.01)])
def test_biases_and_norms_decay_only_on_request(decay_1d: bool, expected: float) -> None:
    net = small_net()
    found = decays(make_optimizer(net, schema.Optimizer(weight_decay=0.01, decay_1d=decay_1d)))
    assert len(found) == len(list(net.parameters()))
    for parameter in net.parameters():
        assert found[id(parameter)] == (expected if parameter.ndim == 1 else 0.01)


def test_layer_decay_scales_the_rate_of_early_layers_through_the_schedule() -> None:
    import timm

    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    optimizer = make_optimizer(net, schema.Optimizer(name="adamw", lr=0.1, layer_decay=0.5))
    scheduler = make_scheduler(optimizer, schema.Schedule(name="constant", warmup_epochs=0), 2, 2)
    scheduler.step_update(0)
    found = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert found[id(net.head.weight)] == pytest.approx(0.1)
    assert found[id(net.patch_embed.proj.weight)] == pytest.approx(0.1 * 0.5**3)


def test_arguments_reach_the_optimizer() -> None:
    sgd = make_optimizer(small_net(), schema.Optimizer(lr=0.2, momentum=0.8, kwargs={"nesterov": False}))
    assert isinstance(sgd, torch.optim.SGD)
    assert [sgd.defaults[k] for k in ("lr", "momentum", "nesterov")] == [0.2, 0.8, False]
    adam = make_optimizer(small_net(), schema.Optimizer(name="adamw", kwargs={"betas": [0.8, 0.95], "eps": 1e-6}))
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.defaults["betas"] == (0.8, 0.95)
    assert adam.defaults["eps"] == 1e-6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adamww"}, "Did you mean 'adamw'"),
        ({"name": "foo_sgd"}, "no such optimizer"),
        ({"name": "adahessian"}, "second derivatives"),
        ({"name": "adamw", "momentum": 0.5}, "no momentum"),
        ({"name": "sgd", "kwargs": {"betas": [0.9, 0.99]}}, "has no betas"),
        ({"name": "sgd", "kwargs": {"lr": 0.1}}, "optimizer.lr instead"),
        ({"name": "sgd", "kwargs": {"wibble": 1}}, "wibble"),
        ({"name": "adamw", "kwargs": {"nesterov": False}}, "kwargs.nesterov is not for it: leave it out"),
        ({"name": "sgd", "momentum": 0.0}, "'momentum' is SGD without Nesterov"),
    ],
)
def test_an_optimizer_that_cannot_be_what_was_asked_for_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        make_optimizer(small_net(), schema.Optimizer(**fields))
