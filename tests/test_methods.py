"""The contract of every method, over the registry, and the training loops that a pruner must live in."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbc_cli import checkpoint, patterns
from lbc_cli.errors import LbcError, MethodError, PatternError, TargetError
from lbc_cli.methods import METHODS, Pruner, attach
from lbc_cli.methods.soft_threshold import SoftThreshold

EPOCHS, STEPS = 4, 5
LAYERS = {"0": "dense", "4": "dense"}
METHOD = pytest.mark.parametrize("method", METHODS)
# Options without which a run of so few steps would not meet what a method does.
SHORT: dict[str, dict[str, Any]] = {"rigl": {"every": 2}, "str": {"s_init": -3.5, "s_decay": 0.1}}
# Every method as it is, and with the options that change how it works.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in METHODS),
    ("sr-ste", {"schedule": "gradual"}),
    ("asp", {"dense_epochs": 2}),
    ("lbc", {"criterion": "inverse"}),
    ("lbc", {"criterion": "magnitude"}),
    ("lbc", {"criterion": "gradient"}),
    ("lbc", {"removal": "weights"}),
    ("maskllm", {"hard": True}),
    ("maskllm", {"weights": "trained"}),
    ("maskllm", {"weights": "trained", "hard": True}),
    ("gmp", {"scope": "global", "sparsity": 0.5}),
    ("rigl", {"distribution": "uniform", "sparsity": 0.5}),
)
VARIANT = pytest.mark.parametrize(("method", "options"), VARIANTS, ids=lambda value: str(value))


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)]
    return nn.Sequential(*body).to(dtype)


def batches(epoch: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        labels = torch.randint(0, 4, (8,), generator=generator)
        images = torch.randn(8, 3, 8, 8, generator=generator) + labels[:, None, None, None]
        yield images.to(dtype), labels


def make(
    method: str = "lbc", *, dtype: torch.dtype = torch.float32, fused: bool = False, **options: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer, Pruner]:
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3, fused=fused)
    layers = LAYERS if METHODS[method].sparse else None
    options = {**SHORT.get(method, {}), **options}
    return model, optimizer, attach(model, optimizer, method=method, epochs=EPOCHS, layers=layers, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, epochs: range) -> list[float]:
    losses = []
    for epoch in epochs:
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch, next(model.parameters()).dtype):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def assert_effective(pruner: Pruner) -> None:
    """The contract: removed weights are +0.0 in the model itself."""
    for target in pruner.targets:
        removed = target.weight.detach()[~pruner.masks()[target.name]]
        assert (removed == 0).all()
        assert not torch.signbit(removed).any()


def assert_planned(pruner: Pruner, epoch: int, tolerance: float) -> None:
    """The density is what the plan says, unless only training will tell."""
    planned = pruner.planned_density(epoch)
    assert planned is None or pruner.density() == pytest.approx(planned, abs=tolerance)


def assert_final(pruner: Pruner) -> None:
    """The contract at the end: exactly the pattern, exactly the density that was planned."""
    assert pruner.phase == "final"
    assert_effective(pruner)
    assert_planned(pruner, EPOCHS - 1, 1e-9)
    if METHODS[pruner.method].structured:
        for target in pruner.targets:
            patterns.check_mask(pruner.masks()[target.name], target.pattern)
            assert pruner.densities()[target.name] == target.pattern.density


# Every method.


@VARIANT
def test_loss_falls_and_the_final_pattern_is_exact(method: str, options: dict[str, Any]) -> None:
    model, optimizer, pruner = make(method, **options)
    losses = train(model, optimizer, pruner, range(EPOCHS))
    # The wrong weights are kept; random ones, at first.
    worst = options.get("criterion") == "inverse" or method == "rigl"
    assert sum(losses[-STEPS:]) < (0.95 if worst else 0.7) * sum(losses[:STEPS])
    assert_final(pruner)
    assert bool(pruner.targets) == (pruner.density() < 1) == METHODS[method].sparse


@VARIANT
def test_density_is_as_planned_and_zeros_are_positive_at_every_step(method: str, options: dict[str, Any]) -> None:
    model, optimizer, pruner = make(method, **options)
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        # exact, but for the candidates of LBC: how many weights they cover depends on the scores
        tolerance = 0.05 if method == "lbc" and pruner.phase == "training" else 1e-9
        for images, labels in batches(epoch):
            assert_effective(pruner)
            assert_planned(pruner, epoch, tolerance)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert_final(pruner)


@VARIANT
def test_a_run_stopped_and_resumed_ends_bit_identical(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer, pruner = make(method, **options)
    train(model, optimizer, pruner, range(EPOCHS))
    for stop in range(1, EPOCHS):
        first, first_optimizer, first_pruner = make(method, **options)
        train(first, first_optimizer, first_pruner, range(stop))
        state = (dict(first.state_dict()), first_optimizer.state_dict(), first_pruner.state_dict())
        checkpoint.save_state(tmp_path / "state.safetensors", state)
        saved = copy.deepcopy(state) if stop % 2 else checkpoint.load_state(tmp_path / "state.safetensors")
        train(first, first_optimizer, first_pruner, range(stop, EPOCHS))  # must not reach into what was saved
        second, second_optimizer, second_pruner = make(method, **options)
        for target, part in zip((second, second_optimizer, second_pruner), saved, strict=True):
            target.load_state_dict(part)
        train(second, second_optimizer, second_pruner, range(stop, EPOCHS))
        want, got = bits(model), bits(second)
        assert all(torch.equal(want[name], got[name]) for name in want)
        assert all(torch.equal(mask, second_pruner.masks()[name]) for name, mask in pruner.masks().items())


@VARIANT
def test_detaching_restores_the_optimizer_and_keeps_the_weights(method: str, options: dict[str, Any]) -> None:
    model, optimizer, pruner = make(method, **options)
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    train(model, optimizer, pruner, range(EPOCHS))
    before = bits(model)
    pruner.detach()
    pruner.detach()
    assert hooks == (1, 1)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    assert all(torch.equal(before[name], now) for name, now in bits(model).items())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert all((p != 0).all() for name, p in model.named_parameters() if name == "1.weight")
    with pytest.raises(MethodError, match="detached"):
        pruner.begin_epoch(EPOCHS - 1)


@VARIANT
def test_an_average_is_projected_onto_the_masks(method: str, options: dict[str, Any]) -> None:
    model, optimizer, pruner = make(method, **options)
    average = copy.deepcopy(model)
    train(model, optimizer, pruner, range(EPOCHS))
    pruner.project_(average)
    for name, mask in pruner.masks().items():
        assert (average.get_parameter(name)[~mask] == 0).all()
        assert (average.get_parameter(name)[mask] != 0).all()
    state = copy.deepcopy(pruner.state_dict())
    pruner.project_(model)
    pruner.begin_epoch(EPOCHS - 1)
    assert_same_state(pruner.state_dict(), state)
    if pruner.targets:
        with pytest.raises(MethodError, match="copy of the pruned model"):
            pruner.project_(nn.Linear(2, 2))


@VARIANT
def test_epochs_go_forward_only(method: str, options: dict[str, Any]) -> None:
    model, _, pruner = make(method, **options)
    pruner.begin_epoch(1)
    masks, weights = pruner.masks(), bits(model)
    pruner.begin_epoch(1)
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks().items())
    assert all(torch.equal(weights[name], now) for name, now in bits(model).items())
    with pytest.raises(MethodError, match="removal is final"):
        pruner.begin_epoch(0)
    with pytest.raises(MethodError, match=f"last epoch is {EPOCHS - 1}"):
        pruner.begin_epoch(EPOCHS)
    pruner.begin_epoch(EPOCHS - 1)
    assert pruner.phase == "final"


@METHOD
def test_a_step_before_the_first_epoch_is_refused(method: str) -> None:
    model, optimizer, _ = make(method)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    with pytest.raises(MethodError, match=r"begin_epoch\(0\)"):
        optimizer.step()


@METHOD
def test_the_state_of_another_run_is_refused(method: str) -> None:
    state = make(method)[2].state_dict()
    for key, value in (("method", "other"), ("epochs", 99), ("targets", {"x": "2:4"})):
        with pytest.raises(MethodError, match="same settings"):
            make(method)[2].load_state_dict({**state, key: value})


@METHOD
def test_a_state_from_before_the_first_epoch_can_be_loaded(method: str) -> None:
    model, optimizer, pruner = make(method)
    pruner.load_state_dict(make(method)[2].state_dict())
    train(model, optimizer, pruner, range(EPOCHS))
    other, other_optimizer, other_pruner = make(method)
    train(other, other_optimizer, other_pruner, range(EPOCHS))
    assert all(torch.equal(bits(model)[name], now) for name, now in bits(other).items())


@VARIANT
def test_the_state_of_a_run_with_other_options_is_refused(method: str, options: dict[str, Any]) -> None:
    state = make(method, **options)[2].state_dict()
    for other_method, other in VARIANTS:
        if other_method == method and other != options:
            with pytest.raises(MethodError, match="same settings"):
                make(method, **other)[2].load_state_dict(state)


@VARIANT
def test_memory_is_what_was_planned(method: str, options: dict[str, Any]) -> None:
    model, optimizer, pruner = make(method, **options)
    plan = pruner.planned_memory()
    peak = dict.fromkeys(plan, 0)
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            peak = {kind: max(peak[kind], held) for kind, held in pruner.memory_bytes().items()}
    assert peak == plan


@VARIANT
def test_weights_written_from_outside_are_taken_over_under_the_masks(method: str, options: dict[str, Any]) -> None:
    model, optimizer, pruner = make(method, **options)
    train(model, optimizer, pruner, range(EPOCHS))
    other = {name: value + 1 for name, value in network().state_dict().items()}
    model.load_state_dict(other)
    pruner.begin_epoch(EPOCHS - 1)
    assert_final(pruner)
    for target in pruner.targets:
        mask = pruner.masks()[target.name]
        less = pruner.threshold(target) if isinstance(pruner, SoftThreshold) else 0.0  # of weights that are positive
        assert torch.equal(target.weight[mask], (other[target.name] - less)[mask])


# The loops, in which every method must live.


def same_run(method: str, loop: Any) -> None:
    """A loop must end with the masks and weights of the plain one, in float64."""
    model, optimizer, pruner = make(method, dtype=torch.float64)
    train(model, optimizer, pruner, range(EPOCHS))
    other, other_optimizer, other_pruner = make(method, dtype=torch.float64)
    loop(other, other_optimizer, other_pruner)
    assert all(torch.equal(mask, other_pruner.masks()[name]) for name, mask in pruner.masks().items())
    for name, p in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), p)
    assert_final(other_pruner)


@METHOD
@pytest.mark.parametrize("keyword", [False, True])
def test_step_with_a_closure(method: str, keyword: bool) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
        for epoch in range(EPOCHS):
            pruner.begin_epoch(epoch)
            for images, labels in batches(epoch, torch.float64):

                def closure(x: Tensor = images, y: Tensor = labels) -> Tensor:
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
                assert loss is not None

    same_run(method, loop)


@METHOD
def test_gradients_accumulated_over_parts_of_a_batch(method: str) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
        for epoch in range(EPOCHS):
            pruner.begin_epoch(epoch)
            for images, labels in batches(epoch, torch.float64):
                optimizer.zero_grad()
                for part in (slice(0, 2), slice(2, 8)):
                    loss = nn.functional.cross_entropy(model(images[part]), labels[part], reduction="sum")
                    (loss / len(images)).backward()
                optimizer.step()

    same_run(method, loop)


@METHOD
def test_under_torch_compile(method: str) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
        train(torch.compile(model, backend="aot_eager"), optimizer, pruner, range(EPOCHS))

    same_run(method, loop)


@METHOD
def test_under_distributed_data_parallel(method: str, tmp_path: Path) -> None:
    """One process: what is tested is the wrapper, its broadcast at the start and its hooks on the gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        same_run(
            method,
            lambda model, optimizer, pruner: train(
                nn.parallel.DistributedDataParallel(model), optimizer, pruner, range(EPOCHS)
            ),
        )
    finally:
        torch.distributed.destroy_process_group()


