"""The share ρ of a step against dense gradients in float64, over sizes, steps and what is rejected."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_rl import AdamStep, SGDStep, Thresholds
from capo_rl.curvature.last_layer import last_layer, support_rows
from capo_rl.planning import micro_batch, step_figures
from capo_rl.planning import planner as planning
from capo_rl.planning.planner import Planner
from capo_rl.planning.share import Share, squared_norms


def dense_gradient(hidden, logits, actions, weights, temperature):
    """∇_W Σ w log π(a) of the softmax policy by autograd: logits are those at W, and W enters through W h alone."""
    head = torch.zeros(logits.shape[1], hidden.shape[1], dtype=torch.float64, requires_grad=True)
    log_pi = torch.log_softmax((logits + hidden @ head.T) / temperature, dim=-1)
    (gradient,) = torch.autograd.grad((weights * log_pi[torch.arange(len(actions)), actions]).sum(), head)
    return gradient


def tokens(seed: int, n: int, d: int, vocabulary: int):
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=draw, dtype=torch.float64),
        3 * torch.randn(n, vocabulary, generator=draw, dtype=torch.float64),
        torch.randint(vocabulary, (n,), generator=draw),
        torch.randn(n, generator=draw, dtype=torch.float64),
        torch.rand(n, generator=draw) < 0.7,
    )


@given(
    n=st.integers(0, 9),
    d=st.integers(1, 7),
    vocabulary=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 0.7, 1.3]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_norms_are_those_of_dense_gradients(n, d, vocabulary, temperature, seed):
    hidden, logits, actions, weights, keep = tokens(seed, n, d, vocabulary)
    layer = last_layer(hidden, logits, actions, temperature=temperature)
    norms = squared_norms(layer, torch.stack([weights * keep, weights]))
    for norm, each in zip(norms, (weights * keep, weights), strict=True):
        expected = dense_gradient(hidden, logits, actions, each, temperature).square().sum()
        torch.testing.assert_close(norm, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rejected", ["some", "all", "none", "one token"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_planner_keeps_the_share_of_the_whole_step(rejected, micro_batches):
    """ρ after four steps against dense gradients summed over micro-batches, with β₂'s memory written out."""
    beta2, clip, d, vocabulary = 0.9, 0.5, 3, 8
    planner = Planner(AdamStep(0.1, (0.9, beta2)), Thresholds(None, None), share=True)
    norms = []
    for step in range(4):
        gradients = torch.zeros(2, vocabulary, d, dtype=torch.float64)
        for part in range(micro_batches):
            n = 1 if rejected == "one token" else 6
            hidden, logits, actions, advantages, keep = tokens(10 * step + part, n, d, vocabulary)
            keep = {"all": torch.zeros_like(keep), "none": torch.ones_like(keep)}.get(rejected, keep)
            planner.rule = lambda *_, keep=keep: keep
            batch = planner.plan(hidden, logits, actions, advantages)
            # as a masked loss has them: the accepted under their own denominators, and the whole under those of all
            batch.weights = advantages * keep / max(1, int(keep.sum()))
            batch.whole = advantages / n
            for gradient, each in zip(gradients, (advantages * keep, advantages), strict=True):
                gradient += clip * dense_gradient(hidden, logits, actions, each / n, 1.0)
        planner.commit(clip)
        planner.clear()
        norms.append(gradients.square().sum((1, 2)))
    forgotten = torch.tensor([beta2**age for age in reversed(range(len(norms)))], dtype=torch.float64)
    accepted, everyone = (forgotten[:, None] * torch.stack(norms)).sum(0).tolist()
    assert planner.share.value == pytest.approx(min(1.0, math.sqrt(accepted / everyone)), rel=1e-10)
    assert {"all": planner.share.value == 0, "none": planner.share.value == 1}.get(rejected, True)


def test_an_sgd_step_has_no_share():
    assert Planner(SGDStep(0.1), Thresholds(), share=True).share is None


def test_norms_that_are_no_numbers_are_left_out_and_the_state_goes_on_alike():
    share, other = Share(0.9), Share(0.9)
    assert share.value == 1.0
    share.update(1.0, 4.0)
    share.update(math.nan, 1.0)
    share.update(1.0, math.inf)
    assert share.value == 0.5
    other.load_state_dict(share.state_dict())
    for each in (share, other):
        each.update(0.3, 0.7)
    assert share.state_dict() == other.state_dict()


@pytest.mark.parametrize(("silent", "times"), [(0, 1), (2, 2)])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_sorts_its_tokens_once(monkeypatch, silent, times, micro_batches):
    """For its figures, the share and the moments; the moments have rows of their own where a token has no weight."""
    sorted_tokens = []
    for module in (planning, micro_batch, step_figures):
        monkeypatch.setattr(module, "support_rows", lambda layer: sorted_tokens.append(layer) or support_rows(layer))
    planner = Planner(AdamStep(0.1), Thresholds(None, None), share=True)
    for seed in range(micro_batches):
        hidden, logits, actions, weights, _ = tokens(seed, 6, 3, 8)
        planner.plan(hidden, logits, actions, weights).weights = weights.where(torch.arange(6) >= silent, 0)
    planner.commit()
    assert len(sorted_tokens) == times
