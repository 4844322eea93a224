"""Thresholds for a target that a user understands, from a few watched steps: a share of the tokens, or a KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from capo_rl.curvature.selection import Thresholds
from capo_rl.thresholds.kl_regression import Regression, regress
from capo_rl.thresholds.rejection_rate import bootstrap, factors_at, interval, rejected, scaled, severity

Array = NDArray[np.float64]

FEWEST = 7  # steps to watch: the first may not count, and six hold a 95 % interval
_EXPLAINS = 0.5  # the R², with slope one, below which a bound on m_F is not trusted to hold a KL


class CalibrationError(ValueError):
    """A recipe or a target for which no thresholds can be found; the message names the reason and the fix."""


@dataclass(frozen=True)
class Step:
    """A watched update, at α*: m_F and m_H [n] of its tokens, their batch m_F and measured KL, in nats."""

    m_f: Array
    m_h: Array
    batch_m_f: float
    kl: float


@dataclass(frozen=True)
class Choice:
    """Thresholds for a target, and what is known of them; `budget` is what to use where they won't do, in nats.

    intervals: 95 % of each bound, by the name of its field; remarks: lines for whoever reads the file.
    """

    thresholds: Thresholds
    intervals: dict[str, tuple[float, float]]
    remarks: list[str] = field(default_factory=list)
    budget: float | None = None


def choose_for_rate(steps: Sequence[Step], thresholds: Thresholds, rate: float) -> Choice:
    """The bounds that reject `rate` of the tokens, each criterion alone as many as the other; open sides stay open.

    Raises `CalibrationError` for too few steps, no bound, or a rate that more tokens would have to have a shift for.
    """
    try:
        by_step = [severity(step.m_f, step.m_h, thresholds) for step in steps]
        drawn, rates = bootstrap(by_step, rate)
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    pooled = np.concatenate(by_step, axis=1)
    factors = factors_at(pooled, rate)
    if not factors.all():
        shifted = float((pooled[factors.argmin()] > 0).mean())
        raise CalibrationError(
            f"--rejection-rate {rate:.3g}: a bound would have to be 0, since only {shifted:.3g} of the tokens have a "
            "shift on its side: ask for less, or leave that bound open (null)"
        )
    chosen = scaled(thresholds, factors)
    low, high = (scaled(thresholds, end) for end in interval(drawn, len(steps)))
    at, (least, most) = float(np.median(rates)), np.quantile(rates, (0.025, 0.975))
    return Choice(
        chosen,
        _between(low, high),
        [
            f"these steps have {rejected(pooled, factors):.2%} out of bounds; steps that bounds were not chosen on "
            f"{at:.2%} [{least:.2%}, {most:.2%}]",
            *_about_kl(steps),
        ],
    )


def choose_for_kl(steps: Sequence[Step], kl: float) -> Choice:
    """The bound on m_F that holds updates to `kl` nats, by a regression of measured KL on batch m_F with slope one.

    m* is the batch m_F up to which the next update stays below `kl` with probability 0.95. δ_F is the largest bound at
    which no watched step's accepted tokens have a batch m_F above m*, where a step's batch m_F is taken to shrink as
    the mean m_F of its tokens does when some are left out. m_H says nothing of KL, so its bounds are open.

    Where m_F explains less than half of log KL (R² with slope one), no bound on it holds a KL: the choice is then a
    budget for the measured KL, and the bound is only a remark.

    Raises `CalibrationError` for too few steps, or a target that no bound holds.
    """
    if len(steps) < FEWEST - 1:
        raise CalibrationError(f"{len(steps)} steps count: intervals of 95 % need {FEWEST - 1}; raise --steps")
    try:
        line = regress([step.batch_m_f for step in steps], [step.kl for step in steps], slope=1.0)
    except ValueError as error:
        raise CalibrationError(f"{error} (--steps)") from error
    bound = fisher_bound(steps, line.shift_for(kl))
    interval = _bound_interval(steps, kl)
    tokens = np.concatenate([step.m_f for step in steps])
    remarks = _about_kl(steps)
    if line.r2 < _EXPLAINS:
        remarks.append(
            f"m_F explains too little of KL here for a bound on it to hold one (R² {line.r2:.2f} with slope 1, below "
            f"{_EXPLAINS}): use a budget for the measured KL. By the regression δ_F would be "
            f"{as_yaml(bound)} [{as_yaml(interval[0])}, {as_yaml(interval[1])}]"
        )
        return Choice(Thresholds(None, (None, None)), {}, remarks, budget=kl)
    if not bound:
        raise CalibrationError(
            f"--kl-nats {kl:.3g}: a bound would have to be 0, since even the tokens that move least are too much "
            "for it: ask for more, or use a lower learning rate"
        )
    if math.isinf(bound):
        remarks.append("all watched steps keep within the target without a bound")
    else:
        remarks.append(f"these steps have {float((tokens > bound).mean()):.2%} out of bounds")
    return Choice(Thresholds(bound, (None, None)), {"capo_fisher_threshold": interval}, remarks)


def fisher_bound(steps: Sequence[Step], batch_m_f: float) -> float:
    """The largest δ_F at which every step's accepted tokens are taken to have a batch m_F of at most `batch_m_f`.

    In each step that is batch m_F times the mean m_F of the tokens with m_F ≤ δ_F over that of all. Infinite where
    nothing has to be rejected.
    """
    excluded = math.inf  # the smallest m_F that has to be rejected
    for step in steps:
        m_f = np.sort(step.m_f)
        if not m_f.any():
            continue
        means = np.cumsum(m_f) / np.arange(1, len(m_f) + 1)  # of the i smallest: it grows with i
        kept = int(np.searchsorted(step.batch_m_f * means / means[-1], batch_m_f, "right"))
        if kept < len(m_f):
            excluded = min(excluded, m_f[kept])
    if math.isinf(excluded):
        return math.inf
    return float(max(step.m_f[step.m_f < excluded].max(initial=0.0) for step in steps))


def _bound_interval(steps: Sequence[Step], kl: float, resamples: int = 1000) -> tuple[float, float]:
    """95 % of δ_F under a bootstrap over steps."""
    generator = np.random.default_rng(0)
    known = [step for step in steps if math.isfinite(step.kl)]
    bounds = []
    for _ in range(resamples):
        drawn = [known[i] for i in generator.integers(len(known), size=len(known))]
        line = regress([step.batch_m_f for step in drawn], [step.kl for step in drawn], slope=1.0)
        bounds.append(fisher_bound(drawn, line.shift_for(kl)))
    low, high = interval(np.array(bounds), len(known))
    return float(low), float(high)


def kl_lines(steps: Sequence[Step]) -> tuple[Regression, Regression] | None:
    """KL on batch m_F, with a free slope and with slope one."""
    shifts, kl = [step.batch_m_f for step in steps], [step.kl for step in steps]
    try:
        return regress(shifts, kl), regress(shifts, kl, slope=1.0)
    except ValueError:
        return None


def _about_kl(steps: Sequence[Step]) -> list[str]:
    kl = [step.kl for step in steps if math.isfinite(step.kl)]
    about = [f"KL of an update without a mask: median {np.median(kl):.2g} nats, largest {max(kl):.2g}"] if kl else []
    if (lines := kl_lines(steps)) is None:
        return [*about, "too few updates to say how KL goes with batch m_F"]
    free, one = lines
    return [
        *about,
        f"log KL on log batch m_F: slope {free.slope:.2f}, R² {free.r2:.2f}, residuals ×÷ {math.exp(free.spread):.2g}; "
        f"with slope 1, R² {one.r2:.2f}, residuals ×÷ {math.exp(one.spread):.2g}",
    ]


def _between(low: Thresholds, high: Thresholds) -> dict[str, tuple[float, float]]:
    return {name: (one, fields_of(high)[name]) for name, one in fields_of(low).items() if math.isfinite(one)}


def fields_of(thresholds: Thresholds) -> dict[str, float]:
    """The bounds by the names of their fields; an open side is infinite."""
    low, high = thresholds.hessian or (None, None)
    return {
        "capo_fisher_threshold": math.inf if thresholds.fisher is None else thresholds.fisher,
        "capo_hessian_low": -math.inf if low is None else low,
        "capo_hessian_high": math.inf if high is None else high,
    }


def as_yaml(value: float) -> str:
    """As YAML reads a float: with a point, and with null for no bound."""
    return "null" if math.isinf(value) else f"{value:.3e}"
