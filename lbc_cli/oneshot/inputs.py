"""What the sparse layers of a model are given, seen where it is multiplied by their weight.

Hooks on modules would not do: some layers pad inside their forward, some weights are used by a functional call or by
several layers. So the calls of torch's linear and convolution functions themselves are watched, and a call belongs to
a weight if that very parameter is its operand.

Legend
    I   input channels of a convolution group     K   kernel positions        P   output pixels of all images
    columns [G, K * I, P]: for each of G groups, and each weight of one output channel, the inputs that it is multiplied
    by; ordered by (kernel position, channel), so that M consecutive ones are a group of N:M
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = {functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3}


@dataclass(frozen=True, slots=True)
class Seen:
    """One use of a weight.

    Attributes:
        x: the input as the layer got it: [..., I] of a linear one, else [N, G * I, *spatial], zero-padded already.
        kernel, stride, dilation: of a convolution, one number per spatial dimension; none for a linear layer.
        groups: of a convolution, 1 for a linear layer.
    """

    x: Tensor
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def squares(self) -> Tensor:
        """The sum of the squares of each column, float64 [G, K * I].

        An input counts once for every output pixel that it goes into.
        """
        if not self.kernel:
            return self.x.reshape(-1, self.x.shape[-1]).double().square().sum(0)[None]
        windows = _windows(self.x.double().square().sum(0, keepdim=True), self)
        return self._in_order(windows.sum(dim=tuple(range(2, 2 + len(self.kernel)))))[..., 0]

    def columns(self, most: int = 2**24) -> Iterator[Tensor]:
        """The columns in float64, [G, K * I, P], some of the pixels at a time.

        Args:
            most: elements at a time, as far as single images (or rows of a linear layer) allow.
        """
        if not self.kernel:
            rows = self.x.reshape(-1, self.x.shape[-1])
            for part in rows.split(max(1, most // rows.shape[1])):  # type: ignore[no-untyped-call]
                yield part.double().T[None]
            return
        size = _windows(self.x[:1], self).numel()
        for part in self.x.split(max(1, most // size)):  # type: ignore[no-untyped-call]
            windows = _windows(part.double(), self)
            positions = len(self.kernel)
            # [N, C, *out, *k] -> [C, *k, N, *out]
            order = (1, *range(2 + positions, 2 + 2 * positions), 0, *range(2, 2 + positions))
            yield self._in_order(windows.permute(order).flatten(1 + positions)[None])

    def _in_order(self, values: Tensor) -> Tensor:
        """[1, G * I, *k, (P)] -> [G, K * I, P]."""
        positions = len(self.kernel)
        channels = values.shape[1] // self.groups
        split = values[0].reshape(self.groups, channels, -1, *values.shape[2 + positions :])
        rest = split.shape[3] if split.dim() > 3 else 1
        return split.reshape(self.groups, channels, -1, rest).transpose(1, 2).reshape(self.groups, -1, rest)


def _windows(x: Tensor, seen: Seen) -> Tensor:
    """[N, C, *spatial] -> a view [N, C, *out, *k]: what each output pixel sees."""
    for axis, (size, step, spread) in enumerate(zip(seen.kernel, seen.stride, seen.dilation, strict=True)):
        x = x.unfold(2 + axis, spread * (size - 1) + 1, step)[..., ::spread]
    return x


class Watch(TorchFunctionMode):
    """Shows what weights are multiplied by, call by call, before each call is made.

    Args:
        weights: parameters of the model that is run while this is entered, by name.
        note: called with the name and the use.
    """

    def __init__(self, weights: Mapping[str, Tensor], note: Callable[[str, Seen], None]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._note = note

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called in place of every torch function."""
        named = kwargs or {}
        if func is functional.linear or func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else named.get("weight")
            if (name := self._names.get(id(weight))) is not None:
                x = args[0] if args else named["input"]
                settings = dict(zip(("bias", "stride", "padding", "dilation", "groups"), args[2:], strict=False))
                self._note(name, _seen(func, x, weight, {**settings, **named}))
        return func(*args, **named)


def _seen(func: Callable[..., Any], x: Tensor, weight: Any, settings: Mapping[str, Any]) -> Seen:
    x = x.detach()
    if func is functional.linear:
        return Seen(x)
    dims = _CONVOLUTIONS[func]
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_each(settings.get(key, 1), dims) for key in ("stride", "dilation"))
    if x.dim() == dims + 1:
        x = x[None]
    padded = _padded(x, settings.get("padding", 0), kernel, dilation)
    return Seen(padded, kernel, stride, dilation, int(settings.get("groups", 1)))


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number per spatial dimension."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _padded(x: Tensor, padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """The input with its zeros around it."""
    if padding == "valid":
        return x
    if padding == "same":
        totals = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(amount, amount) for amount in _each(padding, len(kernel))]
    return functional.pad(x, [amount for pair in reversed(sides) for amount in pair])


def in_order(weight: Tensor) -> Tensor:
    """A weight [O, I, *K] as [O, K * I], ordered as the columns are."""
    return weight.flatten(2).transpose(1, 2).reshape(weight.shape[0], -1) if weight.dim() > 2 else weight


def from_order(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `in_order`: [O, K * I] as [O, I, *K], contiguous."""
    out, channels, *kernel = shape
    if not kernel:
        return rows.contiguous()
    return rows.reshape(out, -1, channels).transpose(1, 2).reshape(out, channels, *kernel).contiguous()


def not_seen(method: str, name: str) -> str:
    """What to say where a weight's inputs never came by."""
    return (
        f"{method} needs the inputs of every sparse layer: {name} is not used by a linear or convolution function in a "
        f"forward pass; leave it dense with --layers '{name}=dense', or use --method magnitude or taylor"
    )


@torch.no_grad()
def order_of_use(calibration_model: torch.nn.Module, weights: Mapping[str, Tensor], image: Tensor) -> dict[str, int]:
    """The weights in the order in which one forward pass first uses them, and how often it does.

    Args:
        calibration_model: on the image's device, in eval mode.
        weights: its parameters, by name.
        image: [N, C, H, W].
    """
    calls: dict[str, int] = {}

    def note(name: str, seen: Seen) -> None:
        calls[name] = calls.get(name, 0) + 1

    with Watch(weights, note):
        calibration_model(image)
    return calls
