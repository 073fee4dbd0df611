"""From a model to the weights that become N:M sparse, and the reason why each of the others stays dense.

Default policy: the weight of every Linear and Conv layer is a target, except the stem, the classifier, depthwise
convolutions, layers whose input channels per group are not a multiple of M, and layers that use something else than
their weight in forward (weight standardisation, parametrizations, subclasses nobody has checked). Globs change the
pattern layer by layer; they override the policy for stem and classifier, never what the algebra or the layer forbids.

Without a pattern (unstructured methods) the same layers are targets, those that no M divides included.

Legend
    weight      a parameter with two or more dimensions; all others (biases, norms) are never listed
    use         one place where a weight is registered; a tied weight has several
    obstacle    why a use cannot be sparse whatever the policy says
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from lbc_cli.errors import MethodError, PatternError, TargetError, did_you_mean
from lbc_cli.patterns import Pattern

Kind = Literal["linear", "conv1d", "conv2d", "conv3d"]

_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION_WEIGHTS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})

# Subclasses with a forward of their own that still multiply by the weight as it is stored. Names, not classes: timm
# need not be there.
_PLAIN = frozenset(
    {
        "timm.layers.conv2d_same.Conv2dSame",
        "timm.layers.conv2d_same.Conv2dSameExport",
        "timm.layers.linear.Linear",
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    }
)
_STANDARDISED = frozenset(
    f"timm.layers.std_conv.{name}" for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
)
_INNER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")

DENSE = "dense"
SPARSE = "sparse"
STEM = "stem: it sees the image"
CLASSIFIER = "classifier"
DEPTHWISE = "depthwise convolution: one input channel per group"
UNSTRUCTURED = "unstructured"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A weight that becomes sparse.

    Attributes:
        name: of the parameter, as the unwrapped model's `named_parameters` spells it.
        module: name of the layer that owns it ("" for the model itself).
        kind: which product the weight takes part in.
        wanted: N:M with the vector length that this layer can take; None for a method without a pattern.
        weight: the parameter itself, [O, I, *K].
        groups: convolution groups, 1 for linear layers.
        note: what differs from the request, or "".
    """

    name: str
    module: str
    kind: Kind
    wanted: Pattern | None
    weight: nn.Parameter
    groups: int
    note: str = ""

    @property
    def pattern(self) -> Pattern:
        """N:M of this layer; methods without a pattern never ask for it."""
        assert self.wanted is not None, f"{self.name} has no pattern"
        return self.wanted

    @property
    def structured(self) -> bool:
        """Whether the weight takes a pattern."""
        return self.wanted is not None

    @property
    def label(self) -> str:
        """What it takes, in words: "2:4", "1:16/4" or "unstructured"."""
        return UNSTRUCTURED if self.wanted is None else str(self.wanted)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A weight that stays dense, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """Every weight of a model, in registration order, on one side or the other."""

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    owner: str
    attribute: str
    module: nn.Module

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1)) if isinstance(self.module, tuple(_KINDS)) else 1

    def matches(self, glob: str) -> bool:
        """Whether a glob names the parameter, its layer, or a module around that layer."""
        parts = self.owner.split(".")
        around = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        return any(fnmatchcase(name, glob) for name in (self.name, *around))


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    parameter: nn.Parameter
    uses: tuple[_Use, ...]

    @property
    def name(self) -> str:
        return self.uses[0].name

    def matches(self, glob: str) -> bool:
        return any(use.matches(glob) for use in self.uses)


