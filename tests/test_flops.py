"""Multiply-adds and parameters against hand counts, the paper's tables, and formulas written down again."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lbc_cli.errors import ModelError
from lbc_cli.flops import Cost, count, dense_totals, model_share, sparse_totals, step_share
from lbc_cli.patterns import Pattern
from lbc_cli.schedules import Ramp, Rounding
from lbc_cli.targets import find_targets


def on_meta(name: str, **kwargs: object) -> nn.Module:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **kwargs)
    return model


def test_each_layer_of_a_small_network_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, stride=2, groups=4, bias=False),
        nn.ConvTranspose2d(12, 6, 2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 10),
    )
    cost = count(model, (3, 8, 8))
    assert cost.macs == {
        "0.weight": 8 * 8 * 8 * 3 * 9,
        "2.weight": 3 * 3 * 12 * 2 * 9,
        "3.weight": 3 * 3 * 12 * 6 * 4,
        "5.weight": 96 * 10,
    }
    assert cost.other_macs == 0
    assert cost.total_macs == sum(cost.macs.values())
    assert cost.params == {name: p.numel() for name, p in model.named_parameters()}
    assert cost.total_params == (216 + 8) + 16 + 216 + (288 + 6) + (960 + 10)


def test_attention_is_counted_apart_from_weights() -> None:
    tokens, width, depth = 197, 192, 12
    cost = count(on_meta("vit_tiny_patch16_224"), (3, 224, 224))
    assert cost.macs["blocks.0.attn.qkv.weight"] == tokens * width * 3 * width
    assert cost.macs["blocks.11.mlp.fc2.weight"] == tokens * 4 * width * width
    assert cost.macs["patch_embed.proj.weight"] == 196 * width * 3 * 256
    assert cost.macs["head.weight"] == width * 1000
    assert cost.macs["pos_embed"] == cost.macs["cls_token"] == 0
    assert cost.other_macs == depth * 2 * tokens * tokens * width


def test_weights_used_from_outside_their_layer_keep_their_name() -> None:
    cost = count(on_meta("beit_base_patch16_224"), (3, 224, 224))  # functional.linear(x, self.qkv.weight)
    assert cost.macs["blocks.3.attn.qkv.weight"] == 197 * 768 * 3 * 768
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert count(encoder, (7, 32)).macs == {
        "self_attn.in_proj_weight": 7 * 32 * 96,
        "self_attn.out_proj.weight": 7 * 32 * 32,
        "linear1.weight": 7 * 32 * 64,
        "linear2.weight": 7 * 64 * 32,
    }


@pytest.mark.parametrize(
    ("wrap", "weight"),
    [
        (nn.utils.parametrizations.weight_norm, "0.parametrizations.weight.original1"),
        (nn.utils.parametrizations.spectral_norm, "0.parametrizations.weight.original"),
        (nn.utils.spectral_norm, "0.weight_orig"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "0.weight_orig"),
    ],
)
def test_transformed_weights_are_counted_with_their_layer(wrap: object, weight: str) -> None:
    model = nn.Sequential(wrap(nn.Linear(16, 8)), nn.Linear(8, 4))  # type: ignore[operator]
    cost = count(model, (16,))
    assert cost.macs["1.weight"] == 32
    assert cost.macs[weight] >= 128  # plus the power iteration of spectral norm, where there is one


def test_weight_standardised_convolutions_are_counted_with_their_layer() -> None:
    cost = count(on_meta("resnetv2_50x1_bit"), (3, 224, 224))
    assert cost.other_macs == 0
    assert cost.macs["stem.conv.weight"] == 112 * 112 * 64 * 3 * 49


def test_shared_layers_cost_once_per_use_and_are_stored_once() -> None:
    layer = nn.Linear(8, 8, bias=False)
    cost = count(nn.Sequential(layer, nn.ReLU(), layer), (8,))
    assert (cost.macs, cost.params) == ({"0.weight": 128}, {"0.weight": 64})


def test_resnet50_against_table_4_of_the_paper() -> None:
    model = on_meta("resnet50")
    cost = count(model, (3, 224, 224))
    targets = [target.name for target in find_targets(model, Pattern(1, 16)).targets]
    sparse = sparse_totals(cost, dict.fromkeys(targets, 1 / 16))

    assert dense_totals(cost).macs == cost.total_macs == 4_089_184_256  # paper: 4.10 G
    assert round(dense_totals(cost).params / 1e6, 1) == 25.6  # paper: 25.6 M
    stem, classifier = cost.macs["conv1.weight"], cost.macs["fc.weight"]
    assert (stem, classifier) == (112 * 112 * 64 * 147, 2048 * 1000)
    assert sparse.macs == stem + classifier + (cost.total_macs - stem - classifier) // 16
    assert round(sparse.macs / 1e9, 2) == 0.37  # paper: 0.44 G, see sparse_totals
    norms = sum(n for name, n in cost.params.items() if "bn" in name or "downsample.1" in name)
    assert round(sparse.params / 1e6, 2) == 3.58
    assert round((sparse.params - norms) / 1e6, 2) == 3.52  # paper: 3.52 M


def test_densities_take_effect_by_name() -> None:
    cost = Cost({"a": 1000, "b": 10}, 5, {"a": 100, "a.bias": 3, "b": 4})
    assert sparse_totals(cost, {}) == dense_totals(cost)
    kept = sparse_totals(cost, {"a": 0.25, "b": 0.5})
    assert (kept.macs, kept.params) == (250 + 5 + 5, 25 + 3 + 2)
    with pytest.raises(KeyError, match="c"):
        sparse_totals(cost, {"c": 0.5})


def test_resnet50_is_counted_within_a_second_and_without_memory() -> None:
    model = on_meta("resnet50")
    count(model, (3, 224, 224))
    start = time.perf_counter()
    count(model, (3, 1024, 1024))
    assert time.perf_counter() - start < 1.0


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 4))
    model[1].eval()
    called: list[str] = []
    model[0].register_forward_hook(lambda *_: called.append("after"))
    model.register_forward_pre_hook(lambda *_: called.append("before"))
    model[4].weight.register_hook(lambda grad: grad)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, modes = list(model.parameters()), [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    count(model, (3, 8, 8))

    assert torch.equal(torch.rand(3), expected)
    assert called == []
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    model(torch.rand(2, 3, 8, 8))
    assert called == ["before", "after"]


def test_wrapped_models_and_other_dtypes_are_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64))
    cost = count(torch.compile(nn.DataParallel(model)), (8,))
    assert cost.macs == {"0.weight": 32, "1.weight": 8}
    assert count(model.to(torch.bfloat16), (8,)) == cost


def test_an_input_that_the_model_does_not_take_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"Sequential does not run on an input of 3 x 5 x 5: .+") as caught:
        count(nn.Sequential(nn.Conv2d(4, 8, 3)), (3, 5, 5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("density", "paper"), [(2 / 4, 0.83), (1 / 4, 0.75), (2 / 8, 0.75), (1 / 16, 0.69)])
def test_a_step_of_srste_costs_what_the_paper_says(density: float, paper: float) -> None:
    assert step_share(density, 1) == pytest.approx((density + 2) / 3)
    assert round(step_share(density, 1), 2) == paper  # Table 1, which has 0.74 at 1:4 and 2:8


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_step_by_passes(density: float) -> None:
    assert step_share(density, 3) == pytest.approx(density)
    assert step_share(density, 2) == pytest.approx((2 * density + 1) / 3)
    assert step_share(density, 0) == 1.0


@pytest.mark.parametrize("passes", [4, -1])
def test_a_step_has_three_passes(passes: int) -> None:
    with pytest.raises(ValueError, match="there are 0 to 3"):
        step_share(0.5, passes)


def density_by_survivors(n: int, m: int, samples: int = 600) -> list[float]:
    """Mean kept share when the best s of all candidates survive, scores being sums of one random score per weight."""
    rng = random.Random(0)
    share = [0.0] * (math.comb(m, n) + 1)
    for _ in range(samples):
        score = [rng.gauss(0, 1) for _ in range(m)]
        ranked = sorted(itertools.combinations(range(m), n), key=lambda c: -sum(score[i] for i in c))
        kept: set[int] = set()
        for survivors, candidate in enumerate(ranked, 1):
            kept |= set(candidate)
            share[survivors] += len(kept) / m / samples
    return share


@pytest.mark.parametrize(
    ("pattern", "rounding", "mean", "training"),
    [
        ("2:4", "survivors", 0.67, 0.78),
        ("2:4", "removals", 0.58, 0.72),
        ("1:4", "survivors", 0.43, 0.62),
        ("1:4", "removals", 0.31, 0.54),
        ("2:8", "survivors", 0.45, 0.63),
        ("2:8", "removals", 0.42, 0.61),
        ("1:16", "survivors", 0.20, 0.47),
        ("1:16", "removals", 0.17, 0.45),
    ],
)
def test_the_steps_of_lbc_over_a_run(pattern: str, rounding: Rounding, mean: float, training: float) -> None:
    parsed = Pattern.parse(pattern)
    share = density_by_survivors(parsed.n, parsed.m)
    ramp = Ramp.over(120, rounding=rounding)
    densities = [share[ramp.survivors(epoch, parsed.num_candidates)] for epoch in range(120)]
    assert sum(densities) / 120 == pytest.approx(mean, abs=0.006)
    assert sum(step_share(density, 2) for density in densities) / 120 == pytest.approx(training, abs=0.006)


def test_a_share_of_the_whole_model_counts_the_rest_in_full() -> None:
    cost = Cost({"stem": 100, "a": 700, "b": 100}, 100, {"stem": 1, "a": 1, "b": 1})
    assert model_share(cost, {"a": 0.5, "b": 0.25}) == pytest.approx((100 + 100 + 350 + 25) / 1000)
    assert model_share(cost, {}) == 1.0
    assert model_share(Cost({}, 0, {}), {}) == 1.0
    with pytest.raises(KeyError, match="c"):
        model_share(cost, {"c": 0.5})
