"""The paper's statements on small MDPs, where J, d_π, A, H, F and KL are exact (Sections 4, 5, Appendices A, B, E, K).

`capo_rl.theory.statements` tries each on random MDPs, policies and steps.
Policies are tabular softmax, π(a|s) = softmax(θ_s)_a, with θ [n, S, A] for n MDPs at once, in float64. With a discount
or a horizon, the code is one: weights d_t(s) and advantages A_t(s, a) have a time axis, 1 long with a discount.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Row = dict[str, object]


# 1. The theorem's constants


@dataclass(frozen=True)
class Setting:
    """A discount in [0, 1) without a horizon, or a horizon T ≥ 1 without a discount; `ValueError` for anything else."""

    gamma: float | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        if (self.gamma is None) == (self.horizon is None) or not 0 <= self.discount < 1 or not self.total >= 1:
            raise ValueError(f"{self}: need a discount in [0, 1) or a horizon of 1 or more")

    @property
    def discount(self) -> float:
        return self.gamma or 0.0

    @property
    def total(self) -> float:
        """What d_π sums to in L_π, the effective horizon: T or 1/(1−γ)."""
        return self.horizon if self.horizon is not None else 1 / (1 - self.discount)

    def __str__(self) -> str:
        return f"γ = {self.gamma:.4g}" if self.gamma is not None else f"T = {self.horizon}"


def constant(setting: Setting, epsilon: float = 1.0) -> float:
    """C of Theorem 5.1 for |A| ≤ ε: 2√2 γ ε / (1−γ)² with a discount (Eq. 13), T √((T−1)(2T−1)/3) ε without (Eq. 100).

    >>> constant(Setting(horizon=2)), round(constant(Setting(gamma=0.5)), 3)
    (2.0, 5.657)
    """
    if (T := setting.horizon) is not None:
        return T * math.sqrt((T - 1) * (2 * T - 1) / 3) * epsilon
    return 2 * math.sqrt(2) * setting.discount * setting.total**2 * epsilon


def sharp_constant(setting: Setting, epsilon: float = 1.0) -> float:
    """A smaller C for which Eq. 65 and 100 hold: √2 γ ε / (1−γ)², half of Eq. 13's; at most (T−1) √(2T) ε, O(T^1.5).

    Achiam et al. 2017 (Corollary 1) have 2γε/(1−γ)² times the mean total variation, and by Pinsker that is at most
    √(KL/2). With a horizon, KL(d_t ‖ d'_t) ≤ Σ_{k<t} D_k (the chain rule), so ‖d'_t − d_t‖₁ ≤ √(2 T KL) in Lemma K.2's
    place. Their ε, max_s |Σ_a π'(a|s) A(s, a)|, will do, and shrinks with the step, unlike max |A|.
    """
    if (T := setting.horizon) is not None:
        return min(constant(setting), (T - 1) * math.sqrt(2 * T)) * epsilon
    return constant(setting, epsilon) / 2


def omega_ceiling(setting: Setting, delta_f: float, epsilon: float = 1.0) -> float:
    """No accepted subset allows an ω above √(2 δ_F) ε H_eff, H_eff = T or 1/(1−γ).

    m_H(Δθᵢ) ≥ ω + ½ M r² leaves gᵀΔθᵢ ≥ ω, and gᵀΔθ = H_eff E[A ∇log πᵀΔθ] ≤ H_eff ε √(2 m_F) by Cauchy and Schwarz.
    That is below C √δ_F for every γ > 1/3 (with `sharp_constant` every γ > 1/2) and every T ≥ 3.
    """
    return setting.total * epsilon * math.sqrt(2 * delta_f)


@dataclass(frozen=True)
class Guarantee:
    """What Theorem 5.1 says of one step: J(θ+Δθ) − J(θ) ≥ bound; and what keeps it from saying that J won't fall."""

    omega: float
    C: float
    bound: float
    fails: tuple[str, ...]

    @property
    def covered(self) -> bool:
        return not self.fails


def guarantee(
    setting: Setting,
    m_h: Sequence[float],
    m_f: Sequence[float],
    M: float,
    r: float,
    epsilon: float,
    *,
    kl: float | None = None,
    margin: float = 1.0,
) -> Guarantee:
    """Theorem 5.1 on measured quantities: bound = ω − C √δ_F (Eq. 13), with ω as large as they allow (Eq. 12).

    m_h, m_f      of the accepted subsets' steps: in units of J (Eq. 7 sums over a completion's tokens), and in nats a
                  token; ω = min m_H − margin · M r², δ_F = max m_F
    M, r          ‖H‖_op and the longest step (Assumption E.1)
    epsilon       the largest |A|
    kl            the aggregated step's measured KL, in δ_F's place: Eq. 65 has it, Eq. 82 approximates it by m_F ≤ δ_F
    margin        1 as in the proof: exact, if kl is given and M bounds ‖H‖_op all along the step; ½ as in the
                  statement: up to the terms of third order that Eq. 82 neglects
    Raises `ValueError` for different numbers of shifts, margin < ½, or a negative or NaN M, r, epsilon, kl or m_F.
    """
    if len(m_h) != len(m_f) or not all(x >= 0 for x in (M, r, epsilon, kl or 0.0, margin - 0.5, *m_f)):
        raise ValueError(f"{len(m_h)} m_H, m_F={m_f}, M={M}, r={r}, epsilon={epsilon}, kl={kl}, margin={margin}")
    C, reach = constant(setting, epsilon), omega_ceiling(setting, 1.0, epsilon)
    if not m_h:
        return Guarantee(-math.inf, C, -math.inf, ("no subset was accepted",))
    omega, delta_f = float(np.min(m_h)) - margin * M * r**2, max(m_f)  # np.min, since a NaN must not be passed over
    bound = omega - C * math.sqrt(delta_f if kl is None else kl)
    reasons = {
        f"ω = {omega:.3g} is not positive: the least m_H is below {margin} M r² = {margin * M * r**2:.3g}": not omega
        > 0,
        f"ω = {omega:.3g} is {-bound:.3g} below C √δ_F": not bound >= 0,
        f"C = {C:.3g} is above {reach:.3g}: at this horizon no step can have ω ≥ C √δ_F": not reach >= C,
        f"the measured KL {kl} is above δ_F = {delta_f:.3g}": kl is not None and not kl <= delta_f,
    }
    return Guarantee(omega, C, bound, tuple(why for why, fails in reasons.items() if fails))


# 2. Exact quantities


@dataclass(frozen=True)
class MDP:
    """n MDPs: P(s'|s, a) [n, S, A, S], R [n, S, A], ρ₀ [n, S]."""

    setting: Setting
    P: Tensor
    R: Tensor
    rho: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Of a policy: π [n, S, A], J [n], d_t(s) = γᵗ Pr(s_t = s) [n, T, S] and A_t(s, a) [n, T, S, A].

    With a discount d is summed over t, and T is 1. Eq. 85's A has no t; it needs one where the state doesn't tell t.
    """

    pi: Tensor
    J: Tensor
    d: Tensor
    A: Tensor

    @property
    def d_mean(self) -> Tensor:
        """d_π normalised [n, S]: what KL and F average over."""
        return self.d.sum(1) / self.d.sum((1, 2))[:, None]

    @property
    def epsilon(self) -> Tensor:
        """max |A| [n]."""
        return self.A.abs().amax((1, 2, 3))


def evaluate(mdp: MDP, theta: Tensor) -> Evaluation:
    """Solve the Bellman equations, differentiably in θ."""
    pi, gamma = torch.softmax(theta, -1), mdp.setting.discount
    P_pi, r_pi = torch.einsum("nsa,nsap->nsp", pi, mdp.P), (pi * mdp.R).sum(-1)
    if mdp.setting.horizon is None:
        system = torch.eye(P_pi.shape[-1], dtype=P_pi.dtype) - gamma * P_pi
        V, d = torch.linalg.solve(system, r_pi), torch.linalg.solve(system.mT, mdp.rho)
        A = mdp.R + gamma * torch.einsum("nsap,np->nsa", mdp.P, V) - V[..., None]
        return Evaluation(pi, (mdp.rho * V).sum(-1), d[:, None], A[:, None])
    V, ds, As = torch.zeros_like(r_pi), [mdp.rho], list[Tensor]()
    for _ in range(mdp.setting.horizon):
        Q = mdp.R + torch.einsum("nsap,np->nsa", mdp.P, V)
        V = (pi * Q).sum(-1)
        As.insert(0, Q - V[..., None])
        ds.append(torch.einsum("ns,nsp->np", ds[-1], P_pi))
    return Evaluation(pi, (mdp.rho * V).sum(-1), torch.stack(ds[:-1], 1), torch.stack(As, 1))


def mean_advantage(now: Evaluation, pi: Tensor) -> Tensor:
    """Ā_t(s) = Σ_a π'(a|s) A_t(s, a) [n, T, S], for π' [n, S, A]."""
    return torch.einsum("nsa,ntsa->nts", pi, now.A)


def surrogate_gain(now: Evaluation, pi: Tensor) -> Tensor:
    """L_π(π') − J(π) = Σ_t Σ_s d_t(s) Ā_t(s) [n] (Eq. 65, 100)."""
    return (now.d * mean_advantage(now, pi)).sum((1, 2))


def kl(now: Evaluation, theta: Tensor, new: Tensor) -> Tensor:
    """E_{s∼d_π} KL(π_θ ‖ π_θ') [n] (Eq. 24), d_π normalised."""
    return (now.d_mean[..., None] * now.pi * (torch.log_softmax(theta, -1) - torch.log_softmax(new, -1))).sum((1, 2))


def fisher(d: Tensor, theta: Tensor) -> Tensor:
    """F = E_{s∼d}[diag π − ππᵀ], a block a state, [n, S·A, S·A] (Eq. 6), for d [n, S]."""
    pi = torch.softmax(theta, -1)
    blocks = d[..., None, None] * (torch.diag_embed(pi) - pi[..., :, None] * pi[..., None, :])
    full = torch.diag_embed(blocks.permute(0, 2, 3, 1))  # [n, a, b, s, s']
    return full.permute(0, 3, 1, 4, 2).reshape(len(d), pi[0].numel(), pi[0].numel())


def derivatives(f: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [n, S·A] and Hessian [n, S·A, S·A] of each f(θ)ₙ, by autograd."""
    leaf = theta.detach().clone().requires_grad_()
    g = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)[0].flatten(1)
    rows = [torch.autograd.grad(g[:, i].sum(), leaf, retain_graph=True)[0].flatten(1) for i in range(g.shape[1])]
    return g.detach(), torch.stack(rows, 1)


@dataclass(frozen=True)
class Local:
    """At θ: the policy, g, ∇²J (Assumption E.1), ∇²L (Eq. 37, and of Eq. 66's proof) and F."""

    now: Evaluation
    g: Tensor
    H_J: Tensor
    H_L: Tensor
    F: Tensor


def local(mdp: MDP, theta: Tensor) -> Local:
    """All derivatives at θ."""
    now = evaluate(mdp, theta)
    g, H_J = derivatives(lambda x: evaluate(mdp, x).J, theta)
    H_L = derivatives(lambda x: surrogate_gain(now, torch.softmax(x, -1)), theta)[1]
    return Local(now, g, H_J, H_L, fisher(now.d_mean, theta))


def half_quadratic(C: Tensor, x: Tensor) -> Tensor:
    """½ xᵀ C x for x [n, ..., k]: m_F of F (Eq. 64)."""
    return torch.einsum("n...i,nij,n...j->n...", x, C, x) / 2


def shift(g: Tensor, H: Tensor, x: Tensor) -> Tensor:
    """m_H = gᵀx + ½ xᵀ H x (Eq. 64)."""
    return torch.einsum("n...i,ni->n...", x, g) + half_quadratic(H, x)


def random_mdps(n: int, seed: int, setting: Setting, S: int = 4, A: int = 3) -> tuple[MDP, Tensor]:
    """MDPs from nearly deterministic to well mixed, |R| ≤ 1, with policies from flat to sharp: θ [n, S, A]."""
    rng = np.random.default_rng(seed)

    def simplex(*shape: int) -> Tensor:
        x = rng.gamma(10 ** rng.uniform(-1.5, 0.5, n).reshape(n, *[1] * len(shape)), size=(n, *shape)) + 1e-12
        return torch.tensor(x / x.sum(-1, keepdims=True))

    R = rng.uniform(-1, 1, (n, S, A))
    R[::2] = np.sign(R[::2])
    theta = rng.normal(size=(n, S, A)) * 10 ** rng.uniform(-1, 0.7, (n, 1, 1))
    return MDP(setting, simplex(S, A, S), torch.tensor(R), simplex(S)), torch.tensor(theta)


def random_steps(theta: Tensor, seed: int, low: float = -2, high: float = 0.5) -> Tensor:
    """Δθ [n, S, A] of random directions, 10^low to 10^high long; every third changes one state alone."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=theta.shape)
    x[::3] *= np.arange(theta.shape[1])[:, None] == rng.integers(theta.shape[1], size=len(x[::3]))[:, None, None]
    size = 10 ** rng.uniform(low, high, (len(x), 1, 1))
    return torch.tensor(x / np.linalg.norm(x, axis=(1, 2), keepdims=True) * size)


# 3. The checks
