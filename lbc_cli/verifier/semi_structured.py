"""Semi-structured exports: an own decoding of torch's CUTLASS layout, from its specification. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.bits import FORMATS, Bits, count, unsigned
from lbc_cli.verifier.choice import LayerRules
from lbc_cli.verifier.contents import Content
from lbc_cli.verifier.dense import check_dense, check_rule
from lbc_cli.verifier.groups import Rule, Tally, add_violations, check_groups, settle
from lbc_cli.verifier.report import DenseReport, Finding, Report
from lbc_cli.verifier.semi_rules import SemiClaims, SemiLayer, is_semi_structured, read_semi_claims
from lbc_cli.verifier.source import Entry, Source, Stream, row_blocks

__all__ = ["is_semi_structured", "semi_structured_contents", "semi_structured_model", "verify_semi_structured"]

# Positions in use -> the one code that stands for them: the lower position and four times the higher.
_CODE_OF = {
    (): 2 + 4 * 3, (2,): 2 + 4 * 3, (3,): 2 + 4 * 3, (2, 3): 2 + 4 * 3,
    (1,): 1 + 4 * 2, (1, 2): 1 + 4 * 2, (1, 3): 1 + 4 * 3,
    (0,): 0 + 4 * 2, (0, 2): 0 + 4 * 2, (0, 1): 0 + 4 * 1, (0, 3): 0 + 4 * 3,
}  # fmt: skip
_EXPECTED = np.full(16, 255, np.uint8)
for _places, _code in _CODE_OF.items():
    _EXPECTED[sum(1 << _place for _place in _places)] = _code
_PIECE = 1 << 20


def verify_semi_structured(source: Source, rules: LayerRules | None, report: Report) -> None:
    """Check an export.

    Args:
        source: the open file.
        rules: what the layers must hold beside what the manifest claims; None: nothing.
        report: updated in place.

    Raises:
        CheckpointError: if the manifest breaks a rule, so that nothing below it can be read.
    """
    claims = read_semi_claims(source)
    report.phase, report.method, report.digest = "final", claims.method, claims.digest
    parts: set[str] = set()
    for layer in claims.layers:
        asked = None if rules is None else rules.demanded(layer.name)
        found = _check_layer(source, layer, _fitted(layer.name, layer.shape, asked, report), report)
        for entry, digest in zip((layer.packed, layer.meta), found, strict=True):
            _compare(entry.name, digest, claims, report)
            parts.add(entry.name)
    for entry in source.entries.values():
        if entry.name not in parts:
            _compare(entry.name, _check_other(source, entry, claims, rules, report), claims, report)


def semi_structured_contents(source: Source) -> Iterator[Content]:
    """Every tensor of an export, as a model would receive it.

    Raises:
        CheckpointError: if the manifest breaks a rule; while reading, if a code is impossible.
    """
    claims = read_semi_claims(source)
    parts = {part.name for layer in claims.layers for part in (layer.packed, layer.meta)}
    for layer in claims.layers:
        chunks: Callable[[], Iterator[bytes]] = partial(_layer_chunks, source, layer)
        yield Content(layer.name, layer.packed.dtype, layer.shape, chunks, weight=True)
    for entry in source.entries.values():
        if entry.name not in parts:
            yield Content(entry.name, entry.dtype, entry.shape, partial(_plain_chunks, source, entry))


def semi_structured_model(source: Source) -> tuple[str | None, dict[str, Any]]:
    """The timm name and arguments of the model that was exported.

    Raises:
        CheckpointError: if the manifest breaks a rule.
    """
    claims = read_semi_claims(source)
    return claims.arch, claims.kwargs


def _plain_chunks(source: Source, entry: Entry) -> Iterator[bytes]:
    stream = Stream(source, entry)
    for begin in range(entry.begin, entry.end, _PIECE):
        yield stream.read(min(_PIECE, entry.end - begin))


def _layer_chunks(source: Source, layer: SemiLayer) -> Iterator[bytes]:
    """The dense bytes of a layer, [O, I, *K] in pieces of whole rows."""
    report = Report("")
    packed, codes = Stream(source, layer.packed), _Codes(layer, Stream(source, layer.meta))
    for first, last in row_blocks(layer.packed.shape[0], 2 * layer.packed.shape[1]):
        weights = _read_rows(packed, codes, layer, first, last, report)
        if report.findings:
            raise CheckpointError(report.findings[0].message)
        yield weights.tobytes()


def _fitted(name: str, shape: tuple[int, ...], asked: Rule | None, report: Report) -> Rule | None:
    """A pattern that is asked for, with the vector length that this layer can take."""
    if asked is not None and shape[1] % asked.m:
        message = f"{name} has {shape[1]} input channels, not a multiple of {asked.m}: {asked} cannot hold"
        report.add(Finding("pattern", name, message))
        return None
    return asked and Rule(asked.n, asked.m, math.gcd(asked.v, shape[0]))


def _check_layer(source: Source, layer: SemiLayer, asked: Rule | None, report: Report) -> tuple[str, str]:
    """Check one layer from front to back; gives the SHA-256 of its two parts."""
    own = layer.rule or Rule(2, 4)
    extra = asked if asked not in (None, own) else None
    packed, meta = Stream(source, layer.packed), Stream(source, layer.meta)
    codes = _Codes(layer, meta)
    dtype, kernel = layer.packed.dtype, layer.shape[2:]
    tally, other = Tally(), Tally()
    step = math.lcm(own.v, extra.v if extra else 1)
    for first, last in row_blocks(layer.packed.shape[0], 2 * layer.packed.shape[1], step):
        weights = _read_rows(packed, codes, layer, first, last, report)
        if len(weights):
            nonzero = count(weights, dtype, tally.census)
            check_groups(nonzero, weights, dtype, own, first // own.v, kernel, tally)
            if extra:
                check_groups(nonzero, weights, dtype, extra, first // extra.v, kernel, other)
    settle(layer.name, layer.shape, own, tally, report)
    if extra:
        add_violations(layer.name, extra, other, report)
    return packed.digest(), meta.digest()


class _Codes:
    """The codes of a layer's quads, found in the order in which tensor cores read them."""

    def __init__(self, layer: SemiLayer, meta: Stream) -> None:
        self._rows, self._columns = layer.meta.shape
        size = FORMATS[layer.meta.dtype].size
        self._per_word = 2 * size
        self._span = 64 // size  # rows that are reordered together
        self._words = unsigned(meta.read(layer.meta.end - layer.meta.begin), layer.meta.dtype)

    def rows(self, first: int, last: int) -> NDArray[np.uint8]:
        """Codes of some rows of the matrix, [rows, k / 4]."""
        r, w = np.arange(first, last)[:, None], np.arange(self._columns)[None, :]
        span = self._span
        s = r // span * span + r % 8 * (span // 8) + r % span // 8
        odd_row, odd_column = s % 2, w % 2
        # Within a block of two by two, the words off the diagonal change places.
        row, column = s - odd_row + odd_column, odd_row
        words = self._words[w // 2 * (2 * self._rows) + 2 * row + column]
        fours = [(words >> (4 * place)).astype(np.uint8) & 15 for place in range(self._per_word)]
        return np.stack(fours, axis=-1).reshape(last - first, -1)


def _read_rows(packed: Stream, codes: _Codes, layer: SemiLayer, first: int, last: int, report: Report) -> Bits:
    """The weights of some rows of the matrix, [rows without padding, I, prod(K)], with the findings about them."""
    dtype, half = layer.packed.dtype, layer.packed.shape[1]
    kept = unsigned(packed.read((last - first) * half * FORMATS[dtype].size), dtype).reshape(last - first, half // 2, 2)
    found = codes.rows(first, last)
    low, high = found & 3, found >> 2
    used = (kept[..., 0] != 0).astype(np.uint8) << low | (kept[..., 1] != 0).astype(np.uint8) << high
    wrong = _EXPECTED[used] != found
    if wrong.any():
        row, quad = (int(axis) for axis in np.argwhere(wrong)[0])
        message = (
            f"{layer.name}: row {first + row}, columns {4 * quad}..{4 * quad + 3} have the code "
            f"{int(found[row, quad])} where {_named(int(_EXPECTED[used[row, quad]]))} is canonical"
        )
        report.add(Finding("positions", layer.name, message, int(np.count_nonzero(wrong))))
    matrix = np.zeros((last - first, half // 2, 4), kept.dtype)
    np.put_along_axis(matrix, low[..., None].astype(np.intp), kept[..., :1], axis=-1)
    np.put_along_axis(matrix, high[..., None].astype(np.intp), kept[..., 1:], axis=-1)
    return _without_padding(matrix.reshape(last - first, 2 * half), layer, first, report)


def _named(code: int) -> str:
    return "another" if code == 255 else str(code)


def _without_padding(matrix: Bits, layer: SemiLayer, first: int, report: Report) -> Bits:
    """The layer's own rows and columns, [rows, I, prod(K)]; what is around them must be zero."""
    out, inputs, *kernel = layer.shape
    rows = max(0, min(len(matrix), out - first))
    if matrix[rows:].any() or matrix[:, layer.columns :].any():
        message = f"{layer.name}: the matrix is not zero beyond its {out} rows and {layer.columns} columns"
        report.add(Finding("padding", layer.name, message))
    own = matrix[:rows, : layer.columns].reshape(rows, math.prod(kernel), inputs)
    return np.ascontiguousarray(own.swapaxes(1, 2))


def _check_other(source: Source, entry: Entry, claims: SemiClaims, rules: LayerRules | None, report: Report) -> str:
    """Check a tensor that is stored dense; gives its digest."""
    why, claimed = claims.dense.get(entry.name, ("", None))
    asked = rules.rule_for(entry.name, entry.shape) if rules is not None and rules.glob_for(entry.name) else None
    if entry.name in claims.dense and claimed is None and asked is None:
        report.dense.append(DenseReport(entry.name, why, entry.shape))
    digest = ""
    for rule in dict.fromkeys([claimed, asked]):
        if rule is not None:
            digest = check_rule(source, entry, rule, report)
    return digest or check_dense(source, entry, report)[0]


def _compare(name: str, digest: str, claims: SemiClaims, report: Report) -> None:
    if digest != claims.digests[name]:
        report.add(Finding("digest", name, f"{name} does not match its SHA-256: the data are damaged"))