@dataclass(frozen=True, slots=True)
class _Rule:
    glob: str
    pattern: Pattern | None
    dense: bool = False


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, in any nesting."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def clean_name(name: str) -> str:
    """A module, parameter or state-dict name without what wrappers put into it ("module.", "_orig_mod.").

    Meant for names that come from a wrapped model: a leading "module." is always taken for DDP's.
    """
    name = _clean_inner(name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def find_targets(model: nn.Module, pattern: Pattern | None, layers: Mapping[str, str] | None = None) -> Selection:
    """Divide the weights of a model into sparse and dense.

    Args:
        model: any model; wrapped by DDP or torch.compile is fine. It is only looked at.
        pattern: what every target takes unless `layers` says otherwise; None for a method without a pattern.
        layers: globs over names of parameters, of layers and of modules around them, each with "N:M", "N:M/V" or
            "dense". The last glob that matches wins. Without a V of its own an entry takes that of `pattern`. Where
            there is no pattern, "sparse" makes a target of what would stay dense by default, depthwise ones included.

    Returns:
        Every parameter with two or more dimensions, as a target or as skipped with its reason.

    Raises:
        TargetError: if nothing takes the pattern, a glob matches nothing, no match of a glob can take its pattern, or
            an entry of `layers` is a pattern where there is none.
        PatternError: if an entry of `layers` is not a pattern.
        MethodError: if the parameters are sharded (FSDP, DTensor).
    """
    inner = unwrap(model)
    _refuse_sharded(inner)
    weights = _weights(inner)
    rules = [_parse_rule(glob, value, pattern) for glob, value in (layers or {}).items()]
    for rule in rules:
        _check_rule(rule, inner, weights)
    roles = _roles(inner, weights) | (_depthwise(weights) if pattern is None else {})
    decisions = [_decide(weight, _last_match(weight, rules), pattern, roles) for weight in weights]
    skipped = tuple(d for d in decisions if isinstance(d, Skipped))
    targets = tuple(d for d in decisions if isinstance(d, Target))
    if not targets:
        raise TargetError(_nothing_matched(pattern, skipped))
    return Selection(targets, skipped)


def matching(model: nn.Module, globs: Iterable[str]) -> set[str]:
    """Names of the parameters with two or more dimensions that a glob names, as in `layers` of `find_targets`."""
    wanted = list(globs)
    return {weight.name for weight in _weights(unwrap(model)) if any(weight.matches(glob) for glob in wanted)}


def _clean_inner(name: str) -> str:
    for prefix in _INNER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def _refuse_sharded(model: nn.Module) -> None:
    names = [name for name, parameter in model.named_parameters() if _is_sharded(name, parameter)]
    if names:
        raise MethodError(
            f"parameter {names[0]!r} is sharded over processes (FSDP or DTensor): a group of M weights would be cut "
            f"apart; train in one process or under DistributedDataParallel"
        )


def _is_sharded(name: str, parameter: nn.Parameter) -> bool:
    if "_fsdp_wrapped_module" in name or "_flat_param" in name:
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _weights(model: nn.Module) -> list[_Weight]:
    """Parameters with two or more dimensions in the order of `named_parameters`, tied ones once."""
    uses: dict[nn.Parameter, list[_Use]] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            use = _Use(_clean_inner(owner + ".").removesuffix("."), attribute, module)
            if isinstance(parameter, UninitializedParameter):
                raise TargetError(
                    f"parameter {use.name!r} has no shape yet: run one batch through the lazy layers first"
                )
            if parameter.dim() >= 2:
                uses.setdefault(parameter, []).append(use)
    return [_Weight(parameter, tuple(places)) for parameter, places in uses.items()]


def _parse_rule(glob: str, value: str, default: Pattern | None) -> _Rule:
    word = value.strip().lower()
    if word == DENSE:
        return _Rule(glob, None, dense=True)
    if default is None:
        if word == SPARSE:
            return _Rule(glob, None)
        raise TargetError(
            f'layers: {glob!r} = {value!r}: an unstructured method has no patterns; write "{SPARSE}" or "{DENSE}"'
        )
    try:
        return _Rule(glob, Pattern.parse(value, default.vector))
    except PatternError as error:
        raise PatternError(f'layers: {glob!r} = {value!r}: {error}; or "dense"') from None


def _last_match(weight: _Weight, rules: Sequence[_Rule]) -> _Rule | None:
    return next((rule for rule in reversed(rules) if weight.matches(rule.glob)), None)


def _check_rule(rule: _Rule, model: nn.Module, weights: Iterable[_Weight]) -> None:
    """A glob must name something, and a pattern must find at least one weight that can take it."""
    matched = [weight for weight in weights if weight.matches(rule.glob)]
    if not matched:
        names = [_clean_inner(f"{name}.").removesuffix(".") for name, _ in model.named_modules() if name]
        known = [*names, *(_clean_inner(name) for name, _ in model.named_parameters())]
        if not any(fnmatchcase(name, rule.glob) for name in known):
            raise TargetError(f"layers: {rule.glob!r} matches no layer of the model.{did_you_mean(rule.glob, names)}")
    if rule.dense:
        return
    reasons = [_why_dense(weight, rule.pattern, {}) for weight in matched]
    if all(reasons):
        why = _most_frequent(filter(None, reasons)) or "no weight with input channels"
        can = f"can take {rule.pattern}" if rule.pattern else "can be sparse"
        raise TargetError(f"layers: nothing that {rule.glob!r} matches {can}: {why}")


def _roles(model: nn.Module, weights: Sequence[_Weight]) -> dict[str, str]:
    """Names of the layers that the default policy leaves dense -> why.

    timm names them in `pretrained_cfg`. A timm model whose classifier is not listed or not there (feature extractors,
    num_classes = 0) has none. Other models: the first layer sees the image, the last Linear classifies.
    """
    owners = [use.owner for weight in weights for use in weight.uses if isinstance(use.module, tuple(_KINDS))]
    linear = [use.owner for weight in weights for use in weight.uses if isinstance(use.module, nn.Linear)]
    config = _timm_config(model)
    stem = _inside(owners, config.get("first_conv"), first_only=True) or owners[:1]
    classifier = _inside(owners, config.get("classifier")) if config else linear[-1:]
    return {**dict.fromkeys(classifier, CLASSIFIER), **dict.fromkeys(stem, STEM)}


def _depthwise(weights: Sequence[_Weight]) -> dict[str, str]:
    """Names of depthwise layers -> why they stay dense unless told otherwise: they hold few weights."""
    uses = [(weight, use) for weight in weights for use in weight.uses]
    return {use.owner: DEPTHWISE for weight, use in uses if use.groups > 1 and weight.parameter.shape[1] == 1}


def _timm_config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "pretrained_cfg", None) or {}
    return config if isinstance(config, Mapping) else vars(config)


