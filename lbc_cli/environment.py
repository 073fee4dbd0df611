"""What a run was made with: versions, hardware, command line, commit. Loads torch only when asked."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Threads, devices and libraries; nothing that could be a secret.
_VARIABLES = re.compile(
    r"(?:OMP|MKL|KMP|OPENBLAS|CUDA|CUBLAS|CUDNN|NCCL|PYTORCH|TORCHINDUCTOR|TRITON|LBC)_\w+|WORLD_SIZE|RANK|PYTHONHASHSEED"
)


def describe_hardware() -> dict[str, Any]:
    """Versions and hardware, without paths, hosts or users: what a checkpoint's manifest may carry."""
    import torch

    import lbc_cli

    versions = {name: _version(name) for name in ("torchvision", "timm", "numpy", "safetensors")}
    return {
        "python": platform.python_version(),
        "lbc": lbc_cli.__version__,
        "torch": torch.__version__,
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def describe_environment(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What a run needs to be understood later: versions, hardware, command line, commits.

    Args:
        argv: the command line; the process's own by default.

    Returns:
        `describe_hardware` and, of this machine and process: "os", "argv", "folder", "started" (UTC, ISO 8601),
        "memory" (bytes), "gpu_memory" (bytes of each), "gpu_driver", "cudnn", "variables" (those of the environment
        that change how a run computes), and the commits "git" of the current folder and "lbc_git" of lbc's own source:
        {"commit", "dirty"}, None where there is no repository, or lbc is installed from a package.
    """
    hardware = describe_hardware()
    return {
        **hardware,
        **(_gpus() if hardware["gpus"] else {}),
        "os": platform.platform(),
        "memory": _memory(),
        "argv": list(sys.argv if argv is None else argv),
        "folder": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
        "git": git_commit(Path()),
        "lbc_git": git_commit(Path(__file__).parent, of=Path(__file__)),
    }


def git_commit(folder: Path, *, of: Path | None = None) -> dict[str, Any] | None:
    """The commit of a folder's repository, and whether tracked files were changed since; None outside of one.

    Args:
        folder: in the repository.
        of: a file that must be tracked there; an environment within somebody's repository is not part of it.
    """
    at = ("git", "-C", str(folder))
    commit = _output_of(*at, "rev-parse", "--verify", "HEAD")
    if commit is None or (of is not None and _output_of(*at, "ls-files", "--error-unmatch", str(of)) is None):
        return None
    changed = _output_of(*at, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


def _gpus() -> dict[str, Any]:
    import torch

    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    devices = range(torch.cuda.device_count())
    return {
        "gpu_memory": [torch.cuda.get_device_properties(index).total_memory for index in devices],
        "gpu_driver": driver.splitlines()[0] if driver else None,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _memory() -> int | None:
    """Bytes of the machine's memory."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor as it calls itself."""
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _output_of(*command: str) -> str | None:
    """What a small program prints, or None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
