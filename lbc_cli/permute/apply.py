"""Orders of channels found, put into a model's weights, and checked on its logits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbc_cli.errors import ModelError
from lbc_cli.patterns import magnitude_mask
from lbc_cli.permute.graph import find_places
from lbc_cli.permute.search import find_order, reader
from lbc_cli.permute.spaces import Place, Places, Space, root
from lbc_cli.targets import Target

TOLERANCE = 1e-10  # of the largest logit, in float64


@dataclass(frozen=True, slots=True)
class ChannelSet:
    """Channels that keep one order, and the sparse layers that read them.

    Attributes:
        layers: names of the sparse weights that read them.
        channels: how many.
        before, after: share of the magnitude of those weights that N:M keeps.
        reason: why they stay as they are, "" if they were permuted.
    """

    layers: tuple[str, ...]
    channels: int
    before: float
    after: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Permutation:
    """What permuting has brought.

    Attributes:
        sets: every set of channels that a sparse layer reads.
        before, after: share of the magnitude of all sparse weights that N:M keeps.
        difference: largest difference between the logits in float64 before and after, as a share of the largest logit.
    """

    sets: tuple[ChannelSet, ...]
    before: float
    after: float
    difference: float

    @property
    def permuted(self) -> int:
        """Number of sets that have another order now."""
        return sum(not entry.reason for entry in self.sets)


@dataclass(frozen=True, slots=True)
class _Member:
    """A dimension of a tensor that has the order of a set, each channel `repeat` times."""

    place: Place
    dim: int
    repeat: int

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        index = (order[:, None] * self.repeat + torch.arange(self.repeat)).flatten()
        tensor = self.place.tensor
        tensor.copy_(tensor.index_select(self.dim, index.to(tensor.device)))


def permute(
    model: nn.Module,
    targets: Sequence[Target],
    image_size: tuple[int, int, int],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Permutation:
    """Permute the channels of a model in place, so that pruning by magnitude keeps more.

    Args:
        model: on the CPU; its mode does not matter, its function in eval mode stays what it is.
        targets: the sparse weights.
        image_size: (C, H, W) of the images that it takes.
        progress: told how many sets of channels are done, and of how many.

    Raises:
        ModelError: if torch.fx cannot trace the model, or its logits would not be the same; it is unchanged then.
    """
    with _in_eval_mode(model):
        places = find_places(model, torch.zeros(2, *image_size, dtype=_dtype(model)))
        images = torch.rand(2, *image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        logits = _logits(model, images)
        before, total = _kept(targets)
        done: list[tuple[list[_Member], Tensor]] = []
        try:
            sets = _improve_all(places, targets, done, progress)
            difference = _checked(logits, _logits(model, images))
        except BaseException:
            for members, order in reversed(done):
                _reorder(members, order.argsort())
            raise
        return Permutation(sets, _share(before, total), _share(_kept(targets)[0], total), difference)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits = copy.deepcopy(model).double().eval()(images)
    if not isinstance(logits, Tensor) or not logits.isfinite().all():
        raise ModelError("channels cannot be permuted: the model gives no finite logits, so nothing can be compared")
    return logits


def _checked(before: Tensor, after: Tensor) -> float:
    """The largest difference of logits as a share of the largest logit.

    Raises:
        ModelError: if it is more than rounding.
    """
    difference = float((before - after).abs().max() / before.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    if not difference <= TOLERANCE:
        raise ModelError(
            f"channels cannot be permuted: the logits would change by {difference:.1e} of the largest, at most "
            f"{TOLERANCE:.0e} is rounding; leave the permutation out"
        )
    return difference


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _kept(targets: Sequence[Target]) -> tuple[float, float]:
    """The sum of magnitudes that N:M keeps, and that of all weights."""
    kept_sum = total = 0.0
    for target in targets:
        size = target.weight.detach().double().abs()
        kept_sum += float(size[magnitude_mask(target.weight, target.pattern)].sum())
        total += float(size.sum())
    return kept_sum, total


def _read(places: Places, targets: Sequence[Target]) -> list[tuple[Space, list[Target]]]:
    """The spaces that sparse weights read, each with those weights, in the order of the targets."""
    found: dict[int, tuple[Space, list[Target]]] = {}
    for target in targets:
        place = places.find(target.weight)
        dim = "the traced forward pass does not use it" if place is None else place.dims[1]
        space = root(dim)[0] if isinstance(dim, Space) else Space(target.weight.shape[1], fixed=dim or "one channel")
        found.setdefault(id(space), (space, []))[1].append(target)
    return list(found.values())


def _members(places: Places, space: Space) -> list[_Member]:
    return [_Member(*entry) for entry in places.of(space)]


def _reorder(members: Sequence[_Member], order: Tensor) -> None:
    for member in members:
        member.reorder(order)


def _improve_all(
    places: Places,
    targets: Sequence[Target],
    done: list[tuple[list[_Member], Tensor]],
    progress: Callable[[int, int], None],
) -> tuple[ChannelSet, ...]:
    """Find and apply an order of every set; what is applied is noted in `done` at once."""
    spaces = _read(places, targets)
    sets = []
    for number, (space, read) in enumerate(spaces):
        progress(number, len(spaces))
        before, total = _kept(read)
        reason = space.fixed or _runs(space, read) or _improve(_members(places, space), read, targets, done)
        names, after = tuple(target.name for target in read), _kept(read)[0]
        sets.append(ChannelSet(names, space.size, _share(before, total), _share(after, total), reason))
    progress(len(spaces), len(spaces))
    return tuple(sets)


def _runs(space: Space, read: Sequence[Target]) -> str:
    """Why a space cannot be searched although nothing holds it, or ""."""
    if any(target.weight.shape[1] != space.size for target in read):
        return "flattened pixels: a sparse layer reads runs of one channel"
    return ""


def _improve(
    members: list[_Member],
    read: Sequence[Target],
    targets: Sequence[Target],
    done: list[tuple[list[_Member], Tensor]],
) -> str:
    """Find and apply a better order of one set; why it stays as it is, or ""."""
    order = find_order([reader(target.weight, target.pattern) for target in read])
    # With vectors of output channels the layers that write these channels have other vectors now.
    affected = [target for target in targets if any(member.place.tensor is target.weight for member in members)]
    former, _ = _kept(affected)
    _reorder(members, order)
    if not _kept(affected)[0] > former:
        _reorder(members, order.argsort())
        return "no better order was found"
    done.append((members, order))
    return ""
