"""Guards before the first step: unreadable images, and classes that differ, are empty or shift.

`fast` reads each image's header and its end-of-file marker; an image without that marker is decoded, so that only what
training itself could not read is reported. `full` decodes every image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from PIL import Image

from lbc_cli.data.images import Samples, decode, reason
from lbc_cli.errors import DataError

END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
CHUNK = 256
SHOWN = 5


def why_unreadable(stream: BinaryIO, *, full: bool) -> str:
    """Why an image file cannot be read, or "" when it can.

    Args:
        stream: the open file; closed on return.
        full: decode it in any case, not only when its end looks odd.
    """
    with stream:
        try:
            size = stream.seek(0, os.SEEK_END)
            if size == 0:
                return "empty file"
            stream.seek(0)
            if full or not _is_whole(stream, size):
                stream.seek(0)
                decode(stream)
        except Exception as error:  # decoders raise nearly anything on damaged input
            return reason(error)
    return ""


def _is_whole(stream: BinaryIO, size: int) -> bool:
    """Whether the header can be read and the file ends with its format's end marker."""
    marker = END_MARKERS.get(Image.open(stream).format or "")
    if marker is None or size < len(marker):
        return False
    stream.seek(size - len(marker))
    return stream.read() == marker


def unwatched(count: int) -> None:
    """Nobody wants to know how many images were checked."""


def find_unreadable(
    samples: Samples, *, full: bool, progress: Callable[[int], None] = unwatched
) -> list[tuple[int, str]]:
    """Every image that cannot be read.

    Args:
        samples: the images.
        full: decode all; otherwise headers and ends, and nothing where images are not kept as files.
        progress: told how many images more were checked.

    Returns:
        (position, reason) pairs in order.
    """

    def inspect(index: int) -> str:
        try:
            stream = samples.encoded(index)
            if stream is not None:
                return why_unreadable(stream, full=full)
            if full:
                samples.image(index)
        except Exception as error:  # a file may also be missing, or closed to us
            return reason(error)
        return ""

    def inspect_chunk(start: int) -> list[tuple[int, str]]:
        chunk = range(start, min(start + CHUNK, len(samples)))
        return [(index, why) for index in chunk if (why := inspect(index))]

    threads = min(16, (os.cpu_count() or 1) + 2)
    found: list[tuple[int, str]] = []
    with ThreadPoolExecutor(threads) as pool:
        for start, bad in enumerate(pool.map(inspect_chunk, range(0, len(samples), CHUNK))):
            found += bad
            progress(min(CHUNK, len(samples) - start * CHUNK))
    return found


def shown(names: Iterable[str]) -> str:
    """The first few names, quoted, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in listed[:SHOWN]) + more


def unreadable_error(bad: Sequence[tuple[str, str]]) -> DataError:
    """The error that names unreadable images; its notes list all of them.

    Args:
        bad: (path, reason) of each.
    """
    first = "; ".join(f"{path} ({why})" for path, why in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    error = DataError(
        f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''}: {first}{more}. Replace or remove them, or set "
        "data.unreadable='skip' to leave them out"
    )
    error.add_note("\n".join(f"{path}: {why}" for path, why in bad))
    return error


def require_same_classes(train: Iterable[str], val: Iterable[str], where: str) -> None:
    """Refuse splits whose classes differ: their class ids would not mean the same.

    Args:
        train: class names of the training split.
        val: class names of the evaluation split.
        where: the source, for the message.

    Raises:
        DataError: naming the classes that only one split has.
    """
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if not only_train and not only_val:
        return
    sides = [
        f"only {side}: {shown(names)}" for side, names in (("training", only_train), ("evaluation", only_val)) if names
    ]
    raise DataError(
        f"the class folders of the splits of {where} differ ({'; '.join(sides)}); add the missing folders, remove the "
        "extra ones, or fix the class ids with data.class_map"
    )


def require_same_labels(labels: Iterable[int], num_classes: int, where: str) -> None:
    """Refuse class ids outside 0 .. num_classes - 1.

    Raises:
        DataError: naming the first such id.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            raise DataError(f"{where} has the class id {label}, outside 0..{num_classes - 1}; fix the labels")
