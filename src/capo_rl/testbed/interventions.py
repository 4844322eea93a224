"""What an experiment puts in a method's place to learn which part of it does the work (docs/testbed.md).

Scales              the length of each step, from another run of the same method or their mean: the same schedule of
                    lengths, without this run's own verdict on this step
WholeSecondMoment   the rejected tokens in Adam's second moment, in every layer, by a second backward pass: what the
                    share ρ of the last layer stands for
one_sign            the thresholds, for tokens with an advantage of one sign
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from capo_rl.curvature.last_layer import LastLayer
from capo_rl.curvature.selection import Thresholds, select
from capo_rl.curvature.shifts import Shifts
from capo_rl.planning.planner import Rule


def applied_scales(result: dict[str, Any]) -> list[float]:
    """The share of the schedule's learning rate that each step of a run had in the end, from its result.

    >>> applied_scales({"curves": {"capo/scale": [0.5, 1.0], "capo/kl/fraction": [None, 0.25]}})
    [0.5, 0.25]
    """
    curves = result["curves"]
    left = [1.0 if fraction is None else fraction for fraction in curves["capo/kl/fraction"]]
    return [scale * fraction for scale, fraction in zip(curves["capo/scale"], left, strict=True)]


class Scales(TrainerCallback):
    """Takes step t at `scales[t]` of the schedule's learning rate."""

    def __init__(self, scales: list[float]) -> None:
        self.scales = scales
        self.lrs: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.scales[state.global_step]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group, lr in zip(optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr


class WholeSecondMoment(TrainerCallback):
    """Adam's second moment as it would be with nothing rejected; its first is that of the accepted tokens.

        q ← β₂ q + (1 − β₂) g_all²        g_all: the gradient of the loss on all tokens, clipped by the factor of g_acc

    For one process, without gradient accumulation.
    """

    def __init__(self, trainer: Any) -> None:
        self.whole: dict[Tensor, Tensor] = {}
        self.factor = 1.0  # what clipping multiplied the accepted tokens' gradient by
        steps = trainer.optimizer_steps
        masked, clipped_by = trainer._compute_loss, steps.clipped_by

        def both_losses(model: Any, inputs: dict[str, Any]) -> Tensor:
            updates, trainer.updates = trainer.updates, None  # TRL's own loss
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            gradients = torch.autograd.grad(masked(model, inputs), weights, allow_unused=True)
            self.whole = {weight: g for weight, g in zip(weights, gradients, strict=True) if g is not None}
            trainer.updates = updates
            return masked(model, inputs)

        def clipped(finite: bool) -> float:
            self.factor = clipped_by(finite)
            return self.factor

        trainer._compute_loss, steps.clipped_by = both_losses, clipped

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            beta2 = group["betas"][1]
            for weight in group["params"]:
                if weight.grad is None or weight not in self.whole:
                    continue
                moments = optimizer.state[weight]
                if not moments:
                    zeros = torch.zeros_like(weight)
                    moments |= {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
                # The optimizer is about to add (1 − β₂) g_acc². A little less is taken off, or a root may be of less
                # than nothing.
                missing = (self.factor * self.whole[weight]).square() - 0.9999 * weight.grad.square()
                moments["exp_avg_sq"].add_(missing, alpha=(1 - beta2) / beta2)


def one_sign(thresholds: Thresholds, sign: str) -> Rule:
    """The thresholds for tokens with A > 0 (`positive`) or A < 0 (`negative`); the others are kept."""
    factor = {"positive": 1, "negative": -1}[sign]

    def rule(layer: LastLayer, advantages: Tensor, shifts: Shifts, before: Tensor) -> Tensor:
        return select(shifts, thresholds) | (factor * advantages <= 0)

    return rule
