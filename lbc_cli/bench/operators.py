"""What a forward pass does besides its linear and convolution layers, for estimates: operators, operations, bytes.

One pass over "meta" tensors, which have shapes and no data. Every operator counts as a kernel of its own that reads its
inputs from memory and writes its results: what eager execution moves, and an upper bound for a compiler that fuses.
Views move nothing. `scaled_dot_product_attention` counts as one fused kernel: queries, keys, values and mask in, the
result out, and both products.

Not counted: what linear and convolution layers do inside of their own call (`work` counts their products), launches and
caches. Operators that pick elements (index, gather) count their whole input; in-place ones read what they overwrite.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lbc_cli.errors import ModelError, UsageError

ATTENTION = "scaled_dot_product_attention"
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Operator:
    """One call of an operator.

    Attributes:
        name: as torch names it.
        operations: of its matrix products, 2 for a multiply-add; 0 for all other operators.
        moved: bytes read and written.
    """

    name: str
    operations: int
    moved: int


def other_operators(model: nn.Module, image: Sequence[int], *, batch: int, dtype: torch.dtype) -> tuple[Operator, ...]:
    """The operators of a forward pass that no linear or convolution layer calls.

    The model is neither run nor changed: a copy without data is.

    Args:
        model: in eval mode, as it would run densely (batch norms folded or not).
        image: [C, H, W] of its input.
        batch: images.
        dtype: of weights and activations.

    Returns:
        In the order of their calls, those that move something.

    Raises:
        UsageError: for a type in which the operators between products do not exist.
        ModelError: if the model cannot run without data.
    """
    if not dtype.is_floating_point:
        raise UsageError(f"operators besides the layers run in a floating-point type, not in {dtype}")
    images = torch.empty(batch, *image, dtype=dtype, device="meta")
    recorder = _Recorder()
    try:
        twin = _twin(model, dtype)
        _silence_layers(twin, recorder)
        with torch.no_grad(), _Attention(recorder), recorder:
            twin(images)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot count the operators of {type(model).__name__} on {list(images.shape)} without data: {reason}"
        ) from error
    return tuple(recorder.operators)


def _twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy without data, in another floating-point type; caches that a model fills at work are its own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo.setdefault(id(value), _empty(value, dtype))
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor, dtype=kind, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _Recorder(TorchDispatchMode):
    """Notes every operator while it is not told to be quiet."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self._quiet = 0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Note nothing for a while."""
        self.hush()
        try:
            yield
        finally:
            self.resume()

    def hush(self, *_: Any) -> None:
        """Note nothing until `resume` was called as often."""
        self._quiet += 1

    def resume(self, *_: Any) -> None:
        """Undo one `hush`."""
        self._quiet -= 1

    def note(self, name: str, operations: int, moved: int) -> None:
        """Add a call, unless quiet or without traffic."""
        if moved and not self._quiet:
            self.operators.append(Operator(name, operations, moved))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called in place of every operator that reaches the device."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._quiet:
            formula = flop_registry.get(func.overloadpacket)
            operations = formula(*args, **kwargs, out_val=result) if formula else 0
            self.note(func.overloadpacket.__name__, operations, _moved(func, [*args, *kwargs.values()], result))
        return result


class _Attention(TorchFunctionMode):
    """Notes attention as the one kernel that it is on a GPU; without data torch takes it to pieces."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called in place of every torch function."""
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with self._recorder.quiet():
            result = func(*args, **kwargs)
        query, key = (args[place] if len(args) > place else kwargs[name] for place, name in enumerate(("query", "key")))
        tensors = [leaf for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, Tensor)]
        # q k^T has query's columns as its depth, the product with the values has as many columns as the result.
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        operations = 2 * pairs * (query.shape[-1] + result.shape[-1])
        self._recorder.note(ATTENTION, operations, sum(_bytes(tensor) for tensor in tensors))
        return result


def _silence_layers(model: nn.Module, recorder: _Recorder) -> None:
    """Keep a recorder quiet inside of linear and convolution layers."""
    for module in model.modules():
        if isinstance(module, _LAYERS):
            module.register_forward_pre_hook(recorder.hush)
            module.register_forward_hook(recorder.resume)


def _moved(func: Any, values: Sequence[Any], result: Any) -> int:
    """Bytes that an operator reads and writes; none for views and for memory that is only reserved."""
    if "empty" in func.overloadpacket.__name__:
        return 0
    read = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
    written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if not func._schema.is_mutable:
        held = {_storage(tensor) for tensor in read.values()}
        written = [tensor for tensor in written if _storage(tensor) not in held]
    if not written:
        return 0
    return sum(_bytes(tensor) for tensor in [*read.values(), *written])


def _bytes(tensor: Tensor) -> int:
    """What a tensor takes in memory; expanded ones take what lies behind them."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
