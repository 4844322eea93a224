"""The plain and the Triton forms of the heavy loops against dense float64 formulas, within their stated bounds.

Triton runs on a GPU where there is one and in its interpreter elsewhere (`conftest.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from capo_rl import AdamStep
from capo_rl.curvature.kernels import moment_update, triton
from capo_rl.curvature.kernels.adam_shifts import Adam, adam_direction, adam_shifts, momentum_direction, square_root
from capo_rl.curvature.last_layer import _TILE, LastLayer, RowGradient, last_layer, row_gradient
from capo_rl.curvature.shifts import shifts_along, token_shifts, token_shifts_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNIT = 2.0**-24  # half a unit in float32's last place

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
# numpy, which Triton's interpreter computes with, warns of every overflow and underflow
interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FORMS = ["plain", pytest.param("fused", marks=[needs_triton, interpreted])]


@dataclass
class Tokens:
    """Random tokens with supports that repeat rows, and moments of which a row in three is untouched."""

    advantages: Tensor
    layer: LastLayer
    slots: Tensor
    p: Tensor
    q: Tensor


def tokens(n: int, k: int, d: int, *, seed: int = 0, hidden=torch.float32, moments=torch.float32) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = 2 * k + 3
    logits = 3 * torch.randn(n, vocabulary, generator=generator)
    h = torch.randn(n, d, generator=generator).to(hidden)
    layer = last_layer(h, logits, torch.randint(vocabulary, (n,), generator=generator), top_k=k - 1 if k > 1 else k)
    layer = LastLayer(
        h.to(DEVICE),
        *(getattr(layer, name).to(DEVICE) for name in ("support", "pi", "u", "missing_mass", "log_pi_a")),
        1.0,
    )
    rows = torch.arange(vocabulary)
    p = 0.1 * torch.randn(vocabulary, d, generator=generator)
    q = p.square() * (1 + torch.rand(vocabulary, d, generator=generator))
    p[rows % 3 == 0] = q[rows % 3 == 0] = 0
    return Tokens(
        torch.randn(n, generator=generator).to(DEVICE),
        layer,
        layer.support,
        p.to(DEVICE, moments),
        q.to(DEVICE, moments),
    )


@dataclass
class Exact:
    """v, s and the variance in float64, one formula after another, and how far float32 may be from them."""

    v: Tensor
    s: Tensor
    variance: Tensor
    v_bound: Tensor
    s_bound: Tensor
    variance_bound: Tensor


def exact(case: Tokens, adam: Adam) -> Exact:
    layer = case.layer
    k, d = layer.u.shape[1], layer.hidden.shape[1]
    h, u, pi, missing = (x.double() for x in (layer.hidden, layer.u, layer.pi, layer.missing_mass))
    g = case.advantages.double()[:, None, None] * u[:, :, None] * h[:, None, :]
    old_p, old_q = case.p.double()[case.slots], case.q.double()[case.slots]
    root = (adam.beta2 * old_q + (1 - adam.beta2) * g.square()).sqrt() + adam.eps
    v = adam.lr * ((adam.beta1 * old_p + (1 - adam.beta1) * g) / root * h[:, None, :]).sum(-1)
    size = (adam.beta1 * old_p.abs() + (1 - adam.beta1) * g.abs()) / root
    v_bound = (d + 16) * UNIT * adam.lr * (size * h.abs()[:, None, :]).sum(-1)
    v_bound += 2.0**-126 * adam.lr / adam.eps * h.abs().sum(-1, keepdim=True)
    s = (u * v).sum(-1)
    s_bound = (u.abs() * (v_bound + (k + 2) * UNIT * v.abs())).sum(-1) + 1e-37
    mean = (pi * v).sum(-1, keepdim=True)
    variance = (pi * (v - mean).square()).sum(-1) + missing * mean.squeeze(1).square()
    # each deviation is off by what v and the mean are; π sums to 1 only to k roundings
    off = (
        v_bound
        + (pi * v_bound).sum(-1, keepdim=True)
        + (k + 4) * UNIT * (v.abs() + (pi * v.abs()).sum(-1, keepdim=True))
    )
    middle = (pi * off).sum(-1) + (k + 4) * UNIT * mean.squeeze(1).abs()
    variance_bound = (
        (pi * (2 * (v - mean).abs() * off + off.square())).sum(-1)
        + missing * (2 * mean.squeeze(1).abs() * middle + middle.square())
        + (2 * k + 8) * UNIT * variance
        + 1e-37
    )
    return Exact(v, s, variance, v_bound, s_bound, variance_bound)


def shifts(form: str, case: Tokens, adam: Adam) -> tuple[Tensor, Tensor]:
    layer = case.layer
    if form == "fused":
        u, pi, missing = layer.u, layer.pi, layer.missing_mass
        return adam_shifts(case.advantages, u, pi, missing, layer.hidden, case.slots, case.p, case.q, adam)
    score = case.advantages[:, None] * layer.u
    found = shifts_along(adam_direction(score, layer.hidden, case.slots, case.p, case.q, adam), layer, case.advantages)
    return found.s, found.c


def check(form: str, case: Tokens, adam: Adam) -> None:
    expected = exact(case, adam)
    s, variance = shifts(form, case, adam)
    assert s.dtype == variance.dtype == torch.float32
    assert ((s.double() - expected.s).abs() <= expected.s_bound).all()
    assert ((variance.double() - expected.variance).abs() <= expected.variance_bound).all()


ADAM = Adam(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-6)
# n, k, d: one of each, sizes that divide no tile, sizes that fill one, and supports longer than the kernel's block
SIZES = [(1, 1, 1), (1, 2, 1), (3, 1, 5), (2, 5, 70), (3, 17, 33), (2, 64, 64), (1, 70, 130)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.99), (0.9, 0.0)])
def test_shifts_are_within_the_stated_bound_of_float64(form, size, betas):
    check(form, tokens(*size), Adam(0.01, *betas, 1e-6))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_the_bound_holds_in_any_precision_of_the_inputs(form, hidden, moments):
    check(form, tokens(3, 9, 21, hidden=hidden, moments=moments), ADAM)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-12, 1e6, 1e12])
@pytest.mark.parametrize("lr", [1e-12, 1e3])
def test_the_bound_holds_for_extreme_advantages_and_learning_rates(form, scale, lr):
    case = tokens(4, 6, 19)
    case.advantages *= scale
    check(form, case, Adam(lr, 0.9, 0.999, 1e-8))


@pytest.mark.parametrize("form", FORMS)
def test_the_bound_holds_for_denormal_states_and_moments(form):
    case = tokens(4, 6, 19)
    case.layer.hidden[::2] *= 1e-40
    case.p *= 1e-39
    case.q *= 1e-41
    assert (case.q[case.q > 0] < torch.finfo(torch.float32).tiny).all()
    check(form, case, ADAM)


@pytest.mark.parametrize("form", FORMS)
def test_almost_certain_tokens_keep_their_small_variance(form):
    case = tokens(3, 5, 8)
    case.layer.pi[:] = torch.tensor([1 - 1e-6, 1e-6, 0, 0, 0])
    case.layer.u[:] = torch.tensor([1e-6, -1e-6, 0, 0, 0])
    case.layer.missing_mass[:] = 0
    check(form, case, ADAM)


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_of_a_long_support_counts_what_is_missing(form):
    # three blocks of the kernel, whose means the merge has to weigh against the missing third
    case = tokens(2, 150, 6)
    case.layer.pi[:] = torch.linspace(1, 3, 150) / 450
    case.layer.u[:] = -case.layer.pi
    case.layer.missing_mass[:] = 1 / 3
    check(form, case, ADAM)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_in_its_token(form):
    case = tokens(3, 5, 8)
    case.advantages[1] = float("nan")
    s, variance = shifts(form, case, ADAM)
    assert s.isfinite().tolist() == variance.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("size", [*SIZES, (0, 5, 8)])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_tokens_without_an_advantage_share_a_step_within_the_same_bound(size, hidden, moments):
    case = tokens(*size, hidden=hidden, moments=moments)
    case.advantages[:] = 0
    expected = exact(case, ADAM)
    found = momentum_direction(case.layer.hidden, case.slots, case.p, case.q, ADAM)
    assert ((found.double() - expected.v).abs() <= expected.v_bound).all()


@pytest.mark.parametrize("shared", [0, 16])
def test_a_step_takes_both_ways_and_each_for_its_tokens(monkeypatch, shared):
    case = tokens(5, 6, 9)
    monkeypatch.setattr("capo_rl.curvature.step.SHARED_ROWS", shared)
    step = AdamStep(0.01, betas=(0.9, 0.99), eps=1e-6)
    step.update(row_gradient(case.layer, case.advantages))
    case.advantages[::2] = 0
    score = case.advantages[:, None] * case.layer.u
    one_way = adam_direction(score, case.layer.hidden, step.slots(case.slots), *step.storage(9, score), step.planned)
    torch.testing.assert_close(step.direction(score, case.layer.hidden, case.slots), one_way, rtol=1e-5, atol=1e-8)
    assert one_way[0].abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_square_root_is_right_from_denormals_to_infinity(dtype):
    tiny, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    q = torch.tensor(
        [0.0, tiny * torch.finfo(dtype).eps, tiny / 3, tiny, 1e-30, 1e-8, 0.3, 4.0, most, torch.inf], dtype=dtype
    )
    torch.testing.assert_close(square_root(q.clone()), q.sqrt(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert square_root(torch.tensor([-1.0, torch.nan])).isnan().all()


@needs_triton
def test_no_tokens_launch_nothing():
    s, variance = shifts("fused", tokens(0, 5, 8), ADAM)
    assert s.shape == variance.shape == (0,)


@pytest.mark.parametrize("budget", [1, 7, 40, 10**6])
def test_the_plain_form_is_the_same_in_tiles_of_any_size(monkeypatch, budget):
    case = tokens(5, 4, 9)
    score = case.advantages[:, None] * case.layer.u
    whole = adam_direction(score, case.layer.hidden, case.slots, case.p, case.q, ADAM)
    monkeypatch.setitem(_TILE, "cpu", budget)
    tiled = adam_direction(score, case.layer.hidden, case.slots, case.p, case.q, ADAM)
    assert ((tiled - whole).abs() <= 2 * exact(case, ADAM).v_bound).all()


@needs_triton
@interpreted
@pytest.mark.parametrize("updates", [0, 2])
def test_where_triton_is_used_the_shifts_are_the_same(monkeypatch, updates):
    case = tokens(6, 5, 11)
    weights = case.advantages / len(case.layer)
    found = []
    for uses_triton in (False, True):
        for module in ("shifts", "step"):
            monkeypatch.setattr(f"capo_rl.curvature.{module}.uses_triton", lambda _, answer=uses_triton: answer)
        step = AdamStep(0.01, eps=1e-6)
        for _ in range(updates):
            step.update(row_gradient(case.layer, weights))
        found.append(token_shifts_of(case.layer, case.advantages, step))
    for name, plain in vars(found[0]).items():
        torch.testing.assert_close(getattr(found[1], name), plain, rtol=1e-5, atol=1e-8)


# --- the moments' update


def dense(gradient_of: LastLayer, weights: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """scale · Σ w u hᵀ in float64, one token at a time, and the same with every term positive."""
    total = torch.zeros(rows, gradient_of.hidden.shape[1], dtype=torch.float64)
    size = torch.zeros_like(total)
    for i in range(len(gradient_of)):
        for j in range(gradient_of.support.shape[1]):
            term = scale * weights[i].double() * gradient_of.u[i, j].double() * gradient_of.hidden[i].double()
            total[gradient_of.support[i, j]] += term.cpu()
            size[gradient_of.support[i, j]] += term.abs().cpu()
    return total, size


def update(form: str, p: Tensor, q: Tensor, gradient: RowGradient, scale: float, betas: tuple[float, float]) -> None:
    if form == "fused":
        moment_update.fused_update_moments(p, q, gradient.rows, gradient, scale, betas)
    else:
        moment_update.update_moments(p, q, gradient.rows, gradient, scale, betas, seed=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [*SIZES, (40, 3, 5)])
def test_moments_are_within_a_bound_of_float64(form, size):
    case, betas, scale = tokens(*size), (0.9, 0.999), 0.3
    p, q = case.p.clone(), case.q.clone()
    update(form, p, q, row_gradient(case.layer, case.advantages), scale, betas)
    g, g_size = dense(case.layer, case.advantages, len(p), scale)
    old_p, old_q = case.p.double().cpu(), case.q.double().cpu()
    terms = size[0] * size[1] + 8
    bound = terms * UNIT * (betas[0] * old_p.abs() + (1 - betas[0]) * g_size) + 1e-37
    assert ((p.double().cpu() - betas[0] * old_p - (1 - betas[0]) * g).abs() <= bound).all()
    bound = 2 * terms * UNIT * (betas[1] * old_q + (1 - betas[1]) * g_size.square()) + 1e-37
    assert ((q.double().cpu() - betas[1] * old_q - (1 - betas[1]) * g.square()).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_update_gives_the_same_bits_every_time(form):
    case = tokens(30, 5, 12)
    results = []
    for _ in range(2):
        p, q = case.p.clone(), case.q.clone()
        update(form, p, q, row_gradient(case.layer, case.advantages), 1.0, (0.9, 0.999))
        results.append((p, q))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_moments_in_bfloat16_decay_as_those_in_float32_do():
    case = tokens(2, 3, 4)
    nothing = row_gradient(case.layer[torch.zeros(2, dtype=torch.bool)], case.advantages[:0])
    q = torch.full((1, 4000), 1e-6, dtype=torch.bfloat16)
    p = torch.zeros_like(q)
    wide = replace(nothing, hidden=torch.zeros(0, 4000))
    for seed in range(700):
        moment_update.update_moments(p, q, wide.rows, wide, 1.0, (0.9, 0.999), seed)
    # rounded to the nearest, 0.999 q is q and nothing would ever decay
    assert q.double().mean() == pytest.approx(1e-6 * 0.999**700, rel=0.01)


def test_a_step_with_moments_in_bfloat16_stays_near_the_one_in_float32():
    case = tokens(12, 6, 40)
    exact_step, rounded = AdamStep(0.01), AdamStep(0.01, moment_dtype=torch.bfloat16)
    for seed in range(5):
        past = tokens(12, 6, 40, seed=seed)
        for step in (exact_step, rounded):
            step.update(row_gradient(past.layer, past.advantages / 12))
    wanted, found = (token_shifts_of(case.layer, case.advantages, step) for step in (exact_step, rounded))
    assert rounded.state_dict()["p"].dtype == torch.bfloat16
    assert not torch.equal(wanted.s, found.s)
    assert ((wanted.s - found.s).norm() / wanted.s.norm()) < 0.01
    again = AdamStep(0.01, moment_dtype=torch.bfloat16)
    again.load_state_dict(rounded.state_dict())
    assert torch.equal(token_shifts_of(case.layer, case.advantages, again).s, found.s)


def test_only_bfloat16_is_offered_for_the_moments():
    with pytest.raises(ValueError, match="moment_dtype"):
        AdamStep(0.1, moment_dtype=torch.float16)


def test_the_moments_storage_is_copied_only_when_it_doubles():
    step, places = AdamStep(0.1), []
    for row in range(64):
        layer = LastLayer(
            torch.ones(1, 4),
            torch.tensor([[row]]),
            torch.ones(1, 1),
            torch.ones(1, 1),
            torch.zeros(1),
            torch.zeros(1),
            1.0,
        )
        step.update(row_gradient(layer, torch.ones(1)))
        places.append(step.storage(4, layer.u)[0].data_ptr())
    assert len(set(places)) <= 8
    # row r was touched once, 63 − r steps ago
    age = 63 - torch.arange(64)
    torch.testing.assert_close(step.moments(step.rows)[0][:, 0], 0.1 * 0.9**age)
    assert step.rows.tolist() == list(range(64))


def test_the_whole_vocabulary_in_the_support_goes_through_the_same_loop():
    # k = V: no top k at all, against the top k that holds everything but one likeliest row twice
    generator = torch.Generator().manual_seed(3)
    h, z = torch.randn(5, 7, generator=generator), torch.randn(5, 9, generator=generator)
    arguments = (h, z, torch.randint(9, (5,), generator=generator), torch.randn(5, generator=generator))
    whole = token_shifts(*arguments, AdamStep(0.1))
    pruned = token_shifts(*arguments, AdamStep(0.1), top_k=9)
    for name, expected in vars(whole).items():
        assert torch.equal(getattr(pruned, name), expected)
