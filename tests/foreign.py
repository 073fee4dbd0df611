"""Weight files as others write them, encoded slowly and on their own, and what their forward pass multiplies by."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def authors_layer(weight: Tensor, n: int, m: int, alive: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """A layer of the LBC authors' code: `alive` are the candidates left in each group, in the order (o, k, i)."""
    table = list(itertools.combinations(range(m), n))
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.zeros(len(alive), len(table))
    for group, candidates in enumerate(alive):
        for candidate in candidates:
            # A score may be negative: only zero means removed.
            alpha[group, candidate] = torch.rand((), generator=generator) - 0.5
    index = torch.tensor([[float(position in row) for position in range(m)] for row in table])
    return {"weight": weight.clone(), "alpha": alpha, "index_list": index}


def authors_forward(layer: dict[str, Tensor]) -> Tensor:
    """What the authors' layer multiplies by, group by group in plain loops."""
    weight, alpha, index = layer["weight"], layer["alpha"], layer["index_list"]
    m = index.shape[1]
    masked = torch.zeros_like(weight)
    kernel = [range(size) for size in weight.shape[2:]]
    group = 0
    for o in range(weight.shape[0]):
        for k in itertools.product(*kernel):
            for start in range(0, weight.shape[1], m):
                for position in range(m):
                    total = sum(float(alpha[group, c] * index[c, position]) for c in range(len(index)))
                    if total != 0:
                        masked[(o, start + position, *k)] = weight[(o, start + position, *k)]
                group += 1
    return masked


def bitmask_layer(weight: Tensor) -> dict[str, Tensor]:
    """A weight [R, C] in the layout sparse-24-bitmask, element by element; exactly two of four are kept."""
    rows, columns = weight.shape
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    for start in range(0, rows * columns, 4):
        four = weight.reshape(-1)[start : start + 4].abs().tolist()
        for position in sorted(range(4), key=lambda i: -four[i])[:2]:
            kept[start + position] = True
    kept = kept.reshape(rows, columns)
    bits = torch.zeros(rows, (columns + 7) // 8, dtype=torch.uint8)
    values: list[Tensor] = []
    for r in range(rows):
        for c in range(columns):
            if kept[r, c]:
                bits[r, c // 8] |= 1 << c % 8
                values.append(weight[r, c])
    return {
        "compressed": torch.stack(values).reshape(rows, columns // 2),
        "bitmask": bits,
        "shape": torch.tensor([[rows], [columns]]),
    }


def under(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a layer under its name."""
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


class Runs:
    """Pickled, it creates a file when it is unpickled without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)
