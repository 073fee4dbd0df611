"""Reading a checkpoint: every digest and rule checked, then dense tensors bit for bit, one by one or as a model.

Tensors come out in the order in which safetensors would store them dense. Whatever is asked for, no more is in memory
than the dense tensors handed out, the one at hand, and those read ahead (at most 64 MiB).
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor, nn

from lbc_cli import models
from lbc_cli.checkpoint.ahead import ahead
from lbc_cli.checkpoint.architecture import uninitialised
from lbc_cli.checkpoint.container import Header, opened, read_at
from lbc_cli.checkpoint.manifest import INDEX, VALUES, Manifest, parse_manifest, sha256
from lbc_cli.checkpoint.tensors import from_bytes
from lbc_cli.errors import CheckpointError, ModelError
from lbc_cli.packing import check_index, unpack
from lbc_cli.patterns import Pattern
from lbc_cli.targets import clean_name, unwrap


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    """Name -> dense tensor on the CPU, all of the model's, sparse ones restored."""


class _File:
    """An open checkpoint whose header and manifest have been checked.

    Args:
        file: the file.
        header: its header.
        check_digests: compare the SHA-256 of every tensor that is read.
    """

    def __init__(self, file: BinaryIO, header: Header, check_digests: bool) -> None:
        self.manifest: Manifest = parse_manifest(header)
        self._file, self._header, self._check_digests = file, header, check_digests
        self._begins = header.begins

    def dense(self) -> Generator[tuple[str, Tensor]]:
        """The model's tensors, dense."""
        infos = self.manifest.dense
        return ahead(lambda name: (name, self._dense(name)), infos, lambda name: 2 * infos[name].num_bytes)

    def check(self) -> None:
        """Check every digest and every index, keeping nothing."""
        infos = self.manifest.dense
        for _ in ahead(self._check, infos, lambda name: infos[name].num_bytes):
            pass

    def _dense(self, name: str) -> Tensor:
        if (entry := self.manifest.sparse.get(name)) is None:
            return self._stored(name)
        pattern = Pattern(entry.n, entry.m, entry.vector)
        return unpack(self._stored(name + VALUES), self._stored(name + INDEX), entry.shape, pattern, name)

    def _check(self, name: str) -> None:
        if (entry := self.manifest.sparse.get(name)) is None:
            self._stored(name)
            return
        self._stored(name + VALUES)
        check_index(self._stored(name + INDEX), entry.shape, Pattern(entry.n, entry.m, entry.vector), name)

    def _stored(self, name: str) -> Tensor:
        info = self._header.tensors[name]
        data = read_at(self._file, self._begins[name], info.num_bytes, f"tensor {name}")
        if self._check_digests and sha256(data) != self.manifest.tensors[name].sha256:
            raise CheckpointError(f"tensor {name} does not match its SHA-256: the file is damaged")
        return from_bytes(data, info)


@contextmanager
def _opened(path: str | os.PathLike[str], check_digests: bool) -> Iterator[_File]:
    with opened(path) as (file, header):
        yield _File(file, header, check_digests)


def stream(path: str | os.PathLike[str], *, check_digests: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a checkpoint one by one, dense.

    Args:
        path: the file.
        check_digests: compare the SHA-256 of every tensor.

    Yields:
        Name and dense tensor on the CPU, in the order of `Manifest.dense`, which is that of a safetensors file.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged or not canonical; tensors before the damage have been handed out by then.
    """
    with _opened(path, check_digests) as checkpoint:
        yield from checkpoint.dense()


def read(path: str | os.PathLike[str], *, check_digests: bool = True) -> Checkpoint:
    """Read a checkpoint as dense tensors.

    Args:
        path: the file.
        check_digests: compare the SHA-256 of every tensor; False saves time on files just written.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged or not canonical.
    """
    with _opened(path, check_digests) as checkpoint:
        tensors = dict(checkpoint.dense())
        return Checkpoint(checkpoint.manifest, {name: tensors[name] for name in sorted(tensors)})


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    check_digests: bool = True,
) -> nn.Module:
    """Load a model from a checkpoint, ready for inference.

    The tensors move into the model one by one. A given model is left as it is unless the whole file has proven sound,
    for which the file is read twice.

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
    with _opened(path, check_digests) as checkpoint:
        filled = _create(checkpoint.manifest, path) if model is None else model
        places = _places(filled, checkpoint.manifest, path)
        if model is not None:
            checkpoint.check()
        with closing(checkpoint.dense()) as tensors:
            for name, tensor in tensors:
                _put(places[name], tensor.to(places[name].device if device is None else device))
    return (filled if device is None else filled.to(device)).eval()


def _create(manifest: Manifest, path: str | os.PathLike[str]) -> nn.Module:
    if manifest.arch is None:
        raise ModelError(
            f"{path} does not say which model it is, as it was not saved from a timm model: "
            "use load(path, model=my_model)"
        )
    with uninitialised():
        model = models.create(manifest.arch, kwargs=manifest.kwargs)
    if lost := sorted({name for name, _ in model.named_parameters()} - set(model.state_dict())):
        raise ModelError(f"{path}: {manifest.arch} does not save its parameter {lost[0]}, so it cannot be restored")
    return model


def _places(model: nn.Module, manifest: Manifest, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Where each tensor of the file belongs in a model.

    Raises:
        ModelError: if names or shapes are others, or there is no memory behind one.
    """
    places = {clean_name(name): place for name, place in unwrap(model).state_dict(keep_vars=True).items()}
    infos = manifest.dense
    if odd := sorted(set(places) ^ set(infos)):
        where = "the file" if odd[0] in infos else "the model"
        raise ModelError(f"{path} does not fit the model: {odd[0]} is only in {where} ({len(odd)} such){_REMEDY}")
    for name, info in infos.items():
        if tuple(places[name].shape) != info.shape:
            raise ModelError(
                f"{path} does not fit the model: {name} has shape {list(info.shape)} in the file and "
                f"{list(places[name].shape)} in the model{_REMEDY}"
            )
        if places[name].is_meta:
            raise ModelError(f"{name} of the model is on the meta device: use model.to_empty(device='cpu') first")
    return places


def _put(place: Tensor, tensor: Tensor) -> None:
    """Give a parameter or buffer another content; it keeps its identity, so that tied ones stay tied."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        place.requires_grad_(False)  # integers have no gradient, and torch refuses them otherwise
    place.data = tensor


_REMEDY = "; if it was created with other arguments, use load(path, model=...) or pass arch=... to save"
