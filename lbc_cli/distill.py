"""Distillation: a task whose loss also draws the student's outputs to those of a dense teacher.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015. On the same augmented batch

    loss = (1 - alpha) * task's loss + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))

with T the temperature; T^2 keeps the size of the second gradient when T changes. KL is summed over the classes and
averaged over the images. The paper names neither alpha nor T for ImageNet; the defaults are common ones.

The teacher runs in eval mode, without gradients, on the student's device, under the student's autocast, and is no part
of the model: it is neither saved nor trained. Where it was trained on pixels normalised in another way, the batch is
normalised anew for it. The task's own loss is whatever the recipe says; with mixed images the teacher sees them mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli import flops, models, weights
from lbc_cli.data.transforms import Pixels
from lbc_cli.errors import ModelError
from lbc_cli.recipe import schema
from lbc_cli.tasks import Evaluation, Task

GENERATED = "generated"  # a fresh network like the student, for smoke runs


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network to learn from.

    Attributes:
        name: what it is, for people.
        model: on the run's device, in eval mode, without gradients.
        scale: per channel [C, 1, 1], from the student's normalised pixels to its own: x * scale + shift.
        shift: likewise; None, as `scale`, where both are normalised alike.
        macs: multiply-adds of a forward pass on one image of the run.
    """

    name: str
    model: nn.Module
    scale: Tensor | None
    shift: Tensor | None
    macs: int


def teacher_digest(task: Task) -> str:
    """SHA-256 over names and weights of a task's teacher; "" for a task without one."""
    if not isinstance(task, Distilled):
        return ""
    digest = hashlib.sha256()
    for name, value in task.teacher.model.state_dict().items():
        digest.update(name.encode() + b"\0")
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Distilled:
    """A task with a teacher.

    Args:
        task: what is learnt.
        teacher: whom the student shall resemble.
        alpha: weight of the teacher's part, in [0, 1].
        temperature: T, above 0.
    """

    def __init__(self, task: Task, teacher: Teacher, *, alpha: float, temperature: float) -> None:
        self.task, self.teacher, self.alpha, self.temperature = task, teacher, alpha, temperature
        self.primary, self.larger_is_better = task.primary, task.larger_is_better

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed loss, a scalar, and the student's logits [N, K]."""
        loss, outputs = self.task.training_loss(model, images, targets)
        with torch.no_grad():
            taught = self.task.predict(self.teacher.model, self._seen(images))
        soft = soft_loss(outputs, taught.detach().to(outputs.dtype), self.temperature)
        return (1 - self.alpha) * loss + self.alpha * soft, outputs

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the task predicts; the teacher has no part in it."""
        return self.task.predict(model, images)

    def evaluation(self) -> Evaluation:
        """The task's collector."""
        return self.task.evaluation()

    def _seen(self, images: Tensor) -> Tensor:
        scale, shift = self.teacher.scale, self.teacher.shift
        return images if scale is None or shift is None else torch.addcmul(shift, images, scale)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, averaged over images.

    Args:
        student: logits [N, K].
        teacher: logits [N, K].
        temperature: T.
    """
    wanted = functional.log_softmax(teacher / temperature, dim=1)
    found = functional.log_softmax(student / temperature, dim=1)
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


def distilled(
    task: Task,
    wanted: schema.Distill,
    *,
    student: schema.Model,
    pixels: Pixels,
    num_classes: int,
    class_names: Sequence[str] | None,
    device: torch.device,
    channels_last: bool = False,
) -> Task:
    """The task with its teacher, or the task itself where the recipe names none.

    Args:
        task: what is learnt.
        wanted: the recipe's table.
        student: the recipe's model, for the architecture of a teacher that is none of its own.
        pixels: what the student sees.
        num_classes: of the data.
        class_names: of the data, in their order; None where they have none.
        device: of the run.
        channels_last: memory format of the run.

    Raises:
        ModelError: if the teacher cannot be had, has other classes, or does not take the run's images.
        UsageError, CheckpointError: if its file is not there, or damaged.
    """
    if not wanted.teacher:
        return task
    with torch.random.fork_rng(devices=[]):  # the run's own numbers stay what they are without a teacher
        model, noted = _load(wanted, student, pixels, num_classes)
    model = model.float().eval().requires_grad_(False)
    macs = _check(wanted.teacher, model, pixels, num_classes)
    _check_names(wanted.teacher, noted.get("class_names"), class_names)
    scale, shift = _renormalised(pixels, {**models.data_config(model), **noted}, device)
    model = model.to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    teacher = Teacher(wanted.teacher, model, scale, shift, macs)
    return Distilled(task, teacher, alpha=wanted.alpha, temperature=wanted.temperature)


def _load(
    wanted: schema.Distill, student: schema.Model, pixels: Pixels, classes: int
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The teacher, and what its file notes: mean and std of its images, class_names."""
    if wanted.teacher == GENERATED:
        kwargs = {**student.kwargs, "num_classes": classes}
        model = models.create(student.name, image_size=pixels.height, kwargs=kwargs)
        return model, {"mean": pixels.mean, "std": pixels.std}
    if _is_file(wanted.teacher):
        found = weights.read(Path(wanted.teacher))
        noted = found.metrics.get("pixels")
        images = {key: noted[key] for key in ("mean", "std") if key in noted} if isinstance(noted, Mapping) else {}
        return weights.create(found, wanted.model or None), {**images, "class_names": found.metrics.get("class_names")}
    if wanted.model:
        raise ModelError(f"teacher {wanted.teacher} is a timm model: distill.model is for files that name none")
    instead = "give a file as the teacher"
    return models.create(wanted.teacher, image_size=pixels.height, pretrained=True, instead=instead), {}


