"""A stock trainer that is watched: CAPO's figures, and the same run bit for bit."""

from __future__ import annotations

import pytest
import torch
from test_trl import logs, trajectory
from trl import GRPOConfig, GRPOTrainer

from capo_rl import MonitorCallback


class MyTrainer(GRPOTrainer):
    """A user's own subclass."""

    steps_seen = 0

    def _compute_loss(self, model, inputs):
        self.steps_seen += 1
        return 2 * super()._compute_loss(model, inputs)


@pytest.mark.parametrize("own", [GRPOTrainer, MyTrainer])
def test_watching_a_stock_trainer_changes_nothing(build, own):
    stock = trajectory(build(own, GRPOConfig))
    trainer = build(own, GRPOConfig)
    trainer.add_callback(MonitorCallback(trainer))
    watched = trajectory(trainer)
    assert isinstance(trainer, own)
    assert type(trainer).__name__ == own.__name__
    assert watched[0] == stock[0]
    for one, other in zip(watched[1], stock[1], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(watched[2][name], stock[2][name]) for name in stock[2])
    for entry in trainer.state.log_history:
        if "loss" in entry:
            assert entry["capo/token/m_f/max"] > 0
            assert entry["capo/kl/measured"] > 0


def test_its_figures_are_those_of_the_monitor_mode(build):
    trainer = build(GRPOTrainer, GRPOConfig)
    trainer.add_callback(MonitorCallback(trainer, capo_top_k=7, capo_fisher_threshold=0.01, capo_kl_sample=1.0))
    callback = logs(trainer)
    mode = logs(build(capo_mode="monitor", capo_top_k=7, capo_fisher_threshold=0.01))
    for one, other in zip(callback, mode, strict=True):
        names = {name for name in one if name.startswith("capo/") and not name.endswith("seconds")}
        assert names == {name for name in other if name.startswith("capo/") and not name.endswith("seconds")}
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, nan_ok=True)


def test_a_subclass_keeps_its_own_loss(build):
    trainer = build(MyTrainer, GRPOConfig)
    trainer.add_callback(MonitorCallback(trainer))
    trainer.train()
    assert trainer.steps_seen == 10
    head = trainer.model.lm_head.weight
    state = trainer.optimizer.state[head]
    p, _ = trainer.planner.step.moments(torch.arange(len(head)))
    assert torch.nn.functional.cosine_similarity(p.flatten(), -state["exp_avg"].flatten(), dim=0) > 0.999


def test_a_stock_run_is_watched_from_its_checkpoint_on(build, tmp_path):
    stock = build(GRPOTrainer, GRPOConfig, save_strategy="steps", save_steps=3)
    stock.train()
    trainer = build(GRPOTrainer, GRPOConfig, save_strategy="steps", save_steps=3)
    trainer.add_callback(MonitorCallback(trainer))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert trainer.planner.step.steps == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capo_mode": "mask"}, "capo_mode='mask' would change the run"),
        ({"capo_advantage": "reward"}, "capo_advantage='reward' would change the run"),
        ({"capo_kl_budget": 1e-3}, "capo_kl_budget changes the run"),
        ({"top_k": 3}, "top_k: not a setting of CAPO's"),
        ({"capo_top_k": 0}, "capo_top_k=0 must be at least 1"),
    ],
)
def test_settings_that_would_change_the_run_are_refused(build, settings, message):
    with pytest.raises(ValueError, match=message):
        MonitorCallback(build(GRPOTrainer, GRPOConfig), **settings)


def test_translated_bounds_are_for_adam_whatever_form_optim_has(build):
    trainer = build(GRPOTrainer, GRPOConfig, optim="sgd")  # by now a member of an enumeration
    with pytest.raises(ValueError, match="capo_units='translated' is for the shifts of single tokens under Adam"):
        MonitorCallback(trainer, capo_units="translated")


def test_what_a_trainer_has_by_a_name_of_ours_is_not_taken_from_it(build):
    named = type("Named", (GRPOTrainer,), {"backbone": "of its own"})
    with pytest.raises(TypeError, match="Named has its own backbone"):
        MonitorCallback(build(named, GRPOConfig))


def test_only_a_stock_trainer_can_be_watched(build):
    with pytest.raises(TypeError, match="watches itself"):
        MonitorCallback(build())
    with pytest.raises(TypeError, match=r"watches trl\.GRPOTrainer"):
        MonitorCallback(object())
