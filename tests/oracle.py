"""A third reading of the checkpoint format, slow and in plain Python, that shares nothing with the package.

`broken_rule` names the first rule of the specification that a file breaks, "" if it breaks none. The tests tamper with
files and trust neither the reader nor the verifier to say whether that mattered.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
ORDER = list(reversed(SIZES))
HEADER_LIMIT = 1 << 25
ELEMENT_LIMIT = 1 << 36
DEPTH_LIMIT = 64
KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "model": (dict,),
    "sparse": (dict,),
    "unstructured": (dict,),
    "tensors": (dict,),
    "method": (str,),
    "phase": (str,),
    "epoch": (int, type(None)),
    "metrics": (dict,),
    "recipe": (str,),
    "environment": (dict,),
}


class BrokenError(Exception):
    """A rule is broken; its name is the argument."""


def need(sound: bool, rule: str) -> None:
    if not sound:
        raise BrokenError(rule)


def broken_rule(content: bytes) -> str:
    """The first rule that a file breaks, "" if it is a sound checkpoint."""
    try:
        header, data = read_container(content)
        manifest = read_manifest(header["__metadata__"])
        check_manifest(manifest, {name: entry for name, entry in header.items() if name != "__metadata__"})
        check_data(manifest, header, data)
    except BrokenError as broken:
        return str(broken)
    return ""


def read_json(text: str, rule: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len({key for key, _ in pairs}) == len(pairs), rule)
        return dict(pairs)

    def refuse(_: str) -> Any:
        raise BrokenError(rule)

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise BrokenError(rule) from None
    level, depth = [parsed], 0
    while level := [inner for value in level for inner in inside(value)]:
        depth += 1
        need(depth <= DEPTH_LIMIT, rule)
    return parsed


def inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def compact(value: Any, *, ordered: bool) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=ordered)


def is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 16 or any(type(size) is not int or size < 0 for size in value):
        return False
    return math.prod(size or 1 for size in value) <= ELEMENT_LIMIT


def is_name(name: str) -> bool:
    if not name or name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
        return False
    return not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" or "\ud800" <= c <= "\udfff" for c in name)


def read_container(content: bytes) -> tuple[dict[str, Any], bytes]:
    need(len(content) >= 8, "size")
    length = int.from_bytes(content[:8], "little")
    need(length <= min(HEADER_LIMIT, len(content) - 8), "size")
    raw, data = content[8 : 8 + length], content[8 + length :]
    try:
        header = read_json(raw.decode(), "header")
    except UnicodeDecodeError:
        raise BrokenError("header") from None
    need(isinstance(header, dict), "header")
    metadata = header.get("__metadata__")
    need(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()), "metadata")
    need(set(metadata) == {"format", "lbc", "lbc.sha256"} and metadata["format"] == "pt", "metadata")
    again: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        need(is_name(name), "name")
        need(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, "header")
        need(isinstance(entry["dtype"], str) and entry["dtype"] in SIZES and is_shape(entry["shape"]), "header")
    at = 0
    for name in sorted(entries, key=lambda name: (ORDER.index(entries[name]["dtype"]), name)):
        size = math.prod(entries[name]["shape"]) * SIZES[entries[name]["dtype"]]
        again[name] = {
            "dtype": entries[name]["dtype"],
            "shape": entries[name]["shape"],
            "data_offsets": [at, at + size],
        }
        at += size
    spelled = compact(again, ordered=False).encode("utf-8", "surrogatepass")
    need(spelled + b" " * (-len(spelled) % 8) == raw, "spelling")
    need(at == len(data), "size")
    return header, data


def read_manifest(metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata["lbc"]
    need(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() == metadata["lbc.sha256"], "seal")
    manifest = read_json(text, "manifest")
    need(compact(manifest, ordered=True) == text, "manifest")
    need(isinstance(manifest, dict) and set(manifest) == set(KINDS), "members")
    need(all(type(manifest[name]) in kinds for name, kinds in KINDS.items()), "types")
    need(manifest["version"] == 1, "version")
    need(manifest["phase"] in ("final", "training"), "phase")
    model = manifest["model"]
    need(set(model) == {"arch", "kwargs", "task"} and isinstance(model["kwargs"], dict), "members")
    need(all(model[name] is None or isinstance(model[name], str) for name in ("arch", "task")), "types")
    return manifest


def check_manifest(manifest: dict[str, Any], entries: dict[str, Any]) -> None:
    listed, sparse = manifest["tensors"], manifest["sparse"]
    need(set(listed) == set(entries), "tensors")
    for name, value in listed.items():
        need(isinstance(value, dict) and set(value) == {"dtype", "shape", "sha256"}, "members")
        # Compared as text: 1 == True == 1.0 in Python, not in JSON.
        same = all(compact(value[key], ordered=True) == compact(entries[name][key], ordered=True) for key in DESCRIBED)
        need(same and isinstance(value["sha256"], str), "tensors")
    parts: set[str] = set()
    for name, value in sparse.items():
        need(name not in entries, "parts")
        parts |= check_sparse(name, value, entries)
    need(parts == {name for name in entries if name.endswith((".nm_values", ".nm_index"))}, "parts")
    for name, count in manifest["unstructured"].items():
        need(name in entries and name not in parts and type(count) is int, "unstructured")
        need(0 <= count <= math.prod(entries[name]["shape"]), "unstructured")
    need(manifest["phase"] == "final" or not (sparse or manifest["unstructured"]), "phase")


DESCRIBED = ("dtype", "shape")


def check_sparse(name: str, value: Any, entries: dict[str, Any]) -> set[str]:
    need(isinstance(value, dict) and set(value) == {"pattern", "vector", "shape", "dtype"}, "members")
    need(isinstance(value["pattern"], str) and type(value["vector"]) is int, "types")
    need(value["pattern"] in POSSIBLE and value["vector"] >= 1, "pattern")
    n, m = (int(number) for number in value["pattern"].split(":"))
    shape, vector = value["shape"], value["vector"]
    need(is_shape(shape) and len(shape) >= 2 and 0 not in shape, "shape")
    need(shape[1] % m == 0 and shape[0] % vector == 0, "shape")
    # F8_E8M0 has no zero, so nothing could be left out.
    need(isinstance(value["dtype"], str) and value["dtype"] in SIZES and value["dtype"] != "F8_E8M0", "dtype")
    groups, bits = shape[1] // m, width(m)
    expected = {
        name + ".nm_values": [value["dtype"], [shape[0], *shape[2:], groups, n]],
        name + ".nm_index": ["U8", [shape[0] // vector, *shape[2:], -(-groups * n * bits // 8)]],
    }
    for part, described in expected.items():
        need(part in entries and [entries[part]["dtype"], entries[part]["shape"]] == described, "parts")
    return set(expected)


POSSIBLE = {f"{n}:{m}" for m in range(2, 33) for n in range(1, m)}


def width(m: int) -> int:
    """Bits of a position code."""
    bits = 1
    while 2**bits < m:
        bits += 1
    return bits


def check_data(manifest: dict[str, Any], header: dict[str, Any], data: bytes) -> None:
    for name, value in manifest["tensors"].items():
        begin, end = header[name]["data_offsets"]
        need(hashlib.sha256(data[begin:end]).hexdigest() == value["sha256"], "digest")
    for name, value in manifest["sparse"].items():
        begin, end = header[name + ".nm_index"]["data_offsets"]
        for row in rows_of(data[begin:end], header[name + ".nm_index"]["shape"][-1]):
            check_row(row, value)


def rows_of(index: bytes, width_of_row: int) -> list[bytes]:
    return [index[at : at + width_of_row] for at in range(0, len(index), width_of_row)]


def decode_row(row: bytes, sparse: dict[str, Any]) -> tuple[list[int], int]:
    """The position codes of a row of the index, and the number that its padding bits spell."""
    n, m = (int(number) for number in sparse["pattern"].split(":"))
    bits, count = width(m), sparse["shape"][1] // m * n
    number = int.from_bytes(row, "little")
    return [number >> (c * bits) & (2**bits - 1) for c in range(count)], number >> (count * bits)


def encode_row(codes: list[int], padding: int, sparse: dict[str, Any], size: int) -> bytes:
    """The inverse of `decode_row`."""
    bits = width(int(sparse["pattern"].split(":")[1]))
    number = padding << (len(codes) * bits)
    for c, code in enumerate(codes):
        number |= code << (c * bits)
    return number.to_bytes(size, "little")


def check_row(row: bytes, sparse: dict[str, Any]) -> None:
    n, m = (int(number) for number in sparse["pattern"].split(":"))
    codes, padding = decode_row(row, sparse)
    need(padding == 0, "padding")
    for at in range(0, len(codes), n):
        group = codes[at : at + n]
        need(all(code < m for code in group), "position")
        need(len(set(group)) == n, "repeated")
        need(group == sorted(group), "unsorted")
