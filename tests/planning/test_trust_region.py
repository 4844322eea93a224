"""Shortening an update to a KL budget, and the ways back along it."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capo_rl import TrustRegion
from capo_rl.planning.trust_region import (
    MEMORY,
    Backtracking,
    CopiedStep,
    RecomputedStep,
    Shortened,
    Steering,
    shorten,
    way_back,
)


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
    with pytest.raises(ValueError, match="use 'copy'"):
        RecomputedStep(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(ValueError, match="amsgrad"):
        RecomputedStep(torch.optim.AdamW([weight], lr=0.1, amsgrad=True))


def walk(control: Steering, sharpness: list[float], lr: float = 2.0) -> list[Shortened]:
    """What becomes of a series of steps whose KL at the whole learning rate would be `sharpness`."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    updates = []
    for kl in sharpness:
        scale = control.scale(lr)
        control.before_step(optimizer)
        updates.append(control.after_step(lr * scale, lambda kl=kl, scale=scale: kl * scale**2))
    return updates


def steering(budget: float = 1e-2, start: float = 1.0) -> Steering:
    return Steering(budget, first=2.0 * start, way=None)


def test_steps_have_a_tenth_of_the_budget_on_average_from_a_slow_start_on():
    measured = [update.measured for update in walk(steering(start=2**-10), [50.0] * 40)]
    assert measured[0] == pytest.approx(50 * 2**-20)
    assert measured[:5] == sorted(measured[:5])
    assert measured[1] == pytest.approx(4 * measured[0])  # twice the length
    assert measured[20:] == pytest.approx([1e-3] * 20)


@given(st.lists(st.floats(-9, 9), min_size=60, max_size=60))
def test_no_step_is_longer_than_the_one_before_it_allows(logs):
    """The moving mean κ̄ is at least 1 − m times its last entry, so KL ≤ B/10 · κ_{n+1} / ((1 − m) κ_n)."""
    control = steering()
    sharpness = [math.exp(x) for x in logs]
    for before, after, kl in zip(sharpness, sharpness[1:], walk(control, sharpness)[1:], strict=False):
        assert kl.measured <= 1.0001 * after / before * 1e-3 / (1 - MEMORY)


def test_the_learning_rate_is_never_above_the_schedules():
    assert [update.measured for update in walk(steering(), [1e-8] * 3)] == [1e-8] * 3


def test_one_large_step_shortens_those_after_it_and_they_come_back():
    control = steering()
    walk(control, [1e-3] * 10)
    before = control.limit
    walk(control, [1.0])
    assert control.limit < before / 10
    walk(control, [1e-3] * 60)
    assert control.limit == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_limit_that_went_to_nothing_comes_back(kl):
    control = steering()
    walk(control, [kl] * 200)
    assert 0 < control.limit < 1e-15
    assert walk(control, [1e-3] * 120)[-1].measured == pytest.approx(1e-3, rel=1e-2)


def test_a_warm_up_from_zero_says_nothing():
    control = steering(start=2**-10)
    control.before_step(None)
    control.after_step(0.0, lambda: 0.0)
    assert control.state_dict() == steering(start=2**-10).state_dict()
    assert control.scale(0.0) == 1.0


def test_steering_goes_back_from_an_update_above_the_budget_and_learns_from_the_whole_of_it():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    control = Steering(1e-2, first=1.0, way=way_back)
    weight.grad = torch.ones(1)
    control.before_step(optimizer)
    optimizer.step()
    update = control.after_step(1.0, lambda: weight.item() ** 2)
    assert update.proposed == pytest.approx(1.0)
    assert update.measured == pytest.approx(0.9e-2, rel=1e-3)
    assert weight.item() ** 2 == pytest.approx(update.measured)
    assert control.limit == pytest.approx(math.sqrt(1e-3))