@METHOD
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_with_an_overflow(method: str, fused: bool) -> None:
    """A loss scale must change nothing, and an overflow nothing at all; powers of two scale without rounding."""
    ends = []
    for scale in (1.0, 2.0**10):
        model, optimizer, pruner = make(method, dtype=torch.float64, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, backoff_factor=1.0 - 1e-9)
        for epoch in range(EPOCHS):
            pruner.begin_epoch(epoch)
            for number, (images, labels) in enumerate(batches(epoch, torch.float64)):
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
                bad = epoch == 1 and number == 2
                if bad:
                    model.get_parameter("1.weight").grad[0, 0, 0, 0] = float("inf")
                    state = copy.deepcopy(pruner.state_dict())
                    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
                scaler.step(optimizer)
                scaler.update()
                if bad:
                    assert_same_state(pruner.state_dict(), state)
                    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert_final(pruner)
        ends.append((pruner.masks(), {name: p.detach() for name, p in model.named_parameters()}))
    assert all(torch.equal(mask, ends[1][0][name]) for name, mask in ends[0][0].items())
    for name, weight in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], weight)


def assert_same_state(got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same_state(got[key], want[key])
    elif isinstance(want, Tensor):
        assert torch.equal(got, want)
    else:
        assert got == want


@METHOD
@pytest.mark.parametrize("pure", [False, True])
def test_under_autocast_and_in_pure_bfloat16(method: str, pure: bool) -> None:
    model, optimizer, pruner = make(method, dtype=torch.bfloat16 if pure else torch.float32)
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch, model[0].weight.dtype):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not pure):
                loss = nn.functional.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
    assert_final(pruner)
    assert model[1].weight.isfinite().all()


