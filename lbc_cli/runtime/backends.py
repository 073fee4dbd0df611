"""What multiplies by a 2:4 matrix: torch's two semi-structured back ends on a GPU, and a reference that runs anywhere.

A back end compresses a padded weight matrix once, into an operand: a module that maps [n, columns] to [n, rows]. The
GPU operands are torch's own `SparseSemiStructuredTensor`s (CUTLASS or cuSPARSELt), which torch.compile and CUDA graphs
know. The reference keeps values and positions as the GPU formats do, restores the dense matrix at every call and
multiplies densely: it has their padding and their numbers, and proves everything but the last kernel. It is no faster
than dense, and says so.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbc_cli.errors import UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.runtime.matrix import Pair

TWO_FOUR = Pattern(2, 4)


class Operand(nn.Module, ABC):
    """A compressed weight matrix [rows, columns]."""

    rows: int
    columns: int

    @abstractmethod
    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """[n, columns] to [n, rows]; bias [rows]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix [rows, columns] that was compressed, exactly but for the sign of zeros."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Memory of the compressed matrix."""


class Backend(Protocol):
    """Compresses matrices for one kind of kernel."""

    name: str
    measured: bool
    """Whether its kernels can be faster than dense ones; False for the reference."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on a device in a dtype, None if it can."""

    def multiples(self, dtype: torch.dtype) -> Pair:
        """What rows and columns must be multiples of."""

    def compress(self, matrix: Tensor) -> Operand:
        """Compress a padded 2:4 matrix on its device."""


class ReferenceOperand(Operand):
    """Values and positions of any N:M matrix; decoded to dense at every call."""

    values: Tensor
    positions: Tensor

    def __init__(self, matrix: Tensor, pattern: Pattern) -> None:
        super().__init__()
        self.rows, self.columns = matrix.shape
        self._pattern = pattern
        groups = matrix.reshape(self.rows, -1, pattern.m)
        # A stable sort puts the positions in use first, in ascending order, and fills up with the lowest free ones.
        order = (groups == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., : pattern.n].sort(dim=-1).values
        self.register_buffer("values", groups.gather(-1, order), persistent=False)
        self.register_buffer("positions", order.to(torch.uint8), persistent=False)

    def dense(self) -> Tensor:
        """The matrix, decoded."""
        groups = self.values.new_zeros(*self.values.shape[:2], self._pattern.m)
        return groups.scatter(-1, self.positions.long(), self.values).reshape(self.rows, self.columns)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """[n, columns] to [n, rows]."""
        return functional.linear(inputs, self.dense(), bias)

    def stored_bytes(self) -> int:
        """Values and positions."""
        return self.values.nbytes + self.positions.nbytes


class Reference:
    """Decode, then dense arithmetic; on any device, in any dtype.

    Args:
        pattern: of the matrices; 2:4 as on the GPU unless said otherwise.
        multiples: rows and columns are padded to these; cuSPARSELt's unless said otherwise.
    """

    name = "reference"
    measured = False

    def __init__(self, pattern: Pattern = TWO_FOUR, multiples: Pair = (16, 16)) -> None:
        self._pattern, self._multiples = pattern, multiples

    def with_pattern(self, pattern: Pattern) -> Reference:
        """The same for matrices of another pattern."""
        return Reference(pattern.with_vector(1), self._multiples)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Any device, any floating-point type."""
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"

    def multiples(self, dtype: torch.dtype) -> Pair:
        """What rows and columns must be multiples of."""
        rows, columns = self._multiples
        return rows, -(-columns // self._pattern.m) * self._pattern.m

    def compress(self, matrix: Tensor) -> ReferenceOperand:
        """Values and positions of a padded matrix."""
        return ReferenceOperand(matrix, self._pattern)


class SemiStructuredOperand(Operand):
    """One of torch's semi-structured tensors, with the linear operator that torch dispatches for it.

    It stays on the device and in the dtype that it was compressed for; copies share it.
    """

    def __init__(self, matrix: Tensor, kind: type[Tensor]) -> None:
        super().__init__()
        self.rows, self.columns = matrix.shape
        compressed = kind.from_dense(matrix)  # type: ignore[attr-defined]
        # Torch before 2.11 writes results transposed unless told so, which costs a copy each; later ones never do.
        compressed.fuse_transpose_cusparselt = True
        self.weight = nn.Parameter(compressed, requires_grad=False)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """[n, columns] to [n, rows]."""
        if inputs.shape[0] == 0:  # the kernels take no empty matrices
            return inputs.new_empty(0, self.rows)
        return functional.linear(inputs, self.weight, bias).contiguous()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with the same compressed tensor: nothing writes to it, and not every torch can copy it."""
        clone = copy.copy(self)
        clone._parameters = dict(self._parameters)
        return clone

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse what torch cannot do to compressed tensors, and fails at in ways of its own."""
        probe = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise UsageError(
                f"compressed weights stay in {probe.dtype} on {probe.device}, asked for {moved.dtype} on "
                f"{moved.device}: load the model again with dtype= and device="
            )
        return self

    def dense(self) -> Tensor:
        """The matrix, from the kernel itself."""
        identity = torch.eye(self.columns, dtype=self.weight.dtype, device=self.weight.device)
        # cuSPARSELt's blob has no decoder: products with single ones restore it exactly.
        return self.forward(identity, None).t().contiguous()

    def stored_bytes(self) -> int:
        """What torch holds of it."""
        parts = (getattr(self.weight, "packed", None), getattr(self.weight, "meta", None))
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))


class _SemiStructured(ABC):
    measured = True
    name: str
    _multiples: dict[torch.dtype, Pair]

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, None if it can."""
        if device.type != "cuda":
            return f"{self.name} needs a CUDA device with sparse tensor cores, not {device.type}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device on this machine"
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores: they came with Ampere (A100)"
        if dtype not in self._multiples:
            known = ", ".join(str(name).removeprefix("torch.") for name in self._multiples)
            return f"{self.name} has no 2:4 kernel for {dtype}: it has {known}"
        return None

    def multiples(self, dtype: torch.dtype) -> Pair:
        """What rows and columns must be multiples of."""
        return self._multiples[dtype]

    @abstractmethod
    def _kind(self) -> type[Tensor]:
        """Torch's class of compressed tensors."""

    def compress(self, matrix: Tensor) -> SemiStructuredOperand:
        """Torch's own compressed tensor of a padded matrix."""
        return SemiStructuredOperand(matrix, self._kind())


class Cutlass(_SemiStructured):
    """2:4 kernels of CUTLASS, compiled into torch for Ampere and Ada alone."""

    name = "cutlass"
    _multiples = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}  # noqa: RUF012

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, None if it can."""
        if reason := super().why_not(device, dtype):
            return reason
        major, minor = torch.cuda.get_device_capability(device)
        if major == 8:
            return None
        named = torch.cuda.get_device_name(device)
        return f"torch's {self.name} 2:4 kernels are for compute capability 8.x, {named} has {major}.{minor}"

    def _kind(self) -> type[Tensor]:
        return torch.sparse.SparseSemiStructuredTensorCUTLASS


class CuSparseLt(_SemiStructured):
    """NVIDIA's library. Its compressed form may change with any release: it is made at load, never stored."""

    name = "cusparselt"
    _multiples = {torch.float16: (16, 16), torch.bfloat16: (16, 16)}  # noqa: RUF012

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, None if it can."""
        if reason := super().why_not(device, dtype):
            return reason
        return None if torch.backends.cusparselt.is_available() else "this torch was built without cuSPARSELt"

    def _kind(self) -> type[Tensor]:
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT
