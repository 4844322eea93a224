"""The example of a loop of one's own equals the trainer on the same rollouts."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from capo_rl import CAPOConfig, CAPOTrainer
from capo_rl.runs.models import load_model, load_tokenizer
from conftest import SETTINGS
from test_examples import EXAMPLES, example

own_loop = example("own_loop")


def test_capo_takes_a_dozen_lines():
    lines = (EXAMPLES / "own_loop.py").read_text().splitlines()
    marked = [line for line in lines if line.endswith("  # CAPO")]
    assert 0 < len(marked) <= 12
    names = re.compile(r"\b(planner|planned|region|Planner|TrustRegion|Head)\b")
    assert [line for line in lines if names.search(line) and line not in marked] == []
    assert len(lines) < 140


# Learning rates at which some tokens are out of bounds, and where updates would be over the budget.
RATES = {"mask": 5e-4, "shorten": 5e-4, "trust_region": 4.0}


@pytest.mark.parametrize("mode", RATES)
def test_a_loop_of_ones_own_equals_the_trainer_on_the_same_rollouts(tmp_path, monkeypatch, mode):
    """Four steps on the embedded model in double precision: verdicts, share, KL and weights."""
    data = Dataset.from_list([{"prompt": f"Compute {i}+{i + 1}-{i + 2} mod 10.\n"} for i in range(8)])
    settings = SETTINGS | {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 16,
        "max_steps": 4,
        "logging_steps": 4,
        "learning_rate": RATES[mode],
        "optim": "adamw_torch",
        # TRL's loss is in single precision, whose rounding a smaller epsilon makes large where gradients are small
        "adam_epsilon": 1e-4,
        "capo_kl_sample": 1.0,
        "capo_watch": True,  # the loop's planner predicts too
    }
    trainer = CAPOTrainer(
        model=load_model("embedded").double(),
        reward_funcs=lambda completions, **_: [float(len(each) % 5) for each in completions],
        args=CAPOConfig(output_dir=str(tmp_path), capo_mode=mode, **settings),
        train_dataset=data,
        processing_class=load_tokenizer("embedded"),
    )
    rollouts, expected = [], []
    compute = trainer._compute_loss

    def compute_loss(model, inputs):
        rollouts.append(
            own_loop.Rollouts(
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_mask"].bool(),
                inputs["advantages"].double(),
            )
        )
        return compute(model, inputs)

    class Expect(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.keep, self.share = trainer.planner.micro_batches[0].keep, trainer.planner.share

        def on_step_end(self, args, state, control, **kwargs):
            weights = [weight.detach().clone() for weight in trainer.model.parameters()]
            figures = trainer._metrics["train"]
            kl = {name: figures[f"capo/kl/{name}"][-1] for name in ("measured", "fraction") if mode == "trust_region"}
            expected.append((self.keep, self.share and self.share.value, kl, weights))

    trainer._compute_loss = compute_loss
    trainer.add_callback(Expect())
    trainer.train()
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=settings["adam_epsilon"]))
    loop = own_loop.Loop(load_model("embedded").double(), RATES[mode], mode)
    assert len(rollouts) == len(expected) == 4
    for given, (keep, share, kl, weights) in zip(rollouts, expected, strict=True):
        _, update = loop.step(given)
        assert torch.equal(loop.planner.micro_batches[0].keep, keep)
        assert 0 < keep.sum() < len(keep)
        if mode == "trust_region":
            assert {name: getattr(update, name) for name in kl} == pytest.approx(kl, rel=1e-4)
        else:
            assert loop.planner.share.value == pytest.approx(share, rel=1e-6)
            assert share < 0.5
        for mine, theirs in zip(loop.model.parameters(), weights, strict=True):
            torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=torch.finfo(torch.float32).eps)
    if mode == "trust_region":
        assert expected[0][2]["fraction"] < 1  # and so the way back was taken


def test_the_loop_runs_and_says_how_it_goes(capsys):
    rewards = own_loop.main(["--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(rewards) == 2 and all(0 <= reward <= 1 for reward in rewards)
    assert lines[-1].startswith("step 2/2: reward") and "KL" in lines[-1]
