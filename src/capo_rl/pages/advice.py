"""What `capo doctor` would change of a run's settings, and what of them it knows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median
from typing import Any

from capo_rl.pages.run_log import Log, Series, as_number
from capo_rl.planning.defaults import KL_BUDGET

LEARNING_RATE = ("learning_rate", "actor/lr")
_STARTED = 50  # steps after which the slow start is over for certain


@dataclass(frozen=True)
class Change:
    """A field of `CAPOConfig` to give another value; None: leave it out, or it is not there."""

    name: str
    before: Any
    after: Any
    why: str


def mode_of(log: Log) -> str | None:
    """CAPO's mode; None for a trainer that is not CAPO's, "" for one whose settings are not on record."""
    if log.settings is not None:
        return str(log.settings.get("capo_mode", "trust_region"))
    names = {name for entry in log.entries for name in entry}
    if names & {"capo/kl/proposed", "capo/scale"}:
        return ""
    return "monitor" if any(name.startswith("capo/") for name in names) else None


def budget_of(log: Log) -> float | None:
    """The KL budget that a run's updates were held to; None where there was none, or it is not on record."""
    given = as_number((log.settings or {}).get("capo_kl_budget"))
    return KL_BUDGET if given is None and mode_of(log) == "trust_region" else given


def changes_for(log: Log, dead: bool, kl: Series) -> list[Change]:
    """What to try next, as a recipe's fields: of a run that lives only what the trust region itself suggests."""
    mode, settings = mode_of(log), log.settings or {}
    if mode != "trust_region":
        if not dead or (kl and max(x for _, x in kl) < KL_BUDGET / 10):
            return []
        if mode is None:
            why = "CAPOConfig and CAPOTrainer in place of GRPOConfig and GRPOTrainer; keep the learning rate"
        else:
            why = "no token left out, no update further than capo_kl_budget (5e-3); keep the learning rate"
        switched = [Change("capo_mode", mode or None, "trust_region", why)]
        for name in ("capo_soft", "capo_penalty"):
            if settings.get(name):
                switched.append(Change(name, settings[name], None, "takes the mask's place, and there is none"))
        if (control := settings.get("capo_kl_control", "learning_rate")) != "learning_rate":
            switched.append(Change("capo_kl_control", control, "learning_rate", "the mean is held too, not the worst"))
        return switched
    if dead:
        changes = []
        if (control := settings.get("capo_kl_control", "learning_rate")) != "learning_rate":
            changes.append(Change("capo_kl_control", control, "learning_rate", "the mean is held too, not the worst"))
        if (sample := as_number(settings.get("capo_kl_sample", 0.25)) or 0.25) < 1:
            changes.append(Change("capo_kl_sample", sample, 1.0, "what a sample does not see is not held"))
        budget = budget_of(log) or KL_BUDGET
        changes.append(Change("capo_kl_budget", budget, _round(budget / 5), "shorter steps"))
        return changes
    rates, scales = log.series(LEARNING_RATE), [x for _, x in log.series(["capo/scale"])]
    late = scales[len(scales) // 2 :]
    asked = as_number(settings.get("learning_rate")) or max((x for _, x in rates), default=None)
    if len(scales) >= _STARTED and median(late) > 0.5 and asked:
        why = f"the trust region left {median(late):.0%} of the rate, so the rate is what holds it back"
        return [Change("learning_rate", asked, _round(3 * asked), why)]
    return []


def _round(x: float) -> float:
    return float(f"{x:.1e}")


def as_yaml(value: Any) -> str:
    """A setting as a recipe has it."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, bool) else str(value)
