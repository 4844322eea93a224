"""Bounds that reject a given share of the tokens, and how sure a few steps are of them.

A token is judged by how many times it exceeds the bounds of a run's `Thresholds`, one number a criterion: m_F / δ_F,
and the larger of m_H / δ_H and m_H / δ_H^high. To calibrate is to find the factor by which to move each bound. A side
that is open stays open, and the two sides of m_H keep their proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from capo_rl.curvature.selection import Thresholds
from capo_rl.thresholds.kl_regression import student_quantile

Array = NDArray[np.float64]

# A step in the bootstrap is thinned to this many tokens: what varies is steps, and sorting is what takes time.
_TOKENS_A_STEP = 4096


def severity(m_f: Array, m_h: Array, thresholds: Thresholds) -> Array:
    """How many times over the bounds each of n tokens is, [K, n]: a row for m_F and one for m_H, where bounded.

    Raises `ValueError` where no bound is left, or where one can't be multiplied.

    >>> severity(np.array([2.0]), np.array([-0.3]), Thresholds(1.0, (-0.1, 0.2)))
    array([[2.],
           [3.]])
    """
    low, high = thresholds.hessian or (None, None)
    rows = []
    if bounded(thresholds.fisher):
        rows.append(m_f / _multipliable("capo_fisher_threshold", thresholds.fisher, sign=1))
    sides = []
    if bounded(low):
        sides.append(m_h / _multipliable("capo_hessian_low", low, sign=-1))
    if bounded(high):
        sides.append(m_h / _multipliable("capo_hessian_high", high, sign=1))
    if sides:
        rows.append(np.maximum.reduce(sides))
    if not rows:
        raise ValueError(
            "no bound to move: capo_fisher_threshold, capo_hessian_low and capo_hessian_high are all open; give those "
            "that are to be chosen any number"
        )
    return np.stack(rows)


def scaled(thresholds: Thresholds, factors: Array) -> Thresholds:
    """The thresholds with each criterion's bounds times its factor, [K] in the order of `severity`'s rows.

    >>> scaled(Thresholds(1.0, (-0.1, 0.2)), np.array([3.0, 10.0]))
    Thresholds(fisher=3.0, hessian=(-1.0, 2.0))
    """
    left = list(map(float, factors))
    fisher = thresholds.fisher if not bounded(thresholds.fisher) else thresholds.fisher * left.pop(0)
    low, high = thresholds.hessian or (None, None)
    if left:
        low, high = (side if not bounded(side) else side * left[0] for side in (low, high))
    return Thresholds(fisher, (low, high))


def factors_at(severities: Array, rate: float) -> Array:
    """The factors [K] at which the criteria together reject as many of the n tokens as fit into `rate`.

    Each criterion may reject the same share q of the tokens. With p the share of tokens at least as severe as a token,
    in the criterion that it is worst in, those with p < q are rejected, so q is the `rate`-quantile of p; a factor is
    the largest severity that is kept. Of tied tokens all are kept or none.

    >>> severities = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [9.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    >>> factors_at(severities, 2 / 6)       # the last token by m_F, the first by m_H
    array([5., 2.])
    """
    n = severities.shape[1]
    ordered = np.sort(severities, axis=1)
    shares = np.stack(
        [(n - np.searchsorted(row, values, "left")) / n for row, values in zip(ordered, severities, strict=True)]
    )
    p = np.sort(shares.min(axis=0))
    allowed = math.floor(rate * n * (1 + 1e-12))  # 0.05 · 20 is 1, whatever floats say
    q = p[min(allowed, n - 1)]
    return np.stack([values[share >= q].max(initial=0.0) for values, share in zip(severities, shares, strict=True)])


def rejected(severities: Array, factors: Array) -> float:
    """The share of the tokens that the moved bounds reject."""
    return float((severities > factors[:, None]).any(axis=0).mean())


def bootstrap(steps: Sequence[Array], rate: float, resamples: int = 1000, seed: int = 0) -> tuple[Array, Array]:
    """What other steps would have given: factors [resamples, K] and the rejection rates [≤ resamples] they would have.

    Steps are drawn whole, with replacement, because the tokens of one share a policy and moments (Davison and Hinkley
    1997, *Bootstrap Methods and their Application*, Section 3.8). The factors of a draw are tried on the steps that it
    left out, pooled: bounds are for steps they were not chosen on.

    Raises `ValueError` for fewer than six steps: five can't hold a 95 % interval (1 − 2·2⁻ⁿ).
    """
    if len(steps) < 6:
        raise ValueError(f"{len(steps)} steps count: intervals of 95 % need six; raise --steps")
    thinned = [step[:, :: math.ceil(step.shape[1] / _TOKENS_A_STEP)] for step in steps]
    generator = np.random.default_rng(seed)
    factors, rates = [], []
    for _ in range(resamples):
        drawn = generator.integers(len(steps), size=len(steps))
        factors.append(factors_at(np.concatenate([thinned[i] for i in drawn], axis=1), rate))
        left_out = [thinned[i] for i in range(len(steps)) if i not in drawn]
        if left_out:
            rates.append(rejected(np.concatenate(left_out, axis=1), factors[-1]))
    return np.stack(factors), np.array(rates)


def interval(draws: Array, steps: int, level: float = 0.95) -> tuple[Array, Array]:
    """Both ends, over the first axis, of an interval from a bootstrap's draws over a number of steps.

    Percentiles, further out for few steps as Student's t is: Φ(∓ √(n / (n − 1)) t), t of n − 1 degrees (the expanded
    percentile interval of Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). By rank, since draws may
    be infinite. It stays too narrow for few steps: of a 95 % quantile, where steps differ by a factor of 1.6, it covers
    0.84 with 6 steps, 0.88 with 12 and 0.91 with 20.
    """
    t = student_quantile((1 + level) / 2, steps - 1) * math.sqrt(steps / (steps - 1))
    low, high = np.quantile(draws, [NormalDist().cdf(-t), NormalDist().cdf(t)], axis=0, method="nearest")
    return low, high


def bounded(bound: float | None) -> TypeGuard[float]:
    """Whether a side of `Thresholds` is a number that tokens may pass."""
    return bound is not None and math.isfinite(bound)


def _multipliable(name: str, bound: float, sign: int) -> float:
    if bound * sign <= 0:
        raise ValueError(
            f"{name}={bound} can't be multiplied: give a number {'above' if sign > 0 else 'below'} 0, or null"
        )
    return bound
