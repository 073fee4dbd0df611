"""Channel spaces: dimensions of tensors that must keep one common order of their entries.

A *space* is a set of places in a network (dimension 0 of a convolution's weight, the running mean of the batch norm
behind it, dimension 1 of the next weight, ...) whose entries can be put into another order together without any
consequence, as long as every place takes the same order. Spaces that meet are tied; a space that reaches something
which knows its channels by their number (the image, the logits, a reshape that cuts them apart) is fixed.

A dimension may repeat a space: flattening [B, C, H, W] to [B, C * H * W] makes each channel a run of H * W entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(slots=True, eq=False)
class Space:
    """A dimension whose entries may change places.

    Attributes:
        size: entries.
        fixed: why they may not, "" if they may.
        parent: the space that this one follows, None for one that follows none.
        repeat: entries of this space for each one of the parent, next to one another.
    """

    size: int
    fixed: str = ""
    parent: Space | None = None
    repeat: int = 1


Dim = Space | str
"""A dimension of a tensor: a space, or what it is instead ("" for batch, pixels and tokens)."""


def root(space: Space) -> tuple[Space, int]:
    """The space that this one follows in the end, and how many entries it has for each of that one's."""
    repeat = 1
    while space.parent is not None:
        repeat *= space.repeat
        space = space.parent
    return space, repeat


def fix(dim: Dim, reason: str) -> None:
    """Say that a dimension's entries must stay where they are; the first reason counts."""
    if isinstance(dim, Space):
        found, _ = root(dim)
        found.fixed = found.fixed or reason


def tie(first: Space, second: Space) -> None:
    """Let two spaces of one size have one order."""
    assert first.size == second.size
    (a, _), (b, _) = root(first), root(second)
    if a is b:
        return
    if a.size > b.size:
        a, b = b, a
    if b.size % a.size:
        fix(a, "it meets channels in runs of another length")
        fix(b, "it meets channels in runs of another length")
        return
    b.parent, b.repeat = a, b.size // a.size
    fix(a, b.fixed)


def meet(first: Dim, second: Dim, place: str = "") -> None:
    """Two dimensions are one: tie them, or fix the one that meets something else than channels.

    Args:
        first: a dimension.
        second: another one, of the same size.
        place: what to say where the other side has no name of its own.
    """
    if isinstance(first, Space) and isinstance(second, Space):
        tie(first, second)
    else:
        fix(first, f"it meets {second or place or 'what is no channel'}")
        fix(second, f"it meets {first or place or 'what is no channel'}")


@dataclass(slots=True)
class Place:
    """A tensor of the model, and the space of each of its dimensions."""

    name: str
    tensor: Tensor
    dims: tuple[Dim, ...]


class Places:
    """The parameters and buffers of a model as they come into sight. Tied ones are one place.

    Args:
        model: whose tensors they are.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._names: dict[int, str] = {}
        for name, tensor in named:
            self._names.setdefault(id(tensor), name)
        self._places: dict[int, Place] = {}

    def dims(self, tensor: Tensor) -> tuple[Dim, ...]:
        """The spaces of a tensor's dimensions, its own until they meet others; "" for dimensions of one entry."""
        if id(tensor) not in self._places:
            # What the forward pass computes anew each time is no part of the model: its order is its own business.
            name = self._names.get(id(tensor))
            dims = [Space(size) if size > 1 else "" for size in tensor.shape]
            self._places[id(tensor)] = Place(name or "", tensor, tuple(dims))
            if name is None:
                for dim in dims:
                    fix(dim, "it meets a constant")
        return self._places[id(tensor)].dims

    def of(self, space: Space) -> list[tuple[Place, int, int]]:
        """Where a space is: (tensor, dimension, repeat)."""
        found = []
        for place in self._places.values():
            for number, dim in enumerate(place.dims):
                if isinstance(dim, Space):
                    top, repeat = root(dim)
                    if top is space:
                        found.append((place, number, repeat))
        return found

    def spaces(self) -> list[Space]:
        """Every space that follows no other, in the order of appearance."""
        every: dict[int, Space] = {}
        for place in self._places.values():
            for dim in place.dims:
                if isinstance(dim, Space):
                    top, _ = root(dim)
                    every.setdefault(id(top), top)
        return list(every.values())

    def find(self, tensor: Tensor) -> Place | None:
        """The place of a tensor, None if the forward pass never met it."""
        return self._places.get(id(tensor))


def reshaped(dims: Sequence[Dim], before: Sequence[int], after: Sequence[int], place: str) -> tuple[Dim, ...]:
    """Dimensions after a reshape in row-major order.

    Runs of dimensions whose sizes have the same product belong together; within a run, one dimension stays itself,
    and several that become one are a run of entries for each of the first.

    Args:
        dims: of the tensor before.
        before: its shape.
        after: its shape afterwards, of as many elements.
        place: the operation, for reasons.
    """
    result: list[Dim] = [""] * len(after)
    old = [number for number, size in enumerate(before) if size != 1]
    new = [number for number, size in enumerate(after) if size != 1]
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        sizes = [before[left[0]], after[right[0]]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                left.append(old.pop(0))
                sizes[0] *= before[left[-1]]
            else:
                right.append(new.pop(0))
                sizes[1] *= after[right[-1]]
        _regrouped(result, dims, left, right, sizes[0], place)
    return tuple(result)


def _regrouped(
    result: list[Dim], dims: Sequence[Dim], left: list[int], right: list[int], size: int, place: str
) -> None:
    """One run of a reshape: `left` of the dimensions before become `right` of those after."""
    head = dims[left[0]]
    if len(left) == len(right) == 1:
        result[right[0]] = head
        return
    for number in left[1:]:
        fix(dims[number], f"{place} runs over its channels fastest")
    if len(right) == 1 and isinstance(head, Space):
        result[right[0]] = Space(size, parent=head, repeat=size // head.size)
        return
    fix(head, f"{place} cuts its channels apart")
    reason = next((dim for dim in (dims[number] for number in left) if isinstance(dim, str) and dim), "")
    cut = f"what {place} cuts apart" if any(isinstance(dims[number], Space) for number in left) else reason
    for number in right:
        result[number] = cut
