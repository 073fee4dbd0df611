"""Which tensor must hold which pattern: the default, globs over names, and what the model itself says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lbc_cli.errors import PatternError, UsageError, did_you_mean
from lbc_cli.verifier.groups import Rule
from lbc_cli.verifier.report import Report

# The last layer of a classifier stays dense by convention, in timm, torchvision and apex alike.
_CLASSIFIER = re.compile(r"(?:module\.)?(?:fc|heads?|head_dist|classifier|last_linear|logits)\.")
_NOT_A_WEIGHT = "not the weight of a linear or convolution layer: 2 or more dimensions, and a name that ends in weight"


@dataclass(frozen=True, slots=True)
class LayerRules:
    """What is asked of the tensors of a file.

    Attributes:
        default: what every layer must hold; None: nothing.
        globs: over names of tensors, of layers and of modules around them, each with its rule, None for dense. The
            last that matches wins.
        model: parameter -> its rule, or why it stays dense, where the model is known; it has the globs in it.
    """

    default: Rule | None = None
    globs: tuple[tuple[str, Rule | None], ...] = ()
    model: Mapping[str, Rule | str] | None = None

    @classmethod
    def parse(cls, pattern: str | None, layers: Mapping[str, str] | None = None) -> LayerRules:
        """Read the patterns as a user writes them.

        Args:
            pattern: N:M or N:M/V.
            layers: glob -> "N:M", "N:M/V" (V of `pattern` where left out) or "dense".

        Raises:
            PatternError: if one of them is no pattern.
        """
        default = None if pattern is None else parse_rule(pattern)
        vector = default.v if default else 1
        return cls(default, tuple((glob, _parse_glob(glob, text, vector)) for glob, text in (layers or {}).items()))

    @property
    def asked(self) -> bool:
        """Whether any layer shall hold a pattern."""
        return self.default is not None or any(rule for _, rule in self.globs)

    def rule_for(self, name: str, shape: tuple[int, ...], *, weight: bool = False, groups: int = 1) -> Rule | None:
        """What a tensor must hold, with the vector length that its output channels can take; None: it stays dense.

        Args:
            name: the parameter's.
            shape: [O, I, *K].
            weight: whether the container tells that it is the weight of a linear or convolution layer; otherwise
                names that end in "weight" are taken for one.
            groups: convolution groups, where known.
        """
        decision = self._decide(name, shape, weight, groups)
        return decision if isinstance(decision, Rule) else None

    def why_dense(self, name: str, shape: tuple[int, ...], *, weight: bool = False, groups: int = 1) -> str:
        """Why nothing is asked of a tensor, "" if something is; arguments as for `rule_for`."""
        decision = self._decide(name, shape, weight, groups)
        return decision if isinstance(decision, str) else ""

    def glob_for(self, name: str) -> tuple[str, Rule | None] | None:
        """The glob that decides about a tensor, with its rule; None if none names it."""
        return next((entry for entry in reversed(self.globs) if matches(entry[0], name)), None)

    def demanded(self, name: str) -> Rule | None:
        """What is asked of a tensor that is known to be sparse, whatever its name and shape; None: nothing."""
        glob = self.glob_for(name)
        return self.default if glob is None else glob[1]

    def named(self) -> str:
        """The patterns asked for, for a message: "2:4, 1:4"."""
        rules = [self.default, *(rule for _, rule in self.globs)]
        return ", ".join(dict.fromkeys(str(rule) for rule in rules if rule))

    def check_globs(self, report: Report) -> None:
        """Make sure that every glob had something to say.

        Args:
            report: of a file that was looked at wholly.

        Raises:
            UsageError: if a glob matches no weight, or no weight that it decides about can take its pattern.
        """
        checked = [layer.name for layer in report.layers]
        whys = {dense.name: dense.why for dense in report.dense}
        whys |= {counted.name: self.why_dense(counted.name, counted.shape) for counted in report.counted}
        weights = [*checked, *whys]
        for glob, rule in self.globs:
            if not any(matches(glob, name) for name in weights):
                near = did_you_mean(glob, dict.fromkeys(around for name in weights for around in _around(name)))
                raise UsageError(f"layers: {glob!r} matches no weight in {report.path}.{near}")
            decides = [name for name in weights if self.glob_for(name) == (glob, rule)]
            if rule and decides and not set(decides) & set(checked):
                why = f"{decides[0]}: {whys[decides[0]]}"
                raise UsageError(f"layers: nothing that {glob!r} matches can take {rule}: {why}")

    def _decide(self, name: str, shape: tuple[int, ...], weight: bool, groups: int) -> Rule | str:
        glob = self.glob_for(name)
        if self.model is not None:
            decision = self.model.get(name, "not a parameter of the model")
        elif glob is not None:
            decision = glob[1] or f"dense by layers: {glob[0]!r}"
        else:
            decision = self.default or "no pattern is asked of it"
        if isinstance(decision, str):
            return decision
        # Only a glob that is the tensor's own name can say that a tensor with an odd name is a weight.
        known = weight or self.model is not None or (glob is not None and glob[0] == name)
        misfit = _misfit(name, shape, decision, known)
        if not misfit and glob is None and self.model is None and _CLASSIFIER.match(name):
            misfit = "classifier"
        return misfit or Rule(decision.n, decision.m, math.gcd(decision.v, shape[0] // groups))


def matches(glob: str, name: str) -> bool:
    """Whether a glob names a tensor, its layer, or a module around that layer."""
    return any(fnmatchcase(around, glob) for around in _around(name))


def _around(name: str) -> Iterator[str]:
    """A tensor's name, that of its layer, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _misfit(name: str, shape: tuple[int, ...], rule: Rule, known: bool) -> str:
    """Why a pattern cannot be asked of a tensor, "" if it can."""
    if len(shape) < 2 or not (known or name.endswith("weight")):
        return _NOT_A_WEIGHT
    if 0 in shape:
        return "empty"
    if shape[1] == 1 and len(shape) > 2:
        return "depthwise convolution: one input channel per group"
    if shape[1] % rule.m:
        return f"{shape[1]} input channels, not a multiple of {rule.m}"
    return ""


def parse_rule(text: str, vector: int = 1) -> Rule:
    """Read N:M or N:M/V.

    Raises:
        PatternError: if it is no pattern.
    """
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)(?:/([1-9]\d{0,5}))?", text)
    if match and int(match[1]) < int(match[2]) <= 32:
        return Rule(int(match[1]), int(match[2]), int(match[3] or vector))
    # Anything odder goes the slow way: that module knows what to say about it, but needs torch.
    from lbc_cli.patterns import Pattern

    parsed = Pattern.parse(text, vector)
    return Rule(parsed.n, parsed.m, parsed.vector)


def _parse_glob(glob: str, text: str, vector: int) -> Rule | None:
    if text.strip().lower() == "dense":
        return None
    try:
        return parse_rule(text, vector)
    except PatternError as error:
        raise PatternError(f'layers: {glob!r} = {text!r}: {error}; or "dense"') from None
