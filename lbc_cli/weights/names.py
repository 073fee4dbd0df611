"""Names of tensors without what wrappers leave in them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lbc_cli.errors import CheckpointError

_ANYWHERE = ("_orig_mod.", "_checkpoint_wrapped_module.")
_IN_FRONT = ("module.",)


def clean_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the model itself.

    torch.compile's and activation checkpointing's parts go wherever they stand; "module." of DataParallel only where
    every name begins with it: a model may have a layer of that name.

    Raises:
        CheckpointError: if two tensors would have one name.
    """
    names = {name: _without(name) for name in tensors}
    while any(names) and (prefix := next((p for p in _IN_FRONT if all(n.startswith(p) for n in names.values())), "")):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    cleaned: dict[str, Tensor] = {}
    for name, short in names.items():
        if short in cleaned:
            raise CheckpointError(f"two tensors are called {short} once wrappers are taken off, one of them {name}")
        cleaned[short] = tensors[name]
    return cleaned


def _without(name: str) -> str:
    for part in _ANYWHERE:
        name = name.replace(part, "")
    return name
