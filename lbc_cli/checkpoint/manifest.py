"""The manifest of a checkpoint, version 1: what the file holds, how it came about, and digests of all of it.

`__metadata__` of the safetensors file has exactly three keys:

    format        "pt"
    lbc           canonical JSON (compact, keys sorted) with exactly these members:
      version       1
      model         {"arch": timm name or null, "kwargs": {...}, "task": string or null}
      sparse        {T: {"pattern": "2:4", "vector": 1, "shape": [...], "dtype": "F32"}}: tensors stored as T.nm_values
                    and T.nm_index (layout: `lbc_cli.packing`); every other tensor stands under its own name.
                    Any dtype but F8_E8M0, which has no zero
      unstructured  {T: number of non-zeros}: dense tensors that were pruned without a pattern
      tensors       {stored name: {"dtype", "shape", "sha256"}}, every tensor of the file, digest of its bytes in hex
      method        name of the method, "dense" if none
      phase         "final", or "training" while candidates are not single yet: then nothing is stored as sparse
      epoch         integer or null
      metrics       {...}; a number that is not finite is the string "NaN", "Infinity" or "-Infinity";
                    "transposable": true claims that every sparse tensor holds its pattern along the output channels too
      recipe        the resolved recipe as TOML, "" if none
      environment   {...}: versions and hardware; no paths, hosts or users
                    (nothing in the manifest is nested deeper than 64 levels)
    lbc.sha256    SHA-256 of the `lbc` string in UTF-8, lower-case hex

Dtypes are in safetensors' spelling. Nothing in it selects code to run. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lbc_cli.checkpoint.container import (
    Header,
    TensorInfo,
    canonical_json,
    check_dtype,
    check_metadata_keys,
    check_shape,
    in_file_order,
    opened,
    parse_json,
)
from lbc_cli.errors import CheckpointError

VERSION = 1
VALUES, INDEX = ".nm_values", ".nm_index"
PHASES = ("final", "training")
_TOP = (
    "version", "model", "sparse", "unstructured", "tensors", "method", "phase", "epoch", "metrics", "recipe",
    "environment",
)  # fmt: skip
_METADATA = ("format", "lbc", "lbc.sha256")
_PATTERN = re.compile("([1-9][0-9]?):([1-9][0-9]?)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_M = 32
_MAX_DEPTH = 64  # beyond some hundreds, JSON can be parsed and not printed, or only where the stack is short


@dataclass(frozen=True, slots=True)
class Sparse:
    """One tensor that is stored packed."""

    n: int
    m: int
    vector: int
    shape: tuple[int, ...]
    """[O, I, *K] of the dense tensor."""
    dtype: str

    @property
    def pattern(self) -> str:
        """N:M, without the vector length."""
        return f"{self.n}:{self.m}"

    def stored(self) -> tuple[TensorInfo, TensorInfo]:
        """What the file must hold: the values, the index."""
        out, inp, *kernel = self.shape
        groups = inp // self.m
        row_bytes = -(-groups * self.n * max(1, (self.m - 1).bit_length()) // 8)
        values = TensorInfo(self.dtype, (out, *kernel, groups, self.n))
        return values, TensorInfo("U8", (out // self.vector, *kernel, row_bytes))


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the file."""

    info: TensorInfo
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself; see the head of this module."""

    arch: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    sparse: Mapping[str, Sparse] = field(default_factory=dict)
    unstructured: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Stored] = field(default_factory=dict)
    method: str = "dense"
    phase: str = "final"
    epoch: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the model's tensors, sorted: the dense ones and the sparse ones."""
        parts = {name + part for name in self.sparse for part in (VALUES, INDEX)}
        return sorted((set(self.tensors) - parts) | set(self.sparse))

    @property
    def dense(self) -> dict[str, TensorInfo]:
        """The model's tensors as they are when all are dense, in the order in which safetensors would store them."""
        infos = {name: entry.info for name, entry in self.tensors.items()}
        for name, entry in self.sparse.items():
            del infos[name + VALUES], infos[name + INDEX]
            infos[name] = TensorInfo(entry.dtype, entry.shape)
        return {name: infos[name] for name in in_file_order(infos)}

    def to_json(self) -> str:
        """The canonical JSON of the `lbc` key.

        Raises:
            ValueError, TypeError: if `kwargs` or `metrics` hold what JSON cannot.
            CheckpointError: if they are nested too deep.
        """
        check_depth([[self.kwargs], self.metrics, self.environment])  # the nesting they have in the manifest
        return canonical_json(
            {
                "version": VERSION,
                "model": {"arch": self.arch, "kwargs": dict(self.kwargs), "task": self.task},
                "sparse": {name: _sparse_json(entry) for name, entry in self.sparse.items()},
                "unstructured": dict(self.unstructured),
                "tensors": {name: _stored_json(entry) for name, entry in self.tensors.items()},
                "method": self.method,
                "phase": self.phase,
                "epoch": self.epoch,
                "metrics": finite_json(self.metrics),
                "recipe": self.recipe,
                "environment": finite_json(self.environment),
            }
        )

    def to_metadata(self) -> dict[str, str]:
        """The three keys of `__metadata__`."""
        text = self.to_json()
        return {"format": "pt", "lbc": text, "lbc.sha256": sha256(text.encode())}


