import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lbc_cli.errors import CheckpointError, PatternError
from lbc_cli.packing import Layout, Packed, pack, unpack
from lbc_cli.patterns import Pattern, from_groups, magnitude_mask
from tests.golden.encoder import Sparse, encode_sparse

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.uint32,
    torch.complex64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def random_mask(shape: tuple[int, ...], pattern: Pattern, seed: int) -> Tensor:
    groups = math.prod(shape) // (pattern.m * pattern.vector)
    scores = torch.rand(groups, pattern.m, generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros(groups, pattern.m, dtype=torch.bool).scatter_(1, scores.topk(pattern.n).indices, True)
    return from_groups(kept[:, None], shape, pattern)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bytes: NaN payloads, subnormals and negative zeros included; some elements are zero."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGERS[dtype.itemsize]
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    raw = raw.view(integer)
    raw[torch.rand(raw.shape, generator=generator) < 0.2] = 0
    if dtype == torch.bool:
        raw = (raw & 1).to(torch.uint8)
    elif dtype.is_floating_point:
        raw[::7] = torch.tensor(-0.0).to(dtype).view(integer) if dtype != torch.float8_e4m3fnuz else 0
    return raw.view(dtype).reshape(shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pattern, tuple[int, ...], torch.dtype, int]:
    m = draw(st.integers(2, 32))
    n = draw(st.integers(1, m - 1))
    vector = draw(st.sampled_from([1, 1, 2, 3, 4]))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (vector * draw(st.integers(1, 3)), m * draw(st.integers(1, 3)), *kernel)
    return Pattern(n, m, vector), shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1 << 30))


def sparse_weight(pattern: Pattern, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    mask = random_mask(shape, pattern, seed)
    weight = bits_of(random_bits(shape, dtype, seed)).masked_fill(~mask, 0).view(dtype)
    return weight, mask


@settings(max_examples=300, deadline=None)
@given(cases())
def test_round_trip_is_bit_exact(case: tuple[Pattern, tuple[int, ...], torch.dtype, int]) -> None:
    pattern, shape, dtype, seed = case
    weight, mask = sparse_weight(pattern, shape, dtype, seed)
    for packed in (pack(weight, pattern, mask), pack(weight, pattern)):
        assert same_bits(unpack(packed.values, packed.index, shape, pattern), weight)
    assert packed.values.shape == (shape[0], *shape[2:], shape[1] // pattern.m, pattern.n)
    assert packed.index.shape[:-1] == (shape[0] // pattern.vector, *shape[2:])


@settings(max_examples=150, deadline=None)
@given(cases())
def test_packed_form_equals_the_slow_encoder(case: tuple[Pattern, tuple[int, ...], torch.dtype, int]) -> None:
    pattern, shape, dtype, seed = case
    weight, _ = sparse_weight(pattern, shape, dtype, seed)
    modulus = 256**dtype.itemsize
    elements = [value % modulus for value in bits_of(weight).reshape(-1).tolist()]
    values, index = encode_sparse(Sparse(list(shape), "", pattern.n, pattern.m, pattern.vector, elements))
    packed = pack(weight, pattern)
    assert list(packed.values.shape) == values.shape
    assert list(packed.index.shape) == index.shape
    assert [value % modulus for value in bits_of(packed.values).reshape(-1).tolist()] == values.elements
    assert packed.index.reshape(-1).tolist() == index.elements


def test_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbc_cli.packing.CHUNK_ELEMENTS", 100)
    pattern = Pattern(2, 8, 3)
    weight, mask = sparse_weight(pattern, (30, 16, 3), torch.float32, 5)
    assert len(list(Layout.of(weight.shape, pattern).chunks())) > 3
    packed = pack(weight, pattern, mask)
    assert same_bits(unpack(packed.values, packed.index, weight.shape, pattern), weight)


def test_memory_format_does_not_matter() -> None:
    weight, mask = sparse_weight(Pattern(2, 4), (8, 8, 3, 3), torch.float32, 0)
    plain = pack(weight, Pattern(2, 4), mask)
    last = pack(weight.to(memory_format=torch.channels_last), Pattern(2, 4), mask)
    assert same_bits(plain.values, last.values)
    assert torch.equal(plain.index, last.index)
    transposed = pack(weight[:, :, 0, 0].t().contiguous().t(), Pattern(2, 4))
    assert same_bits(transposed.values, pack(weight[:, :, 0, 0], Pattern(2, 4)).values)


def test_a_mask_keeps_zeros_and_no_mask_fills_the_lowest() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    mask = torch.tensor([[False, False, True, True]])
    assert pack(weight, Pattern(2, 4), mask).index.tolist() == [[0b1110]]
    assert pack(weight, Pattern(2, 4)).index.tolist() == [[0b1100]]


def test_negative_zero_is_a_value() -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0, 5.0]])
    packed = pack(weight, Pattern(2, 4))
    assert packed.index.tolist() == [[0b1101]]
    with pytest.raises(PatternError, match=r"80000000"):
        pack(weight, Pattern(2, 4), torch.tensor([[True, False, False, True]]))


def test_sizes() -> None:
    weight, mask = sparse_weight(Pattern(2, 4), (64, 64), torch.bfloat16, 0)
    for pattern, bound in ((Pattern(2, 4), 0.5626), (Pattern(1, 4), 0.2813), (Pattern(1, 16), 0.0782)):
        weight, mask = sparse_weight(pattern, (64, 64), torch.bfloat16, 0)
        packed = pack(weight, pattern, mask)
        assert (packed.values.nbytes + packed.index.nbytes) / weight.nbytes <= bound


