"""The fast forms of m_H and m_F against the dense float64 autograd oracle, and against one another."""

from __future__ import annotations

import copy
import subprocess
import sys

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capo_rl import AdamStep, SGDStep, Shifts, subset_shifts, token_shifts
from capo_rl.curvature import reference
from capo_rl.curvature.last_layer import last_layer, row_gradient
from capo_rl.curvature.shifts import sgd_token_shifts, shifts_along, subset_direction, token_direction

LR = 0.03
BETAS = (0.9, 0.99)
EPS = 1e-6


class Batch:
    """Random tokens of a small softmax policy, and the head that made their logits."""

    def __init__(self, tokens: int, d: int, vocabulary: int, seed: int = 0, dtype=torch.float64, scale: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = scale * torch.randn(vocabulary, d, generator=generator, dtype=torch.float64).to(dtype)
        self.hidden = torch.randn(tokens, d, generator=generator, dtype=torch.float64).to(dtype)
        self.actions = torch.randint(vocabulary, (tokens,), generator=generator)
        self.advantages = torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)
        self.logits = self.hidden @ self.weight.T

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.logits, self.actions, self.advantages


def warm_adam(batch: Batch, updates: int, temperature: float = 1.0):
    """An `AdamStep` after some updates, and `torch.optim.Adam` after the same ones on the same dense gradients."""
    step = AdamStep(LR, betas=BETAS, eps=EPS)
    weight = batch.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=LR, betas=BETAS, eps=EPS)
    for seed in range(updates):
        past = Batch(7, batch.hidden.shape[1], len(batch.weight), seed=100 + seed)
        logits = past.hidden @ batch.weight.T
        layer = last_layer(past.hidden, logits, past.actions, temperature=temperature)
        step.update(row_gradient(layer, past.advantages / len(layer)))
        weight.grad = -reference.gradient(batch.weight, past.hidden, past.actions, past.advantages, temperature)
        optimizer.step()

    def at(parameters: list[Tensor]) -> torch.optim.Optimizer:
        fresh = torch.optim.Adam(parameters, lr=LR, betas=BETAS, eps=EPS)
        if updates:
            fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return fresh

    return step, at


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def steps(kind: str, batch: Batch, temperature: float = 1.0):
    """The step model named, and the torch optimizer it stands for."""
    if kind == "sgd":
        return SGDStep(LR), sgd
    return warm_adam(batch, updates=0 if kind == "cold adam" else 3, temperature=temperature)


