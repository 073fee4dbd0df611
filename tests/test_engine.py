import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lbc_cli.engine import FitResult, FitSettings, NullReporter, evaluate, fit, loop
from lbc_cli.engine.updates import load_optimizer
from lbc_cli.errors import CheckpointError, DataError, DivergenceError, Interrupted, LbcError, UsageError
from lbc_cli.methods import Pruner, attach
from lbc_cli.optim import make_scheduler, updates_per_epoch
from lbc_cli.recipe import schema
from lbc_cli.tasks import Classification

CPU = torch.device("cpu")
CLASSES = 4


class Dataset:
    """Images whose class shows in their mean, batched in an order drawn anew every epoch."""

    def __init__(
        self, images: int, batch: int, *, shuffle: bool, seed: int = 7, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(images) % CLASSES
        noise = torch.randn(images, 3, 16, 16, generator=generator)
        self.images = (noise + self.targets.view(-1, 1, 1, 1) - 1.5).to(dtype)
        self.batch, self.shuffle, self.first = batch, shuffle, 0

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # from the global generator, as torch's own loaders do
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        for chosen in order.split(self.batch)[self.first :]:
            yield self.images[chosen], self.targets[chosen]


class StubLoaders:
    def __init__(self, images: int = 64, batch: int = 16, **options: Any) -> None:
        self.train: Any = Dataset(images, batch, shuffle=options.pop("shuffle", True), **options)
        self.val: Any = Dataset(24, 10, shuffle=False, seed=8, **options)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epochs.append(epoch)
        self.train.first = first_batch


class Recorder(NullReporter):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def start(self, info: Mapping[str, Any]) -> None:
        self.calls.append(("start", info))

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        self.calls.append(("epoch_started", (epoch, epochs, steps, facts)))

    def step(self, record: Mapping[str, Any]) -> None:
        self.calls.append(("step", record))

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        self.calls.append(("epoch_ended", record))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def named(self, name: str) -> list[Any]:
        return [value for kind, value in self.calls if kind == name]


def make_net(*, norm: bool = True, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, stride=2, padding=1)]
    layers += [nn.BatchNorm2d(8) if norm else nn.Identity()]
    layers += [nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Dropout(dropout), nn.Linear(16, CLASSES)]
    return nn.Sequential(*layers)


class Rig:
    """A model with everything that trains it."""

    def __init__(
        self,
        *,
        epochs: int = 3,
        loaders: Any = None,
        model: nn.Module | None = None,
        method: str = "lbc",
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        lr: float = 0.1,
        schedule: schema.Schedule | None = None,
        **settings: Any,
    ) -> None:
        self.settings = FitSettings(epochs=epochs, device=CPU, **settings)
        self.loaders = loaders or StubLoaders()
        self.model = model or make_net()
        make = optimizer or (lambda net: torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4))
        self.optimizer = make(self.model)
        steps = updates_per_epoch(len(self.loaders.train), self.settings.accumulate) or 1
        self.scheduler = make_scheduler(
            self.optimizer, schedule or schema.Schedule(name="constant", warmup_epochs=0), epochs, steps
        )
        self.pruner: Pruner = (
            attach(self.model, self.optimizer, pattern="2:4", method=method, epochs=epochs, layers={"3": "2:4"})
            if method != "dense"
            else attach(self.model, self.optimizer, method="dense", epochs=epochs)
        )

    def fit(self, **options: Any) -> FitResult:
        task = options.pop("task", None) or Classification(smoothing=0.1)
        return fit(
            self.model, self.optimizer, self.scheduler, self.pruner, task, self.loaders, self.settings, **options
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Equal in nesting, types and bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"seconds", "images_per_second", "data_wait", "memory"}
    return [{key: value for key, value in record.items() if key not in timed} for record in history]


