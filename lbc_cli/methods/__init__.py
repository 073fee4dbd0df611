"""The sparsification methods, and `attach`, which puts one to work.

Adding a method: a file beside this one with a subclass of `base.Pruner` and its options, and a line in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from lbc_cli.errors import MethodError, did_you_mean
from lbc_cli.methods.base import MethodOptions, Pruner
from lbc_cli.methods.dense import Dense, DenseOptions
from lbc_cli.methods.dnw import Dnw, DnwOptions
from lbc_cli.methods.gmp import Gmp, GmpOptions
from lbc_cli.methods.lbc import Lbc, LbcOptions
from lbc_cli.methods.magnitude import Asp, AspOptions
from lbc_cli.methods.maskllm import MaskLlm, MaskLlmOptions
from lbc_cli.methods.rigl import RigL, RigLOptions
from lbc_cli.methods.soft_threshold import SoftThreshold, SoftThresholdOptions
from lbc_cli.methods.srste import SrSte, SrSteOptions
from lbc_cli.patterns import Pattern
from lbc_cli.targets import Selection, find_targets

__all__ = ["METHODS", "MethodInfo", "Pruner", "attach", "parse_options"]


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as the registry knows it.

    Attributes:
        description: one line for people.
        source: the paper.
        options: the schema of its recipe options.
        build: makes the pruner from (model, optimizer, selection, epochs, options).
        sparse: whether it makes weights sparse at all.
        structured: whether it takes an N:M pattern; methods that do not are told a sparsity in their options.
    """

    description: str
    source: str
    options: type[MethodOptions]
    build: Callable[[nn.Module, Optimizer, Selection, int, Any], Pruner]
    sparse: bool = True
    structured: bool = True


METHODS: dict[str, MethodInfo] = {
    "lbc": MethodInfo("learn the best N of M combination by gradual removal", "NeurIPS 2022", LbcOptions, Lbc),
    "dense": MethodInfo("dense training, the baseline", "-", DenseOptions, Dense, sparse=False),
    "sr-ste": MethodInfo("magnitude mask at every step, dense weights behind it", "ICLR 2021", SrSteOptions, SrSte),
    "maskllm": MethodInfo("learn a distribution over the N of M combinations", "NeurIPS 2024", MaskLlmOptions, MaskLlm),
    "asp": MethodInfo("magnitude mask once, then training under it", "NVIDIA 2021", AspOptions, Asp),
    "gmp": MethodInfo("remove the smallest weights, bit by bit", "2017", GmpOptions, Gmp, structured=False),
    "rigl": MethodInfo("drop by magnitude, grow by gradient", "ICML 2020", RigLOptions, RigL, structured=False),
    "str": MethodInfo(
        "a learnable soft threshold per layer", "ICML 2020", SoftThresholdOptions, SoftThreshold, structured=False
    ),
    "dnw": MethodInfo("use the largest weights, train all", "NeurIPS 2019", DnwOptions, Dnw, structured=False),
}


def parse_options(method: str, options: Mapping[str, Any]) -> MethodOptions:
    """Check the options of a method.

    Raises:
        MethodError: for an unknown method or option, or a value of the wrong type, all problems in one message.
    """
    info = METHODS.get(method)
    if info is None:
        raise MethodError(f"unknown method {method!r}: one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    try:
        return info.options.model_validate(dict(options))
    except ValidationError as error:
        known = info.options.model_fields
        problems = [_problem(method, problem, known) for problem in error.errors()]
        raise MethodError("; ".join(problems)) from None


def _problem(method: str, problem: Any, known: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{method} has no option {key!r}: {', '.join(known) or 'it has none'}.{did_you_mean(key, known)}"
    return f"{method} option {key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    pattern: str | Pattern | None = None,
    method: str = "lbc",
    epochs: int,
    vector: int = 1,
    layers: Mapping[str, str] | None = None,
    **options: Any,
) -> Pruner:
    """Put a sparsification method to work on a model and its optimizer.

    Call `begin_epoch(epoch)` at the start of every epoch, counted from 0, and train as ever: the model's own weights
    are sparse between steps.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are looked through.
        optimizer: trains the model; element-wise, such as SGD or AdamW.
        pattern: N:M for the layers that can take it, 2:4 unless given; unstructured methods have none.
        method: one of METHODS.
        epochs: length of the run.
        vector: V output channels share a mask.
        layers: glob over layer names -> "N:M", "N:M/V" or "dense"; the last that matches wins. For unstructured
            methods "sparse" or "dense".
        **options: the method's own.

    Raises:
        PatternError, TargetError, MethodError: if pattern, layers, optimizer or options do not go together.
    """
    parsed = parse_options(method, options)
    info = METHODS[method]
    if epochs < 1:
        raise MethodError(f"epochs = {epochs}: a run has at least one epoch")
    wanted = _wanted(method, pattern, vector)
    selection = find_targets(model, wanted, layers) if info.sparse else Selection((), ())
    return info.build(model, optimizer, selection, epochs, parsed)


def _wanted(method: str, pattern: str | Pattern | None, vector: int) -> Pattern | None:
    """The pattern asked for, None for a method without one."""
    if not METHODS[method].structured:
        if pattern is not None or vector != 1:
            given = f"vector = {vector}" if pattern is None else f"pattern {pattern}"
            raise MethodError(f"method {method} is unstructured, {given} does not apply to it: leave it out")
        return None
    return pattern if isinstance(pattern, Pattern) else Pattern.parse("2:4" if pattern is None else pattern, vector)
