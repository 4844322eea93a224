"""verl's actor config with CAPO's settings in it, and which of verl's own settings CAPO can't work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPActorConfig
from verl.workers.engine.base import EngineRegistry

from capo_rl.verl.settings import CAPOSettings

# The loss of `selection.accepted_mean` that has the denominator of each of verl's aggregations.
AGGREGATIONS = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum": "dr_grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "token-sum": "dr_grpo",
}

# Policy losses that are one term a token, proportional to its own advantage: an advantage of zero leaves the token out.
MASKABLE_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "gpg", "cispo")

# Those of them that have log π(a) in a ratio alone: how they lean on an advantage says what a rejected token would have
# weighed, which the share of the step needs.
SHAREABLE_LOSSES = ("vanilla",)


@dataclass
class CAPOActorConfig(FSDPActorConfig):
    """verl's `FSDPActorConfig` with `capo`: name it in `actor_rollout_ref.actor._target_`.

    Raises `ValueError`, naming the field and the fix, for what the adapter cannot do.
    """

    _mutable_fields = FSDPActorConfig._mutable_fields | {"capo"}

    capo: Any = field(default_factory=CAPOSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.capo, CAPOSettings):
            self.capo = CAPOSettings.of(self.capo)
        if self.capo.capo_mode == "off":
            return
        _refuse(self.strategy not in ("fsdp", "fsdp2"), f"strategy={self.strategy!r}", "is not FSDP", "use 'fsdp2'")
        chosen = EngineRegistry.get_engine_cls("language_model", self.strategy)
        _refuse(
            not hasattr(chosen, "planner"),
            f"strategy={self.strategy!r}",
            f"selects verl's {chosen.__name__} here",
            "unset VERL_ENGINE_DEVICE and VERL_ENGINE_VENDOR",
        )
        split = max(self.ulysses_sequence_parallel_size, self.fsdp_config.ulysses_sequence_parallel_size)
        _refuse(split > 1, f"ulysses_sequence_parallel_size={split}", "splits a sequence over processes", "use 1")
        _refuse(self.use_fused_kernels, "use_fused_kernels=True", "hides the output head", "set it to false")
        _refuse(self.use_prefix_grouper, "use_prefix_grouper=True", "moves tokens between sequences", "set it to false")
        qat = getattr(self.fsdp_config, "qat", None)
        _refuse(
            self.capo.kl_budget is not None and bool(getattr(qat, "enable", False)),
            "fsdp_config.qat.enable=True",
            "keeps the scales of weights that a KL budget may take back",
            "set it to false, or capo.kl_budget=null with another capo.mode",
        )
        if self.capo.capo_mode == "mask":
            _refuse(
                self.policy_loss.loss_mode not in MASKABLE_LOSSES,
                f"policy_loss.loss_mode={self.policy_loss.loss_mode!r}",
                "does not leave a token out when its advantage is zero",
                f"use one of {', '.join(MASKABLE_LOSSES)}, or capo.mode=monitor",
            )
            _refuse(
                self.loss_agg_mode not in AGGREGATIONS,
                f"loss_agg_mode={self.loss_agg_mode!r}",
                "has no mean over accepted tokens",
                f"use one of {', '.join(AGGREGATIONS)}, or capo.mode=monitor",
            )
            _refuse(
                self.capo.capo_share and self.policy_loss.loss_mode not in SHAREABLE_LOSSES,
                f"policy_loss.loss_mode={self.policy_loss.loss_mode!r}",
                "does not say what a rejected token would have weighed, and the share of the step asks for it",
                f"use one of {', '.join(SHAREABLE_LOSSES)}, or capo.share=false, the paper's mask",
            )


def _refuse(condition: bool, setting: str, reason: str, fix: str) -> None:
    if condition:
        raise ValueError(f"actor.{setting} {reason}, which CAPO can't work with: {fix}")


def actor_config(loss_function: Callable[..., Any]) -> CAPOActorConfig:
    """The settings that came with the loss, which verl hands over as `partial(ppo_loss, config=...)`."""
    config = getattr(loss_function, "keywords", {}).get("config")
    if not isinstance(config, CAPOActorConfig):
        raise RuntimeError(
            "capo_rl.verl is loaded, and the loss came without its settings: set "
            "actor_rollout_ref.actor._target_=capo_rl.verl.CAPOActorConfig, and +actor_rollout_ref.actor.capo.mode=off "
            "if this is to be a run without CAPO"
        )
    return config
