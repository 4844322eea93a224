"""Thresholds and the keep-mask of Eq. 11."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capo_rl import Shifts, Thresholds, select
from capo_rl.selection import balanced, excess

NAN, INF = float("nan"), float("inf")


def shifts(m_h: list[float], m_f: list[float]) -> Shifts:
    zero = torch.zeros(len(m_h))
    return Shifts(m_h=torch.tensor(m_h), m_f=torch.tensor(m_f), s=zero, c=zero, missing_mass=zero)


def test_bounds_are_inclusive_as_in_eq_11():
    thresholds = Thresholds(fisher=0.5, hessian=(-0.25, 0.75))
    inside = shifts([-0.25, 0.0, 0.75], [0.5, 0.0, 0.5])
    outside = shifts([-0.5, 1.0, 0.0], [0.0, 0.0, 0.75])
    assert select(inside, thresholds).all()
    assert not select(outside, thresholds).any()


@pytest.mark.parametrize("thresholds", [Thresholds(None, None), Thresholds(INF, (-INF, INF)), Thresholds()])
def test_a_nan_or_infinite_shift_is_never_kept(thresholds):
    some = shifts([NAN, 0.0, INF, 0.0, 0.0], [0.0, NAN, 0.0, INF, 0.0])
    assert select(some, thresholds).tolist() == [False, False, False, False, True]
    assert int(some.nonfinite.sum()) == 4


def test_open_sides():
    some = shifts([-9.0, 9.0], [9.0, 9.0])
    assert select(some, Thresholds(None, (None, 1.0))).tolist() == [True, False]
    assert select(some, Thresholds(None, (-1.0, None))).tolist() == [False, True]
    assert select(some, Thresholds(1.0, None)).tolist() == [False, False]


@given(st.lists(st.floats(width=32), min_size=1), st.floats(0, 1e3), st.floats(0, 1e3))
def test_widening_a_bound_only_adds_tokens(values, narrow, wider):
    some = shifts(values, [abs(value) for value in values])
    kept = select(some, Thresholds(narrow, (-narrow, narrow)))
    kept_wider = select(some, Thresholds(narrow + wider, (-narrow - wider, narrow + wider)))
    assert not (kept & ~kept_wider).any()


VALUES = st.lists(st.tuples(st.floats(-2, 2, width=32), st.sampled_from([-1.5, -0.5, 0.0, 0.7])), min_size=1)
BOUNDS = [
    Thresholds(0.5, (-1.0, 1.0)),
    Thresholds(None, (0.25, 1.0)),
    Thresholds(0.0, None),
    Thresholds(INF, (-INF, 0.0)),
]


@given(VALUES, st.sampled_from(BOUNDS))
def test_excess_is_positive_where_a_token_is_rejected(values, thresholds):
    some = shifts([value for value, _ in values], [abs(value) for value, _ in values])
    assert torch.equal(excess(some, thresholds) > 0, ~select(some, thresholds))


@given(VALUES, st.sampled_from(BOUNDS))
def test_balanced_rejects_the_same_share_of_both_signs_and_as_many_in_all(values, thresholds):
    some = shifts([value for value, _ in values], [abs(value) for value, _ in values])
    advantages = torch.tensor([advantage for _, advantage in values])
    plain, keep = select(some, thresholds), balanced(some, thresholds, advantages)
    signed = advantages != 0
    share = float((~plain & signed).sum()) / max(1, int(signed.sum()))
    assert torch.equal(keep[~signed], plain[~signed])
    for members in (advantages > 0, advantages < 0):
        assert abs(int((~keep[members]).sum()) - share * int(members.sum())) <= 0.5 + 1e-4
        out = excess(some, thresholds)[members]
        if keep[members].any() and (~keep[members]).any():
            assert out[~keep[members]].min() >= out[keep[members]].max()


def test_balanced_never_keeps_a_shift_that_is_not_finite():
    some = shifts([NAN, 0.0, 0.0, 0.0], [0.0, 0.0, INF, 0.0])
    assert balanced(some, Thresholds(None, None), torch.ones(4)).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fisher": -1e-4}, "fisher=-0.0001"),
        ({"hessian": (0.1, -0.1)}, "swap"),
        ({"fisher": NAN}, "NaN"),
        ({"hessian": (NAN, 1.0)}, "NaN"),
    ],
)
def test_bad_bounds_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**arguments)
