"""What lies at a path: one of the kinds that can be verified, opened, and its tensors whatever the container."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lbc_cli.errors import UsageError
from lbc_cli.verifier import folder
from lbc_cli.verifier.contents import Content
from lbc_cli.verifier.onnx import onnx_contents
from lbc_cli.verifier.packed import restored_chunks
from lbc_cli.verifier.report import Kind
from lbc_cli.verifier.rules import is_ours, read_claims
from lbc_cli.verifier.semi_structured import is_semi_structured, semi_structured_contents
from lbc_cli.verifier.source import Entry, Source, Stream, read_source

_PIECE = 1 << 20
_PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Artefact:
    """Something that can be verified, while it is open.

    Attributes:
        path: as given.
        kind: what it is.
        tensors: the safetensors container; None for ONNX.
        config: of a timm folder.
    """

    path: Path
    kind: Kind
    tensors: Source | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The safetensors container of every kind that has one."""
        assert self.tensors is not None
        return self.tensors


@contextlib.contextmanager
def open_artefact(path: Path) -> Iterator[Artefact]:
    """Open what lies at a path; its header is read and checked, its data are not.

    Raises:
        UsageError: if there is nothing, or nothing that can be verified.
        CheckpointError: if the container is damaged.
        OSError: if it cannot be read.
    """
    file = _file_of(path)
    if file.suffix == ".onnx":
        yield Artefact(path, "onnx")
        return
    with file.open("rb") as opened:
        source = read_source(opened)
        if path.is_dir():
            yield Artefact(path, "folder", source, folder.read_config(path))
        else:
            yield Artefact(path, _kind(source), source)


def contents(artefact: Artefact) -> Iterable[Content]:
    """Every tensor of an open artefact, as a model would receive it."""
    if artefact.kind == "onnx":
        return onnx_contents(artefact.path)
    if artefact.kind == "semi-structured":
        return semi_structured_contents(artefact.source)
    return _packed_contents(artefact.source) if artefact.kind == "packed" else _plain_contents(artefact.source)


def _file_of(path: Path) -> Path:
    """The file that holds the tensors."""
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    file = folder.weights_in(path) if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: is not a file")
    if file.suffix in _PICKLES:
        raise UsageError(
            f"{path} is a pickle by its name: only safetensors, timm folders and ONNX files are verified, as a pickle "
            f"may run code; `lbc convert` reads it safely"
        )
    return file


def _kind(source: Source) -> Kind:
    if is_semi_structured(source):
        return "semi-structured"
    return "packed" if is_ours(source) else "dense"


def _plain_contents(source: Source) -> Iterator[Content]:
    return (_plain(source, entry) for entry in source.entries.values())


def _plain(source: Source, entry: Entry) -> Content:
    return Content(entry.name, entry.dtype, entry.shape, partial(_pieces, source, entry))


def _pieces(source: Source, entry: Entry) -> Iterator[bytes]:
    stream = Stream(source, entry, hashed=False)
    for begin in range(entry.begin, entry.end, _PIECE):
        yield stream.read(min(_PIECE, entry.end - begin))


def _packed_contents(source: Source) -> Iterator[Content]:
    packed = read_claims(source).packed
    parts = {part.name for tensor in packed for part in (tensor.values, tensor.index)}
    for tensor in packed:
        chunks: Callable[[], Iterator[bytes]] = partial(restored_chunks, source, tensor)
        yield Content(tensor.name, tensor.values.dtype, tensor.shape, chunks, weight=True)
    for entry in source.entries.values():
        if entry.name not in parts:
            yield _plain(source, entry)
