"""The N:M algebra against plain loops, over generated shapes and patterns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbc_cli import patterns
from lbc_cli.errors import PatternError
from lbc_cli.patterns import Pattern
from tests.reference import group_indices

any_pattern = st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))
small_pattern = st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@st.composite
def shaped(draw: st.DrawFn) -> tuple[Pattern, tuple[int, ...]]:
    n, m = draw(any_pattern)
    v = draw(st.sampled_from([1, 2, 4, 16]))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    return Pattern(n, m, v), (v * draw(st.integers(1, 3)), m * draw(st.integers(1, 3)), *kernel)


@given(any_pattern, st.integers(1, 64))
def test_parse_is_the_inverse_of_str(nm: tuple[int, int], v: int) -> None:
    pattern = Pattern(*nm, v)
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(pattern.name, v) == pattern
    assert pattern.density == nm[0] / nm[1]


@pytest.mark.parametrize("text", ["", "2", "2:", "2/4", "a:b", "-1:4", "2:4:8", "2:4/x", "2.0:4"])
def test_parse_refuses_what_is_no_pattern(text: str) -> None:
    with pytest.raises(PatternError, match="not a pattern"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("4:4", "less than M"),
        ("5:4", "less than M"),
        ("0:4", "at least 1"),
        ("1:33", "32 at the most"),
        ("2:4/0", "not positive"),
    ],
)
def test_impossible_patterns_name_the_rule(text: str, rule: str) -> None:
    with pytest.raises(PatternError, match=rule):
        Pattern.parse(text)


@settings(max_examples=60, deadline=None)
@given(shaped())
def test_groups_are_those_of_plain_loops_and_come_back(case: tuple[Pattern, tuple[int, ...]]) -> None:
    pattern, shape = case
    weight = torch.randn(shape)
    groups = patterns.to_groups(weight, pattern)
    assert len(groups) == patterns.num_groups(shape, pattern)
    assert torch.equal(groups, weight.flatten()[group_indices(shape, pattern.m, pattern.vector)])
    assert torch.equal(patterns.from_groups(groups, shape, pattern), weight)


def test_groups_of_a_channels_last_weight_follow_its_logical_order() -> None:
    weight = torch.randn(8, 8, 3, 3)
    pattern = Pattern(2, 4, 4)
    last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(patterns.to_groups(last, pattern), patterns.to_groups(weight, pattern))


@pytest.mark.parametrize(
    ("shape", "what"), [((8, 6), "6 input channels"), ((6, 8), "6 output channels"), ((8,), "no input")]
)
def test_shapes_that_do_not_divide_are_refused(shape: tuple[int, ...], what: str) -> None:
    with pytest.raises(PatternError, match=what):
        patterns.to_groups(torch.zeros(shape), Pattern(2, 4, 4))


@given(small_pattern)
def test_candidates_are_all_subsets_in_lexicographic_order(nm: tuple[int, int]) -> None:
    table = patterns.candidates(Pattern(*nm))
    assert table.tolist() == [list(c) for c in itertools.combinations(range(nm[1]), nm[0])]
    assert len(table) == Pattern(*nm).num_candidates == math.comb(nm[1], nm[0])


@settings(max_examples=60, deadline=None)
@given(small_pattern, st.integers(0, 2**31), st.booleans())
def test_keep_best_is_a_sort_by_score_then_tie_then_index(nm: tuple[int, int], seed: int, with_ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = math.comb(nm[1], nm[0])
    draw = (
        (lambda: torch.randint(0, 3, (20, count), generator=generator).double())
        if with_ties
        else (lambda: torch.randn(20, count, generator=generator, dtype=torch.float64))
    )
    scores, tie = draw(), draw()
    alive = torch.rand(20, count, generator=generator) < 0.7
    alive[:, 0] = True
    keep = int(alive.sum(dim=1).min())
    kept = patterns.keep_best(scores, alive, keep, tie=lambda rows: tie[rows])
    for row in range(20):
        living = [j for j in range(count) if alive[row, j]]
        want = sorted(living, key=lambda j: (-scores[row, j].item(), -tie[row, j].item(), j))[:keep]
        assert kept[row].nonzero()[:, 0].tolist() == sorted(want)


@settings(max_examples=40, deadline=None)
@given(small_pattern, st.integers(0, 2**31))
def test_sums_and_positions_follow_the_members(nm: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = patterns.candidates(Pattern(*nm))
    values = torch.randn(5, nm[1], generator=generator, dtype=torch.float64)
    alive = torch.rand(5, len(table), generator=generator) < 0.3
    sums, kept = patterns.candidate_sums(values, table), patterns.positions_of(alive, table, nm[1])
    for g in range(5):
        for j, members in enumerate(table.tolist()):
            assert sums[g, j].item() == pytest.approx(sum(values[g, i].item() for i in members), abs=1e-12)
        assert set(kept[g].nonzero()[:, 0].tolist()) == {i for j in alive[g].nonzero()[:, 0] for i in table[j].tolist()}


@given(st.integers(1, 5), st.integers(1, 80), st.integers(0, 2**31))
def test_bits_come_back(rows: int, columns: int, seed: int) -> None:
    bits = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = patterns.pack_bits(bits)
    assert packed.shape == (rows, -(-columns // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(patterns.unpack_bits(packed, columns), bits)


@settings(max_examples=40, deadline=None)
@given(shaped())
def test_magnitude_masks_hold_and_one_more_weight_breaks_them(case: tuple[Pattern, tuple[int, ...]]) -> None:
    pattern, shape = case
    weight = torch.randn(shape)
    mask = patterns.magnitude_mask(weight, pattern)
    patterns.check_mask(mask, pattern)
    assert patterns.holds(weight.where(mask, 0), pattern)
    assert mask.double().mean().item() == pytest.approx(pattern.density)
    more = mask.clone().flatten()
    more[(~mask).flatten().nonzero()[0]] = True
    assert not patterns.holds(more.reshape(shape), pattern)
    with pytest.raises(PatternError, match="keeps exactly"):
        patterns.check_mask(more.reshape(shape), pattern)


def test_a_row_of_its_own_breaks_a_vector_wise_mask() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    patterns.check_mask(mask, Pattern(2, 4))
    assert not patterns.holds(mask, Pattern(2, 4, 2))
    with pytest.raises(PatternError, match="the same in all rows"):
        patterns.check_mask(mask, Pattern(2, 4, 2))


@pytest.mark.parametrize("m", [2, 4, 16, 32])
def test_both_ways_to_find_the_largest_agree_where_values_tie(m: int) -> None:
    values = torch.randint(0, 5, (m, 7, 30), generator=torch.Generator().manual_seed(m)).float()
    by_rows = patterns._losses_by_rows(values)
    assert torch.equal(patterns._losses_by_pairs(values).long(), by_rows)
    assert torch.equal(by_rows.sort(dim=0).values, torch.arange(m)[:, None, None].expand(values.shape))
