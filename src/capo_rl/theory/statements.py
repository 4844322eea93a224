"""The paper's statements as checks: on given MDPs, policies and steps, how often each fails, and how tight it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capo_rl.theory.guarantee import (
    MDP,
    Row,
    constant,
    derivatives,
    evaluate,
    fisher,
    half_quadratic,
    kl,
    local,
    mean_advantage,
    omega_ceiling,
    random_steps,
    sharp_constant,
    shift,
    surrogate_gain,
)


@dataclass(frozen=True)
class Check:
    """A statement gap ≤ allowance: cases, violations, the tightest slack, and the largest gap/allowance (`used`).

    An identity has allowance 0: its slack is minus the largest error, and `used` is NaN.
    """

    statement: str
    cases: int
    violations: int
    slack: float
    used: float


def check(statement: str, gap: Tensor, allowance: Tensor | None = None) -> Check:
    """Compare the two, to 1e-9 for rounding; NaN is a violation."""
    bound = torch.zeros_like(gap) if allowance is None else allowance
    slack, used = bound - gap, (gap / bound)[bound > 1e-12]
    wrong = int((~(slack >= -1e-9 * (1 + bound.abs()))).sum())
    return Check(statement, gap.numel(), wrong, float(slack.min()), float(used.max()) if len(used) else math.nan)


def merge(checks: Iterable[Check]) -> list[Check]:
    """One row for each statement, in order of appearance."""
    rows: dict[str, Check] = {}
    for x in checks:
        y = rows.get(x.statement, Check(x.statement, 0, 0, math.inf, math.nan))
        cases, violations = x.cases + y.cases, x.violations + y.violations
        rows[x.statement] = Check(x.statement, cases, violations, min(x.slack, y.slack), float(np.fmax(x.used, y.used)))
    return list(rows.values())


def check_expansions(mdp: MDP, theta: Tensor, step: Tensor) -> list[Check]:
    """Eq. 15, 16, 25, 26, with L₂ the largest slope of H among the integral's nodes: all that the proof uses."""
    here, x = local(mdp, theta), step.flatten(1)
    norm, d = x.norm(dim=-1), here.now.d_mean
    rest_j = rest_f = rest_moving = L_2 = torch.zeros_like(norm)
    for node, weight in zip(*np.polynomial.legendre.leggauss(16), strict=True):
        tau, theta_tau = (node + 1) / 2, theta + (node + 1) / 2 * step
        w = weight * (1 - tau)  # half of it is the rule's on [0, 1], and half_quadratic has the other half
        change = derivatives(lambda y: evaluate(mdp, y).J, theta_tau)[1] - here.H_J
        L_2 = torch.maximum(L_2, torch.linalg.matrix_norm(change, 2) / (tau * norm))
        rest_j = rest_j + w * half_quadratic(change, x)
        rest_f = rest_f + w * half_quadratic(fisher(d, theta_tau) - here.F, x)
        rest_moving = rest_moving + w * half_quadratic(fisher(evaluate(mdp, theta_tau).d_mean, theta_tau) - here.F, x)
    gain, m_h = evaluate(mdp, theta + step).J - here.now.J, shift(here.g, here.H_J, x)
    D, m_f = kl(here.now, theta, theta + step), half_quadratic(here.F, x)
    # sup over π and unit v of v's third central moment under π: v = (1, −1)/√2, where p(1−p)(1−2p) = 1/(6√3)
    L_F = d.amax(-1) * math.sqrt(2) / (3 * math.sqrt(3))
    return [
        check("Eq. 15: J' − J = m_H + integral, H = ∇²J", (gain - m_h - rest_j).abs()),
        check("Eq. 16: m_H − (J' − J) ≤ L₂/6 ‖Δθ‖³, H = ∇²J", m_h - gain, L_2 / 6 * norm**3),
        check("Eq. 25: KL = m_F + integral", (D - m_f - rest_f).abs()),
        check("Eq. 25 with F(θ+τΔθ)'s own d_π [wrong]", (D - m_f - rest_moving).abs()),
        check("Eq. 26: |KL − m_F| ≤ L_F/6 ‖Δθ‖³, L_F = max d_π √2/(3√3)", (D - m_f).abs(), L_F / 6 * norm**3),
    ]


