"""The only module that creates timm models: names checked, every argument accounted for, weights loaded strictly.

timm is imported inside the functions, after `check_torchvision`: with a torchvision that does not match torch,
`import timm` itself fails, and the user should read one line about the two versions instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.errors import ModelError, did_you_mean
from lbc_cli.targets import unwrap

Tensors = Mapping[str, Tensor]
_RECORD = "_lbc_created"


@dataclass(frozen=True, slots=True)
class Created:
    """How a model was created, kept with the model.

    Attributes:
        arch: the timm name, with its tag if one was given.
        kwargs: arguments of `timm.create_model` besides the name and `pretrained`; enough to build it again.
        image_size: side in pixels that was asked for; 0: the model's own.
    """

    arch: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    image_size: int = 0


def check_torchvision() -> None:
    """Make sure that torchvision can be imported, as timm needs it to.

    Raises:
        ModelError: naming both versions and the install line.
    """
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        found = _version("torchvision")
        state = f"torchvision {found} does not match torch {_version('torch')}" if found else "torchvision is missing"
        raise ModelError(
            f"{state} ({_cause(error)}): install a pair that belongs together with "
            f"`pip install --upgrade torch torchvision`"
        ) from error


def with_common_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms that take their statistics over all ranks; names and parameters stay.

    Raises:
        ModelError: on a CPU, for which torch has none.
    """
    if device.type != "cuda":
        raise ModelError("train.sync_bn: torch has batch norms over several processes on CUDA only; leave it false")
    from timm.layers import convert_sync_batchnorm

    common: nn.Module = convert_sync_batchnorm(model)
    return common


def create(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int = 0,
    pretrained: bool = False,
    init: Path | Tensors | None = None,
    read: Callable[[Path], Tensors] | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
    instead: str = "give init a file",
) -> nn.Module:
    """Create a timm model.

    Args:
        name: a timm name, with or without a pretrained tag ("resnet50", "resnet50.a1_in1k").
        num_classes: size of the classifier; None: the model's own. With `pretrained`, timm starts a new classifier
            where the size differs.
        image_size: side in pixels; matters to models built for one size (most transformers). 0: the model's own.
        pretrained: load timm's weights, from its cache or the network.
        init: load these weights instead: a file, or tensors by name. Names and shapes must be exactly the model's.
        read: how to read an `init` file; None: as safetensors.
        drop_rate: dropout before the classifier; None: the model's own.
        drop_path_rate: stochastic depth; None: the model's own (0.1 for Swin, 0 for most).
        kwargs: further arguments of `timm.create_model`.
        instead: what to do where pretrained weights are not to be had, for the message.

    Returns:
        The model on the CPU, in training mode.

    Raises:
        ModelError: for an unknown name, an argument that the model does not take, or weights that cannot be loaded.
    """
    if pretrained and init is not None:
        raise ModelError(f"{name}: pretrained and init exclude each other: keep one start for the weights")
    check_name(name)
    chosen = {"num_classes": num_classes, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    arguments = _merge(name, {key: value for key, value in chosen.items() if value is not None}, kwargs or {})
    arguments = _with_image_size(name, arguments, image_size)
    if pretrained:
        _check_weights_exist(name, instead)
    with _quiet_hub():
        model, arguments = _build(name, pretrained, arguments, instead)
    setattr(model, _RECORD, Created(name, arguments, image_size))
    if isinstance(init, Mapping):
        load_weights(model, init, "the weights given")
    elif init is not None:
        load_weights(model, (read or read_safetensors)(Path(init)), str(init))
    return model


def created(model: nn.Module) -> Created | None:
    """How `create` made this model (or the one inside its wrappers), None if something else made it."""
    record = getattr(unwrap(model), _RECORD, None)
    return record if isinstance(record, Created) else None


def check_name(name: str) -> None:
    """Check that timm knows a model.

    Raises:
        ModelError: with the nearest names.
    """
    timm = _timm()
    arch, _, tag = name.partition(".")
    if ":" in name or "/" in name:
        raise ModelError(f"{name!r} is not a timm model name: write one such as resnet50, and give weights as a file")
    if not timm.is_model(arch):
        raise ModelError(
            f"timm {timm.__version__} has no model {name!r}.{did_you_mean(arch, timm.list_models())} "
            f"`timm.list_models()` lists all names"
        )
    try:
        _pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_pretrained(f"{arch}.*")
        nearest = did_you_mean(name, known) or f" It has: {', '.join(known) or 'none'}."
        raise ModelError(f"{arch} has no pretrained tag {tag!r} in timm {timm.__version__}.{nearest}") from error


def is_known(name: str) -> bool:
    """Whether timm has a model of this name."""
    return bool(_timm().is_model(name.partition(".")[0]))


def family(name: str) -> str:
    """The family a model belongs to: the name of timm's module for it ("resnet", "vision_transformer", "deit").

    Raises:
        ModelError: for an unknown name.
    """
    check_name(name)
    from timm.models import model_entrypoint

    return str(model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2])


