"""What the last-layer model is worth in nats: the KL that updates really have, over the shift it predicts for them.

`regress` looks back at a few steps and says how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Regression:
    """log KL = intercept + slope · log shift + residual, over `steps` updates.

    r2 is 1 − Σ residual² / Σ (log KL − its mean)²: of a slope that was given and not fitted it may be below zero. It is
    NaN where every update had the same KL. spread is the residuals' standard deviation, in units of log nats.
    """

    slope: float
    intercept: float
    r2: float
    spread: float
    steps: int

    def kl(self, shift: float) -> float:
        """The KL, in nats, of an update with this shift: the median, if residuals are symmetric."""
        return math.exp(self.intercept + self.slope * math.log(shift))

    def margin(self, level: float = 0.95) -> float:
        """How many times that KL the next update stays below with probability `level`, for a slope that was given.

        The prediction limit of normal residuals, exp(t · spread · √(1 + 1/n)) with Student's t of n − 1 degrees.
        """
        return math.exp(student_quantile(level, self.steps - 1) * self.spread * math.sqrt(1 + 1 / self.steps))

    def shift_for(self, kl: float, level: float = 0.95) -> float:
        """The shift up to which the next update stays below `kl` nats with probability `level`."""
        return math.exp((math.log(kl / self.margin(level)) - self.intercept) / self.slope)


def regress(shifts: Iterable[float], kl: Iterable[float], slope: float | None = None) -> Regression:
    """Least squares of log KL on log shift over updates, with the slope given or fitted.

    Both are quadratic in a small step, so the slope of a model that ranks and scales well is one. Updates where either
    is zero or not finite are left out.

    Raises `ValueError` for fewer than four updates, or a slope to fit where every shift is the same.

    >>> line = regress([1e-6, 2e-6, 4e-6, 8e-6], [1e-3, 2e-3, 4e-3, 8e-3])
    >>> round(line.slope, 6), round(line.r2, 6), round(line.kl(1e-5), 6)
    (1.0, 1.0, 0.01)
    """
    pairs = [(x, y) for x, y in zip(shifts, kl, strict=True) if 0 < x < math.inf and 0 < y < math.inf]
    if len(pairs) < 4:
        raise ValueError(f"{len(pairs)} updates with a shift and a KL: a regression needs four; take more steps")
    x, y = np.log(np.array(pairs, dtype=float)).T
    fitted = 1 if slope is not None else 2
    if slope is None:
        if np.ptp(x) == 0:
            raise ValueError("every update has the same shift, to which no slope can be fitted: give slope=1")
        slope = float((x - x.mean()) @ (y - y.mean()) / ((x - x.mean()) ** 2).sum())
    intercept = float(y.mean() - slope * x.mean())
    residual = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - residual / total if total else math.nan
    return Regression(slope, intercept, r2, math.sqrt(residual / (len(x) - fitted)), len(x))


def student_quantile(level: float, degrees: int) -> float:
    """Student's t at `level`, by its expansion in 1/ν (Abramowitz and Stegun 26.7.5): at 0.95 within 0.3 % for ν ≥ 3.

    >>> round(student_quantile(0.95, 5), 2), round(student_quantile(0.95, 1000), 2)
    (2.01, 1.65)
    """
    z, v = NormalDist().inv_cdf(level), degrees
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
