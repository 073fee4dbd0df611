"""onnxruntime as a dense rival on CPUs: whole models as torch's exporter writes them, and single layers.

Graphs are for one batch size, with the exporter's own optimizer (the graphs of `lbc export` leave it out, as they keep
every weight as it is), and every optimization of onnxruntime. Inputs and outputs are bound once, so that nothing is
copied around a call. Its convolutions work in a layout of their own: a layer by itself pays for the way into it and
out of it, which inside a model it does only in places.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbc_cli.bench.compiling import cause, quiet
from lbc_cli.exports.onnx_graph import INPUT, OPSET, OUTPUT
from lbc_cli.runtime.matrix import geometry_of
from lbc_cli.runtime.prepare import Prepared
from lbc_cli.runtime.trace import Shape


def why_no_onnxruntime(dtype: torch.dtype) -> str:
    """Why it cannot be measured, "" if it can."""
    missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install 'lbc-cli[onnx]'"
    return "" if dtype == torch.float32 else f"measured in float32 only, not in {str(dtype).removeprefix('torch.')}"


class Graphs:
    """Files of a model's graphs, one for each batch size, written when first asked for; a context manager.

    Args:
        prepared: the model.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._folder = tempfile.TemporaryDirectory(prefix="lbc-bench-")
        self._files: dict[int, Path | str] = {}

    def __enter__(self) -> Graphs:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the files."""
        self._folder.cleanup()

    def file(self, images: Tensor) -> Path:
        """The graph for a batch.

        Args:
            images: [n, C, H, W], float32.

        Raises:
            RuntimeError: if the model cannot be expressed in ONNX; again whenever that batch size is asked for.
        """
        batch = len(images)
        if batch not in self._files:
            self._files[batch] = self._write(images, Path(self._folder.name) / f"{batch}.onnx")
        found = self._files[batch]
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def _write(self, images: Tensor, path: Path) -> Path | str:
        try:
            # The exporter's own attention gives a layout in which views of it fail.
            with quiet(), sdpa_kernel(SDPBackend.MATH):
                torch.onnx.export(
                    self._prepared.dense(dtype=torch.float32, device=images.device),
                    (images,),
                    path,
                    dynamo=True,
                    verbose=False,
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                )
        except Exception as error:  # exporters raise whatever their parts raise
            return f"torch cannot express the model in ONNX: {cause(error)}"
        return path


def layer_graph(module: nn.Module, inputs: Shape, outputs: Shape, *, rows: bool) -> bytes:
    """A graph of one layer.

    Args:
        module: a linear layer, or a 2-D convolution padded with zeros.
        inputs: shape of its input; [n, I] with `rows`.
        outputs: shape of its result; [n, O] with `rows`.
        rows: a product with rows of pixels, for linear layers and 1 x 1 convolutions.
    """
    from onnx import TensorProto, helper, numpy_helper

    weight = module.weight
    assert isinstance(weight, Tensor)
    if rows:
        weight = weight.flatten(1)
        node = helper.make_node("Gemm", [INPUT, "weight"], [OUTPUT], transB=1)
    else:
        assert isinstance(module, nn.Conv2d)
        left, right, top, bottom = geometry_of(module).pads(inputs[2], inputs[3])
        place = {"strides": list(module.stride), "dilations": list(module.dilation), "group": module.groups}
        node = helper.make_node("Conv", [INPUT, "weight"], [OUTPUT], pads=[top, left, bottom, right], **place)
    constants = {"weight": weight}
    if isinstance(module.bias, Tensor):
        node.input.append("bias")
        constants["bias"] = module.bias
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(value.detach().contiguous().numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = min(model.ir_version, 10)  # onnxruntime lags behind what the onnx package writes
    return bytes(model.SerializeToString())


def session_call(
    source: Path | bytes, inputs: Tensor, outputs: Shape, threads: int, *, at_once: int | None = None
) -> Callable[[], Tensor]:
    """A graph as a call without arguments.

    Args:
        source: a file, or a serialized model.
        inputs: what it computes on, float32 and contiguous; read anew at every call.
        outputs: shape of its result.
        threads: that it uses; one that calls, the others its own.
        at_once: what the graph takes along the first axis, if less than there is: a part of it without a remainder.

    Returns:
        A call that gives the result: the same tensor every time.

    Raises:
        RuntimeError: if onnxruntime cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say arrives as an exception
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    given = source if isinstance(source, bytes) else str(source)
    result = torch.empty(outputs)
    try:
        session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        size = at_once or len(inputs)
        bound = [
            _bind(session, *parts) for parts in zip(torch.split(inputs, size), torch.split(result, size), strict=True)
        ]
        session.run_with_iobinding(bound[0])
    except Exception as error:  # onnxruntime's own types have no common root
        raise RuntimeError(f"onnxruntime {onnxruntime.__version__} refuses the graph: {cause(error)}") from error
    return _Bound(session, bound, inputs, result)


def _bind(session: Any, inputs: Tensor, result: Tensor) -> Any:
    bound = session.io_binding()
    bound.bind_input(INPUT, "cpu", 0, np.float32, list(inputs.shape), inputs.data_ptr())
    bound.bind_output(OUTPUT, "cpu", 0, np.float32, list(result.shape), result.data_ptr())
    return bound


class _Bound:
    """Keeps alive what the session only has addresses of."""

    def __init__(self, session: Any, bound: list[Any], inputs: Tensor, result: Tensor) -> None:
        self._session, self._bound, self._inputs, self._result = session, bound, inputs, result

    def __call__(self) -> Tensor:
        for part in self._bound:
            self._session.run_with_iobinding(part)
        return self._result
