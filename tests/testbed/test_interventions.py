"""What experiments put in a method's place does what it says."""

from __future__ import annotations

import json

import pytest
import torch
from test_rivals import tokens
from transformers import TrainerCallback

from capo_rl.curvature.selection import Thresholds
from capo_rl.testbed.bench import Bench, BenchError, _scales
from capo_rl.testbed.interventions import Scales, WholeSecondMoment, one_sign


def test_one_sign_judges_only_its_tokens():
    layer, advantages, shifts, before = tokens()
    none = Thresholds(fisher=0.0, hessian=None)
    for sign, judged in (("positive", advantages > 0), ("negative", advantages < 0)):
        keep = one_sign(none, sign)(layer, advantages, shifts, before)
        assert torch.equal(keep, ~judged | (shifts.m_f == 0))


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_scales_are_those_of_the_steps(build, scale):
    runs = []
    for lengths in ([1.0, 1.0], [1.0, scale]):
        weights = Weights()
        build(capo_mode="monitor", max_steps=2, warmup_steps=0, callbacks=[Scales(lengths), weights]).train()
        runs.append(weights.seen)
    (first, whole), (same, part) = runs
    assert torch.equal(first, same) and not torch.equal(first, whole)
    torch.testing.assert_close(part - first, scale * (whole - first), rtol=1e-2, atol=1e-7)


def test_another_runs_lengths(tmp_path):
    bench = Bench("what", "", {}, (1, 2, 3))
    asked = {"of": "main", "arm": "A B", "how": "yoked"}
    with pytest.raises(BenchError, match="run `capo bench main --only 'A B'` first"):
        _scales(bench, 3, tmp_path, **asked)
    (tmp_path / "main" / "a-b").mkdir(parents=True)
    for seed in bench.seeds:
        curves = {"capo/scale": [0.1 * seed, 0.2 * seed], "capo/kl/fraction": [None, 0.5]}
        (tmp_path / "main" / "a-b" / f"{seed}.json").write_text(json.dumps({"curves": curves}))
    assert _scales(bench, 3, tmp_path, **asked) == pytest.approx([0.1, 0.1])
    assert _scales(bench, 3, tmp_path, **asked | {"how": "constant"}) == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
def test_the_second_moment_is_that_of_all_tokens(build, max_grad_norm):
    """q after one step is (1 − β₂) of the squared gradient of TRL's loss, whatever was rejected; p is the mask's."""
    settings = {"max_steps": 1, "max_grad_norm": max_grad_norm, "gradient_accumulation_steps": 1}
    plain = build(capo_mode="monitor", **settings)
    plain.train()
    bounds: dict = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": 0.05}
    masked = build(capo_mode="mask", **bounds, **settings)
    masked.train()
    both = build(capo_mode="mask", **bounds, **settings)
    whole = WholeSecondMoment(both)
    both.add_callback(whole)
    both.train()
    assert 0 < both.state.log_history[0]["capo/rejection_rate"] < 1
    length = _clipping(both) * both.state.log_history[0]["grad_norm"]
    seen = 0
    for ours, of_mask, of_all in zip(
        both.model.parameters(), masked.model.parameters(), plain.model.parameters(), strict=True
    ):
        state = both.optimizer.state[ours]
        torch.testing.assert_close(state["exp_avg"], masked.optimizer.state[of_mask]["exp_avg"])
        unclipped = plain.optimizer.state[of_all]["exp_avg_sq"] / _clipping(plain) ** 2
        expected = unclipped * _clipping(both) ** 2
        torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=1e-2, atol=5e-9 * length**2)
        seen += int(state["exp_avg_sq"].count_nonzero())
    assert seen


def _clipping(trainer) -> float:
    if not (most := trainer.args.max_grad_norm):
        return 1.0
    return min(1.0, most / (trainer.state.log_history[0]["grad_norm"] + 1e-6))
