"""Reading a checkpoint: every digest and rule checked, then dense tensors bit for bit, or the whole model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor, nn

from lbc_cli import models
from lbc_cli.checkpoint.container import Header, opened, tensor_data
from lbc_cli.checkpoint.manifest import INDEX, VALUES, Manifest, parse_manifest, sha256
from lbc_cli.checkpoint.tensors import from_bytes
from lbc_cli.errors import CheckpointError, ModelError
from lbc_cli.packing import unpack
from lbc_cli.patterns import Pattern
from lbc_cli.targets import clean_name, unwrap


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    """Name -> dense tensor on the CPU, all of the model's, sparse ones restored."""


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read what a checkpoint says of itself, without its tensors.

    The digest of the manifest is checked, those of the tensors are not.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if the header is damaged or not canonical.
    """
    with _checked(path) as (_, _, manifest):
        return manifest


def read(path: str | os.PathLike[str], *, check_digests: bool = True) -> Checkpoint:
    """Read a checkpoint as dense tensors.

    Args:
        path: the file.
        check_digests: compare the SHA-256 of every tensor; False saves time on files just written.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged or not canonical.
    """
    with _checked(path) as (file, header, manifest):
        tensors: dict[str, Tensor] = {}
        waiting: dict[str, Tensor] = {}
        owners = {name + part: name for name in manifest.sparse for part in (VALUES, INDEX)}
        for stored, info, data in tensor_data(file, header):
            if check_digests and sha256(data) != manifest.tensors[stored].sha256:
                raise CheckpointError(f"tensor {stored} does not match its SHA-256: the file is damaged")
            tensor = from_bytes(data, info)
            if stored not in owners:
                tensors[stored] = tensor
                continue
            name = owners[stored]
            waiting[stored] = tensor
            if name + VALUES in waiting and name + INDEX in waiting:
                tensors[name] = _restore(name, manifest, waiting.pop(name + VALUES), waiting.pop(name + INDEX))
        return Checkpoint(manifest, {name: tensors[name] for name in manifest.names})


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    check_digests: bool = True,
) -> nn.Module:
    """Load a model from a checkpoint, ready for inference.

    Args:
        path: the file.
        model: fill this model; needed when the checkpoint does not come from a timm model. None: create it.
        device: where the model goes; None: a new model stays on the CPU, a given one where it is.
        check_digests: compare the SHA-256 of every tensor.

    Returns:
        The model in eval mode, its tensors bit for bit those of the file, in the file's dtypes.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged or not canonical.
        ModelError: if the model is unknown or its tensors are others.
    """
    checkpoint = read(path, check_digests=check_digests)
    filled = _create(checkpoint.manifest, path) if model is None else model
    _fill(filled, checkpoint.tensors, path)
    return (filled if device is None else filled.to(device)).eval()


@contextmanager
def _checked(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, Header, Manifest]]:
    with opened(path) as (file, header):
        yield file, header, parse_manifest(header)


def _restore(name: str, manifest: Manifest, values: Tensor, index: Tensor) -> Tensor:
    entry = manifest.sparse[name]
    return unpack(values, index, entry.shape, Pattern(entry.n, entry.m, entry.vector), name)


def _create(manifest: Manifest, path: str | os.PathLike[str]) -> nn.Module:
    if manifest.arch is None:
        raise ModelError(
            f"{path} does not say which model it is, as it was not saved from a timm model: "
            "use load(path, model=my_model)"
        )
    return models.create(manifest.arch, kwargs=manifest.kwargs)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Put the tensors into the model. Parameters keep their identity, so that tied ones stay tied."""
    base = unwrap(model)
    places = {clean_name(name): place for name, place in base.state_dict(keep_vars=True).items()}
    if odd := sorted(set(places) ^ set(tensors)):
        where = "the file" if odd[0] in tensors else "the model"
        raise ModelError(f"{path} does not fit the model: {odd[0]} is only in {where} ({len(odd)} such){_REMEDY}")
    for name, tensor in tensors.items():
        if places[name].shape != tensor.shape:
            raise ModelError(
                f"{path} does not fit the model: {name} has shape {list(tensor.shape)} in the file and "
                f"{list(places[name].shape)} in the model{_REMEDY}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].data = tensor.to(places[name].device)


_REMEDY = "; if it was created with other arguments, use load(path, model=...) or pass arch=... to save"
