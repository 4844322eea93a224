"""The default with and without the curvature model beside it: the same weights, and no figure that was not computed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from test_distributed import run
from test_trl import leave_out, logs

from capo_rl import AdaptThresholds
from capo_rl.cli.training import _show
from capo_rl.runs.plots import draw_comparison, draw_run
from capo_rl.runs.records import summarize
from conftest import make_model, wants_even_words

# Budgets that some updates are over, so that the measurement decides the length of steps and what is taken back.
HELD = {"capo_mode": "trust_region", "capo_kl_budget": 1e-3, "capo_kl_start": 1.0, "capo_kl_sample": 0.25}
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.1, init_lora_weights=False)


def both(build, prepare=lambda trainer: None, **settings) -> list:
    """The same run with and without `capo_watch`."""
    runs = []
    for watch in (True, False):
        trainer = build(capo_watch=watch, **HELD | {"max_steps": 4} | settings)
        prepare(trainer)
        runs.append((trainer, logs(trainer)))
    return runs


def assert_same_run(runs) -> None:
    (one, watched), (other, bare) = runs
    for (name, mine), theirs in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(watched, bare, strict=True):
        same = {name for name in theirs if not name.startswith("capo/missing_mass") and "seconds" not in name}
        same -= {"train_runtime", "step_time"}
        assert {name: mine.get(name) for name in same} == {name: theirs[name] for name in same}


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "2 uses": {"num_iterations": 2},
    "LoRA with dropout": {"peft_config": LORA, "learning_rate": 0.1},
    "every completion measured": {"capo_kl_sample": 1.0},
    "truncated completions masked": {"mask_truncated_completions": True},
    "only taken back": {"capo_kl_control": "copy"},
    "SGD": {"optim": "sgd", "learning_rate": 1.0},
    "bfloat16": {"bf16": True},
    "a reference, 5 rows": {"beta": 0.05, "capo_top_k": 5},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_weights_are_those_of_a_watched_run_bit_for_bit(build, settings):
    runs = both(build, **settings)
    assert_same_run(runs)
    fractions = [entry.get("capo/kl/fraction", 1.0) for entry in runs[1][1]]
    scales = [entry["capo/scale"] for entry in runs[1][1]]
    assert min(fractions) < 1 or min(scales) < 1  # the measurement decided something


def test_a_step_without_tokens_and_one_without_advantages_are_the_same_too(build):
    def rewards(completions, trainer_state=None, **_):
        alike = trainer_state.global_step == 2
        return [1.0] * len(completions) if alike else wants_even_words(completions)

    runs = both(build, lambda trainer: leave_out(trainer, lambda step, row: step == 1), rewards=rewards)
    assert_same_run(runs)
    assert [entry["capo/steps_skipped"] for entry in runs[1][1]] == [0, 1, 1, 1]
    assert runs[1][1][2]["grad_norm"] == 0
    one, other = (trainer.optimizer_steps.budget.state_dict() for trainer, _ in runs)
    assert one == other


def test_two_processes_are_the_same_too(tmp_path):
    watched, bare = (run(tmp_path / str(watch), 2, capo_watch=watch, **HELD) for watch in (True, False))
    for one, other in zip(watched, bare, strict=True):
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name
    assert all("capo/token/m_f/mean" not in step for step in bare[0]["figures"])


def test_nothing_of_the_last_layer_is_computed_beside_the_measured_tokens(build, monkeypatch):
    """By default half of what a step cost on a GPU went into figures that decide nothing."""
    seen = []
    trainer = build(**HELD | {"max_steps": 2})
    head = trainer.backbone.head

    def counted(model):
        found = head(model)
        last_layer = type(found).last_layer

        class Counted(type(found)):
            def last_layer(self, hidden, actions, **settings):
                seen.append(len(hidden))
                return last_layer(self, hidden, actions, **settings)

        return Counted(found.weight, found.bias, found.scale, found.autocast)

    trainer.backbone.head = counted
    for name in ("planner.token_shifts_of", "planner.row_gradient", "step_figures.subset_direction"):
        monkeypatch.setattr(f"capo_rl.planning.{name}", lambda *_, **__: pytest.fail("computed a prediction"))
    entries = logs(trainer)
    assert trainer.planner is None
    assert len(seen) == 4 and seen[0] + seen[1] <= 12 and seen[2] + seen[3] <= 12  # two completions of eight in a step
    assert [entry["capo/missing_mass/above_bound"] for entry in entries]


def test_no_figure_is_logged_that_was_not_computed(build):
    entries = logs(build(**HELD | {"max_steps": 3, "learning_rate": 1e-3}))
    for entry in entries:
        names = {name for name in entry if name.startswith("capo/")}
        assert names == {
            *("capo/completions", "capo/steps_skipped", "capo/steps_skipped/nonfinite", "capo/rewards_missing"),
            *("capo/scale", "capo/learning_rate", "capo/seconds", "capo/kl/seconds"),
            *("capo/kl/measured", "capo/kl/proposed", "capo/kl/fraction"),
            *("capo/missing_mass/mean", "capo/missing_mass/max", "capo/missing_mass/above_bound"),
            *({"capo/kl/noise"} if entry is entries[0] else ()),
        }
        assert all(math.isfinite(entry[name]) for name in names)


def test_what_needs_the_figures_says_what_to_set(build):
    with pytest.raises(ValueError, match=r"capo_tokens_every.*capo_watch=True"):
        build(capo_mode="trust_region", capo_tokens_every=1)
    build(capo_mode="trust_region", capo_tokens_every=1, capo_watch=True)
    with pytest.raises(ValueError, match=r"AdaptThresholds: capo_watch=False"):
        AdaptThresholds(build(capo_mode="trust_region"), 0.05)


def test_an_optimizer_of_which_nothing_is_predicted_is_no_matter(build, caplog):
    trainer = build(optim="adafactor", max_steps=1, **HELD)
    assert "neither Adam's step nor SGD's" not in caplog.text
    trainer.train()
    assert "neither Adam's step nor SGD's" not in caplog.text


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_the_other(build, tmp_path, caplog, first):
    saves = {"save_strategy": "steps", "save_steps": 3}
    whole = build(capo_watch=first, **HELD | saves | {"max_steps": 6})
    whole.train()
    resumed = build(capo_watch=not first, **HELD | saves | {"max_steps": 6})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, mine), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert ("has no moments of a step model" in caplog.text) == (not first)


def test_hidden_states_that_are_not_those_of_the_loss_raise(build):
    trainer = build(**HELD)
    head = trainer.backbone.head
    trainer.backbone.head = lambda model: replace(head(model), scale=2.0)
    with pytest.raises(RuntimeError, match="differ from the loss's"):
        trainer.train()


def test_a_long_tail_is_still_told(build, caplog):
    build(model=make_model(), **HELD | {"capo_top_k": 1, "capo_max_missing_mass": 0.01, "max_steps": 1}).train()
    assert "outside the top k=1" in caplog.text


def test_curves_and_the_closing_table_have_what_was_logged_and_no_more(build, tmp_path, capsys):
    bare, watched = (
        logs(build(capo_watch=watch, **HELD | {"max_steps": 2, "gradient_accumulation_steps": 1}))
        for watch in (False, True)
    )
    for entries, there in ((bare, False), (watched, True)):
        draw_run(entries, tmp_path / "run.svg", title="")
        drawn = (tmp_path / "run.svg").read_text()
        assert "mean reward" in drawn and "KL of each update" in drawn
        for title in ("share of tokens out of bounds", "m_F, of the policy", "m_H, of the objective"):
            assert (title in drawn) == there
        _show(summarize(entries), "run", [])
        assert ("tokens rejected" in capsys.readouterr().out) == there
    draw_comparison({"bare": bare, "watched": watched}, tmp_path / "both.svg", title="")
    assert "m_F, of the policy" in (tmp_path / "both.svg").read_text()
