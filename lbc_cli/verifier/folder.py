"""A timm folder, `config.json` and `model.safetensors`, as timm writes them for itself and for the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.verifier.report import Finding, Report
from lbc_cli.verifier.rules import is_ours
from lbc_cli.verifier.semi_structured import is_semi_structured
from lbc_cli.verifier.source import Source, strict_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_CONFIG_LIMIT = 8 * 1024 * 1024
_PICKLES = ("pytorch_model.bin", "model.pth", "model.pt", "open_clip_pytorch_model.bin")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def weights_in(folder: Path) -> Path:
    """The weights of a timm folder.

    Raises:
        UsageError: if it is none, or holds its weights in another form.
    """
    weights = folder / WEIGHTS
    if (folder / CONFIG).is_file() and weights.is_file():
        return weights
    for name in (*_SHARDED, *_PICKLES):
        if (folder / name).is_file():
            raise UsageError(f"{folder} holds {name}: {_remedy(name)}")
    if weights.is_file():
        raise UsageError(f"{folder} is not a timm folder, it has no {CONFIG}: give the checkpoint in it, {weights}")
    raise UsageError(f"{folder} is not a timm folder: {CONFIG} and {WEIGHTS} are needed")


def _remedy(name: str) -> str:
    if name in _SHARDED:
        return f"weights in several files are not read; save them as one {WEIGHTS}"
    return (
        f"only safetensors are verified, as a pickle may run code; `lbc convert` reads it safely, or save the model as "
        f"{WEIGHTS}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        CheckpointError: if it is too large, not JSON, or not an object that names an architecture.
    """
    with (folder / CONFIG).open("rb") as file:
        raw = file.read(_CONFIG_LIMIT + 1)
    if len(raw) > _CONFIG_LIMIT:
        raise CheckpointError(f"{CONFIG} is larger than {_CONFIG_LIMIT} bytes")
    try:
        config = strict_json(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{CONFIG} names no architecture: timm needs that member")
    return config


def creation(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which timm creates the model of a folder, besides its name."""
    arguments = config.get("model_args")
    found = dict(arguments) if isinstance(arguments, dict) else {}
    if type(config.get("num_classes")) is int:
        found["num_classes"] = config["num_classes"]
    return found


def check_folder(folder: Path, source: Source, report: Report) -> None:
    """What is odd about a timm folder beside its tensors: names that timm does not know, files it might prefer."""
    if is_ours(source) or is_semi_structured(source):
        message = (
            f"{WEIGHTS} holds packed tensors, and timm reads dense ones: write the folder with `lbc export FILE "
            f"--format timm`"
        )
        report.add(Finding("folder", "", message))
    for name in (*_SHARDED, *_PICKLES):
        if (folder / name).is_file():
            report.add(Finding("folder", "", f"{name} lies beside {WEIGHTS}: it was not looked at", 1, "warning"))
