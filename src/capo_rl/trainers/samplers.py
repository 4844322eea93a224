"""Who sampled the completions, and how TRL's loss weighs them by it: vLLM's policy may not be the trainer's."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from capo_rl.trainers.masking import advantages_of, tokens_of

logger = logging.getLogger(__name__)


def sampled_log_pi(inputs: dict[str, Any], logps: Tensor) -> Tensor | None:
    """log π(a) [B, T] under the policy that sampled, or the present one's where it could not say; None where it is
    the present one."""
    sampled = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
    return None if sampled is None else sampled.where(~sampled.isnan(), logps.detach())


def corrected(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """TRL's advantages [B, T] times the ratio that corrects for a sampler with another policy.

    With it the mean of A u hᵀ over the sampler's tokens is that over the policy's own; a token without one has no
    advantage.
    """
    advantages, ratio = advantages_of(inputs, mask), inputs.get("importance_sampling_ratio")
    # vespo has it in another place
    return advantages if ratio is None or trainer.loss_type == "vespo" else advantages * ratio


def weighed(trainer: Any, inputs: dict[str, Any], mask: Tensor, logps: Tensor) -> Tensor:
    """TRL's advantages [B, T] as its loss weighs them by who sampled: `corrected`, and zero in a sequence that
    `off_policy_mask_threshold` drops."""
    advantages = corrected(trainer, inputs, mask)
    if trainer.off_policy_mask_threshold is None:
        return advantages
    sampled = sampled_log_pi(inputs, logps)
    kept = trainer.get_off_policy_mask(
        advantages=advantages,
        per_token_logps=logps,
        sampling_per_token_logps=logps.detach() if sampled is None else sampled,
        mask=mask.long(),
        off_policy_threshold=trainer.off_policy_mask_threshold,
    )
    return advantages * kept


class Unscored:
    """Counts tokens whose log-probability the sampler could not say, and says so once."""

    def __init__(self) -> None:
        self._told = False

    def count(self, trainer: Any, output: dict[str, Any]) -> None:
        """Of a batch of rollouts; collective."""
        mask = tokens_of(output)
        unscored = (output["sampling_per_token_logps"].isnan() & mask).sum()
        some, tokens = trainer.accelerator.reduce(torch.stack([unscored, mask.sum()])).tolist()
        trainer._metrics["train" if trainer.model.training else "eval"]["capo/unscored_tokens"].append(float(some))
        if some and not self._told and trainer.is_world_process_zero():
            self._told = True
            logger.warning(
                "of %d of %d sampled tokens the server gave NaN for the log-probability, so how far its policy is from "
                "the trainer's is not known there, and TRL counts them with a ratio of 1: look for what overflows in "
                "the server, as half precision may (said once; capo/unscored_tokens goes on counting)",
                some,
                tokens,
            )
