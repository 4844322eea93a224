"""A loop of one's own: it equals the trainer on the same rollouts, and is told at once what it forgot."""

from __future__ import annotations

import copy
import json
import re
from functools import partial

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from capo_rl import AdamStep, CAPOConfig, CAPOTrainer, Head, Planner, Thresholds, TrustRegion
from capo_rl.models import load_model, load_tokenizer
from capo_rl.processes import Processes
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
    }
    trainer = CAPOTrainer(
        model=load_model("embedded").double(),
        reward_funcs=lambda completions, **_: [float(len(each) % 5) for each in completions],
        args=CAPOConfig(output_dir=str(tmp_path), capo_mode=mode, **settings),
        train_dataset=data,
        processing_class=load_tokenizer("embedded"),
    )
    rollouts, expected = [], []
    compute, after_step = trainer._compute_loss, trainer._after_step

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

    def after():
        keep, share = trainer.planner.micro_batches[0].keep, trainer.planner.share
        after_step()
        weights = [weight.detach().clone() for weight in trainer.model.parameters()]
        figures = trainer._metrics["train"]
        kl = {name: figures[f"capo/kl/{name}"][-1] for name in ("measured", "fraction") if mode == "trust_region"}
        expected.append((keep, share and share.value, kl, weights))

    trainer._compute_loss, trainer._after_step = compute_loss, after
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


# ---- the pieces, on a head alone -----------------------------------------------------------------------------------


class Small:
    """A head of 5 rows, 6 tokens in two completions, and the calls of one step, to be made in any order."""

    def __init__(self, optimizer=torch.optim.AdamW, budget=1e-3, **settings) -> None:
        torch.manual_seed(0)
        self.head = torch.nn.Parameter(torch.randn(5, 3))
        self.optimizer = optimizer([self.head], lr=0.1)
        self.region = TrustRegion(self.optimizer, budget)
        self.planner = Planner.of(self.region, self.head, Thresholds(1e-3, None), share=True, **settings)
        self.mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
        self.hidden, self.actions = torch.randn(2, 4, 3), torch.randint(5, (2, 4))
        self.advantages = torch.randn(2, 4)

    def plan(self):
        mask = self.mask
        self.log_pi = (self.hidden @ self.head.T).log_softmax(-1).gather(-1, self.actions[..., None]).squeeze(-1)
        return self.planner.plan(self.hidden[mask], Head(self.head), self.actions[mask], self.advantages[mask])

    def backward(self, planned, watch=True):
        if watch:
            planned.watch(self.log_pi, self.mask)
        self.optimizer.zero_grad()
        (-(self.log_pi * planned.masked(self.advantages, self.mask, "dapo"))[self.mask].mean()).backward()

    def kl(self) -> float:
        return self.planner.measured_kl(lambda _: self.hidden[self.mask], Head(self.head)).mean

    def step(self):
        self.backward(self.plan())
        self.planner.commit()
        self.region.before_step(self.planner.share.value)
        self.optimizer.step()
        return self.region.after_step(self.kl)


def commits_not(*_):
    small = Small()
    small.backward(small.plan())
    small.optimizer.step()


def measures_before_commit(*_):
    small = Small()
    small.plan()
    small.kl()


def commits_twice(*_):
    small = Small()
    small.step()
    small.planner.commit()


def skips_what_was_committed(*_):
    small = Small()
    small.step()
    small.planner.skip()


def commits_before_the_backward_pass(*_):
    small = Small()
    small.plan().watch(small.log_pi, small.mask)
    small.planner.commit()


def watches_what_has_no_graph(*_):
    small = Small()
    small.plan().watch(small.log_pi.detach(), small.mask)


def masks_other_tokens(*_):
    small = Small()
    small.plan().masked(small.advantages, ~small.mask, "dapo")


def masks_another_loss(*_):
    small = Small()
    small.plan().masked(small.advantages, small.mask, "cispo")


def weighs_in_another_shape(*_):
    small = Small()
    small.plan().weights = torch.ones(2, 4)
    small.planner.commit()


def more_processes(monkeypatch):
    small = Small()
    small.step()
    monkeypatch.setattr(Processes, "count", property(lambda self: 2))
    small.plan()


def goes_on_without_its_share(*_):
    small = Small()
    small.planner.load_state_dict(Planner(AdamStep(0.1), Thresholds()).state_dict())


