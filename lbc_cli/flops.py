"""Parameters and multiply-adds of a model, dense and sparse, at test time and over training.

Counted by torch's own FLOP counter, which counts two FLOPs for a multiply-add. What the N:M literature calls FLOPs are
multiply-adds: everything here is in MACs, for one image. Norms, activations and pooling are not counted.

These are figures on paper: what dense kernels execute does not change, and time saved is another column.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lbc_cli.errors import ModelError
from lbc_cli.targets import unwrap

FLOPS_PER_MAC = 2


@dataclass(frozen=True, slots=True)
class Cost:
    """What one image costs in a forward pass of the dense model.

    Attributes:
        macs: multiply-adds in which each weight takes part, by parameter name, in registration order.
        other_macs: products of activations with activations (attention).
        params: number of elements of every parameter, by name; tied ones once.
    """

    macs: Mapping[str, int]
    other_macs: int
    params: Mapping[str, int]

    @property
    def total_macs(self) -> int:
        """Multiply-adds of the whole forward pass."""
        return sum(self.macs.values()) + self.other_macs

    @property
    def total_params(self) -> int:
        """Number of parameters, norms and biases included."""
        return sum(self.params.values())


@dataclass(frozen=True, slots=True)
class Totals:
    """Multiply-adds of a forward pass and parameters, of one variant of a model."""

    macs: int
    params: int


def count(model: nn.Module, input_size: tuple[int, ...]) -> Cost:
    """Count a forward pass on one image, in evaluation mode, on a copy without memory ("meta" tensors).

    The model is not run and not changed; its forward hooks are not called.

    Args:
        model: any model whose forward takes one tensor.
        input_size: [C, H, W] of that tensor, without the batch dimension.

    Returns:
        Multiply-adds by weight and parameters by name, names as the unwrapped model spells them.

    Raises:
        ModelError: if the model cannot run on such an input.
    """
    inner = unwrap(model)
    twin, weights = _meta_twin(inner)
    macs = dict.fromkeys(weights.values(), 0)
    other = 0
    for name, flops in _run(twin, weights, input_size).items():
        if name is None:
            other = flops // FLOPS_PER_MAC
        else:
            macs[name] = flops // FLOPS_PER_MAC
    params = {name: parameter.numel() for name, parameter in inner.named_parameters()}
    return Cost(macs, other, params)


def _meta_twin(model: nn.Module) -> tuple[nn.Module, dict[StorageWeakRef, str]]:
    """A copy of the model that holds no data, and the storage of each of its weights -> the parameter's name."""
    memo: dict[int, Any] = {}
    weights: dict[StorageWeakRef, str] = {}
    for name, parameter in model.named_parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        if parameter.dim() >= 2:
            weights[_storage(empty)] = name
    for module in model.modules():
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo.setdefault(id(value), torch.empty_like(value, device="meta", requires_grad=False))
        _drop_hooks(module, memo)
    return copy.deepcopy(model, memo).eval(), weights


