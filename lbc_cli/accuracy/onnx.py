"""An ONNX graph as a model: images in, logits out, by onnxruntime."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbc_cli.checkpoint.container import parse_json
from lbc_cli.errors import CheckpointError, ModelError, UsageError

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}
_NOTES = "lbc.preprocessing"  # where our exporter says how images are prepared


class OnnxModel(nn.Module):
    """A classifier in an ONNX file.

    Args:
        path: the file.
        device: where it computes: the CPU, or a GPU that onnxruntime can use.

    Raises:
        UsageError: if there is no such file, or onnxruntime or its GPU support is missing.
        CheckpointError: if onnxruntime cannot read it.
        ModelError: if it is no classifier of images.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        self._session = _open(path, device)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _DTYPES:
            found = ", ".join(f"{given.name} {given.type} {given.shape}" for given in inputs)
            raise ModelError(f"{path} takes {found}: a batch of images [N, C, H, W] in floating point is needed")
        self._input, self._dtype = inputs[0].name, _DTYPES[inputs[0].type]
        sizes = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape]
        self._batch = sizes[0]
        self.image_shape: tuple[int | None, ...] = tuple(sizes[1:])
        """C, H, W; None where the graph takes any."""
        self.preprocessing: dict[str, Any] = _notes(self._session, path)
        """How images are prepared, where the file says so."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] in float32, on the CPU, of images [N, C, H, W]."""
        step = self._batch or len(images)
        plain = images.to("cpu", self._dtype)
        return torch.cat([self._run(plain[first : first + step]) for first in range(0, len(plain), step)])

    def _run(self, images: Tensor) -> Tensor:
        """A graph for batches of one size gets its last one filled up with black images."""
        missing = (self._batch or len(images)) - len(images)
        full = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        (logits, *_) = self._session.run(None, {self._input: full.contiguous().numpy()})
        return torch.from_numpy(np.asarray(logits, np.float32))[: len(images)]


def _open(path: Path, device: torch.device) -> Any:
    if not path.is_file():
        raise UsageError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    if find_spec("onnxruntime") is None:
        raise UsageError(f"{path} needs onnxruntime to be run: pip install 'lbc-cli[onnx]'")
    import onnxruntime

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UsageError(
            f"this onnxruntime {onnxruntime.__version__} cannot use {device}: give the device cpu, or install "
            f"onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say arrives as an exception
    chosen = (provider, {"device_id": device.index or 0}) if device.type == "cuda" else provider
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[chosen])
    except Exception as error:  # onnxruntime's own types have no common root
        raise CheckpointError(f"{path}: onnxruntime cannot read it: {' '.join(str(error).split())[:200]}") from error


def _notes(session: Any, path: Path) -> dict[str, Any]:
    text = session.get_modelmeta().custom_metadata_map.get(_NOTES, "{}")
    found = parse_json(text, f"{path}: {_NOTES}")
    if not isinstance(found, dict) or not all(_finite(value) for value in found.values()):
        raise CheckpointError(f"{path}: {_NOTES} is not a table of settings for images")
    return found


def _finite(value: Any) -> bool:
    return all(map(_finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)
