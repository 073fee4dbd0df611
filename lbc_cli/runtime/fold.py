"""Batch norm folded into the convolution before it: an exact rewriting in eval mode that leaves zeros where they are.

    bn(conv(x)) = scale * (W x + b - mean) + beta,   scale = gamma / sqrt(var + eps)
                = (scale * W) x + (scale * (b - mean) + beta)

A row of the weight is multiplied by one number, so N:M patterns survive. It is done to dense and sparse models alike,
so that no comparison between them is about folding. A convolution is folded only where one forward pass has shown that
its result goes nowhere but into that batch norm, and both are called once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbc_cli.runtime.trace import Trace


def fold_batch_norms(model: nn.Module, seen: Trace) -> list[str]:
    """Fold every batch norm that can be, in place.

    Args:
        model: in eval mode; weights in float32 or wider, as folding rounds.
        seen: of this model.

    Returns:
        Names of the batch norms that are gone. What a norm did besides (timm's fused activations) stays in its place.
    """
    folded = []
    modules = dict(model.named_modules())
    for name, use in seen.uses.items():
        conv = modules[name]
        if not isinstance(conv, nn.Conv2d) or use.calls != 1 or len(use.consumers) != 1:
            continue
        norm_name = use.consumers[0]
        norm = modules.get(norm_name)
        if norm_name and norm_name not in folded and _is_plain_norm(norm):
            _fold(conv, norm)
            model.set_submodule(norm_name, _rest(norm))
            folded.append(norm_name)
    return folded


def _is_plain_norm(norm: nn.Module | None) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and not norm.training


def _fold(conv: nn.Conv2d, norm: nn.Module | None) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        before = conv.bias.double() if conv.bias is not None else torch.zeros_like(scale)
        shift = (before - norm.running_mean.double()) * scale
        shift = shift if norm.bias is None else shift + norm.bias.double()
        conv.weight = nn.Parameter(_scaled(conv.weight, scale), requires_grad=False)
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Rows times a number each; what was zero is +0.0 after."""
    product = (weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    return product.masked_fill_(weight == 0, 0)


def _rest(norm: nn.Module | None) -> nn.Module:
    """What a norm does after normalising: nothing, or timm's dropout and activation."""
    parts = [part for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)]
    parts = [part for part in parts if not isinstance(part, nn.Identity)]
    if len(parts) > 1:
        return nn.Sequential(*parts)
    return parts[0] if parts else nn.Identity()
