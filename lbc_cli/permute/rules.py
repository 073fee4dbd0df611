"""What each operator does to the dimensions of its tensors: the rules by which channel spaces travel.

A rule gets the operands as `Labelled` tensors (everything else as it is) and the shape of the result, ties what must
stay together, and gives the dimensions of the result. An operator without a rule fixes whatever enters it, so that a
rule that is missing costs a permutation and never an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbc_cli.permute.spaces import Dim, Space, fix, meet, reshaped

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A tensor as the rules see it."""

    shape: Shape
    dims: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One use of an operator.

    Attributes:
        name: of the operator, for reasons.
        args, kwargs: as it is called, tensors as `Labelled`.
        shape: of the result.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: Shape

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by its place or one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def x(self) -> Labelled:
        """The first operand."""
        first = self.get(0, "input", "self", "x")
        if not isinstance(first, Labelled):
            raise NoRuleError(f"{self.name} of what is no tensor")
        return first


class NoRuleError(Exception):
    """Nothing is known of this use of an operator."""


Rule = Callable[[Call], Sequence[Dim]]


def labelled_in(value: Any) -> Iterator[Labelled]:
    """Every tensor in nested arguments."""
    if isinstance(value, Labelled):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from labelled_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from labelled_in(entry)


def unknown(call: Call) -> tuple[Dim, ...]:
    """Fix whatever enters; of what comes out nothing is known."""
    for operand in labelled_in([*call.args, dict(call.kwargs)]):
        for dim in operand.dims:
            fix(dim, f"{call.name} may depend on the order of its channels")
    return (f"what comes out of {call.name}",) * len(call.shape)


def elementwise(call: Call) -> tuple[Dim, ...]:
    """One element of the result for each element of the operands, which are broadcast."""
    return _aligned(call.name, list(labelled_in([*call.args, dict(call.kwargs)])), call.shape)


def _aligned(name: str, operands: Sequence[Labelled], shape: Shape) -> tuple[Dim, ...]:
    """Tie the dimensions of operands that stand beside one another, the last ones flush."""
    result: list[Dim] = []
    for position, size in enumerate(shape):
        beside: list[Dim] = []
        for operand in operands:
            place = position - (len(shape) - len(operand.shape))
            if size > 1 and place >= 0 and operand.shape[place] == size:
                beside.append(operand.dims[place])
        for other in beside[1:]:
            meet(beside[0], other, f"another operand of {name}")
        spaces = [dim for dim in beside if isinstance(dim, Space)]
        named = [dim for dim in beside if dim]
        result.append(spaces[0] if spaces else named[0] if named else "")
    return tuple(result)


def linear(call: Call) -> tuple[Dim, ...]:
    """The product x @ w.T + b over the last dimension."""
    x, weight, bias = call.x, call.get(1, "weight"), call.get(2, "bias")
    if not isinstance(weight, Labelled) or len(weight.shape) != 2:
        raise NoRuleError(call.name)
    meet(x.dims[-1], weight.dims[1])
    _tie_vectors(weight.dims[0], bias)
    return (*x.dims[:-1], weight.dims[0])


def convolution(call: Call) -> tuple[Dim, ...]:
    """Convolutions of all channels with all, and depthwise ones, which keep their channels."""
    x, weight, bias = call.x, call.get(1, "weight"), call.get(2, "bias")
    groups = int(call.get(6, "groups", default=1))
    if not isinstance(weight, Labelled) or len(weight.shape) != len(x.shape):
        raise NoRuleError(call.name)
    for dim in (*weight.dims[2:], *x.dims[2:]):
        fix(dim, f"{call.name} slides over it")
    _tie_vectors(weight.dims[0], bias)
    if groups == 1:
        meet(x.dims[1], weight.dims[1])
    elif groups == x.shape[1] == weight.shape[0]:
        meet(x.dims[1], weight.dims[0])
    else:
        for dim in (x.dims[1], *weight.dims[:2]):
            fix(dim, f"a convolution in {groups} groups joins neighbours")
    return (x.dims[0], weight.dims[0], *[""] * (len(x.shape) - 2))


