"""The formats. A new one is a module with an `EXPORTER`, and a line here."""

from __future__ import annotations

from lbc_cli.errors import UsageError, did_you_mean
from lbc_cli.exports import dense, onnx, semi_structured, timm
from lbc_cli.exports.base import Exporter

FORMATS: dict[str, Exporter] = {
    exporter.name: exporter for exporter in (timm.EXPORTER, dense.EXPORTER, semi_structured.EXPORTER, onnx.EXPORTER)
}


def find_format(name: str) -> Exporter:
    """The exporter of a format.

    Raises:
        UsageError: for an unknown name, with the nearest one.
    """
    if name not in FORMATS:
        raise UsageError(
            f"no format {name!r}: there are {', '.join(FORMATS)}.{did_you_mean(name, FORMATS)} "
            "`lbc export --list` says what runs each"
        )
    return FORMATS[name]