def test_training_learns_and_ends_sparse() -> None:
    rig = Rig(epochs=4)
    rig.model.eval()  # training mode is the loop's to set
    result = rig.fit()
    losses = [record["train_loss"] for record in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.last["top1"] > 60
    assert result.last["density"] == 0.5
    assert rig.model.get_buffer("1.num_batches_tracked") == 16
    weight = rig.model.get_parameter("3.weight")
    kept = (weight.detach().reshape(16, 2, 4, 9) != 0).sum(2)
    assert (kept <= 2).all()


def test_the_record_of_an_epoch_tells_what_happened_in_it() -> None:
    rig = Rig(epochs=4, eval_every=3, lr=0.05)
    result = rig.fit()
    first, _, third, last = result.history
    assert first.keys() >= {"epoch", "train_loss", "lr", "density", "survivors", "phase", "images_per_second"}
    assert first["survivors"] == {"2:4": 6}
    assert (first["density"], first["phase"], first["lr"]) == (1.0, "training", 0.05)
    assert 0 <= first["data_wait"] <= 1
    assert first["seconds"] > 0
    assert first["memory"] > 0
    assert "top1" not in first
    assert {"val_loss", "top1", "top5"} <= third.keys()
    assert {"val_loss", "top1", "top5"} <= last.keys()
    assert rig.loaders.epochs == [0, 1, 2, 3]


def test_best_compares_only_epochs_with_final_masks() -> None:
    class Scripted(Classification):
        scores = iter((90.0, 80.0, 30.0, 20.0))

        def evaluation(self) -> Any:
            class Fixed:
                def update(self, outputs: Tensor, targets: Tensor) -> None: ...

                def result(self) -> dict[str, float]:
                    return {"loss": 1.0, "top1": next(Scripted.scores)}

            return Fixed()

    result = Rig(epochs=4).fit(task=Scripted())
    assert [record["phase"] for record in result.history] == ["training", "training", "final", "final"]
    assert result.best is not None
    assert (result.best["epoch"], result.best["top1"]) == (2, 30.0)


def test_the_reporter_hears_of_everything_in_order() -> None:
    recorder = Recorder()
    Rig(epochs=2, log_every=3).fit(reporter=recorder)
    kinds = [kind for kind, _ in recorder.calls]
    assert kinds == ["start", *["epoch_started", "step", "step", "epoch_ended"] * 2, "finish"]
    assert [(r["epoch"], r["step"], r["steps"]) for r in recorder.named("step")] == [
        (0, 3, 4),
        (0, 4, 4),
        (1, 3, 4),
        (1, 4, 4),
    ]
    epoch, epochs, steps, facts = recorder.named("epoch_started")[1]
    assert (epoch, epochs, steps, facts["phase"]) == (1, 2, 4, "final")


def test_step_losses_average_to_the_epochs() -> None:
    recorder = Recorder()
    result = Rig(epochs=1, log_every=1, method="dense").fit(reporter=recorder)
    losses = [record["loss"] for record in recorder.named("step")]
    assert len(losses) == 4
    assert sum(losses) / 4 == pytest.approx(result.last["train_loss"], rel=1e-6)


# Accumulation


@pytest.mark.parametrize(("batch", "accumulate", "big"), [(8, 4, 32), (8, 3, 24), (7, 2, 14), (6, 4, 24)])
def test_accumulation_equals_the_big_batch_ragged_ends_included(batch: int, accumulate: int, big: int) -> None:
    ends = []
    for size, groups in ((batch, accumulate), (big, 1)):
        loaders = StubLoaders(50, size, shuffle=False, dtype=torch.float64)
        rig = Rig(epochs=2, loaders=loaders, model=make_net(norm=False, dropout=0).double(), accumulate=groups)
        result = rig.fit()
        ends.append((rig.weights(), result.last["train_loss"], rig.settings.accumulate))
    (small, small_loss, _), (large, large_loss, _) = ends
    assert all(torch.allclose(small[name], large[name], rtol=1e-9, atol=1e-12) for name in small)
    assert small_loss == pytest.approx(large_loss, rel=1e-9)


def test_learning_rates_advance_per_update_from_that_of_update_zero() -> None:
    recorder = Recorder()
    rig = Rig(epochs=4, accumulate=2, log_every=1, lr=0.1, schedule=schema.Schedule(warmup_epochs=1))
    rig.fit(reporter=recorder)
    seen = [record["lr"] for record in recorder.named("step")]
    cosine = [0.05 * (1 + math.cos(math.pi * u / 6)) for u in range(6)]
    assert seen == pytest.approx([0.0, 0.05, *cosine])


# Divergence


def break_gradient(outputs: Tensor) -> None:
    outputs.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


class Poisoned(Classification):
    """Its loss (or only its gradient) is not finite from the n-th batch on."""

    def __init__(self, batch: int, *, gradient_only: bool = False) -> None:
        super().__init__()
        self.left, self.gradient_only = batch, gradient_only

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, outputs = super().training_loss(model, images, targets)
        self.left -= 1
        if self.left >= 0:
            return loss, outputs
        if self.gradient_only:
            break_gradient(outputs)
            return loss, outputs
        return loss * math.nan, outputs


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_non_finite_loss_or_gradient_stops_before_the_update(gradient_only: bool, accumulate: int) -> None:
    rig = Rig(epochs=2, accumulate=accumulate, model=make_net(norm=False), clip_grad=1.0)
    twin = Rig(epochs=2, accumulate=accumulate, model=make_net(norm=False), clip_grad=1.0)
    recorder, saved = Recorder(), []
    with pytest.raises(
        DivergenceError, match=r"epoch 1, update 2 of .*loss .*learning rate 0.1.*after epoch 0 is saved"
    ):
        rig.fit(task=Poisoned(4 + accumulate, gradient_only=gradient_only), save_state=saved.append, reporter=recorder)
    polled = iter([False] * (4 // accumulate) + [True])
    with pytest.raises(Interrupted):
        twin.fit(task=Classification(), stop=lambda: next(polled))
    assert all(value.isfinite().all() for value in rig.weights().values())
    assert same(rig.weights(), twin.weights())
    assert same(rig.optimizer.state_dict(), twin.optimizer.state_dict())
    assert recorder.calls[-1][0] == "finish"


# Clipping


def first_gradients(**settings: Any) -> list[Tensor]:
    """What the optimizer is given at the first update, per parameter."""
    rig = Rig(epochs=1, **settings)
    seen: list[Tensor] = []
    rig.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in rig.model.parameters() if p.grad is not None)
    )
    rig.fit()
    return seen[: len(list(rig.model.parameters()))]


def test_clipping_bounds_what_it_says() -> None:
    free = first_gradients()
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in free]))
    assert norm > 0.2
    scaled = first_gradients(clip_grad=0.1)
    for clipped, gradient in zip(scaled, free, strict=True):
        assert torch.allclose(clipped, gradient * 0.1 / norm, rtol=1e-4, atol=1e-9)
    bounded = first_gradients(clip_grad=0.01, clip_mode="value")
    for clipped, gradient in zip(bounded, free, strict=True):
        assert torch.equal(clipped, gradient.clamp(-0.01, 0.01))
    half = first_gradients(clip_grad=0.1, amp="float16")  # clipping must see what the scaler scaled back
    assert torch.linalg.vector_norm(torch.cat([g.flatten() for g in half])).item() == pytest.approx(0.1, rel=1e-3)
    adaptive = first_gradients(clip_grad=0.01, clip_mode="agc")
    weight = make_net().get_parameter("3.weight")
    limit = 0.01 * weight.flatten(1).norm(dim=1)
    assert (adaptive[4].flatten(1).norm(dim=1) <= limit * 1.001).all()
    assert torch.equal(adaptive[-1], free[-1])  # the classifier is left alone
    assert torch.equal(adaptive[-2], free[-2])