def _tie_vectors(dim: Dim, *vectors: Any) -> None:
    """Vectors that hold one entry per channel; those of one entry serve all."""
    for vector in vectors:
        if isinstance(vector, Labelled) and vector.shape != (1,):
            meet(dim, vector.dims[0])


def batch_norm(call: Call) -> tuple[Dim, ...]:
    """(x - mean) / deviation * weight + bias, one of each per channel."""
    names = ("running_mean", "running_var", "weight", "bias")
    _tie_vectors(call.x.dims[1], *(call.get(1 + place, name) for place, name in enumerate(names)))
    return call.x.dims


def layer_norm(call: Call) -> tuple[Dim, ...]:
    """Over the last dimensions as a whole, whatever their order; weight and bias are per element. RMS norm likewise."""
    x = call.x
    operands = [operand for operand in (call.get(2, "weight"), call.get(3, "bias")) if isinstance(operand, Labelled)]
    return _aligned(call.name, [x, *operands], x.shape)


def group_norm(call: Call) -> tuple[Dim, ...]:
    """Over runs of channels; a run of one, or a single run, is indifferent to the order."""
    x, groups = call.x, int(call.get(1, "num_groups"))
    if groups not in (1, x.shape[1]):
        fix(x.dims[1], f"a group norm of {groups} groups joins neighbours")
    _tie_vectors(x.dims[1], call.get(2, "weight"), call.get(3, "bias"))
    return x.dims


def prelu(call: Call) -> tuple[Dim, ...]:
    """A slope per channel, or one for all."""
    _tie_vectors(call.x.dims[1], call.get(1, "weight"))
    return call.x.dims


def spatial(call: Call) -> tuple[Dim, ...]:
    """Pooling and resampling: batch and channels stay, the rest is mixed."""
    x = call.x
    if len(x.shape) != len(call.shape) or len(x.shape) < 3 or x.shape[:2] != call.shape[:2]:
        raise NoRuleError(call.name)
    for dim in x.dims[2:]:
        fix(dim, f"{call.name} mixes neighbours")
    return (*x.dims[:2], *[""] * (len(x.shape) - 2))


def last_kept(call: Call) -> tuple[Dim, ...]:
    """All but the last dimension is mixed: timm's windows, and its resampling of position embeddings."""
    x = call.x
    if x.shape[-1] != call.shape[-1]:
        raise NoRuleError(call.name)
    for dim in x.dims[:-1]:
        fix(dim, f"{call.name} mixes neighbours")
    return (*[""] * (len(call.shape) - 1), x.dims[-1])


def reduction(call: Call) -> tuple[Dim, ...]:
    """Sums, means and maxima over whole dimensions, for which no order matters."""
    x, over = call.x, call.get(1, "dim", "axis")
    if over is None:
        return ("",) * len(call.shape)
    gone = {int(number) % len(x.shape) for number in (over if isinstance(over, list | tuple) else (over,))}
    if len(call.shape) == len(x.shape):
        return tuple("" if number in gone else dim for number, dim in enumerate(x.dims))
    return tuple(dim for number, dim in enumerate(x.dims) if number not in gone)


def reshape(call: Call) -> tuple[Dim, ...]:
    """Any reshape in row-major order; the shapes say all."""
    return reshaped(call.x.dims, call.x.shape, call.shape, call.name)


def permute(call: Call) -> tuple[Dim, ...]:
    """Dimensions in another order, as one list or one by one."""
    given = call.get(1, "dims")
    order = given if isinstance(given, list | tuple) else call.args[1:]
    return tuple(call.x.dims[int(number)] for number in order)


def transpose(call: Call) -> tuple[Dim, ...]:
    """Two dimensions exchanged."""
    first, second = int(call.get(1, "dim0")), int(call.get(2, "dim1"))
    dims = list(call.x.dims)
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def expand(call: Call) -> tuple[Dim, ...]:
    """Dimensions of one entry repeated; the others stay."""
    return _aligned(call.name, [call.x], call.shape)


