"""The optimizer of a trainer, and the model of its step: chosen before the optimizer is made, and compared with it."""

from __future__ import annotations

from typing import Any

import torch

from capo_rl.curvature.processes import Processes
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import Fit, choose, fit_of_class, fit_of_name, fit_of_optimizer, group_of
from capo_rl.planning.planner import Planner
from capo_rl.planning.trust_region import check_recomputable
from capo_rl.settings.own import step_of

# What `optim` may be where Adam's step is recomputed.
_RECOMPUTED = ("adamw_torch", "adamw_torch_fused")


def torch_optimizer(trainer: Any) -> torch.optim.Optimizer:
    """The trainer's optimizer, without Accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def known_fit(trainer: Any) -> Fit:
    """Which step model fits, as far as it is known before the optimizer is made."""
    if trainer.optimizer is not None:
        return fit_of_optimizer(trainer.optimizer)
    if trainer.optimizer_cls_and_kwargs is not None:
        return fit_of_class(*trainer.optimizer_cls_and_kwargs)
    return fit_of_name(trainer.args.optim, trainer.args.optim_args)


def step_model(args: Any, fit: Fit, processes: Processes | None = None) -> AdamStep | SGDStep:
    """The model of the optimizer's step that the settings ask for, with the constants of `args`; `processes` are those
    that plan it.

    Raises `ValueError` as `step_model.choose`.
    """
    model = choose(args.capo_step, args.capo_mode, fit)
    return step_of(args, model, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, processes)


def follow_optimizer(trainer: Any, planner: Planner, fit: Fit) -> float:
    """Take the step model's constants from the optimizer that was made, and see that it is what it was to be; `fit` is
    what was known before. Returns the last layer's learning rate as a multiple of the first group's.

    Raises `ValueError` where a subclass made an optimizer that another step model fits.
    """
    if trainer.is_deepspeed_enabled:
        return 1.0  # its optimizer is a wrapper of its own kind
    args, step, optimizer = trainer.args, planner.step, torch_optimizer(trainer)
    made = fit_of_optimizer(optimizer)
    if made.model != fit.model and not isinstance(step, type(step_model(args, made))):
        raise ValueError(
            f"the optimizer is {made.name} and optim={getattr(args.optim, 'value', args.optim)!r}, by which "
            f"capo_step='auto' chose: set capo_step={made.model or 'adam'!r}"
        )
    at = group_of(optimizer, trainer.backbone.causal_lm(trainer.model).get_output_embeddings().weight)
    first, own = (optimizer.param_groups[i] for i in (0, at))
    if isinstance(step, AdamStep) and made.model == "adam":
        step.betas = (float(own["betas"][0]), float(own["betas"][1]))
        step.eps = float(own["eps"])
        if planner.share is not None:
            planner.share.beta2 = step.betas[1]
    return own["initial_lr"] / first["initial_lr"] if at and first.get("initial_lr") else 1.0


def check_recomputes(trainer: Any) -> None:
    """Raises `ValueError` for an optimizer whose step can't be recomputed from its state, as far as it is known."""
    if trainer.optimizer is not None:
        check_recomputable(torch_optimizer(trainer))
        return
    optim = trainer.args.optim
    if trainer.optimizer_cls_and_kwargs is None and optim not in _RECOMPUTED:
        raise ValueError(
            f"capo_kl_control='optimizer' recomputes the step of torch's AdamW, and optim="
            f"{getattr(optim, 'value', optim)!r} is another: use optim={_RECOMPUTED[0]!r}, or capo_kl_control='copy'"
        )