def test_the_reported_norm_is_the_one_before_clipping() -> None:
    recorder = Recorder()
    Rig(epochs=1, log_every=1, clip_grad=1e-3).fit(reporter=recorder)
    assert all(record["grad_norm"] > 0.1 for record in recorder.named("step"))


# Averaged weights


def test_the_average_follows_the_weights_and_is_projected_before_use() -> None:
    rig = Rig(epochs=4, ema=True, ema_decay=0.9)
    states: list[dict[str, Any]] = []
    result = rig.fit(save_state=lambda state: states.append(copy.deepcopy(state)))
    assert result.ema is not None
    removed = ~rig.pruner.masks()["3.weight"]
    assert removed.float().mean() == 0.5
    average = result.ema.get_parameter("3.weight")
    assert (average[removed] == 0).all()
    assert not average[removed].signbit().any()
    assert (states[-1]["ema"]["3.weight"][removed] == 0).all()
    assert not torch.equal(average, rig.model.get_parameter("3.weight"))
    assert {"ema_loss", "ema_top1", "ema_top5"} <= result.last.keys()
    again = evaluate(result.ema, rig.loaders.val, Classification(), device=CPU)
    assert again["top1"] == result.last["ema_top1"]


def test_the_average_is_the_recurrence_of_its_decay() -> None:
    class Weights(Classification):
        seen: ClassVar[list[Tensor]] = []

        def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            self.seen.append(model.get_parameter("0.weight").detach().clone())
            return super().training_loss(model, images, targets)

    rig = Rig(epochs=1, ema=True, ema_decay=0.75, method="dense")
    task = Weights()
    result = rig.fit(task=task)
    expected = task.seen[0]
    for weight in [*task.seen[1:], rig.model.get_parameter("0.weight").detach()]:
        expected = 0.75 * expected + 0.25 * weight
    assert result.ema is not None
    assert torch.allclose(result.ema.get_parameter("0.weight"), expected, atol=1e-6)


