"""Accept or reject: the local trust region of Eq. 11 and Algorithm 1."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from capo_rl.curvature.processes import Processes
    from capo_rl.curvature.shifts import Shifts

# α ‖h‖₁ of Qwen2.5-7B at the paper's peak learning rate: where its thresholds were found.
PAPERS_SCALE = 0.14


@dataclass(frozen=True)
class Thresholds:
    """Bounds δ_F on the policy shift and (δ_H, δ_H^high) on the objective shift (Eq. 11).

    `None` or an infinity leaves a side open. The paper's Table 4 and Appendix J use one symmetric bound
    |m_H| < δ_H; Eq. 11 has two sides. Both can be written; the defaults are the paper's for CAPO.

    Raises `ValueError` as `check_bounds` does, but not for a δ_F of 0.

    >>> Thresholds(fisher=None, hessian=None)
    Thresholds(fisher=None, hessian=None)
    >>> Thresholds(hessian=(1e-2, -1e-2))
    Traceback (most recent call last):
        ...
    ValueError: hessian[0]=0.01 and hessian[1]=-0.01: the lower bound is above the upper; swap them
    """

    fisher: float | None = 1e-4
    hessian: tuple[float | None, float | None] | None = (-1e-2, 1e-2)

    def __post_init__(self) -> None:
        # 0 keeps only what does not move at all: no bound to train with, and the end of some interval of bounds
        check_bounds(self.fisher or None, *(self.hessian or (None, None)))


def check_bounds(
    fisher: float | None,
    low: float | None,
    high: float | None,
    names: tuple[str, str, str] = ("fisher", "hessian[0]", "hessian[1]"),
) -> None:
    """Raises `ValueError`, naming the bound, for a NaN, a δ_F that is not above 0, or sides in the wrong order."""
    for name, bound in zip(names, (fisher, low, high), strict=True):
        if bound is not None and math.isnan(bound):
            raise ValueError(f"{name} is NaN: give a number, or null (None) for no bound")
    if fisher is not None and not fisher > 0:
        raise ValueError(
            f"{names[0]}={fisher} must be above 0, or null (None) for no bound: a policy shift is never negative, and "
            "zero only where a token has no advantage, so this rejects every token"
        )
    if low is not None and high is not None and low > high:
        raise ValueError(f"{names[1]}={low} and {names[2]}={high}: the lower bound is above the upper; swap them")


def select(shifts: Shifts, thresholds: Thresholds) -> Bool[Tensor, "entries"]:
    """Keep-mask of Eq. 11: δ_H ≤ m_H ≤ δ_H^high and m_F ≤ δ_F.

    A NaN or infinite shift is never kept, whatever the thresholds; `Shifts.nonfinite` counts them.

    One verdict for each entry of `shifts`, token or subset (spread a subset's over its tokens with `keep[subsets]`).

    >>> from capo_rl.curvature.shifts import Shifts
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


def subset_numbers(
    granularity: str, mask: Bool[Tensor, "sequences time"], groups: Int[Tensor, "sequences"] | None = None
) -> Int[Tensor, "tokens"] | None:
    """Which subset each of the tokens of the mask belongs to, numbered without a gap, or None where each
    stands for itself: a `token`, `sequence`, `group` or `batch`. `groups` are the sequences' group numbers.

    >>> mask = torch.tensor([[True, True], [False, False], [True, False]])
    >>> subset_numbers("sequence", mask)
    tensor([0, 0, 1])
    """
    if granularity == "token":
        return None
    rows = torch.arange(len(mask), device=mask.device)
    if granularity == "group":
        assert groups is not None
        rows = groups
    elif granularity == "batch":
        rows = torch.zeros_like(rows)
    # subsets without a token would be averages over nothing
    return rows[:, None].expand(mask.shape)[mask].unique(return_inverse=True)[1]


def translated(shifts: Shifts, scale: Float[Tensor, "tokens"]) -> Shifts:
    """Token shifts as they would be at the paper's scale, to hold against the paper's bounds at any size of model.

        m_F / r²,  m_H / r        r = α ‖h‖₁ / 0.14

    A young Adam's step on a token alone is a sign step: s ≈ 2 κ α ‖h‖₁ (1 − π_a) with κ from 0.5 to 1, m_F = ½ s² and
    m_H ≈ |A| s. So the same bound means another 1 − π_a at another `scale` α ‖h‖₁, which is 0.14 for Qwen2.5-7B at
    the paper's peak rate. A token of scale 0 keeps its shifts, which are 0. Not in the paper.

    >>> from capo_rl.curvature.shifts import Shifts
    >>> one = torch.tensor([1e-6])
    >>> translated(Shifts(m_h=one, m_f=one, s=one, c=one, missing_mass=one), scale=torch.tensor([0.014])).m_f
    tensor([1.0000e-04])
    """
    ratio = (scale / PAPERS_SCALE).where(scale > 0, 1).to(shifts.m_f.dtype)
    return replace(shifts, m_h=shifts.m_h / ratio, m_f=shifts.m_f / ratio.square())


def soft_weights(shifts: Shifts, thresholds: Thresholds) -> Float[Tensor, "tokens"]:
    """Weights in [0, 1] in place of a mask: times its weight, a token's advantage has shifts that are in bounds.

        w = min(1, √(δ_F / m_F), δ_H^high / m_H or δ_H / m_H)

    In a small step a token's own m_F goes with the square of its weight and its m_H with the weight, exactly so for an
    SGD step. Zero for a NaN or infinite shift. The paper names soft masks as future work.

    >>> from capo_rl.curvature.shifts import Shifts
    >>> m_f, zero = torch.tensor([0.1, 0.5, 2.0]), torch.zeros(3)
    >>> soft_weights(Shifts(m_h=zero, m_f=m_f, s=zero, c=zero, missing_mass=zero), Thresholds(fisher=0.5))
    tensor([1.0000, 1.0000, 0.5000])
    """
    low, high = thresholds.hessian or (None, None)
    weights = torch.ones_like(shifts.m_f)
    if thresholds.fisher is not None:
        weights = torch.minimum(weights, (thresholds.fisher / shifts.m_f.clamp(min=1e-38)).sqrt())
    for value, bound in ((shifts.m_h, high), (-shifts.m_h, None if low is None else -low)):
        if bound is not None:
            weights = torch.minimum(weights, (max(bound, 0.0) / value.clamp(min=1e-38)).where(value > 0, 1))
    return weights.where(~shifts.nonfinite, 0)


def penalised(advantages: Float[Tensor, "tokens"], shifts: Shifts, penalty: float) -> Float[Tensor, "tokens"]:
    """Advantages in place of a mask, of an objective less `penalty` · m_F for each token.

    m_F = ½ s², where s is the planned change of log π(a), so the gradient of A log π'(a) − λ m_F at the planned step is
    that of (A − λ s) log π'(a): a token that the step would move too far is pulled back, in proportion. A token's own
    step is never turned round: what is left has A's sign or is zero. Zero for a NaN or infinite shift. The paper names
    regularization as future work.

    >>> from capo_rl.curvature.shifts import Shifts
    >>> s, zero = torch.tensor([0.1, 0.5, -0.1]), torch.zeros(3)
    >>> shifts = Shifts(m_h=zero, m_f=0.5 * s**2, s=s, c=zero, missing_mass=zero)
    >>> penalised(torch.tensor([1.0, 1.0, -1.0]), shifts, penalty=4.0)
    tensor([ 0.6000,  0.0000, -0.6000])
    """
    less = advantages - penalty * shifts.s.to(advantages.dtype)
    kept = less * advantages.sign()
    return (kept.clamp(min=0) * advantages.sign()).where(~shifts.nonfinite, 0)


def accepted_mean(
    loss_type: str,
    mask: Bool[Tensor, "sequences time"],
    keep: Bool[Tensor, "sequences time"],
    processes: Processes | None = None,
) -> Float[Tensor, "factors 1"]:
    """What to multiply advantages by so that a loss's mean over all tokens becomes its mean over accepted ones.

    `mask` marks the completion tokens, `keep` the accepted ones among them. Rejected tokens have an
    advantage of zero already, which leaves the denominators at all tokens; the factor is all / accepted

        grpo         for each sequence, whose mean is over its own accepted tokens        [B, 1]
        bnpo         for the micro-batch, whose mean is over all accepted tokens          [1, 1]
        dapo         the same over the micro-batches of all processes                     [1, 1]
        dr_grpo      1: its denominator is the fixed maximum length                       [1, 1]

    Where nothing is accepted the factor is finite, and multiplies zeros. DAPO's denominator spans the optimizer
    step: with gradient accumulation each round keeps the share of the step that its tokens had before selection.
    With several processes `dapo` is collective. Raises `ValueError` for another loss.

    >>> mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    >>> keep = torch.tensor([[True, False, False, True], [True, True, False, False]])
    >>> accepted_mean("grpo", mask, keep)
    tensor([[2.],
            [1.]])
    >>> accepted_mean("dapo", mask, keep)
    tensor([[1.5000]])
    """
    if loss_type == "dr_grpo":
        return torch.ones(1, 1, device=mask.device)
    over = {"grpo": (1,), "bnpo": (0, 1), "dapo": (0, 1)}.get(loss_type)
    if over is None:
        raise ValueError(f"loss_type={loss_type!r} has no mean over accepted tokens: grpo, bnpo, dapo and dr_grpo have")
    counts = torch.stack([mask.sum(over, keepdim=True), (mask & keep).sum(over, keepdim=True)])
    if loss_type == "dapo" and processes is not None:
        counts = processes.total(counts)
    return counts[0] / counts[1].clamp(min=1)
