"""The format `semi-structured`: 2:4 layers in the layout of torch's CUTLASS back end, as plain tensors. Version 1.

A safetensors file in canonical form (`lbc_cli.checkpoint.container`). What is not stored sparse stands under its own
name. The weight T, [O, I, *K], of a linear or ungrouped convolution layer that satisfies 2:4 is stored as two tensors.

**Matrix.** W[r, c], r = o, c = k * I + i, with k the row-major index into K (for a convolution "RSC": kernel rows,
kernel columns, channels), so that four consecutive columns are four consecutive input channels (I must be a multiple
of 4 where K is not empty or no pattern is claimed). W is padded with +0.0 at the bottom and right to [m, k], multiples
of

    F16, BF16    m of 32, k of  64        I8    m of 16, k of 128

**Quads.** Four columns 4q .. 4q+3 of a row hold at most two elements whose bytes are not all zero. A quad stores two
elements, at positions p0 < p1, and the code p0 + 4 * p1. By the elements that are not zero:

    none, {2}, {3}, {2,3}    p = 2, 3    code 14        {0}, {0,2}    p = 0, 2    code  8
    {1}, {1,2}               p = 1, 2    code  9        {0,1}         p = 0, 1    code  4
    {1,3}                    p = 1, 3    code 13        {0,3}         p = 0, 3    code 12

    T.packed    dtype of W, [m, k/2]: element 2q of a row is at p0 of quad q, element 2q + 1 at p1
    T.meta      I16 [m, k/16] for 16-bit W, I32 [m, k/32] for I8: the codes, little-endian, in the order below

**Order of the codes.** Word w of a row holds the codes of E = 4 (I16) or 8 (I32) quads, quad w*E + e in bits
4e .. 4e+3. With R = 32 rows (I16) or 16 (I32), the word of row r, column w stands in the flat tensor at

    (w // 2) * 2m + 2 * s' + t'        s = (r // R) * R + (r % 8) * (R // 8) + (r % R) // 8
                                       (s', t') = (s, w % 2), but for (s odd, 0): (s - 1, 1) and (s even, 1): (s + 1, 0)

These are the two tensors that `torch.sparse.SparseSemiStructuredTensorCUTLASS` holds, bit for bit what torch's own
conversion gives; except that torch takes -0.0 for zero, and here it is kept as any other element.

**Manifest.** `__metadata__` has exactly three keys: format "pt"; semi_structured, a canonical JSON with exactly the
members below; semi_structured.sha256, the SHA-256 of that string in lower-case hex.

    version       1
    layout        "cutlass"
    model         {"arch", "kwargs", "task"} as in the checkpoint
    layers        {T: {"shape": [O, I, *K], "dtype", "pattern": "N:M" or "N:M/V"}}; pattern as in the checkpoint, null
                  for an unstructured one
    dense         {T: {"why", "pattern"}}: tensors of two or more dimensions that are stored dense, and why
    rounded_from  dtypes of the checkpoint that were rounded or widened, sorted; [] if it is stored bit for bit
    tensors       {stored name: {"dtype", "shape", "sha256"}}, every tensor of the file
    checkpoint    {"sha256" of its manifest, "method", "epoch", "metrics", "recipe", "environment"}

A reader accepts only this encoding: the canonical codes, zero padding, shapes that follow from the manifest, no unknown
or missing tensors. Names that end in .packed or .meta are reserved. Blobs of cuSPARSELt are never stored: their layout
belongs to a version of that library, so they are made when a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lbc_cli.exports.semi_structured.writer import EXPORTER

if TYPE_CHECKING:
    from lbc_cli.exports.semi_structured.manifest import Layer, Manifest, read_manifest
    from lbc_cli.exports.semi_structured.reader import load, load_tensors

__all__ = ["EXPORTER", "Layer", "Manifest", "load", "load_tensors", "read_manifest"]

_HOME = {
    "Layer": "manifest",
    "Manifest": "manifest",
    "read_manifest": "manifest",
    "load": "reader",
    "load_tensors": "reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
