"""`lbc export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson
from lbc_cli.errors import UsageError


@reported
def export(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A checkpoint of lbc.")] = None,
    *,
    format_name: Annotated[
        str | None, typer.Option("--format", metavar="F", help="Such as timm; --list shows all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="Where to; must be new. Beside FILE by default.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16: round the weights to it.")
    ] = None,
    list_formats: Annotated[bool, typer.Option("--list", help="Show the formats and what runs them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as what other programs load, and verify what was written."""
    console = make_console()
    if list_formats:
        if given := [name for name, value in (("FILE", file), ("--format", format_name), ("--out", out)) if value]:
            raise UsageError(f"--list exports nothing: drop {', '.join(given)}, or drop --list")
        _list(as_json)
        return
    if file is None or format_name is None:
        missing = "a checkpoint" if file is None else "a --format"
        raise UsageError(f"{missing} is missing: lbc export FILE --format F; `lbc export --list` shows the formats")
    from lbc_cli.exports import FORMATS, ExportOptions
    from lbc_cli.exports import export as run
    from lbc_cli.report.exported import print_export

    result = run(file, format_name, out, options=ExportOptions(dtype=dtype))
    if as_json:
        console.json(result.as_dict())
    else:
        print_export(console, result, file.stat().st_size, FORMATS[result.format].runs_on)


def _list(as_json: bool) -> None:
    from lbc_cli.exports import FORMATS
    from lbc_cli.report.exported import print_formats

    console = make_console()
    if as_json:
        members = ("name", "description", "runs_on", "extra", "dtypes")
        console.json([{member: getattr(exporter, member) for member in members} for exporter in FORMATS.values()])
    else:
        print_formats(console, FORMATS.values())
