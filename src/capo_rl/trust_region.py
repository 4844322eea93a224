"""Control of the whole step: take back part of an update whose measured KL is over a budget.

The last-layer model sees one layer; this measures the update of all of them, after the fact. The rule is TRPO's
backtracking line search (Schulman et al., 2015) with the optimizer's own step as the direction: KL is quadratic in the
length of a small step, so a step whose KL is D times the budget is shortened by √D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shortened:
    """What became of an update: the KL it had, the KL it has now (nats a token), the fraction of it that is left."""

    proposed: float
    measured: float
    fraction: float


@torch.no_grad()
def shorten(
    parameters: Iterable[Tensor], before: Iterable[Tensor], measure: Callable[[], float], budget: float, tries: int = 8
) -> Shortened:
    """Move `parameters` back towards `before` along the step just taken until `measure()` is at most `budget`.

    An update that is still over the budget after `tries` measurements, or whose KL is not finite (the weights left the
    numbers), is undone. The optimizer's moments stay as they are.

    >>> w, old = torch.tensor([2.0]), torch.tensor([0.0])
    >>> left = shorten([w], [old], measure=lambda: float(w**2), budget=1.0)
    >>> round(left.measured, 4), round(left.fraction, 4)
    (0.9, 0.4743)
    """
    parameters, before = list(parameters), list(before)
    steps = [parameter - old for parameter, old in zip(parameters, before, strict=True)]

    def take(fraction: float) -> None:
        for parameter, old, step in zip(parameters, before, steps, strict=True):
            # an infinite step times zero would be NaN
            parameter.copy_(old + fraction * step if fraction else old)

    proposed = kl = measure()
    fraction = 1.0
    while not kl <= budget:  # so written, a NaN is over the budget
        tries -= 1
        if tries < 0 or not math.isfinite(kl):
            take(0.0)
            return Shortened(proposed, 0.0, 0.0)
        # Aim a little under: at the budget itself rounding would ask for round after round.
        fraction *= math.sqrt(0.9 * budget / kl)
        take(fraction)
        kl = measure()
    return Shortened(proposed, kl, fraction)
