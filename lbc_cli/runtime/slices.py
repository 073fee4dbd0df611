"""Large batches in slices, so that what one layer writes is still in the cache when the next one reads it.

Sparse layers do little with each number: a batch whose activations go to memory and back spends its time on that. All
images of a batch are independent in eval mode, so that the result is the same.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from lbc_cli.runtime.trace import Trace

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN = 16 << 20
_FLOAT = 4


class Sliced(nn.Module):
    """A model over slices of its batch.

    Args:
        model: takes images [n, c, h, w] and gives one tensor [n, ...].
        images: of a slice.
    """

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__()
        self.model = model
        self.images = images

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, ...]."""
        if len(images) <= self.images:
            result: Tensor = self.model(images)
            return result
        parts = torch.tensor_split(images, -(-len(images) // self.images))  # of nearly equal sizes
        return torch.cat([self.model(part) for part in parts])


def sliced(model: nn.Module, seen: Trace, sample: Tensor) -> nn.Module:
    """The model over slices, where its result allows it; else the model itself.

    Args:
        model: to call.
        seen: one forward pass of it, or of the dense model that it was made from.
        sample: the batch of that pass.
    """
    result = seen.output
    if not isinstance(result, Tensor) or result.dim() < 1 or len(result) != len(sample):
        return model
    return Sliced(model, images_at_once(seen, len(sample)))


def images_at_once(seen: Trace, batch: int) -> int:
    """Images whose largest pair of a layer's input and output takes at most two thirds of the last cache."""
    pairs = [
        _FLOAT * (_elements(inputs) + _elements(outputs)) // batch
        for use in seen.uses.values()
        for inputs, outputs in zip(use.inputs, use.outputs, strict=True)
    ]
    return max(1, 2 * last_cache() // 3 // max(pairs, default=1))


def _elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@functools.cache
def last_cache() -> int:
    """Bytes of the largest cache that the first core reaches; 16 MiB where the system does not say."""
    sizes = [_bytes(path.read_text().strip()) for path in sorted(_CACHE.glob("index*/size"))]
    return max(sizes, default=0) or _UNKNOWN


def _bytes(text: str) -> int:
    units = {"K": 10, "M": 20, "G": 30}
    number, unit = text.rstrip("KMG"), text[-1:]
    return int(number) << units.get(unit, 0) if number.isdigit() else 0
