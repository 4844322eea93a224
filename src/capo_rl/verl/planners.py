"""The planner and the trust region of a run, made of its settings and of verl's optimizer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from capo_rl.curvature.processes import Processes
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import choose, fit_of_optimizer
from capo_rl.planning.planner import Planner
from capo_rl.planning.trust_region import TrustRegion, check_recomputable
from capo_rl.settings.own import check_units, control_of, planner_of, step_of
from capo_rl.verl.settings import CAPOSettings, in_verls_words


def planner_and_region(
    settings: CAPOSettings, optimizer: Optimizer, lr: float, temperature: float, processes: Processes
) -> tuple[Planner, TrustRegion | None]:
    """The planner, and the trust region of a mode that changes the run; `lr` is the schedule's largest.

    Raises `ValueError`, in verl's words, for settings that this optimizer does not fit.
    """
    with in_verls_words():
        model = choose(settings.capo_step, settings.capo_mode, fit_of_optimizer(optimizer))
        check_units(settings, model)
        if settings.kl_budget is not None and settings.capo_kl_control == "optimizer":
            check_recomputable(optimizer)
    step = _step(settings, model, optimizer.param_groups[0], processes)
    planner = planner_of(settings, step, temperature, processes)
    return planner, TrustRegion(optimizer, control_of(settings, lr)) if settings.changes_the_run else None


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
