"""Rival masks: the asked share of tokens, the right ones, and random numbers of their own."""

from __future__ import annotations

import pytest
import torch

from capo_rl import AdamStep
from capo_rl.curvature.last_layer import LastLayer, last_layer
from capo_rl.curvature.shifts import Shifts, shifts_along, token_direction
from capo_rl.testbed.rivals import RIVALS, rival


def tokens(n: int = 200, vocabulary: int = 20, seed: int = 0) -> tuple[LastLayer, torch.Tensor, Shifts, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 4, generator=generator)
    logits = 2 * torch.randn(n, vocabulary, generator=generator)
    layer = last_layer(hidden, logits, torch.randint(vocabulary, (n,), generator=generator), top_k=5)
    advantages = torch.randn(n, generator=generator)
    shifts = shifts_along(token_direction(layer, advantages, AdamStep(1e-2)), layer, advantages)
    before = (layer.log_pi_a + 0.3 * torch.randn(n, generator=generator)).clamp(max=0)
    return layer, advantages, shifts, before


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2])
def test_the_asked_share_is_rejected(name, rate):
    layer, advantages, shifts, before = tokens()
    keep = rival(name, rate)(layer, advantages, shifts, before)
    assert keep.dtype == torch.bool
    assert int((~keep).sum()) == round(rate * len(layer))


@pytest.mark.parametrize("name", RIVALS)
def test_tokens_without_advantage_are_kept(name):
    layer, advantages, shifts, before = tokens()
    advantages[:190] = 0
    keep = rival(name, 0.5)(layer, advantages, shifts, before)
    assert keep[:190].all()


def test_the_highest_scores_go():
    layer, advantages, shifts, before = tokens()
    rejected = ~rival("low_probability", 0.1)(layer, advantages, shifts, before)
    assert layer.log_pi_a[rejected].max() <= layer.log_pi_a[~rejected].min()
    rejected = ~rival("policy_shift", 0.1)(layer, advantages, shifts, before)
    assert shifts.m_f[rejected].min() >= shifts.m_f[~rejected].max()
    rejected = ~rival("stapo", 0.05)(layer, advantages, shifts, before)
    assert (advantages[rejected] > 0).all()
    rejected = ~rival("total_variation", 0.1)(layer, advantages, shifts, before)
    moved = layer.log_pi_a.exp() - before.exp()
    away = moved * advantages > 0
    assert away[rejected].all()
    assert moved[rejected].abs().min() >= moved[away & ~rejected].abs().max()


def test_fresh_rollouts_have_no_total_variation():
    layer, advantages, shifts, _ = tokens()
    assert rival("total_variation", 0.5)(layer, advantages, shifts, layer.log_pi_a).all()


def test_score_norm_is_the_closed_form():
    """‖e_a − π‖² = 1 − 2π_a + Σπ², over the whole vocabulary."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 9, generator=generator, dtype=torch.float64)
    actions = torch.randint(9, (30,), generator=generator)
    layer = last_layer(torch.ones(30, 1, dtype=torch.float64), logits, actions)
    pi = logits.softmax(-1)
    expected = 1 - 2 * pi[torch.arange(30), actions] + pi.square().sum(-1)
    rejected = ~rival("score_norm", 0.2)(layer, torch.ones(30), None, None)
    assert set(rejected.nonzero().flatten().tolist()) == set(expected.topk(6).indices.tolist())


def test_random_has_a_generator_of_its_own():
    layer, advantages, shifts, before = tokens()
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    one = rival("random", 0.1, seed=3)(layer, advantages, shifts, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, rival("random", 0.1, seed=3)(layer, advantages, shifts, before))
    assert not torch.equal(one, rival("random", 0.1, seed=4)(layer, advantages, shifts, before))


def test_unknown_names_and_rates_are_refused():
    with pytest.raises(ValueError, match="rival 'dice' is not one of random, low_probability"):
        rival("dice", 0.1)
    with pytest.raises(ValueError, match=r"rate=1.5 must lie in \[0, 1\]"):
        rival("random", 1.5)
