"""The manifest of a semi-structured file: see the head of the package. Nothing here imports torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lbc_cli.checkpoint.container import (
    Header,
    TensorInfo,
    canonical_json,
    check_dtype,
    check_metadata_keys,
    check_shape,
    opened,
)
from lbc_cli.checkpoint.manifest import check_depth, check_digest, finite_json, members_of, sha256, typed
from lbc_cli.errors import CheckpointError

VERSION = 1
LAYOUT = "cutlass"
PACKED, META = ".packed", ".meta"
KEY, DIGEST_KEY = "semi_structured", "semi_structured.sha256"

# dtype -> (rows, columns) to whose multiples the matrix is padded, and the dtype of a word of metadata.
MULTIPLES: dict[str, tuple[int, int]] = {"F16": (32, 64), "BF16": (32, 64), "I8": (16, 128)}
_WORDS = {"F16": "I16", "BF16": "I16", "I8": "I32"}
_QUADS_PER_WORD = {"I16": 4, "I32": 8}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)(?:/([1-9]\d{0,9}))?")
_TOP = {"version", "layout", "model", "layers", "dense", "rounded_from", "tensors", "checkpoint"}
_ORIGIN = {"sha256": str, "method": str, "metrics": dict, "recipe": str, "environment": dict}


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight that is stored sparse."""

    shape: tuple[int, ...]
    """[O, I, *K] of the dense tensor."""
    dtype: str
    pattern: str | None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix, [O, prod(K) * I]."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns as stored."""
        rows, columns = self.matrix
        by_rows, by_columns = MULTIPLES[self.dtype]
        return -(-rows // by_rows) * by_rows, -(-columns // by_columns) * by_columns

    def stored(self) -> tuple[TensorInfo, TensorInfo]:
        """What the file must hold: packed elements, metadata."""
        rows, columns = self.padded
        word = _WORDS[self.dtype]
        meta = TensorInfo(word, (rows, columns // (4 * _QUADS_PER_WORD[word])))
        return TensorInfo(self.dtype, (rows, columns // 2)), meta


@dataclass(frozen=True, slots=True)
class Dense:
    """A weight that is stored dense, and why."""

    why: str
    pattern: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a semi-structured file says of itself; see the head of the package."""

    arch: str | None
    kwargs: Mapping[str, Any]
    task: str | None
    layers: Mapping[str, Layer]
    dense: Mapping[str, Dense]
    rounded_from: tuple[str, ...]
    infos: Mapping[str, TensorInfo]
    digests: Mapping[str, str]
    """Stored name -> SHA-256."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the model's tensors, sorted."""
        return sorted((set(self.infos) - parts(self.layers)) | set(self.layers))

    def with_digests(self, digests: Mapping[str, str]) -> Manifest:
        """The same with these digests."""
        return replace(self, digests=dict(digests))

    def to_metadata(self) -> dict[str, str]:
        """The three keys of `__metadata__`."""
        text = canonical_json(
            {
                "version": VERSION,
                "layout": LAYOUT,
                "model": {"arch": self.arch, "kwargs": dict(self.kwargs), "task": self.task},
                "layers": {
                    name: {"shape": list(layer.shape), "dtype": layer.dtype, "pattern": layer.pattern}
                    for name, layer in self.layers.items()
                },
                "dense": {name: {"why": entry.why, "pattern": entry.pattern} for name, entry in self.dense.items()},
                "rounded_from": list(self.rounded_from),
                "tensors": {
                    name: {"dtype": info.dtype, "shape": list(info.shape), "sha256": self.digests[name]}
                    for name, info in self.infos.items()
                },
                "checkpoint": finite_json(self.checkpoint),
            }
        )
        return {"format": "pt", KEY: text, DIGEST_KEY: sha256(text.encode())}


def parts(layers: Mapping[str, Any]) -> set[str]:
    """Stored names of the layers' parts."""
    return {name + part for name in layers for part in (PACKED, META)}


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read what a semi-structured file says of itself, without its tensors.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if the header is damaged, not canonical, or another file's.
    """
    with opened(path) as (_, header):
        return parse_manifest(header)


def parse_manifest(header: Header) -> Manifest:
    """Read the manifest and check it against the header.

    Raises:
        CheckpointError: if anything is missing, unknown, or does not follow from the rest.
    """
    check_metadata_keys(header.metadata, ("format", KEY, DIGEST_KEY), "a semi-structured file of lbc")
    parsed = check_digest(header.metadata, KEY, DIGEST_KEY)
    check_depth(parsed)
    top = members_of(parsed, "the top", _TOP)
    if type(top["version"]) is not int or top["version"] != VERSION or top["layout"] != LAYOUT:
        raise CheckpointError(
            f"is a semi-structured file of version {str(top['version'])[:20]}, layout {str(top['layout'])[:20]!r}: "
            f"this lbc reads {VERSION}, {LAYOUT!r}; update lbc"
        )
    model = members_of(top["model"], "model", {"arch", "kwargs", "task"})
    digests = {name: _stored(name, entry, header) for name, entry in typed(top["tensors"], dict, "tensors").items()}
    manifest = Manifest(
        arch=typed(model["arch"], str, "model.arch", optional=True),
        kwargs=typed(model["kwargs"], dict, "model.kwargs"),
        task=typed(model["task"], str, "model.task", optional=True),
        layers={name: _layer(name, entry) for name, entry in typed(top["layers"], dict, "layers").items()},
        dense={name: _dense(name, entry, header) for name, entry in typed(top["dense"], dict, "dense").items()},
        rounded_from=_dtypes(top["rounded_from"]),
        infos=header.tensors,
        digests=digests,
        checkpoint=_origin(top["checkpoint"]),
    )
    _check_tensors(manifest, header)
    return manifest


def _stored(name: str, entry: Any, header: Header) -> str:
    members = members_of(entry, f"tensors.{name}", {"dtype", "shape", "sha256"})
    info = TensorInfo(check_dtype(members["dtype"], name), check_shape(members["shape"], name))
    if header.tensors.get(name) != info:
        raise CheckpointError(f"tensor {name} is not in the file as the manifest says, {info.dtype} {list(info.shape)}")
    digest: str = typed(members["sha256"], str, f"tensors.{name}.sha256")
    if not _DIGEST.fullmatch(digest):
        raise CheckpointError(f"tensor {name}: the manifest's sha256 is not 64 lower-case hex digits")
    return digest


def _layer(name: str, entry: Any) -> Layer:
    members = members_of(entry, f"layers.{name}", {"shape", "dtype", "pattern"})
    shape = check_shape(members["shape"], name)
    dtype = check_dtype(members["dtype"], name)
    if dtype not in MULTIPLES:
        raise CheckpointError(f"tensor {name} is {dtype}: only {', '.join(MULTIPLES)} can be semi-structured")
    pattern = _pattern(name, members["pattern"], shape)
    if len(shape) < 2 or 0 in shape or ((len(shape) > 2 or pattern is None) and shape[1] % 4):
        raise CheckpointError(f"tensor {name} of shape {list(shape)} has no groups of four input channels")
    return Layer(shape, dtype, pattern)


def _dense(name: str, entry: Any, header: Header) -> Dense:
    members = members_of(entry, f"dense.{name}", {"why", "pattern"})
    if name not in header.tensors:
        raise CheckpointError(f"tensor {name} is listed as dense, but not in the file")
    pattern = _pattern(name, members["pattern"], header.tensors[name].shape)
    return Dense(typed(members["why"], str, f"dense.{name}.why"), pattern)


def _pattern(name: str, text: Any, shape: tuple[int, ...]) -> str | None:
    """A pattern that a weight of this shape can hold; null where none is claimed."""
    if text is None:
        return None
    match = _PATTERN.fullmatch(typed(text, str, f"pattern of {name}"))
    n, m, v = (int(match[1]), int(match[2]), int(match[3] or 1)) if match else (0, 0, 0)
    if not 1 <= n < m <= 32 or (match and match[3] == "1"):
        raise CheckpointError(f"tensor {name}: {text[:20]!r} is not a pattern N:M or N:M/V")
    if len(shape) < 2 or 0 in shape or shape[1] % m or shape[0] % v:
        raise CheckpointError(f"tensor {name}: shape {list(shape)} does not divide into groups of {text}")
    return str(text)


def _dtypes(value: Any) -> tuple[str, ...]:
    names = [check_dtype(entry, "rounded_from") for entry in typed(value, list, "rounded_from")]
    if names != sorted(set(names)):
        raise CheckpointError("the manifest's rounded_from is not sorted")
    return tuple(names)


def _origin(value: Any) -> dict[str, Any]:
    origin = members_of(value, "checkpoint", {*_ORIGIN, "epoch"})
    for name, kind in _ORIGIN.items():
        typed(origin[name], kind, f"checkpoint.{name}")
    typed(origin["epoch"], int, "checkpoint.epoch", optional=True)
    if not _DIGEST.fullmatch(origin["sha256"]):
        raise CheckpointError("the manifest's checkpoint.sha256 is not 64 lower-case hex digits")
    return origin


def _check_tensors(manifest: Manifest, header: Header) -> None:
    """Every tensor of the file is described, every layer has its two parts, and nothing is there twice."""
    if odd := sorted(set(header.tensors) ^ set(manifest.digests)):
        raise CheckpointError(f"tensor {odd[0]} is only in the file or only in the manifest ({len(odd)} such)")
    for name, layer in manifest.layers.items():
        if name in header.tensors or name in manifest.dense:
            raise CheckpointError(f"tensor {name} is stored dense and sparse at once")
        for part, expected in zip((name + PACKED, name + META), layer.stored(), strict=True):
            if header.tensors.get(part) != expected:
                raise CheckpointError(f"tensor {part} must be {expected.dtype} {list(expected.shape)}")
    owned = parts(manifest.layers)
    for name, info in header.tensors.items():
        if name.endswith((PACKED, META)) != (name in owned):
            raise CheckpointError(f"tensor {name} belongs to no layer: the endings are reserved")
        if name not in owned and (len(info.shape) > 1) != (name in manifest.dense):
            raise CheckpointError(
                f"tensor {name} of shape {list(info.shape)} is wrongly listed as dense, or not listed"
            )
