"""What is logged of the shifts: the names are stable, and listed in docs/metrics.md."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_rl.curvature.shifts import Shifts
from capo_rl.statistics import spearman

QUANTILES = {"q50": 0.5, "q90": 0.9, "q99": 0.99}


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for: a clock read now counts all of that, and nothing of it later."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(name: str, shifts: Shifts) -> dict[str, float]:
    """Mean, quantiles and maximum of m_H and m_F over the tokens whose shifts are finite; NaN if there are none."""
    finite = ~shifts.nonfinite
    figures: dict[str, float] = {}
    for symbol in ("m_h", "m_f"):
        values = getattr(shifts, symbol)[finite].float()
        if len(values):
            at = torch.tensor(list(QUANTILES.values()), device=values.device)
            row = torch.cat([values.mean()[None], _quantiles(values, at), values.max()[None]]).tolist()
        else:
            row = [float("nan")] * (len(QUANTILES) + 2)
        figures |= {f"{name}/{symbol}/{of}": value for of, value in zip(("mean", *QUANTILES, "max"), row, strict=True)}
    return figures


def rejections(keep: Bool[Tensor, "tokens"], advantages: Float[Tensor, "tokens"]) -> dict[str, float]:
    """The share of tokens rejected: of all, and of those with a positive or a negative advantage (NaN if none)."""
    members = torch.stack([torch.ones_like(keep), advantages > 0, advantages < 0])
    shares = ((members & ~keep).sum(1) / members.sum(1)).tolist()
    names = ("capo/rejection_rate", "capo/rejection_rate/positive", "capo/rejection_rate/negative")
    return dict(zip(names, shares, strict=True))


def missing_mass(mass: Float[Tensor, "tokens"], bound: float) -> dict[str, float]:
    """How much probability the supports leave out, and how many tokens miss more than `bound`."""
    if not len(mass):
        return {}
    names = ("capo/missing_mass/mean", "capo/missing_mass/max", "capo/missing_mass/above_bound")
    return dict(zip(names, torch.stack([mass.mean(), mass.max(), (mass > bound).sum()]).tolist(), strict=True))


def rank_correlation(one: Float[Tensor, "tokens"], other: Float[Tensor, "tokens"]) -> float:
    """Spearman's rank correlation of two columns over the entries where both are finite; NaN for a constant.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3]))
    1.0
    """
    finite = one.isfinite() & other.isfinite()
    return spearman(one[finite].tolist(), other[finite].tolist()) if finite.any() else math.nan


def _quantiles(values: Tensor, at: Tensor) -> Tensor:
    """Nearest-rank quantiles; `torch.quantile` refuses more than 2²⁴ values."""
    ranks = (at * (len(values) - 1)).round().long()
    return values.sort().values[ranks]