# Precision and layout


def test_bfloat16_autocast_trains_single_precision_weights() -> None:
    seen = []
    rig = Rig(epochs=3, amp="bfloat16")
    rig.model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.dtype))
    result = rig.fit()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in rig.model.parameters())
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    plain = Rig(epochs=3).fit().last["train_loss"]
    assert result.last["train_loss"] == pytest.approx(plain, rel=0.05)


def test_float16_scales_skips_an_overflow_and_goes_on() -> None:
    rig = Rig(epochs=3, amp="float16", clip_grad=5.0)
    start = rig.weights()
    weights: list[Tensor] = []

    class Overflowing(Classification):
        batches = 0

        def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            weights.append(model.get_parameter("0.weight").detach().clone())
            loss, outputs = super().training_loss(model, images, targets)
            self.batches += 1
            if self.batches == 1:
                break_gradient(outputs)
            return loss, outputs

    states: list[dict[str, Any]] = []
    result = rig.fit(task=Overflowing(), save_state=lambda state: states.append(copy.deepcopy(state)))
    assert torch.equal(weights[1], start["0.weight"])  # skipped
    assert not torch.equal(weights[2], start["0.weight"])
    assert states[0]["scaler"]["scale"] == 2.0**15
    assert states[-1]["updates"] == 12
    assert result.last["train_loss"] < result.history[0]["train_loss"]


def test_float16_with_gradients_that_never_fit_is_divergence() -> None:
    class Hopeless(Classification):
        def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            loss, outputs = super().training_loss(model, images, targets)
            break_gradient(outputs)
            return loss, outputs

    rig = Rig(epochs=20, amp="float16", model=make_net(norm=False))
    with pytest.raises(DivergenceError, match="float16"):
        rig.fit(task=Hopeless())
    assert all(value.isfinite().all() for value in rig.weights().values())


def test_float16_stops_at_a_loss_that_is_not_finite() -> None:
    with pytest.raises(DivergenceError, match="loss nan"):
        Rig(epochs=1, amp="float16").fit(task=Poisoned(2))


