"""`CAPOTrainer` with other trainers' losses, and with GRPOTrainer's own way to be called."""

from __future__ import annotations

import math

import pytest
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from capo_rl import CAPOConfig, CAPOTrainer, MonitorCallback
from conftest import SETTINGS, make_model, make_tokenizer, prompts, wants_even_words


class Both(CAPOTrainer, GMPOTrainer):
    """CAPO, around a loss that takes an advantage for each sequence."""


SQUARE = {"max_completion_length": 4, "max_steps": 3}  # as many tokens as completions: nothing fails by its shape
SOME = {"capo_fisher_threshold": 0.01, "capo_hessian_low": -0.2, "capo_hessian_high": 0.2}
OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None}


@pytest.mark.parametrize("settings", [{}, {"capo_share": True}, {"capo_soft": True}, {"capo_penalty": 1.0}], ids=str)
def test_a_foreign_loss_is_refused_where_advantages_are_written(build, settings):
    with pytest.raises(
        TypeError, match="and the loss is GMPOTrainer's, which may take one for a sequence: use capo_mode="
    ):
        build(Both, capo_mode="mask", **SQUARE, **settings)


@pytest.mark.parametrize("mode", ["off", "monitor", "trust_region", "shorten"])
def test_a_foreign_loss_works_where_advantages_are_left_alone(build, mode):
    trainer = build(Both, capo_mode=mode, **SOME, **SQUARE)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    if mode != "off":
        assert all(entry["capo/kl/measured"] > 0 for entry in entries)
    if mode == "trust_region":
        assert all(entry["capo/kl/measured"] <= trainer.args.kl_budget for entry in entries)


def test_monitoring_a_foreign_loss_changes_nothing(build):
    watched = build(Both, capo_mode="monitor", max_steps=3)
    watched.train()
    plain = build(GMPOTrainer, capo_mode="off", max_steps=3)
    plain.train()
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert (ours == theirs).all()
    called_back = build(GMPOTrainer, GMPOConfig, epsilon=0.2, max_steps=3)
    called_back.add_callback(MonitorCallback(called_back))
    called_back.train()
    for ours, theirs in zip(called_back.model.parameters(), plain.model.parameters(), strict=True):
        assert (ours == theirs).all()


def test_a_budget_holds_with_a_foreign_loss(build):
    """At a rate that is far too high, so that there is something to hold."""
    trainer = build(Both, capo_mode="trust_region", capo_kl_budget=1e-4, capo_kl_start=1.0, learning_rate=0.1)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "capo/kl/measured" in entry]
    assert max(entry["capo/kl/proposed"] for entry in entries) > 1e-4
    assert all(entry["capo/kl/measured"] <= 1e-4 for entry in entries)


@pytest.mark.parametrize("share", [False, True])
def test_a_loss_that_takes_one_advantage_a_sequence_never_trains_in_silence(build, monkeypatch, share):
    """In the place of TRL's own, where no class tells. Nothing is rejected, so that no other check sees it."""
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", GMPOTrainer._compute_loss)
    with pytest.raises(RuntimeError, match="a token's gradient is not that of its own advantage"):
        build(capo_mode="mask", capo_share=share, **SQUARE, **OPEN).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 3, "learning_rate": 0.05, "epsilon": 0.01},
        {"num_iterations": 3, "learning_rate": 0.05, "delta": 1.1},
        {"top_entropy_quantile": 0.5},
        {"num_iterations": 2, "off_policy_mask_threshold": 1e-3},
        {"entropy_coef": 0.1},
        {"bf16": True},
        {"loss_type": "dapo", "gradient_accumulation_steps": 2},
        {"loss_type": "bnpo"},
    ],
    ids=str,
)
def test_trls_own_loss_passes_that_check(build, settings):
    trainer = build(capo_mode="mask", capo_fisher_threshold=0.01, **({"max_steps": 4} | settings))
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_a_loss_that_goes_around_is_refused(build):
    class Around(CAPOTrainer):
        def _compute_loss(self, model, inputs):
            return GRPOTrainer._compute_loss(self, model, inputs)

    for mode in ("mask", "trust_region", "monitor"):
        with pytest.raises(RuntimeError, match="Around's loss went around CAPOTrainer's"):
            build(Around, capo_mode=mode).train()


def test_a_loss_that_adds_to_capos_own_is_let_be(build):
    class Adding(CAPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) + 0.0

    build(Adding, capo_mode="mask", max_steps=1).train()


@pytest.mark.parametrize("trainer", [CAPOTrainer, Both])
def test_arguments_are_grpotrainers_by_place_too(tmp_path, trainer):
    args = CAPOConfig(str(tmp_path), **SETTINGS)
    made = trainer(make_model(), wants_even_words, args, prompts(8), None, make_tokenizer())
    assert len(made.train_dataset) == 8
    with pytest.raises(TypeError, match=r"multiple values for .*train_dataset"):
        trainer(make_model(), wants_even_words, args, prompts(8), train_dataset=prompts(8))
    with pytest.raises(TypeError, match="too many positional arguments"):
        trainer(make_model(), wants_even_words, args, *[None] * 20)
