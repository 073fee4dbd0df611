"""The kernel of vector-wise layers, under Triton's interpreter and through Triton's compiler: neither needs a GPU."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbc_cli.errors import UsageError
from lbc_cli.patterns import Pattern
from lbc_cli.runtime.matrix import Geometry
from lbc_cli.runtime.vector_layers import VectorConv2d, VectorLinear, reference_product
from lbc_cli.runtime.vector_layout import RUN, Layout, Walk, image_buffer
from tests.test_vector import CONVOLUTIONS, LAYOUTS, PATTERNS, conv_of, noise, vector_wise

without_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# The kernel under Triton's interpreter: in a process of its own, as Triton decides at import.


def kernel_errors() -> dict[str, float]:
    """Largest difference to the reference, relative to the largest result; both layouts, patterns and convolutions."""
    errors = {}
    for layout in LAYOUTS:
        for pattern in PATTERNS:
            for dtype in (torch.float32, torch.float16):
                build = partial(VectorLinear, vector_wise((256, 48), pattern, dtype), noise(256, dtype=dtype))
                error = _difference(build, noise(5, 13, 48, dtype=dtype), pattern, layout)
                errors[f"linear {layout} {pattern} {dtype}"] = error
            for name, (kernel, options) in CONVOLUTIONS.items():
                conv = conv_of(vector_wise((128, 16, *kernel), pattern, torch.float32), None, **options)
                build = partial(VectorConv2d, conv.weight, conv.bias, geometry=Geometry.of(conv))
                error = _difference(build, noise(2, 16, 9, 11, dtype=torch.float32), pattern, layout)
                errors[f"{name} {layout} {pattern}"] = error
    return errors


def configuration_errors() -> dict[str, float]:
    """The same for every configuration of blocks; the interpreter would take the first alone."""
    from lbc_cli.runtime.vector_kernel import CONFIGS, gathered_kernel

    errors = {}
    build = partial(VectorLinear, vector_wise((256, 176), "2:4/128", torch.float32), None)
    for config in CONFIGS:
        gathered_kernel.configs = [config]
        errors[str(config)] = _difference(build, noise(300, 176, dtype=torch.float32), "2:4/128", "channels-first")
    return errors


def _difference(build: Any, inputs: Tensor, pattern: str, layout: Layout) -> float:
    from lbc_cli.runtime.vector_kernel import gathered_product

    options = {"pattern": Pattern.parse(pattern), "layout": layout}
    actual, expected = (build(product=product, **options)(inputs) for product in (gathered_product, reference_product))
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def operator_checks() -> None:
    """The kernel as an operator of torch: schema, fake, torch.compile without a break; odd calls."""
    from lbc_cli.runtime.vector_kernel import gathered_product

    conv = conv_of(vector_wise((64, 16, 3, 3), "1:4/64", torch.float32), noise(64, dtype=torch.float32), padding=1)
    geometry, batch = Geometry.of(conv), noise(2, 16, 5, 7, dtype=torch.float32)
    for layout in LAYOUTS:
        layer = VectorConv2d(conv.weight, conv.bias, Pattern.parse("1:4/64"), gathered_product, layout, geometry)
        buffer, walk = image_buffer(batch, geometry, layout)
        arguments = (buffer, layer.weights, layer.bias, layer.rows, layer.columns, list(walk))
        torch.library.opcheck(torch.ops.lbc.gathered_product.default, arguments)
        compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(batch), conv(batch), rtol=1e-5, atol=1e-5)
        assert layer(batch[:0]).shape == (0, 64, 5, 7)
    narrow = VectorLinear(torch.zeros(32, 8), None, Pattern.parse("1:4/32"), gathered_product, "channels-last")
    with pytest.raises(UsageError, match="vector length 32"):
        narrow(torch.zeros(1, 8))
    many = list(Walk(2**16, 2**9, 2**6, 2**6, 0, 0, 0, 0, 0, 1))
    with pytest.raises(UsageError, match="2147483648 output pixels at once"):
        gathered_product(buffer, layer.weights, None, layer.rows, layer.columns, many)


@pytest.fixture(scope="module")
def interpreted() -> tuple[dict[str, float], dict[str, float]]:
    """Runs `operator_checks`, `kernel_errors` and `configuration_errors` under the interpreter."""
    code = (
        "import json, tests.test_vector_kernel as t; t.operator_checks(); "
        "print('ERRORS ' + json.dumps([t.kernel_errors(), t.configuration_errors()]))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton does not run with this NumPy")
    assert done.returncode == 0, done.stderr[-3000:]
    problems, configurations = json.loads(done.stdout.rpartition("ERRORS ")[2])
    return problems, configurations


@without_triton
def test_the_kernel_computes_what_the_reference_does(interpreted: tuple[dict[str, float], dict[str, float]]) -> None:
    errors = interpreted[0]
    assert len(errors) == len(LAYOUTS) * len(PATTERNS) * (2 + len(CONVOLUTIONS))
    assert not {name: error for name, error in errors.items() if not error < (2e-3 if "float16" in name else 1e-6)}


@without_triton
def test_every_configuration_computes_the_same(interpreted: tuple[dict[str, float], dict[str, float]]) -> None:
    from lbc_cli.runtime.vector_kernel import CONFIGS

    assert list(interpreted[1]) == [str(config) for config in CONFIGS]
    assert not {name: error for name, error in interpreted[1].items() if not error < 1e-6}


# The kernel through Triton's compiler, which needs no GPU either.


@without_triton
@settings(max_examples=60, deadline=None)
@given(
    vector=st.integers(1, 40).map(lambda count: 64 * count),
    pixels=st.integers(1, 2**20),
    kept=st.integers(1, 2**14),
    precision=st.sampled_from(["ieee", "tf32"]),
)
def test_configurations_fit_their_tiles(vector: int, pixels: int, kept: int, precision: str) -> None:
    from lbc_cli.runtime.vector_kernel import CONFIGS, fitting

    found = fitting(CONFIGS, {"pixels": pixels, "kept": kept}, V=vector, PRECISION=precision)
    assert CONFIGS[0] in found
    assert all(vector % config.kwargs["BLOCK_V"] == 0 for config in found)
    assert all(config.kwargs["BLOCK_P"] <= max(64, 2 * pixels) for config in found)
    if vector % 128 == 0 and pixels > 128 and kept > 64 and precision == "tf32":
        assert found == CONFIGS


@without_triton
def test_integers_of_the_kernel_keep_their_width() -> None:
    """Steps of large buffers need 64 bits: an annotation that Triton reads would cut them to 32."""
    from lbc_cli.runtime.vector_kernel import gathered_kernel

    parameters = {parameter.name: parameter for parameter in gathered_kernel.fn.params}
    assert {"column_step", "image_step", "tap_step"} <= set(parameters)
    assert not any(parameter.annotation_type for parameter in parameters.values())


def assembly(capability: int, kind: str, *, run: int, rows: bool, wide: bool, config: int) -> str:
    """PTX of the kernel for an NVIDIA GPU, as the launcher would have it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lbc_cli.runtime.vector_kernel import CONFIGS, gathered_kernel

    chosen = CONFIGS[config]
    constants = {"V": 128, "HAS_BIAS": True, "HAS_ROWS": rows, "RUN": run, "PRECISION": "tf32", **chosen.kwargs}
    constants["pixel_step" if run > 1 else "column_step"] = 1  # a value of 1 becomes a constant
    floats = dict.fromkeys(("buffer", "weights", "bias", "output"), f"*{kind}")
    types = {**floats, "rows": "*i32", "columns": "*i32", **({"column_step": "i64"} if wide else {})}
    names = gathered_kernel.fn.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name == "channels"]
    source = ASTSource(
        gathered_kernel.fn,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return str(compiled.asm["ptx"])


@without_triton
@pytest.mark.skipif(interpreting, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("capability", "instruction", "rows"), [(80, "mma.sync", False), (90, "wgmma.mma_async", True)]
)
def test_the_kernel_compiles_to_tensor_cores_and_vector_copies(
    capability: int, instruction: str, rows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = assembly(capability, "bf16", run=RUN, rows=rows, wide=rows, config=3)
    last = assembly(capability, "bf16", run=1, rows=rows, wide=False, config=3)
    assert instruction in first
    assert instruction in last
    # Sixteen bytes at a time into shared memory, pixels like weights; element by element where they lie scattered.
    assert "ld.global.b16" not in first.replace("ld.global.nc", "ld.global")
    assert len(re.findall(r"cp\.async\.\w+\.shared", first)) > len(re.findall(r"cp\.async\.\w+\.shared", last))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@without_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_on_a_gpu(dtype: torch.dtype, layout: Layout) -> None:
    from lbc_cli.runtime.vector_kernel import gathered_product

    for pattern in PATTERNS:
        for kernel, options in CONVOLUTIONS.values():
            conv = conv_of(vector_wise((256, 128, *kernel), pattern), noise(256), **options)
            batch = noise(5, 128, 23, 21).to(dtype)
            weight, bias = conv.weight.to("cuda", dtype), noise(256).to("cuda", dtype)
            layer = VectorConv2d(weight, bias, Pattern.parse(pattern), gathered_product, layout, Geometry.of(conv))
            expected = conv.to(dtype).double()(batch.double())
            error = (layer(batch.cuda()).cpu().double() - expected).abs().max() / expected.abs().max()
            assert float(error) < {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4}[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@without_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_and_compilation_on_a_gpu(layout: Layout) -> None:
    from lbc_cli.runtime.vector_kernel import gathered_product

    weight = vector_wise((256, 128), "1:4/128", torch.bfloat16).cuda()
    layer = VectorLinear(weight, None, Pattern.parse("1:4/128"), gathered_product, layout)
    inputs = noise(8, 197, 128, dtype=torch.bfloat16).cuda()
    expected = layer(inputs)  # measures the configurations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer(inputs)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
    assert torch.equal(torch.compile(layer, fullgraph=True)(inputs), expected)