def _inside(owners: Sequence[str], listed: str | Iterable[str] | None, *, first_only: bool = False) -> list[str]:
    """The layers that `listed` names, or those inside the modules that it names."""
    entries = (listed,) if isinstance(listed, str) else tuple(listed or ())
    found: list[str] = []
    for entry in entries:
        inside = [owner for owner in owners if owner == entry or owner.startswith(f"{entry}.")]
        found += inside[:1] if first_only else inside
    return found


def _decide(weight: _Weight, rule: _Rule | None, default: Pattern | None, roles: Mapping[str, str]) -> Target | Skipped:
    pattern = rule.pattern if rule else default
    if rule is not None and rule.dense:
        reason: str | None = f"dense by layers: {rule.glob!r}"
    else:
        reason = _why_dense(weight, pattern, {} if rule else roles)
    return Skipped(weight.name, tuple(weight.parameter.shape), reason) if reason else _target(weight, pattern)


def _target(weight: _Weight, pattern: Pattern | None) -> Target:
    use = weight.uses[0]
    fitted, note = (None, "") if pattern is None else _fit_vector(weight, pattern)
    return Target(
        name=weight.name,
        module=use.owner,
        kind=_kind(use.module) or "linear",
        wanted=fitted,
        weight=weight.parameter,
        groups=use.groups,
        note=note,
    )


def _fit_vector(weight: _Weight, pattern: Pattern) -> tuple[Pattern, str]:
    """The pattern with the vector length that the output channels can take, and a note if it is another one."""
    groups = weight.uses[0].groups
    outputs = weight.parameter.shape[0] // groups
    vector = math.gcd(outputs, pattern.vector)
    per_group = " per group" if groups > 1 else ""
    note = f"vector {pattern.vector} -> {vector}: {outputs} output channels{per_group}"
    return pattern.with_vector(vector), "" if vector == pattern.vector else note


