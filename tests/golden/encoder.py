"""A second encoder of the checkpoint format, slow and in plain Python, that shares nothing with the package.

It writes the golden files beside it (`python tests/golden/encoder.py`), from weights that are spelled out below.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I64": 8, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
ORDER = ["I64", "F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I8", "U8"]


@dataclass
class Sparse:
    """A sparse tensor: its elements as integers (bytes little-endian), row-major."""

    shape: list[int]
    dtype: str
    n: int
    m: int
    vector: int
    elements: list[int]


@dataclass
class Dense:
    shape: list[int]
    dtype: str
    elements: list[int]


def element(tensor: Sparse, *place: int) -> int:
    flat = 0
    for size, at in zip(tensor.shape, place, strict=True):
        flat = flat * size + at
    return tensor.elements[flat]


def encode_sparse(t: Sparse) -> tuple[Dense, Dense]:
    out, inp, *kernel = t.shape
    bits_per_code = 1
    while 2**bits_per_code < t.m:
        bits_per_code += 1
    positions = list(itertools.product(*(range(size) for size in kernel)))
    kept: dict[tuple[int, ...], list[int]] = {}
    index: list[int] = []
    for o in range(out // t.vector):
        for k in positions:
            bits: list[int] = []
            for g in range(inp // t.m):
                used = [
                    p for p in range(t.m) if any(element(t, o * t.vector + v, g * t.m + p, *k) for v in range(t.vector))
                ]
                free = [p for p in range(t.m) if p not in used]
                codes = sorted(used + free[: t.n - len(used)])
                assert len(codes) == t.n
                kept[(o, *k, g)] = codes
                for code in codes:
                    bits += [(code >> place) & 1 for place in range(bits_per_code)]
            bits += [0] * (-len(bits) % 8)
            index += [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
    values = [
        element(t, o, g * t.m + p, *k)
        for o in range(out)
        for k in positions
        for g in range(inp // t.m)
        for p in kept[(o // t.vector, *k, g)]
    ]
    row_bytes = len(index) // (out // t.vector) // len(positions)
    return (
        Dense([out, *kernel, inp // t.m, t.n], t.dtype, values),
        Dense([out // t.vector, *kernel, row_bytes], "U8", index),
    )


def data_of(t: Dense) -> bytes:
    return b"".join(value.to_bytes(SIZES[t.dtype], "little") for value in t.elements)


def encode(tensors: dict[str, Dense | Sparse], **manifest: object) -> bytes:
    stored: dict[str, Dense] = {}
    sparse = {}
    for name, t in tensors.items():
        if isinstance(t, Sparse):
            stored[name + ".nm_values"], stored[name + ".nm_index"] = encode_sparse(t)
            sparse[name] = {"pattern": f"{t.n}:{t.m}", "vector": t.vector, "shape": t.shape, "dtype": t.dtype}
        else:
            stored[name] = t
    lbc = json.dumps(
        {
            "version": 1,
            "sparse": sparse,
            "tensors": {
                name: {"dtype": t.dtype, "shape": t.shape, "sha256": hashlib.sha256(data_of(t)).hexdigest()}
                for name, t in stored.items()
            },
            **manifest,
        },
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )
    digest = hashlib.sha256(lbc.encode()).hexdigest()
    header: dict[str, object] = {"__metadata__": {"format": "pt", "lbc": lbc, "lbc.sha256": digest}}
    at, body = 0, b""
    for name in sorted(stored, key=lambda name: (ORDER.index(stored[name].dtype), name)):
        data = data_of(stored[name])
        header[name] = {
            "dtype": stored[name].dtype,
            "shape": stored[name].shape,
            "data_offsets": [at, at + len(data)],
        }
        at, body = at + len(data), body + data
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def sparse(shape: list[int], dtype: str, n: int, m: int, vector: int, special: list[int]) -> Sparse:
    """A weight with distinct kept values; some groups are under-filled, and `special` comes first."""
    out, inp, *kernel = shape
    positions = list(itertools.product(*(range(size) for size in kernel)))
    filled: dict[tuple[int, ...], int] = {}
    supply = itertools.chain(special, itertools.count(1))
    for o, k, g in itertools.product(range(out), positions, range(inp // m)):
        vector_number = o // vector
        used = n - (vector_number + g) % 2
        for j in range(used):
            position = (vector_number + g + sum(k) + j * 3) % m
            filled[(o, g * m + position, *k)] = next(supply)
    flat = [filled.get((o, i, *k), 0) for o in range(out) for i in range(inp) for k in positions]
    return Sparse(shape, dtype, n, m, vector, flat)


MANIFEST: dict[str, object] = {
    "model": {"arch": None, "kwargs": {}, "task": None},
    "unstructured": {},
    "method": "lbc",
    "phase": "final",
    "epoch": 7,
    "metrics": {"top1": 61.5, "loss": "NaN"},
    "recipe": 'pattern = "2:4"  # é\n',
    "environment": {"torch": "2.10.0"},
}


def golden() -> dict[str, bytes]:
    """File name -> content."""
    specials = [0x80000000, 0x7FC00001, 0xFFC12345, 0x00000001, 0x7F800000, 0xFF800000]
    bias = Dense([3], "F32", [0x3F800000, 0x80000000, 0x00000000])
    steps = Dense([], "I64", [41])
    return {
        "linear-2_4-f32.safetensors": encode(
            {"fc.weight": sparse([3, 8], "F32", 2, 4, 1, specials), "fc.bias": bias, "steps": steps}, **MANIFEST
        ),
        "conv2d-3_5v2-bf16.safetensors": encode(
            {"conv.weight": sparse([4, 10, 1, 3], "BF16", 3, 5, 2, [])}, **MANIFEST
        ),
        "conv1d-7_32-i8.safetensors": encode({"conv.weight": sparse([2, 32, 2], "I8", 7, 32, 1, [])}, **MANIFEST),
        "conv3d-1_2-f64.safetensors": encode({"w": sparse([2, 6, 1, 2, 1], "F64", 1, 2, 1, [])}, **MANIFEST),
        "linear-4_16v4-f16.safetensors": encode({"w": sparse([8, 16], "F16", 4, 16, 4, [])}, **MANIFEST),
    }


if __name__ == "__main__":
    for file_name, content in golden().items():
        (FOLDER / file_name).write_bytes(content)
