"""The planner and the trust region in a loop: one that forgets a call is told, and two processes are one."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

import warm
from capo_rl import AdamStep, Head, Planner, Thresholds, TrustRegion
from capo_rl.curvature.last_layer import row_gradient
from capo_rl.curvature.processes import Processes
from capo_rl.planning.trust_region import Steering, way_back


class Small:
    """A head of 5 rows, 6 tokens in two completions, and the calls of one step, to be made in any order."""

    def __init__(self, optimizer=torch.optim.AdamW, budget=1e-3, fisher=1e-3, rows=slice(None)) -> None:
        torch.manual_seed(0)
        self.head = torch.nn.Parameter(torch.randn(5, 3))
        self.optimizer = optimizer([self.head], lr=0.1)
        self.region = TrustRegion(self.optimizer, budget)
        self.planner = Planner.of(self.region, self.head, Thresholds(fisher, None), share=True)
        self.mask = torch.tensor([[True, True, True, True], [True, True, False, False]])[rows]
        self.hidden, self.actions = torch.randn(2, 4, 3)[rows], torch.randint(5, (2, 4))[rows]
        self.advantages = torch.randn(2, 4)[rows]

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


def is_off_by_one(*_):
    small = Small()
    mask = small.mask
    states = small.hidden.roll(1, dims=1)[mask]
    planned = small.planner.plan(states, Head(small.head), small.actions[mask], small.advantages[mask])
    small.plan()
    planned.watch(small.log_pi, mask)


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


def spread(monkeypatch):
    """A step model as the first of two processes has it."""
    monkeypatch.setattr(Processes, "count", property(lambda self: 2))
    monkeypatch.setattr(Processes, "number", 0)
    return AdamStep(0.1, processes=Processes())


def follows_its_own_gradient(monkeypatch):
    small = Small()
    spread(monkeypatch).update(row_gradient(small.plan().layer, torch.ones(6)))


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
    "from what hidden states and head give": is_off_by_one,
    "give the boolean mask by which they were chosen": masks_other_tokens,
    "has no mean over accepted tokens": masks_another_loss,
    "of micro-batch 0 has shape (2, 4), and 6 tokens were planned": weighs_in_another_shape,
    "began with 1 processes and there are 2": more_processes,
    "and this one has a part of them": lambda patch: spread(patch).slots(torch.tensor([0])),
    "and the gradient is that of one": follows_its_own_gradient,
    "over other processes than those that plan it": lambda patch: Planner(
        spread(patch), Thresholds(), processes=Processes()
    ),
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


def run(rows=slice(None)):
    """Four steps on some of the completions, with gradients averaged over processes: what there is at the end."""
    small, updates = Small(budget=Steering(1e-5, first=0.1, way=way_back), fisher=0.03, rows=rows), []
    processes = small.planner.processes.count
    for _ in range(4):
        planned = small.plan()
        planned.watch(small.log_pi, small.mask)
        advantages = planned.masked(small.advantages, small.mask, "dapo")
        small.optimizer.zero_grad()
        (-(small.log_pi * advantages)[small.mask].sum() * processes / 6).backward()  # of all processes' six tokens
        if processes > 1:
            dist.all_reduce(small.head.grad)
            small.head.grad /= processes
        small.planner.commit(1 / processes)
        small.region.before_step(small.planner.share.value)
        small.optimizer.step()
        updates.append(small.region.after_step(small.kl, small.planner.has_gradient))
    fractions = [update.fraction for update in updates]
    return small.head.detach(), small.planner.share.value, fractions, small.region.state_dict()


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    head, *numbers = run(slice(rank, rank + 1))
    save_file({"head": head}, f"{folder}/{rank}.safetensors")
    Path(folder, f"{rank}.json").write_text(json.dumps(numbers))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path):
    mp.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method=warm.METHOD)
    head, share, fractions, state = run()
    assert 0 < share < 1
    assert min(fractions) < 1
    heads = [load_file(tmp_path / f"{rank}.safetensors")["head"] for rank in (0, 1)]
    assert torch.equal(*heads)
    torch.testing.assert_close(heads[0], head, rtol=1e-5, atol=1e-7)
    for rank in (0, 1):
        theirs = json.loads((tmp_path / f"{rank}.json").read_text())
        assert theirs[0] == pytest.approx(share, rel=1e-5)
        assert theirs[1] == pytest.approx(fractions, rel=1e-2)
        assert theirs[2] == pytest.approx(state, rel=1e-2)
