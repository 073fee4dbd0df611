"""Scenarios for several processes: `torchrun ... -m tests.ranks FOLDER` runs all of them, each rank writes what it saw.

Run without torchrun, as one process whose batches are those of all ranks together, it writes what they must equal.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lbc_cli import distributed
from lbc_cli.distributed import ALONE, World
from lbc_cli.engine import FitSettings, fit
from lbc_cli.errors import Interrupted, LbcError
from lbc_cli.methods import attach
from lbc_cli.optim import make_scheduler
from lbc_cli.recipe import schema
from lbc_cli.tasks import Classification

COMMON = 8  # images of a batch of all ranks together
IMAGES = 44  # five batches; the rest is dropped
CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "lbc": {},
    "lbc-weights": {"method": "lbc", "removal": "weights", "pattern": "4:16"},
    "lbc-gradient": {"method": "lbc", "criterion": "gradient"},
    "sr-ste": {},
    "asp": {"dense_epochs": 2},
    "maskllm": {"weights": "trained"},
    "gmp": {"sparsity": 0.75},
    "rigl": {"sparsity": 0.75, "every": 2},
    "dnw": {"sparsity": 0.75},
    "str": {"s_init": -3.0},
    "dense": {},
}


class Part:
    """One rank's part of the batches of all, in an order that follows from the epoch."""

    def __init__(self, world: World, train: bool) -> None:
        generator = torch.Generator().manual_seed(5 if train else 6)
        count = IMAGES if train else 23  # which no number of ranks divides
        self.targets = torch.arange(count) % 4
        noise = torch.randn(count, 16, 4, 4, generator=generator, dtype=torch.float64)
        self.images = noise + self.targets.view(-1, 1, 1, 1) - 1.5
        self.world, self.train = world, train
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return IMAGES // COMMON

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.train:
            mine = torch.arange(self.world.rank, len(self.images), self.world.size)
            yield from ((self.images[part], self.targets[part]) for part in mine.split(4))
            return
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch))
        size = COMMON // self.world.size
        for batch in range(self.first, len(self)):
            start = batch * COMMON + self.world.rank * size
            yield self.images[order[start : start + size]], self.targets[order[start : start + size]]


class PartLoaders:
    def __init__(self, world: World) -> None:
        self.train: Any = Part(world, True)
        self.val: Any = Part(world, False)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.train.epoch, self.train.first = epoch, first_batch


