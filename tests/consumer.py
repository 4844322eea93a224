"""What a user with strict types writes: everything that `from capo_rl import ...` gives (tests/test_types.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from capo_rl import (
    AdamStep,
    AdaptThresholds,
    Alarm,
    AlarmCallback,
    CAPOConfig,
    CAPOTrainer,
    Head,
    MicroBatch,
    MonitorCallback,
    Planner,
    SGDStep,
    Shifts,
    Thresholds,
    TrustRegion,
    __version__,
    accuracy_reward,
    constraint_reward,
    select,
    subset_shifts,
    token_shifts,
)


def rewards(completions: list[str], answers: list[str]) -> list[float | None]:
    return accuracy_reward(completions, answers)


def obeys(completions: list[str]) -> list[float]:
    return constraint_reward(completions, [{"words": ["dog"]}] * len(completions))


def config() -> CAPOConfig:
    return CAPOConfig(output_dir="runs/typed", capo_mode="trust_region", capo_kl_budget=5e-3)


def watched(trainer: CAPOTrainer) -> None:
    trainer.add_callback(MonitorCallback(trainer))
    trainer.add_callback(AlarmCallback(Alarm(factor=5.0), ("warn", "checkpoint")))
    trainer.add_callback(AdaptThresholds(trainer, 0.05))


def region(optimizer: torch.optim.Optimizer, head: Tensor) -> tuple[TrustRegion, Planner]:
    found = TrustRegion(optimizer, budget=5e-3)
    return found, Planner.of(found, head, Thresholds(), top_k=50, share=True)


def step(planner: Planner, head: Tensor, hidden: Tensor, actions: Tensor, advantages: Tensor) -> dict[str, float]:
    planned: MicroBatch = planner.plan(hidden, Head(head), actions, advantages)
    keep: Tensor = planned.keep
    assert keep.dtype == torch.bool
    figures: dict[str, float] = planner.commit(1.0)
    return figures


def measured(region: TrustRegion, planner: Planner, hidden: Tensor, head: Tensor) -> float:
    update = region.after_step(lambda: planner.measured_kl(lambda i: hidden, Head(head)).mean, planner.has_gradient)
    return update.measured if update is not None else float(__version__ == "")


def verdicts(shifts: Shifts) -> Tensor:
    return select(shifts, Thresholds())


STEPS: tuple[type[AdamStep], type[SGDStep]] = (AdamStep, SGDStep)
SHIFTS = (token_shifts, subset_shifts)