# As docs/refusals.md lists them, with what raises each.
TOLD = {
    "not committed: call planner.commit(clip) before optimizer.step()": commits_not,
    "call commit before the optimizer's step": measures_before_commit,
    "commit came after commit or skip of the same step": commits_twice,
    "skip came after commit or skip of the same step": skips_what_was_committed,
    "commit came without a token: call plan": lambda *_: Small().planner.commit(),
    "its backward pass comes before commit": commits_before_the_backward_pass,
    "log_pi takes no gradient": watches_what_has_no_graph,
    "give the boolean mask by which they were chosen": masks_other_tokens,
    "has no mean over accepted tokens": masks_another_loss,
    "of micro-batch 0 has shape (2, 4), and 6 tokens were planned": weighs_in_another_shape,
    "began with 1 processes and there are 2": more_processes,
    "is another's, or had no share": goes_on_without_its_share,
    "Planner.of knows the steps of Adam and of SGD without momentum": lambda *_: Small(torch.optim.RMSprop),
}


@pytest.mark.parametrize("message", TOLD)
def test_a_loop_that_forgets_a_call_is_told_at_once(monkeypatch, message):
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        TOLD[message](monkeypatch)


def test_a_refused_commit_changes_nothing():
    small = Small()
    planned = small.plan()
    planned.weights = torch.ones(2, 4)
    with pytest.raises(ValueError, match="one each"):
        small.planner.commit()
    small.backward(planned)
    small.planner.commit()
    assert small.planner.step.steps == 1


def test_what_is_planned_follows_the_optimizers_learning_rate_and_the_budgets():
    small = Small()
    small.plan()
    assert small.planner.step.lr == pytest.approx(0.1 * 2**-10)
    small.planner.clear()
    small.optimizer.param_groups[0]["lr"] = 1e-5  # the schedule's, below what the budget allows
    small.plan()
    assert small.planner.step.lr == 1e-5


def test_a_look_without_a_step_is_cleared():
    small = Small()
    small.plan()
    small.planner.clear()
    small.optimizer.step()
    small.step()
    assert small.planner.step.steps == 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_loop_goes_on_from_its_state(tmp_path, optimizer):
    def step(small):
        """As the example's, in which an SGD step has no share."""
        small.backward(small.plan())
        small.planner.commit()
        small.region.before_step(1.0 if small.planner.share is None else small.planner.share.value)
        small.optimizer.step()
        small.region.after_step(small.kl)

    whole, resumed = Small(optimizer), Small(optimizer)
    for _ in range(3):
        step(whole)
    save_file(whole.planner.state_dict(), tmp_path / "planner.safetensors")
    resumed.planner.load_state_dict(load_file(tmp_path / "planner.safetensors"))
    resumed.region.load_state_dict(json.loads(json.dumps(whole.region.state_dict())))
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.head.data.copy_(whole.head)
    for small in (whole, resumed):
        step(small), step(small)
    assert torch.equal(resumed.head, whole.head)
    assert resumed.region.state_dict() == whole.region.state_dict()
    mine, theirs = resumed.planner.state_dict(), whole.planner.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert int(mine["accepted_tokens"]) > 0


def test_the_planner_holds_no_graph():
    small = Small()
    hidden = small.hidden.requires_grad_() * 1.0
    planned = small.planner.plan(
        hidden[small.mask], Head(small.head), small.actions[small.mask], (small.advantages * hidden.sum(-1))[small.mask]
    )
    assert not planned.layer.hidden.requires_grad and not planned.advantages.requires_grad


def test_a_weight_in_several_micro_batches_is_one_step():
    """Accumulation: two backward passes between plan and commit, and the moments are those of their sum."""
    small = Small()
    for _ in range(2):
        planned = small.plan()
        planned.watch(small.log_pi, small.mask)
        (-(small.log_pi * planned.masked(small.advantages, small.mask, "dapo"))[small.mask].mean() / 2).backward()
    small.planner.commit()
    small.region.before_step()
    small.optimizer.step()
    p, _ = small.planner.step.moments(torch.arange(5))
    torch.testing.assert_close(p, -small.optimizer.state[small.head]["exp_avg"])
    small.region.restore()
    small.plan()
    assert len(small.planner.micro_batches) == 1