def test_an_extra_value_is_named_with_its_group() -> None:
    pattern = Pattern(2, 4)
    weight, mask = sparse_weight(pattern, (6, 12, 2, 3), torch.float32, 1)
    weight = weight + mask
    weight[4, 8:12, 1, 2] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(PatternError, match=r"layer\.weight: group \(o=4, k=\(1, 2\), i=8\.\.11\).*3f800000 40000000"):
        pack(weight, pattern, name="layer.weight")
    with pytest.raises(PatternError, match=r"layer\.weight: group \(o=4, k=\(1, 2\), i=8\.\.11\).*under the mask"):
        pack(weight, pattern, mask, name="layer.weight")


@pytest.mark.parametrize(
    ("shape", "pattern", "match"),
    [
        ((4, 6), "2:4", "6 input channels"),
        ((4,), "2:4", "no input channels"),
        ((6, 8), "2:4/4", "6 output channels"),
        ((0, 8), "2:4", "empty"),
    ],
)
def test_impossible_shapes(shape: tuple[int, ...], pattern: str, match: str) -> None:
    with pytest.raises(PatternError, match=match):
        pack(torch.zeros(shape), Pattern.parse(pattern), name="w")


def test_bad_masks() -> None:
    weight = torch.zeros(2, 4)
    with pytest.raises(PatternError, match="mask of exactly 2 of 4"):
        pack(weight, Pattern(2, 4), torch.tensor([[True, False, False, False]] * 2))
    with pytest.raises(PatternError, match="mask of exactly 2 of 4"):
        pack(weight, Pattern(2, 4), torch.tensor([[True, True, True, False], [True, False, False, False]]))
    with pytest.raises(PatternError, match="the same in every row"):
        pack(weight, Pattern(2, 4, 2), torch.tensor([[True, True, False, False], [True, False, True, False]]))
    with pytest.raises(PatternError, match="a bool of shape"):
        pack(weight, Pattern(2, 4), torch.ones(2, 4))
    with pytest.raises(PatternError, match="1, 2, 4 or 8 bytes"):
        pack(torch.zeros(2, 4, dtype=torch.complex128), Pattern(2, 4))
    with pytest.raises(PatternError, match="has no zero"):
        pack(torch.ones(2, 4).to(torch.float8_e8m0fnu), Pattern(2, 4))


def packed_example(pattern: Pattern) -> tuple[Packed, tuple[int, ...]]:
    weight, mask = sparse_weight(pattern, (4, 3 * pattern.m), torch.float32, 3)
    return pack(weight, pattern, mask), tuple(weight.shape)


@pytest.mark.parametrize(
    ("pattern", "row", "match"),
    [
        ("2:4", [0b0100_0100, 0b0000_0000], r"keeps positions \[0, 0\]"),  # the third group repeats a position
        ("2:4", [0b0100_0001, 0b0000_0100], r"\(o=0, k=\(\), i=0\.\.3\) keeps positions \[1, 0\]"),
        ("2:4", [0b0100_0100, 0b0001_0100], "padding must be zero"),
        ("2:5", [0b0000_1000 | 5 << 3, 0b0000_0000, 0], r"keeps positions \[0, 5\]|below 5"),
    ],
)
def test_index_that_is_not_canonical_is_refused(pattern: str, row: list[int], match: str) -> None:
    parsed = Pattern.parse(pattern)
    packed, shape = packed_example(parsed)
    index = packed.index.clone()
    index[0] = torch.tensor(row, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=match):
        unpack(packed.values, index, shape, parsed, "w")


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    packed, shape = packed_example(Pattern(2, 4))
    with pytest.raises(CheckpointError, match="values have shape"):
        unpack(packed.values[:3], packed.index, shape, Pattern(2, 4))
    with pytest.raises(CheckpointError, match="index is"):
        unpack(packed.values, packed.index[:, :1], shape, Pattern(2, 4))
    with pytest.raises(CheckpointError, match="index is"):
        unpack(packed.values, packed.index.to(torch.int16), shape, Pattern(2, 4))
    with pytest.raises(CheckpointError, match="input channels"):
        unpack(packed.values, packed.index, (4, 11), Pattern(2, 4))


def test_every_mutation_of_the_index_is_refused_or_another_canonical_one() -> None:
    pattern = Pattern(3, 6)
    packed, shape = packed_example(pattern)
    for byte in range(packed.index.shape[1]):
        for bit in range(8):
            index = packed.index.clone()
            index[1, byte] ^= 1 << bit
            try:
                dense = unpack(packed.values, index, shape, pattern)
            except CheckpointError:
                continue
            mask = unpack(torch.ones_like(packed.values), index, shape, pattern) != 0
            again = pack(dense, pattern, mask)
            assert torch.equal(again.index, index)


def test_gradients_and_parameters() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    mask = magnitude_mask(weight, Pattern(2, 4))
    with torch.no_grad():
        weight.masked_fill_(~mask, 0)
    packed = pack(weight, Pattern(2, 4), mask)
    assert not packed.values.requires_grad
    assert dataclasses.is_dataclass(packed)
    assert same_bits(unpack(packed.values, packed.index, weight.shape, Pattern(2, 4)), weight.detach())
