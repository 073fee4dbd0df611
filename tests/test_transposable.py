"""Masks that are N:M along input and along output channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from lbc_cli import checkpoint, oneshot, training
from lbc_cli.checkpoint import save
from lbc_cli.cli import app
from lbc_cli.errors import MethodError, PatternError, UsageError
from lbc_cli.methods import attach
from lbc_cli.patterns import Pattern
from lbc_cli.recipe import resolve
from lbc_cli.runs import RunFolder
from lbc_cli.smoke import smoke
from lbc_cli.transposable import block_masks, transposable_mask
from lbc_cli.verifier import verify
from tests.checkpoints import FakePruner, SmallNet
from tests.reference import best_transposable_block


def both_ways(mask: Tensor, n: int, m: int) -> bool:
    """Whether n of m are kept along both channels, at every kernel position."""
    flat = mask.flatten(2) if mask.ndim > 2 else mask[..., None]
    for k in range(flat.shape[2]):
        plane = flat[..., k].int()
        rows = plane.reshape(plane.shape[0], -1, m).sum(dim=2)
        columns = plane.T.reshape(plane.shape[1], -1, m).sum(dim=2)
        if not ((rows == n).all() and (columns == n).all()):
            return False
    return True


@pytest.mark.parametrize(("n", "m", "count"), [(2, 4, 90), (1, 4, 24), (3, 4, 24), (1, 2, 2), (1, 3, 6), (2, 3, 6)])
def test_every_mask_of_a_block_is_there_once(n: int, m: int, count: int) -> None:
    masks = block_masks(n, m)
    assert masks.shape == (count, m, m)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == count
    assert (masks.sum(dim=1) == n).all()
    assert (masks.sum(dim=2) == n).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("kind", ["noise", "ties"])
def test_a_block_keeps_the_largest_sum_there_is(n: int, m: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(n * 10 + m)
    scores = torch.rand(2 * m, m, generator=generator, dtype=torch.float64)
    if kind == "ties":
        scores = (4 * scores).round() / 4
    mask = transposable_mask(scores, Pattern(n, m))
    for block in range(2):
        part = slice(block * m, (block + 1) * m)
        total, wanted = best_transposable_block(scores[part].tolist(), n)
        assert mask[part].int().tolist() == wanted
        assert scores[part][mask[part]].sum().item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("shape", [(8, 12), (8, 4, 3, 3), (4, 8, 1, 1), (12, 8, 3)])
def test_both_directions_hold_the_pattern_in_every_layout(shape: tuple[int, ...]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    mask = transposable_mask(scores, Pattern(2, 4))
    assert mask.shape == scores.shape
    assert both_ways(mask, 2, 4)
    if len(shape) == 4:
        again = transposable_mask(scores.to(memory_format=torch.channels_last), Pattern(2, 4))
        assert torch.equal(mask, again)


def test_blocks_are_scored_in_parts_and_in_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(16, 16, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    whole = transposable_mask(scores, Pattern(2, 4))
    monkeypatch.setattr("lbc_cli.transposable._BLOCKS", 3)
    assert torch.equal(transposable_mask(scores, Pattern(2, 4)), whole)
    assert torch.equal(transposable_mask(scores.double(), Pattern(2, 4)), whole)


def net(outputs: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, outputs, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(outputs, 4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outputs": 6}, r"2\.weight: 2:4 cannot be transposable: 6 output channels are no multiple of 4"),
        ({"pattern": "2:8"}, "M = 8 has too many masks"),
        ({"vector": 4}, "masks shared by 4 output channels"),
    ],
)
def test_layers_that_cannot_are_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    model = net(changes.pop("outputs", 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"pattern": "2:4", "layers": {"2": changes.get("pattern", "2:4")}, **changes}
    for method in ("asp", "sr-ste"):
        with pytest.raises(PatternError, match=words):
            attach(model, optimizer, method=method, epochs=2, transposable=True, **options)


def test_methods_that_learn_candidates_have_no_such_option() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for method in ("lbc", "maskllm"):
        with pytest.raises(MethodError, match=f"{method} has no option 'transposable'"):
            attach(model, optimizer, pattern="2:4", method=method, epochs=2, transposable=True)


@pytest.mark.parametrize(
    ("method", "more"), [("asp", []), ("sr-ste", []), ("sr-ste", ["method.schedule=gradual"])], ids=str
)
def test_a_run_ends_with_both_directions_and_verify_sees_them(method: str, more: list[str], tmp_path: Path) -> None:
    flags = {"model.name": "test_resnet", "data.source": "digits", "method.name": method}
    resolved = smoke(resolve("digits", overrides=["method.transposable=true", *more], flags=flags))
    folder = RunFolder.create(tmp_path / "run")
    trained = training.prepare(resolved)
    training.run(trained, folder)
    masks = trained.pruner.masks()
    assert masks
    assert all(both_ways(mask, 2, 4) for mask in masks.values())
    found = verify(folder.model)
    assert found.ok
    assert found.transposable  # the checkpoint says so
    called = CliRunner().invoke(app, ["verify", str(folder.model), "--transposable"])
    assert called.exit_code == 0


def test_verify_counts_what_breaks_the_other_direction(tmp_path: Path) -> None:
    start = oneshot.from_name("test_resnet", weights="random", seed=0)
    outcome = oneshot.prune(start, pattern="2:4", out=tmp_path / "t.safetensors", transposable=True)
    assert outcome.report.ok
    assert verify(tmp_path / "t.safetensors", transposable=True).ok
    plain = oneshot.from_name("test_resnet", weights="random", seed=0)
    oneshot.prune(plain, pattern="2:4", out=tmp_path / "p.safetensors")
    found = verify(tmp_path / "p.safetensors", transposable=True)
    assert {finding.rule for finding in found.findings} == {"transposed"}
    assert verify(tmp_path / "p.safetensors").ok

    dense = {name: value.clone() for name, value in start.model.state_dict().items()}
    weight = dense["layer1.0.conv1.weight"]
    o, i = (weight[:4, :4, 0, 0] == 0).nonzero()[0].tolist()
    twin = int((weight[o, :4, 0, 0] != 0).nonzero()[0])  # the row keeps its two, the columns do not
    weight[o, i, 0, 0], weight[o, twin, 0, 0] = 1.0, 0.0
    save_file({name: value.contiguous() for name, value in dense.items()}, tmp_path / "d.safetensors")
    assert load_file(tmp_path / "d.safetensors")["layer1.0.conv1.weight"][o, i, 0, 0] == 1.0
    found = verify(tmp_path / "d.safetensors", pattern="2:4", transposable=True)
    (finding,) = found.findings
    assert finding.count == 1
    assert f"layer1.0.conv1.weight: (o=0..3, k=(0, 0), i={i}) uses 3: 2:4 allows 2 of 4" in finding.message
    called = CliRunner().invoke(app, ["verify", str(tmp_path / "d.safetensors"), "--pattern", "2:4", "--transposable"])
    assert called.exit_code == 3


def test_a_checkpoint_that_claims_both_directions_is_held_to_it(tmp_path: Path) -> None:
    class Claims(FakePruner):
        transposable = True

    model = SmallNet()
    save(model, tmp_path / "c.safetensors", pruner=Claims(model, {"fc1.weight": "2:4"}))
    found = verify(tmp_path / "c.safetensors")
    assert {(finding.rule, finding.tensor) for finding in found.findings} == {("transposed", "fc1.weight")}
    model = SmallNet()
    save(model, tmp_path / "p.safetensors", pruner=FakePruner(model, {"fc1.weight": "2:4"}))
    assert verify(tmp_path / "p.safetensors").ok
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "c.safetensors")])
    assert shown.exit_code == 3
    assert "along input and along output channels" in shown.stdout


def test_where_nothing_holds_a_pattern_there_is_nothing_to_pass(tmp_path: Path) -> None:
    model = SmallNet()
    save(model, tmp_path / "dense.safetensors")
    found = verify(tmp_path / "dense.safetensors", transposable=True)
    assert [finding.message for finding in found.findings] == [
        "no layer holds a pattern, so that none holds it along the output channels"
    ]
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for more in ({"against": tmp_path / "dense.safetensors"}, {"values_only": True}, {}):
        with pytest.raises(UsageError, match="does not say which pattern it holds: name it with --pattern"):
            verify(tmp_path / "plain.safetensors", transposable=True, **more)


def test_between_masks_of_the_same_score_magnitude_decides() -> None:
    sizes = torch.rand(8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scores = torch.zeros(8, 8, dtype=torch.float64)
    scores[:4, :4] = torch.rand(4, 4, generator=torch.Generator().manual_seed(6))
    mask = transposable_mask(scores, Pattern(2, 4), sizes)
    assert torch.equal(mask[:4, :4], transposable_mask(scores, Pattern(2, 4))[:4, :4])
    assert torch.equal(mask[4:], transposable_mask(sizes, Pattern(2, 4))[4:])


@pytest.mark.parametrize("method", ["taylor", "wanda"])
def test_scores_of_images_choose_masks_that_hold_both_ways_and_keep_them(method: str, tmp_path: Path) -> None:
    start = oneshot.from_name("test_resnet", weights="random", seed=0, kwargs={"num_classes": 10})
    given = {"data": "digits", "overrides": ["data.image_size=32"], "calibration": 32}
    oneshot.prune(start, pattern="2:4", method=method, out=tmp_path / "w", transposable=True, permute=True, **given)
    assert verify(tmp_path / "w").transposable
    overrides = ["method.transposable=true", "train.epochs=1", "schedule.warmup_epochs=0"]
    flags = {"model.name": "test_resnet", "model.init": str(tmp_path / "w"), "method.name": "asp"}
    job = training.prepare(resolve("digits", overrides=overrides, flags={**flags, "data.source": "digits"}))
    job.pruner.begin_epoch(0)
    held = checkpoint.load(tmp_path / "w").state_dict()
    assert all(torch.equal(mask, held[name] != 0) for name, mask in job.pruner.masks().items())


def test_transposable_keeps_less_magnitude_than_free_masks_and_more_than_chance(tmp_path: Path) -> None:
    kept = {}
    for name, transposable in (("free", False), ("both", True)):
        start = oneshot.from_name("test_resnet", weights="random", seed=0)
        outcome = oneshot.prune(start, pattern="2:4", out=tmp_path / name, transposable=transposable)
        kept[name] = sum(layer.magnitude or 0.0 for layer in outcome.layers) / len(outcome.layers)
    assert 0.6 < kept["both"] < kept["free"]


def test_sparsegpt_decides_column_by_column_and_is_refused() -> None:
    with pytest.raises(
        MethodError, match=r"--transposable: --method sparsegpt decides column by column.*taylor, wanda"
    ):
        oneshot.Request(method="sparsegpt", data="digits", transposable=True)
