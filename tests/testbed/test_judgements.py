"""Judgements of a step in the control of the trust region: closed forms, and that a run steps as they say."""

from __future__ import annotations

import math
import runpy
from dataclasses import fields

import pytest
import torch
from test_rivals import tokens

from capo_rl.curvature.selection import select
from capo_rl.curvature.shifts import Shifts, token_shifts_of
from capo_rl.curvature.step import AdamStep
from capo_rl.planning.planner import MicroBatch
from capo_rl.planning.trust_region import Steering
from capo_rl.testbed.judgements import BOUNDS, JUDGEMENTS, Judged, at_length, energy, judge, own_length, share
from conftest import ROOT


def step(lr):
    """The tokens of a step, as planned at a learning rate."""
    layer, advantages, *_ = tokens()
    shifts = token_shifts_of(layer, advantages, AdamStep(lr))
    weights = advantages / len(advantages)
    return MicroBatch(layer, advantages, shifts, ~shifts.nonfinite, advantages, weights)


def test_another_length_is_another_learning_rate():
    ours, theirs = at_length(step(1e-3).shifts, 0.3), step(3e-4).shifts
    for each in fields(Shifts):
        torch.testing.assert_close(getattr(ours, each.name), getattr(theirs, each.name), rtol=1e-3, atol=1e-9)


def test_learning_rates_are_read_from_results_that_have_them_and_reckoned_for_those_that_have_not():
    learning_rates = runpy.run_path(str(ROOT / "experiments" / "judgements.py"))["learning_rates"]
    curves = {"step": [1, 2, 3, 4], "capo/scale": [1.0, None, 0.5, 1.0]}
    run = {"curves": curves, "settings": {"learning_rate": 1e-2, "warmup_steps": 0.25}}
    assert learning_rates(run) == pytest.approx([0.0, 0.0, 3.75e-3, 2.5e-3])
    curves["capo/learning_rate"] = [1e-5, None, 3e-5, 4e-5]
    assert learning_rates(run) == [1e-5, 0.0, 3e-5, 4e-5]


def share_by_hand(batch):
    """The share of the squared norm of Σ w u hᵀ that the tokens in bounds have, with dense gradients."""
    keep = select(batch.shifts, BOUNDS)
    size = int(batch.layer.support.max()) + 1
    u = torch.zeros(batch.tokens, size).scatter_add_(1, batch.layer.support, batch.layer.u.float())
    dense = torch.einsum("n,nv,nd->nvd", batch.weights.float(), u, batch.layer.hidden.float())
    return float(dense[keep].sum(0).norm() / dense.sum(0).norm())


@pytest.mark.parametrize("planned", [1e-4, 3e-3])
def test_the_share_is_that_of_the_tokens_in_bounds_at_the_allowed_length(planned):
    found = {lr: share(step(planned), planned, lr, {}) for lr in (1e-5, 1e-3, 3e-3, 1e-2)}
    assert found == pytest.approx({lr: share_by_hand(step(lr)) for lr in found}, rel=1e-4)
    assert found[1e-5] == 1 and min(found.values()) < 1


def test_its_own_length_is_the_largest_that_agrees_with_itself():
    batch = step(1e-3)
    for allowed in (1e-5, 3e-3, 1e-1):
        length = own_length(batch, 1e-3, allowed, {})
        rho = share(batch, 1e-3, allowed * length, {})
        assert length <= rho or length < 0.03
        if length < 1:
            assert share(batch, 1e-3, allowed * length / 0.8, {}) < length / 0.8


def test_the_energy_in_bounds_at_its_length():
    batch = step(1e-3)
    longest = energy(batch, 1e-3, math.nan, {})
    own = batch.weights.square() * batch.layer.u.square().sum(-1) * batch.layer.hidden.square().sum(-1)
    kept = [float(own[select(step(longest * way).shifts, BOUNDS)].sum() / own.sum()) for way in (0.98, 1.02)]
    assert kept[0] >= 0.9 > kept[1]


def test_a_judgement_of_one_is_the_default():
    ours, theirs = Judged(1e-3, 1e-6, None), Steering(1e-3, 1e-6, None)
    for kl in (1e-9, 1e-8, math.nan, 1e-6):
        updates = [control.after_step(1e-3 * control.scale(1e-3), lambda kl=kl: kl) for control in (ours, theirs)]
        assert str(updates[0]) == str(updates[1]) and ours.state_dict() == theirs.state_dict()


def test_the_control_learns_the_kl_of_a_step_of_length_one():
    control = Judged(1e-3, 1e-3, None)
    for judged in (0.5, 2.0, 0.25):
        control.judged = judged
        lr = control.scale(1.0)
        assert lr == pytest.approx(control.limit * judged)
        control.after_step(lr, lambda lr=lr, judged=judged: 7.0 * (lr / judged) ** 2)
    assert control.limit == pytest.approx(math.sqrt(1e-4 / 7.0))


@pytest.mark.parametrize("name", list(JUDGEMENTS))
def test_a_run_steps_as_judged(build, name):
    at_once = {"capo_kl_start": 1.0, "capo_kl_budget": 10.0, "learning_rate": 2e-3, "warmup_steps": 1}  # the first: 0
    trainer = build(capo_mode="trust_region", capo_watch=True, max_steps=4, gradient_accumulation_steps=1, **at_once)
    judge(trainer, name)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "capo/share" in entry]
    assert len(logged) == 4 and all(entry["capo/share"] > 0 for entry in logged)
    assert len({entry["capo/share"] for entry in logged}) > 1