def _is_file(teacher: str) -> bool:
    """Whether a teacher is a path: what exists is one, and what looks like one and is no timm name."""
    path = Path(teacher)
    return path.exists() or ((bool(path.suffix) or len(path.parts) > 1) and not models.is_known(teacher))


def _check(teacher: str, model: nn.Module, pixels: Pixels, classes: int) -> int:
    """Pass one image through the teacher; its multiply-adds.

    Raises:
        ModelError: if it does not run on such images, or tells other classes apart.
    """
    shape = (pixels.channels, pixels.height, pixels.width)
    try:
        macs = flops.count(model, shape).total_macs
    except ModelError as error:
        raise ModelError(f"teacher {teacher}: {error}; choose one that takes the run's images") from error
    outputs = _outputs(model, shape)
    if outputs != classes:
        raise ModelError(
            f"teacher {teacher} has {outputs} classes, the data {classes}: choose one that was trained on the same "
            f"classes"
        )
    return macs


def _outputs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """How many classes a model tells apart, by what it returns for one image."""
    with torch.no_grad():
        outputs = model(torch.zeros(1, *shape))
    return outputs.shape[-1] if isinstance(outputs, Tensor) and outputs.ndim == 2 else 0


def _check_names(teacher: str, known: Any, names: Sequence[str] | None) -> None:
    """Compare the classes by name, where both sides name them."""
    if not isinstance(known, Sequence) or names is None or list(known) == list(names):
        return
    first = next(number for number, (a, b) in enumerate(zip(known, names, strict=True)) if a != b)
    raise ModelError(
        f"teacher {teacher} was trained on other classes: its class {first} is {known[first]!r}, the data's is "
        f"{names[first]!r}; choose one that was trained on the same classes"
    )


def _renormalised(
    pixels: Pixels, config: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Scale and shift from the student's normalised pixels to the teacher's, where they differ."""
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if (mean, std) == (tuple(pixels.mean), tuple(pixels.std)):
        return None, None
    shape = (-1, 1, 1)
    own, other = torch.tensor(pixels.std, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    moved = torch.tensor(pixels.mean, dtype=torch.float64) - torch.tensor(mean, dtype=torch.float64)
    return (own / other).float().view(shape).to(device), (moved / other).float().view(shape).to(device)
