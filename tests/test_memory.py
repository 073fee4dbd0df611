"""Peak memory of reading and writing, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lbc_cli.checkpoint import ahead

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peaks")

# What the measured process does first: everything is imported and warm, then the peak is reset.
PRELUDE = """
import gc, json, re, sys, time
from pathlib import Path
import timm, torch
import lbc_cli.checkpoint.ahead as ahead
from lbc_cli.checkpoint import load, read, save, stream
from lbc_cli.patterns import Pattern
from lbc_cli.targets import find_targets
from lbc_cli.verifier import verify
from tests.checkpoints import FakePruner

def status(key):
    return int(re.search(rf"^{key}:\\s*(\\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024

def measured(work):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = status("VmRSS"), time.perf_counter()
    kept = work()
    print(json.dumps({"peak": status("VmHWM") - before, "seconds": time.perf_counter() - begin}))

def vit(name):
    model = timm.create_model(name)
    targets = find_targets(model, Pattern(2, 4)).targets
    return model, FakePruner(model, {target.name: "2:4" for target in targets})

path = Path(sys.argv[1])
"""


def run(script: str, path: Path, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_streams_hold_one_tensor_at_a_time(tmp_path: Path) -> None:
    """A model of 84 MiB in 38 packed tensors of at most 2.3 MiB (dense), and a file of 45 MiB.

    Without lookahead, and with an allocator that gives back at once, so that the numbers mean something.
    """
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    script = """
ahead.LOOKAHEAD_BYTES = 1
model, pruner = vit("vit_small_patch16_224")
save(model, path.with_name("warm"), pruner=pruner)
measured(lambda: save(model, path, pruner=pruner))
measured(lambda: [name for name, _ in stream(path)])
measured(lambda: load(path, model=model))
del model, pruner
measured(lambda: load(path))
measured(lambda: read(path))
measured(lambda: verify(path))
"""
    peaks = [entry["peak"] for entry in run(script, tmp_path / "m.safetensors", **exact)]
    saved, streamed, into, loaded, everything, verified = peaks
    dense = 84.2
    assert saved <= 25  # the indices wait for the end of the file: 2.5 MiB
    assert streamed <= 20
    assert into <= 20  # what was in the model goes as the new comes
    assert dense - 1 <= loaded <= dense + 20
    assert dense - 1 <= everything <= dense + 20
    assert verified <= 20


def test_lookahead_is_bounded() -> None:
    """Of items that fit together, a few are under way; one that does not fit is alone."""
    started: list[int] = []

    def work(size: int) -> int:
        started.append(size)
        return size

    mebibyte = 1 << 20
    results = ahead.ahead(work, iter([10 * mebibyte] * 50), lambda size: size)
    assert next(results) == 10 * mebibyte
    assert len(started) <= 6
    results.close()
    started.clear()
    results = ahead.ahead(work, [mebibyte, 100 * mebibyte, mebibyte], lambda size: size)
    assert next(results) == mebibyte
    assert len(started) <= 1
    assert list(results) == [100 * mebibyte, mebibyte]


def test_errors_come_in_their_items_place() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = ahead.ahead(work, range(10), lambda number: 1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


@pytest.mark.slow
def test_vit_large_at_400_megabytes_a_second(tmp_path: Path) -> None:
    """`pytest -m slow tests/test_memory.py`: ViT-L, 2:4, float32: 1,217 MB dense, 651 MB packed; best of three.

    Bounds on memory above the process with its imports (and the model, for saving): the file, the largest tensor
    and 300 MiB. What loading returns is the dense model itself, which takes the place of the file.
    """
    script = """
if not path.exists():
    model, pruner = vit("vit_large_patch16_224")
    for attempt in range(3):
        measured(lambda: save(model, path, pruner=pruner, overwrite=True))
else:
    for attempt in range(3):
        measured({"stream": lambda: [name for name, _ in stream(path)], "read": lambda: read(path),
                  "load": lambda: load(path), "verify": lambda: verify(path)}[WORK])
"""
    path = tmp_path / "vit.safetensors"
    megabytes, dense, file, largest = 1217.3, 1160.9, 621.1, 16.0
    found = {"save": run(script, path)}
    for work in ("stream", "read", "load", "verify"):
        found[work] = run(f"WORK = {work!r}\n" + script, path)
    for work, entries in found.items():
        print(
            work,
            [round(megabytes / e["seconds"]) for e in entries],
            "MB/s,",
            [round(e["peak"]) for e in entries],
            "MiB",
        )
    for work, entries in found.items():
        held = dense if work in ("read", "load") else file
        assert entries[0]["peak"] <= held + largest + 300, work
        assert max(megabytes / entry["seconds"] for entry in entries) >= 400, work
