"""torch.compile for inference on a CPU, with weights frozen: constants that inductor folds and packs for oneDNN."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbc_cli.errors import one_line
from lbc_cli.runtime.slices import Sliced


def compiled_call(model: nn.Module, images: Tensor, *, at_once: int) -> Callable[[], Tensor]:
    """Compile a model for one batch, frozen.

    Args:
        model: on the CPU, in eval mode; if it takes its batch in slices, it is what takes them that is compiled.
        images: the batch, in the layout that it will have.
        at_once: images of a slice, for a model that does not slice by itself; as many as there are: none.

    Returns:
        A call of the compiled model on that batch, to be made under `inference_mode`: in any other mode torch would
        compile it anew, without freezing.

    Raises:
        RuntimeError: saying in one line why it cannot be compiled here, such as a C++ compiler that is missing.
    """
    from torch._inductor import config

    inner, size = (model.model, model.images) if isinstance(model, Sliced) else (model, at_once)
    compiled: Any = torch.compile(inner, dynamic=False)
    run = Sliced(compiled, size)
    try:
        with quiet(), torch.inference_mode(), config.patch(freezing=True):
            run(images)
    except Exception as error:  # compilers raise whatever their parts raise
        raise RuntimeError(f"torch {torch.__version__} cannot compile the model: {cause(error)}") from error
    return partial(run, images)


def cause(error: BaseException) -> str:
    """The innermost reason of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, most=160)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep compilers and exporters from writing to the terminal: what fails arrives as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
