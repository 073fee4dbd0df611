"""The criteria of one-shot pruning against slow oracles that share no code with them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli import models
from lbc_cli.errors import MethodError
from lbc_cli.oneshot import sparsegpt
from lbc_cli.oneshot.choice import Calibration, mask_by
from lbc_cli.oneshot.images import open_images
from lbc_cli.oneshot.inputs import Seen, Watch, from_order, in_order, order_of_use
from lbc_cli.oneshot.sparsegpt import by_sparsegpt, solve
from lbc_cli.oneshot.taylor import by_taylor
from lbc_cli.oneshot.wanda import by_wanda
from lbc_cli.patterns import Pattern, check_mask, magnitude_mask
from lbc_cli.targets import Target, find_targets

CPU = torch.device("cpu")
ALL = {"*": "2:4", "stem": "dense"}


class Net(nn.Module):
    """Convolutions of several kinds, one layer used twice, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.strided = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, (3, 1), padding="same", groups=2)
        self.circular = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False)
        self.twice = nn.Conv2d(16, 16, 1)
        self.hidden = nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.strided(functional.relu(self.stem(x))))
        x = functional.relu(self.grouped(x))
        x = functional.relu(self.circular(x))
        x = self.twice(functional.relu(self.twice(x)))
        return self.head(functional.gelu(self.hidden(x.mean((2, 3)))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def calibration(model: nn.Module, images: int = 6, size: int = 12, classes: int = 5) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    return Calibration(copy.deepcopy(model).float().eval(), pictures, labels, CPU)


def targets_of(model: nn.Module, pattern: str = "2:4", layers: dict[str, str] | None = None) -> tuple[Target, ...]:
    chosen = {key: pattern if value == "2:4" else value for key, value in (layers or {}).items()}
    return find_targets(model, Pattern.parse(pattern), chosen).targets


def slow_mask(scores: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    """The N of largest score in every group, then of largest magnitude, in plain loops."""
    out, inputs = scores.shape[:2]
    flat = scores.reshape(out, inputs, -1)
    size = weight.detach().double().abs().reshape(out, inputs, -1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    for row in range(0, out, pattern.vector):
        rows = slice(row, row + pattern.vector)
        for k in range(flat.shape[2]):
            for first in range(0, inputs, pattern.m):
                places = range(first, first + pattern.m)
                rank = {i: (float(flat[rows, i, k].sum()), float(size[rows, i, k].sum())) for i in places}
                for i in sorted(places, key=lambda i: rank[i], reverse=True)[: pattern.n]:
                    mask[rows, i, k] = True
    return mask.reshape(scores.shape)


# What the layers see


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4, bias=False), (5, 6)),
        (nn.Linear(6, 4, bias=False), (2, 3, 5, 6)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, bias=False), (3, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 7)),
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False), (2, 4, 9, 7)),
        (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2, bias=False), (2, 4, 6, 7)),
        (nn.Conv2d(4, 6, (2, 4), padding="same", bias=False), (2, 4, 6, 7)),
        (nn.Conv2d(4, 6, 3, padding="valid", groups=2, bias=False), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 5, 5)),
        (nn.Conv3d(4, 6, 2, stride=2, groups=2, bias=False), (2, 4, 4, 4, 4)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), (4, 5, 7)),
    ],
    ids=str,
)
def test_weights_times_columns_is_what_the_layer_computes(layer: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    seen: list[Seen] = []
    with torch.no_grad(), Watch({"w": layer.weight}, lambda name, use: seen.append(use)):
        y = layer(x)
    (use,) = seen
    columns = torch.cat([*use.columns()], dim=2)
    one_by_one = torch.cat([*use.columns(most=1)], dim=2)
    assert torch.equal(columns, one_by_one)
    rows = in_order(layer.weight.detach().double())
    assert torch.equal(from_order(rows, layer.weight.shape), layer.weight.double())
    groups = getattr(layer, "groups", 1)
    products = [part @ group for part, group in zip(rows.chunk(groups), columns, strict=True)]
    if layer.weight.dim() > 2:
        expected = (y if y.dim() == x.dim() and x.dim() == layer.weight.dim() else y[None]).movedim(1, 0).flatten(1)
    else:
        expected = y.reshape(-1, y.shape[-1]).T
    torch.testing.assert_close(torch.cat(products), expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(use.squares(), columns.square().sum(2), rtol=1e-10, atol=1e-10)


def test_layers_that_pad_inside_their_forward_are_seen_with_their_zeros() -> None:
    from timm.layers import Conv2dSame

    layer = Conv2dSame(4, 4, 3, stride=2, bias=False)
    seen: list[Seen] = []
    with torch.no_grad(), Watch({"w": layer.weight}, lambda name, use: seen.append(use)):
        y = layer(torch.randn(1, 4, 8, 8))
    columns = next(seen[0].columns())[0]
    assert columns.shape[1] == y[0, 0].numel() == 16


def test_the_order_of_use_is_that_of_the_forward_pass() -> None:
    model = net()
    weights = {name: p for name, p in reversed([*model.named_parameters()]) if p.dim() > 1}
    calls = order_of_use(model, weights, torch.zeros(1, 3, 12, 12))
    assert [*calls] == [f"{n}.weight" for n in ["stem", "strided", "grouped", "circular", "twice", "hidden", "head"]]
    assert calls["twice.weight"] == 2
    assert calls["stem.weight"] == 1


# Taylor


@pytest.mark.parametrize("pattern", ["2:4", "1:4/2"])
def test_taylor_is_the_mean_of_squared_first_order_terms(pattern: str) -> None:
    model = net()
    look = calibration(model)
    targets = targets_of(model, pattern, ALL)
    found = by_taylor(targets, look).masks
    scores = {target.name: torch.zeros_like(target.weight, dtype=torch.float64) for target in targets}
    exact = net().double()
    for image, label in zip(look.images, look.labels, strict=True):
        exact.zero_grad()
        logits = exact(image[None].double())[0]
        (torch.logsumexp(logits, 0) - logits[label]).backward()
        for target in targets:
            parameter = exact.get_parameter(target.name)
            assert parameter.grad is not None
            scores[target.name] += (parameter.detach() * parameter.grad) ** 2 / len(look.images)
    assert len(targets) == 6
    for target in targets:
        assert torch.equal(found[target.name], slow_mask(scores[target.name], target.weight, target.pattern)), (
            target.name
        )


def test_taylor_refuses_a_weight_that_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    model.unused = nn.Linear(8, 8)
    with pytest.raises(MethodError, match=r"unused\.weight takes no part in the loss; leave it dense"):
        by_taylor(targets_of(model, layers=ALL), calibration(model))


# Wanda


def hooked_norms(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Name -> [O, I, *K] of ||X_j||, by hooks and torch's unfold (channels first), layer by layer."""
    norms: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double()
            if isinstance(module, nn.Linear):
                squares = (x.reshape(-1, x.shape[-1]) ** 2).sum(0).expand(module.weight.shape)
            else:
                if module.padding_mode == "circular":
                    x = functional.pad(x, (1, 1, 1, 1), mode="circular")
                elif module.padding == "same":
                    x = functional.pad(x, (0, 0, 1, 1))
                else:
                    x = functional.pad(x, [module.padding[0]] * 4)
                patches = functional.unfold(x, module.kernel_size, stride=module.stride)
                whole = (patches**2).sum((0, 2)).reshape(x.shape[1], *module.kernel_size)
                per_group = whole.chunk(module.groups)
                rows = module.weight.shape[0] // module.groups
                squares = torch.cat([part[None].expand(rows, *part.shape) for part in per_group])
            key = f"{name}.weight"
            norms[key] = norms.get(key, torch.zeros_like(squares)) + squares

        return note

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return {name: squares.sqrt() for name, squares in norms.items()}


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "1:4/4"])
def test_wanda_is_magnitude_times_the_norm_of_the_input(pattern: str) -> None:
    model = net()
    look = calibration(model)
    targets = targets_of(model, pattern, ALL)
    found = by_wanda(targets, look).masks
    norms = hooked_norms(net(), look.images)
    different = 0
    for target in targets:
        scores = target.weight.detach().double().abs() * norms[target.name]
        assert torch.equal(found[target.name], slow_mask(scores, target.weight, target.pattern)), target.name
        different += int((found[target.name] != magnitude_mask(target.weight, target.pattern)).sum())
    assert different > 50, "the norms decide something"


def test_batches_of_any_length_give_the_same_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    targets = targets_of(model, layers=ALL)
    whole = by_wanda(targets, calibration(model)).masks
    monkeypatch.setattr("lbc_cli.oneshot.wanda.BATCH", 4)
    pieces = by_wanda(targets, calibration(model)).masks
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.head(self.attend(x, x, x)[0].mean(1))


@pytest.mark.parametrize("method", [by_wanda, by_sparsegpt])
def test_weights_whose_inputs_cannot_be_seen_are_refused(method: Any) -> None:
    torch.manual_seed(0)
    model = Attention().train()
    with pytest.raises(MethodError, match=r"attend\.in_proj_weight is not used by a linear or convolution function"):
        method(targets_of(model), calibration(model))


# Ties and what cannot be ranked


def test_where_nothing_was_seen_the_magnitude_decides() -> None:
    weight = nn.Parameter(torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0]]))
    target = Target("w", "", "linear", Pattern(2, 4), weight, 1)
    mask = mask_by(torch.zeros(1, 8, dtype=torch.float64), target)
    assert mask.tolist() == [[False, True, True, False, True, True, False, False]]
    with pytest.raises(MethodError, match="w: scores from the calibration images are NaN or Inf"):
        mask_by(torch.full((1, 8), float("nan"), dtype=torch.float64), target)


