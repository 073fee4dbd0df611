"""One look at a model at work: which layers are called, with what shapes, and who uses their results.

Names in a model say little: a layer may never be called (its weight is used by a functional call), or be called twice;
a batch norm may or may not follow a convolution. One forward pass over a sample settles all of it. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lbc_cli.errors import ModelError

Shape = tuple[int, ...]


@dataclass(slots=True)
class Use:
    """How a layer was used in one forward pass."""

    inputs: list[Shape] = field(default_factory=list)
    """Shape of the input of every call."""
    outputs: list[Shape] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    """Name of the innermost module that read a result, "" for code outside of all; once per operator."""

    @property
    def calls(self) -> int:
        """How often it was called."""
        return len(self.inputs)


@dataclass(frozen=True, slots=True)
class Trace:
    """What one forward pass has shown."""

    uses: dict[str, Use]
    """Name of every linear and convolution layer -> its use; layers never called have no calls."""
    output: Any
    """What the model returned."""


class _Readers(TorchFunctionMode):
    """Notes which module hands a watched tensor to an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self._watched: dict[int, tuple[Tensor, Use]] = {}

    def watch(self, result: Tensor, use: Use) -> None:
        """Note from now on who reads a tensor. It is held, so that its identity stays its own."""
        self._watched[id(result)] = (result, use)

    def read(self, values: Iterable[Any]) -> None:
        """Note that the current module reads what is watched among the values."""
        for value in values:
            if isinstance(value, list | tuple):
                self.read(value)
            elif isinstance(value, Tensor) and id(value) in self._watched:
                self._watched[id(value)][1].consumers.append(self.stack[-1])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called in place of every torch operator."""
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim", "stride", "is_floating_point"):
            self.read([*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))


def trace(model: nn.Module, sample: Tensor) -> Trace:
    """Run a model once and note how its layers are used.

    Args:
        model: on the sample's device, in eval mode.
        sample: a batch as the model takes it.

    Raises:
        ModelError: if the model does not take the sample.
    """
    uses: dict[str, Use] = {}
    readers = _Readers()
    handles = [handle for name, module in model.named_modules() for handle in _hooks(name, module, uses, readers)]
    try:
        with torch.inference_mode(), readers:
            output = model(sample)
        readers.read(output if isinstance(output, list | tuple) else [output])
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ModelError(f"the model does not take images of {list(sample.shape)}: {''.join(first)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return Trace(uses, output)


def _hooks(name: str, module: nn.Module, uses: dict[str, Use], readers: _Readers) -> list[Any]:
    def enter(_: nn.Module, inputs: Any) -> None:
        readers.stack.append(name)

    def leave(_: nn.Module, inputs: Any, result: Any) -> None:
        readers.stack.pop()

    def note(_: nn.Module, inputs: Any, result: Any) -> None:
        use = uses[name]
        use.inputs.append(tuple(inputs[0].shape) if inputs else ())
        use.outputs.append(tuple(result.shape))
        readers.watch(result, use)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        uses[name] = Use()
        handles.append(module.register_forward_hook(note))
    return handles
