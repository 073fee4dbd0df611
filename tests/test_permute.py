"""Channel permutation: the function stays what it is, and more magnitude is kept."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import lbc_cli
from lbc_cli import checkpoint, models, oneshot
from lbc_cli.cli import app
from lbc_cli.errors import ModelError
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.permute import ChannelSet, apply, permute, rules
from lbc_cli.permute.graph import find_places
from lbc_cli.permute.rules import Call, Labelled
from lbc_cli.permute.search import Reader, find_order, kept, reader
from lbc_cli.permute.spaces import Dim, Space, fix, reshaped, root, tie
from lbc_cli.targets import Target, find_targets


def in_general(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer random: nothing is zero, one or symmetric that could hide a wrong order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() < 2:
                tensor.copy_(0.3 * noise + float(name.endswith("weight")))
            else:
                scale = 0.2 + torch.rand(tensor.shape[1], generator=generator)
                tensor.copy_(noise * scale.reshape(1, -1, *[1] * (tensor.dim() - 2)) / tensor[0].numel() ** 0.5)
    return model.eval()


def targets_of(model: nn.Module, pattern: str = "2:4", layers: dict[str, str] | None = None) -> tuple[Target, ...]:
    return find_targets(model, Pattern.parse(pattern), layers).targets


def shuffled(readers: Sequence[Reader]) -> Tensor:
    channels = len(readers[0].magnitudes)
    return torch.randperm(channels, generator=torch.Generator().manual_seed(channels))


@pytest.fixture
def any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a random order of every set that may have one, whatever it keeps."""
    monkeypatch.setattr(apply, "find_order", shuffled)
    counted = itertools.count(1)
    monkeypatch.setattr(apply, "_kept", lambda targets: (float(next(counted)), 1e9))


# Real models, in any order


