"""Weights in half precision that round their updates away: the run says so, and stays the run it was."""

from __future__ import annotations

import logging

import pytest
import torch
from test_trl import assert_bitwise_equal, trajectory
from torch.optim import SGD
from trl import GRPOConfig, GRPOTrainer

from capo_rl import MonitorCallback
from capo_rl.trainers.rounding import _SAMPLE, _sample
from conftest import make_model

AWAY = "capo/updates_rounded_away"


def half(dtype=torch.bfloat16):
    return make_model().to(dtype)


def shares(trainer) -> dict[int, float]:
    """The share at each step that has one."""
    trainer.train()
    return {entry["step"]: entry[AWAY] for entry in trainer.state.log_history if AWAY in entry}


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "rounded away" in record.getMessage()]


@pytest.mark.parametrize("mode", ["off", "monitor", "mask"])
def test_a_learning_rate_below_the_weights_last_place_is_named_once(build, caplog, mode):
    trainer = build(model=half(), capo_mode=mode, learning_rate=1e-6, max_steps=10)
    with caplog.at_level(logging.WARNING):
        found = shares(trainer)
    assert found.keys() == {2, 10}
    assert all(0.95 < share <= 1 for share in found.values())
    (message,) = warned(caplog)
    assert message.startswith("step 2: ")
    for said in ("bfloat16", "learning_rate of 1e-06", "dtype: float32, bf16: true"):
        assert said in message


def test_a_stock_trainer_that_is_watched_is_told(build, caplog):
    trainer = build(GRPOTrainer, GRPOConfig, model=half(), learning_rate=1e-6, max_steps=2)
    trainer.add_callback(MonitorCallback(trainer))
    with caplog.at_level(logging.WARNING):
        assert shares(trainer)[2] > 0.95
    assert len(warned(caplog)) == 1


def test_the_share_is_that_of_all_weights_with_a_gradient(build):
    """A sample of every tensor here is the tensor itself, and SGD's update is known before it is taken."""
    trainer = build(model=half(), capo_mode="off", optim="sgd", max_grad_norm=0.0, max_steps=2)
    lost = []
    step = SGD.step

    def watched(self, *args, **kwargs):
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        before = [weight.detach().clone() for weight in weights]
        result = step(self, *args, **kwargs)
        moving = torch.cat([(weight.grad != 0).flatten() for weight in weights])
        same = torch.cat([(weight == old).flatten() for weight, old in zip(weights, before, strict=True)])
        lost.append((same & moving).sum().item() / moving.sum().item())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGD, "step", watched)
        found = shares(trainer)
    assert 0 < found[2] < 1
    assert found[2] == pytest.approx(lost[1])


def test_updates_that_arrive_are_not_warned_of(build, caplog):
    with caplog.at_level(logging.WARNING):
        found = shares(build(model=half(), capo_mode="off", learning_rate=3e-2, max_steps=2))
    assert 0 < found[2] < 0.5
    assert not warned(caplog)


def test_weights_in_float32_are_not_looked_at(build, caplog):
    with caplog.at_level(logging.WARNING):
        assert shares(build(capo_mode="off", learning_rate=1e-12, max_steps=2)) == {}
    assert not warned(caplog)


def test_a_slow_start_is_waited_for(build, caplog):
    """At the second step the trust region has a 512th of the learning rate, at the tenth half of it."""
    trainer = build(
        model=half(), capo_mode="trust_region", learning_rate=3e-2, max_steps=10, capo_kl_budget=1e3, capo_kl_sample=1.0
    )
    with caplog.at_level(logging.WARNING):
        found = shares(trainer)
    assert found[2] > 0.5 > found[10]
    assert not warned(caplog)


def test_an_optimizer_whose_small_updates_add_up_is_left_alone(build, caplog):
    class Kahan(SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            for group in self.param_groups:
                group["use_kahan_summation"] = True

    model = half()
    trainer = build(model=model, capo_mode="off", max_steps=2, optimizers=(Kahan(model.parameters(), 1e-6), None))
    with caplog.at_level(logging.WARNING):
        assert shares(trainer) == {}
    assert not warned(caplog)


def test_watching_half_precision_changes_nothing(build):
    stock = trajectory(build(GRPOTrainer, GRPOConfig, model=half()))
    for mode in ("off", "monitor"):
        assert_bitwise_equal(trajectory(build(model=half(), capo_mode=mode)), stock)


def test_a_large_matrix_is_sampled_over_its_columns():
    columns = torch.arange(512).expand(1024, 512).contiguous()
    sample = _sample(columns)
    assert len(sample) <= _SAMPLE + 1
    assert len(sample.unique()) == 512
