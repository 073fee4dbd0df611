"""Writing a checkpoint: the model's tensors, the sparse ones packed, under a manifest that proves them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lbc_cli.checkpoint.architecture import Architecture, check_architecture, describe_architecture
from lbc_cli.checkpoint.container import TensorInfo
from lbc_cli.checkpoint.files import Buffer
from lbc_cli.checkpoint.manifest import INDEX, VALUES, Manifest, Sparse, Stored, check_consistency
from lbc_cli.checkpoint.output import write_digested
from lbc_cli.checkpoint.tensors import describe, to_bytes
from lbc_cli.errors import CheckpointError, OutputError, PatternError, UsageError, VerificationError
from lbc_cli.packing import pack
from lbc_cli.patterns import Pattern
from lbc_cli.targets import clean_name


class PrunerLike(Protocol):
    """What saving needs of a pruner."""

    method: Any
    epoch: int

    @property
    def targets(self) -> Any:
        """Each with a `name`, and a `pattern` where its `structured` says so."""

    @property
    def phase(self) -> str:
        """Either "final" or "training"."""

    def masks(self) -> dict[str, Tensor]:
        """Name -> bool mask of the kept weights."""

    def deployed(self) -> AbstractContextManager[None]:
        """Within it the model carries the weights to ship."""


class _Content:
    """The tensors of a file, made when they are asked for.

    Args:
        state: what to store, dense.
        patterns: name -> pattern of those that are stored packed.
        masks: name -> bool mask of the kept weights of these.
    """

    def __init__(
        self, state: Mapping[str, Tensor], patterns: Mapping[str, Pattern], masks: Mapping[str, Tensor]
    ) -> None:
        self._state, self._patterns, self._masks = state, patterns, masks
        self.sparse: dict[str, Sparse] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._owners: dict[str, str] = {}
        for name, tensor in state.items():
            self._add(name, describe(tensor, name), patterns.get(name))
        self._locks = {name: Lock() for name in self.sparse}
        self._made: dict[str, Tensor] = {}

    def _add(self, name: str, info: TensorInfo, pattern: Pattern | None) -> None:
        if name.endswith((VALUES, INDEX)):
            raise UsageError(f"tensor {name} cannot be saved: the endings {VALUES} and {INDEX} are reserved")
        if pattern is None:
            self.infos[name] = info
            return
        self.sparse[name] = Sparse(pattern.n, pattern.m, pattern.vector, info.shape, info.dtype)
        for part, stored in zip((VALUES, INDEX), self.sparse[name].stored(), strict=True):
            self.infos[name + part] = stored
            self._owners[name + part] = name

    def data(self, stored: str) -> Buffer:
        """The bytes of one tensor of the file; each can be had once, from any thread.

        Raises:
            VerificationError: if a tensor does not hold its pattern under its mask.
        """
        name = self._owners.get(stored)
        if name is None:
            return to_bytes(self._state[stored])
        with self._locks[name]:
            if stored not in self._made:
                self._pack(name)
            return to_bytes(self._made.pop(stored))

    def _pack(self, name: str) -> None:
        """Both parts; the other one waits for its turn. An index is a small part of its tensor."""
        try:
            packed = pack(self._state[name], self._patterns[name], self._masks[name], name)
        except PatternError as error:
            raise VerificationError(f"{error}; nothing was saved") from error
        self._made[name + VALUES], self._made[name + INDEX] = packed.values, packed.index


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    pruner: PrunerLike | None = None,
    arch: Architecture | None = None,
    metrics: Mapping[str, Any] | None = None,
    recipe: str = "",
    epoch: int | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    unstructured: Collection[str] = (),
    overwrite: bool = False,
) -> None:
    """Save a model as a checkpoint of version 1, atomically.

    Args:
        model: any model; wrapped by DDP or torch.compile is fine.
        path: the file; its folder must exist.
        pruner: gives masks, patterns, method and phase. In the phase "final" its targets are stored packed, and checked
            against their patterns; those without a pattern are stored dense, and their non-zeros are recorded. Before,
            everything is dense. None: everything is dense.
        arch: {"arch", "kwargs", "task"} to create the model again; None: derived from a timm model, unknown for others.
        metrics: what was measured; JSON. `transposable: true` joins it where the final masks of the pruner are.
        recipe: the resolved recipe as TOML.
        epoch: None: the pruner's.
        tensors: a state dict to store in place of the model's own, such as an average of its weights.
        unstructured: names of more dense tensors that were pruned without a pattern; their non-zeros are recorded.
        overwrite: replace a file that is there.

    Raises:
        OutputError: if the file exists and may not be replaced, or cannot be written.
        UsageError: for tensors or descriptions that cannot be stored.
        VerificationError: if a target does not hold its pattern; nothing is written.
    """
    _check_free(path, overwrite)
    described = describe_architecture(model) if arch is None else check_architecture(arch)
    deployed = contextlib.nullcontext() if pruner is None or tensors is not None else pruner.deployed()
    with torch.no_grad(), deployed:
        state = _state(model, tensors)
        patterns, masks = _plan(state, pruner)
        content = _Content(state, patterns, masks)
        free = [*unstructured, *(name for name in masks if name not in patterns)]
        manifest = Manifest(
            arch=described["arch"],
            kwargs=described["kwargs"],
            task=described["task"],
            sparse=content.sparse,
            unstructured=_count(free, state),
            method="dense" if pruner is None else str(pruner.method),
            phase="final" if pruner is None else pruner.phase,
            epoch=pruner.epoch if epoch is None and pruner is not None else epoch,
            metrics={**(metrics or {}), **_claims(pruner)},
            recipe=recipe,
            environment=environment(),
        )
        _check_free(path, overwrite)
        _write(path, manifest, content.infos, content.data)


def _claims(pruner: PrunerLike | None) -> dict[str, Any]:
    """What final masks hold beside their patterns."""
    final = pruner is not None and pruner.phase == "final"
    return {"transposable": True} if final and getattr(pruner, "transposable", False) else {}


def _write(
    path: str | os.PathLike[str],
    manifest: Manifest,
    infos: Mapping[str, TensorInfo],
    data: Callable[[str], Buffer],
) -> None:
    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        stored = {name: Stored(info, digests[name]) for name, info in infos.items()}
        return replace(manifest, tensors=stored).to_metadata()

    try:
        blank = dict.fromkeys(infos, "0" * 64)
        check_consistency(replace(manifest, tensors={name: Stored(info, "") for name, info in infos.items()}), infos)
        metadata(blank)
    except (CheckpointError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: this model cannot be saved: {error}") from error
    write_digested(path, infos, metadata, data)


def environment() -> dict[str, Any]:
    """Versions and hardware, for the manifest."""
    from lbc_cli.environment import describe_hardware

    return describe_hardware()


def _check_free(path: str | os.PathLike[str], overwrite: bool) -> None:
    if os.path.lexists(path) and (not overwrite or Path(path).is_dir()):
        raise OutputError(f"{path} exists and is not overwritten: choose another name, or pass overwrite=True")


def _state(model: nn.Module, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors to store, by their names in the unwrapped model."""
    own: dict[str, Tensor] = {clean_name(name): value for name, value in model.state_dict().items()}
    if tensors is not None:
        given = {clean_name(name): value for name, value in tensors.items()}
        if odd := sorted(set(own) ^ set(given)):
            raise UsageError(
                f"the tensors given do not belong to the model: {odd[0]} is only in {'it' if odd[0] in own else 'them'}"
                f" ({len(odd)} such)"
            )
        own = given
    for name, value in own.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} is a {type(value).__name__}: only tensors can be stored, not extra state")
    return own