MODELS = {
    # name: (sets that sparse layers read, of which may have another order)
    "test_resnet": (10, 10),
    "test_vit": (13, 7),
    "test_vit2": (17, 9),
    "test_efficientnet": (12, 12),
    "test_convnext": (13, 13),
    "test_byobnet": (13, 13),
    "test_mambaout": (11, 5),
    "test_efficientnet_gn": (12, 2),
    "resnet10t": (9, 9),
    "mobilenetv3_small_050": (25, 25),
    "seresnet18": (20, 20),
    "regnetx_002": (31, 5),
    "mixer_s32_224": (17, 17),
    "swin_tiny_patch4_window7_224": (31, 13),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_order_leaves_the_function_as_it_is(name: str, any_order: None) -> None:
    model = in_general(timm.create_model(name, num_classes=10))
    size = models.input_size(model)
    images = torch.randn(2, *size, dtype=torch.float64)
    with torch.no_grad():
        before = copy.deepcopy(model).double()(images)
    weights = {target.name: target.weight.clone() for target in targets_of(model)}
    found = permute(model, targets_of(model), size)
    with torch.no_grad():
        after = copy.deepcopy(model).double()(images)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-12
    assert found.difference < 1e-12
    assert (len(found.sets), found.permuted) == MODELS[name]
    moved = {name for entry in found.sets if not entry.reason for name in entry.layers}
    assert all(not torch.equal(model.get_parameter(name), weights[name]) for name in moved)
    assert {name for entry in found.sets for name in entry.layers} == set(weights)


def test_a_resnet_ties_what_meets_in_its_sums(any_order: None) -> None:
    model = timm.create_model("resnet18", num_classes=10)
    found = permute(model, targets_of(model), (3, 64, 64))
    by_layer = {name: entry for entry in found.sets for name in entry.layers}
    stream = by_layer["layer2.1.conv1.weight"]
    assert stream.layers == ("layer2.1.conv1.weight", "layer3.0.conv1.weight", "layer3.0.downsample.0.weight")
    assert by_layer["layer2.1.conv2.weight"].layers == ("layer2.1.conv2.weight",)
    assert found.permuted == 12


def test_a_vit_permutes_its_stream_and_hidden_layers_and_leaves_its_heads_alone(any_order: None) -> None:
    model = timm.create_model("test_vit", num_classes=10)
    found = permute(model, targets_of(model), models.input_size(model))
    by_layer = {name: entry for entry in found.sets for name in entry.layers}
    stream = by_layer["blocks.0.attn.qkv.weight"]
    assert stream.layers == tuple(f"blocks.{n}.{kind}.weight" for n in range(6) for kind in ("attn.qkv", "mlp.fc1"))
    assert by_layer["blocks.3.mlp.fc2.weight"].reason == ""
    assert by_layer["blocks.3.attn.proj.weight"].reason == "it meets what comes out of scaled_dot_product_attention"


# Structures, one by one


class Structures(nn.Module):
    """What models are made of, each piece on its own channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(1, 8)
        self.slope = nn.PReLU(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 16, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.gate = nn.Linear(16, 16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.after = nn.Conv2d(16, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.joined = nn.Conv2d(16, 8, 1)
        self.side = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.flat = nn.Linear(8 * 16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.slope(self.norm(self.stem(x))))
        x = functional.relu(self.bn(self.wide(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        x = functional.gelu(self.grouped(x))
        x = self.after(x) * self.scale
        x = self.joined(torch.cat([x, x * 2], 1)) + self.side(x)
        x = functional.adaptive_avg_pool2d(functional.silu(self.last(x)), 4)
        x = torch.flatten(x, 1)
        return self.head(functional.layer_norm(self.flat(x), (12,)))


SPARSE = {"*": "2:4", "stem": "dense", "depthwise": "dense", "flat": "dense"}


def test_structures_are_followed_or_left_with_a_reason(any_order: None) -> None:
    model = in_general(Structures())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = copy.deepcopy(model).double()(images).detach()
    stem, flat = model.get_parameter("stem.weight").clone(), model.get_parameter("flat.weight").clone()
    found = permute(model, targets_of(model, layers=SPARSE), (3, 8, 8))
    after = copy.deepcopy(model).double()(images).detach()
    assert float((after - before).abs().max() / before.abs().max()) < 1e-12
    reasons = {entry.layers: entry.reason for entry in found.sets}
    assert reasons[("wide.weight",)] == "", "through a group norm of one group, slopes and a depthwise convolution"
    assert reasons[("gate.weight",)] == "a convolution in 2 groups joins neighbours"
    assert reasons[("grouped.weight",)] == "a convolution in 2 groups joins neighbours"
    assert reasons[("joined.weight",)] == "it meets what cat puts together"
    assert reasons[("side.weight",)] == "cat puts other channels beside it"
    assert reasons[("last.weight",)] == ""
    assert reasons[("head.weight",)] == ""
    assert "joins neighbours" in reasons[("after.weight",)]
    order = shuffled([Reader(torch.zeros(8, 1), 2, 4)])
    assert torch.equal(model.get_parameter("stem.weight"), stem[order])
    runs = flat[shuffled([Reader(torch.zeros(12, 1), 2, 4)])]
    assert torch.equal(model.get_parameter("flat.weight"), runs), "its inputs come from channels nobody sparse reads"


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        return self.head((self.conv(x) + x).flatten(1))


def test_flattened_pixels_follow_their_channels_in_runs(any_order: None) -> None:
    model = in_general(Flattened())
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    before, head = copy.deepcopy(model).double()(images), model.get_parameter("head.weight").clone()
    found = permute(model, targets_of(model), (3, 4, 4))
    assert found.permuted == 1
    torch.testing.assert_close(copy.deepcopy(model).double()(images), before, rtol=1e-12, atol=1e-12)
    order = shuffled([Reader(torch.zeros(8, 1), 2, 4)])
    expected = head.reshape(5, 8, 16)[:, order].reshape(5, -1)
    assert torch.equal(model.get_parameter("head.weight"), expected)


def test_a_sparse_layer_that_reads_runs_of_pixels_is_left_alone() -> None:
    model = in_general(Flattened())
    found = permute(model, targets_of(model, layers={"head": "2:4"}), (3, 4, 4))
    assert [entry.reason for entry in found.sets] == ["flattened pixels: a sparse layer reads runs of one channel"]
    assert found.before == found.after


class Shared(nn.Module):
    """One layer used twice in a row: what it writes is what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.loop = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.loop.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean((2, 3)))
        return self.head(self.other(self.loop(functional.relu(self.loop(x)))))


def test_shared_and_tied_weights_keep_one_order(any_order: None) -> None:
    model = in_general(Shared())
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    before, loop = copy.deepcopy(model).double()(images), model.loop.weight.clone()
    found = permute(model, targets_of(model), (3, 4, 4))
    assert found.permuted == 1
    torch.testing.assert_close(copy.deepcopy(model).double()(images), before, rtol=1e-12, atol=1e-12)
    order = shuffled([Reader(torch.zeros(8, 1), 2, 4)])
    assert torch.equal(model.loop.weight, loop[order][:, order])


# Rules and spaces


