"""Other masks than CAPO's, to compare it with: each a score of a token, of which a given share is rejected.

None of them predicts what a step will do. They look at the policy as it is, which costs nothing beyond the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from capo_rl.curvature.last_layer import LastLayer
from capo_rl.curvature.shifts import Shifts
from capo_rl.planning.planner import Rule

Score = Callable[[LastLayer, Tensor, Shifts, Tensor], Tensor]


def low_probability(layer: LastLayer, advantages: Tensor, shifts: Shifts, before: Tensor) -> Tensor:
    """−log π(a): the rarest of the sampled tokens go first."""
    return -layer.log_pi_a


def score_norm(layer: LastLayer, advantages: Tensor, shifts: Shifts, before: Tensor) -> Tensor:
    """‖e_a − π‖² = 1 − 2π_a + Σπ²: the size of a token's gradient in the logits, whatever its advantage."""
    return layer.u.square().sum(-1)


def stapo(layer: LastLayer, advantages: Tensor, shifts: Shifts, before: Tensor) -> Tensor:
    """Low probability among tokens with A > 0 whose policy has less entropy than the median (STAPO, arXiv 2602.15620).

    STAPO has fixed bounds on probability and entropy; a share of the tokens makes it comparable with the others.
    """
    entropy = -torch.where(layer.pi > 0, layer.pi * layer.pi.log(), 0).sum(-1)
    spurious = (advantages > 0) & (entropy < entropy.median())
    return torch.where(spurious, -layer.log_pi_a, -math.inf)


def policy_shift(layer: LastLayer, advantages: Tensor, shifts: Shifts, before: Tensor) -> Tensor:
    """m_F: CAPO's own score, rejecting a share of the tokens in place of all above a threshold."""
    return shifts.m_f


def total_variation(layer: LastLayer, advantages: Tensor, shifts: Shifts, before: Tensor) -> Tensor:
    """|π(a) − π_sampled(a)| where the step would take it further (DPPO's binary TV mask, arXiv 2602.04879).

    Fresh rollouts have no such distance: then every token is kept. DPPO has a fixed bound, 0.2 or so.
    """
    away = layer.log_pi_a.exp() - before.exp()
    return away.abs().where(away * advantages > 0, -math.inf)


SCORES: dict[str, Score] = {
    "low_probability": low_probability,
    "score_norm": score_norm,
    "stapo": stapo,
    "policy_shift": policy_shift,
    "total_variation": total_variation,
}
RIVALS = ("random", *SCORES)


def rival(name: str, rate: float, seed: int = 0) -> Rule:
    """The rule that rejects the `rate` of a micro-batch's tokens that score highest; `random` draws them.

    Random numbers come from a generator of its own, so that the run's are those of a run without it. A token with
    A = 0 has no gradient to mask and is kept; the share is of all tokens.

    Raises `ValueError` for an unknown name or a rate outside [0, 1].

    >>> from capo_rl.curvature.last_layer import last_layer
    >>> z = torch.tensor([[0.0, 5.0], [0.0, 0.0], [0.0, 1.0]])
    >>> layer = last_layer(torch.ones(3, 1), z, torch.tensor([0, 0, 0]))
    >>> rival("low_probability", rate=1 / 3)(layer, torch.ones(3), None, None)
    tensor([False,  True,  True])
    """
    if name not in RIVALS:
        raise ValueError(f"rival {name!r} is not one of {', '.join(RIVALS)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must lie in [0, 1]")
    generator = torch.Generator().manual_seed(seed)

    def rule(layer: LastLayer, advantages: Tensor, shifts: Shifts, before: Tensor) -> Tensor:
        if name == "random":
            score = torch.rand(len(layer), generator=generator).to(advantages.device)
        else:
            score = SCORES[name](layer, advantages, shifts, before)
        score = score.where(advantages != 0, -math.inf)
        rejected = score.topk(round(rate * len(score))).indices
        keep = torch.ones_like(advantages, dtype=torch.bool)
        keep[rejected] = False
        return keep | (score == -math.inf)

    return rule