@METHOD
def test_channels_last_masks_have_the_format_of_the_weight(method: str) -> None:
    model = network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = attach(model, optimizer, epochs=EPOCHS, method=method, layers=LAYERS if METHODS[method].sparse else None)
    train(model, optimizer, pruner, range(EPOCHS))
    for target in pruner.targets:
        removed = pruner.removed(target)
        assert removed is not None
        assert removed.stride() == target.weight.stride()


@METHOD
def test_under_adamw(method: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    pruner = attach(model, optimizer, epochs=EPOCHS, method=method, layers=LAYERS if METHODS[method].sparse else None)
    losses = train(model, optimizer, pruner, range(EPOCHS))
    assert sum(losses[-STEPS:]) < sum(losses[:STEPS])
    assert_final(pruner)


def test_in_a_loop_of_timms_parts() -> None:
    """timm's optimizer, scheduler per update, clipping, scaler (off on a CPU) and average of the weights."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler

    model = network()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=1e-3)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=STEPS
    )
    pruner = attach(model, optimizer, epochs=EPOCHS, layers=LAYERS)
    average, scaler, updates = ModelEmaV3(model, decay=0.9), NativeScaler(device="cpu"), 0
    for epoch in range(EPOCHS):
        pruner.begin_epoch(epoch)
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            scaler(loss, optimizer, clip_grad=1.0, clip_mode="norm", parameters=model.parameters())
            updates += 1
            scheduler.step_update(updates)
            average.update(model)
    pruner.project_(average.module)
    assert_effective(pruner)
    assert pruner.density() == 0.5
    assert patterns.holds(average.module.get_parameter("1.weight"), pruner.targets[0].pattern)


def test_attached_through_wrappers_the_names_are_the_models_own() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    pruner = attach(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1), epochs=2, layers=LAYERS)
    assert list(pruner.masks()) == ["1.weight"]


def test_gradients_of_removed_weights_do_not_count_in_norms() -> None:
    model, _, pruner = make(t_f=0)
    pruner.begin_epoch(0)
    images, labels = next(batches(0))
    nn.functional.cross_entropy(model(images), labels).backward()
    grad = model[1].weight.grad
    assert (grad[~pruner.masks()["1.weight"]] == 0).all()
    assert (grad[pruner.masks()["1.weight"]] != 0).any()


def test_weights_loaded_between_steps_are_taken_over_under_the_masks() -> None:
    model, optimizer, pruner = make(t_f=1)
    train(model, optimizer, pruner, range(2))
    other = network()
    model.load_state_dict({k: v + 1 for k, v in other.state_dict().items()})
    assert (model[1].weight[~pruner.masks()["1.weight"]] != 0).any()
    pruner.begin_epoch(2)
    assert_effective(pruner)
    kept = pruner.masks()["1.weight"]
    assert torch.equal(model[1].weight[kept], (other[1].weight + 1)[kept])


def test_nothing_remembers_a_removed_weight() -> None:
    """Neither the optimizer's momentum nor a gradient that was being accumulated when the epoch began."""
    model, optimizer, pruner = make(t_f=1)
    train(model, optimizer, pruner, range(1))
    optimizer.zero_grad()
    images, labels = next(batches(9))
    nn.functional.cross_entropy(model(images), labels).backward()
    weight = model[1].weight
    pruner.begin_epoch(1)
    removed = ~pruner.masks()["1.weight"]
    assert (optimizer.state[weight]["momentum_buffer"][removed] == 0).all()
    assert (optimizer.state[weight]["momentum_buffer"][~removed] != 0).all()
    assert (weight.grad[removed] == 0).all()
    assert (weight.grad[~removed] != 0).any()


def test_a_loaded_state_puts_its_masks_on_the_weights() -> None:
    model, optimizer, pruner = make(t_f=1)
    train(model, optimizer, pruner, range(2))
    fresh, _, other = make(t_f=1)
    other.load_state_dict(pruner.state_dict())
    assert torch.equal(other.masks()["1.weight"], pruner.masks()["1.weight"])
    assert_effective(other)
    assert (fresh[1].weight == 0).sum() == fresh[1].weight.numel() // 2


# What is refused.


class Sam(torch.optim.SGD):
    """Two evaluations a step, recognised by its shape rather than its name."""

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


def lookahead(params: Any) -> Any:
    from timm.optim import Lookahead

    return Lookahead(torch.optim.SGD(params, lr=0.1))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda p: torch.optim.LBFGS(p), "several times"),
        (lambda p: Sam(p, lr=0.1), "several times"),
        (lookahead, "never fires"),
        (lambda p: torch.optim.Adafactor(p), "matrix"),
        (lambda p: __import__("timm.optim").optim.Lamb(p), "norms"),
        (lambda p: __import__("timm.optim").optim.Lars(p), "norms"),
    ],
    ids=["lbfgs", "sam", "lookahead", "adafactor", "lamb", "lars"],
)
def test_optimizers_that_cannot_carry_a_method_are_refused(build: Any, reason: str) -> None:
    model = network()
    with pytest.raises(MethodError, match=reason):
        attach(model, build(list(model.parameters())), epochs=2, layers=LAYERS)


