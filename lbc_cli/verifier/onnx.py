"""ONNX files: the weights of Conv, Gemm and MatMul against a pattern, along the axis that each operator sums over.

    protobuf       the wire format            onnx_file      graphs, nodes, tensors
    onnx_weights   which constants are weights, and their axes
    onnx_data      their elements

The onnx package is not needed, and a file of any size is read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lbc_cli.errors import CheckpointError
from lbc_cli.verifier.bits import count
from lbc_cli.verifier.choice import LayerRules
from lbc_cli.verifier.contents import Content
from lbc_cli.verifier.groups import Rule, Tally, check_groups, settle, value_findings
from lbc_cli.verifier.onnx_data import elements, rows
from lbc_cli.verifier.onnx_file import read_model
from lbc_cli.verifier.onnx_weights import Constant, aliases, constants
from lbc_cli.verifier.report import DenseReport, Report


def verify_onnx(path: Path, rules: LayerRules, report: Report) -> None:
    """Check every constant of an ONNX file.

    Args:
        path: the file; external data are looked for in its folder only.
        rules: what its weights must hold.
        report: layers, dense tensors and findings are added.

    Raises:
        CheckpointError: if the file is damaged, or not ONNX.
    """
    for constant in constants(read_model(path)):
        _check(constant, rules, report)


def onnx_contents(path: Path) -> Iterator[Content]:
    """The constants of an ONNX file: weights as [O, I, *K] and marked as such, others as they are stored.

    What `Identity` gives a further name comes under that name too, but is not marked.

    Raises:
        CheckpointError: if the file is damaged, not ONNX, or two of its graphs name a constant alike.
    """
    model = read_model(path)
    known = list(constants(model))
    seen: set[str] = set()
    for constant in known:
        name = constant.tensor.name
        if name in seen:
            raise CheckpointError(f"two graphs of the file have a tensor called {name}: they cannot be compared")
        seen.add(name)
        yield from _content(constant, weight=constant.axes is not None)
    for alias in {alias.tensor.name: alias for alias in aliases(model, known)}.values():
        yield from _content(alias, weight=False)


def _content(constant: Constant, *, weight: bool) -> Iterator[Content]:
    tensor = constant.tensor
    if not tensor.unread:
        yield Content(tensor.name, tensor.dtype, constant.shape, _chunks(constant), weight=weight)


class _chunks:  # noqa: N801
    """The bytes of a constant, from the start at every call."""

    def __init__(self, constant: Constant) -> None:
        self._constant = constant

    def __call__(self) -> Iterator[bytes]:
        tensor, axes = self._constant.tensor, self._constant.axes
        pieces = elements(tensor) if axes is None else (block for _, block in rows(tensor, axes))
        for piece in pieces:
            yield piece.tobytes()


def _check(constant: Constant, rules: LayerRules, report: Report) -> None:
    tensor, shape = constant.tensor, constant.shape
    weight = constant.axes is not None
    rule = rules.rule_for(tensor.name, shape, weight=True, groups=constant.groups) if weight else None
    if rule is not None and constant.axes is not None:
        _check_weight(constant, constant.axes, rule, report)
        return
    if len(shape) > 1:
        why = constant.why or rules.why_dense(tensor.name, shape, weight=True, groups=constant.groups)
        report.dense.append(DenseReport(tensor.name, why, shape))
    if not tensor.unread:
        tally = Tally()
        for block in elements(tensor):
            count(block, tensor.dtype, tally.census)
        report.findings += value_findings(tensor.name, tally.census, sparse=False)


def _check_weight(constant: Constant, axes: tuple[int, ...], rule: Rule, report: Report) -> None:
    tensor, kernel, tally = constant.tensor, constant.shape[2:], Tally()
    for first, bits in rows(tensor, axes, rule.v):
        nonzero = count(bits, tensor.dtype, tally.census)
        check_groups(nonzero, bits, tensor.dtype, rule, first // rule.v, kernel, tally)
    settle(tensor.name, constant.shape, rule, tally, report)