@pytest.mark.parametrize("method", [by_taylor, by_wanda, by_sparsegpt])
def test_images_that_are_no_numbers_are_refused(method: Any) -> None:
    model = net()
    look = calibration(model)
    look.images[2, 0, 5, 5] = float("inf")
    with pytest.raises(MethodError, match="NaN or Inf"):
        method(targets_of(model, layers=ALL), look)


# SparseGPT


def problem(out: int, columns: int, samples: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs [C, P], in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(columns, samples, generator=generator, dtype=torch.float64)
    return torch.randn(out, columns, generator=generator, dtype=torch.float64), x


def slow_obs(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Columns from left to right, each pruned by the surgeon's formulas with the explicit inverse of what remains.

    No Cholesky factor and no blocks: for column j the inverse of H over the columns from j on is computed anew.
    """
    work, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if j % pattern.m == 0:
            scores = torch.stack([work[:, i] ** 2 / inverses[i][0, 0] for i in range(j, j + pattern.m)], dim=1)
            for row in range(0, len(work), pattern.vector):
                sums = scores[row : row + pattern.vector].sum(0).tolist()
                worst = sorted(range(pattern.m), key=lambda i: sums[i])[: pattern.m - pattern.n]
                for i in worst:
                    mask[row : row + pattern.vector, j + i] = False
        for row in range(len(work)):
            if not mask[row, j]:
                work[row, j:] -= work[row, j] / inverses[j][0, 0] * inverses[j][:, 0]
    return work.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8/2", "1:16", "5:12/3"])
def test_sparsegpt_is_the_surgeon_column_by_column(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = Pattern.parse(pattern)
    weight, x = problem(6, 48)
    hessian = x @ x.T
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    expected, mask = slow_obs(weight, damped, parsed)
    for block in (128, 32):  # several blocks, so that updates cross them
        monkeypatch.setattr(sparsegpt, "COLUMNS", block)
        found = solve(weight, hessian, parsed)
        assert torch.equal(found.mask, mask)
        check_mask(found.mask, parsed)
        torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-9)
        lost = float((((weight - expected) @ x) ** 2).sum())
        assert found.lost == pytest.approx(lost, rel=1e-9)
        assert found.whole == pytest.approx(float(((weight @ x) ** 2).sum()), rel=1e-9)
        assert not torch.signbit(found.weight[~found.mask]).any()


def least_squares(row: Tensor, x: Tensor, removed: int) -> float:
    """The least squared error without one weight, if the weights after it may change and those before may not."""
    free = [*range(removed + 1, len(row))]
    fixed = row.clone()
    fixed[[removed, *free]] = 0
    aim = (row - fixed) @ x
    if not free:
        return float((aim**2).sum())
    solution = torch.linalg.lstsq(x[free].T, aim[:, None]).solution[:, 0]
    return float(((aim - solution @ x[free]) ** 2).sum())


def test_one_weight_of_one_group_is_removed_at_the_least_error_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "DAMPING", 0.0)
    for seed in range(20):
        weight, x = problem(1, 4, seed=seed)
        found = solve(weight, x @ x.T, Pattern(3, 4))
        errors = [least_squares(weight[0], x, removed) for removed in range(4)]
        assert found.lost == pytest.approx(min(errors), rel=1e-7)
        assert not found.mask[0, errors.index(min(errors))]


def test_no_mask_with_any_weights_does_better_than_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask of two groups with its own least squares bounds the error from below; magnitude from above."""
    monkeypatch.setattr(sparsegpt, "DAMPING", 0.0)
    better = 0
    for seed in range(10):
        weight, x = problem(1, 8, seed=seed)
        best = float("inf")
        for first, second in itertools.product(itertools.combinations(range(4), 2), repeat=2):
            kept = [*first, *(4 + i for i in second)]
            aim = weight[0] @ x
            solution = torch.linalg.lstsq(x[kept].T, aim[:, None]).solution[:, 0]
            best = min(best, float(((aim - solution @ x[kept]) ** 2).sum()))
        found = solve(weight, x @ x.T, Pattern(2, 4))
        plain = weight.masked_fill(~magnitude_mask(weight, Pattern(2, 4)), 0)
        simple = float((((weight - plain) @ x) ** 2).sum())
        assert best <= found.lost * (1 + 1e-9)
        assert found.lost <= simple
        better += found.lost < simple
    assert better == 10


@pytest.mark.parametrize(("arch", "size"), [("test_resnet", 32), ("test_vit", 32)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4/4"])
def test_sparsegpt_loses_less_of_the_output_than_masks_alone_in_every_layer(arch: str, size: int, pattern: str) -> None:
    torch.manual_seed(0)
    model = models.create(arch, num_classes=10, kwargs={"img_size": size} if "vit" in arch else {}).eval()
    images = open_images(model, "digits", kept={}, overrides=(f"data.image_size={size}",), device=CPU)
    pictures, labels = images.calibration(48, 0, lambda *_: None)
    targets = find_targets(model, Pattern.parse(pattern)).targets
    weights = {target.name: target.weight for target in targets}
    hessians: dict[str, Tensor] = {}

    def note(name: str, seen: Seen) -> None:
        for part in seen.columns():
            hessians[name] = hessians.get(name, 0) + part @ part.mT

    with torch.no_grad(), Watch(weights, note):
        model(pictures)
    wanda = by_wanda(targets, Calibration(model, pictures, labels, CPU)).masks
    for target in targets:
        rows = in_order(target.weight.detach().double())
        (hessian,) = hessians[target.name]
        found = solve(rows, hessian, target.pattern)
        check_mask(from_order(found.mask, target.weight.shape), target.pattern)
        for mask in (magnitude_mask(target.weight, target.pattern), wanda[target.name]):
            change = rows.masked_fill(in_order(mask), 0)
            lost = float(((change @ hessian) * change).sum())
            assert found.lost <= lost, target.name


def test_layers_see_what_the_pruned_layers_before_them_give() -> None:
    model = net()
    look = calibration(model)
    targets = targets_of(model, layers=ALL)
    chosen = by_sparsegpt(targets, look)
    by_hand = net()
    for name in ("strided", "grouped", "circular", "twice", "hidden", "head"):
        target = next(t for t in targets if t.module == name)
        parameter = by_hand.get_parameter(target.name)
        groups = target.groups
        hessian = 0

        def note(_: str, seen: Seen) -> None:
            nonlocal hessian
            hessian = hessian + sum(part @ part.mT for part in seen.columns())

        with torch.no_grad(), Watch({"w": parameter}, note):
            by_hand(look.images)
        assert isinstance(hessian, Tensor)
        rows = in_order(parameter.detach().double()).chunk(groups)
        solved = [solve(part, h, target.pattern) for part, h in zip(rows, hessian, strict=True)]
        expected = from_order(torch.cat([entry.weight for entry in solved]), parameter.shape)
        torch.testing.assert_close(chosen.weights[target.name], expected, rtol=1e-4, atol=1e-5)
        lost = sum(entry.lost for entry in solved) / sum(entry.whole for entry in solved)
        assert chosen.errors[target.name] == pytest.approx(lost, rel=1e-4)
        with torch.no_grad():
            parameter.copy_(expected)
    assert torch.equal(by_hand.get_parameter("stem.weight"), model.get_parameter("stem.weight"))


def test_what_changes_is_what_the_calibration_shows() -> None:
    model = net()
    targets = targets_of(model, layers=ALL)
    chosen = by_sparsegpt(targets, calibration(model))
    for target in targets:
        weight, mask = chosen.weights[target.name], chosen.masks[target.name]
        check_mask(mask, target.pattern)
        assert not weight[~mask].any()
        assert (weight[mask] != target.weight.detach()[mask]).float().mean() > 0.3
    assert chosen.notes[0].startswith("largest Hessian: circular.weight, 144 x 144 in float64")


def test_a_layer_without_any_input_is_pruned_by_magnitude() -> None:
    weight, _ = problem(4, 8)
    found = solve(weight, torch.zeros(8, 8, dtype=torch.float64), Pattern(2, 4))
    assert torch.equal(found.mask, magnitude_mask(weight, Pattern(2, 4)))
    assert torch.equal(found.weight[found.mask], weight[found.mask])


def test_a_hessian_that_does_not_fit_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "free_memory", lambda device: 2**19)
    model = net()
    with pytest.raises(MethodError, match=r"sparsegpt needs 0\.00 GiB for circular\.weight alone, .* over 144 inputs"):
        by_sparsegpt(targets_of(model, layers=ALL), calibration(model))
    assert sparsegpt._bytes(targets_of(model, layers=ALL)[2]) == 8 * 144**2 * 4


def test_free_memory_is_told() -> None:
    assert sparsegpt.free_memory(CPU) > 2**27
