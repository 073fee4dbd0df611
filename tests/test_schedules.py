"""The schedule of Eq. 6, exactly, in both roundings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbc_cli.errors import MethodError
from lbc_cli.schedules import Ramp
from tests import reference


@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(2, 13_000),
    st.integers(1, 4),
    st.sampled_from(["survivors", "removals"]),
)
def test_survivors_fall_from_all_to_the_final_count(
    t_i: int, length: int, total: int, final: int, rounding: str
) -> None:
    ramp = Ramp(t_i, t_i + length, rounding)  # type: ignore[arg-type]
    final = min(final, total)
    counts = [ramp.survivors(t, total, final) for t in range(t_i + length + 3)]
    assert counts == [
        reference.survivors(t, t_i, t_i + length, total, final, rounding) for t in range(t_i + length + 3)
    ]
    assert counts == sorted(counts, reverse=True)
    assert all(c == total for c in counts[:t_i])
    assert all(c == final for c in counts[t_i + length :])
    if length:
        assert counts[t_i] == total


def test_the_two_roundings_at_2_4_over_six_epochs() -> None:
    assert [Ramp(0, 6, "survivors").survivors(t, 6) for t in range(7)] == [6, 4, 3, 2, 2, 2, 1]
    assert [Ramp(0, 6, "removals").survivors(t, 6) for t in range(7)] == [6, 3, 2, 1, 1, 1, 1]


def test_half_the_epochs_is_the_default_end() -> None:
    assert Ramp.over(120) == Ramp(0, 60)
    assert Ramp.over(7) == Ramp(0, 3)
    assert Ramp.over(1) == Ramp(0, 0)
    assert Ramp.over(10, t_i=7) == Ramp(7, 7)


@pytest.mark.parametrize(("epochs", "t_f"), [(10, 10), (1, 1), (120, 400)])
def test_an_end_past_the_run_is_refused(epochs: int, t_f: int) -> None:
    with pytest.raises(MethodError, match="past the last epoch"):
        Ramp.over(epochs, t_f=t_f)


@pytest.mark.parametrize(("t_i", "t_f"), [(3, 2), (-1, 2)])
def test_a_ramp_that_ends_before_it_begins_is_refused(t_i: int, t_f: int) -> None:
    with pytest.raises(MethodError, match="t_i"):
        Ramp(t_i, t_f)