def test_the_way_back_is_recomputed_where_that_is_exact():
    def way(dtype=torch.float32, kind=torch.optim.AdamW, **settings):
        weight = torch.zeros(1, dtype=dtype, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        return way_back(kind([weight], lr=0.1, **settings))

    assert isinstance(way(), RecomputedStep)
    assert isinstance(way(dtype=torch.bfloat16), CopiedStep)
    assert isinstance(way(amsgrad=True), CopiedStep)
    assert isinstance(way(kind=torch.optim.SGD), CopiedStep)


def test_steering_goes_on_from_its_state():
    control, other = steering(), steering(start=2**-10)
    walk(control, [1e-1] * 3)
    other.load_state_dict(control.state_dict())
    assert other.state_dict() == control.state_dict()
    assert walk(other, [1e-1] * 3) == walk(control, [1e-1] * 3)


OPTIMIZERS = [
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"fused": True, "lr": torch.tensor(0.5)}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.RMSprop, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS, ids=str)
def test_any_optimizer_is_held_and_its_learning_rates_stay_the_schedules(kind, settings):
    """The 'KL' is the squared distance from the weights before the step, so it can be checked by looking."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    groups = [
        {"params": weights[:1]},
        {"params": weights[1:], "lr": torch.tensor(0.25) if "fused" in settings else 0.25},
    ]
    optimizer = kind(groups, **({"lr": 0.5} | settings))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    region = TrustRegion(optimizer, budget=1e-3)
    updates = []
    for step in range(20):
        before = [weight.detach().clone() for weight in weights]

        @torch.no_grad()
        def measure(before=before):
            return float(sum((new - old).square().sum() for new, old in zip(weights, before, strict=True)))

        for weight in weights:
            weight.grad = torch.randn_like(weight)
        asked = region.lr(weights[1])
        scale = region.before_step()
        assert region.scale == scale <= 1
        assert float(optimizer.param_groups[1]["lr"]) == region.lr(weights[1]) == pytest.approx(asked)
        optimizer.step()
        updates.append(region.after_step(measure))
        assert updates[-1].measured == measure()
        assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.25 * 0.9**step)
        schedule.step()
    assert all(update.measured <= 1e-3 for update in updates)
    assert max(update.measured for update in updates) > 1e-5


def test_a_share_shortens_a_step_without_a_budget_and_nothing_is_measured():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    region = TrustRegion(optimizer, budget=None)
    weight.grad = torch.ones(1)
    assert region.before_step(share=0.5) == 0.5
    optimizer.step()
    assert region.after_step(measure=None) is None
    assert weight.item() == pytest.approx(0.95)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert region.state_dict() == {}


def test_a_trust_region_goes_on_from_its_state():
    def region():
        return TrustRegion(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))

    one, other = region(), region()
    one.before_step()
    one.after_step(lambda: 1e-9)
    other.load_state_dict(one.state_dict())
    assert one.scale == other.scale == 2 * region().scale


def test_the_slow_start_is_a_share_of_the_rate_that_a_warm_up_leads_to():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    assert optimizer.param_groups[0]["lr"] == 0
    assert TrustRegion(optimizer).state_dict()["limit"] == 2**-10


class ChoosesItsOwnRate(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})


def sgd(lr=0.1):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def before_twice(*_):
    region = TrustRegion(sgd())
    region.before_step()
    region.before_step()


# As docs/refusals.md lists them, with what raises each.
REFUSED = {
    "has no lr, by which the length of a step is steered": lambda *_: TrustRegion(ChoosesItsOwnRate([torch.zeros(1)])),
    "has no param_groups: give the torch.optim.Optimizer": lambda *_: TrustRegion([torch.zeros(1)]),
    "must be above 0 nats a token": lambda *_: TrustRegion(sgd(), budget=0),
    "every lr of the optimizer is 0": lambda *_: TrustRegion(sgd(lr=0.0)),
    "before_step was called twice": before_twice,
    "after_step came without before_step": lambda *_: TrustRegion(sgd()).after_step(lambda: 0.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_loop_that_misuses_it_is_told_at_once(message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(message)):
        REFUSED[message]()


def test_a_step_that_is_not_measured_is_given_back():
    region = TrustRegion(sgd())
    for _ in range(2):
        region.before_step()
        region.restore()
        assert region.optimizer.param_groups[0]["lr"] == 0.1


def test_an_update_that_cannot_be_held_is_undone_and_told_after_ten(caplog):
    optimizer = sgd()
    region = TrustRegion(optimizer, Backtracking(1e-3, CopiedStep))
    (weight,) = optimizer.param_groups[0]["params"]
    for _ in range(10):
        assert "steps in a row" not in caplog.text
        weight.grad = torch.ones(1)
        region.before_step()
        optimizer.step()
        assert region.after_step(lambda: math.nan).fraction == 0
    assert weight.item() == 0
    assert "10 steps in a row were over the budget of 0.001 nats" in caplog.text


@pytest.mark.parametrize(("noise", "told"), [(1e-9, False), (1e-3, True), (math.nan, True)])
def test_noise_that_is_too_much_for_the_budget_is_told(caplog, noise, told):
    assert TrustRegion(sgd()).check_noise(lambda: noise) is noise
    assert ("rounding alone looks like a KL" in caplog.text) == told
    caplog.clear()
    TrustRegion(sgd(), budget=None).check_noise(lambda: noise)
    assert not caplog.text