def concatenation(call: Call) -> tuple[Dim, ...]:
    """Operands one behind the other along one dimension."""
    operands = list(labelled_in(call.get(0, "tensors")))
    along = int(call.get(1, "dim", "axis", default=0)) % len(call.shape)
    for operand in operands:
        if len(operands) > 1:
            fix(operand.dims[along], f"{call.name} puts other channels beside it")
    result: list[Dim] = list(_aligned(call.name, operands, call.shape))
    result[along] = operands[0].dims[along] if len(operands) == 1 else f"what {call.name} puts together"
    return tuple(result)


def selection(call: Call) -> tuple[Dim, ...]:
    """Indexing by numbers, slices, None and `...`; whole dimensions stay."""
    x, index = call.x, call.get(1)
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(not (entry is None or entry is Ellipsis or isinstance(entry, int | slice)) for entry in entries):
        raise NoRuleError(call.name)
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    whole = [slice(None)] * (len(x.shape) - used)
    place = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[place : place + 1] = whole
    result: list[Dim] = []
    number = 0
    for entry in entries:
        if entry is None:
            result.append("")
            continue
        dim, size = x.dims[number], x.shape[number]
        number += 1
        if isinstance(entry, slice):
            result.append(dim if entry.indices(size) == (0, size, 1) else _taken(dim, call.name))
        else:
            _taken(dim, call.name)
    return tuple(result)


def _taken(dim: Dim, name: str) -> Dim:
    fix(dim, f"{name} picks some of its channels")
    return f"what {name} picks" if isinstance(dim, Space) else dim


def padding(call: Call) -> tuple[Dim, ...]:
    """Padding at the end or the start of the last dimensions; those that are left alone stay."""
    x, amounts = call.x, list(call.get(1, "pad"))
    padded = {len(x.shape) - 1 - pair for pair in range(len(amounts) // 2) if any(amounts[2 * pair : 2 * pair + 2])}
    for number in padded:
        fix(x.dims[number], f"{call.name} adds to it")
    return tuple("" if number in padded else dim for number, dim in enumerate(x.dims))


def roll(call: Call) -> tuple[Dim, ...]:
    """Some dimensions turned round; the others stay."""
    given = call.get(2, "dims")
    turned = [int(number) for number in (given if isinstance(given, list | tuple) else (given,))]
    for number in turned:
        fix(call.x.dims[number], f"{call.name} turns it round")
    return call.x.dims


_ELEMENTWISE = """
    abs add add_ addcmul celu clamp clamp_ clamp_max clamp_min clip clone contiguous cos detach div div_ double dropout
    elu erf exp float floordiv gelu half hardsigmoid hardswish hardtanh iadd imul isub itruediv leaky_relu lerp log
    log_softmax logsigmoid maximum minimum mish mul mul_ multiply neg pow reciprocal relu relu6 relu_ rsqrt selu
    sigmoid sigmoid_ silu silu_ sin softmax softplus softsign sqrt square sub sub_ subtract tanh tanh_ to true_divide
    truediv type_as where
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(("amax", "amin", "mean", "sum"), reduction),
    **dict.fromkeys(("flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"), reshape),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenation),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys(("swapaxes", "transpose"), transpose),
    **dict.fromkeys((f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)), spatial),
    **dict.fromkeys((f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)), spatial),
    "interpolate": spatial,
    "linear": linear,
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "prelu": prelu,
    "permute": permute,
    "getitem": selection,
    "pad": padding,
    "roll": roll,
    **dict.fromkeys(("resample_abs_pos_embed", "window_partition", "window_reverse"), last_kept),
}
"""Name of an operator, as a function of torch or a method of tensors -> its rule. softmax is among the element-wise
ones: it treats the entries of a dimension alike."""


def apply(call: Call) -> tuple[Dim, ...]:
    """The dimensions of a result; an operator that no rule knows fixes what enters it."""
    try:
        dims = tuple(RULES[call.name](call)) if call.name in RULES else unknown(call)
    except (NoRuleError, IndexError, TypeError, ValueError):
        dims = unknown(call)
    return tuple("" if size == 1 else dim for dim, size in zip(dims, call.shape, strict=True))
