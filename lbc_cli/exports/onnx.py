"""The format `onnx`: a graph for onnxruntime, TensorRT and others, its weights dense, zeros where they were.

Initializers carry the names and the exact bits of the model's parameters and buffers, nothing is folded into them: so
`lbc verify m.onnx --against` the checkpoint holds. The graph takes a batch of any size of images of one size, and is
typed float32 or float16 throughout. Above 2 GiB the weights go to NAME.onnx.data beside it.

`metadata_props` of the model tell where it comes from:

    lbc.model          timm name                      lbc.patterns    JSON: parameter -> "N:M" or "N:M/V"
    lbc.manifest       SHA-256 of the checkpoint's manifest
    lbc.preprocessing  JSON: mean, std, interpolation, crop_pct, crop_mode that images are prepared with
"""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbc_cli.errors import UsageError, VerificationError
from lbc_cli.exports.base import ExportedLayer, Job, Written

if TYPE_CHECKING:
    from torch import nn
    from torch.onnx import ONNXProgram

    from lbc_cli.exports.onnx_graph import Shape
    from lbc_cli.exports.tensorrt import Fit

TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
"""Largest difference of onnxruntime's logits from torch's in float32, relative to the largest logit."""


class Onnx:
    """See the head of this module."""

    name = "onnx"
    description = "an ONNX graph, float32 or float16, zeros written out"
    runs_on = "onnxruntime; TensorRT, whose sparse tactics take 2:4; OpenVINO"
    extra: str | None = "onnx"
    dtypes = ("float32", "float16")

    def default_path(self, source: Path) -> Path:
        """Beside the checkpoint: NAME.onnx."""
        return source.with_name(f"{source.stem}.onnx")

    def write(self, job: Job, out: Path) -> Written:
        """Write the file; see `Exporter.write`."""
        from lbc_cli.exports import onnx_graph, tensorrt
        from lbc_cli.exports.cast import Caster

        if out.suffix != ".onnx":
            raise UsageError(f"{out.name}: name the file NAME.onnx, as what loads it goes by the suffix")
        if job.manifest.arch is None:
            raise UsageError(f"{job.source} does not come from a timm model: export it with --format dense")
        onnx_graph.require_packages()
        dtype = job.options.dtype or ("float16" if _is_half(job) else "float32")
        cast = Caster.to(dtype)
        model = job.model()
        _cast(model, cast)
        shape, preprocessing = _images(model, job)
        program = onnx_graph.trace(model, shape)
        _check_initializers(program, job)
        external = onnx_graph.save(program, out, _metadata(job, preprocessing))
        fits = _fits(model, job)
        layers = tuple(
            ExportedLayer(name, job.manifest.sparse[name].shape, pattern, "dense", fits[name].why)
            for name, pattern in job.patterns.items()
        )
        checks = _compare(out, model, shape, dtype) if job.options.check else {}
        beside = (f"the weights are in {out.name}.data: keep both files together",) if external else ()
        sizes = "x".join(map(str, shape))
        what = f"opset {onnx_graph.OPSET}, {dtype}, images [batch, {sizes.replace('x', ', ')}]"
        advice = tensorrt.notes([*fits.values()], shlex.quote(out.name), shape, half=dtype == "float16")
        return Written(layers, (what, *cast.notes(), *beside, *advice), checks)


def _is_half(job: Job) -> bool:
    """Whether every floating-point tensor of the checkpoint is float16."""
    return {info.dtype for info in job.infos.values() if info.dtype.startswith(("F", "BF"))} == {"F16"}


def _cast(model: nn.Module, cast: Any) -> None:
    """Bring every parameter and buffer to the graph's type."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = cast(name, tensor.data)


def _images(model: nn.Module, job: Job) -> tuple[Shape, dict[str, Any]]:
    """Size and preparation of images: as in training where the checkpoint says so, else as timm does for the model."""
    from lbc_cli import models

    settings = models.data_config(model)
    pixels = job.manifest.metrics.get("pixels")
    known = pixels if isinstance(pixels, dict) else {}
    trained = [side for name in ("channels", "height", "width") if isinstance(side := known.get(name), int)]
    channels, height, width = trained if len(trained) == 3 else settings["input_size"]
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return (int(channels), int(height), int(width)), {key: known.get(key, settings[key]) for key in keys}


def _metadata(job: Job, preprocessing: dict[str, Any]) -> dict[str, str]:
    return {
        "lbc.model": str(job.manifest.arch),
        "lbc.manifest": job.manifest.to_metadata()["lbc.sha256"],
        "lbc.patterns": json.dumps(job.patterns, sort_keys=True),
        "lbc.preprocessing": json.dumps(preprocessing, sort_keys=True),
    }


def _check_initializers(program: ONNXProgram, job: Job) -> None:
    """Every sparse weight must be in the graph under its own name.

    Raises:
        UsageError: naming the first that the model does not use, or only what is computed from it.
    """
    if lost := sorted(set(job.patterns) - set(program.model.graph.initializers)):
        raise UsageError(
            f"{job.source}: {lost[0]} is not in the graph ({len(lost)} such): the model does not use it at inference; "
            "export it with --format dense"
        )


def _fits(model: nn.Module, job: Job) -> dict[str, Fit]:
    """What TensorRT can do with each sparse weight."""
    from lbc_cli.exports.tensorrt import fit

    found: dict[str, Fit] = {}
    for name in job.patterns:
        owner = model.get_submodule(name.rpartition(".")[0])
        found[name] = fit(model.get_parameter(name), int(getattr(owner, "groups", 1)))
    return found


def _compare(out: Path, model: nn.Module, shape: Shape, dtype: str) -> dict[str, float | str]:
    """Compare onnxruntime's logits with torch's.

    Raises:
        VerificationError: if they differ by more than `TOLERANCE`.
    """
    from lbc_cli.exports.onnx_graph import largest_difference

    measure = "largest logit difference, relative to the largest logit"
    if find_spec("onnxruntime") is None:
        return {measure: "not measured: onnxruntime is not installed"}
    difference = largest_difference(out, model, shape)
    if not difference <= TOLERANCE[dtype]:
        hint = "; activations may overflow in float16: try --dtype float32" if dtype == "float16" else ""
        raise VerificationError(
            f"{out.name}: onnxruntime's logits differ from torch's by {difference:.3g} of the largest logit, more than "
            f"{TOLERANCE[dtype]:g}{hint}"
        )
    return {measure: difference}


EXPORTER = Onnx()
