"""TensorBoard and Weights & Biases: extras that hear what the run's reporter hears.

    [track]
    tools = ["tensorboard", "wandb"]

reporting         a reporter that hands scalars to a tool, and leaves out one that fails
tensorboard       event files in the run folder
weights_biases    a run of W&B, online or offline

They are asked for in the recipe. A package that is missing, or a tool that cannot begin, stops a new run before
anything is trained. A tool that fails later (a network, a full disk) is left out with one warning: the run goes on, and
its own files hold everything. A resumed run goes on in the same TensorBoard folder and under the same W&B id, no point
twice. A point's place is the number of updates that the run had behind it.
"""

from lbc_cli.trackers.reporting import Several, Tool, Tracker
from lbc_cli.trackers.tools import TOOLS, ToolInfo, begin_trackers, check_trackers, ending

__all__ = [
    "TOOLS",
    "Several",
    "Tool",
    "ToolInfo",
    "Tracker",
    "begin_trackers",
    "check_trackers",
    "ending",
]
