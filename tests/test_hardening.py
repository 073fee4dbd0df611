"""Damaged, forged and hostile files, in the numbers that the format promises. Everything is drawn from fixed seeds.

Every file goes through the reader and the verifier, which share no code; where a file was forged, a third reading
(tests/oracle.py) has to find the broken rule first, so that no mutation counts that broke nothing.
"""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lbc_cli.checkpoint import read, read_manifest
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.verifier import Report, verify
from tests import fuzz
from tests.oracle import broken_rule
from tests.structured import EXPECTED, LARGEST, MUTATIONS, Draft, bases, mutate, spell_deep


def verdicts(path: Path, content: bytes) -> tuple[bool, bool]:
    """Whether the reader and the verifier accept a file; any other exception than the reader's own is an error."""
    path.write_bytes(content)
    message = ""
    try:
        read(path)
    except CheckpointError as error:
        message = str(error)
    accepted = not message
    assert "\n" not in message
    report = verify(path)
    assert all("\n" not in finding.message for finding in report.findings)
    return accepted, report.ok


def each(count: int, seed: int) -> Iterator[tuple[random.Random, bytes]]:
    """The bases in turn, `count` times in all."""
    rng, files = random.Random(seed), list(bases().values())
    for number in range(count):
        yield rng, files[number % len(files)]