def test_spaces_of_one_size_are_tied_and_reasons_travel() -> None:
    a, b, c = Space(8), Space(8), Space(8)
    tie(a, b)
    fix(b, "first")
    tie(b, c)
    fix(c, "second")
    assert root(a)[0] is root(c)[0]
    assert root(c)[0].fixed == "first"
    free, held = Space(8), Space(8)
    fix(held, "third")
    tie(free, held)
    assert root(free)[0].fixed == "third"


def test_runs_of_other_lengths_that_do_not_divide_fix_both() -> None:
    fours, sixes = Space(6), Space(4)
    a, b = Space(12, parent=fours, repeat=2), Space(12, parent=sixes, repeat=3)
    tie(a, b)
    assert "runs of another length" in fours.fixed
    assert "runs of another length" in sixes.fixed
    thirds, halves = Space(4), Space(2)
    a, b = Space(12, parent=thirds, repeat=3), Space(12, parent=halves, repeat=6)
    tie(a, b)
    assert root(a) == (halves, 6)
    assert root(thirds) == (halves, 2)
    assert not halves.fixed


@pytest.mark.parametrize(
    ("before", "after", "channel", "stays"),
    [
        ((2, 8, 4, 4), (2, 8, 16), 1, (1, 1)),
        ((2, 8, 1, 1), (2, 8), 1, (1, 1)),
        ((2, 8), (2, 8, 1, 1), 1, (1, 1)),
        ((2, 8, 4, 4), (2, 128), 1, (1, 16)),
        ((2, 16, 8), (32, 8), 2, (1, 1)),
        ((2, 16, 8), (2, 4, 4, 8), 2, (3, 1)),
        ((2, 8, 4, 4), (2, 2, 4, 4, 4), 1, None),
        ((2, 16, 8), (2, 128), 2, None),
        ((2, 8, 4), (2, 4, 8), 1, None),
    ],
)
def test_reshapes(before: tuple[int, ...], after: tuple[int, ...], channel: int, stays: tuple[int, int] | None) -> None:
    space = Space(before[channel])
    dims: list[Dim] = [""] * len(before)
    dims[channel] = space
    result = reshaped(dims, before, after, "view")
    found = [(place, root(dim)[1]) for place, dim in enumerate(result) if isinstance(dim, Space)]
    assert found == ([] if stays is None else [stays])
    assert bool(space.fixed) == (stays is None)


def labelled(*shape: int) -> Labelled:
    return Labelled(shape, tuple(Space(size) for size in shape))


def spaces(value: Labelled) -> list[Space]:
    return [root(dim)[0] for dim in value.dims if isinstance(dim, Space)]


def test_an_operator_without_a_rule_fixes_what_enters_it() -> None:
    x, y = labelled(2, 8), labelled(8, 4)
    dims = rules.apply(Call("einsum", ("ij,jk->ik", x, [y]), {}, (2, 4)))
    assert all(space.fixed == "einsum may depend on the order of its channels" for space in spaces(x) + spaces(y))
    assert dims == ("what comes out of einsum",) * 2


@pytest.mark.parametrize(
    ("index", "shape", "kept_dims", "fixed"),
    [
        (0, (8, 6), [1, 2], [0]),
        ((slice(None), 0), (2, 6), [0, 2], [1]),
        ((Ellipsis, slice(1, 3)), (2, 8, 2), [0, 1], [2]),
        ((slice(None), None, slice(0, 8)), (2, 1, 8, 6), [0, 1, 2], []),
        ((slice(None), slice(None, None, 2)), (2, 4, 6), [0, 2], [1]),
        ([0, 2], (2, 8, 6), [], [0, 1, 2]),
    ],
)
def test_indexing_keeps_whole_dimensions_and_fixes_others(
    index: Any, shape: tuple[int, ...], kept_dims: list[int], fixed: list[int]
) -> None:
    x = labelled(2, 8, 6)
    dims = rules.apply(Call("getitem", (x, index), {}, shape))
    assert [root(dim)[0] for dim in dims if isinstance(dim, Space)] == [x.dims[place] for place in kept_dims]
    assert [place for place, space in enumerate(spaces(x)) if space.fixed] == fixed


