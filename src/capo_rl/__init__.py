"""Curvature-Aware Policy Optimization (CAPO, arXiv 2510.00819): mask the tokens that would break the run.

Read it room by room, in the order in which they may use one another (docs/architecture.md): `curvature` is the paper's
method, `planning` one optimizer step, `trainers` what makes runs of it. A loop of one's own takes `Planner` and
`TrustRegion` (docs/own_loop.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capo_rl.curvature.head import Head as Head
    from capo_rl.curvature.selection import Thresholds as Thresholds
    from capo_rl.curvature.selection import select as select
    from capo_rl.curvature.shifts import Shifts as Shifts
    from capo_rl.curvature.shifts import subset_shifts as subset_shifts
    from capo_rl.curvature.shifts import token_shifts as token_shifts
    from capo_rl.curvature.step import AdamStep as AdamStep
    from capo_rl.curvature.step import SGDStep as SGDStep
    from capo_rl.planning.micro_batch import MicroBatch as MicroBatch
    from capo_rl.planning.planner import Planner as Planner
    from capo_rl.planning.trust_region import TrustRegion as TrustRegion
    from capo_rl.rewards.accuracy import accuracy_reward as accuracy_reward
    from capo_rl.rewards.constraints import constraint_reward as constraint_reward
    from capo_rl.settings.config import CAPOConfig as CAPOConfig
    from capo_rl.thresholds.adapt import AdaptThresholds as AdaptThresholds
    from capo_rl.trainers.alarm import Alarm as Alarm
    from capo_rl.trainers.alarm import AlarmCallback as AlarmCallback
    from capo_rl.trainers.monitor import MonitorCallback as MonitorCallback
    from capo_rl.trainers.trl import CAPOTrainer as CAPOTrainer

__version__ = "0.1.0"

# Names load on first use, so that `capo --help` and the curvature model don't wait for TRL.
_HOMES = {
    "Head": "curvature.head",
    "SGDStep": "curvature.step",
    "AdamStep": "curvature.step",
    "Shifts": "curvature.shifts",
    "token_shifts": "curvature.shifts",
    "subset_shifts": "curvature.shifts",
    "Thresholds": "curvature.selection",
    "select": "curvature.selection",
    "MicroBatch": "planning.micro_batch",
    "Planner": "planning.planner",
    "TrustRegion": "planning.trust_region",
    "AdaptThresholds": "thresholds.adapt",
    "accuracy_reward": "rewards.accuracy",
    "constraint_reward": "rewards.constraints",
    "CAPOConfig": "settings.config",
    "CAPOTrainer": "trainers.trl",
    "MonitorCallback": "trainers.monitor",
    "Alarm": "trainers.alarm",
    "AlarmCallback": "trainers.alarm",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
