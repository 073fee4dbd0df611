"""Which weights become sparse, over many timm families, and what globs, ties and wrappers do to that."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from lbc_cli.errors import MethodError, PatternError, TargetError
from lbc_cli.patterns import Pattern, check_shape
from lbc_cli.targets import CLASSIFIER, DEPTHWISE, STEM, Selection, clean_name, find_targets, unwrap

TWO_FOUR = Pattern(2, 4)

# Written down by hand from the architectures: model, layers that see the image, classifiers, number of 2:4 targets
# where it can be told from the paper of the architecture (None: left to the rule of `expected_targets`).
FAMILIES: list[tuple[str, set[str], set[str], int | None]] = [
    ("resnet18", {"conv1"}, {"fc"}, 16 + 3),
    ("resnet50", {"conv1"}, {"fc"}, 16 * 3 + 4),
    ("resnext50_32x4d", {"conv1"}, {"fc"}, 16 * 3 + 4),
    ("res2net50_26w_4s", {"conv1"}, {"fc"}, None),
    ("regnety_002", {"stem.conv"}, {"head.fc"}, None),
    ("convnext_atto", {"stem.0"}, {"head.fc"}, 2 * (2 + 2 + 6 + 2) + 3),
    ("efficientnet_b0", {"conv_stem"}, {"classifier"}, None),
    ("tf_efficientnet_lite0", {"conv_stem"}, {"classifier"}, None),
    ("mobilenetv3_small_050", {"conv_stem"}, {"classifier"}, None),
    ("ghostnet_050", {"conv_stem"}, {"classifier"}, None),
    ("vit_tiny_patch16_224", {"patch_embed.proj"}, {"head"}, 12 * 4),
    ("deit_tiny_patch16_224", {"patch_embed.proj"}, {"head"}, 12 * 4),
    ("deit_tiny_distilled_patch16_224", {"patch_embed.proj"}, {"head", "head_dist"}, 12 * 4),
    ("beit_base_patch16_224", {"patch_embed.proj"}, {"head"}, 12 * 4),
    ("swin_tiny_patch4_window7_224", {"patch_embed.proj"}, {"head.fc"}, 12 * 4 + 3),
    ("xcit_nano_12_p16_224", {"patch_embed.proj.0.0"}, {"head"}, None),
    ("crossvit_9_240", {"patch_embed.0.proj", "patch_embed.1.proj"}, {"head.0", "head.1"}, None),
    ("mixer_s32_224", {"stem.proj"}, {"head"}, 8 * 3),  # 49 tokens do not divide by 4
    ("densenet121", {"features.conv0"}, {"classifier"}, 120 - 1),
    ("vgg11", {"features.0"}, {"head.fc"}, 7 + 2),
    ("resnetv2_50", {"stem.conv"}, {"head.fc"}, 16 * 3 + 4),
    ("dla34", {"base_layer.0"}, {"fc"}, None),
    ("coatnet_0_224", {"stem.conv1"}, {"head.fc"}, None),
    ("levit_128", {"stem.conv1.linear"}, {"head.linear", "head_dist.linear"}, None),
    ("poolformer_s12", {"stem.conv"}, {"head.fc"}, 12 * 2 + 3),
    ("hrnet_w18_small", {"conv1"}, {"classifier"}, None),
    ("inception_v3", {"Conv2d_1a_3x3.conv"}, {"fc"}, None),
    ("edgenext_xx_small", {"stem.0"}, {"head.fc"}, None),
    ("maxvit_tiny_tf_224", {"stem.conv1"}, {"head.fc"}, None),
    ("pvt_v2_b0", {"patch_embed.proj"}, {"head"}, None),
    ("mobilevit_xxs", {"stem.conv"}, {"head.fc"}, None),
    ("repvgg_a0", {"stem.conv_kxk.conv", "stem.conv_1x1.conv"}, {"head.fc"}, None),
    ("lowformer_b0", {"stem.0.conv"}, {"classifier"}, None),
    ("sequencer2d_s", {"stem.proj"}, {"head.fc"}, None),
    ("naflexvit_base_patch16_gap", {"embeds.proj"}, {"head"}, 12 * 4),
]
NEW_IN_TIMM = {"lowformer_b0": "1.0.29"}
NOT_ON_META = {"regnety_002"}  # timm before 1.0.30 reads its widths from tensors made on the default device
PLAIN_LAYERS = {"Linear", "Conv2d", "Conv2dSame"}


def on_meta(name: str, **kwargs: object) -> nn.Module:
    timm = pytest.importorskip("timm", minversion=NEW_IN_TIMM.get(name))
    with torch.device("cpu" if name in NOT_ON_META else "meta"):
        model: nn.Module = timm.create_model(name, **kwargs)
    return model


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 16), nn.Linear(16, 10))


def names(selection: Selection) -> list[str]:
    return [target.name for target in selection.targets]


def reasons(selection: Selection) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in selection.skipped}


def expected_targets(model: nn.Module, dense: set[str], m: int) -> list[str]:
    """The policy in one rule, with neither timm's configuration nor the module's classification of layers."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in PLAIN_LAYERS and name not in dense and module.weight.shape[1] % m == 0
    ]