def _plan(state: Mapping[str, Tensor], pruner: PrunerLike | None) -> tuple[dict[str, Pattern], dict[str, Tensor]]:
    """Patterns of the tensors to pack, and masks of all sparse ones, by name.

    Raises:
        UsageError: if the pruner is another model's.
        VerificationError: if a tensor without a pattern holds something where its mask says that nothing is left.
    """
    if pruner is None or pruner.phase != "final":
        return {}, {}
    targets = {clean_name(target.name): target for target in pruner.targets}
    masks = {clean_name(name): mask for name, mask in pruner.masks().items()} if targets else {}
    if missing := sorted(set(targets) - (set(state) & set(masks))):
        raise UsageError(f"{missing[0]} is a target of the pruner, but not in the model: is it another model's pruner?")
    patterns = {name: target.pattern for name, target in targets.items() if target.structured}
    for name in targets.keys() - patterns.keys():
        if rest := int(torch.count_nonzero(state[name].masked_fill(masks[name].to(state[name].device), 0))):
            raise VerificationError(f"{name} holds {rest} weights that its mask says are removed; nothing was saved")
    return patterns, {name: masks[name] for name in targets}


def _count(names: Collection[str], state: Mapping[str, Tensor]) -> dict[str, int]:
    """Non-zeros of the unstructured tensors."""
    cleaned = [clean_name(name) for name in names]
    if missing := [name for name in cleaned if name not in state]:
        raise UsageError(f"{missing[0]} is listed as unstructured, but not in the model")
    return {name: int(torch.count_nonzero(state[name])) for name in cleaned}
