"""The tree of errors that `lbc` raises on purpose, and their exit codes.

    LbcError                      1   something failed
    ├── UsageError                2   the user asked for something that cannot be
    │   ├── PatternError              an N:M pattern or vector length that makes no sense
    │   ├── RecipeError               a recipe with problems, all of them listed
    │   ├── ModelError                an unknown model, weights that do not fit
    │   ├── TargetError               layers that cannot take the pattern
    │   ├── MethodError               a method, optimizer or option that do not go together
    │   ├── DataError                 data that is missing, damaged or inconsistent
    │   └── OutputError               a place that cannot be written, or must not be
    ├── DivergenceError           1   a loss, gradient or score that is not finite
    ├── DistributedError          1   processes of one run that were lost, or disagree
    ├── CheckpointError           3   a file that is damaged or not canonical
    ├── VerificationError         3   weights that break their own pattern
    └── Interrupted             130   stopped by a signal, state saved

Every message says what went wrong, where, the value met, the rule and the remedy. The command line prints it
as one line and exits with the class's code; anything that is not an `LbcError` is a bug in `lbc`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LbcError(Exception):
    """Root of every error that `lbc` raises on purpose."""

    exit_code: int = 1


class UsageError(LbcError, ValueError):
    """The request itself cannot be carried out; nothing was written."""

    exit_code = 2


class PatternError(UsageError):
    """An N:M pattern, vector length or mask that breaks the rules of the algebra."""


class RecipeError(UsageError):
    """A recipe with one or more problems.

    Args:
        problems: every problem found, each a full sentence with its place.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("; ".join(self.problems))


class ModelError(UsageError):
    """A model that does not exist, or weights that do not fit it."""


class TargetError(UsageError):
    """Layers that cannot take the pattern asked for, or a glob that matches none."""


class MethodError(UsageError):
    """A method, optimizer, schedule or option that do not go together."""


class DataError(UsageError):
    """Data that is missing, damaged, or inconsistent between its splits."""


class OutputError(UsageError):
    """An output place that cannot be written, or exists and must not be overwritten."""


class DivergenceError(LbcError):
    """A loss, gradient or score that is not finite; the weights were not updated with it."""


class DistributedError(LbcError):
    """A process of a distributed run that cannot be reached any more, or whose masks are not those of the others."""


class CheckpointError(LbcError):
    """A file that is damaged, or not the canonical encoding of its content.

    Args:
        message: may quote the file; it becomes one printable line of bounded length.
    """

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class VerificationError(LbcError):
    """Weights that do not hold the pattern that is claimed for them."""

    exit_code = 3


class Interrupted(LbcError):
    """Stopped by a signal after the state was saved."""

    exit_code = 130


def one_line(text: str, *, most: int = 2000) -> str:
    """A text that may come from a hostile file, fit for a terminal: unprintable characters escaped, cut to a length."""
    cut = text if len(text) <= most else f"{text[:most]} [...]"
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in cut)


def did_you_mean(name: str, choices: Iterable[str], *, most: int = 3) -> str:
    """A sentence that proposes the choices nearest to `name`, or nothing.

    Args:
        name: what the user wrote.
        choices: what would have been valid.
        most: propose at most this many.

    Returns:
        " Did you mean 'a' or 'b'?" with a leading space, or "" when nothing is near.
    """
    near = difflib.get_close_matches(name, list(choices), n=most, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
