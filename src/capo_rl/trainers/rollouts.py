"""What CAPO makes of TRL's rollouts: REINFORCE's advantage, the numbers of groups, completions without a reward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Batches one after another without any reward that end the run.
_UNREWARDED = 3


class Unrewarded:
    """Counts batches in a row without any reward, those of training and of evaluation apart."""

    def __init__(self) -> None:
        self._batches = {"train": 0, "eval": 0}

    def count(self, trainer: Any, mode: str, missing: bool) -> None:
        """Raises `RuntimeError` for the third in a row that is `missing` all its rewards."""
        self._batches[mode] = self._batches[mode] + 1 if missing else 0
        if self._batches[mode] < _UNREWARDED:
            return
        named = zip(trainer.reward_func_names, trainer.reward_funcs, strict=True)
        errors = "; ".join(
            f"{name}: {getattr(reward, 'error', None) or 'None or NaN for every completion'}" for name, reward in named
        )
        raise RuntimeError(
            f"no completion of {_UNREWARDED} batches in a row has a reward, so nothing is trained: {errors}. The "
            "traceback of a reward function that raised is in the log where it first did; mend it, and go on"
        )


def amend(trainer: Any, output: dict[str, Any], local: int, per_function: Tensor) -> None:
    """Put into a process's `local` rollouts what the settings ask for beside TRL's own; `per_function` [N, functions]
    are the rewards of all processes' completions."""
    args = trainer.args
    first = trainer.accelerator.process_index * local
    rewards = (per_function * trainer.reward_weights.to(per_function.device)).nansum(dim=1)  # without a reward: 0
    if args.capo_tokens_every is not None:
        missing = per_function.isnan().all(dim=1)
        output["capo_reward"] = rewards.where(~missing, math.nan)[first : first + local]
    if args.capo_advantage == "reward":
        output["advantages"] = rewards[first : first + local]
        logged = trainer._logs["advantages"]  # TRL's, which were of this batch
        for _ in range(len(rewards)):
            logged.pop()
        logged.extend(rewards.tolist())
    if args.capo_granularity == "group":
        generations = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        output["capo_group"] = torch.arange(first, first + local, device=output["advantages"].device) // generations