def check_derivatives(mdp: MDP, theta: Tensor, step: Tensor) -> list[Check]:
    """Eq. 2, 37 and 67: whose gradient and whose Hessian they are, compared along one step."""
    here, x = local(mdp, theta), step.flatten(1)
    now, first, H_eff = here.now, (here.g * step.flatten(1)).sum(-1), mdp.setting.total
    weight, score = now.d[..., None] * now.pi[:, None], (step - (now.pi * step).sum(-1, keepdim=True))[:, None]
    curvature = score**2 - (now.pi[:, None] * score**2).sum(-1, keepdim=True)  # Eq. 62: (uᵀv)² − vᵀFv
    eq_67, eq_37 = ((weight * now.A * y).sum((1, 2, 3)) for y in (score, curvature))
    ceiling = omega_ceiling(mdp.setting, 1.0) * now.epsilon * half_quadratic(here.F, x).sqrt()
    return [
        check("Eq. 67: Σ_t E[A ∇log π] = ∇J", (eq_67 - first).abs()),
        check("Eq. 67, d_π normalised [wrong]", (eq_67 / H_eff - first).abs()),
        check("Eq. 2: Σ_t E[R(s_t, a_t) ∇log π] = ∇J [wrong]",
              ((weight * mdp.R[:, None] * score).sum((1, 2, 3)) - first).abs()),
        check("Eq. 37 = ∇²L", (eq_37 - 2 * half_quadratic(here.H_L, x)).abs()),
        check("Eq. 37 = ∇²J [wrong]", (eq_37 - 2 * half_quadratic(here.H_J, x)).abs()),
        check("gᵀΔθ ≤ √2 ε H_eff √m_F", first, ceiling),
    ]  # fmt: skip


def check_gaps(mdp: MDP, theta: Tensor, step: Tensor) -> list[Check]:
    """Eq. 65 in each reading of d_π, Eq. 85, 94, 100, and Pinsker's inequality."""
    now, new = evaluate(mdp, theta), evaluate(mdp, theta + step)
    gain, L, root = new.J - now.J, surrogate_gain(now, new.pi), kl(now, theta, theta + step).sqrt()
    tv, bar, T = (now.pi - new.pi).abs().sum(-1) / 2, mean_advantage(now, new.pi), mdp.setting.horizon
    C, sharp = constant(mdp.setting) * now.epsilon, sharp_constant(mdp.setting)
    eq = "Eq. 65" if T is None else "Eq. 100"
    rows = [
        check("Eq. 85, and with a discount: J' − J = Σ E_{d_π'}[Ā]", (gain - (new.d * bar).sum((1, 2))).abs()),
        check("Pinsker: E TV ≤ √(KL/2)", (now.d_mean * tv).sum(-1), root / math.sqrt(2)),
        check(f"{eq}: L − J' ≤ C √KL", L - gain, C * root),
        check(f"{eq}, sharp C", L - gain, sharp * now.epsilon * root),
        check(f"{eq}, sharp C, ε = max_s |Ā|", L - gain, sharp * bar.abs().amax((1, 2)) * root),
    ]
    if T is None:
        rows.append(check("Eq. 65, d_π normalised in L too", L / mdp.setting.total - gain, C * root))
        rows.append(check("Eq. 65, d_π unnormalised in KL too", L - gain, C * mdp.setting.total**0.5 * root))
        return rows
    spread = T * (mdp.R.amax((1, 2)) - mdp.R.amin((1, 2)))  # of a completion's return
    rows.append(check("|J' − J| ≤ (max − min return) √(T KL/2)", gain.abs(), spread * (T / 2) ** 0.5 * root))
    if T > 1:
        moved, change = (now.d * tv[:, None]).sum(-1).cumsum(1)[:, :-1], (new.d - now.d).abs().sum(-1)[:, 1:]
        rows.append(check("Eq. 94: ‖d_π',t − d_π,t‖₁ ≤ 2 Σ E TV", change, 2 * moved))
        rows.append(check("Eq. 94 without its factor 2 [wrong]", change, moved))
    return rows


