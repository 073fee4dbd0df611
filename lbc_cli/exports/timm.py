"""The format `timm`: a folder that plain timm loads, `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    config.json          the architecture, the arguments that make this model of it, and how images are prepared
    model.safetensors    the dense weights under timm's own keys

timm finds the arguments in three places: `num_classes` and `label_names` at the top, everything else that the model was
created with in `model_args`, the data settings in `pretrained_cfg`. The latter are those that the model was trained
with, where the checkpoint says so. What belongs to timm's own weights of that name (their address, licence, test size,
label offset) is left out: they are not these weights. `first_conv` is left out where images have other than 3 channels,
as older timm would fold the stem's weights from 3 channels into those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbc_cli.errors import UsageError, VerificationError
from lbc_cli.exports.base import Job, Written
from lbc_cli.exports.dense import write_dense

if TYPE_CHECKING:
    from torch import nn

_KEPT = ("min_input_size", "fixed_input_size", "pool_size", "first_conv", "classifier")


class Timm:
    """See the head of this module."""

    name = "timm"
    description = "a folder with config.json and dense model.safetensors"
    runs_on = 'timm, without lbc: create_model("local-dir:FOLDER", pretrained=True)'
    extra: str | None = None
    dtypes = ("float32", "float16", "bfloat16")

    def default_path(self, source: Path) -> Path:
        """Beside the checkpoint: NAME-timm."""
        return source.with_name(f"{source.stem}-timm")

    def write(self, job: Job, out: Path) -> Written:
        """Write the folder; see `Exporter.write`."""
        from lbc_cli import models
        from lbc_cli.checkpoint.architecture import uninitialised

        arch = job.manifest.arch
        if arch is None:
            raise UsageError(f"{job.source} does not come from a timm model: export it with --format dense")
        with uninitialised():
            model = models.create(arch, kwargs=job.manifest.kwargs)
        out.mkdir()
        written = write_dense(job, out / "model.safetensors")
        text = json.dumps(timm_config(model, arch, job.manifest.kwargs, job.manifest.metrics), indent=2)
        (out / "config.json").write_text(text + "\n", encoding="utf-8")
        if not job.options.check:
            return written
        return Written(written.layers, written.notes, {"differing tensors in timm": float(_differing(out))})


def timm_config(
    model: nn.Module, arch: str, kwargs: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `config.json` says of a model.

    Args:
        model: created by `lbc_cli.models` as `arch` with `kwargs`.
        arch: timm name.
        kwargs: arguments besides the name.
        metrics: of the checkpoint; "pixels" and "class_names" of them are used.
    """
    metrics = metrics or {}
    own: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    classes = int(getattr(model, "num_classes", kwargs.get("num_classes", 1000)))
    config: dict[str, Any] = {"architecture": arch.partition(".")[0], "num_classes": classes}
    if isinstance(features := getattr(model, "num_features", None), int):
        config["num_features"] = features
    names = metrics.get("class_names")
    if isinstance(names, list | tuple) and len(names) == classes:
        config["label_names"] = list(names)
    config["model_args"] = {key: value for key, value in kwargs.items() if key != "num_classes"}
    settings = _data_settings(model, metrics.get("pixels"))
    config["pretrained_cfg"] = {
        "num_classes": classes,
        "custom_load": False,
        **_about_weights(own, settings),
        **settings,
    }
    if kwargs.get("dynamic_img_size") or kwargs.get("strict_img_size") is False:
        # Images of any size, but position embeddings of one: say it, as timm takes it from input_size or a default.
        if own.get("fixed_input_size"):
            config["model_args"].setdefault("img_size", list(own["input_size"][1:]))
        config["pretrained_cfg"]["fixed_input_size"] = False
    return config


def _about_weights(own: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's configuration of the architecture says that holds for these weights too."""
    cfg = {key: own[key] for key in _KEPT if own.get(key) is not None}
    if list(settings["input_size"]) != list(own.get("input_size", ())):
        cfg.pop("pool_size", None)
    if settings["input_size"][0] != 3:
        cfg["first_conv"] = None
        cfg.pop("min_input_size", None)
    return cfg


def _data_settings(model: nn.Module, pixels: Any) -> dict[str, Any]:
    """How images are prepared: as in training where that is known, else as timm does for the model."""
    from lbc_cli import models

    settings = models.data_config(model)
    if isinstance(pixels, Mapping):
        known = {key: pixels[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if key in pixels}
        settings |= known
        size = tuple(pixels.get(side) for side in ("channels", "height", "width"))
        settings["input_size"] = size if all(isinstance(side, int) for side in size) else settings["input_size"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _differing(folder: Path) -> int:
    """Load the folder as plain timm does and compare every tensor with the file.

    Raises:
        VerificationError: naming the first tensor that timm changed.
    """
    from safetensors import safe_open

    from lbc_cli import models
    from lbc_cli.checkpoint.tensors import to_bytes

    loaded = models.from_folder(folder).state_dict()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            stored = file.get_tensor(name)
            if name not in loaded or to_bytes(loaded[name]) != to_bytes(stored.to(loaded[name].dtype)):
                raise VerificationError(f"timm loads {name} with other values than were exported: nothing was written")
    return 0


EXPORTER = Timm()
