"""`export`: a checkpoint as what other programs load, each format in one module, each artefact verified.

    base          what a format is and gives back     registry           the formats
    run           export: checks, scratch, proof      staging            all of an artefact, or nothing
    timm          a folder for timm                   dense              one plain safetensors file
    onnx          a graph (onnx_graph, tensorrt)      semi_structured    the layout of 2:4 tensor cores
    cast          rounding to another dtype           tensor_file        safetensors, written tensor by tensor

The names load their modules when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbc_cli.exports.base import ExportedLayer, Exporter, ExportOptions, ExportResult
    from lbc_cli.exports.registry import FORMATS
    from lbc_cli.exports.run import export

__all__ = ["FORMATS", "ExportOptions", "ExportResult", "ExportedLayer", "Exporter", "export"]

_HOME = {
    "ExportOptions": "base",
    "ExportResult": "base",
    "ExportedLayer": "base",
    "Exporter": "base",
    "FORMATS": "registry",
    "export": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