@pytest.mark.parametrize(
    ("name", "args", "shape", "fixed"),
    [
        ("pad", ([1, 1, 0, 0],), (2, 8, 6, 7), [3]),
        ("roll", ((1, 1), (2, 3)), (2, 8, 6, 5), [2, 3]),
        ("max_pool2d", (2,), (2, 8, 3, 2), [2, 3]),
        ("mean", ((2, 3),), (2, 8), []),
        ("mean", ((2, 3), True), (2, 8, 1, 1), []),
        ("softmax", (1,), (2, 8, 6, 5), []),
        ("transpose", (1, -1), (2, 5, 6, 8), []),
        ("permute", (0, 2, 3, 1), (2, 6, 5, 8), []),
        ("cumsum", (1,), (2, 8, 6, 5), [0, 1, 2, 3]),
        ("group_norm", (4,), (2, 8, 6, 5), [1]),
        ("group_norm", (8,), (2, 8, 6, 5), []),
    ],
)
def test_rules_fix_no_more_than_they_mix(
    name: str, args: tuple[Any, ...], shape: tuple[int, ...], fixed: list[int]
) -> None:
    x = labelled(2, 8, 6, 5)
    rules.apply(Call(name, (x, *args), {}, shape))
    assert [place for place, space in enumerate(spaces(x)) if space.fixed] == fixed


# The search


def magnitude_kept(weight: Tensor, pattern: Pattern) -> float:
    return float(weight.double().abs()[magnitude_mask(weight, pattern)].sum())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "1:16", "2:4/4"])
def test_the_order_found_keeps_more_and_is_counted_right(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    torch.manual_seed(0)
    weight = torch.randn(32, 48, 3) * (0.1 + torch.rand(1, 48, 1))
    readers = [reader(weight, parsed)]
    order = find_order(readers)
    assert torch.equal(order.sort().values, torch.arange(48))
    before, after = magnitude_kept(weight, parsed), magnitude_kept(weight[:, order], parsed)
    assert kept(readers, torch.arange(48)) == pytest.approx(before, rel=1e-6)
    assert kept(readers, order) == pytest.approx(after, rel=1e-6)
    assert after > before * 1.001
    assert torch.equal(order, find_order(readers)), "the same weights give the same order"


def test_two_groups_are_divided_nearly_as_well_as_can_be() -> None:
    parsed, gaps = Pattern(2, 4), []
    for seed in range(20):
        weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
        first = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
        orders = [[*chosen, *(i for i in range(8) if i not in chosen)] for chosen in first]
        every = [magnitude_kept(weight[:, order], parsed) for order in orders]
        found = magnitude_kept(weight[:, find_order([reader(weight, parsed)])], parsed)
        gaps.append((max(every) - found) / (max(every) - magnitude_kept(weight, parsed) + 1e-12))
        assert found >= magnitude_kept(weight, parsed) * (1 - 1e-7)
    assert sum(gap < 1e-4 for gap in gaps) >= 12, gaps


def test_no_exchange_of_two_channels_is_left_that_would_gain() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(16, 16), torch.randn(8, 16, 3)]
    patterns = [Pattern(1, 4), Pattern(3, 8)]
    order = find_order([reader(w, p) for w, p in zip(weights, patterns, strict=True)])

    def total(order: Tensor) -> float:
        return sum(magnitude_kept(w[:, order], p) for w, p in zip(weights, patterns, strict=True))

    best = total(order)
    assert best > total(torch.arange(16))
    for i, j in itertools.combinations(range(16), 2):
        swapped = order.clone()
        swapped[[i, j]] = order[[j, i]]
        assert total(swapped) <= best * (1 + 1e-6)


def test_many_rows_are_sampled_and_all_of_them_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbc_cli.permute.search.PROPOSE", 8)
    torch.manual_seed(2)
    weight = torch.randn(256, 32) * (0.1 + torch.rand(1, 32))
    parsed = Pattern(2, 4)
    order = find_order([reader(weight, parsed)])
    assert magnitude_kept(weight[:, order], parsed) > magnitude_kept(weight, parsed) * 1.001


def test_one_group_has_no_better_order() -> None:
    assert torch.equal(find_order([reader(torch.randn(4, 8), Pattern(2, 8))]), torch.arange(8))


# Whole models


@pytest.mark.parametrize("pattern", ["2:4", "1:4/8"])
def test_more_is_kept_and_the_report_is_true(pattern: str) -> None:
    model = in_general(timm.create_model("test_resnet", num_classes=10))
    targets = targets_of(model, pattern, {"layer4.*": "1:8"})

    def share(names: Sequence[str]) -> float:
        chosen = [target for target in targets if target.name in names]
        held = sum(magnitude_kept(target.weight.detach(), target.pattern) for target in chosen)
        return held / sum(float(target.weight.detach().double().abs().sum()) for target in chosen)

    names = [target.name for target in targets]
    before = share(names)
    found = permute(model, targets, models.input_size(model))
    assert found.before == pytest.approx(before)
    assert found.after == pytest.approx(share(names))
    assert found.after > found.before + 0.003
    for entry in found.sets:
        assert isinstance(entry, ChannelSet)
        if pattern == "2:4":
            assert entry.after == pytest.approx(share(entry.layers))
            assert (entry.after > entry.before) == (entry.reason == "")


