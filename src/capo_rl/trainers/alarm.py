"""An early warning: a figure that stays far above its own recent past, and what to do about it.

The rule, for a figure x, the median of its last w observations, and a level below which its rises don't matter:

    rₜ = xₜ / max(median(xₜ₋w, …, xₜ₋₁), floor)

An alarm is raised by the observation with which r > factor has held `patience` times in a row. It is a control chart's
rule of runs (Western Electric, 1956) on a scale that the figure gives itself; the median, so that one outlier moves no
baseline; the floor, because a KL that rises from 1e-7 to 1e-5 breaks nothing. How it was tuned, and what it is worth,
is in docs/monitor.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "checkpoint", "lower_lr", "stop")

# Nats a token: the 90th percentile of the measured KL over the stable steps of the tuning runs (benchmarks/alarm.py).
FLOOR = 2.2e-3

_STATE = "capo_alarm"  # the alarm's entry in trainer_state.json


@dataclass(frozen=True)
class Alarm:
    """When to raise an alarm; the defaults are what tuning chose (docs/monitor.md).

    signals   names of logged figures, positive ones that rise when a run goes wrong, each with its floor (0: none)
    combine   whether `any` of them is enough or `all` have to be above their baselines
    factor    how many times its baseline a figure has to exceed
    window    observations the baseline is the median of
    patience  observations in a row that have to be above
    warmup    observations a baseline needs before it counts
    cooldown  observations after an alarm in which none is raised again

    Raises `ValueError` for settings that can never or must always raise an alarm.
    """

    signals: Mapping[str, float] = field(default_factory=lambda: {"capo/kl/measured": FLOOR})
    combine: str = "any"
    factor: float = 5.0
    window: int = 10
    patience: int = 3
    warmup: int = 5
    cooldown: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.signals, Mapping) or not self.signals or not all(x >= 0 for x in self.signals.values()):
            raise ValueError(
                f"signals={self.signals!r}: give the names of logged figures with their floors, which are 0 or more, "
                'such as {"grad_norm": 0.0}'
            )
        if self.combine not in ("any", "all"):
            raise ValueError(f"combine={self.combine!r} is not one of any, all")
        if not self.factor > 1:
            raise ValueError(f"factor={self.factor}: must be above 1, or a figure that never changes raises an alarm")
        if not 1 <= self.warmup <= self.window:
            raise ValueError(f"warmup={self.warmup}, window={self.window}: need 1 <= warmup <= window")
        if not 1 <= self.patience <= max(1, self.window // 2):
            raise ValueError(
                f"patience={self.patience}, window={self.window}: need 1 <= patience <= window / 2, or what has risen "
                "is the baseline before it counts"
            )
        if self.cooldown < 0:
            raise ValueError(f"cooldown={self.cooldown}: must be 0 or more observations")


class Watch:
    """Applies an `Alarm` to figures as they come. A figure that is missing, NaN, zero or negative is no observation.

    >>> watch = Watch(Alarm(signals={"grad_norm": 0.0}, factor=2.0, window=4, warmup=2, patience=2))
    >>> [watch.update({"grad_norm": x}) for x in (1.0, 1.0, 3.0, 3.0, 1.0)]
    [None, None, (False, 3.0), (True, 3.0), (False, 0.5)]
    """

    def __init__(self, alarm: Alarm) -> None:
        self.alarm = alarm
        self.recent: dict[str, list[float]] = {name: [] for name in alarm.signals}
        self.streak = dict.fromkeys(alarm.signals, 0)
        self.quiet = 0  # observations left of the cool-down

    def update(self, figures: Mapping[str, Any]) -> tuple[bool, float] | None:
        """Whether this step's figures raise an alarm, and the ratio r that decides; None if none has a baseline yet."""
        ratios = self.ratios(figures)
        if not ratios:
            return None
        return self.decide(ratios), (max if self.alarm.combine == "any" else min)(ratios.values())

    def ratios(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The ratio r of each signal that is observed and has a baseline; the observation then becomes part of it."""
        found = {}
        for name, recent in self.recent.items():
            x = figures.get(name)
            if x is None or not x > 0:
                continue
            if len(recent) >= self.alarm.warmup:
                found[name] = x / max(median(recent), self.alarm.signals[name])
            recent.append(float(x))
            del recent[: -self.alarm.window]
        return found

    def decide(self, ratios: Mapping[str, float]) -> bool:
        """Whether these ratios raise an alarm."""
        for name, ratio in ratios.items():
            self.streak[name] = self.streak[name] + 1 if ratio > self.alarm.factor else 0
        if self.quiet:
            self.quiet -= 1
            return False
        if self.alarm.combine == "any":
            raised = any(self.streak[name] >= self.alarm.patience for name in ratios)
        else:
            raised = all(streak >= self.alarm.patience for streak in self.streak.values())
        if raised:
            self.quiet = self.alarm.cooldown
        return raised

    def state_dict(self) -> dict[str, Any]:
        """What to go on from, as JSON can say it."""
        return {
            "recent": {name: list(values) for name, values in self.recent.items()},
            "streak": dict(self.streak),
            "quiet": self.quiet,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; a signal it does not have starts afresh."""
        for name in self.alarm.signals:
            self.recent[name] = list(state["recent"].get(name, []))[-self.alarm.window :]
            self.streak[name] = state["streak"].get(name, 0)
        self.quiet = state["quiet"]


class AlarmCallback(TrainerCallback):
    """Reads the figures that any `Trainer` logs, applies an `Alarm`, and acts.

    warn        one line in the log for each alarm
    checkpoint  save one at this step
    lower_lr    multiply the learning rate by `lr_scale`, from now on and in resumed runs; the default is the ratio of
                the paper's standard regime to its aggressive one
    stop        end the training after this step

    Add it with `attach`, so that `capo/alarm` (0 or 1) and `capo/alarm/ratio` reach what `report_to` names. With
    `trainer.add_callback` it acts the same, but its figures only reach the trainer's history and later callbacks. Its
    state is part of `trainer_state.json`. A trainer can have one.

    Raises `ValueError` for unknown actions, or an `lr_scale` outside (0, 1).
    """

    def __init__(
        self, alarm: Alarm | None = None, actions: Iterable[str] = ("warn",), *, lr_scale: float = 0.2
    ) -> None:
        self.alarm, self.actions, self.lr_scale = alarm or Alarm(), tuple(actions), lr_scale
        if unknown := set(self.actions) - set(ACTIONS):
            raise ValueError(f"actions: {', '.join(sorted(unknown))} is not one of {', '.join(ACTIONS)}")
        if not 0 < lr_scale < 1:
            raise ValueError(f"lr_scale={lr_scale}: must be in (0, 1), a factor to multiply the learning rate by")
        self.watch = Watch(self.alarm)

    def attach(self, trainer: Any) -> None:
        """Add to a trainer ahead of its other callbacks: those that report see what this one has put into the logs."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch = Watch(self.alarm)
        if _STATE in state.stateful_callbacks:
            self.watch.load_state_dict(state.stateful_callbacks[_STATE])

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Figures of one process may differ from another's; all have to act alike.
        (figures,) = broadcast_object_list([{name: (logs or {}).get(name) for name in self.alarm.signals}])
        reading = self.watch.update(figures)
        # an entry of our own, not `ExportableState`: that is restored only on request, and by building a new callback
        state.stateful_callbacks[_STATE] = self.watch.state_dict()
        if reading is None or logs is None:
            return
        raised, ratio = reading
        added = {"capo/alarm": float(raised), "capo/alarm/ratio": ratio}
        logs |= added
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1] |= added
        if raised:
            self._act(state, control, figures, ratio, kwargs)

    def _act(self, state, control, figures, ratio, kwargs) -> None:
        if "warn" in self.actions and state.is_world_process_zero:
            logger.warning(
                "step %d: alarm, %s at %.3g times the baseline (%s)",
                state.global_step,
                f" {'or' if self.alarm.combine == 'any' else 'and'} ".join(self.alarm.signals),
                ratio,
                ", ".join(self.actions),
            )
        if "checkpoint" in self.actions:
            control.should_save = True
        if "lower_lr" in self.actions:
            scale_learning_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self.lr_scale)
        if "stop" in self.actions:
            control.should_training_stop = True


def scale_learning_rate(optimizer: Any, scheduler: Any, scale: float) -> None:
    """Multiply the learning rate of the coming step, and what the scheduler computes all later ones from.

    Both are part of a checkpoint, so a resumed run goes on with them.
    """
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * scale
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate may wrap it
    for each in (scheduler, *getattr(scheduler, "_schedulers", ())):
        for name in ("base_lrs", "_last_lr"):
            if hasattr(each, name):
                setattr(each, name, [lr * scale for lr in getattr(each, name)])