def test_channels_last_reaches_the_model_and_changes_no_result_much() -> None:
    layouts = set()

    class Watching(Classification):
        def predict(self, model: nn.Module, images: Tensor) -> Tensor:
            layouts.add(images.is_contiguous(memory_format=torch.channels_last))
            return super().predict(model, images)

    rig = Rig(epochs=1, channels_last=True, model=make_net().to(memory_format=torch.channels_last))
    loss = rig.fit(task=Watching()).last["train_loss"]
    assert layouts == {True}
    assert loss == pytest.approx(Rig(epochs=1).fit(task=Classification()).last["train_loss"], rel=1e-4)


def test_compile_wraps_training_only_and_keeps_the_models_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    rig, plain = Rig(epochs=2, compile=True, ema=True), Rig(epochs=2, ema=True)
    states: list[dict[str, Any]] = []
    result = rig.fit(save_state=lambda state: states.append(copy.deepcopy(state)))
    assert without_times(result.history) == without_times(plain.fit().history)
    assert states[-1]["model"].keys() == make_net().state_dict().keys()
    assert same(rig.weights(), plain.weights())


# Evaluation


def test_evaluation_counts_the_short_last_batch_as_the_others() -> None:
    model, whole = make_net().eval(), Dataset(23, 23, shuffle=False)
    parts = Dataset(23, 10, shuffle=False)
    assert [len(targets) for _, targets in parts] == [10, 10, 3]
    model.train()
    metrics = evaluate(model, parts, Classification(), device=CPU)
    assert model.training
    assert metrics == pytest.approx(evaluate(model, whole, Classification(), device=CPU), rel=1e-6)
    with torch.no_grad():
        outputs = model.eval()(whole.images)
    assert metrics["top1"] == pytest.approx(100 * (outputs.argmax(1) == whole.targets).float().mean().item())


def test_evaluation_runs_on_the_deployed_weights() -> None:
    rig = Rig(epochs=1)
    entered = []

    class Deployed:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    class Watching(Classification):
        def predict(self, model: nn.Module, images: Tensor) -> Tensor:
            if not model.training:
                entered.append("eval")
            return super().predict(model, images)

    rig.pruner.deployed = Deployed  # type: ignore[method-assign,assignment]
    rig.fit(task=Watching())
    assert entered == ["in", "eval", "eval", "eval", "out"]


# Resuming


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)


def resumable(**more: Any) -> Rig:
    return Rig(
        epochs=5, ema=True, ema_decay=0.9, loaders=StubLoaders(60, 8), accumulate=3, clip_grad=2.0, seed=5, **more
    )


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"schedule": schema.Schedule(warmup_epochs=1)},
    "adamw": {"optimizer": adamw, "schedule": schema.Schedule(warmup_epochs=2)},
    "dense": {"method": "dense"},
    "float16": {"amp": "float16"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_resumed_run_ends_bit_identical(case: str, after: int) -> None:
    whole = resumable(**CASES[case])
    states: list[dict[str, Any]] = []
    uninterrupted = whole.fit(save_state=lambda state: states.append(copy.deepcopy(state)))
    assert len(states) == 5

    torch.manual_seed(99)  # a new process stands elsewhere
    second = resumable(**CASES[case])
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1.0)
    before = copy.deepcopy(states[after])
    again: list[dict[str, Any]] = []
    resumed = second.fit(resume=dict(states[after]), save_state=lambda state: again.append(copy.deepcopy(state)))
    assert same(states[after], before)  # the state given is not trained on

    assert second.loaders.epochs == list(range(after + 1, 5))
    assert same(whole.weights(), second.weights())
    assert same(whole.optimizer.state_dict(), second.optimizer.state_dict())
    assert same(whole.pruner.state_dict(), second.pruner.state_dict())
    assert uninterrupted.ema is not None
    assert resumed.ema is not None
    assert same(uninterrupted.ema.state_dict(), resumed.ema.state_dict())
    assert without_times(uninterrupted.history) == without_times(resumed.history)
    assert without_times([uninterrupted.best or {}]) == without_times([resumed.best or {}])
    for early, late in zip(states[after + 1 :], again, strict=True):
        for part in early.keys() - {"history", "best"}:
            assert same(early[part], late[part]), part


