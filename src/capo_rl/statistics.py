"""What a handful of seeds can say: point estimates, their intervals, collapse, and completions to a target.

Intervals and the interquartile mean follow Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice" (arXiv 2108.13264); standard errors over seeds and smoothed curves follow the CAPO paper (arXiv
2510.00819, "Reproducibility"). A curve is a run's accuracy at its logged steps; None, NaN and infinity (null to
records.py) are no measurement there: they are skipped, and take no side in any verdict. Elsewhere they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error √(Σ (x − mean)² / (n − 1) / n), which is NaN for one seed.

    Raises `ValueError` for no values, or one that isn't finite.

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    x = _sample(values)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm, of values above zero: the middle of figures that differ by factors.

    >>> round(geometric_mean([1e-4, 1e-2]), 12)
    0.001
    """
    return float(np.exp(np.mean(np.log(list(values)))))


def iqm(values: Iterable[float]) -> float:
    """The interquartile mean (Agarwal et al., Section 4.3): the mean of the middle half of the sorted values.

    iqm = Σᵢ wᵢ x₍ᵢ₎ / (n/2) with wᵢ = |[i, i+1] ∩ [n/4, 3n/4]|, so that values cut by a quartile count in part. It is
    `scipy.stats.trim_mean(x, 0.25)` where 4 divides n. Raises `ValueError` as `mean_and_error`.

    >>> iqm([0.0, 1.0, 3.0, 100.0])
    2.0
    """
    x = np.sort(_sample(values))
    n, i = len(x), np.arange(len(x))
    w = np.clip(np.minimum(i + 1, 3 * n / 4) - np.maximum(i, n / 4), 0, None)
    return float(w @ x / (n / 2))


def bootstrap_interval(
    groups: Sequence[Iterable[float]],
    statistic: Callable[[Array], float] = iqm,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """A stratified bootstrap percentile interval (Agarwal et al., Section 4.1): its low and high end.

    Each group (the seeds of one task) is drawn with replacement on its own; the ends are the (1 ∓ level)/2 quantiles of
    the statistic over all groups' draws. Few seeds make it too narrow: at 0.95, that of the mean of five normal values
    covers 0.84, of thirty 0.935. Where a group has one value its spread is unknown, and both ends are NaN.
    Raises `ValueError` for no groups, a group as in `mean_and_error`, a level outside (0, 1), or no resamples.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: need a level in (0, 1)")
    draws = _bootstrap(groups, statistic, resamples, seed)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def probability_above_zero(
    groups: Sequence[Iterable[float]],
    statistic: Callable[[Array], float] = np.mean,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """The share of the bootstrap's draws, those of `bootstrap_interval`, whose statistic is above zero; at zero, half.

    Of the differences between two evaluations it says how sure the one can be called better. NaN and `ValueError` as
    `bootstrap_interval`.

    >>> probability_above_zero([[0.5, 0.25]]), probability_above_zero([[0.0, 0.0, 0.0]])
    (1.0, 0.5)
    """
    draws = _bootstrap(groups, statistic, resamples, seed)
    return float(np.mean((np.sign(draws) + 1) / 2))


def wilson_interval(mean: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of n trials: its low and high end, both in [0, 1].

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), with p the mean and z the normal's (1 + level)/2 quantile. Unlike
    the bootstrap's it has a width where all trials agree. Of values between 0 and 1, each the mean over a problem's
    samples, it is rather too wide than too narrow: they vary less than trials. Raises `ValueError` for a mean outside
    [0, 1], n < 1, or a level outside (0, 1).

    >>> [round(end, 4) for end in wilson_interval(0.0, 64)]
    [0.0, 0.0566]
    """
    if not 0 <= mean <= 1 or n < 1 or not 0 < level < 1:
        raise ValueError(
            f"mean={mean}, n={n}, level={level}: need a share of at least one trial, and a level in (0, 1)"
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre, spread = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))  # at a mean of 0 or 1 rounding may pass it


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n−c, k) / C(n, k): how likely one of k of the n samples, drawn without replacement, is among the c right.

    Its mean over problems is the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Raises
    `ValueError` unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
    (0.25, 0.5, 1.0)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, c={c}, k={k}: need 0 <= c <= n and 1 <= k <= n")
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


