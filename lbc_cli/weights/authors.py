"""Checkpoints of the authors' LBC code, github.com/zyxxmu/LBC, read there at commit 9887b3b (2022).

A sparse layer X of theirs (NMConv for every convolution of a ResNet but the stem; NMLinear for qkv, proj, fc1 and fc2
of DeiT-small) has three parameters in the state dict:

    X.weight      [O, I, *K], dense: removed weights keep their values, and only the forward pass masks them
    X.alpha       [G, C], one score for each of the C = C(M, N) candidates of each of the G = O*prod(K)*I/M groups;
                  groups in the order (o, k, i), M consecutive input channels each, as in our own format
    X.index_list  [C, M] of 0 and 1: which positions a candidate keeps, candidates in lexicographic order; never trained

Their forward pass keeps a position when the *sum* of the scores of the candidates that contain it is not zero (removed
candidates score exactly 0), and multiplies the weight by that mask. This module computes the same sum in float32 and
takes N and M from index_list; where removed, the weight becomes +0.0 where theirs is +-0.0.

A run that has ended has one candidate left in every group, and the mask is N:M. A file written before t_f, an averaged
model (their averages never reach zero), and now and then a group in a DeiT file (its scores go on moving) have more:
the tensors are still exactly what their forward pass multiplies by, but need not hold N:M; conversion then refuses.

Files: {"state_dict", "best_acc", "best_acc_top1", "optimizer", "epoch", "args.k"} for ResNets, names with "module." in
front when trained on one GPU; {"model", "model_ema", "optimizer", "args", ...} for DeiT. Names are torchvision's and
timm's: resnet18, resnet50, deit_small_patch16_224 (vit_deit_small_patch16_224 in their fork of timm).

Assumed: their evaluation of DeiT under autocast rounds scores to float16 before the sum; that rounding is not repeated.
Where M does not divide I, their groups straddle kernel positions: the mask is applied, and no pattern is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lbc_cli.errors import CheckpointError, PatternError
from lbc_cli.patterns import Pattern
from lbc_cli.weights.base import Decoded, without_negative_zeros

SCORES, CANDIDATES = ".alpha", ".index_list"


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any layer carries candidate scores."""
    return any(name.endswith(SCORES) and name.removesuffix(SCORES) + CANDIDATES in tensors for name in tensors)


def decode(tensors: Mapping[str, Tensor]) -> Decoded:
    """Apply the masks that the scores imply.

    Raises:
        CheckpointError: if scores, candidates and weights do not belong together.
    """
    layers = sorted(
        {name.removesuffix(part) for name in tensors for part in (SCORES, CANDIDATES) if name.endswith(part)}
    )
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((SCORES, CANDIDATES))}
    patterns: dict[str, Pattern] = {}
    masks: dict[str, Tensor] = {}
    notes: list[str] = []
    for layer in layers:
        name = f"{layer}.weight"
        weight, scores, candidates = _parts(layer, tensors)
        pattern = _pattern(layer, candidates)
        mask = _mask(layer, weight, scores, candidates, pattern)
        plain[name] = without_negative_zeros(weight, mask)
        if weight.shape[1] % pattern.m:
            notes.append(f"{name}: groups of {pattern.m} straddle its {weight.shape[1]} input channels: no pattern")
            continue
        patterns[name], masks[name] = pattern, mask
        if several := int(((scores != 0).sum(dim=1) > 1).sum()):
            notes.append(f"{name}: {several} of {len(scores)} groups still have several candidates")
    return Decoded(tensors=plain, patterns=patterns, masks=masks, notes=tuple(notes))


def _parts(layer: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    names = [layer + part for part in (".weight", SCORES, CANDIDATES)]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"layer {layer} of an LBC checkpoint has no {missing[0]}")
    weight, scores, candidates = (tensors[name] for name in names)
    for name, tensor in zip(names, (weight, scores, candidates), strict=True):
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} is {tensor.dtype} or holds what is not finite: real numbers are needed")
    return weight, scores.to(torch.float32), candidates.to(torch.float32)


def _pattern(layer: str, candidates: Tensor) -> Pattern:
    """N and M from the table of candidates."""
    name = layer + CANDIDATES
    if candidates.dim() != 2 or not bool(((candidates == 0) | (candidates == 1)).all()):
        raise CheckpointError(f"{name} is not a table of 0 and 1, a row for each candidate")
    kept = {int(count) for count in candidates.sum(dim=1)}
    try:
        pattern = Pattern(kept.pop() if len(kept) == 1 else 0, candidates.shape[1])
    except PatternError as error:
        raise CheckpointError(f"{name} holds candidates of no N:M pattern: {error}") from error
    if len(candidates) != pattern.num_candidates or len(torch.unique(candidates, dim=0)) != len(candidates):
        raise CheckpointError(f"{name} holds {len(candidates)} candidates: {pattern} has {pattern.num_candidates}")
    return pattern


def _mask(layer: str, weight: Tensor, scores: Tensor, candidates: Tensor, pattern: Pattern) -> Tensor:
    """Bool [O, I, *K]: where the sum of the scores is not zero."""
    if weight.dim() < 2 or weight.numel() % pattern.m:
        raise CheckpointError(f"{layer}.weight {list(weight.shape)} does not divide into groups of {pattern.m}")
    expected = (weight.numel() // pattern.m, pattern.num_candidates)
    if tuple(scores.shape) != expected:
        raise CheckpointError(f"{layer}{SCORES} is {list(scores.shape)}: {list(expected)} belong to the weight")
    out, inputs, *kernel = weight.shape
    # Any value times 0 is 0: a removed candidate adds nothing, as in their alpha * (alpha != 0).
    kept = (scores @ candidates).reshape(out, *kernel, inputs) != 0
    return kept.movedim(-1, 1).contiguous()
