"""A slow oracle of N:M convolutions, in float64 and numpy, sharing no code with the kernels.

Arrays are [n, I, h, w] and [O, I, kh, kw]; a walk is what the operator takes: stride (h, w), dilation (h, w), zeros
(top, left, bottom, right).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def sparse_weight(
    shape: Sequence[int], n: int, m: int, vector: int, *, seed: int, ragged: bool = False
) -> NDArray[np.float32]:
    """Exactly n non-zeros in every group of m input channels, at the same places for `vector` output channels.

    Args:
        shape: [O, I, kh, kw].
        n: non-zeros of a group.
        m: input channels of a group.
        vector: output channels that share their places.
        seed: of the numbers.
        ragged: from none to n non-zeros.
    """
    out, inputs, kh, kw = shape
    random = np.random.default_rng(seed)
    order = random.random((-(-out // vector), inputs // m, m, kh, kw)).argsort(axis=2).argsort(axis=2)
    most = random.integers(0, n + 1, (*order.shape[:2], 1, kh, kw)) if ragged else n
    keep = np.repeat((order < most).reshape(-1, inputs, kh, kw), vector, axis=0)[:out]
    return np.where(keep, random.standard_normal(shape), 0).astype(np.float32)


def kept(weight: Array, n: int, m: int, vector: int) -> NDArray[np.bool_]:
    """What is stored of a weight without -0.0: what any channel of a mask uses, then the lowest free places."""
    out, inputs, kh, kw = weight.shape
    mask = np.zeros(weight.shape, bool)
    for o, i, r, s in itertools.product(range(0, out, vector), range(0, inputs, m), range(kh), range(kw)):
        used = [c for c in range(i, i + m) if weight[o : o + vector, c, r, s].any()]
        assert len(used) <= n
        free = [c for c in range(i, i + m) if c not in used]
        mask[o : o + vector, [*used, *free[: n - len(used)]], r, s] = True
    return mask


def convolve(
    x: Array,
    weight: Array,
    walk: Sequence[int],
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    relu: bool = False,
) -> NDArray[np.float64]:
    """The dense convolution, one product of matrices for each kernel position."""
    kh, kw = weight.shape[2:]
    windows = _windows(x, kh, kw, walk)
    terms = [np.einsum("oi,nihw->nohw", weight[:, :, r, s].astype(float), seen) for (r, s), seen in windows]
    return _finish(sum(terms), bias, residual, relu)


def propagate(
    x: Array,
    weight: Array,
    keep: NDArray[np.bool_],
    walk: Sequence[int],
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    relu: bool = False,
) -> NDArray[np.float64]:
    """The same over the kept weights alone, one number after the other, so that NaN and Inf go where they should."""
    out, inputs, kh, kw = weight.shape
    total: Any = 0
    for (r, s), seen in _windows(x, kh, kw, walk):
        if not isinstance(total, np.ndarray):
            total = np.zeros((len(x), out, *seen.shape[2:]))
        for o, i in itertools.product(range(out), range(inputs)):
            if keep[o, i, r, s]:
                total[:, o] += float(weight[o, i, r, s]) * seen[:, i]
    return _finish(total, bias, residual, relu)


def _windows(x: Array, kh: int, kw: int, walk: Sequence[int]) -> list[tuple[tuple[int, int], Array]]:
    """For every kernel position the pixels [n, I, h', w'] that it sees."""
    stride_h, stride_w, dilation_h, dilation_w, top, left, bottom, right = walk
    padded = np.pad(x.astype(float), ((0, 0), (0, 0), (top, bottom), (left, right)))
    rows = range(0, padded.shape[2] - dilation_h * (kh - 1), stride_h)
    columns = range(0, padded.shape[3] - dilation_w * (kw - 1), stride_w)
    return [
        ((r, s), padded[:, :, [y + r * dilation_h for y in rows]][..., [c + s * dilation_w for c in columns]])
        for r, s in itertools.product(range(kh), range(kw))
    ]


def _finish(total: Array, bias: Array | None, residual: Array | None, relu: bool) -> Array:
    if bias is not None:
        total = total + bias.astype(float)[:, None, None]
    if residual is not None:
        total = total + residual.astype(float)
    return np.where(total < 0, 0, total) if relu else total
