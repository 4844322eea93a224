"""Where the paper's statements stop: counterexamples, orders of what is neglected, and bounds at a model's horizon."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from capo_rl.theory.guarantee import (
    MDP,
    Row,
    Setting,
    constant,
    evaluate,
    half_quadratic,
    kl,
    local,
    omega_ceiling,
    sharp_constant,
    shift,
    surrogate_gain,
)
from capo_rl.theory.statements import curvature, premise


def neglected_cubic() -> tuple[MDP, Tensor, Tensor]:
    """A step that meets every condition at θ of Theorem 5.1, with Mr² too, and lowers J, by what Eq. 82 neglects.

    Two contexts, γ = 0.1: it gains a little in the first, and in the second undoes a policy that is all but certain,
    where g, H and F at θ are all but zero.
    """
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    R = torch.tensor([[[1.0, 0.0]] * 2], dtype=torch.float64)
    theta, step = torch.tensor([[[[0, 0], [5, -5]]], [[[0.5, -0.5], [-10, 10]]]], dtype=torch.float64)
    return MDP(Setting(gamma=0.1), half.expand(1, 2, 2, 2), R, half), theta, step.reshape(1, 1, 4)


def opposite_pair(downhill: float = 1e-3) -> tuple[MDP, Tensor, Tensor]:
    """Steps back and forth along the largest curvature: with less than ½ Mr² in δ_H they'd pass, and lower J.

    A bandit, so that C = 0 and L = J. Each has an m_H just below ½ Mr², and as much below it as their mean lowers J.
    """
    one, zero = torch.ones((1, 1), dtype=torch.float64), torch.zeros((1, 1, 3), dtype=torch.float64)
    R = torch.tensor([[[-1.0, 0.5, 0.5]]], dtype=torch.float64)
    steps = torch.tensor([[[0, 0.3, -0.3], [0, -0.3, 0.3]]], dtype=torch.float64) - downhill * R
    return MDP(Setting(horizon=1), one.expand(1, 1, 3, 1), R, one), zero, steps


def past_the_bend() -> tuple[MDP, Tensor, Tensor]:
    """A bandit's step from where J curves up most to where it is flat: J' − J < ω with ½ Mr², M all along the step."""
    one, R = torch.ones((1, 1), dtype=torch.float64), torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    bend = math.log(2 + math.sqrt(3)) / 2  # where the logistic function's second derivative is largest
    theta, step = torch.tensor([[[[-bend, bend]]], [[[3.0, -3.0]]]], dtype=torch.float64)
    return MDP(Setting(horizon=1), one.expand(1, 1, 2, 1), R, one), theta, step


def orders(mdp: MDP, theta: Tensor, step: Tensor) -> dict[str, float]:
    """The power of ‖Δθ‖ with which each error falls when the steps are halved: the median, to two digits."""
    here = local(mdp, theta)

    def errors(step: Tensor) -> dict[str, Tensor]:
        x, new = step.flatten(1), evaluate(mdp, theta + step)
        gain, L, D = new.J - here.now.J, surrogate_gain(here.now, new.pi), kl(here.now, theta, theta + step)
        m_j, m_l, m_f = shift(here.g, here.H_J, x), shift(here.g, here.H_L, x), half_quadratic(here.F, x)
        return {
            "Eq. 5: J' − J − m_H, H = ∇²J": gain - m_j,
            "Eq. 5 with Eq. 37's H": gain - m_l,
            "Eq. 66: L − J − m_H, H = ∇²J": L - m_j,
            "Eq. 66 with Eq. 37's H": L - m_l,
            "Eq. 26: KL − m_F": D - m_f,
            "Eq. 81's brace: √KL − m_F": D.sqrt() - m_f,
        }

    whole, half = errors(step), errors(step / 2)
    # rounding is near 1e-13: what has come down to it has no order
    powers = {name: (x / half[name]).abs().log2()[half[name].abs() > 1e-11] for name, x in whole.items()}
    return {name: round(float(x.median()), 2) for name, x in powers.items()}


def horizons(delta_f: float = 1e-4) -> list[Row]:
    """What Theorem 5.1 asks of ω and what a step can give, for |A| ≤ 1 and δ_F a token."""
    settings = [Setting(gamma=x) for x in (0.3, 1 / 3, 0.5, 0.9, 0.99, 0.999)]
    rows: list[Row] = []
    for setting in [*settings, *(Setting(horizon=T) for T in (2, 3, 10, 128, 1024))]:
        C, root, ceiling = constant(setting), math.sqrt(delta_f), omega_ceiling(setting, delta_f)
        by_sequence = math.nan if setting.horizon is None else math.sqrt(setting.horizon / 2) * root
        rows.append({
            "setting": str(setting), "C": C, "C√δ_F": C * root, "sharp C√δ_F": sharp_constant(setting) * root,
            "largest ω": ceiling, "C√δ_F / largest ω": C * root / ceiling, "δ_F with C√δ_F = 1": C**-2,
            "√(T δ_F/2)": by_sequence,
        })  # fmt: skip
    return rows


def counterexamples() -> list[Row]:
    """`neglected_cubic`, `opposite_pair` and `past_the_bend`, with Mr², ½ Mr² and 0.4 Mr² in δ_H.

    A promise is broken where ω > 0, ω ≥ C√δ_F and J' − J is below ω − C√δ_F.
    """
    rows: list[Row] = []
    for case in (neglected_cubic, opposite_pair, past_the_bend):
        mdp, theta, steps = case()
        p, ends = premise(mdp, theta, steps), (None, steps.mean(1).view_as(theta))
        for share in (1.0, 0.5, 0.4):
            row: Row = {
                "case": case.__name__,
                "δ_H": f"ω + {share:g} Mr²",
                "J' − J": float(p.gain[0]),
                "C√δ_F": float(p.penalty),
            }
            for name, end in zip(("at θ", "along"), ends, strict=True):
                omega = float((p.m_h - share * curvature(mdp, theta, end) * p.r_2).min())
                broken = omega > 0 and omega >= float(p.penalty) and float(p.gain[0]) < omega - float(p.penalty)
                row |= {f"ω, M {name}": omega, f"broken, M {name}": broken}
            rows.append(row)
    return rows
