"""Shortening an update to a KL budget, and the ways back along it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capo_rl.trust_region import CONTROLS, CopiedStep, LearningRate, RecomputedStep, shorten


@given(length=st.floats(1e-3, 1e3), budget=st.floats(1e-6, 1.0), power=st.sampled_from([1.0, 2.0, 3.0, 4.0]))
def test_the_update_ends_inside_the_budget_or_is_undone(length, budget, power):
    taken = [1.0]
    left = shorten(taken.append, lambda: (taken[-1] * length) ** power, budget)
    assert left.measured <= budget
    assert left.fraction == taken[-1]
    assert left.measured == pytest.approx((left.fraction * length) ** power)
    if length**power <= budget:
        assert left.fraction == 1.0


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_an_update_that_left_the_numbers_is_undone(kl):
    taken = []
    assert shorten(taken.append, lambda: kl, 1.0).fraction == 0.0
    assert taken == [0.0]


def test_an_update_that_cannot_be_shortened_is_undone():
    taken, measured = [], []
    left = shorten(taken.append, lambda: measured.append(1) or 5.0, 1.0, tries=3)
    assert (left.proposed, left.measured, left.fraction) == (5.0, 0.0, 0.0)
    assert len(measured) == 4
    assert taken[-1] == 0.0


def stepped(optimizer_class, dtype=torch.float64, **settings):
    """Weights after three steps of an optimizer, those before the last, and the two ways back along it."""
    torch.manual_seed(0)
    weights = [torch.randn(5, 3, dtype=dtype).requires_grad_(), torch.randn(4, dtype=dtype).requires_grad_()]
    idle = torch.randn(2, dtype=dtype).requires_grad_()  # a weight that gets no gradient
    optimizer = optimizer_class([{"params": weights}, {"params": [idle], "lr": 7.0}], **settings)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        if step == 2:
            before = [weight.detach().clone() for weight in weights]
            ways = CopiedStep(optimizer), RecomputedStep(optimizer)
        optimizer.step()
        schedule.step()  # the step must not be recomputed with the next learning rate
    return [*weights, idle], [*before, idle.detach().clone()], ways


ADAMS = [
    (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
]


@pytest.mark.parametrize(("optimizer", "settings"), ADAMS, ids=str)
@pytest.mark.parametrize("way", [0, 1], ids=["copied", "recomputed"])
def test_both_ways_lead_along_the_line_between_the_weights_before_and_after(optimizer, settings, way):
    weights, before, ways = stepped(optimizer, **settings)
    after = [weight.detach().clone() for weight in weights]
    assert not torch.equal(before[0], after[0])
    for fraction in (0.5, 0.1, 0.0):
        ways[way].take(fraction)
        for weight, old, new in zip(weights, before, after, strict=True):
            torch.testing.assert_close(weight.detach(), old + fraction * (new - old), rtol=1e-12, atol=1e-12)


def test_a_copy_brings_the_weights_back_bit_for_bit_even_from_infinity():
    weights, before, (copied, _) = stepped(torch.optim.AdamW, torch.float32, lr=0.1)
    with torch.no_grad():
        weights[0].fill_(math.inf)
    copied.take(0.0)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_optimizers_whose_step_is_not_known_are_refused():
    weight = torch.zeros(1, requires_grad=True)
    with pytest.raises(TypeError, match="use 'copy'"):
        RecomputedStep(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(ValueError, match="amsgrad"):
        RecomputedStep(torch.optim.AdamW([weight], lr=0.1, amsgrad=True))


def walk(control: LearningRate, sharpness: list[float], predicted: float = 1.0) -> list[float]:
    """The KL of each of a series of steps, whose KL at the whole learning rate would be `sharpness`."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    measured = []
    for kl in sharpness:
        control.before_step(optimizer, predicted * control.scale**2)  # as planned: with the scale of the last step
        measured.append(kl * (optimizer.param_groups[0]["lr"] / 2.0) ** 2)
        control.after_optimizer(optimizer)
        assert optimizer.param_groups[0]["lr"] == 2.0
        control.after_step(lambda: measured[-1], due=True)
    return measured


def test_the_learning_rate_follows_the_measured_kl_one_step_late():
    measured = walk(LearningRate(1e-3, predict=False), [1e-4, 1e-1, 1e-1, 1e-1, *[1e-5] * 5])
    assert measured[:2] == [1e-4, 1e-1]  # it can't know
    assert measured[2:4] == pytest.approx([0.9e-3, 0.9e-3])
    assert measured[4] < measured[5] < measured[8] == 1e-5  # back, at most twice as long a step each time


def test_the_prediction_keeps_the_budget_from_the_second_step_on():
    measured = walk(LearningRate(1e-3, predict=True), [1e-1] * 4, predicted=1e-5)
    assert measured[0] == 1e-1  # nothing was measured yet
    assert measured[1:] == pytest.approx([0.9e-3] * 3)


@pytest.mark.parametrize("name", ["learning_rate", "prediction"])
def test_a_control_goes_on_from_its_state(name):
    control = CONTROLS[name](1e-3)
    walk(control, [1e-1] * 3, predicted=1e-5)
    other = CONTROLS[name](1e-3)
    other.load_state_dict(control.state_dict())
    assert other.state_dict() == control.state_dict() != CONTROLS[name](1e-3).state_dict()
    assert walk(other, [1e-1], predicted=1e-5) == pytest.approx([0.9e-3])
