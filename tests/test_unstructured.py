"""What methods without a pattern need around them: counts, ranking, recipes, runs, files."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from lbc_cli import checkpoint, training
from lbc_cli.cli import app
from lbc_cli.errors import DivergenceError, MethodError, RecipeError, UsageError, VerificationError
from lbc_cli.exports import export
from lbc_cli.methods import METHODS, Pruner, attach
from lbc_cli.methods.unstructured import Clock, SparsityOptions, kept_of, largest, magnitudes
from lbc_cli.recipe import resolve
from lbc_cli.report.describe import plan_view
from lbc_cli.resuming import resume
from lbc_cli.runs import RunFolder
from lbc_cli.runtime.loading import open_model
from lbc_cli.smoke import smoke
from lbc_cli.verifier import verify
from tests import unstructured as oracle

FREE = [name for name, info in METHODS.items() if not info.structured]
METHOD = pytest.mark.parametrize("method", FREE)
TOLD = [name for name in FREE if "sparsity" in METHODS[name].options.model_fields]
BASE = {"model.name": "test_resnet", "data.source": "digits"}


def job(method: str, *overrides: str, **flags: Any) -> training.Job:
    given = {**BASE, "method.name": method, **flags}
    return training.prepare(smoke(resolve("digits", overrides=overrides, flags=given)))


# Counting and ranking.


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [(10, 0.9, 1), (10, 0.95, 0), (10, 0.94, 1), (10, 0.05, 9), (1000, 0.1, 900), (3, 0.5, 1), (7, 0.7, 2)],
)
def test_what_is_kept_is_counted_exactly(total: int, sparsity: float, kept: int) -> None:
    assert kept_of(total, SparsityOptions(sparsity=sparsity).exact) == kept == oracle.kept_of(total, str(sparsity))


def test_a_sparsity_is_the_number_that_was_written() -> None:
    """As binary floats 0.7 * 45 is below 31.5, which would be rounded the other way."""
    assert 45 * 0.7 < 31.5
    assert kept_of(45, SparsityOptions(sparsity=0.7).exact) == 13
    assert SparsityOptions(sparsity=1e-5).exact == Fraction(1, 100_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_are_found_and_ties_go_to_the_earlier(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 9, 100):
        values = torch.randint(0, 7, (size,), generator=generator).to(dtype)  # many ties
        for count in range(size + 1):
            expected = sorted(oracle.ranked(values.tolist())[:count])
            assert largest(values, count).nonzero()[:, 0].tolist() == expected


def test_weights_that_are_not_finite_are_no_ranking() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), method="gmp", epochs=3)
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match=r"1\.weight are not finite"):
        magnitudes(pruner.targets[0], None)
    with pytest.raises(DivergenceError):
        pruner.begin_epoch(2)


def test_the_clock_learns_how_long_an_epoch_is() -> None:
    clock = Clock()
    clock.turn()
    times = []
    for epoch, steps in enumerate((4, 4, 6)):
        for _ in range(steps):
            times.append(clock.time(epoch))
            clock.tick()
        clock.turn()
    first, second, third = times[:4], times[4:8], times[8:]
    assert first == [0, 0, 0, 0]
    assert second == [1, Fraction(5, 4), Fraction(6, 4), Fraction(7, 4)]
    assert third == [2, Fraction(9, 4), Fraction(10, 4), *[Fraction(11, 4)] * 3]  # never in the epoch to come
    again = Clock()
    again.load(clock.state())
    assert (again.steps, again.before, again.inside) == (14, 6, 0)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@CUDA
def test_the_largest_are_the_same_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (1, 9, 100, 300_000):
        values = torch.randint(0, 1000, (size,), generator=generator).float()
        for count in {0, 1, size // 3, size}:
            assert torch.equal(largest(values.cuda(), count).cpu(), largest(values, count))


@pytest.mark.gpu
@CUDA
@METHOD
def test_masks_are_those_of_the_cpu_in_float64(method: str) -> None:
    options = {"rigl": {"every": 2}, "str": {"s_init": -3.0, "s_decay": 0.03}, "gmp": {"every": 2}}.get(method, {})
    ends = []
    for device in ("cpu", "cuda"):
        model = oracle.network().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = attach(model, optimizer, method=method, epochs=4, layers=oracle.LAYERS, **options)
        for epoch in range(4):
            pruner.begin_epoch(epoch)
            for images, labels in oracle.batches(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
                optimizer.step()
        ends.append({name: mask.cpu() for name, mask in pruner.masks().items()})
    assert all(torch.equal(mask, ends[1][name]) for name, mask in ends[0].items())


# Recipes and the command line.


@METHOD
def test_a_pattern_does_not_go_with_an_unstructured_method(method: str) -> None:
    for flags in ({"sparsity.pattern": "2:4"}, {"sparsity.vector": 4}, {"sparsity.layers": {"*": "1:4"}}):
        with pytest.raises(RecipeError, match=f"method {method} is unstructured") as caught:
            resolve("digits", flags={**BASE, "method.name": method, **flags})
        assert len(caught.value.problems) == 1
    model = oracle.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MethodError, match=f"method {method} is unstructured, pattern 2:4"):
        attach(model, optimizer, pattern="2:4", method=method, epochs=4)
    with pytest.raises(MethodError, match="vector = 4"):
        attach(model, optimizer, vector=4, method=method, epochs=4)


@METHOD
def test_the_pattern_of_a_recipe_gives_way_to_an_unstructured_method(method: str, tmp_path: Path) -> None:
    """digits.toml says 2:4; over it, another method starts afresh, and so it does the other way round."""
    resolved = resolve("digits", flags={**BASE, "method.name": method})
    assert resolved.recipe.sparsity.pattern == ""
    (tmp_path / "free.toml").write_text(f'extends = "digits"\n[method]\nname = "{method}"\n')
    (tmp_path / "written.toml").write_text(resolved.text)
    for file in ("free.toml", "written.toml"):
        assert resolve(tmp_path / file).recipe.sparsity.pattern == ""
        assert resolve(tmp_path / file, flags={"method.name": "lbc"}).recipe.sparsity.pattern == "2:4"
    (tmp_path / "both.toml").write_text(f'[method]\nname = "{method}"\n[sparsity]\npattern = "1:4"\n')
    with pytest.raises(RecipeError, match=r"both.toml:4: sparsity.pattern: .*leave the pattern out"):
        resolve(tmp_path / "both.toml")
    (tmp_path / "layers.toml").write_text('[sparsity]\nlayers = {"fc" = "sparse", "layer1*" = "dense"}\n')
    assert resolve(tmp_path / "layers.toml", flags={"method.name": method}).recipe.sparsity.layers["fc"] == "sparse"
    with pytest.raises(RecipeError, match="'sparse' is not a pattern"):
        resolve(tmp_path / "layers.toml")


def test_the_refusal_says_which_sparsity_is_as_much() -> None:
    result = CliRunner().invoke(app, ["train", "test_resnet", "--method", "gmp", "--pattern", "1:16"])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "0.9375 is as much as 1:16" in line
    with pytest.raises(RecipeError, match=r"leave the pattern out; method\.sparsity says how much it removes$"):
        resolve("digits", overrides=["sparsity.pattern=none"], flags={**BASE, "method.name": "gmp"})


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "nan", '"0.9"'])
def test_impossible_sparsities_are_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"sparsity"):
        resolve("digits", overrides=[f"method.sparsity={value}"], flags={**BASE, "method.name": "gmp"})


def test_a_sparsity_that_leaves_nothing_of_a_layer_is_refused() -> None:
    model = oracle.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MethodError, match=r"keeps none of the 220 weights of 5\.weight"):
        attach(model, optimizer, method="gmp", epochs=4, layers=oracle.LAYERS, sparsity=0.998)
    assert not optimizer._optimizer_step_pre_hooks


def test_help_says_how_unstructured_methods_are_told_how_much() -> None:
    text = " ".join(CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "method.sparsity" in text
    assert all(name in text for name in METHODS)


@METHOD
def test_a_training_step_is_measured_without_a_pattern(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbc_cli.bench.training._peak_apart", lambda setup, name: None)  # a process of its own
    command = ["bench", "test_resnet", "--train", "--method", method, "--batch", "2", "--image-size", "32"]
    result = CliRunner().invoke(app, [*command, "--steps", "1", "--warmup", "0", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["title"] == f"test_resnet · {method}"
    result = CliRunner().invoke(app, [*command, "--pattern", "2:4"])
    assert result.exit_code == 2
    assert f"--pattern belongs to methods with a pattern: {method} is unstructured" in result.stderr


# Runs and files.


@METHOD
def test_a_run_is_planned_trained_verified_and_resumed(method: str, tmp_path: Path) -> None:
    first = job(method)
    assert first.pattern is None
    assert all(not target.structured for target in first.pruner.targets)
    assert {s.reason for s in first.pruner.skipped} == {"stem: it sees the image", "classifier"}
    plan = plan_view(first, "runs/x")
    assert {layer.pattern for layer in plan.layers} == {""}
    outcome = training.run(first, RunFolder.create(tmp_path / "run"))
    assert outcome.report.ok
    assert [layer.name for layer in outcome.report.counted] == sorted(t.name for t in first.pruner.targets)
    assert {finding.rule for finding in outcome.report.findings} == set()  # no -0.0 among the zeros
    for counted in outcome.report.counted:
        weight = first.model.get_parameter(counted.name)
        assert counted.nonzeros == counted.claimed == int((weight != 0).sum()) <= weight.numel()
    assert first.pruner.density() < 0.8  # a smoke run meets removal, whatever the method is told
    if method in TOLD:
        sizes = sum(target.weight.numel() for target in first.pruner.targets)
        assert sum(layer.nonzeros for layer in outcome.report.counted) == pytest.approx(0.1 * sizes, abs=20)
    written = (tmp_path / "run" / "recipe.toml").read_text()
    assert 'pattern = ""' in written
    assert training.summary(first, outcome)["pattern"] is None
    (tmp_path / "run" / "summary.json").unlink()
    again = resume(RunFolder.open(tmp_path / "run"))
    assert again.pruner.method == method
    assert (again.title, again.default_folder) == (first.title, first.default_folder)


@pytest.mark.parametrize("method", TOLD)
def test_a_run_is_called_after_its_sparsity(method: str) -> None:
    named = job(method, "method.sparsity=0.8")
    assert named.title == f"test_resnet · {method}, sparsity 0.8"
    assert named.default_folder == Path(f"runs/test_resnet-{method}-s0.8")
    plan = plan_view(named, "x")
    assert plan.cost.parameters_sparse == pytest.approx(
        plan.cost.parameters_dense - 0.8 * sum(t.weight.numel() for t in named.pruner.targets), abs=20
    )


class Trained:
    """A small checkpoint of an unstructured method, trained for a few steps."""

    def __init__(self, folder: Path, method: str = "gmp") -> None:
        self.model = oracle.network().float()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.pruner: Pruner = attach(
            self.model, self.optimizer, method=method, epochs=4, layers=oracle.LAYERS, sparsity=0.8
        )
        self.path = folder / "m.safetensors"
        for epoch in range(4):
            self.pruner.begin_epoch(epoch)

    def save(self, tensors: dict[str, Tensor] | None = None) -> Path:
        checkpoint.save(self.model, self.path, pruner=self.pruner, tensors=tensors, overwrite=True)
        return self.path


def test_counts_are_of_what_is_stored_and_masks_are_checked(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    manifest = checkpoint.read_manifest(trained.save())
    assert (manifest.phase, manifest.method, dict(manifest.sparse)) == ("final", "gmp", {})
    assert manifest.unstructured == {"1.weight": 63, "5.weight": 44}
    average = {name: value.clone() for name, value in trained.model.state_dict().items()}
    kept = trained.pruner.masks()["5.weight"].nonzero()
    average["5.weight"][tuple(kept[0])] = 0  # fewer than the mask allows: counted as stored
    assert checkpoint.read_manifest(trained.save(average)).unstructured["5.weight"] == 43
    average["5.weight"][tuple((~trained.pruner.masks()["5.weight"]).nonzero()[0])] = 1
    with pytest.raises(VerificationError, match=r"5\.weight holds 1 weights that its mask says are removed"):
        trained.save(average)
    assert verify(trained.path).ok


def test_a_training_checkpoint_claims_nothing(tmp_path: Path) -> None:
    model = oracle.network().float()
    pruner = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), method="gmp", epochs=4, layers=oracle.LAYERS)
    pruner.begin_epoch(1)
    checkpoint.save(model, tmp_path / "m", pruner=pruner)
    manifest = checkpoint.read_manifest(tmp_path / "m")
    assert (manifest.phase, dict(manifest.unstructured)) == ("training", {})


def test_verify_shows_what_was_counted(tmp_path: Path) -> None:
    path = Trained(tmp_path).save()
    result = CliRunner().invoke(app, ["verify", str(path)], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["5.weight", "11x20", "0.2000", "44", "44"] in lines
    assert result.stdout.splitlines()[-1] == "ok: 2 sparse layers verified"
    (told,) = [x for x in json.loads(verify(path).to_json())["counted"] if x["name"] == "1.weight"]
    assert told == {"name": "1.weight", "shape": [5, 7, 3, 3], "density": 0.2, "nonzeros": 63, "claimed": 63}
    asked = verify(path, pattern="2:4")
    assert [f.message for f in asked.findings] == [
        "no tensor can hold 2:4: 1.weight: pruned without a pattern; 5.weight: pruned without a pattern; "
        "0.weight: 3 input channels, not a multiple of 4"
    ]
    assert [f.rule for f in verify(path, layers={"5": "2:4"}).findings] == ["pattern"]
    with pytest.raises(UsageError, match=r"nothing that '1' matches can take 2:4: 1\.weight: 7 input channels"):
        verify(path, layers={"1": "2:4", "5": "2:4"})


def test_a_file_without_a_pattern_is_nothing_to_execute(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    training.run(job("gmp"), folder)
    with pytest.raises(UsageError, match="its weights are sparse without an N:M pattern: nothing to execute"):
        open_model(folder.model)


def test_negative_zeros_of_a_sparse_tensor_are_pointed_out(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    tensors = {name: value.clone() for name, value in trained.model.state_dict().items()}
    tensors["5.weight"][~trained.pruner.masks()["5.weight"]] *= -1.0
    report = verify(trained.save(tensors))
    assert [(f.rule, f.tensor, f.level) for f in report.findings] == [("negative-zero", "5.weight", "warning")]


@METHOD
def test_exports_of_unstructured_models(method: str, tmp_path: Path) -> None:
    trained = job(method)
    folder = RunFolder.create(tmp_path / "run")
    training.run(trained, folder)
    for form in ("dense", "timm"):
        result = export(folder.model, form, tmp_path / form)
        assert result.verified.ok
    with pytest.raises(
        UsageError, match=r"no layer can be stored semi-structured \(.*no pattern, but not 2:4"
    ) as error:
        export(folder.model, "semi-structured", tmp_path / "s")
    assert "\n" not in str(error.value)
