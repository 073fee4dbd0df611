"""What NVIDIA's datasheets say of the GPUs that can be estimated for: tensor-core peaks and memory bandwidth.

    A100 80GB SXM   bf16/fp16 312, int8 624, TF32 156; 2,039 GB/s
        "NVIDIA A100 Tensor Core GPU", datasheet
        https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    H100 SXM        bf16/fp16 989.4, int8 1,978.9, TF32 494.7; 3,350 GB/s
        peaks: "NVIDIA H100 Tensor Core GPU Architecture", whitepaper
        https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper
        bandwidth: "NVIDIA H100 Tensor Core GPU", datasheet (it rounds the peaks: 1,979 TFLOPS "with sparsity")
        https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    H200 SXM        the peaks of the H100 SXM, the same processor; 4,800 GB/s
        "NVIDIA H200 Tensor Core GPU", datasheet
        https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446

In TFLOPS (int8: TOPS), dense. All of them give 2:4 twice the dense figure, counted in the operations of the dense
product. They hold at boost clock; under load the clock is lower, and other variants (PCIe, NVL, 40 GB) are other cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lbc_cli.errors import UsageError, did_you_mean

SPARSE_PEAK = 2
"""2:4 products against dense ones, at peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU on paper.

    Attributes:
        product: as the datasheet names it.
        peaks: operations per second of dense tensor-core products, by type; float32 is multiplied as TF32.
        bandwidth: of its memory, in bytes per second.
        source: the document, and where it is.
    """

    product: str
    peaks: Mapping[torch.dtype, float]
    bandwidth: float
    source: str

    def peak(self, dtype: torch.dtype) -> float:
        """Dense operations per second in a type.

        Raises:
            UsageError: for a type without tensor-core peak in the table.
        """
        if dtype not in self.peaks:
            known = ", ".join(_spelled(other) for other in self.peaks)
            raise UsageError(f"no estimate for {_spelled(dtype)} on {self.product}: the table has {known}")
        return self.peaks[dtype]


def _peaks(half: float, int8: float, tf32: float) -> dict[torch.dtype, float]:
    tera = {torch.bfloat16: half, torch.float16: half, torch.float32: tf32, torch.int8: int8}
    return {dtype: peak * 1e12 for dtype, peak in tera.items()}


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        product="A100 80GB SXM",
        peaks=_peaks(312, 624, 156),
        bandwidth=2039e9,
        source=(
            "NVIDIA A100 Tensor Core GPU, datasheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
            "a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
        ),
    ),
    "h100": Gpu(
        product="H100 SXM",
        peaks=_peaks(989.4, 1978.9, 494.7),
        bandwidth=3350e9,
        source=(
            "NVIDIA H100 Tensor Core GPU Architecture, https://resources.nvidia.com/en-us-tensor-core/"
            "gtc22-whitepaper-hopper; bandwidth: NVIDIA H100 Tensor Core GPU, datasheet, "
            "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
        ),
    ),
    "h200": Gpu(
        product="H200 SXM",
        peaks=_peaks(989.4, 1978.9, 494.7),
        bandwidth=4800e9,
        source=(
            "NVIDIA H200 Tensor Core GPU, datasheet, https://nvdam.widen.net/s/nb5zzzsjdf/"
            "hpc-datasheet-sc23-h200-datasheet-3002446; peaks to the digit: NVIDIA H100 Tensor Core GPU Architecture, "
            "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
        ),
    ),
}


def find_gpu(name: str) -> Gpu:
    """A GPU of the table by its short name, whatever the case.

    Raises:
        UsageError: naming those there are.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        near = did_you_mean(name.lower(), GPUS)
        raise UsageError(f"no datasheet of {name!r} to estimate from: one of {', '.join(GPUS)}.{near}")
    return gpu
