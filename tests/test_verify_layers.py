"""Which layer must hold which pattern, and how violations are shown."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lbc_cli.checkpoint import save
from lbc_cli.errors import PatternError, UsageError
from lbc_cli.patterns import Pattern, magnitude_mask
from lbc_cli.verifier import verify
from lbc_cli.verifier.choice import LayerRules, matches
from lbc_cli.verifier.groups import Rule, count_used
from lbc_cli.verifier.report import GROUPS_SHOWN
from tests.checkpoints import FakePruner, parts, sealed, small_model
from tests.test_verifier import dense_file, sparse_tensors


def masked(shape: tuple[int, ...], pattern: str, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(~magnitude_mask(weight, Pattern.parse(pattern)), 0)


# Globs.


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("layer4.0.conv1.weight", "layer4.0.conv1.weight", True),
        ("layer4.0.conv1", "layer4.0.conv1.weight", True),
        ("layer4", "layer4.0.conv1.weight", True),
        ("layer4.*", "layer4.0.conv1.weight", True),
        ("*.conv1", "layer4.0.conv1.weight", True),
        ("layer4.0.conv", "layer4.0.conv1.weight", False),
        ("layer4", "layer40.conv1.weight", False),
        ("Layer4", "layer4.0.conv1.weight", False),
    ],
)
def test_globs_name_tensors_layers_and_modules(glob: str, name: str, expected: bool) -> None:
    assert matches(glob, name) is expected


def test_the_last_glob_wins_and_overrides_the_classifier_but_not_the_algebra() -> None:
    rules = LayerRules.parse("2:4/16", {"a.*": "1:4", "a.0.*": "dense", "fc": "1:8", "b": "3:4/1"})
    assert rules.rule_for("x.weight", (32, 8)) == Rule(2, 4, 16)
    assert rules.rule_for("x.weight", (24, 8)) == Rule(2, 4, 8), "V is reduced to what divides the output channels"
    assert rules.rule_for("x.weight", (24, 8, 3, 3), groups=6) == Rule(2, 4, 4)
    assert rules.rule_for("a.1.weight", (32, 8)) == Rule(1, 4, 16)
    assert rules.rule_for("b.weight", (32, 8)) == Rule(3, 4, 1)
    assert rules.rule_for("fc.weight", (16, 8)) == Rule(1, 8, 16)
    assert rules.why_dense("a.0.weight", (32, 8)) == "dense by layers: 'a.0.*'"
    assert rules.why_dense("fc.weight", (16, 12)) == "12 input channels, not a multiple of 8"
    assert rules.why_dense("head.weight", (16, 8)) == "classifier"
    assert rules.why_dense("x.weight", (8, 1, 3, 3)) == "depthwise convolution: one input channel per group"
    assert rules.why_dense("x.weight", (32, 8)) == ""


def test_a_tensor_with_an_odd_name_is_a_weight_where_something_says_so() -> None:
    assert LayerRules.parse("2:4").why_dense("w", (8, 8)).startswith("not the weight")
    assert LayerRules.parse("2:4").rule_for("w", (8, 8), weight=True) == Rule(2, 4)
    assert LayerRules.parse(None, {"w": "1:4"}).rule_for("w", (8, 8)) == Rule(1, 4)
    assert LayerRules.parse(None, {"*": "1:4"}).rule_for("w", (8, 8)) is None


@pytest.mark.parametrize("text", ["4:2", "2:64", "0:4", "2:4/0", "half", "2:4:8", ""])
def test_impossible_patterns_are_refused_by_name(text: str) -> None:
    with pytest.raises(PatternError):
        LayerRules.parse(text)
    with pytest.raises(PatternError, match=r"layers: 'a\.\*' = .*dense"):
        LayerRules.parse("2:4", {"a.*": text})


@pytest.mark.parametrize("text", ["2:4", "1:16", "16:32", "2:4/32", " 2 : 4 / 8 ", "02:04"])
def test_patterns_are_read_as_everywhere(text: str) -> None:
    expected = Pattern.parse(text)
    assert LayerRules.parse(text).default == Rule(expected.n, expected.m, expected.vector)


def test_layers_of_a_dense_file(tmp_path: Path) -> None:
    tensors = {
        "a.0.weight": masked((8, 16), "2:4"),
        "a.1.weight": masked((8, 16), "1:8"),
        "b.weight": torch.randn(8, 16),
        "c.weight": masked((8, 16, 1, 3), "2:4/8"),
    }
    path = dense_file(tmp_path / "m", tensors)
    layers = {"a.1": "1:8", "b": "dense", "c": "2:4/16"}
    report = verify(path, pattern="2:4", layers=layers)
    assert report.ok
    assert {layer.name: layer.pattern for layer in report.layers} == {
        "a.0.weight": "2:4",
        "a.1.weight": "1:8",
        "c.weight": "2:4/8",
    }
    assert [(dense.name, dense.why, dense.shape) for dense in report.dense] == [
        ("b.weight", "dense by layers: 'b'", (8, 16))
    ]
    only = verify(path, layers={"a.1": "1:8"})
    assert only.ok
    assert [layer.name for layer in only.layers] == ["a.1.weight"]
    assert {dense.why for dense in only.dense} == {"no pattern is asked of it"}
    assert not verify(path, layers={"a.0": "1:8"}).ok


def test_a_glob_that_says_nothing_is_refused(tmp_path: Path) -> None:
    path = dense_file(tmp_path / "m", {"conv.weight": masked((8, 16), "2:4"), "stem.weight": torch.randn(8, 3, 3, 3)})
    with pytest.raises(UsageError, match=r"'conw' matches no weight in .*Did you mean 'conv'"):
        verify(path, pattern="2:4", layers={"conw": "dense"})
    with pytest.raises(UsageError, match=r"nothing that 'stem' matches can take 2:4: stem.weight: 3 input channels"):
        verify(path, layers={"stem": "2:4"})
    assert verify(path, layers={"stem": "2:4", "conv": "2:4", "*": "dense", "conv.*": "2:4"}).ok


def test_layers_of_a_checkpoint_ask_for_more(tmp_path: Path) -> None:
    model = small_model()
    save(model, tmp_path / "m", pruner=FakePruner(model, {"conv.weight": "1:4", "fc1.weight": "1:4"}))
    assert verify(tmp_path / "m", pattern="1:8", layers={"conv": "2:4", "fc1": "dense"}).ok
    report = verify(tmp_path / "m", layers={"fc1": "1:8"})
    assert [finding.tensor for finding in report.findings] == ["fc1.weight"]
    assert len(report.layers) == 2
    # A dense layer is only looked at where a glob asks: the classifier of the model has 4 input channels.
    assert [dense.why for dense in verify(tmp_path / "m", pattern="2:4").dense] == ["classifier"]
    report = verify(tmp_path / "m", layers={"fc": "2:4"})
    assert [(finding.rule, finding.tensor, finding.count) for finding in report.findings] == [
        ("pattern", "fc.weight", 3)
    ]
    with pytest.raises(UsageError, match="matches no weight"):
        verify(tmp_path / "m", layers={"fd": "2:4"})


def test_dense_layers_of_a_checkpoint_are_explained(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict(
        {
            "stem": torch.nn.Conv2d(3, 8, 3),
            "deep": torch.nn.Conv2d(8, 8, 3, groups=8),
            "free": torch.nn.Linear(16, 8),
            "body": torch.nn.Linear(16, 8),
            "fc": torch.nn.Linear(8, 4),
        }
    )
    save(model, tmp_path / "m", pruner=FakePruner(model, {"body.weight": "2:4"}), unstructured=["free.weight"])
    assert {dense.name: dense.why for dense in verify(tmp_path / "m").dense} == {
        "stem.weight": "3 input channels, not a multiple of 4",
        "deep.weight": "depthwise convolution: one input channel per group",
        "fc.weight": "classifier",
    }
    (counted,) = verify(tmp_path / "m").counted
    assert (counted.name, counted.nonzeros, counted.claimed, counted.density) == ("free.weight", 128, 128, 1.0)


# The first violations.


def test_the_first_violations_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    tensors = sparse_tensors()
    weight = tensors["a.weight"]  # (6, 8, 3, 3)
    places = [(5, 1, 2, 2), (0, 1, 0, 1), (0, 0, 2, 0), (3, 1, 1, 1), (0, 1, 0, 0), (2, 0, 0, 2), (4, 1, 1, 0)]
    for o, group, *k in places:
        weight[o, 4 * group : 4 * group + 4, k[0], k[1]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    report = verify(dense_file(tmp_path / "m", tensors), pattern="2:4")
    (finding,) = report.findings
    assert finding.count == len(places)
    assert f"{len(places)} of 108 groups violate it" in finding.message
    expected = sorted((o, *k, group) for o, group, *k in places)[:GROUPS_SHOWN]
    shown = [(group.outputs[0], *group.kernel, group.inputs[0] // 4) for group in finding.groups]
    assert shown == expected, "in the order (o, k, i)"
    for group in finding.groups:
        assert (group.used, group.values) == (4, ("[1 2 3 4]",))
        assert group.outputs[0] == group.outputs[1]
        assert group.inputs[1] - group.inputs[0] == 3
        o, k, i = group.outputs[0], group.kernel, group.inputs[0] // 4
        assert group.number == ((o * 3 + k[0]) * 3 + k[1]) * 2 + i
    assert finding.message.startswith("a.weight: group (o=0, k=(0, 0), i=4..7) uses 4 positions, [1 2 3 4]: 2:4 allows")
    parsed = json.loads(report.to_json())["findings"][0]["groups"]
    assert len(parsed) == GROUPS_SHOWN
    assert set(parsed[0]) == {"number", "outputs", "kernel", "inputs", "used", "values"}


def test_violations_of_vectors_show_each_row(tmp_path: Path) -> None:
    weight = masked((8, 8), "2:4/4")
    zero = (weight[4:8, 0:4] == 0).all(dim=0).nonzero()[0].item()
    weight[6, zero] = 7
    (finding,) = verify(dense_file(tmp_path / "m", {"w.weight": weight}), pattern="2:4/4").findings
    (group,) = finding.groups
    assert (group.outputs, group.inputs, group.number, group.used) == ((4, 7), (0, 3), 2, 3)
    assert len(group.values) == 4
    assert "7" in group.values[2]


def test_first_violations_are_found_across_blocks(tmp_path: Path) -> None:
    """A tensor of several blocks: the groups shown are the first of the whole tensor, and numbered in it."""
    weight = torch.zeros(1024, 1024)
    rng = random.Random(5)
    places = sorted(rng.sample(range(weight.numel() // 4), 400))
    for number in places:
        weight.view(-1, 4)[number, :3] = 1
    (finding,) = verify(dense_file(tmp_path / "m", {"w.weight": weight}), pattern="2:4").findings
    assert finding.count == 400
    assert [group.number for group in finding.groups] == places[:GROUPS_SHOWN]
    assert [group.outputs[0] for group in finding.groups] == [number // 256 for number in places[:GROUPS_SHOWN]]


def test_violations_of_a_demanded_pattern_in_a_packed_tensor(tmp_path: Path) -> None:
    """Packed and dense files of the same weights show the same groups."""
    model = small_model()
    save(model, tmp_path / "m", pruner=FakePruner(model, {"conv.weight": "2:4", "fc1.weight": "3:4"}))
    dense_file(tmp_path / "d", {name: value.detach() for name, value in model.named_parameters()})
    packed, dense = verify(tmp_path / "m", pattern="1:4/2"), verify(tmp_path / "d", pattern="1:4/2")
    found = {finding.tensor: finding for finding in packed.findings}
    assert found.keys() == {"conv.weight", "fc1.weight"}
    assert found == {finding.tensor: finding for finding in dense.findings}


def test_padding_and_codes_that_fill_no_byte(tmp_path: Path) -> None:
    """Codes of 2 bits are looked up by the byte, those of 3 bits are not; either way the padding must be zero."""
    model = small_model()
    save(model, tmp_path / "m", pruner=FakePruner(model, {"fc.weight": "2:4", "fc1.weight": "3:8"}))
    for name, used in (("fc.weight", 4), ("fc1.weight", 18)):
        for bit in range(used, used + -used % 8):
            header, manifest, data = parts((tmp_path / "m").read_bytes())
            begin = header[f"{name}.nm_index"]["data_offsets"][0]
            data[begin + bit // 8] |= 1 << bit % 8
            (tmp_path / "d").write_bytes(sealed(header, manifest, data))
            (finding,) = verify(tmp_path / "d").findings
            assert (finding.rule, finding.tensor) == ("padding", name)


@pytest.mark.parametrize("m", [2, 4, 5, 8, 16, 32])
@pytest.mark.parametrize("positions", [1, 3])
def test_counting_by_words_is_counting(m: int, positions: int) -> None:
    used = np.random.default_rng(0).random((5, 7, m, positions)) > 0.4
    used[0] = True
    for layout in (used, np.asfortranarray(used)):
        found = count_used(layout)
        assert (found.dtype, found.shape) == (np.uint8, (5, 7, positions))
        assert np.array_equal(found, used.sum(axis=2))


def test_positions_beyond_the_group_stay_in_it(tmp_path: Path) -> None:
    """M = 5 leaves the codes 5, 6 and 7 impossible: they are reported, and no other group is read wrongly."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 2))
    save(model, tmp_path / "m", pruner=FakePruner(model, {"0.weight": "1:5"}))
    header, manifest, data = parts((tmp_path / "m").read_bytes())
    begin, end = header["0.weight.nm_index"]["data_offsets"]
    data[begin:end] = bytes([0b111_000, 0b111_111])
    (tmp_path / "d").write_bytes(sealed(header, manifest, data))
    report = verify(tmp_path / "d", pattern="1:10")
    assert [(finding.rule, finding.count) for finding in report.findings] == [("positions", 3), ("pattern", 2)]
    assert "(o=0, k=(), i=5..9) keeps positions [7]" in report.findings[0].message


def test_nothing_is_asked_only_where_that_is_said(tmp_path: Path) -> None:
    path = dense_file(tmp_path / "m", sparse_tensors())
    with pytest.raises(UsageError, match="--pattern"):
        verify(path)
    report = verify(path, values_only=True)
    assert (report.ok, report.layers) == (True, [])
    path = dense_file(tmp_path / "n", {"w.weight": torch.full((4, 4), float("nan"))})
    assert not verify(path, values_only=True).ok