def test_the_state_survives_the_run_states_file(tmp_path: Any) -> None:
    checkpoint = pytest.importorskip("lbc_cli.checkpoint.state")
    whole, path = resumable(), tmp_path / "state.safetensors"
    stopped = resumable()
    whole.fit()
    polled = iter([False] * 5 + [True] * 2)
    with pytest.raises(Interrupted):
        stopped.fit(save_state=lambda state: checkpoint.save_state(path, state), stop=lambda: next(polled))
    second = resumable()
    second.fit(resume=checkpoint.load_state(path))
    assert same(whole.weights(), second.weights())


def test_two_runs_with_a_seed_are_equal_and_another_seed_differs() -> None:
    first, second, other = Rig(epochs=1, seed=1), Rig(epochs=1, seed=1), Rig(epochs=1, seed=2)
    for rig in (first, second, other):
        rig.fit()
    assert same(first.weights(), second.weights())
    assert not same(first.weights(), other.weights())


def test_loaded_slots_take_their_parameters_memory_format() -> None:
    weight = nn.Parameter(torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    momentum = torch.randn(4, 8, 3, 3)
    groups = optimizer.state_dict()["param_groups"]
    load_optimizer(optimizer, {"state": {0: {"momentum_buffer": momentum}}, "param_groups": groups})
    loaded = optimizer.state[weight]["momentum_buffer"]
    assert loaded.stride() == weight.stride()
    assert torch.equal(loaded, momentum)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"accumulate": 1}, UsageError, "updates per epoch"),
        ({"ema": False}, UsageError, r"train\.ema"),
        ({"amp": "float16"}, UsageError, "float16"),
    ],
)
def test_a_state_of_other_settings_is_refused(change: dict[str, Any], error: type[LbcError], words: str) -> None:
    settings = {"epochs": 1, "accumulate": 2, "ema": True}
    states: list[dict[str, Any]] = []
    Rig(**settings).fit(save_state=states.append)
    with pytest.raises(error, match=words):
        Rig(**{**settings, **change}).fit(resume=dict(states[0]))


def test_a_state_of_another_model_is_refused_in_one_line() -> None:
    states: list[dict[str, Any]] = []
    Rig(epochs=2).fit(save_state=lambda state: states.append(copy.deepcopy(state)))
    other = {name: torch.zeros(1) for name in states[0]["model"]}
    with pytest.raises(UsageError, match=r"does not fit this run .*: resume with the model") as caught:
        Rig(epochs=2).fit(resume={**states[0], "model": other})
    assert "\n" not in str(caught.value)


def test_a_state_that_lacks_something_or_is_too_long_is_refused() -> None:
    states: list[dict[str, Any]] = []
    Rig(epochs=2).fit(save_state=states.append)
    with pytest.raises(CheckpointError, match="lacks pruner"):
        Rig(epochs=2).fit(resume={key: value for key, value in states[0].items() if key != "pruner"})
    with pytest.raises(CheckpointError, match="version 99"):
        Rig(epochs=2).fit(resume={**states[0], "version": 99})
    with pytest.raises(UsageError, match=r"2 epochs, train.epochs = 1"):
        Rig(epochs=1).fit(resume=dict(states[1]))


def test_states_are_saved_every_so_many_epochs_and_at_the_end() -> None:
    saved: list[int] = []
    Rig(epochs=5, save_every=2).fit(save_state=lambda state: saved.append(state["epoch"]))
    assert saved == [2, 4, 5]


# Interruption


