"""`lbc verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbc_cli.cli.common import make_console, reported
from lbc_cli.cli.options import AsJson, PatternText


@reported
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or any safetensors file.")],
    *,
    pattern: PatternText = None,
    as_json: AsJson = False,
) -> None:
    """Check that a file holds its N:M pattern and is undamaged. Exit code 3 if not."""
    from lbc_cli.report import print_verify
    from lbc_cli.report.describe import verify_view
    from lbc_cli.verifier import verify as run

    console = make_console()
    report = run(path, pattern=pattern)
    console.json(report.as_dict()) if as_json else print_verify(console, verify_view(report))
    if not report.ok:
        raise typer.Exit(3)