def test_the_peak_learning_rate_is_what_the_scheduler_will_reach() -> None:
    from timm.scheduler import create_scheduler_v2

    from lbc_cli.methods.optimizers import peak_lr

    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.3)
    assert peak_lr(plain.param_groups[0]) == 0.3
    torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=0.7, total_steps=10)
    assert peak_lr(plain.param_groups[0]) == 0.7
    groups = [{"params": model[:2].parameters(), "lr_scale": 0.5}, {"params": model[4].parameters()}]
    scaled = torch.optim.AdamW(groups, lr=0.4)  # as layer-wise decay makes them
    scheduler, _ = create_scheduler_v2(
        scaled, num_epochs=10, warmup_epochs=2, warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=10
    )
    reached = [0.0] * len(scaled.param_groups)
    for update in range(100):
        scheduler.step_update(update)
        reached = [max(top, group["lr"]) for top, group in zip(reached, scaled.param_groups, strict=True)]
    assert reached[0] == pytest.approx(reached[1] / 2)
    assert [peak_lr(group) for group in scaled.param_groups] == pytest.approx(reached, rel=0.06)


def test_an_optimizer_unknown_to_us_is_named() -> None:
    class Mine(torch.optim.SGD):
        pass

    model = network()
    with pytest.warns(UserWarning, match="Mine is not known to lbc"):
        attach(model, Mine(model.parameters(), lr=0.1), epochs=2, layers=LAYERS)


