"""Shortening an update to a KL budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capo_rl.trust_region import shorten


@given(length=st.floats(1e-3, 1e3), budget=st.floats(1e-6, 1.0), power=st.sampled_from([1.0, 2.0, 3.0, 4.0]))
def test_the_update_ends_inside_the_budget_or_is_undone(length, budget, power):
    old, weights = torch.zeros(1, dtype=torch.float64), torch.tensor([length], dtype=torch.float64)
    left = shorten([weights], [old], lambda: float(weights.abs() ** power), budget)
    assert left.measured <= budget
    assert float(weights) == pytest.approx(left.fraction * length)
    assert left.measured == pytest.approx(float(weights.abs() ** power))
    if length**power <= budget:
        assert left.fraction == 1.0
        assert float(weights) == length


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_an_update_that_left_the_numbers_is_undone(kl):
    old, weights = torch.ones(2), torch.tensor([math.inf, math.nan])
    assert shorten([weights], [old], lambda: kl, 1.0).fraction == 0.0
    assert torch.equal(weights, old)


def test_an_update_that_cannot_be_shortened_is_undone():
    old, weights = torch.zeros(1), torch.ones(1)
    measured = []
    left = shorten([weights], [old], lambda: measured.append(1) or 5.0, 1.0, tries=3)
    assert (left.proposed, left.measured, left.fraction) == (5.0, 0.0, 0.0)
    assert len(measured) == 4
    assert torch.equal(weights, old)
