"""Which optimizers a pruner can ride on, and how it reads them. No method is named here.

A pruner keeps the sparse weights in place and acts from the optimizer's own step hooks. That equals training a dense
weight under a mask only if the optimizer treats every element by itself, and it happens at all only if the hooks fire.
What cannot work is refused when the pruner is attached, not discovered in the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lbc_cli.errors import MethodError

ELEMENTWISE = frozenset(
    {
        "ASGD",
        "AdaBelief",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "AdamWLegacy",
        "Adamax",
        "Adan",
        "Adopt",
        "AdoptW",
        "LaProp",
        "Lion",
        "MADGRAD",
        "NAdam",
        "NAdamLegacy",
        "NAdamW",
        "RAdam",
        "RAdamW",
        "RMSprop",
        "RMSpropTF",
        "Rprop",
        "SGD",
        "SGDW",
    }
)
_SECOND_ORDER = "evaluates the loss several times in a step"
_NORMS = "scales its update by norms of the whole weight, in which dense weights under a mask would count"
_MATRIX = "mixes the elements of a matrix in its update"
REFUSED = {
    "LBFGS": _SECOND_ORDER,
    "SAM": _SECOND_ORDER,
    "ASAM": _SECOND_ORDER,
    "GSAM": _SECOND_ORDER,
    "Lars": _NORMS,
    "LARS": _NORMS,
    "Lamb": _NORMS,
    "LAMB": _NORMS,
    "AdamP": _NORMS,
    "SGDP": _NORMS,
    "NovoGrad": _NORMS,
    "NvNovoGrad": _NORMS,
    "Adafactor": _MATRIX,
    "AdafactorBigVision": _MATRIX,
    "Adahessian": _MATRIX,
    "Mars": _NORMS,
    "Muon": _MATRIX,
    "Kron": _MATRIX,
    "SOAP": _MATRIX,
    "Shampoo": _MATRIX,
}


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer on which in-place masks would be wrong or the hooks would never run.

    Raises:
        MethodError: naming the optimizer, the reason and what to use instead.
    """
    name = type(optimizer).__name__
    reason = REFUSED.get(name)
    if reason is None and hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        reason = _SECOND_ORDER
    if reason is not None:
        raise MethodError(f"optimizer {name} {reason}: use an element-wise one such as SGD or AdamW")
    # torch marks the step function of every class whose __init__ ran Optimizer's: only those fire hooks.
    if not getattr(type(optimizer).step, "hooked", False):
        raise MethodError(
            f"optimizer {name} never fires torch's step hooks (a wrapper such as Lookahead, or one that does not "
            f"initialise torch.optim.Optimizer): attach to a plain torch or timm optimizer"
        )
    if name not in ELEMENTWISE:
        warnings.warn(
            f"optimizer {name} is not known to lbc: it is taken to update each element by itself", stacklevel=3
        )


def check_parameters(weights: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> dict[str, int]:
    """Find the parameter group of every weight.

    Args:
        weights: name and parameter of every target.
        optimizer: the one that trains them.

    Returns:
        Name -> index into `optimizer.param_groups`.

    Raises:
        MethodError: for a weight that the optimizer does not train, or one sharded by DTensor or FSDP.
    """
    index = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups: dict[str, int] = {}
    missing: list[str] = []
    for name, weight in weights:
        if _is_sharded(weight):
            raise MethodError(f"{name} is sharded ({type(weight).__name__}): N:M groups need whole weights; use DDP")
        if id(weight) in index and weight.requires_grad:
            groups[name] = index[id(weight)]
        else:
            missing.append(name)
    if missing:
        raise MethodError(
            f"{len(missing)} weights to sparsify are not trained by this optimizer, {missing[0]} first: give them to "
            f'the optimizer, or keep them dense with layers = {{"{missing[0]}" = "dense"}}'
        )
    return groups


def _is_sharded(weight: Tensor) -> bool:
    # By name: torch.distributed may be missing from a build, and importing it costs time.
    return type(weight).__name__ in {"DTensor", "FlatParameter"} or hasattr(weight, "_local_tensor")


def clear_state(optimizer: Optimizer, weight: nn.Parameter, removed: Tensor) -> None:
    """Zero what the optimizer remembers of removed weights, so that no momentum moves them.

    Args:
        optimizer: the one that trains `weight`.
        weight: [O, I, *K].
        removed: bool, shape of `weight`.
    """
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(removed, 0)


def peak_lr(group: dict[str, Any]) -> float:
    """The largest learning rate that a parameter group's scheduler will set, as far as it says.

    torch's one-cycle schedule says `max_lr`, other schedulers `initial_lr`, which timm multiplies by the group's
    `lr_scale`.
    """
    if "max_lr" in group:
        return float(group["max_lr"])
    if "initial_lr" in group:
        return float(group["initial_lr"]) * float(group.get("lr_scale", 1.0))
    return float(group["lr"])


def loss_scale(optimizer: Optimizer) -> tuple[float, bool]:
    """What a GradScaler left for a fused optimizer to do during this step.

    Such an optimizer divides the gradients itself and skips the update itself, inside the step; its hooks fire all the
    same, with scaled gradients.

    Returns:
        The factor that the gradients still carry, and whether this step overflowed and will change nothing.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    scale = getattr(optimizer, "grad_scale", None)
    overflow = found_inf is not None and bool(found_inf.item())
    return (1.0 if scale is None else float(scale.item())), overflow


def gradients(weights: Sequence[nn.Parameter], scale: float) -> list[Tensor]:
    """The gradients of weights that have one, divided by the loss scale."""
    grads = [w.grad for w in weights if w.grad is not None]
    return [g / scale for g in grads] if scale != 1.0 else grads
