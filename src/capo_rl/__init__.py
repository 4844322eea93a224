"""Curvature-Aware Policy Optimization (CAPO, arXiv 2510.00819): mask the tokens that would break the run.

Read the package in the paper's order: `last_layer`, `step`, `shifts`, `selection`, `planner`, then the adapter `trl`.
A loop of one's own takes `Planner` and `TrustRegion` (docs/own_loop.md).
`reference` is the dense oracle the fast forms are proved against.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capo_rl.adapt import AdaptThresholds as AdaptThresholds
    from capo_rl.alarm import Alarm as Alarm
    from capo_rl.alarm import AlarmCallback as AlarmCallback
    from capo_rl.config import CAPOConfig as CAPOConfig
    from capo_rl.head import Head as Head
    from capo_rl.monitor import MonitorCallback as MonitorCallback
    from capo_rl.planner import MicroBatch as MicroBatch
    from capo_rl.planner import Planner as Planner
    from capo_rl.rewards import accuracy_reward as accuracy_reward
    from capo_rl.selection import Thresholds as Thresholds
    from capo_rl.selection import select as select
    from capo_rl.shifts import Shifts as Shifts
    from capo_rl.shifts import subset_shifts as subset_shifts
    from capo_rl.shifts import token_shifts as token_shifts
    from capo_rl.step import AdamStep as AdamStep
    from capo_rl.step import SGDStep as SGDStep
    from capo_rl.trl import CAPOTrainer as CAPOTrainer
    from capo_rl.trust_region import TrustRegion as TrustRegion

__version__ = "0.1.0"

# Names load on first use, so that `capo --help` and the curvature model don't wait for TRL.
_HOMES = {
    "SGDStep": "step",
    "AdamStep": "step",
    "Shifts": "shifts",
    "token_shifts": "shifts",
    "subset_shifts": "shifts",
    "Thresholds": "selection",
    "select": "selection",
    "Head": "head",
    "MicroBatch": "planner",
    "Planner": "planner",
    "TrustRegion": "trust_region",
    "CAPOConfig": "config",
    "CAPOTrainer": "trl",
    "MonitorCallback": "monitor",
    "Alarm": "alarm",
    "AlarmCallback": "alarm",
    "AdaptThresholds": "adapt",
    "accuracy_reward": "rewards",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
