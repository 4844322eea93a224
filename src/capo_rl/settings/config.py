"""CAPO's own settings on top of TRL's: new fields only, with the paper's defaults (Tables 2 and 4)."""

# No `from __future__ import annotations` here: the HF argument parser reads the annotations at run time.
import functools
import os
import typing
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from capo_rl.curvature.selection import Thresholds, check_bounds
from capo_rl.curvature.step_model import fit_of_name
from capo_rl.planning.defaults import KL_BUDGET
from capo_rl.settings.fields import wrong_type
from capo_rl.settings.own_fields import CHOICES, CAPOFields

# In the order of `check_bounds`.
_BOUNDS = ("capo_fisher_threshold", "capo_hessian_low", "capo_hessian_high")

# The losses whose denominators are defined on accepted tokens (docs/algorithm.md, "Denominators").
MASKABLE_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo")


@dataclass
class CAPOConfig(CAPOFields, GRPOConfig):
    """Every setting of `trl.GRPOConfig`, and those of the curvature model and its selection.

    Raises `ValueError`, naming the field and the fix, for settings that contradict one another.

    >>> config = CAPOConfig(output_dir="runs/example", report_to="none", bf16=False, use_cpu=True)
    >>> config.thresholds
    Thresholds(fisher=0.0001, hessian=(-0.01, 0.01))
    """

    @property
    def kl_budget(self) -> float | None:
        """The budget that holds in this mode, in nats a token; None for no budget."""
        if self.capo_kl_budget is None and self.capo_mode == "trust_region":
            return KL_BUDGET
        return self.capo_kl_budget

    @property
    def changes_the_run(self) -> bool:
        """Whether this mode trains otherwise than TRL."""
        return self.capo_mode not in ("off", "monitor")

    @property
    def predicts(self) -> bool:
        """Whether shifts are predicted: in every mode that decides by them, and where `capo_watch` asks for them."""
        return self.capo_mode != "off" and (self.capo_mode != "trust_region" or self.capo_watch)

    @property
    def thresholds(self) -> Thresholds:
        """The bounds of Eq. 11 as one object."""
        return Thresholds(self.capo_fisher_threshold, (self.capo_hessian_low, self.capo_hessian_high))

    def __post_init__(self):
        if self.capo_mode is False:  # how YAML reads a bare `off`
            self.capo_mode = "off"
        check_capo(self)
        if self.ddp_backend is not None and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"ddp_backend={self.ddp_backend!r} is for several processes, and this is one: start them with "
                "`accelerate launch`, or leave it out"
            )
        if self.trust_remote_code:
            raise ValueError("trust_remote_code=True runs foreign code: set it to false")
        super().__post_init__()


@functools.cache
def _own_types() -> dict[str, Any]:
    hints = typing.get_type_hints(CAPOConfig)
    return {name: hint for name, hint in hints.items() if name.startswith("capo_")}


def check_capo(config: Any) -> None:
    """Raises `ValueError` for settings of CAPO's that contradict one another or TRL's, naming the field and the fix."""
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
    auto = config.capo_step == "auto"
    step = fit_of_name(config.optim, config.optim_args).model if auto else config.capo_step
    if config.capo_units == "translated" and (step == "sgd" or config.capo_granularity != "token"):
        raise ValueError(
            "capo_units='translated' is for the shifts of single tokens under Adam: use capo_units='plain' with "
            "capo_step='sgd' or another capo_granularity"
        )
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
    if config.capo_mode == "mask" and config.loss_type not in MASKABLE_LOSSES:
        raise ValueError(
            f"capo_mode='mask' has no denominators for loss_type={config.loss_type!r}: "
            f"use one of {', '.join(MASKABLE_LOSSES)}, or capo_mode='monitor'"
        )
    if (
        config.capo_mode == "mask"
        and config.importance_sampling_level == "sequence"
        and config.capo_granularity == "token"
    ):
        raise ValueError(
            "capo_granularity='token' can't leave a token out of a loss with importance_sampling_level='sequence', "
            "whose ratio every token of a sequence shares: use capo_granularity='sequence'"
        )
