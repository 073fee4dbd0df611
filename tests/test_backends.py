"""The GPU back ends of the runtime without a GPU: torch's own tensors and dispatch, kernels that decode on the CPU.

What stands in is the last step alone: compressing, and the product. Everything that torch does around it is its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from lbc_cli.errors import UsageError
from lbc_cli.runtime import clock
from lbc_cli.runtime.backends import TWO_FOUR as PATTERN
from lbc_cli.runtime.backends import CuSparseLt, Cutlass, ReferenceOperand, SemiStructuredOperand
from lbc_cli.runtime.layers import SparseConv2d, SparseLinear
from lbc_cli.runtime.matrix import Geometry
from tests.test_runtime import relative, sparse

BACKENDS = [CuSparseLt(), Cutlass()]
CUDA = torch.device("cuda")


def compress(matrix: Tensor) -> Tensor:
    """[rows, 9/16 columns] as the library gives it: the values, then two bits for each."""
    found = ReferenceOperand(matrix, PATTERN)
    bits = (found.positions.reshape(-1, 8).int() << (2 * torch.arange(8, dtype=torch.int32))).sum(-1)
    packed = torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(matrix.dtype)
    return torch.cat([found.values.flatten(), packed]).reshape(len(matrix), -1)


def decompress(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `compress`."""
    rows, flat = packed.shape[0], packed.flatten()
    values, bits = flat.split([rows * columns // 2, rows * columns // 16])
    positions = (bits.view(torch.int16).int()[:, None] >> (2 * torch.arange(8, dtype=torch.int32))) & 3
    groups = values.new_zeros(rows, columns // 4, 4)
    shape = (rows, columns // 4, 2)
    return groups.scatter(-1, positions.reshape(shape).long(), values.reshape(shape)).reshape(rows, columns)


def product(matrix: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    """With what the kernels demand of their other operand."""
    assert dense.shape[0] % 8 == dense.shape[1] % 8 == 0
    assert dense.numel()
    found = matrix @ dense
    return found if bias is None else found + bias[:, None]


def cusparselt_product(
    packed: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    *options: int,
) -> Tensor:
    found = product(decompress(packed, dense.shape[0]), dense, bias)
    return found.t().contiguous() if transpose_result else found


def cutlass_product(packed: Tensor, meta: Tensor, dense: Tensor, **options: Any) -> Tensor:
    return product(sparse_semi_structured_to_dense_cutlass(packed, meta), dense, None)


def cutlass_sum(bias: Tensor, packed: Tensor, meta: Tensor, dense: Tensor, **options: Any) -> Tensor:
    return product(sparse_semi_structured_to_dense_cutlass(packed, meta), dense, bias)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for the CPU, and tensors that may lie there."""
    monkeypatch.setattr(SparseSemiStructuredTensor, "_validate_device_dim_dtype_shape", lambda tensor: None)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cslt_compress", compress, "CPU")
        library.impl("_cslt_sparse_mm", cusparselt_product, "CPU")
        library.impl("_sparse_semi_structured_mm", cutlass_product, "CPU")
        library.impl("_sparse_semi_structured_addmm", cutlass_sum, "CPU")
        yield


class Net(nn.Module):
    """A convolution, a 1 x 1 convolution that needs no padding, a head that needs it."""

    def __init__(self, backend: Any, form: Any = "im2col") -> None:
        super().__init__()
        bias = torch.linspace(-1, 1, 50).bfloat16()
        weights = [sparse(shape, "2:4", torch.bfloat16) for shape in ((64, 20, 3, 3), (64, 64, 1, 1), (50, 64))]
        self.weights = weights
        geometry, point = Geometry((3, 3), (2, 2), (1, 1), (1, 1)), Geometry((1, 1), (1, 1), (0, 0), (1, 1))
        self.conv = SparseConv2d(weights[0], bias.new_ones(64), backend, geometry, form)
        self.point = SparseConv2d(weights[1], None, backend, point, "matrix")
        self.head = SparseLinear(weights[2], bias, backend)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.point(self.conv(images).relu()).mean((2, 3)))

    def dense(self, images: Tensor) -> Tensor:
        first, second, third = self.weights
        inner = functional.conv2d(images, first, first.new_ones(64), 2, 1).relu()
        return functional.linear(functional.conv2d(inner, second).mean((2, 3)), third, self.head.bias[:50])  # type: ignore[index]


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def net(request: pytest.FixtureRequest) -> Net:
    with torch.inference_mode():  # as the bench builds its models
        return Net(request.param).eval()


def images(number: int = 3) -> Tensor:
    return torch.randn(number, 20, 9, 11, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("form", ["im2col", "shifts"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_outputs_are_the_dense_ones(backend: Any, form: Any, context: type[AbstractContextManager[None]]) -> None:
    model = Net(backend, form)
    with context():
        assert relative(model(images()).float(), model.dense(images()).float()) <= 2e-2
    for layer, weight in zip((model.conv, model.point, model.head), model.weights, strict=True):
        assert torch.equal(layer.dense_weight(), weight)


def test_results_lie_as_the_next_layer_wants_them(net: Net) -> None:
    with torch.inference_mode():
        first = net.conv(images())
        assert first.is_contiguous(memory_format=torch.channels_last)
        assert net.point(first).is_contiguous(memory_format=torch.channels_last)
        assert net.head(torch.zeros(7, 64, dtype=torch.bfloat16)).is_contiguous()


def test_no_images_at_all(net: Net) -> None:
    assert net(images()[:0]).shape == (0, 50)


def test_a_copy_computes_the_same(net: Net) -> None:
    copied = copy.deepcopy(net)
    assert torch.equal(copied(images()), net(images()))
    operand = copied.head.operand
    assert isinstance(operand, SemiStructuredOperand)
    operand._parameters.clear()
    assert "weight" in dict(net.head.operand.named_parameters())


def test_models_stay_where_they_were_compressed_for(net: Net) -> None:
    before = net(images())
    assert torch.equal(net.to("cpu").to(torch.bfloat16).to(memory_format=torch.channels_last)(images()), before)
    with pytest.raises(UsageError, match=r"compressed weights stay in torch.bfloat16 on cpu, asked for torch.float32"):
        net.float()
    with pytest.raises(UsageError, match=r"on meta: load the model again with dtype= and device="):
        net.to("meta")


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_models_compile_without_a_break(net: Net, context: type[AbstractContextManager[None]]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with context():
        for number in (3, 5):
            assert relative(compiled(images(number)).float(), net(images(number)).float()) <= 1e-2


@pytest.mark.parametrize(("capability", "cutlass", "cusparselt"), [((7, 5), 0, 0), ((8, 9), 1, 1), ((9, 0), 0, 1)])
def test_who_runs_on_which_gpu(
    capability: tuple[int, int], cutlass: bool, cusparselt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert (Cutlass().why_not(CUDA, torch.float16) is None) is bool(cutlass)
    assert (CuSparseLt().why_not(CUDA, torch.float16) is None) is bool(cusparselt)
    assert "it has float16, bfloat16" in str(CuSparseLt().why_not(CUDA, torch.float32)) or not cusparselt


def test_a_gpu_is_current_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[torch.device] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            inside.append(self.device)

        def __exit__(self, *error: object) -> None:
            inside.pop()

    seen: list[tuple[list[torch.device], bool]] = []
    note = lambda: seen.append((list(inside), torch.backends.cudnn.benchmark))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(clock, "_time", lambda call, device: call() or 1.0)
    second = torch.device("cuda", 1)
    clock.interleaved({"a": note}, second, rounds=1, warmup=1)
    assert seen == [([second], True)] * 2
    assert torch.backends.cudnn.benchmark is False
