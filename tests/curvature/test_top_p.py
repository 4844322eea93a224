"""Supports up to a probability: which rows they have, and that every form reads those rows and no others."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capo_rl import AdamStep, Planner, SGDStep, TrustRegion, token_shifts
from capo_rl.curvature import last_layer as module
from capo_rl.curvature.head import Head
from capo_rl.curvature.kernels import triton
from capo_rl.curvature.kernels.adam_shifts import _parts_alike, adam_direction, adam_shifts
from capo_rl.curvature.last_layer import LastLayer, last_layer, row_gradient, support_rows
from capo_rl.curvature.selection import Thresholds
from capo_rl.curvature.shifts import shifts_along, subset_direction, subset_shifts_of, token_direction, token_shifts_of
from capo_rl.planning.divergence import measured_kl
from capo_rl.planning.share import squared_norms

EXACT = {"rtol": 1e-9, "atol": 1e-15}


class Batch:
    """Random tokens of which some are sure of themselves and some are not, so that supports have all sizes."""

    def __init__(self, tokens: int = 40, d: int = 5, vocabulary: int = 30, seed: int = 0, dtype=torch.float64) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, d, generator=draw, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(vocabulary, d, generator=draw, dtype=torch.float64).to(dtype)
        scale = 6 * torch.rand(tokens, 1, generator=draw, dtype=torch.float64)
        self.hidden *= scale.to(dtype)
        self.logits = self.hidden @ self.weight.T
        self.actions = torch.randint(vocabulary, (tokens,), generator=draw)
        self.actions[::2] = torch.multinomial(self.logits[::2].double().softmax(-1), 1, generator=draw).squeeze(1)
        self.advantages = torch.randn(tokens, generator=draw, dtype=torch.float64).to(dtype)
        self.advantages[1::5] = 0

    def layer(self, top_k: int | None = 12, top_p: float | None = 0.9) -> LastLayer:
        return last_layer(self.hidden, self.logits, self.actions, top_k=top_k, top_p=top_p)

    def step(self, kind: str, layer: LastLayer) -> AdamStep | SGDStep:
        step = SGDStep(0.03) if kind == "sgd" else AdamStep(0.03, betas=(0.9, 0.99), eps=1e-6)
        for turn in range(3 if kind == "warm adam" else 0):
            step.update(row_gradient(layer, self.advantages.roll(turn) / len(layer)))
        return step


def of_one_size(layer: LastLayer) -> LastLayer:
    """The same supports, filled up by entries that count as all others do."""
    return replace(layer, sizes=None)


def same(one: object, other: object) -> None:
    for field in fields(one):
        torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), **EXACT)


def _is_enough(mass: list[float], k: int, most: int, top_p: float) -> bool:
    """Whether the k likeliest of `most` rows are the fewest of so much probability, as far as rounding tells."""
    return (k == most or (top_p < 1 and mass[k - 1] >= top_p - 1e-5)) and (
        k == 1 or top_p == 1 or mass[k - 2] < top_p + 1e-5
    )


@settings(max_examples=80)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 11),
    top_k=st.one_of(st.none(), st.integers(1, 12)),
    top_p=st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.5, 1.0])),
    spread=st.sampled_from([0.0, 0.3, 3.0, 60.0]),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_support_has_the_fewest_rows_of_so_much_probability(
    tokens, vocabulary, top_k, top_p, spread, ties, dtype, seed
):
    draw = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(tokens, vocabulary, generator=draw, dtype=torch.float64)
    logits = (logits.round() if ties else logits).to(dtype)
    actions = torch.randint(vocabulary, (tokens,), generator=draw)
    layer = last_layer(torch.zeros(tokens, 2), logits, actions, temperature=0.7, top_k=top_k, top_p=top_p)
    most = min(vocabulary, top_k or vocabulary)
    assert (layer.sizes is None) == (top_p == 1)
    for i in range(tokens):
        size = layer.support.shape[1] if layer.sizes is None else int(layer.sizes[i])
        exact = (logits[i].double() / 0.7).softmax(-1)
        rows, action = layer.support[i, :size].tolist(), int(actions[i])
        assert action in rows
        if layer.sizes is not None:
            assert len(set(rows)) == size
            assert set(layer.support[i, size:].tolist()) <= {action}
            assert not layer.pi[i, size:].any() and not layer.u[i, size:].any()
        mass = exact.sort(descending=True).values.cumsum(0).tolist()
        needed = [k for k in range(1, most + 1) if _is_enough(mass, k, most, top_p)]  # several where rounding decides
        assert {size, size - 1} & set(needed)  # the sampled row may be beside them
        outside = torch.ones(vocabulary, dtype=torch.bool)
        outside[rows] = False
        likeliest = [row for row in rows if row != action]
        assert not likeliest or not outside.any() or exact[likeliest].min() >= exact[outside].max() - 1e-6
        torch.testing.assert_close(float(layer.missing_mass[i]), float(exact[outside].sum()), rtol=0, atol=1e-5)
        one_hot = torch.zeros(vocabulary, dtype=torch.float64).index_put_((actions[i],), torch.tensor(1.0).double())
        got = torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, layer.support[i], layer.u[i].double())
        wanted = ((one_hot - exact) / 0.7).where(~outside, 0)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 12, 30])
def test_a_probability_of_one_is_the_whole_support_bit_for_bit(top_k):
    batch = Batch()
    one, none = batch.layer(top_k, 1.0), batch.layer(top_k, None)
    assert one.sizes is none.sizes is None
    for name in ("support", "pi", "u", "missing_mass", "log_pi_a"):
        assert torch.equal(getattr(one, name), getattr(none, name))


def test_where_one_row_has_all_the_mass_it_is_the_support():
    logits = torch.zeros(2, 9)
    logits[:, 4] = 1000.0
    layer = last_layer(torch.ones(2, 1), logits, torch.tensor([4, 7]), top_k=5, top_p=0.99)
    assert layer.sizes.tolist() == [1, 2]
    assert layer.support[:, :2].tolist() == [[4, 4], [4, 7]]
    assert layer.missing_mass.tolist() == [0.0, 0.0]
    assert layer.u[:, :2].tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_a_nan_or_an_infinity_among_the_logits_stays_in_its_token():
    batch = Batch(tokens=4)
    batch.logits[1, 3] = float("nan")
    batch.logits[2, batch.logits[2].argmin()] = -torch.inf
    batch.logits[3, (batch.actions[3] + 1) % 30] = torch.inf
    layer = batch.layer()
    shifts = token_shifts_of(layer, torch.ones(4), batch.step("sgd", layer))
    assert shifts.nonfinite.tolist() == [False, True, False, True]


@pytest.mark.parametrize("kind", ["sgd", "cold adam", "warm adam"])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_what_is_left_out_is_bounded_by_the_missing_mass(kind, top_p):
    batch = Batch()
    whole = batch.layer(None, None)
    step = batch.step(kind, whole)
    v = token_direction(whole, batch.advantages, step)
    exact = shifts_along(v, whole, batch.advantages)
    layer = batch.layer(None, top_p)
    shifts = token_shifts_of(layer, batch.advantages, step)
    missing, largest = shifts.missing_mass, v.abs().amax(-1)
    assert (missing > 0).any() and (missing <= 1 - top_p + 1e-12).all()
    assert ((shifts.s - exact.s).abs() <= missing * largest + 1e-12).all()
    assert ((shifts.c - exact.c).abs() <= 3 * missing * largest.square() + 1e-12).all()


def test_almost_all_the_mass_gives_the_shifts_of_the_whole_vocabulary():
    batch = Batch()
    layer = batch.layer(None, 1 - 1e-15)
    step = batch.step("warm adam", batch.layer(None, None))
    assert layer.sizes.double().mean() < 30
    found, wanted = (
        token_shifts_of(layer, batch.advantages, step),
        token_shifts(batch.hidden, batch.logits, batch.actions, batch.advantages, step),
    )
    for name in ("m_h", "m_f", "s", "c"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", [0, 10**6])
@pytest.mark.parametrize("kind", ["sgd", "cold adam", "warm adam"])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.99])
def test_filling_changes_nothing_but_the_time(monkeypatch, kind, top_p, shared):
    for name in ("shifts", "step"):
        monkeypatch.setattr(f"capo_rl.curvature.{name}.SHARED_ROWS", shared)
    batch = Batch()
    layer = batch.layer(12, top_p)
    filled = of_one_size(layer)
    step, other = batch.step(kind, layer), batch.step(kind, filled)
    weights = torch.stack([batch.advantages, batch.advantages.square()])
    same(token_shifts_of(layer, batch.advantages, step), token_shifts_of(filled, batch.advantages, other))
    subsets = torch.arange(len(layer)) % 3
    same(
        subset_shifts_of(layer, batch.advantages, step, subsets),
        subset_shifts_of(filled, batch.advantages, other, subsets),
    )
    v, of_filled = (subset_direction(each, weights, model) for each, model in ((layer, step), (filled, other)))
    torch.testing.assert_close(v.where(layer.entries, 0), of_filled.where(layer.entries, 0), **EXACT)
    assert torch.equal(v.where(layer.entries, 0), v)
    torch.testing.assert_close(squared_norms(layer, weights), squared_norms(filled, weights), **EXACT)
    some = torch.arange(len(layer)) % 4 == 0
    again = LastLayer.cat([layer[some], layer[~some]])
    order = torch.cat([some.nonzero(), (~some).nonzero()]).squeeze(1)
    for field in ("support", "pi", "u", "sizes"):
        assert torch.equal(getattr(again, field), getattr(layer, field)[order])
    assert len(support_rows(layer).order) == int(layer.sizes.sum()) < layer.support.numel()
    if kind != "sgd":
        step.update(row_gradient(layer, batch.advantages))
        other.update(row_gradient(filled, batch.advantages))
        assert torch.equal(step.rows, other.rows)
        for moment, wanted in zip(step.moments(step.rows), other.moments(step.rows), strict=True):
            torch.testing.assert_close(moment, wanted, **EXACT)


def test_what_overflows_at_one_tokens_rows_is_not_another_tokens(monkeypatch):
    monkeypatch.setattr("capo_rl.curvature.shifts.SHARED_ROWS", 10**6)
    batch = Batch()
    layer = batch.layer()
    alone = int((~(layer.support == layer.support.min()).any(-1) & (layer.sizes < 12)).nonzero()[0])
    step = batch.step("warm adam", layer)
    step._p[step.slots(layer.support.min()[None])] = torch.inf
    shifts = shifts_along(subset_direction(layer, batch.advantages, step), layer, batch.advantages)
    assert not shifts.nonfinite[alone] and shifts.nonfinite.any()


def test_the_measured_kl_counts_a_row_that_was_left_out_as_missing():
    batch = Batch()
    draw = torch.Generator().manual_seed(9)
    after = (batch.logits + 0.3 * torch.randn(batch.logits.shape, generator=draw)).log_softmax(-1)
    layer = batch.layer(None, 0.9)
    found = measured_kl(layer, after.gather(1, layer.support))
    before = batch.logits.log_softmax(-1)
    inside = torch.zeros_like(before, dtype=torch.bool)
    for i, size in enumerate(layer.sizes.tolist()):
        inside[i, layer.support[i, :size]] = True
    p, q = ((each.exp() * ~inside).sum(-1) for each in (before, after))
    wanted = (before.exp() * (before - after)).where(inside, 0).sum(-1) + torch.xlogy(p, p / q)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)  # tails below 1e-6 count as none


@pytest.mark.parametrize("budget", [1, 7, 60, 10**6])
def test_tiles_take_every_token_once_and_all_its_entries(monkeypatch, budget):
    batch = Batch()
    layer = batch.layer()
    seen = []
    for some, rows in _parts_alike(layer.sizes, 5, budget):
        assert (layer.sizes[some] <= rows).all() and len(some)
        assert len(some) == 1 or len(some) * rows * 5 <= budget
        seen += some.tolist()
    assert sorted(seen) == list(range(len(layer)))
    step = batch.step("warm adam", layer)
    score = batch.advantages[:, None] * layer.u
    arguments = (score, batch.hidden, step.slots(layer.support), *step.storage(5, score), step.planned)
    wanted = adam_direction(*arguments)
    monkeypatch.setitem(module._TILE, "cpu", budget)
    found = adam_direction(*arguments, layer.sizes)
    torch.testing.assert_close(found.where(layer.entries, 0), wanted.where(layer.entries, 0), **EXACT)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("tile", [(4, 8, 4), (16, 64, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_reads_the_first_entries_alone(tile, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = Batch(tokens=8, vocabulary=40, dtype=torch.float32)
    layer = last_layer(batch.hidden, batch.logits, batch.actions, top_k=30, top_p=0.95)
    step = batch.step("warm adam", layer)
    filled = layer.entries.logical_not()
    wanted = shifts_along(
        token_direction(of_one_size(layer), batch.advantages, step), of_one_size(layer), batch.advantages
    )
    # what is behind them may hold anything
    u, pi = layer.u.masked_fill(filled, torch.nan), layer.pi.masked_fill(filled, torch.nan)
    arguments = (batch.advantages, u, pi, layer.missing_mass, batch.hidden.to(dtype), step.slots(layer.support))
    moved = [each.to(device) for each in (*arguments, *step.storage(5, u))]
    s, c = adam_shifts(*moved, step.planned, layer.sizes.to(device), tile)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    for found, exact in ((s, wanted.s), (c, wanted.c)):
        assert (found.cpu() - exact).abs().max() <= rounding * exact.abs().max()


@pytest.mark.parametrize("describe", [False, True])
def test_a_planner_plans_by_mass_what_it_plans_of_the_same_rows(describe):
    batch = Batch(dtype=torch.float32)
    thresholds = Thresholds(fisher=1e-3, hessian=None)
    found = []
    for narrow in (False, True):
        weight = torch.nn.Parameter(batch.weight.clone())
        region = TrustRegion(torch.optim.Adam([weight], lr=0.03), budget=None)
        planner = Planner.of(region, weight, thresholds, top_k=12, top_p=0.9, share=True)
        for _ in range(3):
            for half in (slice(0, 15), slice(15, None)):
                planned = planner.plan(batch.hidden[half], Head(weight), batch.actions[half], batch.advantages[half])
                planned.weights = planned.used / 40
                if not narrow:
                    planned.layer = of_one_size(planned.layer)
            figures = planner.commit(describe=describe)
            after = [1.1 * each.layer.hidden for each in planner.micro_batches]
            moved = planner.measured_kl(after.__getitem__, Head(weight))
        found.append((figures, moved.mean, planner.step.state_dict()["q"].sum().item()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4, abs=1e-9, nan_ok=True)
    assert found[1][1:] == pytest.approx(found[0][1:], rel=1e-5)