def _drop_hooks(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let the copy have no hooks but those of torch.nn.utils, which compute weights."""
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, name)
        kept = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")}
        memo[id(hooks)] = type(hooks)(kept)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class _Formula:
    """A FLOP formula of torch that also tells which tensors it was asked about."""

    _get_raw = True  # torch's counter passes tensors, not shapes

    def __init__(self, formula: Callable[..., int], note: Callable[[tuple[Any, ...], int], None]) -> None:
        self.formula = formula
        self.note = note

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        flops = self.formula(*args, **kwargs)
        self.note(args, flops)
        return flops


def _run(twin: nn.Module, weights: Mapping[StorageWeakRef, str], input_size: tuple[int, ...]) -> Counter[str | None]:
    """FLOPs by weight of one forward pass; None for those without a weight."""
    flops: Counter[str | None] = Counter()
    active = _follow(twin, weights)

    def note(args: tuple[Any, ...], spent: int) -> None:
        stores = [_storage(arg) for arg in args if isinstance(arg, Tensor)]
        named = next((weights[store] for store in stores if store in weights), None)
        flops[named or (active[-1] if active else None)] += spent

    counter = FlopCounterMode(display=False, custom_mapping={op: _Formula(f, note) for op, f in flop_registry.items()})
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, *input_size, dtype=dtype, device="meta")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
            twin(image)
    except Exception as error:
        size, reason = " x ".join(map(str, input_size)), (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot count FLOPs: {type(twin).__name__} does not run on an input of {size}: {reason}"
        ) from error
    return flops


def _follow(twin: nn.Module, weights: Mapping[StorageWeakRef, str]) -> list[str]:
    """A stack, kept while the twin runs, with the main weight of the layer that is running.

    It names the products of layers that transform their weight, for there the product never meets the parameter.
    """
    active: list[str] = []
    for module in twin.modules():
        if not isinstance(module, _ConvNd | nn.Linear) and next(module.children(), None) is not None:
            continue
        own = [parameter for parameter in module.parameters() if parameter.dim() >= 2]
        if own:
            name = weights[_storage(max(own, key=Tensor.numel))]
            module.register_forward_pre_hook(lambda *_, name=name: active.append(name), prepend=True)
            module.register_forward_hook(lambda *_: active.pop() and None)
    return active


def dense_totals(cost: Cost) -> Totals:
    """The dense model's multiply-adds and parameters."""
    return Totals(cost.total_macs, cost.total_params)


def sparse_totals(cost: Cost, densities: Mapping[str, float]) -> Totals:
    """Multiply-adds and parameters when weights are kept in part; every other product and parameter counts in full.

    ResNet-50, 224 px, 1:16 with stem and classifier dense, against Table 4 of LBC:

                        parameters                       multiply-adds
        dense           25.56 M (paper 25.6)             4.09 G (paper 4.10)
        1:16            3.58 M, of which 0.05 M norms    0.37 G (paper 0.44)
                        (paper 3.52: without norms)

    0.37 G is 0.118 G of stem + 0.002 G of classifier + 3.969 G / 16. The paper's 3.52 M fixes the same choice of dense
    layers, so that its 0.44 G must be counted in another way, which it does not state.

    Args:
        cost: from `count`.
        densities: parameter name -> kept share, each in [0, 1].

    Raises:
        KeyError: if a name is not a weight of the model that was counted.
    """
    macs, params = cost.total_macs, cost.total_params
    for name, density in densities.items():
        macs -= cost.macs[name] - round(cost.macs[name] * density)
        params -= cost.params[name] - round(cost.params[name] * density)
    return Totals(macs, params)


def step_share(density: float, sparse_passes: int) -> float:
    """What a training step costs with a weight of some density, as a share of a step with the dense weight.

    A dense step is three units: with every weight it makes the output, the gradient of the input and the gradient of
    the weight. A pass that is counted sparse costs the density d, the others 1, so that k sparse passes make
    (k d + 3 - k) / 3. What is counted is a convention, not a property of hardware, and the literature has several:

        k = 0   1               all dense: training with all weights (dense; ASP before it prunes; MaskLLM)
        k = 1   (d + 2) / 3     SR-STE as LBC's Tables 1 and 5 count it: only the output. Its gradient of the input
                                meets the sparse weight as well, so that k = 2 would be as good
        k = 2   (2 d + 1) / 3   LBC and DNW: output and gradient of the input. DNW needs the gradient of every weight;
                                LBC only of those still alive, but a product that gives a sparse result saves nothing
                                on hardware that is made for sparse operands. No convention gives the paper's figures
                                for LBC; this one comes closest
        k = 3   d               ASP after it has pruned, GMP, STR: removed weights need no gradient. The paper's 1.24
                                for ASP is this, or near it: 100 dense epochs and 100 sparse ones at 2:4, of 120: 1.25

    RigL needs the gradient of every weight in one of dT updates, with k = 2, and has k = 3 in the others; its authors,
    who make no update of the weights in that one, count (3 d dT + 2 d + 1) / (3 (dT + 1)).

    Args:
        density: kept share of the weight, in [0, 1].
        sparse_passes: k, from 0 to 3.

    Raises:
        ValueError: for another number of passes.
    """
    if not 0 <= sparse_passes <= 3:
        raise ValueError(f"{sparse_passes} sparse passes of 3: there are 0 to 3")
    return (sparse_passes * density + 3 - sparse_passes) / 3


def model_share(cost: Cost, shares: Mapping[str, float]) -> float:
    """What a step, or a forward pass, of the whole model costs as a share of the dense model's.

    Args:
        cost: from `count`.
        shares: name of a weight -> share of its dense cost; every other product counts in full.

    Raises:
        KeyError: if a name is not a weight of the model that was counted.
    """
    total = cost.total_macs
    saved = sum(cost.macs[name] * (1 - share) for name, share in shares.items())
    return (total - saved) / total if total else 1.0
