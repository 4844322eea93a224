"""Thresholds and the keep-mask of Eq. 11."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capo_rl import AdamStep, SGDStep, Shifts, Thresholds, select, token_shifts
from capo_rl.curvature.last_layer import last_layer
from capo_rl.curvature.selection import penalised, soft_weights, translated
from capo_rl.curvature.shifts import shifts_along, token_direction

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fisher": -1e-4}, "fisher=-0.0001 must be above 0"),
        ({"hessian": (0.1, -0.1)}, "swap"),
        ({"fisher": NAN}, "NaN"),
        ({"hessian": (NAN, 1.0)}, "NaN"),
    ],
)
def test_bad_bounds_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**arguments)


def some_tokens(tokens=200, d=6, vocabulary=15):
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, d, generator=draw, dtype=torch.float64)
    logits = 2 * torch.randn(tokens, vocabulary, generator=draw, dtype=torch.float64)
    actions = torch.randint(0, vocabulary, (tokens,), generator=draw)
    return hidden, logits, actions, torch.randn(tokens, generator=draw, dtype=torch.float64)


def test_soft_weights_bring_an_sgd_step_back_to_the_bound():
    hidden, logits, actions, advantages = some_tokens()
    step, bound = SGDStep(0.05), 0.02
    planned = token_shifts(hidden, logits, actions, advantages, step)
    weights = soft_weights(planned, Thresholds(fisher=bound, hessian=None))
    out = planned.m_f > bound
    assert 0.1 < out.double().mean() < 0.9
    weighed = token_shifts(hidden, logits, actions, weights * advantages, step)
    torch.testing.assert_close(weighed.m_f[out], torch.full_like(weighed.m_f[out], bound))
    assert (weights[~out] == 1).all()


def test_soft_weights_keep_what_select_keeps_and_nothing_that_is_not_finite():
    hidden, logits, actions, advantages = some_tokens()
    advantages[3] = NAN
    planned = token_shifts(hidden, logits, actions, advantages, SGDStep(0.05))
    thresholds = Thresholds(fisher=0.02, hessian=(-0.01, 0.05))
    weights = soft_weights(planned, thresholds)
    assert torch.equal(weights == 1, select(planned, thresholds))
    assert weights[3] == 0
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (soft_weights(planned, Thresholds(fisher=None, hessian=None))[~planned.nonfinite] == 1).all()


def test_a_penalty_is_the_gradient_of_the_penalised_objective():
    """A x − λ ½ x² at the planned x = s, by autograd, wherever that does not turn the token's step round."""
    hidden, logits, actions, advantages = some_tokens()
    planned = token_shifts(hidden, logits, actions, advantages, SGDStep(0.05))
    x = planned.s.clone().requires_grad_()
    (advantages * x - 2.0 * 0.5 * x**2).sum().backward()
    used = penalised(advantages, planned, 2.0)
    kept = x.grad * advantages > 0
    assert 0.1 < kept.double().mean() < 1
    torch.testing.assert_close(used[kept], x.grad[kept])
    assert (used[~kept] == 0).all()
    assert (used * advantages >= 0).all()


@pytest.mark.parametrize("lr", [1e-6, 1e-3])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_translated_bounds_mean_the_same_at_any_learning_rate_and_size(lr, size):
    """The first step of Adam on one token: what is rejected depends on its distribution and its advantage alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(200, 12, generator=generator, dtype=torch.float64)
    actions = torch.randint(12, (200,), generator=generator)
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    verdicts = []
    for rate, factor in ((lr, size), (0.14 / hidden.abs().sum(-1).mean().item(), 1.0)):
        layer = last_layer(factor * hidden, logits, actions)
        planned = shifts_along(token_direction(layer, advantages, AdamStep(rate, eps=1e-30)), layer, advantages)
        scale = rate * (factor * hidden).abs().sum(-1)
        verdicts.append(select(translated(planned, scale), Thresholds(fisher=1e-3, hessian=None)))
    assert torch.equal(*verdicts)
    assert 0 < verdicts[0].sum() < 200


def test_a_token_of_no_scale_keeps_its_shifts():
    assert select(translated(shifts([0.0, 0.0], [0.0, 0.0]), torch.tensor([0.0, 1.0])), Thresholds()).all()
