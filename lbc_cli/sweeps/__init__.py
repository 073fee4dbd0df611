"""`lbc sweep`: a table of runs in one folder, and what came of it.

grid      a recipe with a [sweep] table -> the runs
folder    where they go; which of them are done, and which can go on
workers   a process for each run, several at a time
tables    mean, deviation and number over the seeds; CSV, Markdown, JSON
"""

from lbc_cli.sweeps.folder import RunState, SweepFolder
from lbc_cli.sweeps.grid import Run, Sweep, check_files, read_sweep
from lbc_cli.sweeps.tables import Cell, Statistic, SweepSummary, summarise
from lbc_cli.sweeps.workers import Ended, Task, carry_out

__all__ = [
    "Cell",
    "Ended",
    "Run",
    "RunState",
    "Statistic",
    "Sweep",
    "SweepFolder",
    "SweepSummary",
    "Task",
    "carry_out",
    "check_files",
    "read_sweep",
    "summarise",
]
