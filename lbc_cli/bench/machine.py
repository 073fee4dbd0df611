"""What the machine can do, measured, and at which clocks it ran."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from lbc_cli.environment import describe_hardware
from lbc_cli.runtime.clock import interleaved

_QUERY = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
_LANES = {"avx512": 16, "avx2": 8}  # float32 values in a register
_MULTIPLY_ADD, _PERMUTED = 0, 1  # what `lbc_rate` is asked for


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device can do at most.

    Attributes:
        operations: multiplications and additions per second.
        source: what was measured to know it.
        permuted: those of a CPU whose every multiply-add needs a permutation of a register, as the kernels of masks
            for single output channels do; None where that was not measured.
    """

    operations: float
    source: str
    permuted: float | None = None

    def share(self, operations: float) -> float:
        """What a rate of operations per second is of the peak."""
        return operations / self.operations


def core_count() -> int:
    """Cores that this process may use."""
    return int(describe_hardware()["cpus"] or 1)


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of a device, a CPU's for as many threads as torch is set to use.

    A GPU's is that of a large matrix product. On a CPU a library's product would be no fair measure: some reach less
    than half of what the processor can do. There registers are multiplied and added, by the kernels' own code; where
    that is not to be had, in other dtypes too, the better of a product and a convolution is taken. A CPU's is that of
    one thread times their number.
    """
    if device.type == "cuda":
        return Peak(_product(device, dtype, 8192), "a large matrix product")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = (_registers() if dtype == torch.float32 else None) or _libraries(dtype)
    finally:
        torch.set_num_threads(threads)
    permuted = None if found.permuted is None else found.permuted * threads
    return Peak(found.operations * threads, f"{found.source}, one thread's times {threads}", permuted)


def _libraries(dtype: torch.dtype) -> Peak:
    device = torch.device("cpu")
    tried = {"matrix product": _product(device, dtype, 1024), "3 x 3 convolution": _convolution(device, dtype)}
    best = max(tried, key=lambda name: tried[name])
    return Peak(tried[best], f"a {best}, the faster of {' and '.join(tried)}")


def _registers() -> Peak | None:
    from lbc_cli.runtime.native import library

    if library.why_missing() is not None:
        return None
    name = library.isas()[0]
    if name not in _LANES:
        return None
    plain, permuted = (
        2 * _LANES[name] * float(library.kernels().lbc_rate(library.ISAS[name], kind))
        for kind in (_MULTIPLY_ADD, _PERMUTED)
    )
    return Peak(plain, f"multiply-adds of {name} registers", permuted)


def _product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        times = interleaved({"product": partial(torch.mm, left, right)}, device, rounds=10, warmup=2)["product"]
    return 2 * size**3 / min(times.seconds)


def _convolution(device: torch.device, dtype: torch.dtype) -> float:
    channels, side = 256, 28
    images = torch.randn(1, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    call = partial(functional.conv2d, images, weight, padding=1)
    with torch.inference_mode():
        times = interleaved({"convolution": call}, device, rounds=10, warmup=2)["convolution"]
    return 2 * side**2 * channels**2 * 9 / min(times.seconds)


def bfloat16_support() -> dict[str, bool]:
    """Which instructions a CPU has for products in bfloat16."""
    return {
        "avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
    }


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature of a GPU, or the clock of a CPU; empty where nothing says."""
    if device.type == "cuda":
        return _gpu_clocks(device)
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 (a device of the kernel, not a file of ours)
            values = [line.partition(":")[2].strip() for line in file if line.startswith("cpu MHz")]
    except OSError:
        return {}
    return {"cpu MHz": ", ".join(values)} if values else {}


def _gpu_clocks(device: torch.device) -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    # Not by number: CUDA_VISIBLE_DEVICES renumbers for torch, and not for this tool.
    unit = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [tool, f"--id={unit}", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_QUERY, values, strict=True)) if done.returncode == 0 and len(values) == len(_QUERY) else {}
