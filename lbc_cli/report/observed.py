"""What a run's page says beside the tables of a summary: settings, figures of the epochs, environment, as text."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lbc_cli.errors import OutputError
from lbc_cli.recipe.emit import toml_value
from lbc_cli.report.formats import format_bytes, format_count, format_percent, format_seconds
from lbc_cli.report.page import Setting
from lbc_cli.report.tables import format_result, result_label

if TYPE_CHECKING:
    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job, Outcome

Record = Mapping[str, Any]

_BYTES = ("memory", "gpu_memory")
_APART = ("argv", "resumed", "git", "lbc_git", "lbc", "variables")  # shown in another form


def settings(job: Job) -> list[Setting]:
    """Every key of the recipe that is not at its default, in the recipe's order."""
    from lbc_cli.recipe import resolve
    from lbc_cli.recipe.layers import leaves
    from lbc_cli.recipe.lines import dotted

    recipe = job.resolved.recipe
    # The defaults are those of the method: options, and a pattern only where it has one.
    defaults = resolve(flags={"method.name": recipe.method["name"]}).recipe
    usual = {dotted(path): value for path, value in leaves(defaults.model_dump())}
    usual["method.name"] = type(recipe)().method["name"]
    values = {dotted(path): value for path, value in leaves(recipe.model_dump(exclude={"description"}))}
    return [
        Setting(
            key=key,
            value=_value(value),
            default=_value(usual.get(key)),
            origin=job.resolved.provenance.get(key, ""),
        )
        for key, value in values.items()
        if key not in usual or usual[key] != value
    ]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return "not set" if value is None else toml_value(value)


def best(job: Job, epochs: Sequence[Record]) -> tuple[str, str] | None:
    """The best epoch among those with final masks, as ("best top-1, epoch 12", "98.59 %"); None where there is none."""
    name = job.task.primary
    known = [record for record in epochs if record.get(name) is not None and record.get("phase") == "final"]
    if not known:
        return None
    found = (max if job.task.larger_is_better else min)(known, key=lambda record: record[name])
    return f"best {result_label(name)}, epoch {int(found['epoch']) + 1}", format_result(name, found[name])


def measured(epochs: Sequence[Record]) -> dict[str, str]:
    """What was measured over the epochs, those before a resumption included."""

    def values(key: str) -> list[float]:
        return [float(record[key]) for record in epochs if record.get(key) is not None]

    found: dict[str, str] = {}
    if seconds := values("seconds"):
        found["training and evaluation"] = format_seconds(sum(seconds))
    if speeds := values("images_per_second"):
        found["images/s in training, median over epochs"] = format_count(statistics.median(speeds))
    if waits := values("data_wait"):
        found["share of it waiting for data"] = format_percent(statistics.median(waits))
    if peaks := values("memory"):
        found["memory at its peak"] = format_bytes(max(peaks))
    return found


def checked(outcome: Outcome | None, folder: RunFolder) -> dict[str, str]:
    """What the verifier looked at; empty before there was anything."""
    if outcome is None:
        return {}
    facts = {
        "file": str(folder.model),
        "groups checked": str(sum(layer.groups for layer in outcome.report.layers)),
        "SHA-256 of manifest": outcome.report.digest or "",
    }
    if outcome.ema_report is not None:
        facts["averaged weights"] = f"{folder.ema}: {'ok' if outcome.ema_report.ok else 'violations'}"
    return facts


def read_recipe(folder: RunFolder) -> str:
    """The resolved recipe of a run folder; "" before there is one.

    Raises:
        OutputError: if it cannot be read.
    """
    try:
        return folder.recipe.read_text(encoding="utf-8") if folder.recipe.is_file() else ""
    except OSError as error:
        raise OutputError(f"cannot read {folder.recipe}: {error.strerror or error}; check the folder") from error


def read_environment(folder: RunFolder) -> dict[str, Any]:
    """The environment of a run folder; empty before there is one.

    Raises:
        OutputError: if it cannot be read.
    """
    try:
        found = json.loads(folder.environment.read_text("utf-8")) if folder.environment.is_file() else {}
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {folder.environment}: {error}; check the folder") from error
    return found if isinstance(found, dict) else {}


def environment_facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """Label -> value, commits in words, memory in units."""
    facts: dict[str, str] = {}
    if environment:
        facts["commit"] = _commit(environment.get("git")) or "no repository"
        own = _commit(environment.get("lbc_git"))
        facts["lbc"] = str(environment.get("lbc", "")) + (f", {own}" if own else "")
    for key, value in environment.items():
        if key in _APART or value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        shown = [format_bytes(item) if key in _BYTES and isinstance(item, int) else str(item) for item in values]
        facts[key.replace("_", " ")] = ", ".join(shown)
    variables = environment.get("variables")
    if isinstance(variables, dict) and variables:
        facts["variables"] = " ".join(f"{name}={value}" for name, value in variables.items())
    return facts


def _commit(found: Any) -> str:
    """A commit in words; an older version wrote it as one string."""
    if isinstance(found, dict):
        return f"{str(found.get('commit'))[:12]}{', with changes' if found.get('dirty') else ''}"
    return str(found) if found else ""


def command_lines(environment: Mapping[str, Any]) -> str:
    """The command line, and below it those that the run was resumed with."""
    later = environment.get("resumed")
    parts = [environment, *(later if isinstance(later, list) else [])]
    lines = [part.get("argv") for part in parts if isinstance(part, Mapping)]
    return "\n".join(shlex.join(map(str, argv)) for argv in lines if isinstance(argv, list))
