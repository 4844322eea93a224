"""CAPO's own settings, whoever trains: what follows from them, and which contradict one another."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds, check_bounds
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.planning.defaults import KL_BUDGET
from capo_rl.planning.planner import Planner
from capo_rl.planning.trust_region import Backtracking, CopiedStep, RecomputedStep, Steering, Way, way_back
from capo_rl.planning.updates import Updates
from capo_rl.settings.fields import wrong_type
from capo_rl.settings.own_fields import CHOICES, CAPOFields

# In the order of `check_bounds`.
_BOUNDS = ("capo_fisher_threshold", "capo_hessian_low", "capo_hessian_high")


class OwnSettings(CAPOFields):
    """`CAPOFields` with what follows from them."""

    @property
    def kl_budget(self) -> float | None:
        """The budget that holds in this mode, in nats a token; None for no budget."""
        if self.capo_kl_budget is None and self.capo_mode == "trust_region":
            return KL_BUDGET
        return self.capo_kl_budget

    @property
    def changes_the_run(self) -> bool:
        """Whether this mode trains otherwise than the trainer by itself."""
        return self.capo_mode not in ("off", "monitor")

    @property
    def predicts(self) -> bool:
        """Whether shifts are predicted: in every mode that decides by them, and where `capo_watch` asks for them."""
        return self.capo_mode != "off" and (self.capo_mode != "trust_region" or self.capo_watch)

    @property
    def thresholds(self) -> Thresholds:
        """The bounds of Eq. 11 as one object."""
        return Thresholds(self.capo_fisher_threshold, (self.capo_hessian_low, self.capo_hessian_high))


def planner_of(
    settings: Any, step: AdamStep | SGDStep, temperature: float, processes: Processes | None = None
) -> Planner:
    """The planner that the settings ask for, with the model of the optimizer's step."""
    return Planner(
        step,
        settings.thresholds,
        fisher=settings.capo_fisher,
        soft=settings.capo_soft,
        penalty=settings.capo_penalty,
        translated=settings.capo_units == "translated",
        share=settings.capo_mode in ("monitor", "shorten") or (settings.capo_mode == "mask" and settings.capo_share),
        **_supports(settings, temperature, processes),
    )


def updates_of(settings: Any, temperature: float, processes: Processes | None = None) -> Updates:
    """What measures updates where nothing is predicted."""
    return Updates(**_supports(settings, temperature, processes))


def _supports(settings: Any, temperature: float, processes: Processes | None) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "top_k": settings.capo_top_k,
        "top_p": settings.capo_top_p,
        "max_missing_mass": settings.capo_max_missing_mass,
        "processes": processes,
    }


def step_of(
    settings: Any,
    model: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    processes: Processes | None = None,
) -> AdamStep | SGDStep:
    """The model of the optimizer's step, `adam` or `sgd`, with the optimizer's constants; `processes` are those that
    plan it."""
    if model == "sgd":
        return SGDStep(lr)
    dtype = torch.bfloat16 if settings.capo_moments == "bfloat16" else None
    return AdamStep(lr, betas, eps, dtype, processes if settings.capo_shard_moments else None)


def control_of(
    settings: Any, lr: float, way: Callable[[Optimizer], Way] | None = way_back
) -> Backtracking | Steering | None:
    """What keeps the budget, None without one; `lr` is the largest learning rate of the run, and `way` leads back from
    a step that was steered."""
    budget = settings.kl_budget
    if budget is None:
        return None
    if settings.capo_kl_control == "learning_rate":
        return Steering(budget, settings.capo_kl_start * lr, way)
    return Backtracking(budget, CopiedStep if settings.capo_kl_control == "copy" else RecomputedStep)


@functools.cache
def _own_types() -> dict[str, Any]:
    return typing.get_type_hints(CAPOFields)


def check_own(config: Any) -> None:
    """Raises `ValueError` for settings of CAPO's that contradict one another, naming the field and the fix."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of {', '.join(choices)}")
    for name, hint in _own_types().items():
        if (wrong := wrong_type(getattr(config, name), hint)) is not None:
            raise ValueError(f"{name}={getattr(config, name)!r} {wrong}")
    check_bounds(config.capo_fisher_threshold, config.capo_hessian_low, config.capo_hessian_high, _BOUNDS)
    if config.capo_top_k is not None and config.capo_top_k < 1:
        raise ValueError(f"capo_top_k={config.capo_top_k} must be at least 1, or null for the whole vocabulary")
    if config.capo_top_p is not None and not 0 < config.capo_top_p <= 1:
        raise ValueError(
            f"capo_top_p={config.capo_top_p} is a probability: give it in (0, 1], or null for all of capo_top_k"
        )
    if not 0 <= config.capo_max_missing_mass <= 1:
        raise ValueError(f"capo_max_missing_mass={config.capo_max_missing_mass} is a probability: give it in [0, 1]")
    if config.capo_kl_every is not None and config.capo_kl_every < 1:
        raise ValueError(
            f"capo_kl_every={config.capo_kl_every} must be at least 1, or null for the steps that are logged"
        )
    if config.capo_tokens_every is not None:
        if config.capo_tokens_every < 1:
            raise ValueError(f"capo_tokens_every={config.capo_tokens_every} must be at least 1, or null for never")
        if config.capo_mode == "off":
            raise ValueError(
                "capo_tokens_every records what selection makes of tokens, and capo_mode='off' looks at none: use "
                "capo_mode='monitor', which changes nothing"
            )
        if config.capo_mode == "trust_region" and not config.capo_watch:
            raise ValueError(
                "capo_tokens_every records tokens' shifts, and capo_mode='trust_region' computes none by itself: set "
                "capo_watch=True"
            )
    if not 0 < config.capo_kl_sample <= 1:
        raise ValueError(f"capo_kl_sample={config.capo_kl_sample} is a share of the completions: give it in (0, 1]")
    if config.capo_penalty is not None and not config.capo_penalty > 0:
        raise ValueError(f"capo_penalty={config.capo_penalty} must be above 0, or null for a mask")
    if config.capo_soft or config.capo_penalty is not None:
        if config.capo_mode in ("trust_region", "shorten"):
            raise ValueError(
                f"capo_soft and capo_penalty take the mask's place, and capo_mode={config.capo_mode!r} has none: use "
                "capo_mode='mask'"
            )
        if config.capo_soft and config.capo_penalty is not None:
            raise ValueError("capo_soft and capo_penalty both take the mask's place: use one of them")
        if config.capo_granularity != "token":
            raise ValueError("capo_soft and capo_penalty weigh tokens one by one: use capo_granularity='token'")
    if config.capo_kl_budget is not None:
        if not config.capo_kl_budget > 0:
            raise ValueError(f"capo_kl_budget={config.capo_kl_budget} must be above 0, or null for no budget")
        if config.capo_mode in ("off", "monitor"):
            raise ValueError(
                f"capo_kl_budget changes the run and capo_mode={config.capo_mode!r} must not: use "
                "capo_mode='trust_region', or null"
            )
    if not 0 < config.capo_kl_start <= 1:
        raise ValueError(f"capo_kl_start={config.capo_kl_start} is a share of the learning rate: give it in (0, 1]")


def check_units(config: Any, step: str | None) -> None:
    """Raises `ValueError` for translated units with a step model, or a granularity, that has none."""
    if config.capo_units == "translated" and (step == "sgd" or config.capo_granularity != "token"):
        raise ValueError(
            "capo_units='translated' is for the shifts of single tokens under Adam: use capo_units='plain' with "
            "capo_step='sgd' or another capo_granularity"
        )
