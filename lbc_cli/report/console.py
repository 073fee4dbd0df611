"""Where output goes: results on stdout, progress, logs and errors on stderr.

One `Console` is made by the command line and handed to whatever prints. Colours and bars are rich's business: none when
the stream is not a terminal, no colours under NO_COLOR. Off a terminal nothing but text is written.
"""

from __future__ import annotations

import io
import sys
import traceback
from enum import IntEnum
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.text import Text

from lbc_cli.errors import LbcError, RecipeError
from lbc_cli.report.formats import one_line
from lbc_cli.runs import to_json

PLAIN_WIDTH = 200  # columns of a table in a file or pipe: nobody's window, so nothing is cut that fits a long line


class Verbosity(IntEnum):
    """How much is said on stderr; results on stdout are never held back."""

    QUIET = -1
    NORMAL = 0
    VERBOSE = 1


class Console:
    """Two streams and how much is said on them.

    Args:
        verbosity: QUIET says only warnings and errors, VERBOSE says details as well.
        stdout: for results; the process's own by default.
        stderr: for everything else; the process's own by default.
        width: columns, for both streams; by default the terminal's.
    """

    def __init__(
        self,
        verbosity: int = Verbosity.NORMAL,
        *,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        width: int | None = None,
    ) -> None:
        self.verbosity = Verbosity(max(Verbosity.QUIET, min(Verbosity.VERBOSE, verbosity)))
        self.out = _rich_console(stdout or sys.stdout, width)
        self.err = _rich_console(stderr or sys.stderr, width)

    @property
    def quiet(self) -> bool:
        """Whether progress and logs are held back."""
        return self.verbosity <= Verbosity.QUIET

    @property
    def live(self) -> bool:
        """Whether stderr is a terminal on which bars can move."""
        return self.err.is_interactive and self.err.file.isatty()

    def result(self, *parts: RenderableType) -> None:
        """Print results (strings or tables) to stdout, each below the other."""
        for part in parts:
            self.out.print(part, soft_wrap=isinstance(part, str))

    def json(self, value: Any) -> None:
        """Print one object as JSON to stdout, without any markup."""
        self.out.file.write(to_json(value, indent=2) + "\n")
        self.out.file.flush()

    def info(self, text: str) -> None:
        """Say what is going on, unless quiet."""
        if not self.quiet:
            self._say(text)

    def detail(self, text: str) -> None:
        """Say what only the curious want to know, if verbose."""
        if self.verbosity >= Verbosity.VERBOSE:
            self._say(text, "dim")

    def warning(self, text: str) -> None:
        """Say what the user should know, quiet or not."""
        self._say(f"warning: {one_line(text)}", "yellow")

    def message(self, text: str, level: str = "info") -> None:
        """Say something at a level by name: "detail", "info" or "warning"."""
        {"detail": self.detail, "info": self.info, "warning": self.warning}[level](text)

    def _say(self, text: str, style: str = "") -> None:
        self.err.print(Text(text, style=style), soft_wrap=True)


def _rich_console(stream: TextIO, width: int | None) -> RichConsole:
    """A rich console that takes text literally: no markup, no emoji, no guessing at what to highlight."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a file name that cannot be encoded must not end a run
    console = RichConsole(file=stream, markup=False, emoji=False, highlight=False, width=width)
    if width is None and not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def print_json(value: Any, *, console: Console | None = None) -> None:
    """Print one object as JSON to stdout: keys sorted, NaN as null, no markup.

    Args:
        value: dataclasses, mappings, sequences, numbers, strings, paths.
        console: where to; the process's own streams by default.
    """
    (console or Console()).json(value)


def format_error(error: BaseException) -> tuple[str, ...]:
    """The lines that tell a user about an error: one, or one for each problem of a recipe."""
    if isinstance(error, RecipeError):
        return tuple(f"error: {one_line(problem)}" for problem in error.problems)
    text = one_line(str(error))
    if isinstance(error, LbcError):
        return (f"error: {text}",)
    return (f"error: {type(error).__name__}: {text} (unexpected: a bug in lbc; --debug shows where)",)


def print_error(error: BaseException, debug: bool = False, *, console: Console | None = None) -> None:
    """Print an error to stderr: "error: ...", red on a terminal.

    Args:
        error: what was raised.
        debug: print the traceback above it.
        console: where to; the process's own streams by default.
    """
    err = (console or Console()).err
    if debug:
        err.print(Text("".join(traceback.format_exception(error)).rstrip()), soft_wrap=True)
    for line in format_error(error):
        err.print(Text(line, style="red"), soft_wrap=True)
