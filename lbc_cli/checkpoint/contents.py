"""What a file holds, from its header alone: in no time, whatever its size. Nothing here imports torch.

checkpoint        ours: everything that the manifest says
run state         ours, to resume from: tensors without names of their own
safetensors       anyone's: names, shapes, dtypes; a pattern is not claimed
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lbc_cli.checkpoint.container import DTYPES, Header, opened
from lbc_cli.checkpoint.manifest import INDEX, VALUES, Manifest, parse_manifest
from lbc_cli.errors import CheckpointError, UsageError

_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")  # what torch.save writes, new and old

Kind = Literal["checkpoint", "run state", "safetensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor of the model, and what the file spends on it."""

    name: str
    shape: tuple[int, ...]
    """Dense, [O, I, *K] for weights."""
    dtype: str
    stored_bytes: int
    pattern: str = ""
    """N:M or N:M/V of a packed tensor."""
    nonzeros: int | None = None
    """Of a tensor that was pruned without a pattern."""

    @property
    def dense_bytes(self) -> int:
        """What the tensor takes when stored dense."""
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a file says of itself. Digests of tensors are not checked: that takes reading them."""

    path: Path
    kind: Kind
    file_bytes: int
    header_bytes: int
    metadata: Mapping[str, str]
    tensors: tuple[Held, ...]
    """In the order of a dense safetensors file."""
    manifest: Manifest | None = None
    """Of a checkpoint."""
    manifest_sha256: str = ""

    @property
    def sparse(self) -> tuple[Held, ...]:
        """The packed tensors."""
        return tuple(tensor for tensor in self.tensors if tensor.pattern)

    @property
    def dense(self) -> tuple[Held, ...]:
        """The others."""
        return tuple(tensor for tensor in self.tensors if not tensor.pattern)


def foreign_kind(path: Path) -> str:
    """What a file is that nobody would call safetensors, in words; "" if it may be safetensors, sound or not."""
    if path.suffix == ".onnx":
        return "an ONNX file"
    with path.open("rb") as file:
        begin = file.read(9)
    # The length of a safetensors header, which a brace follows, may begin with the same bytes.
    return "a file of torch.save" if begin.startswith(_PICKLED) and begin[8:] != b"{" else ""


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Read what a file holds, without its tensors.

    Args:
        path: a checkpoint or run state of lbc, or any safetensors file.

    Raises:
        UsageError: if there is no such file, or it is of another kind altogether.
        CheckpointError: if the header is damaged; for files of lbc also if it is not canonical, or the manifest is not
            what its digest says.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{path} is a folder: name the file in it, such as {target / 'model.safetensors'}")
    if target.is_file() and (foreign := foreign_kind(target)):
        raise UsageError(f"{path} is {foreign}: only safetensors files, ours or not, are inspected")
    with opened(path, canonical=False) as (_, header):
        ours = any(key == "lbc" or key.startswith("lbc.") for key in header.metadata)
        packed = any(name.endswith((VALUES, INDEX)) for name in header.tensors)
        if packed and not ours:
            raise CheckpointError("holds packed tensors, but no manifest: another program has rewritten it")
    if not ours:
        return _contents(path, header, "safetensors")
    with opened(path) as (_, header):
        if "lbc.state" in header.metadata:
            return _contents(path, header, "run state")
        return _contents(path, header, "checkpoint", parse_manifest(header))


def _contents(path: str | os.PathLike[str], header: Header, kind: Kind, manifest: Manifest | None = None) -> Contents:
    sizes = {name: info.num_bytes for name, info in header.tensors.items()}
    return Contents(
        path=Path(path),
        kind=kind,
        file_bytes=header.data_start + sum(sizes.values()),
        header_bytes=header.data_start,
        metadata=header.metadata,
        tensors=_plain(header) if manifest is None else _described(manifest, sizes),
        manifest=manifest,
        manifest_sha256=header.metadata["lbc.sha256"] if manifest is not None else "",
    )


def _plain(header: Header) -> tuple[Held, ...]:
    return tuple(
        Held(name=name, shape=info.shape, dtype=info.dtype, stored_bytes=info.num_bytes)
        for name, info in header.tensors.items()
    )


def _described(manifest: Manifest, sizes: Mapping[str, int]) -> tuple[Held, ...]:
    return tuple(
        Held(
            name=name,
            shape=info.shape,
            dtype=info.dtype,
            stored_bytes=sizes[name + VALUES] + sizes[name + INDEX] if name in manifest.sparse else sizes[name],
            pattern=_pattern(manifest, name),
            nonzeros=manifest.unstructured.get(name),
        )
        for name, info in manifest.dense.items()
    )


def _pattern(manifest: Manifest, name: str) -> str:
    """As `Pattern` spells it, which would load torch."""
    entry = manifest.sparse.get(name)
    if entry is None:
        return ""
    return entry.pattern if entry.vector == 1 else f"{entry.pattern}/{entry.vector}"
