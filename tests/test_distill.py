"""Learning from a teacher: the loss by hand, a teacher that nothing trains or saves, and who is refused as one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from lbc_cli import checkpoint, models, training
from lbc_cli.cli import app
from lbc_cli.distill import Distilled, Teacher, soft_loss
from lbc_cli.errors import Interrupted, ModelError, RecipeError, UsageError
from lbc_cli.recipe import resolve
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from lbc_cli.tasks import Classification
from lbc_cli.verifier import verify

GENERATED = ["data.source=generated", "data.image_size=32", "data.batch_size=8", "schedule.warmup_epochs=0"]


def by_hand(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    """T^2 times the mean over images of sum p log(p / q)."""

    def softened(row: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    images = [
        sum(p * math.log(p / q) for p, q in zip(softened(right), softened(own), strict=True))
        for own, right in zip(student, teacher, strict=True)
    ]
    return temperature**2 * sum(images) / len(images)


class Fixed(nn.Module):
    """Returns the same logits whatever it sees, and keeps what it saw."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.seen: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return self.logits


STUDENT, TEACHER = [[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]], [[1.0, 1.0, -3.0], [-2.0, 0.3, 4.0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_hintons(alpha: float, temperature: float) -> None:
    teacher, student = Fixed(TEACHER), Fixed(STUDENT)
    inner, targets = Classification(smoothing=0.1), torch.tensor([0, 2])
    task = Distilled(inner, Teacher("t", teacher, None, None, 0), alpha=alpha, temperature=temperature)
    images = torch.zeros(2, 1)
    loss, outputs = task.training_loss(student, images, targets)
    plain = inner.training_loss(student, images, targets)[0].item()
    expected = (1 - alpha) * plain + alpha * by_hand(STUDENT, TEACHER, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(outputs, student.logits)
    assert teacher.seen is images
    loss.backward()
    assert teacher.logits.grad is None
    assert task.primary == "top1"


def test_the_gradient_of_the_soft_part_draws_towards_the_teacher() -> None:
    student = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(TEACHER, dtype=torch.float64)
    soft_loss(student, teacher, 3.0).backward()
    drawn = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 2  # T^2 * 1/T, over 2 images
    assert torch.allclose(student.grad, drawn.detach())
    assert soft_loss(teacher, teacher, 3.0).item() == 0.0


def job(*overrides: str, **flags: Any) -> training.Job:
    base = {"model.name": "test_resnet", "train.epochs": 4}
    return training.prepare(resolve("digits", overrides=[*GENERATED, *overrides], flags={**base, **flags}))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of another network, trained for an epoch."""
    folder = RunFolder.create(tmp_path_factory.mktemp("teacher") / "run")
    flags = {"model.name": "resnet10t", "method.name": "dense", "train.epochs": 1}
    training.run(job(**flags), folder)
    return folder.model


def test_a_teacher_teaches_and_is_neither_trained_nor_saved(teacher: Path, tmp_path: Path) -> None:
    plain, taught = job(), job(**{"distill.teacher": str(teacher)})
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), taught.model.parameters(), strict=True))
    assert isinstance(taught.task, Distilled)
    network = taught.task.teacher.model
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert before.keys() == checkpoint.read(teacher).tensors.keys()
    folder = RunFolder.create(tmp_path / "run")
    outcome = training.run(taught, folder)
    assert outcome.report.ok
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not network.training
    saved = checkpoint.read(folder.model)
    assert saved.tensors.keys() == taught.model.state_dict().keys()
    assert f'teacher = "{teacher}"' in saved.manifest.recipe
    assert "alpha = 0.5" in saved.manifest.recipe
    other = training.run(plain, RunFolder.create(tmp_path / "plain"))
    assert other.result.last["train_loss"] != outcome.result.last["train_loss"]
    assert verify(folder.model).ok


def test_a_resumed_run_ends_with_the_same_bits(teacher: Path, tmp_path: Path) -> None:
    flags = {"distill.teacher": str(teacher), "train.amp": "bfloat16", "train.accumulate": 2}
    whole, cut = (RunFolder.create(tmp_path / name) for name in ("whole", "cut"))
    training.run(job(**flags), whole)
    polls = iter(range(1000))
    with pytest.raises(Interrupted):
        training.run(job(**flags), cut, stop=lambda: next(polls) >= 5)
    content = teacher.read_bytes()
    checkpoint.save(models.create("test_resnet", num_classes=10), teacher, overwrite=True)
    with pytest.raises(UsageError, match=r"distill\.teacher = .* has other weights than when the run began"):
        resume(cut)
    teacher.write_bytes(content)
    training.run(resume(cut), cut)
    first, second = checkpoint.read(whole.model).tensors, checkpoint.read(cut.model).tensors
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_teacher_gets_its_own_normalisation(teacher: Path) -> None:
    flags = {"distill.teacher": str(teacher), "data.mean": [0.1, 0.2, 0.3], "data.std": [0.5, 0.25, 2.0]}
    task = job(**flags).task
    assert isinstance(task, Distilled)
    network = Fixed([[0.0] * 10])
    task.teacher.model.forward = network.forward
    raw = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    task.training_loss(Fixed([[1.0] + [0.0] * 9]), (raw - mean) / std, torch.tensor([3]))
    assert network.seen is not None
    assert torch.allclose(network.seen, (raw - 0.305) / 0.376, atol=1e-5)  # what the teacher's recipe says


def test_files_that_name_no_model_need_its_name(teacher: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = tmp_path / "plain.safetensors"
    save_file(dict(checkpoint.read(teacher).tensors), plain)
    with pytest.raises(ModelError, match="does not say which model it is"):
        job(**{"distill.teacher": str(plain)})
    task = job(**{"distill.teacher": str(plain), "distill.model": "resnet10t"}).task
    assert isinstance(task, Distilled)


def test_a_teacher_with_other_classes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    checkpoint.save(models.create("test_resnet", num_classes=7), path)
    with pytest.raises(ModelError, match=r"other.safetensors has 7 classes, the data 10: choose one"):
        job(**{"distill.teacher": str(path)})


def test_a_teacher_whose_classes_have_other_names_is_refused(teacher: Path) -> None:
    with pytest.raises(ModelError, match=r"its class 0 is 'class0', the data's is '0'"):
        training.prepare(resolve("digits", flags={"model.name": "test_resnet", "distill.teacher": str(teacher)}))


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"distill.teacher": "resnet5"}, ModelError, "no model 'resnet5'. Did you mean"),
        ({"distill.teacher": "no/such/file.safetensors"}, UsageError, "no such weight file"),
        ({"distill.teacher": "test_resnet", "distill.model": "resnet18"}, ModelError, "is for files that name none"),
        ({"distill.alpha": 0.3}, RecipeError, "no teacher to which alpha applies: set distill.teacher"),
        ({"distill.teacher": "x", "distill.temperature": 0.0}, RecipeError, "must be greater than 0"),
    ],
)
def test_what_is_no_teacher(flags: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        job(**flags)


def test_the_command_line_names_a_teacher(teacher: Path, tmp_path: Path) -> None:
    sets = [part for text in GENERATED for part in ("--set", text)]
    command = ["train", "test_resnet", "--recipe", "digits", "--teacher", str(teacher), *sets, "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"{teacher}, alpha 0.5, temperature 4" in result.stdout
    smoke = ["train", "test_resnet", "--recipe", "digits", "--teacher", "no/file.pth", "--smoke", "--out"]
    result = CliRunner().invoke(app, [*smoke, str(tmp_path / "run"), "-q"])
    assert result.exit_code == 0, result.output
    assert 'teacher = "generated"  # --smoke' in (tmp_path / "run" / "recipe.toml").read_text()
