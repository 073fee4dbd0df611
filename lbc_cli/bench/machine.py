"""What the machine can do, measured, and at which clocks it ran."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial

import torch

from lbc_cli.runtime.clock import interleaved

_QUERY = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        times = interleaved({"product": partial(torch.mm, left, right)}, device, rounds=10, warmup=2)["product"]
    return 2 * size**3 / min(times.seconds)


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
