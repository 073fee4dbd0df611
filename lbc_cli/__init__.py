"""N:M sparse vision models: train, verify and measure them.

    import lbc_cli
    pruner = lbc_cli.attach(model, optimizer, pattern="2:4", method="lbc", epochs=120)
    for epoch in range(120):
        pruner.begin_epoch(epoch)
        ...                                    # any training loop
    lbc_cli.save(model, "model.safetensors", pruner=pruner)
    model = lbc_cli.load("model.safetensors")

These names load torch only when first used, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lbc_cli.errors import LbcError

if TYPE_CHECKING:
    from lbc_cli.checkpoint import save
    from lbc_cli.methods import attach
    from lbc_cli.runtime import load
    from lbc_cli.verifier import verify

__version__ = "0.1.0"
__all__ = ["LbcError", "__version__", "attach", "load", "save", "verify"]

_HOME = {
    "attach": "lbc_cli.methods",
    "save": "lbc_cli.checkpoint",
    "load": "lbc_cli.runtime",
    "verify": "lbc_cli.verifier",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
