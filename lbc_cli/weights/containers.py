"""From a path to weights: which kind of file it is, what is in it, and the layout resolved."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lbc_cli import checkpoint
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.weights.base import CHECKPOINT, DENSE, Weights
from lbc_cli.weights.folders import open_folder
from lbc_cli.weights.layouts import resolve
from lbc_cli.weights.names import clean_names
from lbc_cli.weights.pickles import read_pickle
from lbc_cli.weights.plain import PlainHeader, is_safetensors, read_plain, read_plain_header

# Formats that we export, by the key of their metadata: the module that reads them. Named, not imported: exports build
# on this package, and the module is needed only where such a file is met.
_EXPORTED = {"semi_structured": ("semi-structured", "lbc_cli.exports.semi_structured")}
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")


def read(path: str | os.PathLike[str], *, key: str | None = None, check_digests: bool = True) -> Weights:
    """Read the weights of a file or folder as dense tensors.

    Args:
        path: one of our checkpoints, any safetensors file, a file of `torch.save` (.pth, .pt, .bin, .tar, .ckpt), or
            timm's folder of config.json and weights.
        key: which entry of a `torch.save` file holds the weights, where several do.
        check_digests: of our own checkpoints.

    Raises:
        UsageError: if there is no such file, it holds several models and no key says which, or a key is given where
            there are none.
        ModelError: if a folder holds no weights that can be told, or no configuration.
        CheckpointError: if it is damaged, or refused because reading it could run code.
    """
    target = Path(path)
    if target.is_dir():
        folder = open_folder(target)
        found = _read_file(folder.weights, key, check_digests)
        if found.kind == CHECKPOINT:
            return found
        return replace(found, path=target, arch=folder.arch, kwargs=folder.kwargs, images=folder.images)
    return _read_file(target, key, check_digests)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one of our checkpoints, sound or not."""
    try:
        with path.open("rb") as file:
            return _is_ours(read_plain_header(file))
    except (CheckpointError, OSError):
        return False


def _is_ours(header: PlainHeader) -> bool:
    return "lbc" in header.metadata


def _read_file(path: Path, key: str | None, check_digests: bool) -> Weights:
    if not path.is_file():
        raise UsageError(f"{path}: {'not a weight file' if path.exists() else 'no such weight file'}")
    try:
        if not is_safetensors(path):
            return _foreign(path, _pickled(path, key))
        if key is not None:
            raise UsageError(f"{path} is a safetensors file, which has no entries: drop the key {key!r}")
        return _safetensors(path, check_digests)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _safetensors(path: Path, check_digests: bool) -> Weights:
    try:
        with path.open("rb") as file:
            header = read_plain_header(file)
            exported = next((_EXPORTED[key] for key in _EXPORTED if key in header.metadata), None)
            tensors = {} if exported or _is_ours(header) else read_plain(file, header)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if exported is not None:
        return _exported(path, *exported, check_digests)
    return _ours(path, check_digests) if _is_ours(header) else _foreign(path, tensors)


def _exported(path: Path, kind: str, module: str, check_digests: bool) -> Weights:
    reader = importlib.import_module(module)
    manifest = reader.read_manifest(path)
    claims = {**manifest.dense, **manifest.layers}
    return Weights(
        path=path,
        kind=kind,
        tensors=reader.load_tensors(path, check_digests=check_digests),
        patterns={name: Pattern.parse(entry.pattern) for name, entry in claims.items() if entry.pattern},
        arch=manifest.arch,
        kwargs=manifest.kwargs,
        metrics=manifest.checkpoint.get("metrics", {}),
    )


def _pickled(path: Path, key: str | None) -> Mapping[str, Tensor]:
    if path.suffix.lower() not in PICKLED:
        raise CheckpointError(f"{path} cannot be read: neither safetensors nor, by its name, {', '.join(PICKLED)}")
    return read_pickle(path, key)


def _ours(path: Path, check_digests: bool) -> Weights:
    read = checkpoint.read(path, check_digests=check_digests)
    manifest = read.manifest
    return Weights(
        path=path,
        kind=CHECKPOINT,
        tensors=read.tensors,
        patterns={name: Pattern(entry.n, entry.m, entry.vector) for name, entry in manifest.sparse.items()},
        arch=manifest.arch,
        kwargs=manifest.kwargs,
        metrics=manifest.metrics,
        manifest=manifest,
    )


def _foreign(path: Path, tensors: Mapping[str, Tensor]) -> Weights:
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    try:
        kind, decoded = resolve(clean_names(tensors))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Weights(
        path=path,
        kind=kind or DENSE,
        tensors=decoded.tensors,
        patterns=decoded.patterns,
        masks=decoded.masks,
        notes=decoded.notes,
    )
