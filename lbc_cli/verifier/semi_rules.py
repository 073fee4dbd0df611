"""The manifest of a semi-structured export, read from its specification a second time; the writer shares nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.groups import Rule
from lbc_cli.verifier.rules import check_members, check_tensors, read_manifest
from lbc_cli.verifier.source import ELEMENT_LIMIT, Entry, Source

KEY = "semi_structured"
_TOP: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "layout": (str,),
    "model": (dict,),
    "layers": (dict,),
    "dense": (dict,),
    "rounded_from": (list,),
    "tensors": (dict,),
    "checkpoint": (dict,),
}
_MODEL: dict[str, tuple[type, ...]] = {"arch": (str, type(None)), "kwargs": (dict,), "task": (str, type(None))}
_LAYER: dict[str, tuple[type, ...]] = {"shape": (list,), "dtype": (str,), "pattern": (str, type(None))}
_DENSE: dict[str, tuple[type, ...]] = {"why": (str,), "pattern": (str, type(None))}
_CHECKPOINT: dict[str, tuple[type, ...]] = {
    "sha256": (str,),
    "method": (str,),
    "epoch": (int, type(None)),
    "metrics": (dict,),
    "recipe": (str,),
    "environment": (dict,),
}
# dtype -> rows and columns are multiples of; dtype of a word of metadata, columns that it covers.
_FORMS = {"F16": (32, 64, "I16", 16), "BF16": (32, 64, "I16", 16), "I8": (16, 128, "I32", 32)}


@dataclass(frozen=True, slots=True)
class SemiLayer:
    """What the manifest says of a layer that is stored sparse, and where its parts are."""

    name: str
    shape: tuple[int, ...]
    rule: Rule | None
    """The pattern it had in the checkpoint."""
    packed: Entry
    meta: Entry

    @property
    def columns(self) -> int:
        """Of the matrix, without padding."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class SemiClaims:
    """What the manifest claims, once it is known to be consistent."""

    method: str
    digest: str
    digests: dict[str, str]
    """Stored name -> SHA-256."""
    layers: list[SemiLayer]
    dense: dict[str, tuple[str, Rule | None]]
    """Stored dense: why, and the pattern it has nevertheless."""
    arch: str | None
    kwargs: dict[str, Any]


def is_semi_structured(source: Source) -> bool:
    """Whether the file is, or once was, a semi-structured export of lbc."""
    pair = any(
        name.endswith(".packed") and name.removesuffix("packed") + "meta" in source.entries for name in source.entries
    )
    return pair or any(key.startswith(KEY) for key in source.metadata)


def read_semi_claims(source: Source) -> SemiClaims:
    """Check the container's canonical form and the manifest, without looking at the data.

    Raises:
        CheckpointError: at the first rule that is broken.
    """
    manifest, digest = read_manifest(source, KEY)
    if isinstance(manifest, dict) and (manifest.get("version"), manifest.get("layout")) != (1, "cutlass"):
        found = f"version {str(manifest.get('version'))[:20]}, layout {str(manifest.get('layout'))[:20]!r}"
        raise CheckpointError(f"the manifest has {found}: 1, 'cutlass' are known")
    check_members(manifest, _TOP, "the manifest")
    check_members(manifest["model"], _MODEL, "model")
    check_members(manifest["checkpoint"], _CHECKPOINT, "checkpoint")
    if not re.fullmatch("[0-9a-f]{64}", manifest["checkpoint"]["sha256"]):
        raise CheckpointError("the SHA-256 of the checkpoint is none")
    _check_rounded(source, manifest["rounded_from"])
    check_tensors(source, manifest["tensors"])
    layers = [_layer(source, name, value) for name, value in manifest["layers"].items()]
    dense = {name: _dense(source, name, value) for name, value in manifest["dense"].items()}
    _check_listed(source, layers, dense)
    digests = {name: value["sha256"] for name, value in manifest["tensors"].items()}
    model = manifest["model"]
    return SemiClaims(manifest["checkpoint"]["method"], digest, digests, layers, dense, model["arch"], model["kwargs"])


def _check_rounded(source: Source, listed: list[Any]) -> None:
    known = {"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
    if any(type(name) is not str or name not in known for name in listed) or listed != sorted(set(listed)):
        raise CheckpointError(f"rounded_from is {str(listed)[:80]}: sorted float dtypes are needed")


def _layer(source: Source, name: str, value: Any) -> SemiLayer:
    check_members(value, _LAYER, f"layer {name}")
    shape, dtype = value["shape"], value["dtype"]
    if not 2 <= len(shape) <= 16 or any(type(size) is not int or not 1 <= size <= ELEMENT_LIMIT for size in shape):
        raise CheckpointError(f"layer {name} has the impossible shape {str(shape)[:80]}")
    rule = _rule(name, value["pattern"], shape)
    if math.prod(shape) > ELEMENT_LIMIT or dtype not in _FORMS or ((len(shape) > 2 or rule is None) and shape[1] % 4):
        raise CheckpointError(f"layer {name} of shape {shape} and dtype {dtype[:20]} cannot be semi-structured")
    by_rows, by_columns, word, covered = _FORMS[dtype]
    rows = math.ceil(shape[0] / by_rows) * by_rows
    columns = math.ceil(math.prod(shape[1:]) / by_columns) * by_columns
    packed = _part(source, name + ".packed", dtype, (rows, columns // 2))
    return SemiLayer(name, tuple(shape), rule, packed, _part(source, name + ".meta", word, (rows, columns // covered)))


def _part(source: Source, name: str, dtype: str, shape: tuple[int, int]) -> Entry:
    entry = source.entries.get(name)
    if entry is None or entry.described != (dtype, shape):
        raise CheckpointError(f"tensor {name} must be there as {dtype} {list(shape)}")
    return entry


def _dense(source: Source, name: str, value: Any) -> tuple[str, Rule | None]:
    check_members(value, _DENSE, f"dense tensor {name}")
    if name not in source.entries:
        raise CheckpointError(f"dense tensor {name} is not there")
    return value["why"], _rule(name, value["pattern"], list(source.entries[name].shape))


def _rule(name: str, text: str | None, shape: list[int]) -> Rule | None:
    if text is None:
        return None
    match = re.fullmatch("([1-9][0-9]?):([1-9][0-9]?)(?:/([1-9][0-9]{0,9}))?", text)
    if match is None or match[3] == "1":
        raise CheckpointError(f"{name} has the impossible pattern {text[:20]!r}")
    rule = Rule(int(match[1]), int(match[2]), int(match[3] or 1))
    if not rule.n < rule.m <= 32 or len(shape) < 2 or 0 in shape or shape[1] % rule.m or shape[0] % rule.v:
        raise CheckpointError(f"{name} of shape {shape} cannot hold {text[:20]!r}")
    return rule


def _check_listed(source: Source, layers: list[SemiLayer], dense: dict[str, Any]) -> None:
    """Every tensor of the file is a layer's part, a listed dense one, or has less than two dimensions."""
    parts = {part.name for layer in layers for part in (layer.packed, layer.meta)}
    for layer in layers:
        if layer.name in source.entries:
            raise CheckpointError(f"layer {layer.name} is stored dense as well")
    for name, entry in source.entries.items():
        if name.endswith((".packed", ".meta")) and name not in parts:
            raise CheckpointError(f"tensor {name} belongs to no layer")
        if (name in dense) != (name not in parts and len(entry.shape) > 1):
            raise CheckpointError(f"tensor {name} is listed as dense wrongly, or not listed")
