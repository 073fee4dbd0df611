"""Models around weights that come from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli import checkpoint, models
from lbc_cli.errors import ModelError
from lbc_cli.targets import clean_name, unwrap
from lbc_cli.weights.base import Weights
from lbc_cli.weights.containers import is_checkpoint, read


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | str | None = None,
    device: torch.device | str | None = None,
    check_digests: bool = True,
) -> nn.Module:
    """Load a model, ready for inference.

    Args:
        path: one of our checkpoints, a timm folder, or any weight file that `read` can read.
        model: fill this model, or create this timm model; None: the one that the file names. Plain weight files name
            none; the number of classes is taken from the shapes.
        device: where the model goes; None: a new model stays on the CPU, a given one where it is.
        check_digests: of our own checkpoints.

    Returns:
        The model in eval mode, its tensors bit for bit those of the file, in the file's dtypes.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged, or refused because reading it could run code.
        ModelError: if no model is named, it is unknown, or its tensors are others.
    """
    target = Path(path)
    if target.is_file() and is_checkpoint(target):
        chosen = _named(target, model) if isinstance(model, str) else model
        return checkpoint.load(target, model=chosen, device=device, check_digests=check_digests)
    weights = read(target, check_digests=check_digests)
    if isinstance(model, nn.Module):
        fill(model, weights.tensors, str(target))
        filled = model
    else:
        filled = create(weights, model)
    return (filled if device is None else filled.to(device)).eval()


def create(weights: Weights, name: str | None = None, *, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Create the timm model of some weights and put them into it.

    Args:
        weights: from `read`.
        name: timm name; None: the one that the file gives.
        kwargs: arguments of `timm.create_model`, over those that the file gives or its shapes show.

    Returns:
        The model on the CPU, in training mode, in the file's dtypes.

    Raises:
        ModelError: if the file names no model and none is given, or the weights do not fit it.
    """
    arch = name or weights.arch
    if arch is None:
        raise ModelError(f"{weights.path} does not say which model it is: name it, such as resnet50")
    same = weights.arch is not None and weights.arch.partition(".")[0] == arch.partition(".")[0]
    known = {**models.arguments_from(arch, weights.tensors), **(weights.kwargs if same else {})}
    model = models.create(arch, kwargs={**known, **(kwargs or {})})
    fill(model, weights.tensors, str(weights.path))
    if same and weights.images:
        config = getattr(model, "pretrained_cfg", None) or {}
        model.pretrained_cfg = {**config, **weights.images}  # type: ignore[assignment]
    return model


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put tensors into a model as they are, dtype included. Parameters keep their identity: tied ones stay tied.

    Args:
        model: wrapped by DDP or torch.compile is fine.
        tensors: exactly the model's names and shapes; counters of batches may be missing.
        source: what to call them in messages.

    Raises:
        ModelError: if they do not fit; the model is unchanged then.
    """
    base = unwrap(model)
    models.check_fit(base, tensors, source)
    places = {clean_name(name): place for name, place in base.state_dict(keep_vars=True).items()}
    for name, tensor in tensors.items():
        if places[name].is_floating_point() and not (tensor.is_floating_point() and tensor.element_size() > 1):
            raise ModelError(
                f"{source} does not fit the model: {name} is {tensor.dtype} there and {places[name].dtype} in the "
                f"model; quantised weights are not read"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            place = places[name]
            place.data = tensor.to(place.device) if place.is_floating_point() else tensor.to(place)


def _named(path: Path, name: str) -> nn.Module:
    """The model that the user names for one of our checkpoints, with the arguments that the checkpoint gives."""
    manifest = checkpoint.read_manifest(path)
    if manifest.arch is not None and manifest.arch.partition(".")[0] != name.partition(".")[0]:
        raise ModelError(f"{path} is a {manifest.arch}, not a {name}: leave the model's name out")
    return models.create(name, kwargs=manifest.kwargs)
