"""The run folder: what a run leaves behind, under which names, and how it survives being stopped.

    recipe.toml          the resolved recipe, with where each value came from
    environment.json     versions, hardware, command line, commit
    metrics.jsonl        every record, one JSON object a line
    metrics.csv          the epoch records, for spreadsheets
    metrics-steps.csv    the step records
    ended.json           how a run ended that did not come to its end
    report.html          all of it on one page
    curves.png           loss, accuracy, density, learning rate
    summary.json         how it ended
    model.safetensors    the checkpoint
    state.safetensors    what a resumed run needs, and state-previous.safetensors, the one before it

A folder is never overwritten. All files but the metrics are replaced at once, so that a reader sees the old or the new.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lbc_cli.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from lbc_cli.patterns import Pattern

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """A value as JSON knows it: dataclasses to objects, paths to strings, NaN and infinities to None.

    Raises:
        TypeError: for a value that has no such form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | os.PathLike):
        # A path that is not UTF-8 must not keep a run from being written down.
        return os.fspath(value).encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with sorted keys, so that the same content gives the same bytes; floats in full precision."""
    return json.dumps(plain(value), indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def _writing(path: Path, remedy: str = "choose another place with --out") -> Iterator[None]:
    """Turn what the operating system says about a write into one sentence with the place and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}; {remedy}") from error


def default_name(model: str, method: str, pattern: Pattern | str | None, root: Path = Path("runs")) -> Path:
    """Where a run goes unless the user says so: runs/MODEL-METHOD-N_M.

    Args:
        model: timm name; characters that a path cannot hold safely become underscores.
        method: name in METHODS.
        pattern: N:M or N:M/V, written 2_4 or 2_4v16, or what else tells how sparse it is; None leaves it out.
        root: parent folder.
    """
    parts = [re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "unnamed" for text in (model, method)]
    if pattern is not None:
        parts.append(str(pattern).replace(":", "_").replace("/", "v"))
    return root / "-".join(parts)


def _numbered(path: Path) -> Iterator[Path]:
    """The path, then path-1, path-2, ..."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.name}-{number}")


def unique(path: Path) -> Path:
    """The path itself where nothing is there yet, else the first of path-1, path-2, ... that is free."""
    return next(candidate for candidate in _numbered(path) if not os.path.lexists(candidate))


def check_free(path: Path) -> None:
    """Check, without writing, that a run folder can be made here.

    Raises:
        OutputError: if something is there already, or no folder above it can be written.
    """
    if os.path.lexists(path) and not _is_empty_folder(path):
        what = "folder" if path.is_dir() else "file"
        resume = f", or continue its run with --resume {path}" if RunFolder(path).recipe.exists() else ""
        raise OutputError(f"the {what} {path} exists and is never overwritten; choose another with --out{resume}")
    above = next((folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder)), Path("/"))
    if not above.is_dir():
        raise OutputError(f"cannot write {path}: {above} is not a folder; choose another place with --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission in {above}; choose another place with --out")


def _is_empty_folder(path: Path) -> bool:
    try:
        return path.is_dir() and not any(path.iterdir())
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that holds one run.

    Args:
        path: the folder, which exists.
    """

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Make a new folder, parents included; an empty one that exists is taken as it is.

        Raises:
            OutputError: if the folder holds anything, or cannot be written.
        """
        folder = Path(path)
        check_free(folder)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    @classmethod
    def create_unique(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Make a new folder at the path, or at the first of path-1, path-2, ... that is free.

        Runs started at the same moment never share one.

        Raises:
            OutputError: if none can be written.
        """
        first = Path(path)
        with _writing(first):
            first.parent.mkdir(parents=True, exist_ok=True)
        for folder in _numbered(first):
            with _writing(folder), contextlib.suppress(FileExistsError):
                folder.mkdir()
                return cls(folder)
        raise AssertionError("the numbers do not end")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open the folder of an earlier run.

        Raises:
            OutputError: if it is not there, or is not a run folder.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise OutputError(f"no run folder at {run.path}: --resume wants the folder that a run was written to")
        if not run.recipe.is_file():
            raise OutputError(f"{run.path} is not a run folder: it has no {run.recipe.name}")
        return run

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def metrics_jsonl(self) -> Path:
        """Every record."""
        return self.path / "metrics.jsonl"

    @property
    def metrics_csv(self) -> Path:
        """The epoch records."""
        return self.path / "metrics.csv"

    @property
    def metrics_steps(self) -> Path:
        """The step records."""
        return self.path / "metrics-steps.csv"

    @property
    def ended(self) -> Path:
        """How the run ended, if it did not come to its end."""
        return self.path / "ended.json"

    @property
    def report(self) -> Path:
        """The run on one page."""
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        """The plots."""
        return self.path / "curves.png"

    @property
    def summary(self) -> Path:
        """How the run ended."""
        return self.path / "summary.json"

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.path / "model.safetensors"

    @property
    def ema(self) -> Path:
        """The checkpoint of the averaged weights, where there is one."""
        return self.path / "model-ema.safetensors"

    @property
    def state(self) -> Path:
        """What a resumed run needs."""
        return self.path / "state.safetensors"

    @property
    def state_previous(self) -> Path:
        """The state before it."""
        return self.path / "state-previous.safetensors"

    @property
    def state_next(self) -> Path:
        """A new state, until it takes the place of the last."""
        return self.path / "state-next.safetensors"

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe (TOML).

        Raises:
            OutputError: if it cannot be written.
        """
        _replace(self.recipe, text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write what `describe_environment` found.

        Raises:
            OutputError: if it cannot be written.
        """
        _replace(self.environment, to_json(environment, indent=2) + "\n")

    def write_summary(self, summary: Any) -> None:
        """Write how the run ended: a mapping or dataclass.

        Raises:
            OutputError: if it cannot be written.
        """
        _replace(self.summary, to_json(summary, indent=2) + "\n")

    def write_ended(self, ending: Mapping[str, Any]) -> None:
        """Write how the run ended that did not come to its end.

        Raises:
            OutputError: if it cannot be written.
        """
        _replace(self.ended, to_json(ending, indent=2) + "\n")

    def metrics(self, resume: tuple[int, int] | None = None) -> MetricsLog:
        """The metrics of this run; see `MetricsLog`."""
        return MetricsLog(self.metrics_jsonl, {"epoch": self.metrics_csv, "step": self.metrics_steps}, resume)


