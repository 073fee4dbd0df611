"""The fuzz target: files near the format, made from its structure, through everything that reads them.

    python -m tests.fuzz --minutes 60 [--format checkpoint|semi-structured] [--seed 1] [--out fuzz-faults]

A file is a sound one after a few edits: of the manifest's JSON, of shapes and dtypes, of bytes in tensors, index
and header, of the whole file, or one of the named mutations of `tests.structured`; digests and offsets are computed
anew or left as they were. A fault is

- any exception but CheckpointError from the reader, any at all from the verifier (but UsageError where a file carries
  no pattern and none is named);
- a verdict on which reader, verifier and the third reading of `tests.oracle` do not agree;
- an accepted file that comes out otherwise when its content is encoded again;
- more than five seconds of computing for a file of a few kilobytes.

Every fault is shrunk by hypothesis and kept with its message in a folder. Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

from lbc_cli.checkpoint import Checkpoint, read, read_manifest, save
from lbc_cli.errors import CheckpointError, LbcError, UsageError
from lbc_cli.packing import pack
from lbc_cli.patterns import Pattern
from lbc_cli.verifier import Report, verify
from tests.checkpoints import FakePruner
from tests.oracle import SIZES, broken_rule, decode_row
from tests.structured import MUTATIONS, Draft, NotHereError, bases, header_text, padded

Content = TypeVar("Content")

SLOW = 5.0
EXAMPLES = 250
# What the verifier says about the values of a sound file.
ABOUT_VALUES = frozenset({"nan", "infinity", "negative-zero", "unstructured"})

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, 10**30, 10**400, -(10**400)])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["2:4", "1:4", "F32", "U8", "final", "training", "\u2028", "a\x00b"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


# An edit before has taken away what this one, or sealing, needs.
SPENT = (NotHereError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


class FaultError(Exception):
    """A property that does not hold; the first argument tells faults apart."""


# Files.


@lru_cache(maxsize=1)
def semi_structured_bases() -> dict[str, bytes]:
    """Sound exports of small models: linear layers and convolutions, padded in both directions, and dense tensors."""
    from lbc_cli.exports import export

    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, pattern in (("BF16", torch.bfloat16, "2:4"), ("F16", torch.float16, "1:4/2")):
            torch.manual_seed(0)
            model = nn.Module()
            model.fc = nn.Linear(60, 30)
            model.conv = nn.Conv2d(28, 30, (1, 2))
            model.head = nn.Linear(5, 3)
            model.to(dtype)
            pruner = FakePruner(model, {"fc.weight": pattern, "conv.weight": pattern})
            save(model, Path(folder, name), pruner=pruner)
            export(Path(folder, name), "semi-structured", Path(folder, name + ".semi"))
            found[name] = Path(folder, name + ".semi").read_bytes()
    return found


BASES: dict[str, Callable[[], dict[str, bytes]]] = {"checkpoint": bases, "semi-structured": semi_structured_bases}


@st.composite
def files(draw: st.DrawFn, form: str = "checkpoint") -> bytes:
    """A sound file after a few edits."""
    sound = BASES[form]()
    content = sound[draw(st.sampled_from(sorted(sound)))]
    draft = Draft.of(content)
    draft.rehash = draw(st.integers(0, 7)) > 0
    for _ in range(draw(st.integers(0, 3))):
        with contextlib.suppress(*SPENT):
            draw(st.sampled_from(EDITS))(draw, draft)
    with contextlib.suppress(*SPENT):
        content = draft.seal()
    return edit_bytes(draw, content) if draw(st.integers(0, 3)) == 0 else content


def edit_by_name(draw: st.DrawFn, draft: Draft) -> None:
    """One of the mutations that break a rule."""
    name = draw(st.sampled_from(sorted(MUTATIONS)))
    MUTATIONS[name](random.Random(draw(st.integers(0, 1 << 16))), draft)


def edit_manifest(draw: st.DrawFn, draft: Draft) -> None:
    """Replace, add or remove a value anywhere in the manifest."""
    place: Any = draft.manifest
    while isinstance(place, dict | list) and place:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    else:
        return
    action = draw(st.integers(0, 4))
    if action == 0:
        del place[key]
    elif action == 1 and isinstance(place, dict):
        place[draw(st.text(max_size=6))] = draw(JSON)
    elif action == 2 and type(place[key]) is int:
        place[key] += draw(st.integers(-2, 2))
    else:
        place[key] = draw(JSON)


def edit_description(draw: st.DrawFn, draft: Draft) -> None:
    """Free members of the manifest: every JSON is sound here."""
    member = draw(st.sampled_from(["metrics", "environment", "recipe", "method", "epoch", "kwargs", "arch", "task"]))
    place = draft.manifest if member in draft.manifest else draft.manifest.get("model")
    free = {"recipe": st.text(), "method": st.text(), "epoch": st.none() | st.integers()}
    text = st.none() | st.text()
    strategy = free.get(member, text if member in ("arch", "task") else st.dictionaries(st.text(), JSON, max_size=4))
    if isinstance(place, dict):
        place[member] = draw(strategy)


def edit_entry(draw: st.DrawFn, draft: Draft) -> None:
    """Name, dtype or shape of a stored tensor, in the file and often in the manifest's list too."""
    if not draft.entries:
        return
    name = draw(st.sampled_from(sorted(draft.entries)))
    entry = draft.entries[name]
    action = draw(st.integers(0, 3))
    if action == 0:
        name = renamed(draft, name, draw(st.text(max_size=6)))
    elif action == 1:
        entry["dtype"] = draw(st.sampled_from(sorted(SIZES)))
    elif action == 2:
        entry["shape"] = draw(st.permutations(entry["shape"]) | st.lists(st.integers(0, 40), max_size=5))
    else:
        del draft.entries[name], draft.blobs[name]
        return
    tensors = draft.manifest.get("tensors")
    if isinstance(tensors, dict) and draw(st.booleans()):
        tensors[name] = {"dtype": entry["dtype"], "shape": list(entry["shape"]), "sha256": ""}


