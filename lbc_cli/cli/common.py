"""What every command does alike: errors become a line and an exit code, output goes through one console."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import typer

from lbc_cli.cli.options import Debug
from lbc_cli.errors import LbcError, UsageError

if TYPE_CHECKING:
    from lbc_cli.report import Console


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors of a command into a line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            _refuse_ranks(command.__name__)
            command(*args, **kwargs)
        except LbcError as error:
            fail(error, error.exit_code, debug)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            fail(LbcError("interrupted"), 130, debug)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            fail(error, 1, debug)

    # Typer reads the signature: it must hold the options themselves, not their names, and --debug with them.
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    parameters = [*signature.parameters.values(), option]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _refuse_ranks(command: str) -> None:
    """Only training is shared by several processes; any other command would be carried out once by each.

    Raises:
        UsageError: in a process that torchrun or srun started with others.
    """
    if command == "train":
        return
    from lbc_cli.distributed import launch

    if launched := launch():
        raise UsageError(
            f"lbc {command} is for one process, and was started as one of {launched.size}: only lbc train runs under "
            "torchrun or srun"
        )


def fail(error: BaseException, code: int, debug: bool) -> None:
    """Print an error and leave with its code."""
    from lbc_cli.report import print_error

    print_error(error, debug)
    raise typer.Exit(code) from None


def make_console(quiet: bool = False, verbose: bool = False) -> Console:
    """The console of a command.

    Raises:
        UsageError: if it shall be quiet and verbose at once.
    """
    from lbc_cli.report import Console, Verbosity

    if quiet and verbose:
        raise UsageError("--quiet and --verbose contradict each other: give one of them")
    return Console(Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL)


def parse_layers(entries: Iterable[str] | None) -> dict[str, str]:
    """Read `--layers GLOB=N:M` options; the last of several for one glob counts, at its own place.

    Raises:
        UsageError: if an entry is not of that form.
    """
    layers: dict[str, str] = {}
    for entry in entries or ():
        glob, equals, pattern = entry.rpartition("=")
        if not (glob.strip() and equals and pattern.strip()):
            raise UsageError(f"--layers {entry!r}: write GLOB=N:M or GLOB=dense, such as 'layer4.*=1:4'")
        layers.pop(glob.strip(), None)
        layers[glob.strip()] = pattern.strip()
    return layers
