"""CAPO's own settings on top of TRL's: new fields only, with the paper's defaults (Tables 2 and 4)."""

# No `from __future__ import annotations` here: the HF argument parser reads the annotations at run time.
import functools
import math
import os
import typing
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from capo_rl.fields import wrong_type
from capo_rl.selection import Thresholds
from capo_rl.trust_region import KL_BUDGET, KL_START

_CHOICES = {
    "capo_mode": ("off", "monitor", "mask", "shorten", "trust_region"),
    "capo_advantage": ("group", "reward"),
    "capo_granularity": ("token", "sequence", "group", "batch"),
    "capo_step": ("auto", "adam", "sgd"),
    "capo_units": ("plain", "translated"),
    "capo_fisher": ("sampled", "expected"),
    "capo_moments": ("float32", "bfloat16"),
    "capo_kl_control": ("learning_rate", "copy", "optimizer"),
}

# The losses whose denominators are defined on accepted tokens (docs/algorithm.md, "Denominators").
MASKABLE_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo")


@dataclass
class CAPOConfig(GRPOConfig):
    """Every setting of `trl.GRPOConfig`, and those of the curvature model and its selection.

    Raises `ValueError`, naming the field and the fix, for settings that contradict one another.

    >>> config = CAPOConfig(output_dir="runs/example", report_to="none", bf16=False, use_cpu=True)
    >>> config.thresholds
    Thresholds(fisher=0.0001, hessian=(-0.01, 0.01))
    """

    capo_mode: str = field(
        default="trust_region",
        metadata={
            "help": "`trust_region` leaves no token out and makes each step as long as capo_kl_budget allows. `mask`, "
            "the paper's method, leaves rejected tokens out of the gradient. `shorten` leaves no token out and "
            "multiplies the step by the share of the accepted ones. `monitor` computes and logs the same and changes "
            "nothing; `off` is TRL's own trainer.",
            "choices": _CHOICES["capo_mode"],
        },
    )
    capo_advantage: str = field(
        default="group",
        metadata={
            "help": "`group`: TRL's group-relative advantage (GRPO, Dr.GRPO). `reward`: the raw reward (REINFORCE).",
            "choices": _CHOICES["capo_advantage"],
        },
    )
    capo_granularity: str = field(
        default="token",
        metadata={
            "help": "What is accepted or rejected as one: a token (the paper's choice), or a sequence, group or batch, "
            "each as far as it lies inside one micro-batch.",
            "choices": _CHOICES["capo_granularity"],
        },
    )
    capo_fisher_threshold: float | None = field(
        default=1e-4,
        metadata={"help": "delta_F: a token is kept if m_F <= delta_F (Eq. 11, Table 4). `inf` or null: no bound."},
    )
    capo_hessian_low: float | None = field(
        default=-1e-2,
        metadata={"help": "Lower bound on m_H (Eq. 11, Table 4). `-inf` or null: no bound."},
    )
    capo_hessian_high: float | None = field(
        default=1e-2,
        metadata={"help": "Upper bound on m_H (Eq. 11, Table 4). `inf` or null: no bound."},
    )
    capo_step: str = field(
        default="auto",
        metadata={
            "help": "The model of the optimizer's step on the last layer (Section 4.1); `auto`: the optimizer's own. "
            "Where it is neither, the modes that decide by shifts are refused.",
            "choices": _CHOICES["capo_step"],
        },
    )
    capo_units: str = field(
        default="plain",
        metadata={
            "help": "`plain`: the bounds are for m_F and m_H as they are (the paper). `translated`: for what they "
            "would be at the learning rate and size of the paper's model, so that one bound means the same for "
            "another model. Not in the paper.",
            "choices": _CHOICES["capo_units"],
        },
    )
    capo_fisher: str = field(
        default="sampled",
        metadata={
            "help": "m_F from the sampled action (`sampled`, Eq. 58) or its exact expectation over actions "
            "(`expected`, lower variance).",
            "choices": _CHOICES["capo_fisher"],
        },
    )
    capo_top_k: int | None = field(
        default=50,
        metadata={"help": "Vocabulary rows kept for each token (Section 4.1); null or k >= V: the whole vocabulary."},
    )
    capo_moments: str = field(
        default="float32",
        metadata={
            "help": "How the Adam step model keeps its moments, two numbers for each weight of a row seen so far.",
            "choices": _CHOICES["capo_moments"],
        },
    )
    capo_max_missing_mass: float = field(
        default=0.1,
        metadata={
            "help": "A token whose support misses more probability than this is counted in "
            "`capo/missing_mass/above_bound`, and a warning is given."
        },
    )

    capo_share: bool = field(
        default=True,
        metadata={
            "help": "With capo_mode `mask`: multiply the step by the share of the accepted tokens, as long as Adam "
            "would make it had it seen the rejected ones. Not in the paper: false is its mask."
        },
    )
    capo_soft: bool = field(
        default=False,
        metadata={
            "help": "In place of the mask: weigh a token that is out of bounds by what brings its own step back in. "
            "Not in the paper."
        },
    )
    capo_penalty: float | None = field(
        default=None,
        metadata={
            "help": "In place of the mask: take this times m_F off each token's objective; the bounds then only count. "
            "Not in the paper. null: off."
        },
    )
    capo_kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "The trust region, in nats a token: no update is left that moves the policy further, as measured "
            "on capo_kl_sample of the step's completions. null: 5e-3 with capo_mode `trust_region`, otherwise no "
            "budget. Not in the paper."
        },
    )
    capo_kl_control: str = field(
        default="learning_rate",
        metadata={
            "help": "How the budget is kept. `learning_rate`: at most the schedule's, it is set so that updates have "
            "a tenth of the budget on average, and one above the budget is taken back in part. `copy`, `optimizer`: "
            "the schedule's rate, and every update above the budget is taken back in part, from a copy of the weights "
            "or as Adam's state tells it.",
            "choices": _CHOICES["capo_kl_control"],
        },
    )
    capo_kl_start: float = field(
        default=KL_START,
        metadata={
            "help": "Slow start of capo_kl_control `learning_rate`: the share of learning_rate that the first step may "
            "have, at most doubled by each step after it."
        },
    )
    capo_kl_every: int | None = field(
        default=None,
        metadata={
            "help": "Measure the KL of every n-th update, one forward pass each; null: of those that are logged."
        },
    )
    capo_kl_sample: float = field(
        default=0.25,
        metadata={"help": "The share of a micro-batch's completions on which KL is measured."},
    )
    capo_tokens_every: int | None = field(
        default=None,
        metadata={
            "help": "Record what each token of every n-th step got, for `capo explain`: shifts, verdict, log pi. Of "
            "several processes the main one records its share. null: never."
        },
    )

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
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of {', '.join(choices)}")
    for name, hint in _own_types().items():
        if (wrong := wrong_type(getattr(config, name), hint)) is not None:
            raise ValueError(f"{name}={getattr(config, name)!r} {wrong}")
    low, high = config.capo_hessian_low, config.capo_hessian_high
    for name in ("capo_fisher_threshold", "capo_hessian_low", "capo_hessian_high"):
        if (bound := getattr(config, name)) is not None and math.isnan(bound):
            raise ValueError(f"{name} is NaN: give a number, or null for no bound")
    if config.capo_fisher_threshold is not None and not config.capo_fisher_threshold > 0:
        raise ValueError(
            f"capo_fisher_threshold={config.capo_fisher_threshold} must be above 0, or null for no bound: a policy "
            "shift is never negative, and zero only where a token has no advantage, so this rejects every token"
        )
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"capo_hessian_low={low} and capo_hessian_high={high}: the lower bound is above the upper; swap them"
        )
    if config.capo_top_k is not None and config.capo_top_k < 1:
        raise ValueError(f"capo_top_k={config.capo_top_k} must be at least 1, or null for the whole vocabulary")
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
    sgd = config.capo_step == "sgd" or (config.capo_step == "auto" and str(config.optim).endswith("sgd"))
    if config.capo_units == "translated" and (sgd or config.capo_granularity != "token"):
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
