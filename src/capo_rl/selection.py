"""Accept or reject: the local trust region of Eq. 11 and Algorithm 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from capo_rl.shifts import Shifts


@dataclass(frozen=True)
class Thresholds:
    """Bounds δ_F on the policy shift and (δ_H, δ_H^high) on the objective shift (Eq. 11).

    `None` or an infinity leaves a side open. The paper's Table 4 and Appendix J use one symmetric bound
    |m_H| < δ_H; Eq. 11 has two sides. Both can be written; the defaults are the paper's for CAPO.

    Raises `ValueError` for a negative δ_F, a NaN, or sides in the wrong order.

    >>> Thresholds(fisher=None, hessian=None)
    Thresholds(fisher=None, hessian=None)
    >>> Thresholds(hessian=(1e-2, -1e-2))
    Traceback (most recent call last):
        ...
    ValueError: hessian=(0.01, -0.01): the lower bound is above the upper; swap them
    """

    fisher: float | None = 1e-4
    hessian: tuple[float | None, float | None] | None = (-1e-2, 1e-2)

    def __post_init__(self) -> None:
        fisher, (low, high) = self.fisher, self.hessian or (None, None)
        for name, bound in (("fisher", fisher), ("hessian low", low), ("hessian high", high)):
            if bound is not None and math.isnan(bound):
                raise ValueError(f"{name} threshold is NaN: give a number, or None for no bound")
        if fisher is not None and fisher < 0:
            raise ValueError(f"fisher={fisher}: a policy shift is never negative, so this rejects every token; "
                             "give a bound above 0, or None for no bound")
        if low is not None and high is not None and low > high:
            raise ValueError(f"hessian=({low}, {high}): the lower bound is above the upper; swap them")


def select(shifts: Shifts, thresholds: Thresholds) -> Tensor:
    """Keep-mask of Eq. 11: δ_H ≤ m_H ≤ δ_H^high and m_F ≤ δ_F.

    A NaN or infinite shift is never kept, whatever the thresholds; `Shifts.nonfinite` counts them.

    Returns a boolean tensor of the shape of `shifts.m_f`: [N] for tokens, [B] for subsets (spread a subset's
    verdict over its tokens with `keep[subsets]`).

    >>> from capo_rl.shifts import Shifts
    >>> m_f = torch.tensor([0.0, 1.0, float("nan")])
    >>> zero = torch.zeros(3)
    >>> select(Shifts(m_h=zero, m_f=m_f, s=zero, c=zero, missing_mass=zero), Thresholds(fisher=0.5))
    tensor([ True, False, False])
    """
    keep = ~shifts.nonfinite
    low, high = thresholds.hessian or (None, None)
    if thresholds.fisher is not None:
        keep &= shifts.m_f <= thresholds.fisher
    if low is not None:
        keep &= shifts.m_h >= low
    if high is not None:
        keep &= shifts.m_h <= high
    return keep
