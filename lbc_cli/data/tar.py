"""Images inside an uncompressed tar, read in place.

Members are found once; each read opens the file anew, so that loader processes and threads share no file position
(timm keeps one open handle, and forked loaders then read each other's bytes). Nothing is ever unpacked: names in the
archive are only labels. A tar inside the tar counts as a folder of its name, as in ImageNet's own archives.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lbc_cli.data.images import decode
from lbc_cli.errors import DataError

BLOCK = tarfile.BLOCKSIZE
Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """An image file in the archive."""

    parts: Parts
    """Path components; a nested tar is a folder without its suffix."""
    offset: int
    """First byte in the outermost file."""
    size: int


@dataclass(frozen=True)
class Contents:
    """What an archive holds."""

    images: list[Member] = field(default_factory=list)
    folders: set[Parts] = field(default_factory=set)


def scan_tar(path: Path, extensions: Sequence[str]) -> Contents:
    """Find the images and folders of a tar.

    Args:
        path: an uncompressed tar.
        extensions: lower-case suffixes of image files.

    Raises:
        DataError: not an uncompressed tar, truncated, damaged, or with members that cannot be read in place.
    """
    contents = Contents()
    try:
        with path.open("rb") as file:
            _scan(file, path, (), 0, path.stat().st_size, set(extensions), contents)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"cannot read the archive {path}: {error}; it must be a whole, uncompressed tar (unpack compressed ones)"
        ) from error
    return contents


def _scan(
    file: BinaryIO, path: Path, prefix: Parts, base: int, size: int, extensions: set[str], contents: Contents
) -> None:
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
            parts = prefix + tuple(p for p in PurePosixPath(member.name).parts if p not in (".", "/"))
            suffix = PurePosixPath(member.name).suffix.lower()
            if member.isdir():
                contents.folders.add(parts)
            elif suffix == ".tar" and member.isreg() and not prefix:
                inner = archive.extractfile(member)
                assert inner is not None
                folder = (*parts[:-1], PurePosixPath(parts[-1]).stem)
                contents.folders.add(folder)
                _scan(inner, path, folder, member.offset_data, member.size, extensions, contents)  # type: ignore[arg-type]
            elif suffix in extensions:
                contents.images.append(_image(member, parts, base, size, path))
    _require_end(file, end, path)


def _image(member: tarfile.TarInfo, parts: Parts, base: int, size: int, path: Path) -> Member:
    if not member.isreg() or member.issparse():
        raise DataError(f"{member.name} in {path} is a link or a sparse file, not an image; pack it as a plain file")
    if member.offset_data + member.size > size:
        raise DataError(f"{path} ends within {member.name}: the archive is truncated; copy or pack it again")
    return Member(parts, base + member.offset_data, member.size)


def _require_end(file: BinaryIO, end: int, path: Path) -> None:
    # tarfile takes a damaged header behind the first member for the end of the archive, and drops what follows.
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK or block.strip(b"\0"):
        raise DataError(f"{path} has no end mark behind its last member: it is truncated or damaged; pack it again")


def split_members(contents: Contents, split: str) -> tuple[Contents, Parts] | None:
    """The part of an archive below the folder `split`, at the top or below a single top folder.

    Returns:
        Its contents and the folder's path, or None when there is no such folder.
    """
    for prefix in _split_places(contents, split):
        depth = len(prefix)
        images = [member for member in contents.images if member.parts[:depth] == prefix]
        folders = {folder for folder in contents.folders if folder[:depth] == prefix}
        if images or folders:
            return Contents(images, folders), prefix
    return None


def _split_places(contents: Contents, split: str) -> Iterator[Parts]:
    yield (split,)
    tops = {member.parts[0] for member in contents.images}
    if len(tops) == 1:
        yield (tops.pop(), split)


def empty_folders(contents: Contents) -> list[str]:
    """Folders without a sub-folder or an image, by path."""
    inhabited = {folder[:-1] for folder in contents.folders} | {member.parts[:-1] for member in contents.images}
    for member in contents.images:
        inhabited.update(member.parts[:depth] for depth in range(len(member.parts)))
    return sorted("/".join(folder) for folder in contents.folders - inhabited)


class TarSamples:
    """Images of a tar with their class ids.

    Args:
        path: the archive.
        members: its images.
        labels: their class ids.
    """

    def __init__(self, path: Path, members: Sequence[Member], labels: Sequence[int]) -> None:
        self.path = path
        self.members = list(members)
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """Archive and path within it."""
        return f"{self.path}:{'/'.join(self.members[index].parts)}"

    def label(self, index: int) -> int:
        """The class id."""
        return int(self.labels[index])

    def encoded(self, index: int) -> BinaryIO:
        """The file's bytes."""
        member = self.members[index]
        with self.path.open("rb") as file:
            file.seek(member.offset)
            return BytesIO(file.read(member.size))

    def image(self, index: int) -> Image.Image:
        """The decoded image."""
        return decode(self.encoded(index))
