"""A run stopped between any two updates and continued ends with the bits of a run that was never stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lbc_cli import training
from lbc_cli.distributed import ALONE
from lbc_cli.errors import DivergenceError, Interrupted
from lbc_cli.recipe import resolve
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from lbc_cli.tasks import Classification
from tests.ranks import METHODS, Scenario
from tests.test_engine import CASES, Rig, StubLoaders, same, without_times

EPOCHS, STEPS = 6, 4
POSITIONS = [(epoch, step) for epoch in range(EPOCHS) for step in range(1, STEPS + 1)][:-1]


def rig(**more: Any) -> Rig:
    """Four updates of two batches in an epoch, the last batch short, with everything that has a state."""
    loaders = StubLoaders(60, 8)
    return Rig(
        epochs=EPOCHS, ema=True, ema_decay=0.9, loaders=loaders, accumulate=2, clip_grad=2.0, log_every=3, **more
    )


def stop_at(position: int) -> Callable[[], bool]:
    """A stop after so many polls: one after every update but the last of an epoch, and one at its end."""
    polls = iter(range(1, 10_000))
    return lambda: next(polls) >= position


def keep(states: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    return lambda state: states.append(copy.deepcopy(state))


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_at_any_update_ends_bit_identical(case: str) -> None:
    whole = rig(**CASES[case])
    uninterrupted = whole.fit()
    for position, (epoch, step) in enumerate(POSITIONS, start=1):
        states: list[dict[str, Any]] = []
        stopped = rig(**CASES[case])
        with pytest.raises(Interrupted):
            stopped.fit(save_state=keep(states), stop=stop_at(position))
        at = (epoch, step) if step < STEPS else (epoch + 1, 0)
        assert (states[-1]["epoch"], states[-1]["step"]) == at

        torch.manual_seed(99)  # a new process stands elsewhere
        second = rig(**CASES[case])
        resumed = second.fit(resume=states[-1])
        assert same(whole.weights(), second.weights()), at
        assert same(whole.optimizer.state_dict(), second.optimizer.state_dict()), at
        assert same(whole.pruner.state_dict(), second.pruner.state_dict()), at
        assert uninterrupted.ema is not None
        assert resumed.ema is not None
        assert same(uninterrupted.ema.state_dict(), resumed.ema.state_dict()), at
        assert without_times(uninterrupted.history) == without_times(resumed.history), at


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_from_within_an_epoch(name: str) -> None:
    def scenario() -> Scenario:
        return Scenario(ALONE, norm=True, **{"method": name, **METHODS[name]})

    whole = scenario()
    uninterrupted = whole.fit()
    for position in range(1, 25):
        states: list[dict[str, Any]] = []
        stopped = scenario()
        with pytest.raises(Interrupted):
            stopped.fit(save_state=keep(states), stop=stop_at(position))
        second = scenario()
        resumed = second.fit(resume=states[-1])
        assert same(whole.tensors(), second.tensors()), position
        assert same(whole.pruner.state_dict(), second.pruner.state_dict()), position
        assert without_times(uninterrupted.history) == without_times(resumed.history), position


def test_a_run_may_be_stopped_at_every_update_of_it() -> None:
    whole = rig()
    uninterrupted = whole.fit()
    state: dict[str, Any] | None = None
    parts = 0
    while True:
        parts += 1
        part = rig()
        states: list[dict[str, Any]] = []
        try:
            result = part.fit(resume=state, save_state=keep(states), stop=stop_at(1))
        except Interrupted:
            state = states[-1]
        else:
            break
    assert parts == len(POSITIONS) + 1
    assert same(whole.weights(), part.weights())
    assert without_times(uninterrupted.history) == without_times(result.history)


def test_states_within_an_epoch_come_by_updates_and_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[int, int]] = []
    settings = {"epochs": 2, "save_steps": 3, "save_minutes": 0.0, "save_every": 2}
    Rig(loaders=StubLoaders(128, 16), **settings).fit(save_state=lambda s: saved.append((s["epoch"], s["step"])))
    assert saved == [(0, 3), (0, 6), (1, 3), (1, 6), (2, 0)]

    clock: Iterator[float] = iter(range(0, 100_000, 25))  # seconds: a look at the clock after every update
    monkeypatch.setattr("lbc_cli.engine.loop.time.monotonic", lambda: float(next(clock)))
    saved.clear()
    settings = {"epochs": 1, "save_minutes": 1.0}
    Rig(loaders=StubLoaders(128, 16), **settings).fit(save_state=lambda s: saved.append((s["epoch"], s["step"])))
    assert saved == [(0, 3), (0, 6), (1, 0)]


def test_a_state_is_never_from_after_a_value_that_is_not_finite() -> None:
    """On a GPU the check lags by an update; here the same logic runs on the CPU."""

    class Late(Rig):
        def fit(self, **options: Any) -> Any:
            from lbc_cli.engine import updates

            whole = updates.Updater.__init__

            def lagging(updater: updates.Updater, *args: Any, **kwargs: Any) -> None:
                whole(updater, *args, **kwargs)
                updater.lags = True

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(updates.Updater, "__init__", lagging)
                return super().fit(**options)

    def poisoned(batch: int) -> StubLoaders:
        loaders = StubLoaders(128, 16, shuffle=False)
        loaders.train.images[16 * batch : 16 * (batch + 1)] = float("nan")
        return loaders

    saved: list[int] = []
    settings = {"epochs": 1, "log_every": 100, "save_steps": 1, "model": None}
    with pytest.raises(DivergenceError, match=r"epoch 0, update 4 of 8.*found after it, before anything was saved"):
        Late(loaders=poisoned(3), **settings).fit(save_state=lambda s: saved.append(s["step"]))
    assert saved == [1, 2, 3]
    with pytest.raises(DivergenceError, match=r"update 4 of 8.*no state was saved"):
        Late(loaders=poisoned(3), epochs=1, log_every=100).fit()
    with pytest.raises(DivergenceError, match=r"update 8 of 8"):
        Late(loaders=poisoned(7), epochs=1, log_every=100).fit()


def job(workers: int, **more: Any) -> training.Job:
    overrides = [
        f"data.workers={workers}",
        "data.batch_size=360",  # four updates an epoch, from batches of half the size
        "train.accumulate=2",
        "train.ema=true",
        "train.ema_decay=0.9",
        "schedule.warmup_epochs=1",
        "augment.mixup=0.2",
        *(f"{key}={value}" for key, value in more.items()),
    ]
    flags = {"model.name": "test_resnet", "data.source": "digits", "train.epochs": 5, "train.seed": 3}
    return training.prepare(resolve("digits", overrides=overrides, flags=flags))


@pytest.mark.parametrize("workers", [0, 2])
def test_run_folders_of_a_stopped_and_a_whole_run_hold_the_same(workers: int, tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "whole")
    training.run(job(0), whole)
    folder = RunFolder.create(tmp_path / "stopped")
    # two updates an epoch: within the first epoch, at its end, around t_f = 2, and near the end
    with pytest.raises(Interrupted, match="epoch 0, after update 1"):
        training.run(job(workers), folder, stop=stop_at(1))
    for polls in (2, 1, 2):
        with pytest.raises(Interrupted):
            training.run(resume(folder), folder, stop=stop_at(polls))
    training.run(resume(folder), folder)
    for one, other in ((whole.ema, folder.ema), (whole.model, folder.model)):
        if workers:  # the recipe within tells them apart
            assert same(weights(one), weights(other))
        else:
            assert one.read_bytes() == other.read_bytes()
    logs = [without_times(records(f)) for f in (whole, folder)]
    assert logs[0] == logs[1]
    spent = json.loads(folder.summary.read_text(encoding="utf-8"))["seconds"]  # in every session
    assert spent == sum(record["seconds"] for record in records(folder) if record["kind"] == "epoch")


def weights(path: Path) -> dict[str, Any]:
    from lbc_cli.checkpoint import read

    return dict(read(path).tensors)


def records(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


class Syncs(TorchDispatchMode):
    """Counts operators that would make the host wait for a GPU."""

    WAITING: ClassVar = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "item"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in self.WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lbc", "sr-ste", "asp", "dense"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_update_between_log_steps_never_waits_for_the_device(
    method: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbc_cli.engine import updates

    monkeypatch.setattr(updates._Pending, "finite", lambda pending: True)  # a flag that is on the host by then
    trained = Rig(method=method, ema=True, clip_grad=clip, epochs=4)
    trained.pruner.begin_epoch(1)
    updater = updates.Updater(
        trained.model, trained.optimizer, trained.scheduler, Classification(smoothing=0.1), trained.settings
    )
    batch = next(iter(trained.loaders.train))
    with Syncs() as syncs:
        updater.update(iter([batch]))
    assert syncs.found  # where the check does not lag, it waits
    updater.lags = True
    with Syncs() as syncs:
        for _ in range(3):
            updater.update(iter([batch]), settle=False)
    assert syncs.found == []