def data_config(model: nn.Module, image_size: int = 0) -> dict[str, Any]:
    """How images must be prepared for a model.

    Args:
        model: from `create`, or any model; without timm's configuration ImageNet's usual values hold.
        image_size: side in pixels; 0: the size it was created for, else the model's own.

    Returns:
        input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode.
    """
    _timm()
    from timm.data import resolve_data_config

    inner = unwrap(model)
    config = dict(resolve_data_config(pretrained_cfg=getattr(inner, "pretrained_cfg", None) or {}, model=inner))
    channels, height, width = config["input_size"]
    if record := created(inner):
        channels = record.kwargs.get("in_chans", channels)
        height, width = _built_size(record) or (height, width)
    if image_size:
        height = width = image_size
    config["input_size"] = (channels, height, width)
    return config


def from_folder(folder: Path) -> nn.Module:
    """The model in a timm folder (config.json and model.safetensors), exactly as plain timm loads it.

    Raises:
        ModelError: if timm cannot load it.
    """
    try:
        model: nn.Module = _timm().create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:
        raise ModelError(f"timm cannot load {folder}: {_cause(error)}") from error
    return model


def input_size(model: nn.Module, image_size: int = 0) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model takes; arguments as for `data_config`."""
    channels, height, width = data_config(model, image_size)["input_size"]
    return int(channels), int(height), int(width)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, under its stored name.

    Raises:
        ModelError: if there is no such file, or it is not safetensors.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"{path}: no such weight file")
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({_cause(error)}): convert pickled weights with "
            f"safetensors.torch.save_file(state_dict, path)"
        ) from error


def load_weights(model: nn.Module, tensors: Tensors, source: str) -> None:
    """Load weights whose names and shapes are exactly the model's, converted to the model's dtypes.

    Args:
        model: what to fill, in place.
        tensors: state-dict name -> tensor.
        source: what to call the weights in messages.

    Raises:
        ModelError: saying what is missing, unexpected or of another shape; the model is unchanged then.
    """
    check_fit(model, tensors, source)
    with torch.no_grad():
        model.load_state_dict(dict(tensors), strict=True)


def check_fit(model: nn.Module, tensors: Tensors, source: str) -> None:
    """Check that names and shapes are exactly the model's; only counters of batches may be missing.

    Raises:
        ModelError: saying what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    sizes = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    problems = [
        *_listed("missing", missing),
        *_listed("unexpected", [name for name in tensors if name not in own]),
        *(
            f"{name} is {list(tensors[name].shape)} there and {list(own[name].shape)} in the model"
            for name in sizes[:3]
        ),
    ]
    if problems:
        hint = _classifier_hint(model, own, tensors)
        raise ModelError(f"{source} does not fit the model: {'; '.join(problems)}{hint}")


def arguments_from(name: str, tensors: Tensors) -> dict[str, int]:
    """The arguments of a model that the shapes of its weights give away: num_classes, and in_chans where it is not 3.

    Args:
        name: a timm name.
        tensors: state-dict name -> tensor.

    Raises:
        ModelError: for an unknown name.
    """
    check_name(name)
    config = _pretrained_cfg(name)
    found: dict[str, int] = {}
    for key, layer, axis in (("num_classes", config.classifier, 0), ("in_chans", config.first_conv, 1)):
        first = layer[0] if isinstance(layer, list | tuple) and layer else layer
        weight = tensors.get(f"{first}.weight")
        if weight is not None and weight.dim() > axis:
            found[key] = int(weight.shape[axis])
    # A stem that moves 4 x 4 pixels into channels (tresnet) has 16 times those of the image.
    if found.get("in_chans") in (3, 48):
        del found["in_chans"]
    return found


def _listed(what: str, names: Iterable[str], most: int = 3) -> list[str]:
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return [f"{what} {', '.join(every[:most])}{more}"] if every else []