def test_a_model_in_half_precision_is_permuted_as_it_is() -> None:
    model = in_general(timm.create_model("test_resnet", num_classes=10)).bfloat16().train()
    found = permute(model, targets_of(model), models.input_size(model))
    assert found.after > found.before
    assert model.training
    assert model.get_parameter("layer1.0.conv1.weight").dtype == torch.bfloat16


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean((2, 3)))
        return self.head(self.body(x) if x.sum() > 0 else x)


def test_what_cannot_be_traced_is_refused_with_the_reason() -> None:
    model = DataDependent()
    with pytest.raises(ModelError, match=r"torch\.fx cannot trace DataDependent \(TraceError: .*control flow"):
        permute(model, targets_of(model), (3, 4, 4))


class Grouped(nn.Module):
    """A norm over groups of channels, between layers that could take any order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 1), nn.GroupNorm(2, 16)
        self.conv, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.norm(self.stem(x))).mean((2, 3)))


def test_an_order_that_changes_the_logits_is_refused_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_general(Grouped())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = {"head": "2:4"}
    assert permute(model, targets_of(model, layers=layers), (3, 4, 4)).permuted == 1, "the head's alone"
    model.load_state_dict(before)
    monkeypatch.setitem(rules.RULES, "group_norm", rules.batch_norm)  # which it is not
    with pytest.raises(ModelError, match=r"the logits would change by .* of the largest, at most 1e-10 is rounding"):
        permute(model, targets_of(model, layers=layers), (3, 4, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = in_general(Flattened())
    with torch.no_grad():
        model.get_parameter("stem.bias")[0] = float("nan")
    with pytest.raises(ModelError, match="gives no finite logits"):
        permute(model, targets_of(model), (3, 4, 4))


def test_images_of_the_wrong_size_are_refused() -> None:
    model = in_general(Flattened())
    with pytest.raises(ModelError, match="does not run on 3 x 5 x 5"):
        permute(model, targets_of(model), (3, 5, 5))


def test_places_know_tied_tensors_once() -> None:
    places = find_places(Shared().eval(), torch.zeros(2, 3, 4, 4))
    model_names = {place.name for space in places.spaces() for place, _, _ in places.of(space)}
    assert "loop.weight" in model_names
    assert "other.weight" not in model_names


# The command line


def test_a_permuted_model_is_an_ordinary_timm_model(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    common = ["prune", "test_resnet", "--weights", "random", "--pattern", "2:4", "--seed", "3"]
    plain = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "plain"), "--json"])
    result = CliRunner().invoke(app, [*common, "--permute", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    record, other = json.loads(result.stdout), json.loads(plain.stdout)
    assert record["permutation"]["before"] < record["permutation"]["after"]
    assert record["permutation"]["difference"] < 1e-12
    assert {layer["name"] for layer in record["layers"]} == {layer["name"] for layer in other["layers"]}
    kept_shares = [layer["magnitude"] for layer in record["layers"]], [layer["magnitude"] for layer in other["layers"]]
    assert sum(kept_shares[0]) > sum(kept_shares[1])
    assert "permutation" in record["seconds"]
    assert checkpoint.read_manifest(out).metrics["permuted"] == 10
    exported = CliRunner().invoke(app, ["export", str(out), "--format", "timm", "--out", str(tmp_path / "timm")])
    assert exported.exit_code == 0, exported.output
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(loaded(images), lbc_cli.load(out)(images))
    assert set(load_file(tmp_path / "timm" / "model.safetensors")) == set(loaded.state_dict())


def test_every_method_prunes_permuted_channels(tmp_path: Path) -> None:
    made = oneshot.from_name("test_vit", weights="random", kwargs={"num_classes": 10})
    dense = copy.deepcopy(made.model)
    outcome = oneshot.prune(made, pattern="2:4", out=tmp_path / "m", permute=True)
    found = outcome.measured.permutation
    assert found is not None
    assert found.permuted == 7
    assert made.model.get_parameter("cls_token").sort().values.allclose(dense.get_parameter("cls_token").sort().values)


def test_a_model_that_cannot_be_traced_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.fx.proxy.TraceError("symbolically traced variables cannot be used as inputs to control flow")

    monkeypatch.setattr("torch.fx.Tracer.trace", refuse)
    common = ["prune", "test_resnet", "--weights", "random", "--pattern", "2:4", "--permute"]
    result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "m")])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "torch.fx cannot trace ResNet (TraceError: symbolically traced" in line
    assert not (tmp_path / "m").exists()
