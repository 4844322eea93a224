"""Moments that are spread over processes: the same verdicts, figures, moments and files, in a part of the memory."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import warm
from capo_rl.curvature.last_layer import _TILE, RowGradient, last_layer, row_gradient
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds
from capo_rl.curvature.sharded_moments import Shard
from capo_rl.curvature.shifts import Shifts
from capo_rl.curvature.step import AdamStep
from capo_rl.planning.planner import Planner

D, V, N, STEPS = 5, 61, 12, 3

# Which share of the tokens each process has: with two processes, with three.
SHARES = {
    "uneven": ([7, 5], [2, 7, 3]),
    "one token": ([11, 1], [5, 6, 1]),
    "one empty": ([12, 0], [6, 0, 6]),
    "no tokens at all": ([0, 0], [0, 0, 0]),
}
# How a step is planned.
WAYS = {
    "tokens": {},
    "zero advantages": {},
    "supports by mass": {"top_p": 0.8},
    "sequences": {"fisher": "expected"},
    "bfloat16": {},
}
CASES = [("uneven", way) for way in WAYS] + [(share, "tokens") for share in SHARES if share != "uneven"]


def plans(tokens: slice, way: str, processes: Processes, sharded: bool, state=None, steps=range(STEPS)):
    """A few planned steps on some of the tokens, in two micro-batches each: shifts and verdicts, figures, the state
    after them, and P and Q as they are stored."""
    dtype = torch.bfloat16 if way == "bfloat16" else None
    thresholds = Thresholds(None, None) if way == "bfloat16" else Thresholds(1e-3, (-0.02, 0.02))
    step = AdamStep(1e-2, moment_dtype=dtype, processes=processes if sharded else None)
    planner = Planner(step, thresholds, top_k=4, processes=processes, **WAYS[way])
    if state is not None:
        planner.load_state_dict(state)
    shifts, figures = [], []
    for seed in steps:
        draw = torch.Generator().manual_seed(seed)
        hidden = torch.randn(N, D, generator=draw, dtype=torch.float64)
        logits = 3 * torch.randn(N, V, generator=draw, dtype=torch.float64)
        actions = torch.randint(0, V, (N,), generator=draw)
        advantages = torch.randn(N, generator=draw, dtype=torch.float64)
        if way == "zero advantages":
            advantages[::2] = 0
        for some in (slice(0, 1), slice(1, None)):  # of one token or none, the second has none
            at = torch.arange(N)[tokens][some]
            subsets = torch.arange(len(at)) // 2 if way == "sequences" else None
            batch = planner.plan(hidden[at], logits[at], actions[at], advantages[at], subsets)
            batch.weights = (advantages[at] * batch.keep) / N
            shifts.append([getattr(batch.shifts, field.name) for field in fields(Shifts)] + [batch.keep.double()])
        figures.append(planner.commit())
        planner.clear()
    columns = torch.stack([torch.cat(column) for column in zip(*shifts, strict=True)])
    return columns, figures, planner.state_dict(), [moment.clone() for moment in step.storage(D, logits)]


def shares(share: str, count: int) -> list[slice]:
    sizes = SHARES[share][count - 2]
    return [slice(stop - size, stop) for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)]


def meet(rank: int, folder: str, count: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    _TILE["cpu"] = 64  # so that there are several tiles: of 12 rows, and of 6 where P and Q go together
    results = {}
    for share, way in CASES:
        for sharded in (True, False):
            results[share, way, sharded] = plans(shares(share, count)[rank], way, Processes(), sharded)
    tokens = shares("uneven", count)[rank]
    for way in ("tokens", "bfloat16"):
        state = plans(tokens, way, Processes(), True, steps=range(2))[2]
        for sharded in (True, False):
            results["goes on", way, sharded] = plans(tokens, way, Processes(), sharded, state, range(2, STEPS))[2]
    saved = torch.load(f"{folder}/saved.pt")
    step = AdamStep(1e-2, moment_dtype=torch.bfloat16, processes=Processes())
    step.load_state_dict(saved)
    results["loaded"] = step.state_dict(here=rank == 1)
    results["refused"] = refused()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refused() -> list[str]:
    """What is said of reading moments that are elsewhere."""
    step = AdamStep(1e-2, processes=Processes())
    h, z, actions = torch.ones(2, D), torch.arange(2.0 * V).view(2, V), torch.tensor([0, 1])
    layer = last_layer(h, z, actions, top_k=3)
    said = []
    for call in (
        lambda: step.slots(layer.support),
        lambda: step.update(row_gradient(layer, torch.ones(2))),
        lambda: Planner(step, Thresholds(), processes=Processes()),
    ):
        with pytest.raises((RuntimeError, ValueError)) as error:
            call()
        said.append(str(error.value))
    planner = Planner(step, Thresholds(), top_k=3)
    planner.plan(h, z, actions, torch.ones(2)).weights = torch.ones(2)
    planner.commit()
    with pytest.raises(IndexError):
        step.at(step.rows[:1]).moments(step.rows)
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each of two processes finds, and of three, to which a state of the two is handed on."""
    saved, found = AdamStep(1e-2, moment_dtype=torch.bfloat16).state_dict(), {}
    for count in (2, 3):
        folder = tmp_path_factory.mktemp("processes")
        torch.save(saved, folder / "saved.pt")
        mp.start_processes(meet, (str(folder), count), nprocs=count, start_method=warm.METHOD)
        found[count] = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
        found[count, "saved"] = saved
        state = found[count][0]["uneven", "bfloat16", True][2]
        saved = {name.removeprefix("step."): each for name, each in state.items() if name.startswith("step.")}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize(("share", "way"), CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_what_is_planned_does_not_depend_on_where_moments_are(runs, count, share, way):
    for each in runs[count]:
        spread, whole = each[share, way, True], each[share, way, False]
        if way == "bfloat16":  # rounded at random, by other numbers
            assert spread[2]["step.p"].dtype == torch.bfloat16
            assert torch.equal(spread[2]["step.rows"], whole[2]["step.rows"])
            continue
        if way == "zero advantages":  # such tokens are multiplied with all rows at hand, by another sum of D terms
            torch.testing.assert_close(spread[0], whole[0], rtol=1e-12, atol=1e-16)
            assert torch.equal(spread[0][-1], whole[0][-1])
        else:
            assert torch.equal(spread[0], whole[0])
        for mine, theirs in zip(spread[1], whole[1], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-12 if way == "zero advantages" else 0, abs=0, nan_ok=True)
        assert same(spread[2], whole[2])  # the same file is written
        assert same(spread[2], runs[count][0][share, way, True][2])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("share", ["uneven", "one empty"])
def test_several_processes_plan_the_step_of_one(runs, count, share):
    shifts, figures, state, _ = plans(slice(0, N), "tokens", Processes(), True)
    found = [each[share, "tokens", True] for each in runs[count]]
    by_token = [torch.cat(parts, dim=1) for parts in zip(*(each[0].chunk(STEPS, 1) for each in found), strict=True)]
    torch.testing.assert_close(torch.cat(by_token, dim=1), shifts, rtol=1e-9, atol=1e-15)
    assert 0 < shifts[-1].sum() < N * STEPS
    for each in found:
        for mine, theirs in zip(each[1], figures, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-15, nan_ok=True)
        for name, tensor in state.items():
            torch.testing.assert_close(each[2][name], tensor, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize(("share", "way"), CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_each_process_keeps_an_equal_part(runs, count, share, way):
    rows = len(runs[count][0][share, way, True][2]["step.rows"])
    assert (rows > 0) == (share != "no tokens at all")
    row = D * (2 if way == "bfloat16" else 8)
    for number, each in enumerate(runs[count]):
        whole, own = ([moment.nbytes for moment in each[share, way, sharded][3]] for sharded in (False, True))
        assert whole == 2 * [(rows + 1) * row]
        assert own == 2 * [((rows + count - 1 - number) // count + 1) * row]  # ⌈R/G⌉, or one less
    assert sum(len(each[share, way, True][3][0]) - 1 for each in runs[count]) == rows


@pytest.mark.parametrize("count", [2, 3])
def test_a_state_goes_on_spread_and_whole(runs, count):
    for each in runs[count]:
        for sharded in (True, False):
            assert same(each["goes on", "tokens", sharded], each["uneven", "tokens", False][2])
        assert same(each["goes on", "bfloat16", True], each["uneven", "bfloat16", True][2])


def test_a_state_of_two_processes_loads_in_three_and_in_one(runs):
    saved = runs[3, "saved"]
    assert len(saved["rows"]) > 3
    alone = AdamStep(1e-2, moment_dtype=torch.bfloat16)
    alone.load_state_dict(saved)
    assert same(alone.state_dict(), saved)
    assert same(runs[3][1]["loaded"], saved)
    assert runs[3][0]["loaded"] == runs[3][2]["loaded"] == {}  # they did not ask for it
    assert len(runs[2][1]["loaded"]["rows"]) == 0  # of no step


def test_rounding_at_random_is_right_on_average_and_differs_between_processes():
    """All rows have the same gradient, so they differ by what chance made of them."""
    count, rows, d = 3, 300, 16
    exact = AdamStep(1e-2)
    parts = [AdamStep(1e-2, moment_dtype=torch.bfloat16) for _ in range(count)]
    for number, part in enumerate(parts):
        part._shard = Shard(Processes(), number, count)  # as in a process of its own
    for seed in range(30):
        hidden = torch.randn(1, d, generator=torch.Generator().manual_seed(seed))
        start, tokens = torch.arange(rows + 1), torch.zeros(rows, dtype=torch.long)
        gradient = RowGradient(torch.arange(rows), start, tokens, torch.ones(rows), hidden, Processes())
        for step in (exact, *parts):
            step.update(gradient)
    for wanted, *found in zip(*([*step.storage(d, hidden)] for step in (exact, *parts)), strict=True):
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(found, 2))
        off = torch.cat([moment[1:].float() for moment in found]) - wanted[1]
        assert off.std(0).min() > 0
        assert (off.mean(0).abs() < 5 * off.std(0) / rows**0.5).all()  # of each column: its rows are independent


@pytest.mark.parametrize("count", [2, 3])
def test_moments_that_are_elsewhere_are_not_read(runs, count):
    for each in runs[count]:
        for said, words in zip(each["refused"], ("spread over", "that of one", "the same Processes"), strict=True):
            assert words in said