def renamed(draft: Draft, old: str, new: str) -> str:
    """Rename a tensor in the file; gives the new name."""
    draft.entries[new], draft.blobs[new] = draft.entries.pop(old), draft.blobs.pop(old)
    tensors = draft.manifest.get("tensors")
    if isinstance(tensors, dict):
        tensors.pop(old, None)
    return new


def edit_blob(draw: st.DrawFn, draft: Draft) -> None:
    """Bytes of a tensor; the index more often than the rest."""
    index = [name for name in draft.blobs if name.endswith((".nm_index", ".meta"))]
    names = index if index and draw(st.booleans()) else sorted(draft.blobs)
    if names:
        name = draw(st.sampled_from(names))
        draft.blobs[name] = edit_bytes(draw, draft.blobs[name], keep_size=draw(st.integers(0, 3)) > 0)


def edit_header_text(draw: st.DrawFn, draft: Draft) -> None:
    """Bytes of the header as it is spelled; its padding follows or not."""
    pad, at = draw(st.booleans()), draw(st.integers(0, 1 << 16))
    new, gone = (
        draw(st.binary(max_size=3) | st.sampled_from([b" ", b"0", b"}", b",", b'"', b"e1"])),
        draw(st.integers(0, 3)),
    )

    def spell(header: dict[str, Any]) -> bytes:
        text = header_text(header)
        changed = text[: at % len(text)] + new + text[at % len(text) + gone :]
        return padded(changed) if pad else changed

    draft.spell_header = spell


def edit_manifest_text(draw: st.DrawFn, draft: Draft) -> None:
    """Characters of the manifest as it is spelled."""
    spelled, at = draft.spell_manifest, draw(st.integers(0, 1 << 16))
    new, gone = (
        draw(st.text(max_size=2) | st.sampled_from([" ", "0", "}", ",", '"', "e1", "\\u0041"])),
        draw(st.integers(0, 2)),
    )

    def spell(manifest: Any) -> str:
        text = spelled(manifest)
        return text[: at % (len(text) + 1)] + new + text[at % (len(text) + 1) + gone :]

    draft.spell_manifest = spell


EDITS = [
    edit_by_name, edit_by_name, edit_manifest, edit_manifest, edit_description, edit_description, edit_entry,
    edit_blob, edit_blob, edit_header_text, edit_manifest_text,
]  # fmt: skip


