"""What a planned step says in figures: what was rejected, and the shifts before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_rl.curvature.last_layer import support_rows
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.shifts import Shifts, shifts_along, subset_direction
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.planning.micro_batch import MicroBatch
from capo_rl.planning.telemetry import describe, missing_mass, rejections


@dataclass(frozen=True)
class Everyone:
    """The shifts, verdicts, advantages and used advantages of a step's tokens in all processes."""

    shifts: Shifts
    keep: Bool[Tensor, "tokens"]
    advantages: Float[Tensor, "tokens"]
    used: Float[Tensor, "tokens"]

    @classmethod
    def of(cls, batch: MicroBatch, processes: Processes) -> Everyone:
        """Those of each process after one another; collective."""
        if processes.count == 1:
            return cls(batch.shifts, batch.keep, batch.advantages, batch.used)
        columns = [getattr(batch.shifts, field.name) for field in fields(Shifts)]
        columns += [each.to(columns[0].dtype) for each in (batch.keep, batch.advantages, batch.used)]
        *shifts, keep, advantages, used = processes.gather(torch.stack(columns, dim=1)).unbind(1)
        return cls(Shifts(*shifts), keep.bool(), advantages, used)


def verdict_figures(everyone: Everyone, max_missing_mass: float, weighed: bool) -> dict[str, float]:
    """What was rejected, what the supports leave out, and where tokens are `weighed` and not rejected, by how much."""
    shifts = everyone.shifts
    figures = rejections(everyone.keep, everyone.advantages) | missing_mass(shifts.missing_mass, max_missing_mass)
    figures["capo/nonfinite_shifts"] = float(shifts.nonfinite.sum())
    if weighed:
        figures["capo/weight"] = _mean_weight(everyone.advantages, everyone.used)
    return figures


def token_figures(everyone: Everyone) -> dict[str, float]:
    """How the tokens' own shifts are spread, and those of the accepted ones."""
    accepted = everyone.shifts[everyone.keep]
    return describe("capo/token", everyone.shifts) | describe("capo/token_accepted", accepted)


def batch_figures(
    batch: MicroBatch,
    weights: Float[Tensor, "tokens"] | None,
    everyone: Everyone,
    step: SGDStep | AdamStep,
    fisher: str,
    weighed: bool,
    processes: Processes,
) -> dict[str, float]:
    """The shifts of three steps, planned in one pass: all tokens' mean gradient (Eq. 7), that of the accepted ones,
    and the loss's own, which has `weights`. A token whose shifts are not finite takes no part; collective.
    """
    accepted, finite = int(everyone.keep.sum()), int((~everyone.shifts.nonfinite).sum())
    layer, advantages, keep, used = batch.layer, batch.advantages, batch.keep, batch.used
    if finite < len(everyone.keep):  # a weight of zero would not silence a NaN
        some = ~batch.shifts.nonfinite
        layer, advantages, keep, used = layer[some], advantages[some], keep[some], used[some]
        weights = None if weights is None else weights[some]
    gradients = [advantages / max(1, finite)]
    altered = accepted < finite or weighed
    if altered:
        gradients.append(used / max(1, accepted))
    if weights is not None:
        gradients.append(weights)
    stacked = torch.stack([gradient.to(layer.u.dtype) for gradient in gradients])
    rows = batch.rows if layer is batch.layer else support_rows(layer)
    v = subset_direction(layer, stacked, step, rows.over(processes))
    all_tokens = shifts_along(v[0], layer, advantages, fisher)
    chosen = shifts_along(v[1], layer, advantages, fisher)[keep] if altered else all_tokens
    means = {
        "capo/batch/m_h": (all_tokens.m_h, finite),
        "capo/batch/m_f": (all_tokens.m_f, finite),
        "capo/batch_accepted/m_h": (chosen.m_h, accepted),
        "capo/batch_accepted/m_f": (chosen.m_f, accepted),
    }
    if weights is not None:
        means["capo/kl/predicted"] = (0.5 * shifts_along(v[-1], layer, advantages).c, finite)
    sums = processes.total(torch.stack([values.double().sum() for values, _ in means.values()])).tolist()
    return {
        name: total / count if count else math.nan
        for (name, (_, count)), total in zip(means.items(), sums, strict=True)
    }


def _mean_weight(advantages: Tensor, used: Tensor) -> float:
    """What is left of the advantages on average, over tokens that have one."""
    some = (advantages != 0) & advantages.isfinite()
    return float((used[some] / advantages[some]).mean()) if some.any() else math.nan
