"""The first steps of a run, watched for their shifts and measured KL.

Everything is stated at the schedule's highest learning rate α*: a token's planned step is proportional to α, so with
ρ = α*/α

    m_F → ρ² m_F        m_H → A (ρ s + ½ ρ² (s² − c))        KL → ρ² KL

exactly for the shifts (Eq. 58, 63), to second order for the measured KL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from capo_rl.curvature.step import AdamStep
from capo_rl.planning.micro_batch import MicroBatch
from capo_rl.runs.progress import Progress
from capo_rl.settings.recipe import Recipe
from capo_rl.thresholds.choice import FEWEST, Array, CalibrationError, Step

SHARE, MOST = 0.03, 50  # of the run's steps, and how many at most
_ROUNDING = 1e-10  # nats: a measured KL below this is rounding


def watch(recipe: Recipe, steps: int | None = None) -> tuple[list[Step], int, float]:
    """Run a recipe's first steps; returns those that count, how many the whole run has, and the seconds they took.

    A step with a learning rate of zero doesn't count, nor does Adam's first, whose moments are empty. In processes but
    the main one none does.

    Raises `CalibrationError` where nothing can be learnt from the steps.
    """
    from capo_rl.trainers.train import make_trainer

    trainer, _ = make_trainer(recipe)
    watcher = _Watch(trainer, steps)
    trainer.add_callback(watcher)
    seconds = trainer.train().metrics["train_runtime"]
    if not trainer.is_world_process_zero():
        return [], watcher.total, seconds
    if not watcher.seen:
        raise CalibrationError(
            f"the learning rate was 0 in all of the {watcher.steps} steps, or they were Adam's first, so nothing "
            "moved: raise --steps beyond the start of the warm-up"
        )
    if not any(step.m_f.any() for step in watcher.seen):
        raise CalibrationError(
            f"every shift in {watcher.steps} steps is 0: all completions of a group got the same reward, so no "
            "advantage differs from 0; raise --steps, or train on problems that are solved sometimes"
        )
    return watcher.seen, watcher.total, seconds


def default_steps(total: int) -> int:
    """How many steps to watch of a run of `total`: 3 % of them, at least 7 and at most 50.

    A watched step takes longer than one of the run, since its KL is measured, and all of them are to take 5 % of it.
    Six steps that count are the fewest that hold a 95 % interval, and a first that doesn't comes before them; an
    interval narrows with the root of their number, while the policy moves on.

    >>> [default_steps(total) for total in (100, 300, 5000)]
    [7, 9, 50]
    """
    return min(MOST, max(FEWEST, int(SHARE * total)), total)


class _Watch(TrainerCallback):
    """Keeps what the planner knows of every step, and stops the run after the last that is to be watched."""

    def __init__(self, trainer: Any, steps: int | None) -> None:
        self.trainer, self.asked = trainer, steps
        self.steps, self.total = 0, 0
        self.seen: list[Step] = []
        self.tokens: list[MicroBatch] = []
        self.lr = 0.0
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.total = state.max_steps
        self.steps = default_steps(self.total) if self.asked is None else self.asked
        adam = isinstance(self.trainer.planner.step, AdamStep)
        fewest = FEWEST if adam else FEWEST - 1  # Adam's first does not count
        if self.total < fewest:
            raise CalibrationError(
                f"the run has {self.total} steps, and thresholds take at least {fewest}: give a larger --max_steps"
            )
        if not fewest <= self.steps <= self.total:
            raise CalibrationError(
                f"--steps {self.steps}: thresholds take at least {fewest}, and the run has {self.total}; give {fewest} "
                f"to {self.total}"
            )
        if state.is_world_process_zero:
            self.progress = Progress(self.steps, "calibrate", "step", shown=not args.disable_tqdm)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.tokens, self.lr = self.trainer.planner.micro_batches, self.trainer.planner.step.lr

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.update(state.global_step)
        control.should_training_stop |= state.global_step >= self.steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        cold = isinstance(self.trainer.planner.step, AdamStep) and state.global_step == 1
        if self.tokens and self.lr > 0 and not cold and logs and "capo/kl/measured" in logs:
            scale = args.learning_rate / self.lr
            m_f, m_h = at_scale(self.tokens, scale, args.capo_fisher)
            batch_m_f, kl = (scale**2 * logs[name] for name in ("capo/batch/m_f", "capo/kl/measured"))
            # what is lost in rounding says nothing of KL
            kl = kl if logs["capo/kl/measured"] > _ROUNDING else math.nan
            self.seen.append(Step(m_f, m_h, batch_m_f, kl))
        self.tokens = []

    def on_train_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.close()


def at_scale(tokens: Sequence[MicroBatch], scale: float, fisher: str = "sampled") -> tuple[Array, Array]:
    """m_F and m_H [n] of a step's tokens had the learning rate been `scale` times what it was; finite ones only."""

    def column(values: Sequence[Any]) -> Array:
        return np.concatenate([value.double().cpu().numpy() for value in values])

    s, c = (column([getattr(batch.shifts, of) for batch in tokens]) for of in ("s", "c"))
    advantages = column([batch.advantages for batch in tokens])
    with np.errstate(invalid="ignore", over="ignore"):
        s, c = scale * s, scale**2 * c
        m_f, m_h = 0.5 * (s**2 if fisher == "sampled" else c), advantages * (s + 0.5 * (s**2 - c))
    finite = np.isfinite(m_f) & np.isfinite(m_h)
    return m_f[finite], m_h[finite]