def data_start(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


# Damage.


@pytest.mark.parametrize("name", bases())
def test_the_bases_are_sound(name: str, tmp_path: Path) -> None:
    assert broken_rule(bases()[name]) == ""
    assert verdicts(tmp_path / "m", bases()[name]) == (True, True)


@pytest.mark.parametrize(("part", "seed"), [("header", 31), ("payload", 32)])
def test_1000_bit_flips_each(part: str, seed: int, tmp_path: Path) -> None:
    for rng, content in each(1000, seed):
        first, last = (0, data_start(content)) if part == "header" else (data_start(content), len(content))
        damaged = bytearray(content)
        damaged[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        assert verdicts(tmp_path / "d", bytes(damaged)) == (False, False)


def test_500_truncations(tmp_path: Path) -> None:
    for rng, content in each(500, 33):
        at = rng.choice([rng.randrange(len(content)), rng.randrange(16), len(content) - rng.randint(1, 16)])
        assert verdicts(tmp_path / "d", content[:at]) == (False, False)


def test_500_extensions(tmp_path: Path) -> None:
    for rng, content in each(500, 34):
        size = rng.choice([1, 2, 4, 8, rng.randint(1, 100)])
        more = rng.choice([bytes(size), rng.randbytes(size), content[-size:], content, b"\n", b" " * size])
        assert verdicts(tmp_path / "d", content + more) == (False, False)


def test_500_zero_filled_tails(tmp_path: Path) -> None:
    """What a crash may leave behind: the right size, the end never written."""
    for rng, content in each(500, 35):
        written = len(content.rstrip(b"\0"))
        at = rng.choice([rng.randrange(written), rng.randrange(16), written - rng.randint(1, min(16, written))])
        damaged = content[:at] + bytes(len(content) - at)
        assert damaged != content
        assert verdicts(tmp_path / "d", damaged) == (False, False)


def test_torn_and_mixed_files(tmp_path: Path) -> None:
    """Blocks exchanged within a file, and the header of one file before the data of another."""
    rng, files = random.Random(36), list(bases().values())
    for number in range(300):
        content, alien = files[number % len(files)], files[(number * 7 + 1) % len(files)]
        a, b = sorted(rng.sample(range(len(content)), 2))
        size = rng.randint(1, max(1, min(b - a, len(content) - b)))
        torn = content[:a] + content[b : b + size] + content[a + size : b] + content[a : a + size] + content[b + size :]
        mixed = content[: data_start(content)] + alien[data_start(alien) :]
        for damaged in (torn, mixed):
            if damaged != content:
                assert verdicts(tmp_path / "d", damaged) == (False, False)


# Forgery.


def test_2000_structured_mutations_with_new_digests(tmp_path: Path) -> None:
    """One rule of the format broken each time and everything sealed again: nobody accepts any of them."""
    used: Counter[str] = Counter()
    for seed in range(2000):
        base, name, sound, forged = mutate(seed)
        case = f"seed {seed}: {name} in {base}"
        assert forged != sound, case
        assert broken_rule(forged) in EXPECTED[name], case
        begin = time.process_time()
        assert verdicts(tmp_path / "d", forged) == (False, False), case
        assert time.process_time() - begin < 5, case
        used[name] += 1
    assert set(used) == set(MUTATIONS)


def test_every_code_of_every_index_broken_in_every_way(tmp_path: Path) -> None:
    """All single-bit changes of all indices, sealed again: the two readings agree with the third on each."""
    outcomes: Counter[str] = Counter()
    for content in bases().values():
        draft = Draft.of(content)
        for name in (name for name in draft.entries if name.endswith(".nm_index")):
            sound = draft.blobs[name]
            for bit in range(8 * len(sound)):
                draft.blobs[name] = (int.from_bytes(sound, "little") ^ 1 << bit).to_bytes(len(sound), "little")
                forged = draft.seal()
                rule = broken_rule(forged)
                outcomes[rule] += 1
                assert verdicts(tmp_path / "d", forged) == (not rule, not rule), (name, bit)
            draft.blobs[name] = sound
    assert set(outcomes) == {"", "position", "repeated", "unsorted", "padding"}


@pytest.mark.parametrize("member", ["metrics", "kwargs", "environment"])
def test_json_is_nested_64_levels_and_no_deeper(member: str, tmp_path: Path) -> None:
    """Whatever the depth: never a stack that overflows, and never one reading for and another against."""
    deepest = 0
    for depth in [*range(55, 70), *range(120, 1100, 35)]:
        draft = Draft.of(bases()["linear 3:8 F16"])
        nested: Any = 1
        for level in range(depth):
            nested = [nested] if level % 2 else {"a": nested}
        text = draft.spell_manifest(draft.manifest).replace(f'"{member}":{{', f'"{member}":{{" ":{spell_deep(nested)},')
        spelled = text.replace(",}", "}")
        draft.spell_manifest = lambda manifest, spelled=spelled: spelled  # type: ignore[misc]
        accepted, ok = verdicts(tmp_path / "d", draft.seal())
        assert accepted == ok == (not broken_rule(draft.seal())), depth
        deepest = depth if accepted else deepest
        if accepted:
            assert read_manifest(tmp_path / "d").to_json() == spelled
    assert 60 <= deepest <= 64


# Hostile headers.


def entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}


META = '"__metadata__":{"format":"pt","lbc":"{}","lbc.sha256":"0"}'


def header(**tensors: Any) -> bytes:
    return ("{" + META + "," + json.dumps(tensors)[1:]).encode()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "length of zero": lambda: bytes(8),
    "length of 2^64 - 1": lambda: b"\xff" * 64,
    "length of 100 MB": lambda: (100_000_000).to_bytes(8, "little") + b"{" + bytes(1000),
    "length of the file and one more": lambda: (17).to_bytes(8, "little") + b"{" + bytes(15),
    "nested lists": lambda: framed(b"[" * 5_000_000),
    "nested objects": lambda: framed(b'{"a":' * 2_000_000),
    "closed nested lists": lambda: framed(b"[" * 100_000 + b"]" * 100_000),
    "a long number": lambda: framed(b'{"a":' + b"9" * 10_000_000 + b"}"),
    "a long fraction": lambda: framed(b'{"a":0.' + b"9" * 10_000_000 + b"}"),
    "many repeated keys": lambda: framed(b"{" + b'"a":1,' * 1_000_000 + b'"a":1}'),
    "many empty lists": lambda: framed(b'{"a":[' + b"[]," * 5_000_000 + b"1]}"),
    "many tensors": lambda: framed(header(**{f"t{i}": entry(data_offsets=[0, 4]) for i in range(20_000)})),
    "NaN": lambda: framed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
    "infinity": lambda: framed(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'),
    "half a surrogate": lambda: framed(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "not UTF-8": lambda: framed(b"\xff\xfe{}"),
    "a byte order mark": lambda: framed(b"\xef\xbb\xbf{}"),
    "UTF-16": lambda: framed("{}".encode("utf-16")),
    "zero bytes": lambda: framed(bytes(1_000_000)),
    "overlap": lambda: framed(header(a=entry(), b=entry()), 4),
    "gap": lambda: framed(header(a=entry(), b=entry(data_offsets=[8, 12])), 12),
    "offsets backwards": lambda: framed(header(a=entry(data_offsets=[4, 0])), 4),
    "offsets beyond the end": lambda: framed(header(a=entry(data_offsets=[10**12, 10**12 + 4])), 4),
    "offsets of 4,300 digits": lambda: framed(header(a=entry(shape=[0], data_offsets=[10**4300 - 1] * 2))),
    "shape (0, 10^12)": lambda: framed(header(a=entry(shape=[0, 10**12], data_offsets=[0, 0]))),
    "shape (10^6, 10^6)": lambda: framed(header(a=entry(shape=[10**6, 10**6], data_offsets=[0, 4 * 10**12])), 4),
    "shape of 4,300 digits": lambda: framed(header(a=entry(shape=[0, 10**4299], data_offsets=[0, 0]))),
    "shape with overflow": lambda: framed(header(a=entry(shape=[2**32, 2**32], data_offsets=[0, 0]))),
    "a thousand dimensions": lambda: framed(header(a=entry(shape=[1] * 1000)), 4),
    "a million dimensions of 2": lambda: framed(header(a=entry(shape=[2] * 1_000_000)), 4),
    "a repeated tensor": lambda: framed(header(a=entry())[:-1] + b"," + json.dumps({"a": entry()})[1:].encode(), 4),
    "a path": lambda: framed(header(**{"../../etc/passwd": entry()}), 4),
    "an absolute path": lambda: framed(header(**{"/etc/passwd": entry()}), 4),
    "control characters": lambda: framed(header(**{"a\x1b[2J\nb": entry()}), 4),
    "a name of a megabyte": lambda: framed(header(**{"a" * 1_000_000: entry()}), 4),
    "sizes that are objects": lambda: framed(header(a=entry(shape=[{}])), 4),
    "metadata of a megabyte": lambda: framed(
        json.dumps({"__metadata__": {"format": "pt", "lbc": "[" * 1_000_000, "lbc.sha256": "0"}}).encode()
    ),
    "a pickle": lambda: b"\x80\x04\x95" + bytes(100),
    "a zip file": lambda: b"PK\x03\x04" + bytes(100),
}


def framed(text: bytes, data: int = 0) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


# Peak memory of each call above what the process held before, from the kernel's own mark, which can be set back.
MEASURE = """
import json, sys, time
from pathlib import Path
from lbc_cli.checkpoint import read, read_manifest
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.verifier import verify

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def measured(call, path):
    Path("/proc/self/clear_refs").write_text("5")
    held, begin = status("VmRSS"), time.process_time()
    try:
        verdict = call(path)
    except CheckpointError as error:
        verdict = "refused" if "\\n" not in str(error) and len(str(error)) < 6000 else "long"
    except BaseException as error:
        verdict = repr(error)[:200]
    return verdict, status("VmHWM") - held, time.process_time() - begin

def look(path):
    report = verify(path, pattern="2:4")
    assert not report.ok
    return "refused"

found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    for call in (read, read_manifest, look):
        call(path) if path.name == "warm" else found.setdefault(path.name, []).append(measured(call, path))
print(json.dumps(found))
"""


def test_hostile_headers_cost_little_and_are_refused(tmp_path: Path) -> None:
    """Each within seconds, within 32 times its size plus 32 MiB, and never more than 256 MiB."""
    assert Path("/proc/self/clear_refs").exists() or pytest.skip("needs Linux to measure peaks")
    names = list(HOSTILE)
    for number, name in enumerate(names):
        (tmp_path / f"{number:03}").write_bytes(HOSTILE[name]())
    with (tmp_path / "huge").open("wb") as file:  # sparse: 300 MB that are nowhere
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(HOSTILE) + 1
    for number, calls in found.items():
        name = number if number == "huge" else names[int(number)]
        size = 0 if number == "huge" else (tmp_path / number).stat().st_size
        for verdict, kilobytes, seconds in calls:
            assert verdict == "refused", f"{name}: {verdict}"
            assert kilobytes * 1024 <= min(32 * size + (32 << 20), 256 << 20), (
                f"{name}: {kilobytes} KiB for {size} bytes"
            )
            assert seconds < 10, f"{name}: {seconds} s"


# A file that changes while it is read.

SHRINKING = """
import os, sys, threading, time
from lbc_cli.checkpoint import read
from lbc_cli.errors import CheckpointError, UsageError
from lbc_cli.verifier import verify

path, size = sys.argv[1], os.path.getsize(sys.argv[1])
content = open(path, "rb").read()
stop = threading.Event()

def tear():
    cut = 7
    while not stop.is_set():
        os.truncate(path, cut % size)
        with open(path, "r+b") as file:
            file.write(content)
        cut = cut * 31 + 12345

thread = threading.Thread(target=tear)
thread.start()
try:
    refused, end = 0, time.monotonic() + 1
    while time.monotonic() < end:
        try:
            read(path)
        except CheckpointError:
            refused += 1
        refused += not verify(path).ok
finally:
    stop.set()
    thread.join()
print(refused)
"""


def test_a_file_that_is_cut_while_it_is_read_is_no_signal(tmp_path: Path) -> None:
    """Mapped files would end the process with SIGBUS; read ones end in an error."""
    content = bases()["linear 2:4 F32"]
    (tmp_path / "d").write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", SHRINKING, str(tmp_path / "d")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0


# The command line.

CLASSES: dict[str, Callable[[bytes], bytes]] = {
    "bit flip in the data": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "bit flip in the header": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    "cut off": lambda content: content[:-1],
    "extended": lambda content: content + b"\0",
    "zero-filled": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "forged": lambda content: next(
        forged for seed in range(10_000) for _, name, _, forged in [mutate(seed)] if name == "positions out of order"
    ),
    "100 MB header": lambda content: HOSTILE["length of 100 MB"](),
    "nested": lambda content: HOSTILE["nested lists"](),
    "overlap": lambda content: HOSTILE["overlap"](),
    "path": lambda content: HOSTILE["a path"](),
    "pickle": lambda content: HOSTILE["a pickle"](),
    "empty": lambda content: b"",
}
COMMANDS = {"verify": [], "inspect": [], "export": ["--format", "dense", "--out", "out.safetensors"]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", CLASSES)
def test_commands_say_it_in_a_line_and_exit_3(
    command: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbc_cli.cli import app

    monkeypatch.chdir(tmp_path)
    # Damage that only digests tell is no business of a command that does not read the data.
    if command == "inspect" and damage in ("bit flip in the data", "forged", "zero-filled"):
        return
    Path("m.safetensors").write_bytes(CLASSES[damage](bases()["linear 2:4 F32"]))
    done = CliRunner().invoke(app, [command, "m.safetensors", *COMMANDS[command]])
    # What is plainly another kind of file is a wrong argument of export, no damage.
    assert done.exit_code == (2 if damage == "pickle" and command != "verify" else 3), done.output
    assert "Traceback" not in done.output
    assert "m.safetensors" in done.output
    if command != "verify":
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


# Extra non-zeros.

INJECTED_PATTERNS = [
    "2:4",
    "1:4",
    "2:8",
    "1:16",
    "4:8",
    "1:2",
    "3:5",
    "7:12",
    "5:32",
    "31:32",
    "2:4/4",
    "8:16/3",
    "1:4/2",
]
DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def numbers(pattern: str) -> tuple[int, int, int]:
    """N, M and V of "N:M" or "N:M/V"."""
    n, m, v = re.fullmatch(r"(\d+):(\d+)(?:/(\d+))?", pattern).groups("1")  # type: ignore[union-attr]
    return int(n), int(m), int(v)


def drawn_weight(
    rng: np.random.Generator, pattern: str, dtype: str
) -> tuple[np.ndarray[Any, Any], tuple[int, tuple[int, ...], int]]:
    """A weight that holds the pattern but for one element, in random layers' shapes.

    Returns:
        The elements as unsigned integers, [O, I, *K], and where the extra one is: o, k, i.
    """
    n, m, v = numbers(pattern)
    kernel = tuple(int(size) for size in rng.integers(1, 4, rng.integers(0, 4)))
    vectors, groups, positions = int(rng.integers(1, 4)), int(rng.integers(1, 4)), math.prod(kernel)
    order = rng.random((vectors, positions, groups, m)).argsort(axis=-1)
    mask = order < n
    mask &= (rng.random(mask.shape[:3]) < 0.8)[..., None] | (order > 0)  # a fifth of the groups is under-filled
    at = tuple(int(rng.integers(size)) for size in mask.shape[:3])
    mask[at] = order[at] < n  # the group in question is full
    position = int(rng.choice(np.flatnonzero(~mask[at])))
    rows = np.repeat(mask, v, axis=0)
    kind = f"<u{DTYPES[dtype]}"
    elements = np.where(rows, rng.integers(1, LARGEST[dtype], rows.shape).astype(kind), np.array(0, kind))
    o = at[0] * v + int(rng.integers(v))
    sign = 0 if dtype == "I8" else 1 << (8 * DTYPES[dtype] - 1)
    # The smallest subnormal of either sign, ordinary numbers of either sign.
    extra = [1, 1 | sign, LARGEST[dtype] // 2, LARGEST[dtype] // 3 | sign][int(rng.integers(4))]
    elements[o, at[1], at[2], position] = extra
    shape = (vectors * v, positions, groups * m)
    dense = elements.reshape(shape).swapaxes(1, 2).reshape(shape[0], shape[2], *kernel)
    k = tuple(int(axis) for axis in np.unravel_index(at[1], kernel)) if kernel else ()
    return np.ascontiguousarray(dense), (o, k, at[2] * m + position)


def plain_file(tensors: dict[str, np.ndarray[Any, Any]], dtype: str) -> bytes:
    """A safetensors file of anybody."""
    listed: dict[str, Any] = {}
    begin = 0
    for name, tensor in tensors.items():
        listed[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    return framed(json.dumps(listed).encode()) + b"".join(tensor.tobytes() for tensor in tensors.values())


def test_10000_single_extra_non_zeros_are_caught_and_located(tmp_path: Path) -> None:
    """In 100 files of 100 layers each, one to a layer: every one is counted, on its own, and named with its place."""
    rng = np.random.default_rng(41)
    caught = 0
    for number in range(100):
        pattern = INJECTED_PATTERNS[number % len(INJECTED_PATTERNS)]
        dtype = list(DTYPES)[number % len(DTYPES)]
        drawn = {f"layer{i}.weight": drawn_weight(rng, pattern, dtype) for i in range(100)}
        (tmp_path / "m").write_bytes(plain_file({name: weight for name, (weight, _) in drawn.items()}, dtype))
        report = verify(tmp_path / "m", pattern=pattern)
        assert not report.ok
        findings = {finding.tensor: finding for finding in report.findings if finding.rule == "pattern"}
        assert set(findings) == set(drawn)
        _, m, v = numbers(pattern)
        for name, (_, (o, k, i)) in drawn.items():
            assert findings[name].count == 1, (number, name)
            (group,) = findings[name].groups
            assert (group.outputs, group.kernel) == ((o // v * v, o // v * v + v - 1), k), (number, name)
            assert group.inputs == (i // m * m, i // m * m + m - 1), (number, name)
            assert group.place in findings[name].message
            caught += 1
    assert caught == 10_000


def test_the_same_layers_without_the_extra_one_are_no_alarm(tmp_path: Path) -> None:
    """The counterpart, so that a verifier that objects to everything does not pass."""
    rng = np.random.default_rng(42)
    for number, pattern in enumerate(INJECTED_PATTERNS):
        dtype = list(DTYPES)[number % len(DTYPES)]
        tensors = {}
        for layer in range(100):
            weight, (o, k, i) = drawn_weight(rng, pattern, dtype)
            weight[(o, i, *k)] = 0
            tensors[f"layer{layer}.weight"] = weight
        (tmp_path / "m").write_bytes(plain_file(tensors, dtype))
        report = verify(tmp_path / "m", pattern=pattern)
        assert report.ok, report.findings[:1]
        assert len(report.layers) == 100
        assert sum(layer.under_filled for layer in report.layers) > 0


# Files of others, which carry no digests: some damage cannot be told there, but none may end in a traceback.


def damaged(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flips, cuts, overwritten and repeated ranges in turn."""
    rng = random.Random(seed)
    for number in range(count):
        at, size = rng.randrange(len(content)), rng.randint(1, 9)
        yield [
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
            content[:at],
            content[:at] + rng.choice([b"\xff", b"\0", b"\x7f"]) * size + content[at + size :],
            content[:at] + content[at // 2 : at] + content[at:],
            content[:at] + content[at + size :],
        ][number % 5]


def onnx_file() -> bytes:
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(51)
    kernel = rng.random((4, 8, 3), dtype=np.float32)
    kernel[:, ::2] = 0
    matrix = np.zeros((8, 5), np.float32)
    matrix[::4] = 1
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["a"]),
            helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["b", "fc"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(kernel, "conv.weight"), numpy_helper.from_array(matrix, "fc")],
    )
    return bytes(helper.make_model(graph, producer_name="lbc").SerializeToString())


def test_1000_damaged_onnx_files_end_in_a_report(tmp_path: Path) -> None:
    content = onnx_file()
    (tmp_path / "m.onnx").write_bytes(content)
    assert verify(tmp_path / "m.onnx", pattern="2:4").ok
    outcomes: Counter[bool | None] = Counter()
    for changed in damaged(content, 1000, 52):
        (tmp_path / "m.onnx").write_bytes(changed)
        outcomes[outcome(tmp_path / "m.onnx")] += 1
    assert outcomes[False] >= 200


def test_500_damaged_folders_end_in_a_report(tmp_path: Path) -> None:
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5]},
    }
    weight = np.zeros((4, 8, 1, 1), np.float32)
    weight[:, ::2] = 1
    parts = {"config.json": json.dumps(config).encode(), "model.safetensors": plain_file({"a.weight": weight}, "F32")}
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    assert verify(tmp_path, pattern="2:4").ok
    outcomes: Counter[bool | None] = Counter()
    for name, content in parts.items():
        for changed in [
            *damaged(content, 250, 53),
            b"",
            b"null",
            b"[]",
            b"{}",
            b"[" * 100_000,
            b"9" * 5000,
            b"\xff\xfe",
        ]:
            (tmp_path / name).write_bytes(changed)
            outcomes[outcome(tmp_path)] += 1
        (tmp_path / name).write_bytes(content)
    assert outcomes[False] >= 100


def outcome(path: Path) -> bool | None:
    """The verdict; None where the verifier says that it cannot be asked so."""
    try:
        report = verify(path, pattern="2:4")
    except UsageError:
        return None
    report.to_json()
    assert all("\n" not in finding.message for finding in report.findings)
    return report.ok


# Every way in at once.


@pytest.mark.parametrize("form", ["checkpoint", "semi-structured"])
def test_a_short_fuzz_finds_nothing(form: str, tmp_path: Path) -> None:
    """Some hundred files; hours of it: `python -m tests.fuzz --minutes 60 --format FORM`."""
    target = fuzz.Target(tmp_path, form)
    for number in range(3 if form == "checkpoint" else 1):
        fuzz.play(target, number)
    assert target.faults == {}
    assert target.executions >= 200
    assert min(target.outcomes["accepted"], target.executions - target.outcomes["accepted"]) >= 25


@pytest.mark.parametrize("planted", ["reader", "verifier", "crash"])
def test_the_fuzz_finds_what_is_planted(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(path: Path, **options: Any) -> Report:
        report = verify(path, **options)
        report.findings = [finding for finding in report.findings if finding.rule != "digest"]
        return report

    def trusting(path: Path) -> Any:
        return read(path, check_digests=False)

    def crashing(path: Path) -> Any:
        try:
            return read(path)
        except CheckpointError as error:
            raise KeyError("dtype") from error

    monkeypatch.setattr(fuzz, "verify", blind if planted == "verifier" else verify)
    monkeypatch.setattr(fuzz, "read", {"reader": trusting, "crash": crashing}.get(planted, read))
    target = fuzz.Target(tmp_path)
    for number in range(8):
        fuzz.play(target, number, shrink=False)
        if target.faults:
            break
    (fault,) = target.faults
    expected = {"reader": "reader accepts", "verifier": "verifier accepts", "crash": "reader crashes: KeyError"}
    assert fault.startswith(expected[planted])


def test_faults_are_kept_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "broken_rule", lambda content: "everything")
    monkeypatch.setattr(sys, "argv", ["fuzz", "--minutes", "0.0001", "--out", "faults"])
    assert fuzz.main() == 1
    (kept,) = Path("faults").glob("*.safetensors")
    assert read(kept).manifest.method in ("lbc", "gmp")
    assert kept.with_suffix(".txt").read_text().startswith("reader accepts a file that breaks 'everything'")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_semi_structured_layout_moves_every_bit_pattern(dtype: torch.dtype) -> None:
    """Torch's own gather gives every NaN of bfloat16 the same payload."""
    from lbc_cli.exports.semi_structured.layout import decode, encode

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).reshape(-1, 2)
    quads = torch.zeros(len(every), 4, dtype=torch.int16)
    quads[:, 1::2] = every
    matrix = quads.reshape(512, -1).view(dtype)
    assert torch.equal(decode(*encode(matrix, (512, 256))).view(torch.int16), matrix.view(torch.int16))


def test_what_a_file_says_of_itself_stays_one_short_line_in_messages(tmp_path: Path) -> None:
    draft = Draft.of(bases()["training"])
    draft.manifest["version"] = "\x1b[2J\n\u2028" + "é" * 100_000
    (tmp_path / "d").write_bytes(draft.seal())
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "d")
    message = str(CheckpointError("a\n\x1b[2J\u2028é" + "x" * 100_000))
    assert message.startswith("a\\n\\x1b[2J\\u2028éxxx")
    assert max(len(message), len(str(caught.value))) < 3000
    assert message.isprintable()
    assert str(caught.value).isprintable()