class MetricsLog:
    """Records of a run, on disk as soon as they are made.

    Every record has a kind and an epoch, those of steps the step as well. A resumed run's log holds what an
    uninterrupted run's would: the records of what is trained anew are dropped before the first new one.

    Args:
        jsonl: file of all records.
        tables: kind of record -> CSV file; nested values get dotted column names.
        resume: the epoch in progress or next, and how many of its updates are made, for a log that exists; None starts
            a new one.

    Raises:
        OutputError: if a new log would overwrite one, or nothing can be written.
        CheckpointError: if the log to be continued is damaged.
    """

    def __init__(self, jsonl: Path, tables: Mapping[str, Path], resume: tuple[int, int] | None = None) -> None:
        self._jsonl, self._tables = jsonl, dict(tables)
        self.records: list[Record] = []
        if resume is not None:
            self.records = [record for record in _read_records(jsonl) if _is_before(record, *resume)]
        elif jsonl.exists():
            raise OutputError(f"{jsonl} exists and is never overwritten; choose another folder with --out")
        self._columns = {kind: _columns(self._of(kind)) for kind in self._tables}
        _replace(jsonl, "".join(_line(record) for record in self.records))
        for kind in self._tables:
            self._write_table(kind)

    @property
    def epochs(self) -> list[Record]:
        """The epoch records."""
        return self._of("epoch")

    def _of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def append(self, kind: Literal["epoch", "step"], *, epoch: int, **values: Any) -> None:
        """Add a record to the files.

        Args:
            kind: of an epoch or of a step.
            epoch: counted from 0.
            values: numbers, strings, None, or mappings of them; NaN and infinities become null.

        Raises:
            OutputError: if it cannot be written.
        """
        record = plain({"kind": kind, "epoch": epoch, **values})
        self.records.append(record)
        _append(self._jsonl, _line(record), sync=kind == "epoch")
        if kind in self._tables:
            self._append_row(kind, record)

    def _append_row(self, kind: str, record: Record) -> None:
        """Add a row to the table of its kind, or write that anew if a column is new."""
        if set(_columns([record])) <= set(self._columns[kind]):
            _append(self._tables[kind], _rows(self._columns[kind], [record]), sync=kind == "epoch")
        else:
            self._columns[kind] = _columns(self._of(kind))
            self._write_table(kind)

    def _write_table(self, kind: str) -> None:
        columns = self._columns[kind]
        header = _rows(columns, [dict(zip(columns, columns, strict=True))]) if columns else ""
        _replace(self._tables[kind], header + _rows(columns, self._of(kind)))


def _is_before(record: Record, epoch: int, step: int) -> bool:
    """Whether a record is of what was trained before that many updates of an epoch."""
    return bool(record["epoch"] < epoch or (record["epoch"] == epoch and 0 < record.get("step", 0) <= step))


def read_epochs(path: Path) -> list[Record]:
    """The epoch records of a metrics.jsonl; none where there is no file.

    Raises:
        CheckpointError: if a line, other than a last one cut short, is not a record.
    """
    return [record for record in _read_records(path) if record["kind"] == "epoch"]


def _replace(path: Path, text: str) -> None:
    """Replace a whole file at once."""
    from lbc_cli.checkpoint.files import atomic_write_text

    atomic_write_text(path, text)


def _append(path: Path, text: str, *, sync: bool) -> None:
    """Add text to a file; `sync` waits for the disk, so that no saved state is ahead of it."""
    remedy = "make room there, then continue with --resume"
    with _writing(path, remedy), path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _read_records(path: Path) -> list[Record]:
    """The records of a log; a last line cut short by a crash is left out.

    Raises:
        CheckpointError: if any other line is not a record.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            records.append({"kind": record["kind"], "epoch": int(record["epoch"]), **record})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}:{number}: not a metrics record; repair or delete the line before resuming"
            ) from error
    return records


def _flat(record: Record, prefix: str = "") -> Record:
    """The record with nested keys joined by dots, without its kind."""
    flat: Record = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif prefix or key != "kind":
            flat[prefix + key] = value
    return flat


def _columns(records: Sequence[Record]) -> list[str]:
    """The columns of these records, in the order in which they first appear."""
    return list(dict.fromkeys(key for record in records for key in _flat(record)))


def _rows(columns: Sequence[str], records: Sequence[Record]) -> str:
    """CSV lines; a float in full precision, nothing where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerows(_flat(record) for record in records)
    return text.getvalue()
