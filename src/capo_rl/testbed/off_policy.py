"""A sampler that lags, and what others do about completions that another policy has sampled (docs/testbed.md).

Lag     completions are sampled by the weights of so many steps ago, and TRL has their log-probabilities as from vLLM
drift   in the place of TRL's own off-policy mask one that looks at how far the policy is from the sampler:
        total_variation   DPPO's binary mask (arXiv 2602.04879): the tokens with |π(a) − μ(a)| above the bound where
                          the step takes them further
        largest_ratio     whole completions with a token whose |log π(a)/μ(a)| is above the bound, and
        mean_kl           those whose mean π/μ − 1 − log π/μ is: the trust region mask's two criteria (2512.23075)
        negative          TRL's (DeepSeek-V3.2): completions with A < 0 whose mean log μ/π is above the bound
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import pad

# Which tokens are kept, of advantages [B, 1], log π and log μ [B, T], the completions' mask [B, T] and a bound.
Mask = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


class Lag(TrainerCallback):
    """Has the weights of `steps` steps ago sample, those before the first step where there are none.

    `correction` is TRL's `vllm_importance_sampling_mode`; without one the completions pass for the policy's own.
    It is the trainer's last callback to be added, so that the weights it keeps are those that a step was left with.
    """

    def __init__(self, trainer: Any, steps: int, correction: str | None = None) -> None:
        if steps < 0:
            raise ValueError(f"steps={steps} of lag can't be less than 0")
        self.trainer = trainer
        self.kept: deque[list[Tensor]] = deque(maxlen=steps + 1)
        self.inner = trainer._generate_single_turn
        trainer._generate_single_turn = self.sample
        trainer.use_vllm = True  # TRL reads the log-probabilities and the correction only then
        trainer.vllm_importance_sampling_correction = correction is not None
        trainer.vllm_importance_sampling_mode = correction

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.kept.append([weight.detach().clone() for weight in model.parameters()])

    @torch.no_grad()
    def sample(self, prompt_ids: list[list[int]], *more: Any, **kwargs: Any) -> tuple[list[list[int]], list[Any]]:
        """What TRL's own generation gives with the old weights, and their log-probability of each token."""
        trainer = self.trainer
        weights = list(trainer.model.parameters())
        present = [weight.detach().clone() for weight in weights]
        trainer.use_vllm = False
        _write(weights, self.kept[0])
        try:
            completion_ids, _ = self.inner(prompt_ids, *more, **kwargs)
            sampled = self._log_probs(prompt_ids, completion_ids)
        finally:
            _write(weights, present)
            trainer.use_vllm = True
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        mask = torch.arange(sampled.shape[1]) < lengths[:, None]
        away = _distance(self._log_probs(prompt_ids, completion_ids) - sampled)[mask.to(sampled.device)]
        trainer._metrics["train"]["off_policy/kl"].append(away.double().mean().item())
        return completion_ids, [row[:length].tolist() for row, length in zip(sampled, lengths, strict=True)]

    def _log_probs(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
        """log π(a) [B, T] by the weights as they are, over the same tensors as TRL's own, so that they are the same."""
        trainer = self.trainer
        device = trainer.accelerator.device
        ids, mask = [], []
        for rows, side in ((prompt_ids, "left"), (completion_ids, "right")):
            tensors = [torch.tensor(row) for row in rows]
            ids.append(pad(tensors, padding_value=trainer.processing_class.pad_token_id, padding_side=side))
            mask.append(pad([torch.ones_like(row) for row in tensors], padding_value=0, padding_side=side))
        log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat(ids, dim=1).to(device),
            torch.cat(mask, dim=1).to(device),
            ids[1].shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
        )
        return log_probs


def _write(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.data.copy_(value)


def _distance(log_ratio: Tensor) -> Tensor:
    """π/μ − 1 − log π/μ of each token: its mean over what μ samples is KL(μ ‖ π), and none of it is below 0."""
    return log_ratio.exp() - 1 - log_ratio


def _over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    return values.where(mask.bool(), 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def total_variation(advantages: Tensor, log_pi: Tensor, log_mu: Tensor, mask: Tensor, bound: float) -> Tensor:
    away = log_pi.exp() - log_mu.exp()
    return (away.abs() <= bound) | (away * advantages <= 0)


def largest_ratio(advantages: Tensor, log_pi: Tensor, log_mu: Tensor, mask: Tensor, bound: float) -> Tensor:
    return (log_pi - log_mu).abs().where(mask.bool(), 0).amax(1, keepdim=True) <= bound


def mean_kl(advantages: Tensor, log_pi: Tensor, log_mu: Tensor, mask: Tensor, bound: float) -> Tensor:
    return _over_tokens(_distance(log_pi - log_mu), mask) <= bound


def negative(advantages: Tensor, log_pi: Tensor, log_mu: Tensor, mask: Tensor, bound: float) -> Tensor:
    return GRPOTrainer.get_off_policy_mask(advantages, log_pi, log_mu, mask, bound).bool()


MASKS: dict[str, Mask] = {
    "total_variation": total_variation,
    "largest_ratio": largest_ratio,
    "mean_kl": mean_kl,
    "negative": negative,
}


def drift(trainer: Any, name: str, bound: float) -> None:
    """Give the trainer's loss the mask `name` of `MASKS`; the share of the tokens it rejects is `off_policy/rejected`.

    Denominators are those of all tokens, and the sampler's log-probabilities those of `Lag`, else the policy's when the
    completions were sampled.

    Raises `ValueError` for an unknown name or a bound of 0 or less.
    """
    if name not in MASKS:
        raise ValueError(f"drift {name!r} is not one of {', '.join(MASKS)}")
    if bound <= 0:
        raise ValueError(f"bound={bound} of drift {name!r} must be above 0")

    def keep(
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        kept = MASKS[name](advantages, per_token_logps.detach(), sampling_per_token_logps, mask, off_policy_threshold)
        rejected = (~kept & mask.bool()).sum() / mask.sum().clamp(min=1)
        trainer._metrics["train"]["off_policy/rejected"].append(rejected.item())
        return kept

    trainer.off_policy_mask_threshold, trainer.get_off_policy_mask = bound, keep
