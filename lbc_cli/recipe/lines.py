"""Keys of TOML: how they are written, and on which line of a text each of them stands.

`tomllib` says what a file holds but not where. A message about a wrong value needs the line, so the text is scanned a
second time, for keys alone. The scanner relies on `tomllib` having accepted the text before.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence

KeyPath = tuple[str, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_SCALAR = re.compile(r"[^,\]}#\n]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' + r"|'''.*?'{3,5}" + r'|"(?:\\.|[^"\\\n])*"' + r"|'[^'\n]*'", re.DOTALL
)
_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def quoted(text: str) -> str:
    """A string as TOML writes it on one line, quotes included."""
    return '"' + "".join(_escaped(char) for char in text) + '"'


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    return f"\\u{ord(char):04x}" if ord(char) < 0x20 or ord(char) == 0x7F else char


def dotted(path: Sequence[str | int]) -> str:
    """A key as TOML writes it, parts quoted where they must be: `sparsity.layers."layer4.*"`."""
    return ".".join(part if _BARE.fullmatch(part) else quoted(part) for part in map(str, path))


def parse_key(text: str, at: int = 0) -> tuple[KeyPath, int]:
    """Read a key, dotted or not, quoted or not.

    Args:
        text: what holds the key.
        at: where the key begins; spaces before it are skipped.

    Returns:
        The parts of the key, and the place behind it and the spaces that follow.

    Raises:
        ValueError: if there is no key at that place.
    """
    parts = []
    while True:
        at = _past(_SPACE, text, at)
        match = _BARE.match(text, at) or _STRING.match(text, at)
        if match is None:
            raise ValueError(f"no key in {text[at : at + 40]!r}")
        parts.append(_unquoted(match.group()))
        at = _past(_SPACE, text, match.end())
        if not text.startswith(".", at):
            return tuple(parts), at
        at += 1


def key_lines(text: str) -> dict[KeyPath, int]:
    """Where every key and table of a TOML text stands first.

    Args:
        text: valid TOML.

    Returns:
        Line, counted from 1, of each key; keys within inline tables included, entries of arrays without their index.
    """
    return _Scanner(text).scan()


def _unquoted(part: str) -> str:
    if part[0] not in "\"'":
        return part
    text: str = tomllib.loads(f"key = {part}")["key"]
    return text


def _past(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


class _Scanner:
    """A walk over a valid TOML text that notes where its keys are."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.skip(_BLANK) < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.pair(table)
        return self.lines

    def header(self) -> KeyPath:
        start = self.at
        brackets = 2 if self.text.startswith("[[", start) else 1
        table, self.at = parse_key(self.text, start + brackets)
        self.note(table, 1, start)
        self.at += brackets
        return table

    def pair(self, table: KeyPath) -> None:
        start = self.at
        key, self.at = parse_key(self.text, start)
        self.note((*table, *key), len(table) + 1, start)
        self.at += 1  # the equals sign
        self.value((*table, *key))

    def value(self, path: KeyPath) -> None:
        self.skip(_SPACE)
        opening = self.text[self.at]
        if opening in "[{":
            self.at += 1
            self.entries(path, "]" if opening == "[" else "}")
        else:
            self.at = _past(_STRING if opening in "\"'" else _SCALAR, self.text, self.at)

    def entries(self, path: KeyPath, closing: str) -> None:
        while self.text[self.skip(_BLANK)] != closing:
            if self.text[self.at] == ",":
                self.at += 1
            elif closing == "]":
                self.value(path)
            else:
                self.pair(path)
        self.at += 1

    def note(self, path: KeyPath, shortest: int, at: int) -> None:
        """Note the line of a key, and of the tables that its dots open."""
        line = self.text.count("\n", 0, at) + 1
        for length in range(shortest, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def skip(self, pattern: re.Pattern[str]) -> int:
        self.at = _past(pattern, self.text, self.at)
        return self.at
