"""A run that stops at any step and resumes ends with the weights, moments and counts of one that did not stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from capo_rl import CAPOTrainer
from capo_rl.runs.saved_state import STATE_FILE
from capo_rl.trainers.state import ROLLOUTS_FILE

SOME = {"capo_fisher_threshold": 0.01, "capo_hessian_low": -0.2, "capo_hessian_high": 0.2}


def final(trainer) -> dict[str, torch.Tensor]:
    tensors = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    tensors["completions"] = torch.tensor(trainer.completions)
    if trainer.planner is not None:
        tensors |= trainer.planner.step.state_dict()
        tensors["accepted"] = torch.tensor(trainer.planner.accepted_tokens)
    return tensors


@pytest.mark.parametrize(
    "settings",
    [
        {"capo_mode": "mask"},
        {"capo_mode": "mask", "capo_step": "sgd"},
        {"capo_mode": "mask", "capo_moments": "bfloat16"},
        {"capo_mode": "mask", "num_iterations": 3, "capo_kl_budget": 1e-3, "capo_kl_control": "copy"},
        {"capo_mode": "mask", "capo_kl_budget": 1e-3, "capo_kl_control": "optimizer"},
        {"capo_mode": "trust_region"},
        {"capo_mode": "trust_region", "capo_watch": True},
        {"capo_mode": "mask", "capo_share": True},
        {"capo_mode": "shorten", "capo_kl_budget": 1e-3},
        {"capo_mode": "mask", "steps_per_generation": 6, "capo_granularity": "group"},
        {"capo_mode": "monitor", "beta": 0.05, "num_iterations": 2},
        {"capo_mode": "off", "num_iterations": 2},
    ],
    ids=str,
)
def test_resuming_changes_nothing(build, tmp_path, settings):
    settings = {**SOME, **settings, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = build(**settings)
    whole.train()
    expected = final(whole)
    assert sum(tensor.double().abs().sum() for tensor in expected.values()) > 0
    for stopped_at in (1, 4, 5):
        resumed = build(**settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stopped_at}"))
        actual = final(resumed)
        assert resumed.state.global_step == 6
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), f"{name} after stopping at step {stopped_at}"


def test_moments_load_onto_a_cpu_with_an_index(tmp_path):
    """Where transformers before 5.18 wants them in each of several processes on CPUs."""
    torch.save({"exp_avg": torch.ones(2)}, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 0), weights_only=True)
    assert loaded["exp_avg"].tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="don't know how to restore"):
        torch.load(tmp_path / "optimizer.pt", map_location="nowhere:0", weights_only=True)


def test_a_checkpoint_holds_rollouts_only_in_the_middle_of_their_use(build, tmp_path):
    build(num_iterations=2, max_steps=2, save_strategy="steps", save_steps=1, **SOME).train()

    def rollouts(step: int) -> Path:
        return tmp_path / "run" / f"checkpoint-{step}" / ROLLOUTS_FILE.format(process=0)

    assert rollouts(1).exists()
    assert not rollouts(2).exists()


def test_a_checkpoint_of_another_trainer_is_refused(build, tmp_path):
    build(max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="not a checkpoint of CAPOTrainer"):
        build(max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_another_step_model_is_refused(build, tmp_path):
    build(max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="another step model"):
        build(max_steps=2, capo_step="sgd").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


class Notes(CAPOTrainer):
    """Its rollouts have lists, as those with images do, whose lengths tell which image is whose."""

    note: ClassVar[Any] = ["one", 2, None]

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return output | {"notes": [[i, self.note] for i in range(len(inputs))]}

    def _compute_loss(self, model, inputs):
        self.seen = [*getattr(self, "seen", []), inputs["notes"]]
        return super()._compute_loss(model, inputs)


def test_lists_among_the_rollouts_come_back(build, tmp_path):
    settings = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, **SOME}
    whole = build(Notes, **settings)
    whole.train()
    resumed = build(Notes, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(whole.seen) == 8
    assert resumed.seen == whole.seen[6:]


def test_rollouts_that_a_checkpoint_cannot_hold_are_named(build, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Notes, "note", {1, 2})
    settings = {"num_iterations": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 3, **SOME}
    build(Notes, **settings).train()
    assert "still to be trained on have notes, which a checkpoint can't hold" in caplog.text
    resumed = build(Notes, **settings | {"max_steps": 4})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 4  # with completions that were generated anew
