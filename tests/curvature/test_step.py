"""The step models against `torch.optim`, and their state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from capo_rl import AdamStep, SGDStep
from capo_rl.curvature.last_layer import LastLayer, last_layer, row_gradient, support_rows


def tokens(seed: int, n: int = 5, d: int = 3, vocabulary: int = 40, top_k: int | None = 4) -> LastLayer:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    return last_layer(hidden, logits, torch.randint(vocabulary, (n,), generator=generator), top_k=top_k)


def dense(layer: LastLayer, weights: torch.Tensor, vocabulary: int = 40) -> torch.Tensor:
    """Σ w u hᵀ, one token and one row at a time."""
    total = torch.zeros(vocabulary, layer.hidden.shape[1], dtype=torch.float64)
    for i in range(len(layer)):
        for j in range(layer.support.shape[1]):
            total[layer.support[i, j]] += weights[i] * layer.u[i, j] * layer.hidden[i]
    return total


def test_row_gradient_is_the_sum_over_tokens_and_rows():
    layer, weights = tokens(0), torch.randn(5, dtype=torch.float64)
    gradient = row_gradient(layer, weights)
    expected = dense(layer, weights)
    torch.testing.assert_close(
        gradient.part(slice(0, len(gradient.rows))), expected[gradient.rows], rtol=1e-12, atol=1e-14
    )
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[gradient.rows] = False
    assert not expected[untouched].any()


def test_moments_of_touched_rows_equal_torch_adam_over_the_whole_vocabulary():
    step = AdamStep(0.1, betas=(0.8, 0.95), eps=1e-6)
    weight = torch.zeros(40, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for seed in range(6):
        layer, weights = tokens(seed), torch.randn(5, dtype=torch.float64)
        step.update(row_gradient(layer, weights), scale=0.5)
        weight.grad = -0.5 * dense(layer, weights)
        optimizer.step()
    p, q = step.moments(torch.arange(40))
    torch.testing.assert_close(p, -optimizer.state[weight]["exp_avg"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(q, optimizer.state[weight]["exp_avg_sq"], rtol=1e-12, atol=1e-15)
    assert 0 < len(step.rows) < 40  # and rows no token supports take no memory


def test_planning_changes_nothing():
    step = AdamStep(0.1)
    step.update(row_gradient(tokens(0), torch.ones(5, dtype=torch.float64)))
    before = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    step.plan(torch.randn(40, 3), torch.arange(40))
    assert all(torch.equal(before[name], tensor) for name, tensor in step.state_dict().items())


def test_state_restores_bit_for_bit_and_goes_on_alike():
    step = AdamStep(0.1)
    for seed in range(3):
        step.update(row_gradient(tokens(seed), torch.ones(5, dtype=torch.float64)))
    other = AdamStep(0.1)
    other.load_state_dict({name: tensor.clone() for name, tensor in step.state_dict().items()})
    for model in (step, other):
        model.update(row_gradient(tokens(9), torch.ones(5, dtype=torch.float64)))
    for name, tensor in step.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_rows_are_sorted_alike_whatever_their_numbers():
    """Below 2¹⁶ and above it another sort runs."""
    layer = tokens(0, n=9)
    few, many = (support_rows(replace(layer, support=layer.support + first)) for first in (0, 2**16))
    assert torch.equal(few.rows + 2**16, many.rows)
    assert (few.rows.diff() > 0).all()
    assert torch.equal(few.rows[few.pair], layer.support)
    for name in ("pair", "order", "start"):
        assert torch.equal(getattr(few, name), getattr(many, name))


def test_a_fresh_step_round_trips():
    step = AdamStep(0.1)
    step.load_state_dict(AdamStep(0.2).state_dict())
    assert step.steps == 0
    assert len(step.rows) == 0
    step.update(row_gradient(tokens(0), torch.ones(5, dtype=torch.float64)))
    assert len(step.rows) > 0


def test_an_update_without_tokens_only_decays():
    step = AdamStep(0.1, betas=(0.5, 0.5))
    step.update(row_gradient(tokens(0), torch.ones(5, dtype=torch.float64)))
    p, _ = step.moments(step.rows)
    step.update(row_gradient(tokens(0)[torch.zeros(5, dtype=torch.bool)], torch.zeros(0, dtype=torch.float64)))
    torch.testing.assert_close(step.moments(step.rows)[0], p / 2)
    assert step.steps == 2


def test_wrong_state_and_settings_are_refused():
    with pytest.raises(ValueError, match="another step model"):
        SGDStep(0.1).load_state_dict({"p": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lacks \['p', 'q', 'rows', 'steps'\]"):
        AdamStep(0.1).load_state_dict({})
    with pytest.raises(ValueError, match="betas"):
        AdamStep(0.1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps"):
        AdamStep(0.1, eps=0.0)
    two = row_gradient(tokens(0), torch.ones(5), support_rows(tokens(0), torch.tensor([0, 0, 1, 1, 1])))
    with pytest.raises(ValueError, match="several subsets"):
        AdamStep(0.1).update(two)


def test_moments_in_bfloat16_go_on_from_a_state_bit_for_bit():
    """Rounded at random in the order of storage, which is that in which rows were first seen."""

    def gradients():
        for first, seed in ((20, 0), (3, 1), (11, 2), (0, 3)):
            draw = torch.Generator().manual_seed(seed)
            hidden, logits = torch.randn(5, 4, generator=draw), torch.zeros(5, 30)
            logits[:, first : first + 6] = 9 + torch.randn(5, 6, generator=draw)
            layer = last_layer(hidden, logits, torch.full((5,), first), top_k=5)
            yield row_gradient(layer, torch.randn(5, generator=draw))

    through, stopped = (AdamStep(1e-2, moment_dtype=torch.bfloat16) for _ in range(2))
    for i, gradient in enumerate(gradients()):
        if i == 2:
            state, stopped = stopped.state_dict(), AdamStep(1e-2, moment_dtype=torch.bfloat16)
            stopped.load_state_dict(state)
        through.update(gradient)
        stopped.update(gradient)
    assert through.state_dict()["rows"].diff().min() < 0
    for name, tensor in through.state_dict().items():
        assert torch.equal(stopped.state_dict()[name], tensor)
