"""The arms of a bench's results: their names in the order that pictures show them, and what is read of their runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from capo_rl.statistics import collapsed, reach, smooth

# The results of an arm, one for each seed; and of all arms by name.
Runs = list[dict[str, Any]]
Arms = dict[str, Runs]

# The accuracy that completions are counted to, fixed before methods were compared (docs/testbed.md).
TARGET = 0.9

STANDARD, TUNED = "GRPO standard", "GRPO tuned"
MAIN = (STANDARD, TUNED, "GRPO (A)", "Dr.GRPO (A)", "REINFORCE (A)", "CAPO")
STEP_MODELS = ("CAPO", "CAPO, SGD", "Dr.CAPO", "Dr.CAPO, SGD", "ReinCAPO", "ReinCAPO, SGD")
LENGTHS = (
    "default",
    "shorten",
    "CAPO with the share",
    "CAPO, the paper's bounds, with the share",
    "CAPO, the paper's bounds",
    "CAPO",
    "GRPO (A)",
    TUNED,
    STANDARD,
)
BUDGETS = (
    "GRPO (A)",
    TUNED,
    "GRPO (A), KL budget 3e-4, next learning rate",
    "GRPO (A), KL budget 1e-4",
    "GRPO (A), KL budget 3e-4",
    "GRPO (A), KL budget 1e-4, predicted",
    "CAPO, KL budget 1e-4",
)
RIVALS = ("random", "low_probability", "score_norm", "stapo", "policy_shift")
RIVAL_ARMS = ("REINFORCE (A)", "ReinCAPO", "ReinCAPO, expected Fisher", *(f"rival: {name}" for name in RIVALS))
REUSE = (
    "REINFORCE (A), 5 uses",
    "ReinCAPO, 5 uses",
    *(f"5 uses, rival: {name}" for name in ("random", "policy_shift", "total_variation")),
)


def finite(values: Sequence[float | None]) -> list[float]:
    """The steps' values, without those that have none."""
    return [value for value in values if value is not None]


def pairs_of(run: dict[str, Any], one: str, other: str) -> list[tuple[float, float]]:
    """Two figures at the steps that have both."""
    both = zip(run["curves"][one], run["curves"][other], strict=True)
    return [(x, y) for x, y in both if x is not None and y is not None]


def final_accuracy(run: dict[str, Any]) -> float:
    """The smoothed accuracy in training at the end."""
    return float(smooth(run["curves"]["reward"])[-1])


def collapse(run: dict[str, Any]) -> int | None:
    """The step at which a run collapsed, None if it lived."""
    return collapsed(run["curves"]["reward"])


def reached(runs: Runs) -> tuple[list[float | None], list[float]]:
    """The completions at which each run reached the target, and its budget."""
    curves = [run["curves"] for run in runs]
    return (
        [reach(each["capo/completions"], each["reward"], TARGET) for each in curves],
        [each["capo/completions"][-1] for each in curves],
    )


def by_rate(arms: Arms) -> dict[str, dict[float, Runs]]:
    """The runs of each method at each learning rate, of arms named `METHOD, lr RATE`."""
    methods: dict[str, dict[float, Runs]] = {}
    for name, runs in arms.items():
        if found := re.fullmatch(r"(.+), lr ([\d.e+-]+)", name):
            methods.setdefault(found[1], {})[float(found[2])] = runs
    return {method: dict(sorted(rates.items())) for method, rates in methods.items() if len(rates) > 1}


def usable_range(final: dict[float, list[float]]) -> tuple[float, float] | None:
    """The widest run of neighbouring learning rates at which every seed ends within 5 % of the method's best mean.

    `final` has the seeds' accuracies at each rate, ascending. None if it holds at no rate.

    >>> usable_range({1e-3: [0.9, 0.9], 1e-2: [0.88, 0.92], 1e-1: [0.9, 0.2]})
    (0.001, 0.01)
    """
    best = max(float(np.mean(each)) for each in final.values())
    widest: tuple[float, float] | None = None
    first: float | None = None
    for rate, each in final.items():
        if min(each) < 0.95 * best:
            first = None
            continue
        first = rate if first is None else first
        if widest is None or rate / first > widest[1] / widest[0]:
            widest = first, rate
    return widest
