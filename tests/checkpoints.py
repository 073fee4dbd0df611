"""Checkpoints for tests: a stand-in for a pruner, small files, and files that are changed and sealed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.checkpoint import save
from lbc_cli.patterns import Pattern, magnitude_mask


@dataclass
class FakeTarget:
    name: str
    pattern: Pattern
    structured: bool = True


class FakePruner:
    """Magnitude masks on the layers named, as a pruner would report them."""

    method = "magnitude"

    def __init__(self, model: nn.Module, patterns: dict[str, str], phase: str = "final", epoch: int = 3) -> None:
        self.phase, self.epoch = phase, epoch
        self.targets = tuple(FakeTarget(name, Pattern.parse(text)) for name, text in patterns.items())
        weights = dict(model.named_parameters())
        self._masks = {t.name: magnitude_mask(weights[t.name], t.pattern) for t in self.targets}
        with torch.no_grad():
            for name, mask in self._masks.items():
                weights[name].masked_fill_(~mask, 0)

    def masks(self) -> dict[str, Tensor]:
        return self._masks

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        yield


class SmallNet(nn.Module):
    """A convolution, a linear layer, a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, (1, 3))
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(16, 4)
        self.fc = nn.Linear(4, 3)


PATTERNS = {"conv.weight": "2:4/3", "fc1.weight": "3:8"}


def small_model(seed: int = 0) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet()


def small_checkpoint(path: Path) -> SmallNet:
    model = small_model()
    save(model, path, pruner=FakePruner(model, PATTERNS), metrics={"top1": 12.5}, recipe="seed = 1\n")
    return model


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytearray]:
    """Header, manifest and data of a checkpoint."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["lbc"]), bytearray(content[8 + length :])


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


# Manifests that say the same in another spelling.
SPELLINGS: dict[str, Callable[[Any], str]] = {
    "spaces": lambda manifest: json.dumps(manifest, sort_keys=True, ensure_ascii=False),
    "other order": lambda manifest: json.dumps(dict(reversed(manifest.items())), separators=(",", ":")),
    "repeated key": lambda manifest: canonical(manifest)[:-1] + ',"version":1}',
    "escaped": lambda manifest: canonical(manifest).replace('"fc.bias"', '"fc\\u002ebias"'),
    "newline": lambda manifest: canonical(manifest) + "\n",
    "other number": lambda manifest: canonical(manifest).replace("12.5", "1.25e1"),
}


def sealed(
    header: dict[str, Any], manifest: dict[str, Any], data: bytes, spell: Callable[[Any], str] = canonical
) -> bytes:
    """A file around these parts with every digest recomputed, as someone who tampers with it would."""
    for name, entry in header.items():
        if name in manifest.get("tensors", {}) and name != "__metadata__":
            begin, end = entry["data_offsets"]
            manifest["tensors"][name]["sha256"] = hashlib.sha256(data[begin:end]).hexdigest()
    text = spell(manifest)
    header["__metadata__"]["lbc"] = text
    header["__metadata__"]["lbc.sha256"] = hashlib.sha256(text.encode()).hexdigest()
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def _set(*path: Any) -> Callable[[dict[str, Any], dict[str, Any], bytearray], None]:
    """A mutation of the manifest: the last of `path` is the value."""

    def mutate(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
        place: Any = manifest
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return mutate


def _drop(*path: str) -> Callable[[dict[str, Any], dict[str, Any], bytearray], None]:
    def mutate(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return mutate


def _rename(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
    """Rename a stored tensor in both places, so that only its meaning breaks."""
    manifest["tensors"]["odd.nm_index"] = manifest["tensors"].pop("fc1.weight.nm_index")
    header["odd.nm_index"] = header.pop("fc1.weight.nm_index")


def _path_name(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
    manifest["tensors"]["../fc.bias"] = manifest["tensors"].pop("fc.bias")
    header["../fc.bias"] = header.pop("fc.bias")


def _both_ways(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
    manifest["sparse"]["fc.bias"] = manifest["sparse"]["fc1.weight"]


def _huge_empty(header: dict[str, Any], manifest: dict[str, Any], data: bytearray) -> None:
    header["zz"] = {"dtype": "BOOL", "shape": [0, 10**12], "data_offsets": [len(data), len(data)]}
    manifest["tensors"]["zz"] = {"dtype": "BOOL", "shape": [0, 10**12], "sha256": ""}


SPARSE = ("sparse", "fc1.weight")
MUTATIONS: dict[str, Callable[[dict[str, Any], dict[str, Any], bytearray], None]] = {
    "other N": _set(*SPARSE, "pattern", "2:8"),
    "other M": _set(*SPARSE, "pattern", "3:16"),
    "same sizes, other M": _set(*SPARSE, "pattern", "6:16"),
    "N above M": _set(*SPARSE, "pattern", "9:8"),
    "M above 32": _set(*SPARSE, "pattern", "3:64"),
    "pattern with spaces": _set(*SPARSE, "pattern", "3: 8"),
    "pattern with zeros in front": _set(*SPARSE, "pattern", "03:8"),
    "vector": _set(*SPARSE, "vector", 2),
    "vector zero": _set(*SPARSE, "vector", 0),
    "vector true": _set(*SPARSE, "vector", True),
    "shape": _set(*SPARSE, "shape", [4, 24]),
    "shape transposed": _set(*SPARSE, "shape", [16, 4]),
    "shape with a string": _set(*SPARSE, "shape", [4, "16"]),
    "shape with a boolean": _set(*SPARSE, "shape", [4, 16, True]),
    "negative shape": _set(*SPARSE, "shape", [-4, -16]),
    "dtype": _set(*SPARSE, "dtype", "I32"),
    "unknown dtype": _set(*SPARSE, "dtype", "F31"),
    "unknown sparse member": _set(*SPARSE, "code", "x"),
    "missing sparse member": _drop(*SPARSE, "vector"),
    "sparse entry gone": _drop(*SPARSE),
    "sparse entry without tensors": _set(
        "sparse", "ghost", {"pattern": "2:4", "vector": 1, "shape": [4, 4], "dtype": "F32"}
    ),
    "tensor unlisted": _drop("tensors", "fc.bias"),
    "tensor of another dtype": _set("tensors", "fc.bias", "dtype", "I32"),
    "tensor of another shape": _set("tensors", "fc.bias", "shape", [1, 3]),
    "tensor missing": _set("tensors", "ghost", {"dtype": "F32", "shape": [1], "sha256": "0" * 64}),
    "unstructured ghost": _set("unstructured", "ghost", 3),
    "unstructured of a sparse tensor": _set("unstructured", "fc1.weight", 3),
    "phase": _set("phase", "done"),
    "training with sparse tensors": _set("phase", "training"),
    "version": _set("version", 2),
    "version true": _set("version", True),
    "epoch": _set("epoch", 1.5),
    "model": _set("model", "resnet18"),
    "model member": _set("model", "code", "import os"),
    "metrics": _set("metrics", []),
    "unknown member": _set("extra", 1),
    "missing member": _drop("recipe"),
    "index renamed": _rename,
    "name that is a path": _path_name,
    "dense and packed": _both_ways,
    "huge empty shape": _huge_empty,
}