def search_gap(mdp: MDP, theta: Tensor, seed: int, power: float | None = None, iterations: int = 300) -> list[Check]:
    """Eq. 65 and 100 where they are hardest: after ascents on gap/allowance from the cases given.

    With a power of 1/2, √m_F stands for √KL, as in Eq. 82; with 1, m_F does, as in Eq. 81's brace.
    """
    start = [mdp.P.log(), torch.atanh(0.99 * mdp.R), mdp.rho.log(), theta, random_steps(theta, seed)]
    leaves = [x.clone().requires_grad_() for x in start]
    ascent = torch.optim.Adam(leaves, lr=0.03)
    for _ in range(iterations + 1):
        P, R, rho, theta, step = leaves
        mdp = MDP(mdp.setting, P.softmax(-1), R.tanh(), rho.softmax(-1))
        now, new = evaluate(mdp, theta), evaluate(mdp, theta + step)
        m_f = half_quadratic(fisher(now.d_mean, theta), step.flatten(1)).clamp_min(1e-12)
        unit = now.epsilon * (kl(now, theta, theta + step).sqrt() if power is None else m_f**power)
        gap = surrogate_gain(now, new.pi) - (new.J - now.J)
        ascent.zero_grad()
        (-gap / unit).sum().backward()
        ascent.step()
    eq, gap, unit = "Eq. 65" if mdp.setting.horizon is None else "Eq. 100", gap.detach(), unit.detach()
    if power is not None:
        name = {0.5: "√m_F", 1.0: "m_F"}[power]
        return [check(f"{eq}, {name} for √KL, searched [wrong]", gap, constant(mdp.setting) * unit)]
    C = {"": constant(mdp.setting), ", sharp C": sharp_constant(mdp.setting)}
    return [check(f"{eq}{name}, searched", gap, c * unit) for name, c in C.items()]


def candidates(direction: Tensor, subsets: int, norm: Tensor, seed: int) -> Tensor:
    """Steps Δθᵢ [n, B, k]: `direction` [n, k] with noise of 0.01 to 3 times its norm; the longest has `norm` [n]."""
    rng = np.random.default_rng(seed)
    n, k = direction.shape
    noise = rng.normal(size=(n, subsets, k)) * 10 ** rng.uniform(-2, 0.5, (n, 1, 1)) / math.sqrt(k)
    x = (direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-300))[:, None] + torch.tensor(noise)
    return norm[:, None, None] * x / x.norm(dim=-1).amax(1)[:, None, None]


def check_aggregation(mdp: MDP, theta: Tensor, subsets: int, seed: int) -> list[Check]:
    """Eq. 74, 79, 80: the mean of steps against the steps, with Mr² (the proof), ½ Mr² (the statement) and less."""
    here = local(mdp, theta)
    H, one = here.H_L, torch.ones(len(theta), dtype=theta.dtype)
    steps = candidates(here.g, subsets, one, seed)  # r = 1
    # the hardest case, every other one: pairs back and forth along the largest curvature
    signs = torch.tensor([(-1.0) ** i for i in range(subsets)], dtype=theta.dtype)[:, None]
    pairs = signs * torch.linalg.eigh(H)[1][:, None, :, -1] + 1e-3 * steps
    steps[::2] = (pairs / pairs.norm(dim=-1).amax(1)[:, None, None])[::2]
    mean, M, each = steps.mean(1), torch.linalg.matrix_norm(H, 2), shift(here.g, H, steps)
    whole = shift(here.g, H, mean)
    return [
        check("Eq. 74: m_F(Δθ) ≤ mean m_F(Δθᵢ)", half_quadratic(here.F, mean), half_quadratic(here.F, steps).mean(1)),
        check("Eq. 79: mean m_H(Δθᵢ) − m_H(Δθ) ≤ Mr² (1 − 1/B)", each.mean(1) - whole, M * (1 - 1 / subsets)),
        check("Eq. 79 with ½ M (r² − ‖Δθ‖²)", each.mean(1) - whole, M / 2 * (1 - (mean**2).sum(-1))),
        check("Eq. 80: min m_H(Δθᵢ) − m_H(Δθ) ≤ Mr² (proof)", each.amin(1) - whole, M),
        check("Eq. 80 with ½ Mr² (statement)", each.amin(1) - whole, M / 2),
        check("Eq. 80 with 0.4 Mr² [wrong]", each.amin(1) - whole, 0.4 * M),
    ]