def paired_bootstrap(
    a: Iterable[float], b: Iterable[float], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of aᵢ − bᵢ over pairs, and the low and high end of its bootstrap interval; pairs are drawn whole.

    A pair is what varies independently: for two evaluations one problem, its samples averaged first.
    Raises `ValueError` for different lengths, and as `bootstrap_interval`.
    """
    x, y = _pair(a, b)
    return float(np.mean(x - y)), *bootstrap_interval([x - y], np.mean, level, resamples, seed)


def spearman(x: Iterable[float], y: Iterable[float]) -> float:
    """Spearman's rank correlation Σ rᵢ sᵢ / √(Σ rᵢ² Σ sᵢ²), r and s the ranks less their mean; NaN for a constant.

    Ties share the mean of their ranks. Raises `ValueError` for different lengths, and as `mean_and_error`.

    >>> spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0])
    0.8
    """
    r, s = map(_ranks, _pair(x, y))
    scale = math.sqrt((r @ r) * (s @ s))
    return float(r @ s) / scale if scale else math.nan


def smooth(values: Iterable[float | None], weight: float = 0.9) -> Array:
    """The moving average yₜ = Σₛ weight^(t−s) xₛ / Σₛ weight^(t−s) over the measurements s ≤ t, one for each value.

    It spans some 1 / (1 − weight) of them; at a weight of 0 it is the values. Where there is no measurement it stays as
    it was, NaN before the first. Raises `ValueError` for a weight outside [0, 1).

    >>> smooth([1.0, None, 0.0], weight=0.5).round(3).tolist()
    [1.0, 1.0, 0.333]
    """
    if not 0 <= weight < 1:
        raise ValueError(f"weight={weight}: must be in [0, 1)")
    total, mass, smoothed = 0.0, 0.0, []
    for x in np.array(list(values), dtype=float).tolist():
        if math.isfinite(x):
            total, mass = weight * total + x, weight * mass + 1
        smoothed.append(total / mass if mass else math.nan)
    return np.array(smoothed)


def collapsed(accuracy: Iterable[float | None], fraction: float = 0.5, weight: float = 0.9) -> int | None:
    """The index at which a run collapsed for good, or None.

    With y the smoothed accuracy and bₜ = max_{s ≤ t} yₛ its best so far: the first t from which y < fraction · b holds
    to the end of the run. y starts at the 1/(1 − weight)th measurement (the tenth), when its average is full, since one
    lucky batch is no best to fall from; a shorter run can't collapse. So:
    - A run that recovers hasn't collapsed; one that never learns has only if it lost that share of its start.
    - The line is relative to the run's best, not to the base model: falling from 0.9 to 0.4 for good is a collapse.
    - y takes some 7 points at zero to halve, so a death at the very end of a run isn't counted.
    - Noise can cross the line. Of runs that stay at 0.3 for 300 steps of 16 independent completions none do; with two
      prompts of 8, each all right or all wrong, a fifth do, and of 300 with a weight of 0.97 one did.
    A weight of 0 is for accuracies that need no smoothing, as on a test set.
    Raises `ValueError` for a negative accuracy, a fraction outside (0, 1], or a weight outside [0, 1).

    >>> collapsed([0.6] * 50 + [0.0] * 10)
    56
    """
    at, y = _full_averages(accuracy, weight)
    if not 0 < fraction <= 1 or (y < 0).any():
        raise ValueError(f"fraction={fraction}: must be in (0, 1], of an accuracy that is never negative")
    above = y >= fraction * np.maximum.accumulate(y)
    return None if above[-1:].all() else int(at[np.flatnonzero(above)[-1] + 1])


def reach(
    completions: Sequence[float],
    accuracy: Iterable[float | None],
    target: float,
    sustain: int = 1,
    weight: float = 0.9,
) -> float | None:
    """The completions when the smoothed accuracy first reaches the target, or None: censored at the run's budget.

    It counts if it is at or above the target for `sustain` measurements from there on; like `collapsed`, from the
    1/(1 − weight)th measurement on. Raises `ValueError` for different lengths, sustain < 1, or a weight outside [0, 1).
    """
    curve = list(accuracy)
    if len(completions) != len(curve) or sustain < 1:
        raise ValueError(f"{len(completions)} completions, {len(curve)} accuracies, sustain={sustain}")
    at, y = _full_averages(curve, weight)
    starts = (t for t in range(len(y) - sustain + 1) if (y[t : t + sustain] >= target).all())
    return next((float(completions[at[t]]) for t in starts), None)


@dataclass(frozen=True)
class CompletionsToTarget:
    """How many of the runs reached a target, and the median of the completions they took.

    median   Kaplan and Meier's; None if fewer than half of the runs reached the target
    above    then, what the median exceeds whatever the runs would have done past their budgets; otherwise None
    """

    reached: int
    total: int
    median: float | None
    above: float | None

    def __str__(self) -> str:
        median = f"> {self.above:,.0f}" if self.median is None else f"{self.median:,.0f}"
        return f"{self.reached}/{self.total}, median {median}"


def completions_to_target(runs_reached: Sequence[float | None], budgets: Sequence[float]) -> CompletionsToTarget:
    """The median of what `reach` returned for each run, None being some number above that run's budget.

    The median is the first t at which S(t) = Π_{tᵢ ≤ t} (1 − dᵢ/nᵢ) is 1/2 or less, where dᵢ of the nᵢ runs still going
    reach the target at tᵢ (Kaplan and Meier 1958). S assumes that budgets say nothing about their runs: a run stopped
    because it had collapsed is given the budget it was planned for.
    Raises `ValueError` for no runs, different lengths, or a run that reached its target outside its budget.

    >>> print(completions_to_target([1600.0, 1920.0, None], [3200.0] * 3))
    2/3, median 1,920
    >>> print(completions_to_target([1600.0, None, None], [3200.0] * 3))
    1/3, median > 3,200
    """
    runs = []
    for at, budget in zip(runs_reached, budgets, strict=True):
        runs.append((float(budget if at is None else at), at is None))  # sorted: at a tie, first who reached it
        if not 0 <= runs[-1][0] <= budget < math.inf:
            raise ValueError(f"reached at {at} of a budget of {budget}")
    if not runs:
        raise ValueError("no runs")
    runs.sort()
    n, reached = len(runs), sum(not cut_off for _, cut_off in runs)
    if 2 * reached < n:
        return CompletionsToTarget(reached, n, None, max(t for t, cut_off in runs[: (n + 1) // 2] if cut_off))
    surviving, left = Fraction(1), iter(runs)
    while 2 * surviving > 1:
        t, cut_off = next(left)
        surviving, n = surviving * (1 - Fraction(not cut_off, n)), n - 1
    return CompletionsToTarget(reached, len(runs), t, None)


def interval_to_target(
    runs_reached: Sequence[float | None],
    budgets: Sequence[float],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The bootstrap interval of the median of `completions_to_target`, runs drawn whole; an end may be infinite.

    A draw in which fewer than half of the runs reach the target has a median beyond every budget. The ends are draws,
    not values between two of them, since infinity has no midpoint. NaN for one run; `ValueError` as
    `completions_to_target`.

    >>> interval_to_target([1600.0, 1920.0, None], [3200.0] * 3)
    (1600.0, inf)
    """
    completions_to_target(runs_reached, budgets)
    runs = list(zip(runs_reached, budgets, strict=True))
    if len(runs) == 1:
        return math.nan, math.nan
    draws = np.sort(np.random.default_rng(seed).integers(len(runs), size=(resamples, len(runs))), axis=1)
    kinds, times = np.unique(draws, axis=0, return_counts=True)  # few runs make few different draws
    medians: list[float] = []
    for draw, count in zip(kinds, times, strict=True):
        median = completions_to_target(*zip(*(runs[i] for i in draw), strict=True)).median
        medians += [math.inf if median is None else median] * count
    medians.sort()
    low, high = ((1 - level) / 2, (1 + level) / 2)
    return medians[math.floor(low * (resamples - 1))], medians[math.ceil(high * (resamples - 1))]


