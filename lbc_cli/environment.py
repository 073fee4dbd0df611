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
from pathlib import Path
from typing import Any


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
    """What a run needs to be understood later: versions, hardware, command line, commit.

    Args:
        argv: the command line; the process's own by default.
    """
    return {
        **describe_hardware(),
        "os": platform.platform(),
        "argv": list(sys.argv if argv is None else argv),
        "git": _git_commit(),
    }


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


def _git_commit() -> str | None:
    """The commit of the current folder's repository, "-dirty" if it was changed since; None outside of one."""
    commit = _output_of("git", "rev-parse", "--verify", "HEAD")
    changed = commit and _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _output_of(*command: str) -> str | None:
    """What a small program prints, or None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
