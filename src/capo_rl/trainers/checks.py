"""What a `CAPOTrainer` can't be made for, or can only in part, said before it trains."""

from __future__ import annotations

import logging
from typing import Any

from trl import GRPOTrainer

from capo_rl.curvature.step_model import DECIDING

logger = logging.getLogger(__name__)

# What TRL passes to reward functions itself, beside the columns of the data.
_PASSED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


def check_columns(*datasets: Any) -> None:
    """Raises `ValueError` for a column that a reward function would get twice, or not at all."""
    for dataset in datasets:
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if taken := [name for name in getattr(part, "column_names", None) or () if name in _PASSED]:
                raise ValueError(
                    f"the data has a column `{taken[0]}`, and TRL passes something of its own by that name to reward "
                    "functions: rename the column, or remove it"
                )


def check_loss(trainer: Any, ours: type) -> None:
    """A mask is written into the advantages, one a token, which only GRPOTrainer's own loss is known to read.

    Raises `TypeError` where another class's loss comes next after `ours`.
    """
    classes = type(trainer).__mro__
    loss = next(each for each in classes[classes.index(ours) + 1 :] if "_compute_loss" in vars(each))
    if trainer.args.capo_mode == "mask" and loss is not GRPOTrainer:
        raise TypeError(
            f"capo_mode='mask' gives each token its own advantage, and the loss is {loss.__name__}'s, which may "
            "take one for a sequence: use capo_mode='trust_region', 'shorten' or 'monitor', which leave them alone"
        )


def check_deepspeed(args: Any) -> None:
    """DeepSpeed takes its step inside the backward pass, before anything of the step is known but its rollouts.

    Raises `ValueError` for settings that would change that step.
    """
    if args.kl_budget is not None and args.capo_kl_control != "learning_rate":
        raise ValueError(
            f"capo_kl_control={args.capo_kl_control!r} moves weights of a step that DeepSpeed has taken already: "
            "use 'learning_rate', which sets the coming step's"
        )
    if args.capo_mode == "shorten" or (args.capo_mode == "mask" and args.capo_share):
        raise ValueError(
            f"capo_mode={args.capo_mode!r} with the accepted tokens' share shortens a step that DeepSpeed has "
            "taken already: use capo_mode='trust_region', or capo_mode='mask' with capo_share=False"
        )


def warn_of_entropy(args: Any) -> None:
    """The gradient of an entropy bonus is not seen where shifts are predicted."""
    adaptive = getattr(args, "use_adaptive_entropy", False)
    if (adaptive or getattr(args, "entropy_coef", 0.0) != 0) and args.capo_mode in ("monitor", *DECIDING):
        logger.warning(
            "%s: the gradient of the entropy bonus does not go through log pi(a), so the step model's moments are "
            "without it, and m_H, m_F, the share and the predicted KL are those of the rest of the loss "
            "(docs/algorithm.md); capo_mode='trust_region' measures whole steps",
            "use_adaptive_entropy" if adaptive else "entropy_coef",
        )
