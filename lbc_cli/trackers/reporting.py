"""Reporters: several that hear the same, and one that hands what it hears to a tool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from lbc_cli.engine import Reporter

Tell = Callable[[str, str], None]
"""Told a text and its level, "info" or "warning"."""

_NOT_MEASURED = frozenset({"epoch", "step", "steps", "update"})  # where a record is, not what it says


class Tool(Protocol):
    """What a tracker does with its tool."""

    def log(self, values: Mapping[str, float], update: int) -> None:
        """Scalars after so many updates of the run."""

    def densities(self, layers: Mapping[str, float], update: int) -> None:
        """Name of a sparse layer -> share kept in the end."""

    def close(self, *, well: bool) -> None:
        """The run is over, well or not."""


class Several:
    """Reporters that all hear the same.

    Args:
        reporters: in the order in which they hear it.
    """

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = tuple(reporters)

    def start(self, info: Mapping[str, Any]) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.start(info)

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.epoch_started(epoch, epochs, steps, facts)

    def step(self, record: Mapping[str, Any]) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.step(record)

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.epoch_ended(record)

    def message(self, text: str, level: str = "info") -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.message(text, level)

    def finish(self) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.finish()


class Tracker:
    """A reporter that hands scalars to a tool, and leaves out a tool that fails.

    Args:
        name: of the tool.
        tool: begun already.
        tell: told once, when the tool fails.
        done: updates that the run has behind it.
    """

    def __init__(self, name: str, tool: Tool, tell: Tell, done: int) -> None:
        self._name, self._tool, self._tell = name, tool, tell
        self._per_epoch, self._update = 0, done
        self._failed = False

    def start(self, info: Mapping[str, Any]) -> None:
        """Note how many updates an epoch has."""
        self._per_epoch = int(info["updates_per_epoch"])

    def epoch_started(self, epoch: int, epochs: int, steps: int, facts: Mapping[str, Any]) -> None:
        """Masks are set; the records say it."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Scalars of the updates since the last."""
        self._log("step", record, int(record["update"]))

    def epoch_ended(self, record: Mapping[str, Any]) -> None:
        """Scalars of the epoch."""
        done = int(record["epoch"]) + 1
        self._log("epoch", {**record, "number": done}, done * self._per_epoch)

    def message(self, text: str, level: str = "info") -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing yet: the run has still to save what it came to, which no tool may hold up."""

    def ended(self, layers: Mapping[str, float]) -> None:
        """The run came to its end.

        Args:
            layers: name of a sparse layer -> share kept.
        """
        if layers:
            self._guarded(lambda: self._tool.densities(layers, self._update))

    def close(self, *, well: bool) -> None:
        """Close the tool; the run ended well or not."""
        self._guarded(lambda: self._tool.close(well=well))

    def _log(self, kind: str, record: Mapping[str, Any], update: int) -> None:
        self._update = update
        values = {f"{kind}/{key}": value for key, value in _scalars(record) if key not in _NOT_MEASURED}
        self._guarded(lambda: self._tool.log(values, update))

    def _guarded(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # whatever a tool raises must not end a run
            self._failed = True
            self._tell(
                f"{self._name} failed and is left out from here on, the run goes on: {first_line(error)}", "warning"
            )


def first_line(error: BaseException) -> str:
    """What an error says, as far as one line goes."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, nested ones under dotted names."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