def test_weights_that_the_optimizer_does_not_train_are_refused() -> None:
    model = network()
    with pytest.raises(MethodError, match=r"1\.weight first"):
        attach(model, torch.optim.SGD(model[4].parameters(), lr=0.1), epochs=2, layers=LAYERS)
    model[1].weight.requires_grad_(False)
    with pytest.raises(MethodError, match="not trained"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, layers=LAYERS)


def test_sharded_weights_are_refused(tmp_path: Any) -> None:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        mesh = init_device_mesh("cpu", (1,))
        model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh))
        with pytest.raises(MethodError, match="sharded"):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, layers=LAYERS)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"method": "lcb"}, MethodError, "Did you mean 'lbc'"),
        ({"tf": 3}, MethodError, "no option 'tf'.*Did you mean 't_f'"),
        ({"t_f": "3"}, MethodError, "t_f = '3'.*valid integer"),
        ({"rounding": "up"}, MethodError, "rounding = 'up'"),
        ({"score_memory": 0.0}, MethodError, "greater than 0"),
        ({"t_f": 2}, MethodError, "past the last epoch"),
        ({"epochs": 0}, MethodError, "at least one epoch"),
        ({"pattern": "4:4"}, PatternError, "less than M"),
        ({"layers": {"nothing": "2:4"}}, TargetError, "nothing"),
    ],
    ids=str,
)
def test_bad_requests_name_the_rule(kwargs: dict[str, Any], error: type[LbcError], message: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        attach(model, optimizer, **{"epochs": 2, "layers": LAYERS, **kwargs})
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(p._backward_hooks for p in itertools.chain(model.parameters()))


def test_a_second_pruner_on_the_same_weights_is_refused_until_the_first_is_detached() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = {"0": "2:4", "1": "dense", "2": "dense"}
    first = attach(model, optimizer, epochs=2, layers=layers)
    with pytest.raises(MethodError, match=r"0.weight already has a lbc pruner"):
        attach(model, optimizer, epochs=2, layers=layers)
    attach(model, optimizer, epochs=2, layers={"0": "dense", "1": "2:4", "2": "dense"})
    first.detach()
    attach(model, optimizer, epochs=2, layers=layers)
