"""STR against an oracle: autograd through the authors' reparameterization, thresholds as parameters of torch's SGD."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from lbc_cli import checkpoint, training
from lbc_cli.cli import app
from lbc_cli.errors import DivergenceError, MethodError, RecipeError
from lbc_cli.methods import attach
from lbc_cli.methods.soft_threshold import SoftThreshold
from lbc_cli.recipe import resolve
from lbc_cli.report.describe import plan_view
from lbc_cli.smoke import smoke
from lbc_cli.verifier import verify
from tests.unstructured import EPOCHS, LAYERS, TARGETS, batches, learning_rate, network


class PaperStr:
    """Dense weights and one s per layer, all of them leaves; the effective weights exist only in the forward pass."""

    def __init__(self, model: nn.Module, make: Any, s_init: float, s_decay: float | None, own_rule: Any) -> None:
        self.model, self.weights = model, dict(model.named_parameters())
        self.s = {name: torch.full((1,), s_init, dtype=torch.float64, requires_grad=True) for name in TARGETS}
        self.optimizer = make(list(self.weights.values()))
        self.own = (own_rule or make)(list(self.s.values()))
        if s_decay is not None:
            self.own.param_groups[0]["weight_decay"] = s_decay

    def effective(self) -> dict[str, Tensor]:
        def sparse(weight: Tensor, s: Tensor) -> Tensor:
            return torch.sign(weight) * torch.relu(torch.abs(weight) - torch.sigmoid(s))

        return {n: sparse(weight, self.s[n]) if n in self.s else weight for n, weight in self.weights.items()}

    def backward(self, images: Tensor, labels: Tensor, accumulate: int) -> None:
        outputs = torch.func.functional_call(self.model, self.effective(), (images,))
        (nn.functional.cross_entropy(outputs, labels) / accumulate).backward()

    def clip(self, bound: float) -> None:
        """By the norm of the weights' gradients alone; those of the thresholds shrink alike."""
        norm = nn.utils.clip_grad_norm_(list(self.weights.values()), bound)
        factor = min(1.0, bound / (float(norm) + 1e-6))
        for s in self.s.values():
            s.grad.mul_(factor)

    def step(self, lr: float) -> None:
        for optimizer in (self.optimizer, self.own):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()


def sgd(**kwargs: Any) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=0.2, **kwargs)


MOMENTUM = sgd(momentum=0.9, weight_decay=5e-3)
ADAMW: Any = lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.05)  # noqa: E731


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (MOMENTUM, {}),
        (MOMENTUM, {"s_init": -2.2, "s_decay": 0.0}),
        (MOMENTUM, {"s_init": -2.5, "s_decay": 0.01}),
        (MOMENTUM, {"accumulate": 2}),
        (MOMENTUM, {"clip": 0.05}),
        (MOMENTUM, {"s_decay": None}),
        (sgd(), {}),
        (sgd(weight_decay=1e-2, maximize=True), {"s_decay": 0.01}),
        (sgd(momentum=0.9, nesterov=True, weight_decay=1e-2), {}),
        (sgd(momentum=0.8, dampening=0.3, weight_decay=1e-2), {"accumulate": 2}),
        (ADAMW, {"own_rule": sgd(weight_decay=0.05), "s_decay": None}),
    ],
    ids=str,
)
def test_equals_the_paper(make: Any, how: dict[str, Any]) -> None:
    how = {"s_init": -3.0, "s_decay": 0.03, "accumulate": 1, "clip": 0.0, "own_rule": None, **how}
    options = {key: how[key] for key in ("s_init", "s_decay")}
    model = network()
    optimizer = make(model.parameters())
    pruner = attach(model, optimizer, method="str", epochs=EPOCHS, layers=LAYERS, **options)
    assert isinstance(pruner, SoftThreshold)
    oracle = PaperStr(copy.deepcopy(model), make, how["s_init"], how["s_decay"], how["own_rule"])
    step, densities = 0, []
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        densities.append(pruner.density())
        for number, (images, labels) in enumerate(batches(epoch), 1):
            (nn.functional.cross_entropy(model(images), labels) / how["accumulate"]).backward()
            oracle.backward(images, labels, how["accumulate"])
            if number % how["accumulate"]:
                continue
            step += 1
            if how["clip"]:
                nn.utils.clip_grad_norm_(model.parameters(), how["clip"])
                oracle.clip(how["clip"])
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(learning_rate(step))
            effective = oracle.effective()
            for name, weight in model.named_parameters():
                assert (weight.detach() - effective[name].detach()).abs().max().item() <= 1e-12
            for name, mask in pruner.masks().items():
                assert torch.equal(mask, effective[name] != 0)
                assert pruner.s[name].item() == pytest.approx(oracle.s[name].item(), abs=1e-12)
    assert pruner.phase == "final"
    assert len(set(densities)) > 1
    assert 0 < pruner.density() < 1


