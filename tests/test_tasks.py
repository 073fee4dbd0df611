import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lbc_cli.errors import DataError, MethodError, ModelError
from lbc_cli.recipe import schema
from lbc_cli.tasks import TASKS, Classification, ClassificationEvaluation, make_task, rank_of


class Fixed(nn.Module):
    """Returns the same logits whatever it sees."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]], dtype=torch.float64)


def loss_of(task: Classification, targets: torch.Tensor, logits: torch.Tensor = LOGITS) -> float:
    loss, outputs = task.training_loss(Fixed(logits), torch.zeros(len(logits), 1), targets)
    assert torch.equal(outputs, logits)
    return loss.item()


def test_cross_entropy_with_smoothing_is_the_smoothed_targets_cross_entropy() -> None:
    targets = torch.tensor([0, 2])
    log_p = LOGITS - LOGITS.exp().sum(1, keepdim=True).log()
    plain = -(log_p[0, 0] + log_p[1, 2]) / 2
    assert loss_of(Classification(), targets) == pytest.approx(plain.item(), rel=1e-12)
    spread = torch.full((2, 3), 0.3 / 3, dtype=torch.float64)
    spread[0, 0] += 0.7
    spread[1, 2] += 0.7
    smoothed = -(spread * log_p).sum(1).mean().item()
    assert loss_of(Classification(smoothing=0.3), targets) == pytest.approx(smoothed, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("bce", [False, True])
def test_soft_targets_are_taken_as_they_are(smoothing: float, bce: bool) -> None:
    soft = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    log_p = LOGITS - LOGITS.exp().sum(1, keepdim=True).log()
    softmax = -(soft * log_p).sum(1).mean().item()
    p = LOGITS.sigmoid()
    binary = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean().item()
    expected = binary if bce else softmax
    assert loss_of(Classification(smoothing=smoothing, bce=bce), soft.float()) == pytest.approx(expected, rel=1e-6)


def test_binary_cross_entropy_smooths_class_ids_as_timm_does() -> None:
    from timm.loss import BinaryCrossEntropy

    targets = torch.tensor([0, 2])
    expected = BinaryCrossEntropy(smoothing=0.1)(LOGITS, targets).item()
    assert loss_of(Classification(smoothing=0.1, bce=True), targets) == pytest.approx(expected, rel=1e-12)


def test_half_precision_logits_lose_nothing_more_in_the_loss() -> None:
    half = LOGITS.to(torch.bfloat16)
    loss, outputs = Classification().training_loss(Fixed(half), torch.zeros(2, 1), torch.tensor([0, 2]))
    assert outputs.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(half.float(), torch.tensor([0, 2])).item())


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \[2, 3, 4, 4\]"):
        Classification().predict(nn.Identity(), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ModelError, match="tuple"):
        Classification().predict(nn.LSTM(3, 3), torch.zeros(2, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(2, 8), st.integers(1, 9), st.integers(0, 2**31))
def test_metrics_are_exact_over_any_split_into_batches(images: int, classes: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    targets = torch.randint(classes, (images,), generator=generator)
    evaluation = ClassificationEvaluation()
    for start in range(0, images, batch):
        evaluation.update(logits[start : start + batch], targets[start : start + batch])
    order = logits.argsort(1, descending=True).tolist()
    top1 = sum(t in o[:1] for o, t in zip(order, targets.tolist(), strict=True))
    top5 = sum(t in o[:5] for o, t in zip(order, targets.tolist(), strict=True))
    result = evaluation.result()
    assert result["top1"] == pytest.approx(100 * top1 / images, rel=1e-12)
    assert result["top5"] == pytest.approx(100 * top5 / images, rel=1e-12)
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits.double(), targets).item(), rel=1e-5)


def test_equal_logits_score_chance_and_nan_scores_nothing() -> None:
    targets = torch.arange(10)
    dead = ClassificationEvaluation()
    dead.update(torch.zeros(10, 10), targets)
    assert (dead.result()["top1"], dead.result()["top5"]) == (10.0, 50.0)
    broken = ClassificationEvaluation()
    broken.update(torch.full((10, 10), math.nan), targets)
    assert (broken.result()["top1"], broken.result()["top5"]) == (0.0, 0.0)
    assert math.isnan(broken.result()["loss"])
    assert rank_of(torch.tensor([[math.inf, 1.0, 1.0]]), torch.tensor([2])).item() == 2


def test_an_empty_evaluation_is_an_error() -> None:
    with pytest.raises(DataError, match="empty"):
        ClassificationEvaluation().result()


def test_recipes_choose_the_task_and_its_options() -> None:
    recipe = schema.Recipe(augment=schema.Augment(smoothing=0.1), train=schema.Train(bce=True))
    task = make_task(recipe)
    assert isinstance(task, Classification)
    assert (task.smoothing, task.bce) == (0.1, True)
    with pytest.raises(MethodError, match="Did you mean 'classification'"):
        make_task(schema.Recipe(task="clasification"))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_ranks_epochs_by_a_metric_it_reports(name: str) -> None:
    task = make_task(schema.Recipe(task=name))
    evaluation = task.evaluation()
    outputs = task.predict(Fixed(LOGITS.float()), torch.zeros(2, 1))
    evaluation.update(outputs, torch.tensor([0, 1]))
    assert {"loss", task.primary} <= evaluation.result().keys()
