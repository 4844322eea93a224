"""What measures or plans the updates of a run, and its trust region, made of its settings and of verl's optimizer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from capo_rl.curvature.processes import Processes
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import choose, fit_of_optimizer
from capo_rl.planning.trust_region import TrustRegion, check_recomputable
from capo_rl.planning.updates import Updates
from capo_rl.settings.own import check_units, control_of, planner_of, step_of, updates_of
from capo_rl.verl.settings import CAPOSettings, in_verls_words


def updates_and_region(
    settings: CAPOSettings, optimizer: Optimizer, lr: float, temperature: float, processes: Processes
) -> tuple[Updates, TrustRegion | None]:
    """What measures updates, a planner where anything is predicted, and the trust region of a mode that changes the
    run; `lr` is the schedule's largest.

    Raises `ValueError`, in verl's words, for settings that this optimizer does not fit.
    """
    with in_verls_words():
        if settings.kl_budget is not None and settings.capo_kl_control == "optimizer":
            check_recomputable(optimizer)
        if settings.predicts:
            model = choose(settings.capo_step, settings.capo_mode, fit_of_optimizer(optimizer))
            check_units(settings, model)
            step = _step(settings, model, optimizer.param_groups[0], processes)
            updates: Updates = planner_of(settings, step, temperature, processes)
        else:
            updates = updates_of(settings, temperature, processes)
    return updates, TrustRegion(optimizer, control_of(settings, lr)) if settings.changes_the_run else None


def _step(settings: CAPOSettings, model: str, group: dict[str, Any], processes: Processes) -> AdamStep | SGDStep:
    """The model of the optimizer's step, with the optimizer's own constants."""
    if model == "adam" and not {"betas", "eps"} <= set(group):
        raise ValueError(
            "actor.capo.step='adam' models Adam, and actor.optim.optimizer has no betas and eps: use an Adam, or "
            "actor.capo.step=sgd"
        )
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    betas, eps = (float(beta1), float(beta2)), float(group.get("eps", 0.0))
    return step_of(settings, model, float(group["lr"]), betas, eps, processes)