class Scenario:
    """A model with everything that trains it, as one rank sees it."""

    def __init__(
        self, world: World, *, norm: bool = False, method: str = "lbc", pattern: str = "2:4", **more: Any
    ) -> None:
        torch.manual_seed(3)
        stem: list[nn.Module] = [nn.BatchNorm2d(16)] if norm else []
        layers = [*stem, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.model = nn.Sequential(*layers, nn.Linear(16, 4)).double()
        settings = {key: more.pop(key) for key in ("accumulate", "ema", "save_steps", "amp") if key in more}
        self.settings = FitSettings(epochs=5, device=CPU, log_every=2, seed=4, **settings)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        steps = -(-len(PartLoaders(world).train) // self.settings.accumulate)
        schedule = schema.Schedule(name="cosine", warmup_epochs=1)
        self.scheduler = make_scheduler(self.optimizer, schedule, 5, steps)
        structured = method not in ("gmp", "rigl", "dnw", "str", "dense")
        if structured:
            more |= {"pattern": pattern, "layers": {str(len(stem)): pattern}}
        elif method != "dense":
            more |= {"layers": {str(len(stem)): "sparse"}}
        self.pruner: Any = attach(self.model, self.optimizer, method=method, epochs=5, **more)
        self.world, self.loaders = world, PartLoaders(world)

    def fit(self, **options: Any) -> Any:
        task = options.pop("task", Classification())
        parts = (self.model, self.optimizer, self.scheduler, self.pruner, task, self.loaders, self.settings)
        return fit(*parts, world=self.world, **options)

    def tensors(self) -> dict[str, Tensor]:
        masks = {f"mask.{name}": mask.contiguous() for name, mask in self.pruner.masks().items()}
        return {**{name: value.clone().contiguous() for name, value in self.model.state_dict().items()}, **masks}


class Notebook:
    """Where a rank writes what it saw."""

    def __init__(self, folder: Path, world: World) -> None:
        self.stem = folder / f"{world.size}-{world.rank}"
        self.seen: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    def note(self, name: str, tensors: dict[str, Tensor], **values: Any) -> None:
        self.tensors |= {f"{name}/{key}": value for key, value in tensors.items()}
        self.seen[name] = values

    def close(self) -> None:
        save_file(self.tensors, self.stem.with_suffix(".safetensors"))
        self.stem.with_suffix(".json").write_text(json.dumps(self.seen))


def equal_to_one_process(world: World, notebook: Notebook) -> None:
    for name, options in METHODS.items():
        scenario = Scenario(world, **{"method": name, **options})
        result = scenario.fit()
        memory = scenario.pruner.planned_memory()
        notebook.note(name, scenario.tensors(), history=result.history, memory=memory)
    scenario = Scenario(world, accumulate=2, ema=True)
    result = scenario.fit()
    notebook.note("accumulate", scenario.tensors(), history=result.history)


def stopped_and_resumed(world: World, notebook: Notebook) -> None:
    """A signal on the last rank alone stops all after the same update; batch norm, averages and all."""
    whole = Scenario(world, norm=True, ema=True)
    result = whole.fit()
    notebook.note("whole", whole.tensors(), history=result.history)
    states: list[dict[str, Any]] = []
    polls = iter(range(100))
    stopped = Scenario(world, norm=True, ema=True)
    said = "nothing"
    try:
        stopped.fit(
            save_state=lambda state: states.append(copy.deepcopy(state)),
            stop=lambda: next(polls) >= 8 and world.rank == world.size - 1,
        )
    except Interrupted as error:
        said = str(error)
    notebook.note("stopped", {}, said=said, states=[[state["epoch"], state["step"]] for state in states])
    if world.control is not None:  # a file that every rank reads, in a real run
        box = [states[-1] if states else None]
        torch.distributed.broadcast_object_list(box, src=0)
        states = [box[0]]
    second = Scenario(world, norm=True, ema=True)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1.0)
    result = second.fit(resume=states[-1])
    notebook.note("resumed", second.tensors(), history=result.history)


def broken(world: World, notebook: Notebook) -> None:
    """What stops every rank."""
    apart = Scenario(world)
    begin = apart.pruner.begin_epoch

    def go_astray(epoch: int) -> None:
        begin(epoch)
        if epoch == 3 and world.rank == world.size - 1:
            weight = apart.pruner.targets[0].weight
            apart.pruner.masks = lambda: {"0": torch.zeros_like(weight, dtype=torch.bool)}

    apart.pruner.begin_epoch = go_astray
    notebook.note("astray", {}, said=error_of(apart.fit))

    class Poisoned(Classification):
        def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            loss, outputs = super().training_loss(model, images, targets)
            return (loss * float("nan") if world.rank == world.size - 1 else loss), outputs

    poisoned = Scenario(world)
    before = poisoned.tensors()
    said = error_of(lambda: poisoned.fit(task=Poisoned()))
    unchanged = all(torch.equal(before[name], value) for name, value in poisoned.tensors().items())
    notebook.note("poisoned", {}, said=said, unchanged=unchanged)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except LbcError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    launched = distributed.launch()
    with distributed.session(launched, "cpu") as world:
        notebook = Notebook(Path(sys.argv[1]), world)
        equal_to_one_process(world, notebook)
        stopped_and_resumed(world, notebook)
        if world is not ALONE:
            broken(world, notebook)
        notebook.close()


if __name__ == "__main__":
    main()
