"""A step planned in two processes against the same tokens in one: uneven shares, empty ones, all rejected in one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import warm
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.planning.planner import Planner

D, V, N, STEPS = 5, 23, 12, 3

# Which share of the tokens each process has, and which tokens stay out of every gradient.
SHARES = {
    "uneven": ([7, 5], []),
    "one token": ([11, 1], []),
    "one empty": ([12, 0], []),
    "all rejected in one": ([6, 6], range(6, 12)),
    "all rejected": ([6, 6], range(12)),
    "no tokens at all": ([0, 0], []),
}
# a step model, and up to which probability supports go
STEP_MODELS = {
    "adam": (lambda: AdamStep(1e-2), None),
    "adam, supports by mass": (lambda: AdamStep(1e-2), 0.8),
    "sgd": (lambda: SGDStep(1e-2), None),
}


def steps(tokens: slice, rejected, make, top_p):
    """The figures of a few planned steps on some of the tokens, what the moments are after them, and what was sent."""
    planner = Planner(make(), Thresholds(None, None), top_k=4, top_p=top_p, processes=Processes())
    planner.rule = lambda layer, advantages, shifts, sampled: (
        ~torch.isin(layer.hidden[:, 0].round(), torch.tensor([float(i) for i in rejected], dtype=torch.float64))
    )
    seen = []
    for seed in range(STEPS):
        draw = torch.Generator().manual_seed(seed)
        hidden = torch.randn(N, D, generator=draw, dtype=torch.float64)
        hidden[:, 0] = torch.arange(N)  # who is who
        logits = 3 * torch.randn(N, V, generator=draw, dtype=torch.float64)
        actions = torch.randint(0, V, (N,), generator=draw)
        advantages = torch.randn(N, generator=draw, dtype=torch.float64)
        planned = planner.plan(hidden[tokens], logits[tokens], actions[tokens], advantages[tokens])
        planned.weights = (advantages[tokens] * planned.keep) / N
        if planner.rejects_everything:
            seen.append({"skipped": 1.0} | planner.skip())
        else:
            seen.append(planner.commit())
        planner.clear()
    moments = planner.step.state_dict()
    return seen, moments, planner.processes.bytes


def both(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for share, (sizes, rejected) in SHARES.items():
        first = sum(sizes[:rank])
        for model, settings in STEP_MODELS.items():
            results[share, model] = steps(slice(first, first + sizes[rank]), rejected, *settings)
    # as where one machine sums in another order than the next
    results["agreed"] = [Processes().agreed(value + rank * 1e-9, torch.device("cpu")) for value in (0.1, math.nan)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(both, (str(folder),), nprocs=2, start_method=warm.METHOD)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("model", STEP_MODELS)
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_plan_the_step_of_one(halves, share, model):
    sizes, rejected = SHARES[share]
    figures, moments, sent = steps(slice(0, sum(sizes)), rejected, *STEP_MODELS[model])
    assert sent == 0
    for theirs, their_moments, their_bytes in (half[share, model] for half in halves):
        assert their_bytes > 0
        for one, other in zip(figures, theirs, strict=True):
            assert other == pytest.approx(one, rel=1e-9, abs=1e-15, nan_ok=True)
        assert their_moments.keys() == moments.keys()
        for name, tensor in moments.items():
            torch.testing.assert_close(their_moments[name], tensor, rtol=1e-9, atol=1e-18)
    assert len(figures) == STEPS
    assert all(("skipped" in step) == (share == "all rejected") for step in figures)


def test_what_a_decision_hangs_on_is_the_first_processs_number_in_all(halves):
    for half in halves:
        assert half["agreed"][0] == 0.1
        assert math.isnan(half["agreed"][1])


def test_one_process_is_all_there_is():
    alone = Processes()
    values = torch.tensor([1, 2])
    assert alone.count == 1
    assert alone.total(values) is values
    assert alone.gather(values) is values
    assert alone.union(values) is values
    assert alone.agreed(0.1, torch.device("cpu")) == 0.1
    assert alone.bytes == 0