def sha256(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def finite_json(value: Any) -> Any:
    """A value with numbers that are not finite as the strings "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, Mapping):
        return {key: finite_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _sparse_json(entry: Sparse) -> dict[str, Any]:
    return {"pattern": entry.pattern, "vector": entry.vector, "shape": list(entry.shape), "dtype": entry.dtype}


def _stored_json(entry: Stored) -> dict[str, Any]:
    return {"dtype": entry.info.dtype, "shape": list(entry.info.shape), "sha256": entry.sha256}


def check_digest(metadata: Mapping[str, str], key: str, digest_key: str) -> Any:
    """Parse a JSON string of the metadata after checking its digest and its canonical form.

    Raises:
        CheckpointError: if the digest is another, or the JSON is not canonical.
    """
    text = metadata[key]
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the {key} metadata is not text: {error.reason}") from error
    if sha256(encoded) != metadata[digest_key]:
        raise CheckpointError(f"the {key} metadata does not match its SHA-256: the file is damaged")
    parsed = parse_json(text, f"the {key} metadata")
    try:
        canonical = canonical_json(parsed) == text
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise CheckpointError(f"the {key} metadata is not in canonical form (compact JSON, sorted keys)")
    return parsed


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read what a checkpoint says of itself, without its tensors.

    The digest of the manifest is checked, those of the tensors are not.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if the header is damaged or not canonical.
    """
    with opened(path) as (_, header):
        return parse_manifest(header)


def parse_manifest(header: Header) -> Manifest:
    """Read the manifest of a checkpoint and check it against the header.

    Raises:
        CheckpointError: if anything is missing, unknown, or does not follow from the rest.
    """
    check_metadata_keys(header.metadata, _METADATA, "a checkpoint of lbc")
    parsed = check_digest(header.metadata, "lbc", "lbc.sha256")
    check_depth(parsed)
    if isinstance(parsed, dict) and parsed.get("version") != VERSION:
        raise CheckpointError(
            f"is a checkpoint of version {str(parsed.get('version'))[:20]}: this lbc reads {VERSION}; update lbc"
        )
    manifest = _from_json(parsed)
    check_consistency(manifest, header.tensors)
    return manifest


def _from_json(parsed: Any) -> Manifest:
    top = members_of(parsed, "the top", _TOP)
    model = members_of(top["model"], "model", {"arch", "kwargs", "task"})
    tensors = {name: _stored(name, entry) for name, entry in typed(top["tensors"], dict, "tensors").items()}
    sparse = {name: _sparse(name, entry) for name, entry in typed(top["sparse"], dict, "sparse").items()}
    unstructured = typed(top["unstructured"], dict, "unstructured")
    if type(top["version"]) is not int:
        raise CheckpointError("the manifest's version is not an integer")
    return Manifest(
        arch=typed(model["arch"], str, "model.arch", optional=True),
        kwargs=typed(model["kwargs"], dict, "model.kwargs"),
        task=typed(model["task"], str, "model.task", optional=True),
        sparse=sparse,
        unstructured={name: typed(count, int, f"unstructured.{name}") for name, count in unstructured.items()},
        tensors=tensors,
        method=typed(top["method"], str, "method"),
        phase=_phase(top["phase"]),
        epoch=typed(top["epoch"], int, "epoch", optional=True),
        metrics=typed(top["metrics"], dict, "metrics"),
        recipe=typed(top["recipe"], str, "recipe"),
        environment=typed(top["environment"], dict, "environment"),
    )


def members_of(value: Any, what: str, expected: Collection[str]) -> dict[str, Any]:
    """An object of a manifest that has exactly the members expected.

    Raises:
        CheckpointError: if it is none, or has others.
    """
    if not isinstance(value, dict) or set(value) != set(expected):
        found = sorted(value)[:16] if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{what} of the manifest has the members {found}: needs exactly {sorted(expected)}")
    return value


def typed(value: Any, kind: type, what: str, *, optional: bool = False) -> Any:
    """A value of a manifest that has exactly the type expected (true is no integer), or is null where that may be.

    Raises:
        CheckpointError: if not.
    """
    if (optional and value is None) or type(value) is kind:
        return value
    raise CheckpointError(f"the manifest's {what} is a {type(value).__name__}: must be a {kind.__name__}")


def _phase(value: Any) -> Literal["final", "training"]:
    if value not in PHASES:
        raise CheckpointError(f"the manifest's phase is {str(value)[:40]!r}: must be one of {list(PHASES)}")
    return "final" if value == "final" else "training"


def _stored(name: str, entry: Any) -> Stored:
    members = members_of(entry, f"tensors.{name}", {"dtype", "shape", "sha256"})
    digest = typed(members["sha256"], str, f"tensors.{name}.sha256")
    if not _DIGEST.fullmatch(digest):
        raise CheckpointError(f"tensor {name}: the manifest's sha256 is not 64 lower-case hex digits")
    return Stored(TensorInfo(check_dtype(members["dtype"], name), check_shape(members["shape"], name)), digest)


def _sparse(name: str, entry: Any) -> Sparse:
    members = members_of(entry, f"sparse.{name}", {"pattern", "vector", "shape", "dtype"})
    match = _PATTERN.fullmatch(typed(members["pattern"], str, f"sparse.{name}.pattern"))
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    vector = typed(members["vector"], int, f"sparse.{name}.vector")
    if not 1 <= n < m <= _MAX_M or vector < 1:
        raise CheckpointError(
            f"tensor {name}: pattern {members['pattern']!r} with vector {vector}: needs 1 <= N < M <= {_MAX_M}, V >= 1"
        )
    shape = check_shape(members["shape"], name)
    if len(shape) < 2 or 0 in shape or shape[1] % m or shape[0] % vector:
        raise CheckpointError(
            f"tensor {name}: shape {list(shape)} does not divide into groups of {n}:{m}, V = {vector}"
        )
    if members["dtype"] == "F8_E8M0":
        raise CheckpointError(f"tensor {name}: F8_E8M0 has no zero: it cannot be sparse")
    if members["dtype"] == "F8_E8M0":
        raise CheckpointError(f"tensor {name} is F8_E8M0, which has no zero: it cannot be sparse")
    return Sparse(n, m, vector, shape, check_dtype(members["dtype"], name))


def check_depth(value: Any) -> None:
    """Check that JSON is not nested deeper than a manifest may be.

    Raises:
        CheckpointError: if it is.
    """
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [inner for entry in level for inner in _inside(entry)]
    if level:
        raise CheckpointError(f"the manifest is nested deeper than {_MAX_DEPTH} levels")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def check_consistency(manifest: Manifest, found: Mapping[str, TensorInfo]) -> None:
    """Check that the parts of a manifest, and the tensors of the file, belong together.

    Args:
        manifest: the manifest.
        found: the tensors of the file.

    Raises:
        CheckpointError: naming the first tensor that does not.
    """
    if odd := sorted(set(found) ^ set(manifest.tensors)):
        where = "the file, not in the manifest" if odd[0] in found else "the manifest, not in the file"
        raise CheckpointError(f"tensor {odd[0]} is in {where} ({len(odd)} such)")
    for name, info in found.items():
        if manifest.tensors[name].info != info:
            raise CheckpointError(
                f"tensor {name} is {_describe(info)}: the manifest says {_describe(manifest.tensors[name].info)}"
            )
    _check_sparse(manifest, found)
    for name, count in manifest.unstructured.items():
        dense = found.get(name)
        if dense is None or name.endswith((VALUES, INDEX)) or not 0 <= count <= math.prod(dense.shape):
            raise CheckpointError(
                f"unstructured tensor {name} with {count} non-zeros: no such dense tensor can be there"
            )
    if manifest.phase == "training" and (manifest.sparse or manifest.unstructured):
        raise CheckpointError("the phase is training, yet tensors are listed as sparse: candidates are not single yet")


def _check_sparse(manifest: Manifest, found: Mapping[str, TensorInfo]) -> None:
    parts: set[str] = set()
    for name, entry in manifest.sparse.items():
        if name in found:
            raise CheckpointError(f"tensor {name} is stored dense and packed at once")
        for part, expected in zip((name + VALUES, name + INDEX), entry.stored(), strict=True):
            if found.get(part) != expected:
                actual = _describe(found[part]) if part in found else "missing"
                raise CheckpointError(f"tensor {part} is {actual}: {entry.pattern} needs {_describe(expected)}")
            parts.add(part)
    for name in found:
        if name.endswith((VALUES, INDEX)) and name not in parts:
            raise CheckpointError(f"tensor {name} belongs to no sparse tensor: the endings are reserved")


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"
