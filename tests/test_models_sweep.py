"""No false alarm: what the package prunes and saves, and the same weights as a plain file, verify on models of timm.

CI checks every model with one of the five patterns. All pairs: `pytest tests/test_models_sweep.py -m slow`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lbc_cli.checkpoint import read, save
from lbc_cli.patterns import Pattern
from lbc_cli.targets import find_targets
from lbc_cli.verifier import verify
from tests.checkpoints import FakePruner
from tests.test_packing import same_bits

# One small member of each of these families: plain, grouped, depthwise, split and dense convolutions, attention of
# several kinds, weight standardisation, branches that are merged later.
MODELS = [
    "resnet10t", "regnety_002", "mobilenetv3_small_050", "efficientnet_lite0", "ghostnet_050", "mixnet_s",
    "densenet121", "dla46_c", "rexnet_100", "mobileone_s0", "nf_regnet_b0", "vit_tiny_patch16_224", "mobilevit_xxs",
    "edgenext_xx_small", "convnextv2_atto", "levit_128s", "pvt_v2_b0", "xcit_nano_12_p16_224", "coat_lite_tiny",
    "efficientformerv2_s0", "fastvit_t8", "inception_next_atto",
]  # fmt: skip
# Its convolutions use standardised weights, so they stay dense, which only the model can tell, not their names.
ONLY_BY_MODEL = {"nf_regnet_b0"}
PATTERNS = ["2:4", "1:4", "2:8", "1:16", "4:8"]


def pruned(name: str, pattern: str) -> tuple[nn.Module, FakePruner, list[str]]:
    """A model with magnitude masks on every target, and the names of its other weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    selection = find_targets(model, Pattern.parse(pattern))
    pruner = FakePruner(model, {target.name: str(target.pattern) for target in selection.targets})
    return model, pruner, [skipped.name for skipped in selection.skipped]


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors for safetensors' own writer, which wants no shared memory."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}


def check_no_false_alarm(name: str, pattern: str, folder: Path) -> None:
    model, pruner, skipped = pruned(name, pattern)
    targets = {target.name for target in pruner.targets}
    assert targets

    save(model, folder / "packed", pruner=pruner)
    packed = verify(folder / "packed", pattern=pattern, model=name)
    assert packed.findings == []
    assert {layer.name for layer in packed.layers} == targets
    assert {dense.name for dense in packed.dense} >= set(skipped)
    found = read(folder / "packed").tensors
    assert all(same_bits(found[key], value) for key, value in model.state_dict().items())

    save_file(plain(model), folder / "dense")
    dense = verify(folder / "dense", pattern=pattern, model=name)
    assert [finding for finding in dense.findings if finding.level == "error"] == []
    assert {layer.name for layer in dense.layers} == targets

    by_name = verify(folder / "dense", pattern=pattern)
    assert by_name.ok or name in ONLY_BY_MODEL

    # One weight too many in the first group of a target, so that silence means something.
    last = pruner.targets[-1].name
    weight = model.get_parameter(last)
    with torch.no_grad():
        weight[0, : int(pattern.split(":")[1])] = 1
    save_file(plain(model), folder / "dense")
    violated = verify(folder / "dense", pattern=pattern, model=name)
    (finding,) = [finding for finding in violated.findings if finding.level == "error"]
    assert (finding.tensor, finding.rule) == (last, "pattern")


@pytest.mark.parametrize("number", range(len(MODELS)), ids=MODELS)
def test_no_false_alarm(number: int, tmp_path: Path) -> None:
    check_no_false_alarm(MODELS[number], PATTERNS[number % len(PATTERNS)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_no_false_alarm_over_all_pairs(name: str, pattern: str, tmp_path: Path) -> None:
    check_no_false_alarm(name, pattern, tmp_path)
