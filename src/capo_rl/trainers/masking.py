"""Verdicts in a loss of TRL's: it reads an advantage for each token, and the backward pass tells whether it did."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from capo_rl.planning.micro_batch import MicroBatch, check_left_out

# How much of a token's gradient may, by rounding, not be that of its own advantage.
_OWN_ADVANTAGE = 0.05


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Which tokens of a micro-batch are in the loss [B, T]."""
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def advantages_of(inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """TRL's advantages, one for each token [B, T]."""
    advantages = inputs["advantages"]
    return (advantages[:, None] if advantages.dim() == 1 else advantages).expand(mask.shape)


def write_verdicts(
    inputs: dict[str, Any],
    planned: MicroBatch,
    mask: Tensor,
    logps: Tensor,
    *,
    loss_type: str,
    loss_scale: float,
    kl_term: bool,
    by_token: bool,
) -> None:
    """Put advantages with the verdicts into a loss's inputs, and watch in the backward pass that it has read them.

    Without a `kl_term` a rejected token has no gradient, and where ratios are `by_token` an accepted one has that of
    its own advantage; the backward pass raises `RuntimeError` where it is otherwise.
    """
    written = planned.masked(advantages_of(inputs, mask), mask, loss_type, loss_scale)
    inputs["advantages"] = written
    gradients: dict[str, Tensor] = {}

    def check() -> None:
        if by_token and not kl_term and len(gradients) == 2:
            _check_own_advantages(**gradients)

    def check_written(gradient: Tensor) -> None:
        gradients["advantage"] = (written.detach() * gradient)[mask]
        check()

    def check_rejected(gradient: Tensor) -> None:
        if not kl_term:  # which gives a rejected token a gradient
            check_left_out(gradient[mask][~planned.keep], "this version of TRL is not supported")
        gradients["log_prob"] = gradient[mask]
        check()

    written.register_hook(check_written)
    logps.register_hook(check_rejected)


def _check_own_advantages(advantage: Tensor, log_prob: Tensor) -> None:
    """Raises `RuntimeError` where a loss spread a token's advantage over others, as one that takes an advantage for
    each sequence would: where a ratio is not clipped, A ∂L/∂A and ∂L/∂log π(a) are the same."""
    moved = (log_prob != 0) & advantage.isfinite() & log_prob.isfinite()
    difference = (advantage - log_prob)[moved].norm()
    if difference > _OWN_ADVANTAGE * log_prob[moved].norm():
        raise RuntimeError(
            "a token's gradient is not that of its own advantage, so the loss did not read the advantages CAPO "
            "wrote as one a token: use a loss that does, or capo_mode='trust_region', which writes none"
        )