def _bootstrap(
    groups: Sequence[Iterable[float]], statistic: Callable[[Array], float], resamples: int, seed: int
) -> Array:
    """The statistic of each draw, groups drawn with replacement each on its own; NaN if a group has one value."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: need at least one")
    if not (samples := [_sample(group) for group in groups]):
        raise ValueError("no groups")
    if min(map(len, samples)) == 1:
        return np.full(resamples, math.nan)
    rng = np.random.default_rng(seed)
    draws = (np.concatenate([x[rng.integers(len(x), size=len(x))] for x in samples]) for _ in range(resamples))
    return np.array([statistic(draw) for draw in draws])


def _sample(values: Iterable[float]) -> Array:
    x = np.array(list(values), dtype=float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError("finite numbers are needed, and at least one")
    return x


def _pair(x: Iterable[float], y: Iterable[float]) -> tuple[Array, Array]:
    a, b = _sample(x), _sample(y)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values can't be paired with {len(b)}")
    return a, b


def _ranks(x: Array) -> Array:
    """Ranks less their mean; ties share the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which] - (len(x) + 1) / 2


def _full_averages(curve: Iterable[float | None], weight: float) -> tuple[NDArray[np.intp], Array]:
    """The smoothed values that span 1 / (1 − weight) measurements, after their indices in the curve."""
    x = np.array(list(curve), dtype=float)
    at = np.flatnonzero(np.isfinite(x))
    y = smooth(x[at], weight)
    full = round(1 / (1 - weight)) - 1
    return at[full:], y[full:]