def edit_bytes(draw: st.DrawFn, content: bytes, keep_size: bool = False) -> bytes:
    """Flip, overwrite, insert, remove, repeat or cut."""
    if not content:
        return content if keep_size else draw(st.binary(max_size=4))
    at, action = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 1 if keep_size else 5))
    if action == 0:
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if action == 1:
        new = draw(st.binary(max_size=4) | st.sampled_from([bytes(8), b"\xff" * 4]))[: len(content) - at]
        return content[:at] + new + content[at + len(new) :]
    if action == 2:
        return content[:at] + draw(st.binary(max_size=8)) + content[at:]
    if action == 3:
        return content[:at] + content[at + draw(st.integers(1, 16)) :]
    if action == 4:
        return content + content[at:]
    return content[:at]


# Properties.


@dataclass
class Target:
    """Looks at files, one after the other, and keeps what it finds."""

    folder: Path
    form: str = "checkpoint"
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """What tells a fault apart -> the shortest file that shows it, and the whole message."""

    def examine(self, content: bytes) -> None:
        """Check every property of one file.

        Raises:
            FaultError: if one does not hold.
        """
        begin = time.process_time()
        try:
            self.outcomes[CHECKS[self.form](self.folder / "input", content)] += 1
            if (seconds := time.process_time() - begin) > SLOW:
                raise FaultError("slow", f"{seconds:.1f} s")
        except FaultError as fault:
            key = str(fault.args[0])
            if key not in self.faults or len(content) < len(self.faults[key][0]):
                self.faults[key] = content, "\n".join(str(argument) for argument in fault.args)
            raise

    @property
    def executions(self) -> int:
        """Files looked at without a fault."""
        return sum(self.outcomes.values())


def check(path: Path, content: bytes) -> str:
    """What becomes of a file: the rule that it breaks, or "accepted".

    Raises:
        FaultError: if a property does not hold.
    """
    path.write_bytes(content)
    rule, checkpoint, report = broken_rule(content), try_read(path, read), try_verify(path)
    try_verify(path, "2:4")
    said = "a good file" if not rule else f"a file that breaks {rule!r}"
    if (checkpoint is None) != bool(rule):
        raise FaultError(f"reader {'refuses' if checkpoint is None else 'accepts'} {said}")
    # A count that cannot be is told like one that is wrong, which is no matter of the format.
    sound = report is not None and (report.ok if rule == "unstructured" else is_sound(report))
    if sound == bool(rule):
        raise FaultError(f"verifier {'accepts' if sound else 'refuses'} {said}", report and report.findings)
    if checkpoint is not None:
        check_canonical(content, checkpoint)
        if read_manifest(path) != checkpoint.manifest:
            raise FaultError("read_manifest and read disagree")
    return rule or "accepted"


def check_semi_structured(path: Path, content: bytes) -> str:
    """What becomes of an export: "accepted" or "refused", by reader and verifier alike.

    Raises:
        FaultError: if a property does not hold.
    """
    from lbc_cli.exports.semi_structured import load_tensors

    path.write_bytes(content)
    tensors, report = try_read(path, load_tensors), try_verify(path)
    try_verify(path, "2:4")
    # The reader gives the weights as they are; whether they hold the pattern they came from is for the verifier.
    sound = report is not None and is_sound(report, ABOUT_VALUES | {"pattern"})
    if sound != (tensors is not None):
        raise FaultError(f"verifier {'accepts' if sound else 'refuses'} what the reader does not", report)
    return "accepted" if sound else "refused"


CHECKS: dict[str, Callable[[Path, bytes], str]] = {"checkpoint": check, "semi-structured": check_semi_structured}


def is_sound(report: Report, about_values: frozenset[str] = ABOUT_VALUES) -> bool:
    return all(finding.rule in about_values for finding in report.findings if finding.level == "error")


def try_read(path: Path, reader: Callable[[Path], Content]) -> Content | None:
    try:
        return reader(path)
    except CheckpointError as error:
        one_line(error)
        return None
    except Exception as error:
        raise crash("reader", error) from error


def try_verify(path: Path, pattern: str | None = None) -> Report | None:
    try:
        report = verify(path, pattern=pattern)
        report.to_json()
    except UsageError as error:
        one_line(error)
        return None
    except Exception as error:
        raise crash("verifier", error) from error
    for finding in report.findings:
        if len(finding.message.splitlines()) != 1:
            raise FaultError("finding of several lines", finding.message)
    return report


def one_line(error: LbcError) -> None:
    if len(str(error).splitlines()) != 1:
        raise FaultError("message of several lines", str(error))