GRANULARITIES = {
    "token": lambda n: torch.arange(n),
    "sequence": lambda n: torch.tensor([0, 0, 0, 1, 2, 2])[:n],
    "group": lambda n: torch.tensor([0, 0, 0, 0, 1, 1])[:n],
    "batch": lambda n: torch.zeros(n, dtype=torch.long),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fisher", ["sampled", "expected"])
@pytest.mark.parametrize("kind", ["sgd", "cold adam", "warm adam"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shifts_equal_the_dense_oracle(kind, fisher, granularity, temperature):
    batch = Batch(tokens=6, d=3, vocabulary=5)
    step, optimizer = steps(kind, batch, temperature)
    subsets = GRANULARITIES[granularity](6)
    options = {"temperature": temperature, "fisher": fisher}
    fast = subset_shifts(*batch.arguments, step, subsets, **options)
    if granularity == "token":
        alone = token_shifts(*batch.arguments, step, **options)
        for name in ("m_h", "m_f", "s", "c"):
            torch.testing.assert_close(getattr(alone, name), getattr(fast, name), rtol=1e-12, atol=0)
    for subset in range(int(subsets.max()) + 1):
        mine = subsets == subset
        m_h, m_f, _ = reference.subset_shifts(
            batch.weight,
            batch.hidden[mine],
            batch.actions[mine],
            batch.advantages[mine],
            optimizer,
            temperature=temperature,
            kind=fisher,
        )
        torch.testing.assert_close(fast.m_h[subset], m_h, rtol=1e-9, atol=0)
        torch.testing.assert_close(fast.m_f[subset], m_f, rtol=1e-9, atol=0)


@pytest.mark.parametrize("updates", [0, 1, 5])
def test_batch_adam_step_is_the_step_torch_takes(updates):
    batch = Batch(tokens=6, d=3, vocabulary=5, seed=1)
    step, optimizer = warm_adam(batch, updates)
    layer = last_layer(batch.hidden, batch.logits, batch.actions)
    gradient = row_gradient(layer, batch.advantages / len(layer))
    dense = torch.zeros_like(batch.weight)
    dense[gradient.rows] = gradient.part(slice(0, len(gradient.rows)))
    planned = step.plan(dense, torch.arange(5))
    taken = reference.optimizer_step(
        batch.weight,
        reference.gradient(batch.weight, batch.hidden, batch.actions, batch.advantages, 1.0),
        optimizer,
    )
    torch.testing.assert_close(planned, taken, rtol=0, atol=1e-10)
    # v = U h of the sparse form is that same dense step at each token
    v = subset_direction(layer, batch.advantages / len(layer), step)
    torch.testing.assert_close(v, batch.hidden @ taken.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "cold adam", "warm adam"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 7])
def test_what_top_k_leaves_out_is_bounded_by_the_missing_mass(kind, top_k):
    batch = Batch(tokens=40, d=4, vocabulary=8, seed=2)
    step, _ = steps(kind, batch)
    whole = last_layer(batch.hidden, batch.logits, batch.actions)
    v = token_direction(whole, batch.advantages, step)
    exact = shifts_along(v, whole, batch.advantages)
    pruned = token_shifts(*batch.arguments, step, top_k=top_k)
    missing = pruned.missing_mass
    # Outside the support |u_j| = π_j, so s loses at most missing · max|v|, and c at most 3 · missing · max v².
    largest = v.abs().amax(-1)
    slack = 1e-12
    assert ((pruned.s - exact.s).abs() <= missing * largest + slack).all()
    assert ((pruned.c - exact.c).abs() <= 3 * missing * largest.square() + slack).all()
    # and what is missing is exactly what the support leaves out
    top = batch.logits.topk(top_k).indices
    inside = torch.zeros_like(batch.logits, dtype=torch.bool).scatter(1, top, True)
    inside = inside.scatter(1, batch.actions[:, None], True)
    torch.testing.assert_close(missing, whole.pi.where(~inside, 0).sum(-1), rtol=1e-9, atol=1e-14)
    assert (missing > 0).any()


@pytest.mark.parametrize("kind", ["sgd", "warm adam"])
def test_top_k_of_the_whole_vocabulary_changes_nothing(kind):
    batch = Batch(tokens=6, d=3, vocabulary=5)
    step, _ = steps(kind, batch)
    everything = token_shifts(*batch.arguments, step)
    for top_k in (5, 50):
        for mine, theirs in zip(
            vars(token_shifts(*batch.arguments, step, top_k=top_k)).values(),
            vars(everything).values(),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fisher", ["sampled", "expected"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_sgd_closed_form_equals_the_general_form(fisher, scale):
    batch = Batch(tokens=50, d=4, vocabulary=9, seed=3, scale=scale)
    batch.actions[:25] = batch.logits[:25].argmax(-1)  # confident tokens, where 1 − 2π_a + Σπ² would cancel
    closed = sgd_token_shifts(*batch.arguments, LR, temperature=0.9, fisher=fisher)
    layer = last_layer(batch.hidden, batch.logits, batch.actions, temperature=0.9)
    general = shifts_along(token_direction(layer, batch.advantages, SGDStep(LR)), layer, batch.advantages, fisher)
    torch.testing.assert_close(closed.s, general.s, rtol=1e-9, atol=0)
    # c is a variance: where one other token has all the mass it is nothing beside s², and rounds as s² does
    rounding = 1e-14 * general.s.square()
    assert ((closed.c - general.c).abs() <= 1e-9 * general.c + rounding).all()
    assert ((closed.m_f - general.m_f).abs() <= 1e-9 * general.m_f + rounding).all()
    assert ((closed.m_h - general.m_h).abs() <= 1e-9 * general.m_h.abs() + batch.advantages.abs() * rounding).all()


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 9),
    d=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    top_k=st.one_of(st.none(), st.integers(1, 12)),
    kind=st.sampled_from(["sgd", "cold adam", "warm adam"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_size_and_dtype(tokens, d, vocabulary, top_k, kind, dtype, seed):
    exact = Batch(tokens, d, vocabulary, seed)
    step, _ = steps(kind, exact)
    batch = Batch(tokens, d, vocabulary, seed)
    batch.hidden, batch.advantages = exact.hidden.to(dtype), exact.advantages.to(dtype)
    shifts = token_shifts(*batch.arguments, step, top_k=top_k)
    for field in vars(shifts).values():
        assert field.shape == (tokens,)
        assert field.isfinite().all()
    assert (shifts.m_f >= 0).all()
    assert (shifts.c >= 0).all()
    # chunks of any size give what the whole gives, and one subset a token is the token level
    chunked = token_shifts(batch.hidden, batch.logits.split(2), batch.actions, batch.advantages, step, top_k=top_k)
    singles = subset_shifts(*batch.arguments, step, torch.arange(tokens), top_k=top_k)
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-3}
    for name in ("m_h", "m_f", "s", "c", "missing_mass"):
        torch.testing.assert_close(getattr(chunked, name), getattr(shifts, name), **tolerance)
        torch.testing.assert_close(getattr(singles, name), getattr(shifts, name), **tolerance)


def test_zero_advantages_plan_no_step():
    batch = Batch(tokens=4, d=3, vocabulary=5)
    shifts = token_shifts(batch.hidden, batch.logits, batch.actions, torch.zeros(4), AdamStep(LR))
    for name in ("m_h", "m_f", "s", "c"):
        assert torch.equal(getattr(shifts, name), torch.zeros(4, dtype=torch.float64))


def test_shapes_in_signatures_are_checked_under_test():
    pytest.importorskip("wadler_lindig", reason="jaxtyping needs wadler-lindig to say what does not fit")
    batch = Batch(tokens=4, d=3, vocabulary=5)
    with pytest.raises(jaxtyping.TypeCheckError, match="advantages"):
        token_shifts(batch.hidden, batch.logits, batch.actions, torch.zeros(1), SGDStep(LR))


def test_a_nan_or_infinite_advantage_is_nonfinite_and_stays_in_its_token():
    batch = Batch(tokens=4, d=3, vocabulary=5)
    batch.advantages[1], batch.advantages[2] = float("nan"), float("inf")
    for step in (SGDStep(LR), AdamStep(LR)):
        shifts = token_shifts(*batch.arguments, step, top_k=2)
        assert shifts.nonfinite.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "flatten"),
        ({"actions": torch.zeros(3, dtype=torch.long)}, "actions has shape"),
        ({"advantages": torch.zeros(1)}, "advantages has shape"),
        ({"logits": torch.zeros(5, 5)}, "more rows than there are tokens: 5 for 4"),
        ({"logits": torch.zeros(3, 5)}, "fewer rows than there are tokens: 3 for 4"),
        ({"temperature": 0.0}, "temperature"),
        ({"fisher": "exact"}, "not one of sampled, expected"),
    ],
)
def test_arguments_that_do_not_fit_are_named(unchecked, change, message):
    batch = Batch(tokens=4, d=3, vocabulary=5)
    arguments = {
        "hidden": batch.hidden,
        "logits": batch.logits,
        "actions": batch.actions,
        "advantages": batch.advantages,
        "step": SGDStep(LR),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        token_shifts(**arguments)


def test_subsets_must_number_the_tokens():
    batch = Batch(tokens=4, d=3, vocabulary=5)
    with pytest.raises(ValueError, match="subsets must hold"):
        subset_shifts(*batch.arguments, SGDStep(LR), torch.tensor([0, 0, -1, 0]))


def test_shifts_of_no_tokens_are_empty():
    nothing = token_shifts(
        torch.zeros(0, 3), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), torch.zeros(0), SGDStep(LR)
    )
    assert isinstance(nothing, Shifts)
    assert nothing.m_f.shape == (0,)


_PEAK_MEMORY = """
import resource, torch
from capo_rl import AdamStep, token_shifts
from capo_rl.curvature.last_layer import last_layer, row_gradient

tokens, vocabulary, d, k = 2048, 49_152, 576, 50
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(tokens, d, generator=generator)
logits = torch.randn(tokens, vocabulary, generator=generator)
actions = torch.randint(vocabulary, (tokens,), generator=generator)
advantages = torch.randn(tokens, generator=generator)
step = AdamStep(1e-5)
few = slice(0, 64)
step.update(row_gradient(last_layer(hidden[few], logits[few], actions[few], top_k=k), advantages[few]))
inputs = sum(tensor.nbytes for tensor in (hidden, logits, actions, advantages))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
token_shifts(hidden, logits, actions, advantages, step, top_k=k)
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print((inputs + extra) / inputs)
"""


def test_peak_memory_stays_near_the_size_of_the_inputs():
    # in a process of its own: the high-water mark of this one is long past
    done = subprocess.run([sys.executable, "-c", _PEAK_MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.3
