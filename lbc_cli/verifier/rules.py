"""The manifest's rules, read from the specification a second time: nothing here is shared with the writer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.bits import FORMATS
from lbc_cli.verifier.groups import Rule
from lbc_cli.verifier.packed import PackedTensor
from lbc_cli.verifier.source import ELEMENT_LIMIT, Entry, Source, strict_json

_MEMBERS: dict[str, tuple[type, ...]] = {
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
_MODEL: dict[str, tuple[type, ...]] = {"arch": (str, type(None)), "kwargs": (dict,), "task": (str, type(None))}
_TENSOR: dict[str, tuple[type, ...]] = {"dtype": (str,), "shape": (list,), "sha256": (str,)}
_SPARSE: dict[str, tuple[type, ...]] = {"pattern": (str,), "vector": (int,), "shape": (list,), "dtype": (str,)}
# How safetensors orders tensors before their names.
_ORDER = [
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Claims:
    """What the manifest claims, once it is known to be consistent."""

    phase: str
    method: str
    digest: str
    digests: dict[str, str]
    """Stored name -> SHA-256."""
    packed: list[PackedTensor]
    unstructured: dict[str, int]
    arch: str | None
    kwargs: dict[str, Any]
    transposable: bool
    """Whether the packed tensors hold their patterns along the output channels too."""


def is_ours(source: Source) -> bool:
    """Whether the file is, or once was, a checkpoint of lbc."""
    return any(key.startswith("lbc") for key in source.metadata) or any(
        name.endswith((".nm_values", ".nm_index")) for name in source.entries
    )


def read_claims(source: Source) -> Claims:
    """Check the container's canonical form and the manifest, without looking at the data.

    Raises:
        CheckpointError: at the first rule that is broken.
    """
    return _claims(source, *read_manifest(source, "lbc"))


def read_manifest(source: Source, key: str) -> tuple[Any, str]:
    """Check that a header is canonical and holds a sound manifest, and nothing else, in its metadata.

    Args:
        source: the file.
        key: of the manifest; its SHA-256 is under `key`.sha256.

    Returns:
        The manifest as JSON, and its SHA-256.

    Raises:
        CheckpointError: at the first rule that is broken.
    """
    _check_canonical(source, ["format", key, f"{key}.sha256"])
    text = source.metadata[key]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    if digest != source.metadata[f"{key}.sha256"]:
        raise CheckpointError("the manifest does not match its SHA-256")
    try:
        manifest = strict_json(text)
        again = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the manifest is not JSON: {error}") from error
    if _nested_above(manifest, 64):
        raise CheckpointError("the manifest is nested deeper than 64 levels")
    if again != text:
        raise CheckpointError("the manifest is not compact JSON with sorted keys")
    return manifest, digest


def _nested_above(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        inner = [entry.values() if isinstance(entry, dict) else entry for entry in level if type(entry) in (dict, list)]
        level = [entry for entries in inner for entry in entries]
    return bool(level)


def _check_canonical(source: Source, keys: list[str]) -> None:
    """The header has one spelling: three sorted metadata keys first, tensors in order, compact, padded to 8 bytes."""
    if sorted(source.metadata) != keys or source.metadata["format"] != "pt":
        raise CheckpointError(f"the metadata keys are {sorted(source.metadata)[:8]}: {', '.join(keys)} are needed")
    ordered = sorted(source.entries.values(), key=lambda entry: (_ORDER.index(entry.dtype), entry.name))
    spelled: dict[str, Any] = {"__metadata__": {key: source.metadata[key] for key in sorted(source.metadata)}}
    start = 8 + len(source.raw)
    for entry in ordered:
        offsets = [entry.begin - start, entry.end - start]
        spelled[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(spelled, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    if list(source.entries) != [entry.name for entry in ordered] or text + b" " * (-len(text) % 8) != source.raw:
        raise CheckpointError("the header is not in canonical form")


def _claims(source: Source, manifest: Any, digest: str) -> Claims:
    if isinstance(manifest, dict) and manifest.get("version") != 1:
        raise CheckpointError(f"the manifest has version {str(manifest.get('version'))[:20]}: 1 is known")
    check_members(manifest, _MEMBERS, "the manifest")
    check_members(manifest["model"], _MODEL, "model")
    if manifest["phase"] not in ("final", "training"):
        raise CheckpointError(f"the phase is {manifest['phase'][:40]!r}: final or training are known")
    if manifest["phase"] == "training" and (manifest["sparse"] or manifest["unstructured"]):
        raise CheckpointError("the phase is training, but sparse tensors are claimed")
    check_tensors(source, manifest["tensors"])
    packed = [_packed(source, name, value) for name, value in manifest["sparse"].items()]
    _check_no_strays(source, packed)
    for name, nonzeros in manifest["unstructured"].items():
        if type(nonzeros) is not int or name not in source.entries or name.endswith((".nm_values", ".nm_index")):
            raise CheckpointError(f"the unstructured tensor {name} is not there, or its count is no integer")
    digests = {name: value["sha256"] for name, value in manifest["tensors"].items()}
    arch, kwargs = manifest["model"]["arch"], manifest["model"]["kwargs"]
    return Claims(
        phase=manifest["phase"],
        method=manifest["method"],
        digest=digest,
        digests=digests,
        packed=packed,
        unstructured=manifest["unstructured"],
        arch=arch,
        kwargs=kwargs,
        transposable=manifest["metrics"].get("transposable") is True,
    )


def check_members(value: Any, members: dict[str, tuple[type, ...]], what: str) -> None:
    """Check that a JSON object has exactly these members, each of one of its types.

    Raises:
        CheckpointError: if not.
    """
    if not isinstance(value, dict) or set(value) != set(members):
        raise CheckpointError(f"{what} must have exactly the members {sorted(members)}")
    for name, kinds in members.items():
        if type(value[name]) not in kinds:
            raise CheckpointError(f"{name} of {what} is a {type(value[name]).__name__}")


def check_tensors(source: Source, listed: dict[str, Any]) -> None:
    """Check that a manifest lists exactly the tensors of the file, each with dtype, shape and a SHA-256.

    Raises:
        CheckpointError: if not.
    """
    if set(listed) != set(source.entries):
        odd = sorted(set(listed) ^ set(source.entries))
        raise CheckpointError(f"manifest and file hold different tensors: {odd[0]} ({len(odd)} such)")
    for name, value in listed.items():
        check_members(value, _TENSOR, f"tensor {name}")
        entry = source.entries[name]
        if value["dtype"] != entry.dtype or value["shape"] != list(entry.shape):
            raise CheckpointError(f"tensor {name} is {entry.dtype} {list(entry.shape)}, not what the manifest says")
        if any(type(size) is not int for size in value["shape"]) or not re.fullmatch("[0-9a-f]{64}", value["sha256"]):
            raise CheckpointError(f"tensor {name} has a shape or SHA-256 of another form than it should")


def _packed(source: Source, name: str, value: Any) -> PackedTensor:
    check_members(value, _SPARSE, f"sparse tensor {name}")
    match = re.fullmatch("([1-9][0-9]?):([1-9][0-9]?)", value["pattern"])
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    rule = Rule(n, m, value["vector"])
    if not 1 <= rule.n < rule.m <= 32 or rule.v < 1:
        raise CheckpointError(f"sparse tensor {name} has the impossible pattern {value['pattern'][:20]!r}/{rule.v}")
    shape = value["shape"]
    if not 2 <= len(shape) <= 16 or any(type(size) is not int or not 1 <= size <= ELEMENT_LIMIT for size in shape):
        raise CheckpointError(f"sparse tensor {name} has the impossible shape {str(shape)[:80]}")
    unfit = shape[1] % rule.m or shape[0] % rule.v or math.prod(shape) > ELEMENT_LIMIT
    # F8_E8M0 has no zero, so nothing can be left out.
    if unfit or value["dtype"] not in FORMATS or value["dtype"] == "F8_E8M0" or name in source.entries:
        raise CheckpointError(f"sparse tensor {name} of shape {shape} cannot be {rule} of dtype {value['dtype'][:20]}")
    groups = shape[1] // rule.m
    width = math.ceil(groups * rule.n * rule.bits() / 8)
    values = _part(source, name + ".nm_values", value["dtype"], (shape[0], *shape[2:], groups, rule.n))
    index = _part(source, name + ".nm_index", "U8", (shape[0] // rule.v, *shape[2:], width))
    return PackedTensor(name, rule, tuple(shape), values, index)


def _part(source: Source, name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    entry = source.entries.get(name)
    if entry is None or entry.described != (dtype, shape):
        found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise CheckpointError(f"tensor {name} is {found}: {dtype} {list(shape)} is needed")
    return entry


def _check_no_strays(source: Source, packed: list[PackedTensor]) -> None:
    parts = {part.name for tensor in packed for part in (tensor.values, tensor.index)}
    for name in source.entries:
        if name.endswith((".nm_values", ".nm_index")) and name not in parts:
            raise CheckpointError(f"tensor {name} belongs to no sparse tensor")