def _classifier_hint(model: nn.Module, own: Tensors, tensors: Tensors) -> str:
    """A word on the number of classes, if nothing else keeps weights from fitting."""
    config = getattr(model, "pretrained_cfg", None) or {}
    listed = config.get("classifier") or ()
    names = (listed,) if isinstance(listed, str) else tuple(listed)
    classifier = [name for name in own if name.rpartition(".")[0] in names and name in tensors]
    for name in classifier:
        here, there = own[name].shape, tensors[name].shape
        if here[1:] != there[1:] or here[:1] == there[:1]:
            return ""
    others = {name for name in own if name not in classifier and not name.endswith("num_batches_tracked")}
    if not classifier or any(name not in tensors or tensors[name].shape != own[name].shape for name in others):
        return ""
    return " (the classifier: the weights were trained on another number of classes than the model has)"


def _timm() -> Any:
    check_torchvision()
    import timm

    return timm


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _merge(name: str, chosen: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments from both places, refusing what is said twice and differently, or is not timm's to be told here."""
    for key, value in chosen.items():
        if key in kwargs and kwargs[key] != value:
            raise ModelError(f"{name}: {key} is {value!r} and, in its kwargs, {kwargs[key]!r}: say it once")
    if reserved := sorted(kwargs.keys() & {"pretrained", "checkpoint_path", "model_name", "features_only"}):
        raise ModelError(f"{name}: {reserved[0]!r} cannot be among the model's kwargs: use pretrained or init")
    return {**kwargs, **chosen}


def _with_image_size(name: str, arguments: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Add `img_size` for models that are built for one size, where it is not the one they have anyway."""
    given = arguments.get("img_size")
    if image_size and given is not None and _pair(given) != (image_size, image_size):
        raise ModelError(f"{name}: image_size is {image_size} and, in its kwargs, img_size {given!r}: say it once")
    config = _pretrained_cfg(name)
    if not image_size or given is not None or arguments.get("dynamic_img_size") or not config.fixed_input_size:
        return arguments
    own = tuple(config.input_size[1:])
    return arguments if own == (image_size, image_size) else {**arguments, "img_size": image_size}


def _built_size(record: Created) -> tuple[int, int] | None:
    size = record.kwargs.get("img_size") or record.image_size
    return _pair(size) if size else None


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _pretrained_cfg(name: str) -> Any:
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return get_pretrained_cfg(name) or PretrainedCfg()


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's client from telling of every retry: what comes of them is said once, as an error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_weights_exist(name: str, instead: str) -> None:
    if not _pretrained_cfg(name).has_weights:
        others = _timm().list_pretrained(f"{name.partition('.')[0]}.*")
        remedy = f"choose one of {', '.join(others[:5])}" if others else instead
        raise ModelError(f"timm has no pretrained weights for {name}: {remedy}")


def _build(name: str, pretrained: bool, arguments: dict[str, Any], instead: str) -> tuple[nn.Module, dict[str, Any]]:
    """Create the model; returns it with the arguments it took."""
    try:
        return _timm().create_model(name, pretrained=pretrained, **arguments), arguments
    except TypeError as error:
        refused = [key for key in arguments if f"'{key}'" in str(error)]
        if refused == ["drop_path_rate"] and arguments["drop_path_rate"] == 0:
            # A model without stochastic depth has none: asking it for none is not a mistake.
            return _build(name, pretrained, {k: v for k, v in arguments.items() if k != "drop_path_rate"}, instead)
        raise ModelError(_refusal(name, refused, error)) from error
    except Exception as error:
        if pretrained and not isinstance(error, AssertionError | KeyError):
            raise ModelError(
                f"cannot load timm's pretrained weights for {name} ({_cause(error)}): {_weights_remedy(instead)}"
            ) from error
        raise ModelError(f"cannot create {name} with {arguments}: {_cause(error)}") from error


def _refusal(name: str, refused: list[str], error: TypeError) -> str:
    if refused == ["img_size"]:
        return f"{name} is built for one image size and takes no other ({_cause(error)}): leave image_size at 0"
    if refused:
        return f"{name} takes no argument {', '.join(map(repr, refused))} ({_cause(error)}): leave it out"
    return f"cannot create {name}: {_cause(error)}"


def _weights_remedy(instead: str) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return f"HF_HUB_OFFLINE is set, so only cached weights can be used; unset it, or {instead}"
    return f"check the network, or {instead}"
