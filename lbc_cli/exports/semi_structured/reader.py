"""Reading a semi-structured file: exact dense weights on any machine, torch's sparse tensors on a GPU, or the model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import torch
from torch import Tensor, nn

from lbc_cli import models
from lbc_cli.checkpoint.architecture import uninitialised
from lbc_cli.checkpoint.container import Header, opened, read_at
from lbc_cli.checkpoint.manifest import sha256
from lbc_cli.checkpoint.tensors import from_bytes
from lbc_cli.errors import CheckpointError, ModelError, UsageError
from lbc_cli.exports.semi_structured.layout import decode, from_matrix, is_canonical
from lbc_cli.exports.semi_structured.manifest import META, PACKED, Manifest, parse_manifest
from lbc_cli.runtime.backends import Cutlass


class _File:
    """An open file whose header and manifest have been checked."""

    def __init__(self, file: BinaryIO, header: Header, check_digests: bool) -> None:
        self.manifest: Manifest = parse_manifest(header)
        self._file, self._header, self._check_digests = file, header, check_digests
        self._begins = header.begins

    def stored(self, name: str) -> Tensor:
        """A tensor of the file."""
        info = self._header.tensors[name]
        data = read_at(self._file, self._begins[name], info.num_bytes, f"tensor {name}")
        if self._check_digests and sha256(data) != self.manifest.digests[name]:
            raise CheckpointError(f"tensor {name} does not match its SHA-256: the file is damaged")
        return from_bytes(data, info)

    def matrix(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The weight of a layer as a matrix without padding, and the two tensors it is stored as."""
        packed, meta = self.stored(name + PACKED), self.stored(name + META)
        rows, columns = self.manifest.layers[name].matrix
        matrix = decode(packed, meta)[:rows, :columns]
        if not is_canonical(matrix, packed, meta):
            raise CheckpointError(f"tensor {name} is not in canonical form: codes or padding are others")
        return matrix, packed, meta

    def dense(self, name: str) -> Tensor:
        """A tensor of the model."""
        layer = self.manifest.layers.get(name)
        return self.stored(name) if layer is None else from_matrix(self.matrix(name)[0], layer.shape)


@contextmanager
def _opened(path: str | os.PathLike[str], check_digests: bool) -> Iterator[_File]:
    with opened(path) as (file, header):
        yield _File(file, header, check_digests)


def stream(path: str | os.PathLike[str], *, check_digests: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Read the model's tensors one by one, dense, on the CPU, sorted by name.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged or not canonical; tensors before the damage have been handed out by then.
    """
    with _opened(path, check_digests) as file:
        for name in file.manifest.names:
            yield name, file.dense(name)


def load_tensors(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    *,
    as_sparse: bool = False,
    check_digests: bool = True,
) -> dict[str, Tensor]:
    """Read a semi-structured file.

    Args:
        path: the file.
        device: where the tensors go; None: the CPU, or the current GPU with `as_sparse`.
        as_sparse: give the layers that are stored sparse as `torch.sparse.SparseSemiStructuredTensorCUTLASS`, of the
            padded shape [m, k] that the tensor cores need (`read_manifest(path).layers[name].padded`): feed them k
            features, of which those beyond the layer's own meet zeros, and use the layer's own rows of what comes out.
            Convolutions are matrices with input channels innermost.
        check_digests: compare the SHA-256 of every tensor.

    Returns:
        Name -> tensor of the model; exactly the exported weights.

    Raises:
        UsageError: if there is no such file, or no GPU that computes with such sparse tensors.
        CheckpointError: if the file is damaged or not canonical.
    """
    place = _device(device, as_sparse)
    tensors: dict[str, Tensor] = {}
    with _opened(path, check_digests) as file:
        for name in file.manifest.names:
            if as_sparse and name in file.manifest.layers:
                _, packed, meta = file.matrix(name)
                tensors[name] = as_cutlass(packed.to(place), meta.to(place))
            else:
                tensors[name] = file.dense(name).to(place)
    return tensors


def as_cutlass(packed: Tensor, meta: Tensor) -> Tensor:
    """The sparse tensor of torch over a layer as stored, without any conversion.

    Args:
        packed: [m, k/2].
        meta: int16 [m, k/16], int32 [m, k/32] for int8.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage.*")
        tensor: Tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS(
            torch.Size((packed.shape[0], 2 * packed.shape[1])),
            packed=packed,
            meta=meta,
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )
    return tensor


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> nn.Module:
    """Create the timm model of a semi-structured file with its dense weights, in the dtypes of the file.

    Args:
        path: the file.
        device: where the model goes; None: the CPU.

    Returns:
        The model in eval mode.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged or not canonical.
        ModelError: if the file does not say which model it is, or the model's tensors are others.
    """
    with _opened(path, True) as file:
        model = _create(file.manifest, path)
        places = model.state_dict(keep_vars=True)
        if odd := sorted(set(places) ^ set(file.manifest.names)):
            where = "the file" if odd[0] not in places else "the model"
            raise ModelError(f"{path} does not fit {file.manifest.arch}: {odd[0]} is only in {where} ({len(odd)} such)")
        for name in file.manifest.names:
            tensor = file.dense(name)
            if tensor.shape != places[name].shape:
                raise ModelError(
                    f"{path} does not fit {file.manifest.arch}: {name} has shape {list(tensor.shape)} in the file and "
                    f"{list(places[name].shape)} in the model"
                )
            places[name].data = tensor
    return (model if device is None else model.to(device)).eval()


def _create(manifest: Manifest, path: str | os.PathLike[str]) -> nn.Module:
    if manifest.arch is None:
        raise ModelError(f"{path} does not say which model it is: use load_tensors(path) and your own model")
    with uninitialised():
        return models.create(manifest.arch, kwargs=manifest.kwargs)


def _device(device: torch.device | str | None, as_sparse: bool) -> torch.device:
    place = torch.device(device or ("cuda" if as_sparse else "cpu"))
    if as_sparse and (place.type != "cuda" or not torch.cuda.is_available()):
        found = "none is there" if not torch.cuda.is_available() else f"not {place}"
        raise UsageError(f"semi-structured tensors compute on a CUDA GPU ({found}): use as_sparse=False elsewhere")
    if as_sparse and (reason := Cutlass().why_not(place, torch.float16)):
        raise UsageError(f"{reason}: use as_sparse=False, or lbc_cli.load(..., runtime='semi-structured')")
    return place
