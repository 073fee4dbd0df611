"""Files of `torch.save`, read by torch's restricted unpickler: it builds tensors and plain containers and runs nothing.

Where it refuses, so do we; there is no way around it. One harmless class is allowed beyond torch's own list:
`argparse.Namespace`, a bag of settings, which timm's and DeiT's training scripts put into every checkpoint.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbc_cli.errors import CheckpointError, UsageError, did_you_mean

# Where training scripts keep a model's weights in a checkpoint.
CONTAINERS = (
    "state_dict", "model", "model_state_dict", "model_state", "module", "net", "weights",
    "model_ema", "ema", "state_dict_ema", "ema_state_dict",
)  # fmt: skip
_REFUSED = re.compile(r"(?:GLOBAL|global:?|class|type) ['\"]?([A-Za-z_][\w.]*\.[\w.]+)")
_REMEDY = (
    "where you trust it, save the weights alone, with torch.save(model.state_dict(), path) or "
    "safetensors.torch.save_file"
)


def read_pickle(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the state dict of a file of `torch.save`.

    Args:
        path: the file.
        key: the entry that holds the weights ("model_ema"); None: the only one that can.

    Returns:
        Name -> tensor, names as they stand in the file.

    Raises:
        CheckpointError: if the file is damaged, or holds more than tensors and plain containers.
        UsageError: if several entries hold weights and none was named, or the one named does not.
    """
    return _checked(_state_dict(_load(path), path, key), path)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below, such as sparse tensors
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        text = " ".join(str(error).split())
        refused = _REFUSED.search(text)
        if "eights only" in text or "weights_only" in text:
            what = f" ({refused[1]})" if refused else ""
            raise CheckpointError(
                f"{path} holds more than tensors{what}: refused, since reading it could run code; {_REMEDY}"
            ) from error
        raise CheckpointError(f"{path} cannot be read by torch.load ({type(error).__name__}: {text[:160]})") from error


def _state_dict(content: Any, path: Path, key: str | None) -> Mapping[Any, Any]:
    """The mapping of names to tensors, at the top or in one of the usual entries."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}: a state dict is needed; {_REMEDY}")
    if key is not None:
        return _entry(content, path, key)
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    found = [name for name in CONTAINERS if _holds_tensors(content.get(name))]
    if len(found) > 1:
        listed = ", ".join(map(repr, found))
        raise UsageError(f"{path} holds several models ({listed}): say which with --key, such as --key {found[0]}")
    if not found:
        names = ", ".join(map(str, list(content)[:8]))
        raise CheckpointError(f"{path} holds no state dict among its entries ({names or 'none'}); {_REMEDY}")
    return dict(_nested(content[found[0]]))


def _entry(content: Mapping[Any, Any], path: Path, key: str) -> Mapping[Any, Any]:
    entry = _nested(content.get(key))
    if not _holds_tensors(entry):
        names = [str(name) for name, value in content.items() if _holds_tensors(value)]
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise UsageError(f"{path} has no state dict {key!r}: {has}.{did_you_mean(key, names)}")
    return dict(entry)


def _nested(entry: Any) -> Any:
    """What an entry holds: some scripts wrap the state dict once more."""
    inner = entry.get("state_dict") if isinstance(entry, Mapping) else None
    return inner if isinstance(inner, Mapping) else entry


def _holds_tensors(value: Any) -> bool:
    entry = _nested(value)
    return isinstance(entry, Mapping) and any(isinstance(item, Tensor) for item in entry.values())


def _checked(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, each of them plain and no larger than what the file stores of it."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: the state dict's {str(name)[:80]!r} is a {type(value).__name__}: only tensors are read"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantised" if value.is_quantized else "on the meta device" if value.is_meta else str(value.layout)
            raise CheckpointError(f"{path}: {name} is {kind}: only plain dense tensors are read")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} claims {value.numel()} elements: more than the file stores")
        tensors[name] = value.detach()
    return tensors
