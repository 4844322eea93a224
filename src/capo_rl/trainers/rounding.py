"""Whether the optimizer's updates reach the weights: in half precision a small one rounds away.

A weight w in bfloat16 has 8 significant bits, so its neighbours are |w|/128 to |w|/256 away, and an update below half
of that leaves it where it was, step after step. With weights of standard deviation 0.02 and Adam's updates of about
the learning rate, 1.5e-5 loses 85 to 95 % of them and 1e-6 98 to 100 %.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from capo_rl.trainers.step_choice import torch_optimizer

logger = logging.getLogger(__name__)

# Adam's first step has the same length in every weight and is like no other; by the tenth a slow start is over
# (2**-10, doubled each step), by the hundredth a warm-up.
_STEPS = (2, 10, 100)
# Of each tensor's elements, at most about so many.
_SAMPLE = 4096
# The share above which to warn. Weights and updates as above: where half of the updates round away, what is left is 0.5
# to 0.9 as long along the whole update, at a cosine of 0.7 to 0.9; at 85 % it is 0.2 to 0.4, at 0.4 to 0.5.
_BOUND = 0.5
# What optimizers call the setting by which small updates add up in half precision too.
_ADDS_UP = ("use_kahan_summation", "kahan_sum", "bf16_stochastic_round")


class RoundedAway(TrainerCallback):
    """Logs at a few of the first steps which share of the updates was rounded away, and warns once where it is most.

    An update is a weight with a gradient; it is rounded away where the weight is the same after the step. Weights in
    float32 or more are not looked at, nor those of which something else keeps the digits: DeepSpeed, which has a copy
    in float32, and optimizers with Kahan summation or stochastic rounding.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # each weight, what it was, and where it has a gradient
        self._lr = 0.0
        self._warned = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._before.clear()
        if state.global_step + 1 not in _STEPS or self.trainer.is_deepspeed_enabled:
            return
        optimizer = torch_optimizer(self.trainer)
        self._lr = max(float(group["lr"]) for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            if any(group.get(name) or getattr(optimizer, name, False) for name in _ADDS_UP):
                continue
            for weight in group["params"]:
                if weight.dtype.itemsize < 4 and weight.grad is not None:
                    self._before.append((weight, _sample(weight).clone(), _sample(weight.grad) != 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        before, self._before = self._before, []
        if not before or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        counts = torch.zeros(2, device=args.device)  # rounded away, and all
        for weight, old, moving in before:
            same = moving & (_sample(weight) == old)
            counts += torch.stack([same.sum(), moving.sum()]).to(counts) * _stride(weight)
        lost, updates = self.trainer.accelerator.reduce(counts).tolist()
        if not updates:
            return
        share = lost / updates
        self.trainer.record_figures({"capo/updates_rounded_away": share})
        step, groups = state.global_step + 1, torch_optimizer(self.trainer).param_groups
        top = max(float(group.get("initial_lr", group["lr"])) for group in groups)
        # A warm-up or a slow start may have small updates at first.
        if share <= _BOUND or self._warned or (step == _STEPS[0] and self._lr < top / 2):
            return
        self._warned = True
        if state.is_world_process_zero:
            logger.warning(
                "step %d: %.0f %% of the updates are rounded away, since the weights are in %s and a learning_rate of "
                "%.2g moves most of them by less than half a unit in their last place: this run trains little. Keep "
                "the weights in float32 and compute in bfloat16 (`dtype: float32, bf16: true` in a recipe; in a "
                "script, load the model with dtype=torch.float32 and set bf16=True)",
                step,
                100 * share,
                " and ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight, *_ in before})),
                self._lr,
            )


def _stride(tensor: Tensor) -> int:
    """Odd, so that it walks over the columns of a matrix and does not stay in one."""
    return max(1, _local(tensor).numel() // _SAMPLE) | 1


def _sample(tensor: Tensor) -> Tensor:
    return _local(tensor).detach().reshape(-1)[:: _stride(tensor)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