def _why_dense(weight: _Weight, pattern: Pattern | None, roles: Mapping[str, str]) -> str | None:
    """The reason why a weight cannot or should not take the pattern, None if it can. A tied weight needs all uses."""
    parameter = weight.parameter
    reasons = [roles.get(use.owner) or _obstacle(use) or _misfit(parameter, use.groups, pattern) for use in weight.uses]
    if all(reasons):
        return reasons[0]
    shared = f"shared by {', '.join(repr(use.name) for use in weight.uses)}"
    for use, reason in zip(weight.uses, reasons, strict=True):
        if reason:
            return f"{shared}, and {use.name!r} stays dense ({reason})"
    if len({(_kind(use.module), use.groups) for use in weight.uses}) > 1:
        return f"{shared}, which are layers of different kinds"
    return None


def _role(use: _Use, roles: Mapping[str, str]) -> str | None:
    return roles.get(use.owner) if use.attribute == "weight" else None


def _kind(module: nn.Module) -> Kind | None:
    return next((kind for base, kind in _KINDS.items() if isinstance(module, base)), None)


def _obstacle(use: _Use) -> str | None:
    """Why this use does not multiply by the weight as it is stored, None if it does."""
    module, cls = use.module, type(use.module)
    if isinstance(module, ParametrizationList):
        return "parametrized: the layer's weight is computed from it in forward"
    if isinstance(module, _TRANSPOSED):
        return "transposed convolution: its input channels are not in dimension 1"
    if isinstance(module, nn.MultiheadAttention) and use.attribute in _ATTENTION_WEIGHTS:
        return None if cls.forward is nn.MultiheadAttention.forward else _unknown(cls)
    base = next((base for base in _KINDS if isinstance(module, base)), None)
    if base is None:
        return f"not a convolution or linear layer ({cls.__name__})"
    if use.attribute != "weight":
        return _not_the_weight(use)
    return _own_forward(cls, base)


def _not_the_weight(use: _Use) -> str:
    name = type(use.module).__name__
    if "weight" not in use.module._parameters:
        return f"{name} transforms its weight in forward: recomputes it from {use.attribute}"
    return f"not the weight of its {name}"


def _own_forward(cls: type[nn.Module], base: type[nn.Module]) -> str | None:
    for ancestor in cls.__mro__:
        if ancestor is base:
            return None
        qualified = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if qualified in _STANDARDISED:
            return f"{cls.__name__} transforms its weight in forward: weight standardisation"
        if qualified in _PLAIN:
            return None
        if vars(ancestor).keys() & {"forward", "_conv_forward", "__call__", "weight"}:
            return _unknown(cls)
    return None


def _unknown(cls: type[nn.Module]) -> str:
    return f"{cls.__name__} has a forward of its own: it may transform its weight"


def _misfit(parameter: nn.Parameter, groups: int, pattern: Pattern | None) -> str | None:
    """Why the pattern does not go into a weight [O, I, *K], None if it does."""
    inputs = parameter.shape[1]
    if not parameter.is_floating_point():
        return f"dtype {parameter.dtype} is not a real floating-point type"
    if pattern is None:
        return None if parameter.numel() else "empty"
    if groups > 1 and inputs == 1:
        return DEPTHWISE
    if inputs == 0 or inputs % pattern.m:
        per_group = " per group" if groups > 1 else ""
        return f"{inputs} input channel{'s' * (inputs != 1)}{per_group}: not a multiple of {pattern.m}"
    return None


def _most_frequent(reasons: Iterable[str], most: int = 3) -> str:
    return "; ".join(f"{reason} ({count}x)" for reason, count in Counter(reasons).most_common(most))


def _nothing_matched(pattern: Pattern | None, skipped: Sequence[Skipped]) -> str:
    why = _most_frequent(s.reason for s in skipped) or "the model has no weights"
    if pattern is None:
        return f"no layer can be sparse: {why}; choose another model, or name layers explicitly in `layers`"
    return f"no layer takes {pattern}: {why}; choose a smaller M, another model, or name layers explicitly in `layers`"
