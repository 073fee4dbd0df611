"""From a model to an ONNX file whose initializers are the model's parameters, name by name and bit by bit.

torch's exporter would by default fold batch norms into convolutions and transpose the weights of linear layers, after
which nothing could be compared with the checkpoint any more. So its optimizer is left out, and only what does not touch
a parameter or buffer is folded here; runtimes fold the rest when they load the graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbc_cli.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 18
"""What torch's exporter is written in, so that no conversion is needed; TensorRT 8.6 and onnxruntime 1.14 know it."""
INPUT, OUTPUT = "images", "logits"
EXTERNAL_BYTES = (1 << 31) - (1 << 26)
"""Weights above go to a file of their own: protobuf ends at 2 GiB."""

Shape = tuple[int, int, int]
_BATCHES = (1, 3)
_SEED = 0


def require_packages() -> None:
    """Check that what writes ONNX is installed.

    Raises:
        UsageError: with the line that installs it.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: ONNX files need `pip install 'lbc-cli[onnx]'`")


def trace(model: nn.Module, shape: Shape) -> ONNXProgram:
    """Export a model with a batch of any size.

    Args:
        model: on the CPU, in eval mode, its parameters of one floating-point type, which is also that of the images.
        shape: (C, H, W) of an image.

    Returns:
        The program, its initializers named as in the model's state dict; nothing in it tells where it was made.

    Raises:
        UsageError: if the model cannot be expressed in ONNX with a batch of any size.
    """
    # Two images: torch takes a batch of one for a constant.
    images = torch.zeros(2, *shape, dtype=_dtype(model))
    try:
        # Fused attention gives a layout that the exporter's own attention has not, so that views of it fail.
        with _silence(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
            assert program is not None
            _tidy(program, frozenset(model.state_dict()))
            _name_shared(program, model)
    except Exception as error:
        raise UsageError(
            f"torch {torch.__version__} with onnxscript {metadata.version('onnxscript')} cannot express this model in "
            f"ONNX with a batch of any size: {_cause(error)}"
        ) from error
    return program


def save(program: ONNXProgram, path: Path, metadata: Mapping[str, str]) -> bool:
    """Write the file, and beside it NAME.data if the weights are too large for one.

    Args:
        program: from `trace`.
        path: the file.
        metadata: goes into the model's `metadata_props`.

    Returns:
        Whether there is a second file.

    Raises:
        VerificationError: if the onnx package does not accept what was written.
    """
    import onnx

    program.model.metadata_props.update(metadata)
    tensors = (value.const_value for value in program.model.graph.initializers.values())
    external = sum(tensor.nbytes for tensor in tensors if tensor is not None) > EXTERNAL_BYTES
    with _silence():
        program.save(path, external_data=external)
        try:
            # By path, as larger graphs do not fit into memory as one message.
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:
            raise VerificationError(f"onnx.checker refuses {path.name}: {_cause(error)}") from error
    return external


def largest_difference(path: Path, model: nn.Module, shape: Shape) -> float:
    """Run a graph in onnxruntime and the model in torch, in float32, on the same random images.

    Args:
        path: the ONNX file.
        model: its weights are those of the graph; they are float32 afterwards.
        shape: (C, H, W) of an image.

    Returns:
        The largest difference of two logits over batches of 1 and 3 images, relative to the largest logit in magnitude.

    Raises:
        VerificationError: if onnxruntime cannot run the graph.
    """
    run = _session(path)
    dtype = _dtype(model)
    generator = torch.Generator().manual_seed(_SEED)
    largest = difference = 0.0
    model.float()
    for batch in _BATCHES:
        images = torch.randn(batch, *shape, generator=generator).to(dtype)
        with torch.inference_mode():
            expected: Tensor = model(images.float())
        logits = run(images).float()
        if logits.shape != expected.shape:
            raise VerificationError(f"{path.name} gives logits {list(logits.shape)}, torch {list(expected.shape)}")
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((logits - expected).abs().nan_to_num(torch.inf).max()))
    return difference / max(largest, torch.finfo(torch.float32).tiny)


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # onnxruntime would take every core, whatever torch was told to use.
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(
            f"onnxruntime {onnxruntime.__version__} refuses {path.name}: {_cause(error)}"
        ) from error

    def run(images: Tensor) -> Tensor:
        try:
            (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        except Exception as error:
            raise VerificationError(f"onnxruntime cannot run {path.name}: {_cause(error)}") from error
        return torch.from_numpy(logits)

    return run


def _tidy(program: ONNXProgram, kept: frozenset[str]) -> None:
    """Fold and remove what depends on no parameter or buffer, and where in which file each node comes from."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    def fold(node: Any) -> bool | None:
        touches = any(value is not None and value.is_initializer() and value.name in kept for value in node.inputs)
        return False if touches else None

    optimizer.fold_constants(program.model, onnx_shape_inference=True, should_fold=fold)
    optimizer.remove_unused_nodes(program.model)
    common.ClearMetadataAndDocStringPass()(program.model)


def _name_shared(program: ONNXProgram, model: nn.Module) -> None:
    """Give a parameter that several layers share its first name, as the checkpoint does, and the others as `Identity`.

    torch keeps one name of them, which need not be the first.
    """
    import onnx_ir as ir

    places: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        places.setdefault(tensor, []).append(name)
    graph = program.model.graph
    for first, *others in places.values():
        held = [name for name in (first, *others) if name in graph.initializers]
        if not others or not held:
            continue
        value = graph.initializers.pop(held[0])
        value.name = first
        graph.register_initializer(value)
        for name in sorted({*others} - {*held[1:]}):
            graph.append(
                ir.Node("", "Identity", [value], outputs=[ir.Value(name=name, shape=value.shape, type=value.type)])
            )


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line: exporters wrap it several times and add pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextmanager
def _silence() -> Iterator[None]:
    """Keep exporters from writing to the terminal: they print, warn, log, and write from C++."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