def begun(**options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, SoftThreshold]:
    model = network()
    optimizer = MOMENTUM(model.parameters())
    pruner = attach(model, optimizer, method="str", epochs=EPOCHS, layers=LAYERS, **options)
    assert isinstance(pruner, SoftThreshold)
    pruner.begin_epoch(0)
    return model, optimizer, pruner


def backward(model: nn.Module) -> None:
    images, labels = next(batches(0))
    nn.functional.cross_entropy(model(images), labels).backward()


def test_decay_makes_it_sparse_and_the_loss_holds_it_back() -> None:
    ends = {}
    for decay in (0.0, 0.05, 0.2):
        model, optimizer, pruner = begun(s_init=-4.0, s_decay=decay)
        for _ in range(30):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
        ends[decay] = pruner.density()
        if not decay:
            assert all(s.item() < -4 for s in pruner.s.values()), "with no decay the gradient alone moves it"
    assert ends[0.0] > ends[0.05] > ends[0.2]


def test_removed_weights_have_no_gradient_and_norms_see_none() -> None:
    model, _, pruner = begun(s_init=-2.0)
    backward(model)
    for target in pruner.targets:
        assert target.weight.grad is not None
        removed = pruner.removed(target)
        assert removed is not None
        assert removed.any()
        assert (target.weight.grad[removed] == 0).all()
        assert (target.weight.grad[~removed] != 0).any()


def test_a_density_is_promised_neither_by_the_plan_nor_before_the_last_epoch(tmp_path: Path) -> None:
    model, _, pruner = begun(s_init=-2.0)
    assert pruner.planned_density(0) is None
    assert set(pruner.planned_densities().values()) == set(pruner.planned_layers(2).values()) == {None}
    assert pruner.phase == "training"
    checkpoint.save(model, tmp_path / "early", pruner=pruner)
    assert checkpoint.read_manifest(tmp_path / "early").unstructured == {}
    pruner.begin_epoch(EPOCHS - 1)
    assert pruner.phase == "final"
    checkpoint.save(model, tmp_path / "late", pruner=pruner)
    report = verify(tmp_path / "late")
    assert report.ok
    assert {layer.name: layer.density for layer in report.counted} == pruner.densities()
    flags = {"model.name": "test_resnet", "data.source": "digits", "method.name": "str"}
    job = training.prepare(smoke(resolve("digits", flags=flags)))
    assert (job.title, str(job.default_folder)) == ("test_resnet · str", "runs/test_resnet-str")
    plan = plan_view(job, "x")
    assert {layer.density for layer in plan.layers} == {epoch.density for epoch in plan.schedule} == {None}
    assert (plan.cost.parameters_sparse, plan.cost.macs_sparse, plan.cost.training_share) == (None, None, None)


def test_the_plan_shows_what_is_not_known() -> None:
    arguments = ["train", "test_resnet", "--method", "str", "--data", "digits", "--dry-run"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["conv1.3.weight", "16x16x3x3", "-"] in lines
    assert any(line[:1] == ["0-23"] and line[1] == "-" for line in lines)
    assert ["parameters", "374", "k", "-", "-"] in lines


def test_what_cannot_be_is_refused() -> None:
    model, _, pruner = begun()
    pruner.s["1.weight"].fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"the threshold of 1\.weight is not finite"):
        pruner.begin_epoch(1)
    for options in ({"s_init": float("inf")}, {"s_decay": -1.0}, {"sparsity": 0.9}):
        with pytest.raises(MethodError):
            attach(model, MOMENTUM(model.parameters()), method="str", epochs=2, layers=LAYERS, **options)
    with pytest.raises(RecipeError, match=r"sparsity: method 'str' has no such option"):
        resolve("digits", overrides=["method.sparsity=0.9"], flags={"model.name": "x", "method.name": "str"})