def test_a_stop_in_an_epoch_saves_ends_at_once_and_says_where_a_resumed_run_goes_on() -> None:
    saved: list[tuple[int, int]] = []
    polled = iter([False] * 5 + [True])  # epoch 0: three updates and its end; epoch 1: the second update
    recorder = Recorder()
    words = r"in epoch 1, after update 2 of 4: the state after update 2 of epoch 1 is saved.*from there"
    with pytest.raises(Interrupted, match=words):
        Rig().fit(save_state=lambda s: saved.append(place(s)), stop=lambda: next(polled), reporter=recorder)
    assert saved == [(1, 0), (1, 2)]
    assert recorder.calls[-1][0] == "finish"
    with pytest.raises(Interrupted, match="after update 1 of 4: no state was saved"):
        Rig().fit(stop=lambda: True)


def place(state: dict[str, Any]) -> tuple[int, int]:
    return state["epoch"], state["step"]


def test_a_stop_at_the_end_of_an_epoch_saves_it_whatever_save_every_says() -> None:
    saved: list[int] = []
    polled = iter([False] * 3 + [True])
    with pytest.raises(Interrupted, match="after epoch 0: the state after epoch 0 is saved"):
        Rig(epochs=4, save_every=4).fit(save_state=lambda s: saved.append(s["epoch"]), stop=lambda: next(polled))
    assert saved == [1]


def test_a_stop_after_the_last_epoch_is_no_interruption() -> None:
    polled = iter([False] * 3 + [True])
    assert Rig(epochs=1).fit(stop=lambda: next(polled)).last["epoch"] == 0


def test_loader_processes_ended_by_the_same_signal_are_an_interruption() -> None:
    class Dying(Dataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield next(super().__iter__())
            stopped.append(True)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    stopped: list[bool] = []
    loaders = StubLoaders()
    loaders.train = Dying(64, 16, shuffle=True)
    saved: list[tuple[int, int]] = []
    with pytest.raises(Interrupted, match="in epoch 0, after update 1 of 4: the state after update 1"):
        Rig(loaders=loaders).fit(stop=lambda: len(stopped) > 0, save_state=lambda s: saved.append(place(s)))
    assert saved == [(0, 1)]
    stopped.clear()
    with pytest.raises(RuntimeError, match="killed"):
        Rig(loaders=loaders).fit(stop=lambda: False)


# Bad input


def test_no_batch_is_an_error_before_the_first_epoch() -> None:
    with pytest.raises(DataError, match="smaller than"):
        Rig(loaders=StubLoaders(0, 8)).fit()
    short = StubLoaders()
    short.train = type("Hollow", (), {"__len__": lambda self: 2, "__iter__": lambda self: iter(())})()
    with pytest.raises(DataError, match="gave no batch"):
        Rig(loaders=short).fit()
    blind = StubLoaders()
    blind.val = []
    with pytest.raises(DataError, match="evaluation set is empty"):
        Rig(loaders=blind, epochs=1).fit()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_gives_advice(error: Exception) -> None:
    class Hungry(Classification):
        def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            raise error

    with pytest.raises(LbcError, match=r"out of memory: .*; lower the batch size") as caught:
        Rig().fit(task=Hungry())
    assert "\n" not in str(caught.value)


def test_settings_come_from_the_recipe() -> None:
    train = schema.Train(epochs=7, amp="bfloat16", clip_grad=1.0, ema=True, save_every=3)
    settings = FitSettings.of(train, CPU)
    assert (settings.epochs, settings.amp, settings.clip_grad, settings.ema, settings.save_every) == (
        7,
        "bfloat16",
        1.0,
        True,
        3,
    )
    assert settings.device == CPU


def test_the_loop_names_no_method_and_no_task() -> None:
    from pathlib import Path

    from lbc_cli.methods import METHODS
    from lbc_cli.tasks import TASKS

    assert loop.__file__ is not None
    for file in Path(loop.__file__).parent.glob("*.py"):
        text = file.read_text()
        words = set(re.findall(r"[a-z]+[0-9]*", text.lower().replace("lbc_cli", "")))
        assert not words & ({*METHODS, *TASKS, "top1"} - {"str"}), file  # str is Python's, unless it stands in quotes
        assert not [name for name in METHODS if f'"{name}"' in text], file