@pytest.mark.parametrize(("name", "stem", "classifier", "number"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_what_is_matched_is_right(name: str, stem: set[str], classifier: set[str], number: int | None) -> None:
    model = on_meta(name)
    selection = find_targets(model, TWO_FOUR)

    assert names(selection) == expected_targets(model, stem | classifier, 4)
    if number is not None:
        assert len(selection.targets) == number
    left = reasons(selection)
    for layers, reason in ((stem, STEM), (classifier, CLASSIFIER)):
        assert {n for n, r in left.items() if r == reason} == {f"{layer}.weight" for layer in layers}


@pytest.mark.parametrize("name", [row[0] for row in FAMILIES])
@pytest.mark.parametrize("pattern", [Pattern(1, 16, 16), Pattern(2, 8)], ids=str)
def test_every_weight_is_a_target_that_fits_or_says_why_not(name: str, pattern: Pattern) -> None:
    model = on_meta(name)
    selection = find_targets(model, pattern)

    every = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
    assert sorted(every) == sorted(names(selection) + list(reasons(selection)))
    for target in selection.targets:
        assert target.weight is every[target.name]
        assert target.name == f"{target.module}.weight"
        check_shape(target.weight.shape, target.pattern)
        assert (target.weight.shape[0] // target.groups) % target.pattern.vector == 0
        assert bool(target.note) == (target.pattern.vector != pattern.vector)
    assert all(skipped.reason and skipped.shape == tuple(every[skipped.name].shape) for skipped in selection.skipped)


def test_fused_qkv_is_a_target_and_its_pattern_is_the_one_asked_for() -> None:
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "swinv2_tiny_window8_256"):
        selection = find_targets(on_meta(name), TWO_FOUR)
        qkv = [target for target in selection.targets if target.name.endswith("attn.qkv.weight")]
        assert len(qkv) == 12
        assert {target.kind for target in qkv} == {"linear"}
        assert all(target.weight.shape[0] == 3 * target.weight.shape[1] for target in qkv)
        assert {target.pattern for target in selection.targets} == {TWO_FOUR}


def test_reasons_name_what_stands_in_the_way() -> None:
    efficient = reasons(find_targets(on_meta("efficientnet_b0"), TWO_FOUR))
    assert efficient["blocks.0.0.conv_dw.weight"] == "depthwise convolution: one input channel per group"
    assert efficient["blocks.1.1.se.conv_expand.weight"] == "6 input channels: not a multiple of 4"
    grouped = reasons(find_targets(on_meta("resnext50_32x4d"), Pattern(2, 8)))
    assert grouped["layer1.0.conv2.weight"] == "4 input channels per group: not a multiple of 8"
    vit = reasons(find_targets(on_meta("deit_tiny_distilled_patch16_224"), TWO_FOUR))
    assert vit["pos_embed"] == "not a convolution or linear layer (VisionTransformerDistilled)"
    lstm = reasons(find_targets(on_meta("sequencer2d_s"), TWO_FOUR))
    assert "(LSTM)" in lstm["stages.0.blocks.0.rnn_tokens.rnn_v.weight_ih_l0"]
    conditional = reasons(find_targets(on_meta("efficientnet_cc_b0_4e"), TWO_FOUR))
    assert conditional["blocks.6.0.conv_pw.weight"] == "not a convolution or linear layer (CondConv2d)"


def test_transposed_convolutions_stay_dense() -> None:
    transposed = reasons(find_targets(on_meta("lowformer_b0"), TWO_FOUR))
    assert "transposed" in transposed["stages.2.1.attn.main.1.upsampling.weight"]


def test_weight_standardised_models_stay_dense() -> None:
    for name in ("resnetv2_50x1_bit", "nf_resnet26", "eca_nfnet_l0"):
        with pytest.raises(TargetError, match=r"no layer takes 2:4: .*Std.* transforms its weight .*\(\d\dx\)"):
            find_targets(on_meta(name), TWO_FOUR)
    hybrid = find_targets(on_meta("vit_base_r50_s16_224"), TWO_FOUR)
    assert len(hybrid.targets) == 12 * 4 + 1  # the blocks, and a patch embedding that sees features, not the image
    assert not [name for name in names(hybrid) if "backbone" in name]
    squeeze = find_targets(on_meta("dm_nfnet_f0"), TWO_FOUR)
    assert {name.split(".")[-3] for name in names(squeeze)} == {"attn_last"}


def test_models_without_a_classifier_lose_no_other_layer_to_it() -> None:
    headless = find_targets(on_meta("vit_tiny_patch16_224", num_classes=0), TWO_FOUR)
    assert len(headless.targets) == 48
    features = find_targets(on_meta("resnet18", features_only=True), TWO_FOUR)
    assert len(features.targets) == 19
    assert reasons(features) == {"conv1.weight": STEM}


def test_models_of_others_keep_first_and_last_layer_dense() -> None:
    selection = find_targets(small(), TWO_FOUR)
    assert names(selection) == ["1.weight", "3.weight"]
    assert reasons(selection) == {"0.weight": STEM, "4.weight": CLASSIFIER}


@pytest.mark.parametrize(
    ("layer", "shape", "groups", "vector", "note"),
    [
        (nn.Conv1d(8, 24, 3), (24, 8, 3), 1, 8, "vector 16 -> 8: 24 output channels"),
        (nn.Conv2d(16, 32, 3, groups=4), (32, 4, 3, 3), 4, 8, "vector 16 -> 8: 8 output channels per group"),
        (nn.Conv3d(4, 32, 1), (32, 4, 1, 1, 1), 1, 16, ""),
        (nn.Linear(8, 7), (7, 8), 1, 1, "vector 16 -> 1: 7 output channels"),
    ],
)
def test_vectors_never_straddle_groups(
    layer: nn.Module, shape: tuple[int, ...], groups: int, vector: int, note: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.Linear(8, 2))
    (target,) = find_targets(model, Pattern(2, 4, 16)).targets
    assert (tuple(target.weight.shape), target.groups, target.pattern.vector) == (shape, groups, vector)
    assert target.note == note
    assert target.kind == type(layer).__name__.lower()
    assert math.gcd(shape[0] // groups, 16) == vector


class Rescaled(nn.Linear):
    """Uses another weight than the one it stores."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return nn.functional.linear(input, self.weight * 2, self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, *args: torch.Tensor) -> torch.Tensor:
        return super()._conv_forward(*args)


class Renamed(nn.Linear):
    """Changes nothing."""


@pytest.mark.parametrize(
    ("layer", "parameter", "reason"),
    [
        (Rescaled(8, 8), "1.weight", "Rescaled has a forward of its own"),
        (Padded(8, 8, 1), "1.weight", "Padded has a forward of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "1.parametrizations.weight.original1", "parametrized"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), "1.parametrizations.weight.original", "parametrized"),
        (nn.utils.spectral_norm(nn.Linear(8, 8)), "1.weight_orig", "recomputes it from weight_orig"),
        (nn.ConvTranspose2d(8, 8, 2), "1.weight", "transposed"),
        (nn.Bilinear(8, 8, 8), "1.weight", r"not a convolution or linear layer \(Bilinear\)"),
        (nn.Linear(8, 8, dtype=torch.complex64), "1.weight", "torch.complex64 is not a real floating-point type"),
        (nn.Conv2d(8, 16, 3, groups=8), "1.weight", "depthwise"),
    ],
)
def test_hard_limits_hold_against_explicit_globs(layer: nn.Module, parameter: str, reason: str) -> None:
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 8), nn.Linear(8, 2))
    selection = find_targets(model, TWO_FOUR)
    assert names(selection) == ["2.weight"]
    with pytest.raises(TargetError, match=reason):
        find_targets(model, TWO_FOUR, {"1": "2:4"})
    both = find_targets(model, TWO_FOUR, {"[12]": "2:4"})
    assert names(both) == ["2.weight"]
    assert re.search(reason, reasons(both)[parameter])


def test_subclasses_that_keep_forward_are_targets() -> None:
    model = nn.Sequential(nn.Linear(3, 8), Renamed(8, 8), nn.Linear(8, 2))
    assert names(find_targets(model, TWO_FOUR)) == ["1.weight"]


def test_attention_projections_are_targets() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2))
    attention, output, up, down = find_targets(model, Pattern(2, 4, 16)).targets
    assert (attention.name, attention.module, attention.kind) == ("1.self_attn.in_proj_weight", "1.self_attn", "linear")
    assert attention.pattern == Pattern(2, 4, 8)  # 24 rows
    assert [t.name for t in (output, up, down)] == [
        "1.self_attn.out_proj.weight",
        "1.linear1.weight",
        "1.linear2.weight",
    ]
    apart = nn.Sequential(nn.Linear(3, 8), nn.MultiheadAttention(8, 2, kdim=4, vdim=12), nn.Linear(8, 2))
    assert len(find_targets(apart, TWO_FOUR).targets) == 4


class Tied(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = nn.Linear(3, 8), first, second, nn.Linear(8, 2)
        second.weight = first.weight  # type: ignore[assignment]


def test_a_tied_weight_appears_once_when_its_uses_agree() -> None:
    model = Tied(nn.Linear(8, 8), nn.Linear(8, 8))
    assert names(find_targets(model, TWO_FOUR)) == ["first.weight"]
    assert names(find_targets(model, TWO_FOUR, {"second": "1:4"})) == ["first.weight"]
    shared = nn.Linear(8, 8)
    assert names(find_targets(nn.Sequential(nn.Linear(3, 8), shared, shared, nn.Linear(8, 2)), TWO_FOUR)) == [
        "1.weight"
    ]


def test_a_tied_weight_stays_dense_when_its_uses_disagree() -> None:
    model = Tied(nn.Embedding(8, 8), nn.Linear(8, 8))
    with pytest.raises(TargetError, match=r"shared by 'first.weight', 'second.weight', and 'first.weight' stays dense"):
        find_targets(model, TWO_FOUR)
    classifier = Tied(nn.Linear(8, 8), nn.Linear(8, 8))
    classifier.head = nn.Linear(8, 8)
    classifier.head.weight = classifier.first.weight
    with pytest.raises(TargetError, match=r"'head.weight' stays dense \(classifier\)"):
        find_targets(classifier, TWO_FOUR)
    assert names(find_targets(classifier, TWO_FOUR, {"first": "2:4"})) == ["first.weight"]


def test_globs_choose_patterns_and_the_last_match_wins() -> None:
    model = on_meta("resnet18")
    layers = {"*": "2:4", "layer3.*": "1:4/8", "layer3.1.conv2": "dense", "fc.weight": "1:16", "conv1": "dense"}
    selection = find_targets(model, Pattern(2, 4, 16), layers)
    chosen = {target.name: str(target.pattern) for target in selection.targets}
    assert chosen["layer1.0.conv1.weight"] == "2:4/16"
    assert chosen["layer3.0.conv1.weight"] == "1:4/8"
    assert chosen["fc.weight"] == "1:16/8"  # 1000 output channels
    left = reasons(selection)
    assert left == {
        "conv1.weight": "dense by layers: 'conv1'",
        "layer3.1.conv2.weight": "dense by layers: 'layer3.1.conv2'",
    }
    assert len(chosen) + len(left) == 21


def test_a_glob_reaches_the_layers_inside_a_module() -> None:
    selection = find_targets(on_meta("vit_tiny_patch16_224"), TWO_FOUR, {"blocks.0": "dense", "*.attn": "1:4"})
    patterns = {target.name: target.pattern.name for target in selection.targets}
    assert "blocks.0.mlp.fc1.weight" not in patterns
    assert patterns["blocks.0.attn.qkv.weight"] == patterns["blocks.11.attn.proj.weight"] == "1:4"
    assert patterns["blocks.1.mlp.fc1.weight"] == "2:4"


def test_matches_that_cannot_take_a_pattern_are_listed_while_others_can() -> None:
    selection = find_targets(on_meta("efficientnet_b0"), TWO_FOUR, {"blocks.1.*": "1:16"})
    left = reasons(selection)
    assert left["blocks.1.0.conv_dw.weight"].startswith("depthwise")
    assert left["blocks.1.1.conv_pw.weight"] == "24 input channels: not a multiple of 16"
    assert "blocks.1.0.conv_pw.weight" in names(selection)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            {"layer1.0.convv1": "2:4"},
            TargetError,
            r"'layer1.0.convv1' matches no layer .*Did you mean 'layer1.0.conv1'",
        ),
        ({"nothing.*": "dense"}, TargetError, r"'nothing\.\*' matches no layer"),
        ({"conv1": "2:4"}, TargetError, r"nothing that 'conv1' matches can take 2:4: 3 input channels"),
        ({"layer1.0.bn1": "2:4"}, TargetError, r"'layer1.0.bn1' matches can take 2:4: no weight with input channels"),
        ({"layer1.*": "4:2"}, PatternError, r"layers: 'layer1\.\*' = '4:2': .*less than M"),
        ({"layer1.*": "sparse"}, PatternError, r"'sparse' is not a pattern.*or \"dense\""),
        ({"*": "dense"}, TargetError, r"no layer takes 2:4: dense by layers: '\*' \(21x\)"),
    ],
)
def test_globs_that_cannot_be_meant(layers: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_targets(on_meta("resnet18"), TWO_FOUR, layers)


def test_a_dense_glob_over_layers_without_weights_does_no_harm() -> None:
    selection = find_targets(on_meta("resnet18"), TWO_FOUR, {"*.bn1": "dense"})
    assert len(selection.targets) == 19


def test_no_layer_at_all() -> None:
    with pytest.raises(TargetError, match="the model has no weights"):
        find_targets(nn.ReLU(), TWO_FOUR)
    with pytest.raises(TargetError, match=r"no layer takes 1:32: .*8 input channels: not a multiple of 32 \(1x\)"):
        find_targets(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)), Pattern(1, 32))
    with pytest.raises(TargetError, match=r"'1\.weight' has no shape yet"):
        find_targets(nn.Sequential(nn.Linear(3, 8), nn.LazyLinear(8)), TWO_FOUR)


def test_wrappers_do_not_show_in_names() -> None:
    model = small()
    plain = names(find_targets(model, TWO_FOUR))
    compiled = torch.compile(model)
    assert names(find_targets(compiled, TWO_FOUR)) == plain
    assert names(find_targets(nn.DataParallel(model), TWO_FOUR, {"1": "1:4"})) == plain
    assert unwrap(nn.DataParallel(compiled)) is model
    inner = small()
    inner[1] = torch.compile(inner[1])  # type: ignore[assignment]
    assert names(find_targets(inner, TWO_FOUR)) == plain
    for name in compiled.state_dict():
        assert clean_name(name) in model.state_dict()
    assert clean_name("module._orig_mod.layer1.0.conv1.weight") == "layer1.0.conv1.weight"
    assert clean_name("layer1.module.weight") == "layer1.module.weight"


@pytest.fixture
def process_group() -> object:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield None
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_is_fine_and_shards_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small()
    assert names(find_targets(nn.parallel.DistributedDataParallel(model), TWO_FOUR)) == ["1.weight", "3.weight"]
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(MethodError, match=r"'0.weight' is sharded .*DistributedDataParallel"):
        find_targets(model, TWO_FOUR)


def test_the_model_is_only_looked_at() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_targets(model, TWO_FOUR)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_a_pattern_the_same_layers_are_targets_whatever_divides_them() -> None:
    model = on_meta("efficientnet_b0")
    free, bound = find_targets(model, None), find_targets(model, TWO_FOUR)
    assert set(names(bound)) < set(names(free))
    left = reasons(free)
    assert {left[name] for name in reasons(bound) if name in left} <= {STEM, CLASSIFIER, DEPTHWISE}
    assert {reasons(bound)[name] for name in set(names(free)) - set(names(bound))} == {
        f"{odd} input channels: not a multiple of 4" for odd in (6, 10)
    }
    assert {(target.structured, target.label, target.note) for target in free.targets} == {(False, "unstructured", "")}
    with pytest.raises(AssertionError, match="has no pattern"):
        _ = free.targets[0].pattern


def test_without_a_pattern_globs_say_sparse_or_dense() -> None:
    selection = find_targets(small(), None, {"3": "dense", "0": "sparse", "4": " Sparse "})
    assert names(selection) == ["0.weight", "1.weight", "4.weight"]
    assert reasons(selection) == {"3.weight": "dense by layers: '3'"}
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    assert names(find_targets(depthwise, None, {"1": "sparse"})) == ["1.weight"]
    with pytest.raises(TargetError, match="'1' = '2:4': an unstructured method has no patterns"):
        find_targets(small(), None, {"1": "2:4"})
    with pytest.raises(TargetError, match="no layer can be sparse: stem"):
        find_targets(depthwise, None)
    with pytest.raises(TargetError, match=r"nothing that '0' matches can be sparse: .*transposed"):
        find_targets(nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 4)), None, {"0": "sparse"})
    with pytest.raises(PatternError, match="'sparse' is not a pattern"):
        find_targets(small(), TWO_FOUR, {"1": "sparse"})
