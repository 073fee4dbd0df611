"""The layers of a model as the runtime sees them: what each holds, how it was called, and what keeps it dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lbc_cli.errors import TargetError
from lbc_cli.patterns import Pattern
from lbc_cli.runtime.backends import TWO_FOUR
from lbc_cli.runtime.trace import Shape, Trace
from lbc_cli.targets import find_targets


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A linear or convolution layer."""

    name: str
    module: nn.Module
    pattern: Pattern | None
    """What its weight is known to hold; None: nothing."""
    inputs: tuple[Shape, ...]
    """Shapes it was called with, for the sample."""
    outputs: tuple[Shape, ...]
    reason: str
    """Why it can only run dense, whatever the executor; "" if it can run sparse."""

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, None if there is none."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def shape(self) -> Shape:
        """[O, I, *K] of the weight."""
        return tuple(self.weight.shape)


def find_layers(model: nn.Module, seen: Trace, patterns: Mapping[str, Pattern]) -> list[Layer]:
    """The layers with products worth executing, in the model's order.

    Args:
        model: dense.
        seen: one forward pass of it.
        patterns: parameter name -> what its weight holds; as in the file's manifest.
    """
    obstacles = _obstacles(model)
    found = []
    for name, use in seen.uses.items():
        module = model.get_submodule(name)
        pattern = patterns.get(f"{name}.weight")
        reason = "" if use.calls else "its weight is used outside of its layer"
        reason = reason or obstacles.get(f"{name}.weight", "") or _misfit(module)
        reason = reason or ("" if pattern else "its weights are dense")
        found.append(Layer(name, module, pattern, tuple(use.inputs), tuple(use.outputs), reason))
    return found


def _obstacles(model: nn.Module) -> dict[str, str]:
    """Weights that are not multiplied as they are stored, whatever the policy for targets says."""
    try:
        selection = find_targets(model, TWO_FOUR, {"*": str(TWO_FOUR)})
    except TargetError as error:
        return {name: str(error) for name, _ in model.named_parameters()}
    return {skipped.name: skipped.reason for skipped in selection.skipped}


def _misfit(module: nn.Module) -> str:
    if isinstance(module, nn.Conv1d | nn.Conv3d):
        return f"a {type(module).__name__} has no sparse kernel"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"grouped convolution: {module.groups} groups"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"pads with {module.padding_mode}, not with zeros"
    return ""