def curvature(mdp: MDP, theta: Tensor, step: Tensor | None = None) -> Tensor:
    """‖∇²J‖_op and ‖∇²L‖_op [2, n]: at θ, or with a step the largest on the way to θ + Δθ (at 16 nodes and at θ)."""
    now, M = evaluate(mdp, theta), torch.zeros((2, len(theta)), dtype=theta.dtype)
    for node in [-1.0] if step is None else [-1.0, *np.polynomial.legendre.leggauss(16)[0]]:
        at = theta if step is None else theta + (node + 1) / 2 * step
        H_J = derivatives(lambda x: evaluate(mdp, x).J, at)[1]
        H_L = derivatives(lambda x: surrogate_gain(now, torch.softmax(x, -1)), at)[1]
        M = torch.maximum(M, torch.linalg.matrix_norm(torch.stack([H_J, H_L]), 2))
    return M


@dataclass(frozen=True)
class Premise:
    """Of a set of steps: min m_H with ∇²J and ∇²L [2, n], r² [n], C√δ_F [n]; of their mean J' − J, L − J [2, n]."""

    m_h: Tensor
    r_2: Tensor
    penalty: Tensor
    gain: Tensor


def premise(mdp: MDP, theta: Tensor, steps: Tensor) -> Premise:
    """What Theorem 5.1 needs to know of steps [n, B, k] and of their mean, taken."""
    here, r_2 = local(mdp, theta), (steps**2).sum(-1).amax(1)
    m_h = torch.stack([shift(here.g, H, steps).amin(1) for H in (here.H_J, here.H_L)])
    penalty = constant(mdp.setting) * here.now.epsilon * half_quadratic(here.F, steps).amax(1).sqrt()
    new = evaluate(mdp, theta + steps.mean(1).view_as(theta))
    return Premise(m_h, r_2, penalty, torch.stack([new.J - here.now.J, surrogate_gain(here.now, new.pi)]))


def check_theorem(mdp: MDP, theta: Tensor, norm: float, seed: int, subsets: int = 4) -> Row:
    """Theorem 5.1 on sets of steps up to `norm` long; counts are for δ_H = ω + Mr² (proof) / ω + ½ Mr² (statement)."""
    here, n = local(mdp, theta), len(theta)
    # gradients and natural gradients by turns
    direction = torch.where(torch.arange(n)[:, None] % 2 == 0, here.g, here.now.A[:, 0].flatten(1))
    sizes = norm * 10 ** torch.tensor(np.random.default_rng(seed).uniform(-2, 0, n))
    steps = candidates(direction, subsets, sizes, seed)
    step, p = steps.mean(1).view_as(theta), premise(mdp, theta, steps)
    at_theta, along, fell = curvature(mdp, theta), curvature(mdp, theta, step), p.gain[0] < -1e-9
    counts: list[list[int]] = []
    for share in (1.0, 0.5):
        omega, exact = p.m_h - share * at_theta * p.r_2, p.m_h - share * along * p.r_2
        met = (omega > 0) & (omega >= p.penalty)
        wrong, wrong_exact = p.gain[0] < omega - p.penalty - 1e-9, p.gain < exact - 1e-9
        found = [omega > 0, (omega > 0) & wrong, met, met & fell]
        found += (exact > 0, (exact > 0) & wrong_exact, (exact > 0) & (p.gain < -1e-9))
        counts.append([int(x.sum()) for x in found])
    pi, allowance = (
        torch.softmax(theta + step, -1),
        sharp_constant(mdp.setting) * kl(here.now, theta, theta + step).sqrt(),
    )
    covered = surrogate_gain(here.now, pi) > allowance * mean_advantage(here.now, pi).abs().amax((1, 2))
    names = ("ω > 0", "Eq. 13 fails", "ω ≥ C√δ_F", "J fell", "M along: ω > 0", "gain < ω", "gain < 0")
    return {
        "setting": str(mdp.setting), "‖Δθᵢ‖": f"≤ {norm:g}", "sets": 2 * n,
        **{name: f"{proof} / {statement}" for name, proof, statement in zip(names, *counts, strict=True)},
        "steps": n, "L − J ≥ C'√KL": int(covered.sum()), "yet J fell": int((covered & fell).sum()),
    }  # fmt: skip
