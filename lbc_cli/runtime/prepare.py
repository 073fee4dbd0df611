"""What every execution begins with: the model looked at once, batch norms folded, moved to its device and dtype."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbc_cli.patterns import Pattern
from lbc_cli.runtime.convert import Executed, convert
from lbc_cli.runtime.cpu_dense import pack_dense_layers
from lbc_cli.runtime.cpu_layers import CpuLayer
from lbc_cli.runtime.executors import Executor
from lbc_cli.runtime.fold import fold_batch_norms
from lbc_cli.runtime.fuse import fuse as fuse_layers
from lbc_cli.runtime.fuse import note_fusion
from lbc_cli.runtime.layer import Layer, find_layers
from lbc_cli.runtime.slices import sliced
from lbc_cli.runtime.trace import Trace, trace


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A model ready to be executed, dense or sparse, with the same fusion, dtype and memory layout.

    Attributes:
        model: dense, folded, on the CPU in the dtype of its weights.
        seen: one forward pass of `model`.
        patterns: parameter name -> the pattern that its weight holds.
        folded: names of the batch norms that were folded.
        sample: the batch that it was looked at with.
    """

    model: nn.Module
    seen: Trace
    patterns: Mapping[str, Pattern]
    folded: list[str]
    sample: Tensor

    def layers(self) -> list[Layer]:
        """The linear and convolution layers, with what they can run as."""
        return find_layers(self.model, self.seen, self.patterns)

    def dense(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A copy that executes everything densely, channels last."""
        return copy.deepcopy(self.model).to(device=device, dtype=dtype).to(memory_format=torch.channels_last).eval()

    def sparse(
        self,
        executors: Sequence[Executor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        choices: Mapping[str, str] | None = None,
        fuse: bool = True,
    ) -> tuple[nn.Module, list[Executed]]:
        """A copy that executes its sparse weights.

        Args:
            executors: as for `convert`.
            dtype: as for `convert`.
            device: as for `convert`.
            choices: as for `convert`.
            fuse: where layers run on CPU kernels, pack the weights of the dense ones, take sums and ReLUs into the
                layers before them, and batches in slices that fit the cache: the model is then one graph with the
                model's call, not an instance of its class.
        """
        model, report = convert(self.model, self.layers(), executors, dtype=dtype, device=device, choices=choices)
        if fuse and any(isinstance(module, CpuLayer) for module in model.modules()):
            pack_dense_layers(model, [name for name, use in self.seen.uses.items() if use.calls])
            model, done = fuse_layers(model, self.sample.to(device=device, dtype=dtype))
            model = sliced(model, self.seen, self.sample)
            note_fusion(model, done)
        return model, report


def prepare(model: nn.Module, patterns: Mapping[str, Pattern], sample: Tensor, *, fold: bool = True) -> Prepared:
    """Look at a model and fold its batch norms.

    Args:
        model: dense with N:M weights, on the CPU; it is put into eval mode and otherwise not changed.
        patterns: parameter name -> the pattern that its weight holds.
        sample: a batch as the model takes it, on the CPU; one image is enough.
        fold: whether to fold batch norms.
    """
    own = copy.deepcopy(model).eval().requires_grad_(False)
    sample = sample.to(next(own.parameters()).dtype)
    seen = trace(own, sample)
    if not fold:
        return Prepared(own, seen, patterns, [], sample)
    folded = fold_batch_norms(own, seen)
    # Folding replaces modules: look again, so that names and shapes are those of what will run.
    return Prepared(own, trace(own, sample), patterns, folded, sample)
