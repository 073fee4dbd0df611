"""Whether two artefacts hold the same weights, bit for bit or but for rounding, whatever their containers.

Every tensor is compared as a model would receive it, in its dense bytes, and hashed on the way. Where the float types
differ, the wider numbers are rounded to the narrower type as torch does it, to nearest even and from float64 through
float32, and must then be equal; a NaN equals a NaN there.

An ONNX graph holds what its operators need: buffers such as `num_batches_tracked` may be missing in it, constants of
its own may be more; the weights of convolution and linear layers must all be there.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.artefact import Artefact, contents
from lbc_cli.verifier.bits import FORMATS, Bits, narrowed, shown, unsigned
from lbc_cli.verifier.contents import Content
from lbc_cli.verifier.report import Finding, Report

_ELEMENTS = 1 << 18
# Widest first; the last two do not hold each other and are compared as float32.
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(slots=True)
class _Counts:
    tensors: int = 0
    equal: int = 0
    different: int = 0
    rounded: Counter[tuple[str, str]] = field(default_factory=Counter)
    digests: list[str] = field(default_factory=list)


def compare(artefact: Artefact, other: Artefact, report: Report) -> None:
    """Compare the weights of two artefacts.

    Args:
        artefact: open; the one that the report is about.
        other: open.
        report: findings and `against` are added.

    Raises:
        CheckpointError: if data end before they should.
    """
    ours = {content.name: content for content in contents(artefact)}
    theirs = {content.name: content for content in contents(other)}
    counts = _Counts()
    for name in sorted(ours.keys() & theirs.keys()):
        _compare_tensor(ours[name], theirs[name], str(other.path), counts, report)
    missing = _absent(ours, theirs, artefact, other, report)
    extra = _absent(theirs, ours, other, artefact, report)
    for (mine, its), number in counts.rounded.items():
        message = f"{number} tensors, {mine} here and {its} in {other.path}, are equal after rounding"
        report.add(Finding("rounded", "", message, number, "warning"))
    same = counts.equal == counts.tensors and not missing and not extra
    report.against = {
        "path": str(other.path),
        "kind": other.kind,
        "tensors": counts.tensors,
        "equal": counts.equal,
        "rounded": counts.rounded.total(),
        "different": counts.different,
        "missing": missing,
        "extra": extra,
        "digest": hashlib.sha256("".join(counts.digests).encode()).hexdigest() if same else None,
    }


def _absent(
    have: dict[str, Content], lack: dict[str, Content], holder: Artefact, lacking: Artefact, report: Report
) -> int:
    """Report what one artefact holds and the other does not; gives their number."""
    names = sorted(name for name in have if name not in lack and _needed(have[name], holder, lacking))
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        message = f"{lacking.path} lacks {', '.join(names[:3])}{more}, which {holder.path} holds"
        report.add(Finding("against", names[0], message, len(names)))
    return len(names)


def _needed(content: Content, holder: Artefact, lacking: Artefact) -> bool:
    """Whether an artefact that lacks a tensor lacks a weight."""
    if holder.kind == "onnx":
        return content.weight
    is_weight = content.weight or (len(content.shape) > 1 and content.name.endswith("weight"))
    return lacking.kind != "onnx" or is_weight


def _compare_tensor(mine: Content, its: Content, path: str, counts: _Counts, report: Report) -> None:
    counts.tensors += 1
    if mine.shape != its.shape or not _comparable(mine.dtype, its.dtype):
        message = f"{mine.name} is {mine.dtype} {list(mine.shape)}, in {path} {its.dtype} {list(its.shape)}"
        report.add(Finding("against", mine.name, message))
        counts.different += 1
        return
    digest, number, first = _differences(mine, its)
    if number:
        message = f"{mine.name} differs from {path} {first}; {number} of {math.prod(mine.shape)} elements differ"
        report.add(Finding("against", mine.name, message, number))
        counts.different += 1
    elif mine.dtype == its.dtype:
        counts.equal += 1
        counts.digests.append(f"{mine.name}\t{mine.dtype}\t{list(mine.shape)}\t{digest}\n")
    else:
        counts.rounded[mine.dtype, its.dtype] += 1


def _comparable(mine: str, its: str) -> bool:
    return mine == its or (mine in _FLOATS and its in _FLOATS)


def _differences(mine: Content, its: Content) -> tuple[str, int, str]:
    """SHA-256 of `mine`, how many elements differ, and the first of them in words."""
    sha, number, first, at = hashlib.sha256(), 0, "", 0
    for one, two in zip(_blocks(mine), _blocks(its), strict=True):
        sha.update(one)
        if mine.dtype != its.dtype or one != two:
            left, right = unsigned(one, mine.dtype), unsigned(two, its.dtype)
            wrong = _unequal(left, mine.dtype, right, its.dtype)
            number += int(np.count_nonzero(wrong))
            if number and not first:
                place = int(wrong.argmax())
                values = [shown(left[place, None], mine.dtype), shown(right[place, None], its.dtype)]
                first = f"at {_element(at + place, mine.shape)}, {values[0]} here and {values[1]} there"
        at += len(one) // FORMATS[mine.dtype].size
    return sha.hexdigest(), number, first


def _unequal(left: Bits, mine: str, right: Bits, its: str) -> NDArray[np.bool_]:
    """Which elements differ, after the wider were rounded."""
    if mine == its:
        return np.asarray(left != right)
    common = max(mine, its, key=_FLOATS.index) if {mine, its} != {"F16", "BF16"} else "F32"
    one, its_nan = narrowed(left, mine, common)
    two, my_nan = narrowed(right, its, common)
    return np.asarray((one != two) & ~(its_nan & my_nan))


def _blocks(content: Content) -> Iterator[bytes]:
    """The bytes of a tensor in blocks of as many elements each, whatever its container reads at once.

    Raises:
        CheckpointError: if there are fewer or more than its shape says.
    """
    size = FORMATS[content.dtype].size
    block, total = _ELEMENTS * size, 0
    held = b""
    for chunk in content.chunks():
        total += len(chunk)
        held = held + chunk if held else chunk
        whole = len(held) - len(held) % block
        for begin in range(0, whole, block):
            yield held[begin : begin + block]
        held = held[whole:]
    if total != math.prod(content.shape) * size:
        raise CheckpointError(f"tensor {content.name} has {total} bytes: not what {list(content.shape)} needs")
    yield held


def _element(index: int, shape: tuple[int, ...]) -> str:
    """An element as "(o=1, i=2, k=(0, 3))" in a weight, "[3]" elsewhere."""
    axes: Iterable[int] = (int(axis) for axis in np.unravel_index(index, shape)) if shape else ()
    if len(shape) < 2:
        return str(list(axes))
    o, i, *k = axes
    return f"(o={o}, i={i}, k={tuple(k)})"
