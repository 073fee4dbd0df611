"""Names and shapes against timm: the model is created without memory, and says which layers take the pattern.

Arguments come from the artefact where it has them (manifest, `config.json`). What it does not say is read off its
tensors, and said: another number of classes, no classifier at all, other than three image channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lbc_cli.errors import TargetError
from lbc_cli.verifier.artefact import Artefact, contents
from lbc_cli.verifier.checkpoint import commonest_rule
from lbc_cli.verifier.choice import LayerRules
from lbc_cli.verifier.contents import Content
from lbc_cli.verifier.folder import creation
from lbc_cli.verifier.groups import Rule
from lbc_cli.verifier.report import Finding, Report
from lbc_cli.verifier.rules import read_claims
from lbc_cli.verifier.semi_structured import semi_structured_model

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]


def check_model(artefact: Artefact, name: str, rules: LayerRules, report: Report) -> LayerRules:
    """Compare names and shapes with a timm model.

    Args:
        artefact: open.
        name: timm name.
        rules: as asked for.
        report: findings and `model` are added.

    Returns:
        The rules with what the model says of each parameter.

    Raises:
        ModelError: if timm has no such model.
        TargetError: if no layer of it can take the pattern, or a glob matches none.
    """
    found = {content.name: content for content in contents(artefact)}
    shapes = {content.name: content.shape for content in found.values()}
    arch, kwargs = built_as(artefact)
    if arch is not None and _base(arch) != _base(name):
        report.add(Finding("model", "", f"{report.path} says that it is {arch}, not {name}", 1, "warning"))
        kwargs = {}
    model, kwargs = _create(name, kwargs, shapes, report)
    _compare(model, name, found, artefact.kind == "onnx", report)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report.model = {"name": name, "kwargs": kwargs, "parameters": parameters}
    return _with_model(model, rules, artefact)


def built_as(artefact: Artefact) -> tuple[str | None, dict[str, Any]]:
    """The timm name and arguments that an artefact gives for its model; None and none where it gives none."""
    if artefact.kind == "packed":
        claims = read_claims(artefact.source)
        return claims.arch, dict(claims.kwargs)
    if artefact.kind == "semi-structured":
        return semi_structured_model(artefact.source)
    if artefact.kind == "folder":
        return artefact.config["architecture"], creation(artefact.config)
    return None, {}


def _base(name: str) -> str:
    return name.partition(".")[0]


def _create(name: str, kwargs: dict[str, Any], shapes: Shapes, report: Report) -> tuple[nn.Module, dict[str, Any]]:
    """The model, with the arguments that the artefact gives or its tensors show."""
    model = _build(name, kwargs)
    config = getattr(model, "pretrained_cfg", None) or {}
    shown = {**_classes(model, config, shapes), **_channels(model, config, shapes)}
    read_off = {key: value for key, value in shown.items() if key not in kwargs}
    if not read_off:
        return model, kwargs
    said = ", ".join(f"{key}={value}" for key, value in read_off.items())
    report.add(Finding("model", "", f"{name} is taken with {said}, as the tensors show: not its default", 1, "warning"))
    kwargs = {**kwargs, **read_off}
    return _build(name, kwargs), kwargs


def _build(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    import torch

    from lbc_cli import models

    with torch.device("meta"):
        return models.create(name, kwargs=kwargs)


def _classes(model: nn.Module, config: Mapping[str, Any], shapes: Shapes) -> dict[str, int]:
    """Another number of classes than the model's own, if the tensors show one; 0 where there is no classifier."""
    own = model.state_dict()
    weights = [f"{layer}.weight" for layer in _names(config.get("classifier")) if f"{layer}.weight" in own]
    if not weights:
        return {}
    sizes = {shapes[weight][0] if shapes.get(weight) else 0 for weight in weights}
    if len(sizes) != 1 or sizes == {own[weights[0]].shape[0]}:
        return {}
    return {"num_classes": sizes.pop()}


def _channels(model: nn.Module, config: Mapping[str, Any], shapes: Shapes) -> dict[str, int]:
    """Other than the model's own image channels, if the stem shows them."""
    own = model.state_dict()
    for layer in _names(config.get("first_conv"))[:1]:
        weight = own.get(f"{layer}.weight")
        shape = shapes.get(f"{layer}.weight", ())
        if weight is not None and len(shape) == weight.dim() and shape[1] != weight.shape[1] == 3:
            return {"in_chans": shape[1]}
    return {}


def _names(listed: str | Iterable[str] | None) -> list[str]:
    return [listed] if isinstance(listed, str) else list(listed or ())


def _compare(model: nn.Module, name: str, found: Mapping[str, Content], graph: bool, report: Report) -> None:
    """Report tensors that are missing, unexpected, or of another shape; a graph needs only the model's weights."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    needed = [key for key, shape in own.items() if not graph or (len(shape) > 1 and key.endswith("weight"))]
    missing = [key for key in needed if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key, content in found.items() if key not in own and (content.weight or not graph)]
    shaped = [key for key, content in found.items() if key in own and own[key] != content.shape]
    _add(missing, f"{name} has {{}}, which {report.path} lacks", report)
    _add(unexpected, f"{report.path} has {{}}, which {name} lacks{_wrapped(unexpected)}", report)
    for key in shaped:
        message = f"{key} is {list(found[key].shape)}: {name} has {list(own[key])}"
        report.add(Finding("model", key, message))


def _wrapped(names: list[str]) -> str:
    """A remedy, if the names look as if a wrapper was saved."""
    found = [prefix for prefix in ("module.", "_orig_mod.", "model.") if names and names[0].startswith(prefix)]
    return f': save the model itself, without "{found[0]}" before its names' if found else ""


def _add(names: list[str], message: str, report: Report) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        report.add(Finding("model", names[0], message.format(", ".join(names[:3]) + more), len(names)))


def _with_model(model: nn.Module, rules: LayerRules, artefact: Artefact) -> LayerRules:
    """The rules, with the model's own word on each of its parameters."""
    if rules.asked:
        return LayerRules(rules.default, rules.globs, _selection(model, rules.default, rules.globs))
    commonest = commonest_rule(read_claims(artefact.source)) if artefact.kind == "packed" else None
    if commonest is None:
        return rules
    try:  # Nothing is asked: the model only explains, and one that takes no pattern has nothing to say.
        return LayerRules(model=_selection(model, commonest, ()))
    except TargetError:
        return rules


def _selection(
    model: nn.Module, default: Rule | None, globs: Iterable[tuple[str, Rule | None]]
) -> dict[str, Rule | str]:
    """Every weight of the model with the rule that it takes, or why it stays dense."""
    from lbc_cli.patterns import Pattern
    from lbc_cli.targets import find_targets

    layers = {glob: f"{rule.n}:{rule.m}/{rule.v}" if rule else "dense" for glob, rule in globs}
    if default is None:
        # As "*", but no glob of the user's: what none of those names is asked nothing.
        default, layers = Rule(1, 2), {"**": "dense", **layers}
    selection = find_targets(model, Pattern(default.n, default.m, default.v), layers)
    said: dict[str, Rule | str] = {skipped.name: skipped.reason for skipped in selection.skipped}
    for target in selection.targets:
        said[target.name] = Rule(target.pattern.n, target.pattern.m, target.pattern.vector)
    return said
