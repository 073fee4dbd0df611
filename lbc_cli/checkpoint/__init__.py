"""Checkpoints and run state: safetensors files with packed N:M tensors, a manifest and digests; no pickle.

    files         writes that leave the old content or the new
    container     the canonical safetensors file        output    writing it
    manifest      what a checkpoint says of itself (the specification of version 1); read_manifest
    tensors       torch tensors <-> bytes
    ahead         several tensors at once, within bounds
    writer        save            reader    read, stream, load
    state         save_state, load_state

The names load torch only when first used: `files` serves the command line before torch is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbc_cli.checkpoint.files import atomic_write_bytes, atomic_write_text
    from lbc_cli.checkpoint.manifest import Manifest, read_manifest
    from lbc_cli.checkpoint.reader import Checkpoint, load, read, stream
    from lbc_cli.checkpoint.state import load_state, save_state
    from lbc_cli.checkpoint.writer import save

__all__ = [
    "Checkpoint",
    "Manifest",
    "atomic_write_bytes",
    "atomic_write_text",
    "load",
    "load_state",
    "read",
    "read_manifest",
    "save",
    "save_state",
    "stream",
]

_HOME = {
    "Checkpoint": "reader",
    "Manifest": "manifest",
    "atomic_write_bytes": "files",
    "atomic_write_text": "files",
    "load": "reader",
    "load_state": "state",
    "read": "reader",
    "read_manifest": "manifest",
    "save": "writer",
    "save_state": "state",
    "stream": "reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