def crash(who: str, error: Exception) -> FaultError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.name}"
    return FaultError(f"{who} crashes: {place}", "".join(traceback.format_exception(error)))


def check_canonical(content: bytes, checkpoint: Checkpoint) -> None:
    """Encode what was read again: the manifest's text and the packed tensors' bytes must be those of the file."""
    draft = Draft.of(content)
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["lbc"]
    if checkpoint.manifest.to_json() != text:
        raise FaultError("the manifest is written otherwise than it was read", checkpoint.manifest.to_json())
    for name, entry in checkpoint.manifest.sparse.items():
        index = draft.entries[name + ".nm_index"]["shape"]
        mask = kept(draft.blobs[name + ".nm_index"], index[-1], draft.manifest["sparse"][name])
        packed = pack(checkpoint.tensors[name], Pattern(entry.n, entry.m, entry.vector), mask, name)
        for part, tensor in ((".nm_values", packed.values), (".nm_index", packed.index)):
            if raw(tensor) != draft.blobs[name + part]:
                raise FaultError(f"{part} is written otherwise than it was read", name)
    for name, tensor in checkpoint.tensors.items():
        if name in draft.blobs and raw(tensor) != draft.blobs[name]:
            raise FaultError("a dense tensor is not what the file holds", name)


def raw(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


def kept(index: bytes, size: int, sparse: dict[str, Any]) -> Any:
    """The mask that an index stands for, bool [O, I, *K]."""
    n, m = (int(number) for number in sparse["pattern"].split(":"))
    out, _, *kernel = sparse["shape"]
    mask = torch.zeros(sparse["shape"], dtype=torch.bool)
    rows = itertools.product(range(out // sparse["vector"]), *(range(axis) for axis in kernel))
    for number, (o, *k) in enumerate(rows):
        codes, _ = decode_row(index[number * size : number * size + size], sparse)
        for c, code in enumerate(codes):
            vector = slice(o * sparse["vector"], (o + 1) * sparse["vector"])
            mask[(vector, c // n * m + code, *k)] = True
    return mask


# The loop.


def fuzz(seconds: float, first_seed: int = 0, form: str = "checkpoint", progress: bool = False) -> Target:
    """Look at files for some time.

    Args:
        seconds: stop after these, at the end of a round.
        first_seed: of the first round; each next one has the next number.
        form: which files, one of `CHECKS`.
        progress: print a line every minute.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder), form)
        begin, said, number = time.monotonic(), 0.0, first_seed
        while (passed := time.monotonic() - begin) < seconds:
            if progress and passed - said >= 60:
                said = passed
                print(line(target, passed, number), file=sys.stderr, flush=True)
            play(target, number)
            number += 1
    return target


def play(target: Target, number: int, shrink: bool = True) -> None:
    """One round of examples; faults are in the target afterwards."""

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        report_multiple_bugs=shrink,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(files(target.form))
    def examples(content: bytes) -> None:
        target.examine(content)

    try:
        examples()
    except FaultError:
        return
    except ExceptionGroup as several:
        if rest := several.split(FaultError)[1]:
            raise rest from None


def line(target: Target, seconds: float, number: int) -> str:
    speed = target.executions / max(seconds, 1e-9)
    accepted = target.outcomes["accepted"]
    return (
        f"{seconds:.0f} s, {target.executions} executions, {speed:.0f} a second, {accepted} accepted, "
        f"{len(target.outcomes) - 1} rules broken, {len(target.faults)} faults, seed {number}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz readers and verifier.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=sorted(CHECKS), default="checkpoint")
    parser.add_argument("--out", type=Path, default=Path("fuzz-faults"))
    options = parser.parse_args()
    begin = time.monotonic()
    target = fuzz(options.minutes * 60, options.seed, options.format, progress=True)
    print(line(target, time.monotonic() - begin, options.seed))
    print(", ".join(f"{rule} {count}" for rule, count in target.outcomes.most_common()))
    for key, (content, message) in target.faults.items():
        options.out.mkdir(parents=True, exist_ok=True)
        name = options.out / hashlib.sha256(key.encode()).hexdigest()[:12]
        name.with_suffix(".safetensors").write_bytes(content)
        name.with_suffix(".txt").write_text(message)
        print(f"FAULT {key}: {name}.safetensors")
    return 1 if target.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
