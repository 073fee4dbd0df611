"""Run state: nested containers of tensors and scalars in one safetensors file, without pickle and bit for bit.

The file is a container as checkpoints are, with the metadata

    format              "pt"
    lbc.state           canonical JSON {"version": 1, "state": ..., "tensors": {name: {"dtype", "shape", "sha256"}}}
    lbc.state.sha256    SHA-256 of that string

`state` spells the nesting: null, booleans, integers and strings are themselves, a list is an array, and the rest is an
object with one member: {"float": 16 hex digits, big-endian IEEE 754}, {"tuple": [...]}, {"dict": [[key, value], ...]},
{"tensor": name}. Dictionaries keep their order and the types of their keys (optimizers use integers).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lbc_cli.checkpoint.container import (
    Header,
    TensorInfo,
    canonical_json,
    check_metadata_keys,
    opened,
    tensor_data,
)
from lbc_cli.checkpoint.manifest import check_digest, sha256
from lbc_cli.checkpoint.output import write_digested
from lbc_cli.checkpoint.tensors import describe, from_bytes, to_bytes
from lbc_cli.errors import CheckpointError, UsageError

VERSION = 1
MAX_DEPTH = 100
_METADATA = ("format", "lbc.state", "lbc.state.sha256")


def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write a run state atomically, replacing what was there.

    Args:
        path: the file.
        state: nested dict, list and tuple of tensors, int, float, bool, str and None; keys are int, float, bool, str,
            None. Tensors on any device; they come back on the CPU.

    Raises:
        UsageError: for a value that cannot be stored, with its place.
        OutputError: if the file cannot be written; a previous one is then as it was.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _encode(state, tensors, "state", 0)
    infos = {name: describe(tensor, name) for name, tensor in tensors.items()}

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        entries = {
            name: {"dtype": info.dtype, "shape": list(info.shape), "sha256": digests[name]}
            for name, info in infos.items()
        }
        text = canonical_json({"version": VERSION, "state": skeleton, "tensors": entries})
        return {"format": "pt", "lbc.state": text, "lbc.state.sha256": sha256(text.encode())}

    write_digested(path, infos, metadata, lambda name: to_bytes(tensors[name]))


def load_state(path: str | os.PathLike[str]) -> Any:
    """Read a run state, checking every digest.

    Returns:
        What was given to `save_state`: the same nesting, types and bits, tensors on the CPU.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged, or not a run state.
    """
    with opened(path) as (file, header):
        skeleton, digests = _parse(header)
        tensors: dict[str, Tensor] = {}
        for name, info, data in tensor_data(file, header):
            if sha256(data) != digests[name]:
                raise CheckpointError(f"tensor {name} does not match its SHA-256: the file is damaged")
            tensors[name] = from_bytes(data, info)
        state = _decode(skeleton, tensors, 0)
        if tensors:
            raise CheckpointError(f"tensor {next(iter(tensors))} belongs nowhere in the state")
        return state


def _parse(header: Header) -> tuple[Any, dict[str, str]]:
    check_metadata_keys(header.metadata, _METADATA, "a run state of lbc")
    parsed = check_digest(header.metadata, "lbc.state", "lbc.state.sha256")
    if not isinstance(parsed, dict) or set(parsed) != {"version", "state", "tensors"} or parsed["version"] != VERSION:
        raise CheckpointError(f"is not a run state of version {VERSION}")
    expected = {name: _entry(name, info, parsed["tensors"]) for name, info in header.tensors.items()}
    if set(expected) != set(parsed["tensors"]):
        raise CheckpointError("the run state names tensors that the file does not have")
    return parsed["state"], expected


def _entry(name: str, info: TensorInfo, entries: Any) -> str:
    """The digest of one tensor, after comparing its description with the header's."""
    entry = entries.get(name) if isinstance(entries, dict) else None
    described = {"dtype": info.dtype, "shape": list(info.shape)}
    if not isinstance(entry, dict) or entry != {**described, "sha256": entry.get("sha256")}:
        raise CheckpointError(f"tensor {name} is not as the run state describes it")
    return str(entry["sha256"])


def _encode(value: Any, tensors: dict[str, Tensor], place: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise UsageError(f"{place[:200]} is nested deeper than {MAX_DEPTH} levels")
    if value is None or type(value) in (bool, int):
        return value
    if type(value) is str:
        return _checked_text(value, place)
    if type(value) is float:
        return {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        name = f"t{len(tensors):06d}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [_encode_item(key, entry, tensors, place, depth) for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(entry, tensors, f"{place}[{i}]", depth + 1) for i, entry in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise UsageError(f"{place} is a {type(value).__module__}.{type(value).__qualname__}: a run state cannot hold it")


def _checked_text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{place} is a string that UTF-8 cannot spell: {error.reason}") from error
    return text


def _encode_item(key: Any, value: Any, tensors: dict[str, Tensor], place: str, depth: int) -> list[Any]:
    if key is not None and type(key) not in (bool, int, str, float):
        raise UsageError(
            f"{place} has the key {str(key)[:80]!r} of type {type(key).__qualname__}: use strings or integers"
        )
    return [_encode(key, tensors, place, depth + 1), _encode(value, tensors, f"{place}[{key!r}]", depth + 1)]


def _decode(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:
        raise CheckpointError("the run state is nested too deep")
    if isinstance(value, list):
        return [_decode(entry, tensors, depth + 1) for entry in value]
    if type(value) is float:
        raise CheckpointError("the run state holds a decimal number: they are stored as hex digits")
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or next(iter(value)) not in _DECODERS:
        raise CheckpointError(f"the run state holds an unknown object {str(value)[:80]}")
    ((kind, content),) = value.items()
    return _DECODERS[kind](content, tensors, depth)


def _decode_float(content: Any, tensors: dict[str, Tensor], depth: int) -> float:
    try:
        number: float = struct.unpack(">d", bytes.fromhex(content))[0]
    except (ValueError, TypeError, struct.error) as error:
        raise CheckpointError(f"the run state holds {str(content)[:80]!r} where a number should be") from error
    return number


def _decode_tuple(content: Any, tensors: dict[str, Tensor], depth: int) -> tuple[Any, ...]:
    return tuple(_decode(entry, tensors, depth + 1) for entry in _items(content))


def _decode_dict(content: Any, tensors: dict[str, Tensor], depth: int) -> dict[Any, Any]:
    pairs = [_items(pair, 2) for pair in _items(content)]
    keys = [_decode(key, tensors, depth + 1) for key, _ in pairs]
    if any(isinstance(key, list | dict | tuple | Tensor) for key in keys):
        raise CheckpointError("the run state holds a dictionary with a key that is not a scalar")
    return {key: _decode(value, tensors, depth + 1) for key, (_, value) in zip(keys, pairs, strict=True)}


def _decode_tensor(content: Any, tensors: dict[str, Tensor], depth: int) -> Tensor:
    """Each tensor is taken once; what is left over belongs nowhere."""
    tensor = tensors.pop(content, None) if isinstance(content, str) else None
    if tensor is None:
        raise CheckpointError(f"the run state refers to the tensor {str(content)[:80]!r}, which is not there")
    return tensor


def _items(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise CheckpointError("the run state holds a list of another form than it should")
    return value


_DECODERS: Mapping[str, Callable[[Any, dict[str, Tensor], int], Any]] = {
    "float": _decode_float,
    "tuple": _decode_tuple,
    "dict": _decode_dict,
    "tensor": _decode_tensor,
}
