"""How long may *this* step be? Judgements of the coming step in the control of the trust region (docs/testbed.md).

The default steers by the mean KL of past steps and knows nothing of the step before it is taken. A judgement f is a
figure of the step's own gradient, known before the step, to which its length is to be proportional:

    lr_t = min(schedule's, limit_t · f_t)        κ_t = KL_t / (lr_t / f_t)²

so the control learns what KL a step of length f has (the measured ratio), and aims at the same mean KL as without. A
good judgement makes κ_t vary less than a step's KL over lr² does, and the run better at the same budget.

    share           ρ of this step alone: √(‖g_acc‖² / ‖g_all‖²), the verdicts at the length that the limit allows
    own_length      the largest f with f ≤ ρ(f), the verdicts at the length limit · f that it leads to
    energy          the largest length at which tokens with 90 % of the score energy Σ w² ‖u‖² ‖h‖² are in bounds
    prediction      1 / √(the step's KL as the last layer's model predicts it)
    gradient_norm   1 / ‖g‖, the last layer's
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capo_rl.curvature.selection import Thresholds, select
from capo_rl.curvature.shifts import Shifts
from capo_rl.planning.planner import MicroBatch, Planner
from capo_rl.planning.share import squared_norms
from capo_rl.planning.trust_region import Measure, Shortened, Steering

# The bounds of Table 4.
_FISHER, _HESSIAN = 1e-4, 1e-2
BOUNDS = Thresholds(fisher=_FISHER, hessian=(-_HESSIAN, _HESSIAN))
_ENERGY = 0.9
_LENGTHS = [0.8**n for n in range(17)]  # of `own_length`, down to 0.028
_LEAST, _MOST = 0.02, 50.0  # of a judgement
_SHARES = ("share", "own_length")  # of the step; the others have units, and are counted in those of the run's first

# A judgement of a step, from its tokens, the learning rate that their shifts were planned at, the one that the control
# would give it, and the planner's figures.
Judgement = Callable[[MicroBatch, float, float, dict[str, float]], float]


def at_length(shifts: Shifts, factor: float | Tensor) -> Shifts:
    """The shifts of a step that is longer by a factor: s goes with it, c with its square, and so

        m_F = ½ s² → factor² m_F        m_H = A (s + ½ (s² − c)) → A (factor s + factor² ½ (s² − c))

    A = m_H / (s + ½ (s² − c)), so the second needs no advantage.
    """
    first, second = shifts.s, 0.5 * (shifts.s.square() - shifts.c)
    whole = first + second
    ratio = ((factor * first + factor**2 * second) / whole).where(whole != 0, 0)
    return Shifts(
        m_h=shifts.m_h * ratio,
        m_f=shifts.m_f * factor**2,
        s=factor * first,
        c=factor**2 * shifts.c,
        missing_mass=shifts.missing_mass,
    )


def _shares(batch: MicroBatch, planned: float, lengths: list[float]) -> list[float]:
    """ρ of a step with the verdicts at each of some lengths."""
    assert batch.weights is not None
    accepted = [batch.weights.where(select(at_length(batch.shifts, length / planned), BOUNDS), 0) for length in lengths]
    *some, everyone = squared_norms(batch.layer, torch.stack([*accepted, batch.weights]), batch.rows).tolist()
    return [math.sqrt(each / everyone) if everyone > 0 else 1.0 for each in some]


def share(batch: MicroBatch, planned: float, allowed: float, figures: dict[str, float]) -> float:
    return _shares(batch, planned, [allowed])[0]


def own_length(batch: MicroBatch, planned: float, allowed: float, figures: dict[str, float]) -> float:
    shares = _shares(batch, planned, [allowed * length for length in _LENGTHS])
    return next((length for length, rho in zip(_LENGTHS, shares, strict=True) if length <= rho), _LENGTHS[-1])


def energy(batch: MicroBatch, planned: float, allowed: float, figures: dict[str, float]) -> float:
    """To first order in the length, where each token has its own largest one."""
    assert batch.weights is not None
    objective = (batch.advantages * batch.shifts.s).abs()
    within = (_FISHER / batch.shifts.m_f).sqrt().minimum(_HESSIAN / objective)
    own = batch.weights.square() * batch.layer.u.square().sum(-1) * batch.layer.hidden.square().sum(-1)
    there = (own > 0) & within.isfinite()
    if not there.any():
        return math.nan
    longest, order = (planned * within[there]).double().sort()
    below = own[there][order].double().cumsum(0)
    return float(longest[torch.searchsorted(below, (1 - _ENERGY) * below[-1])])


def prediction(batch: MicroBatch, planned: float, allowed: float, figures: dict[str, float]) -> float:
    predicted = figures["capo/kl/predicted"]
    return planned / math.sqrt(predicted) if predicted > 0 else math.nan


def gradient_norm(batch: MicroBatch, planned: float, allowed: float, figures: dict[str, float]) -> float:
    assert batch.weights is not None
    squared = float(squared_norms(batch.layer, batch.weights[None], batch.rows))
    return squared**-0.5 if squared > 0 else math.nan


JUDGEMENTS: dict[str, Judgement] = {
    "share": share,
    "own_length": own_length,
    "energy": energy,
    "prediction": prediction,
    "gradient_norm": gradient_norm,
}


class Judged(Steering):
    """The trust region's control with a judgement of each step in it."""

    judged = 1.0  # f of the coming step

    def scale(self, lr: float) -> float:
        return min(1.0, self.limit * self.judged / lr) if lr > 0 else 1.0

    def after_step(self, lr: float, measure: Measure, informative: bool = True) -> Shortened:
        return super().after_step(lr / self.judged, measure, informative)


def judge(trainer: Any, name: str) -> None:
    """Put a judgement into the control of a trainer in the mode `trust_region` that watches (one micro-batch a step).

    What it says is in the run's figures as `capo/share`. A step of momentum alone, or whose judgement is no number, has
    that of the step before it.
    """
    planner, steps, judgement = trainer.planner, trainer.optimizer_steps, JUDGEMENTS[name]
    budget = steps.budget
    assert isinstance(planner, Planner) and type(budget) is Steering
    control = steps.budget = Judged(budget.budget, budget.limit, budget.way)
    inner, unit = planner.commit, 1.0 if name in _SHARES else math.nan

    def commit(scale: float = 1.0, describe: bool = True) -> dict[str, float]:
        nonlocal unit
        (batch,) = planner.micro_batches
        figures = inner(scale, describe)
        allowed = min(control.limit, trainer.optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            judges = planner.has_gradient and planner.step.lr > 0  # a warm-up begins at 0
            found = judgement(batch, planner.step.lr, allowed, figures) if judges else math.nan
        if math.isfinite(found):
            unit = found if math.isnan(unit) else unit
            control.judged = min(max(found / unit, _LEAST), _MOST)
        return figures | {"capo/share": control.judged}

    planner.commit = commit  # type: ignore[method-assign]
