"""What a checkpoint must know to create its model again: the timm name and the arguments that change tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lbc_cli import models
from lbc_cli.errors import UsageError
from lbc_cli.targets import unwrap

Architecture = Mapping[str, Any]
_MEMBERS = {"arch", "kwargs", "task"}


# Ways to give a parameter its first values: torch's own, and what timm's truncated normal is made of.
_FILLS: frozenset[Any] = frozenset(
    [getattr(Tensor, name) for name in ["normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"]]
    + [getattr(nn.init, name) for name in ["normal_", "uniform_", "constant_", "kaiming_uniform_", "kaiming_normal_"]]
)


class uninitialised(TorchFunctionMode):  # noqa: N801 (a context manager, as torch spells its own)
    """Within this context parameters are created without values, for a model whose tensors all come from a file.

    Random numbers for a ViT-L take seconds, and touch all of its memory once more. Buffers get their values as ever, as
    some are in no file; so do parameters that a model computes by other means.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip what would only fill a parameter."""
        named = kwargs or {}
        target = args[0] if args else named.get("tensor")
        if func in _FILLS and isinstance(target, nn.Parameter):
            return target
        return func(*args, **named)


def check_architecture(arch: Architecture) -> Architecture:
    """Check a description given by the caller.

    Raises:
        UsageError: unless it has exactly "arch", "kwargs" and "task".
    """
    if set(arch) != _MEMBERS or not isinstance(arch["arch"], str) or not isinstance(arch["kwargs"], Mapping):
        raise UsageError(
            f"arch={dict(arch)!r} does not describe a model: give "
            '{"arch": "resnet18", "kwargs": {"num_classes": 10}, "task": "classification"}'
        )
    return arch


def describe_architecture(model: nn.Module) -> Architecture:
    """Derive the description of a timm model from the model itself, wrapped or not.

    Args:
        model: any model; only those that timm has created carry a name.

    Returns:
        "arch", "kwargs" and "task"; "arch" is None when the model is not timm's.
    """
    if record := models.created(model):
        return {"arch": record.arch.partition(".")[0], "kwargs": dict(record.kwargs), "task": "classification"}
    model = unwrap(model)
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    if not isinstance(cfg, Mapping) or not isinstance(name, str):
        return {"arch": None, "kwargs": {}, "task": None}
    kwargs: dict[str, Any] = {}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = classes
    if (channels := _input_channels(model, cfg)) not in (None, 3):
        kwargs["in_chans"] = channels
    if (size := _image_size(model)) not in (None, tuple(cfg.get("input_size", ()))[1:]):
        kwargs["img_size"] = list(size or ())
    if isinstance(pool := _pooling(model), str) and pool:
        kwargs["global_pool"] = pool
    return {"arch": name, "kwargs": kwargs, "task": "classification"}


def _input_channels(model: nn.Module, cfg: Mapping[str, Any]) -> int | None:
    first = cfg.get("first_conv")
    name = first[0] if isinstance(first, list | tuple) and first else first
    if not isinstance(name, str):
        return None
    try:
        channels = getattr(model.get_submodule(name), "in_channels", None)
    except AttributeError:
        return None
    # A stem that moves 4 x 4 pixels into channels (tresnet) has 16 times those of the image.
    return channels if isinstance(channels, int) and channels != 48 else None


def _image_size(model: nn.Module) -> tuple[int, ...] | None:
    """The size for which position embeddings were made; None where a model takes any size."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return tuple(size) if isinstance(size, list | tuple) else None


def _pooling(model: nn.Module) -> str | None:
    pool = getattr(model, "global_pool", None)
    if pool is None:
        pool = getattr(getattr(model, "head", None), "global_pool", None)
    return pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
