"""`lbc convert`: weights that hold N:M already, packed as they are."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbc_cli import weights
from lbc_cli.checkpoint.files import check_free
from lbc_cli.errors import UsageError
from lbc_cli.oneshot.outcome import Outcome
from lbc_cli.oneshot.starts import from_weights, read
from lbc_cli.oneshot.writing import Pruned, finish, row
from lbc_cli.weights.conversion import convert as find_masks


def convert(
    path: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    model: str | None = None,
    pattern: str | None = None,
    layers: Mapping[str, str] | None = None,
    key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Outcome:
    """Pack weights that hold N:M already, without changing any of them, and verify what was saved.

    Args:
        path: a weight file or folder.
        out: the checkpoint; must not be there yet.
        model: timm name; None: the one that the folder names.
        pattern: N:M or N:M/V of every layer that can take it; None: what the file claims, or `layers` alone.
        layers: globs with "N:M", "N:M/V" or "dense"; the last that matches wins.
        key: entry of a `torch.save` file that holds the weights.
        kwargs: further arguments of `timm.create_model`.

    Raises:
        OutputError: if `out` is there, or cannot be written.
        UsageError: if no model or pattern is known.
        CheckpointError: if the file is damaged, or refused because reading it could run code.
        VerificationError: if a layer does not hold its pattern.
    """
    target = check_free(out)
    began = time.perf_counter()
    found = read(Path(path), key)
    if found.arch is None and model is None:
        raise UsageError(f"{path} does not say which model it is: name it with --model, such as resnet50")
    start = from_weights(found, model, kwargs, began)
    began = time.perf_counter()
    converted = find_masks(start.model, found, pattern=pattern, layers=layers)
    rows = tuple(row(entry, converted.masks[entry.name], None) for entry in converted.selection.targets)
    method = weights.LAYOUTS[found.kind].method if found.kind in weights.LAYOUTS else "unknown"
    seconds = {"model and weights": start.seconds, "patterns": time.perf_counter() - began}
    title = f"{start.arch} from {Path(path).name} ({found.kind})"
    pruned = Pruned(method, converted.selection, converted.masks, rows)
    return finish(start, title, pruned, target, seconds, (*converted.notes, *start.notes))
