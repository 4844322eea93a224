"""CAPO's own settings on top of TRL's: new fields only, with the paper's defaults (Tables 2 and 4)."""

# No `from __future__ import annotations` here: the HF argument parser reads the annotations at run time.
import os
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from capo_rl.curvature.step_model import fit_of_name
from capo_rl.settings.own import OwnSettings, check_own, check_units

# The losses whose denominators are defined on accepted tokens (docs/algorithm.md, "Denominators").
MASKABLE_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo")


@dataclass
class CAPOConfig(OwnSettings, GRPOConfig):
    """Every setting of `trl.GRPOConfig`, and those of the curvature model and its selection.

    Raises `ValueError`, naming the field and the fix, for settings that contradict one another.

    >>> config = CAPOConfig(output_dir="runs/example", report_to="none", bf16=False, use_cpu=True)
    >>> config.thresholds
    Thresholds(fisher=0.0001, hessian=(-0.01, 0.01))
    """

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


def check_capo(config: Any) -> None:
    """Raises `ValueError` for settings of CAPO's that contradict one another or TRL's, naming the field and the fix."""
    check_own(config)
    auto = config.capo_step == "auto"
    check_units(config, fit_of_name(config.optim, config.optim_args).model if auto else config.capo_step)
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
