"""What is known of a step's KL before it is taken: how sharp the steps of committed runs were, regressed on it.

    python experiments/sharpness.py [FOLDER ...]        # by default runs that a control steered by each step's KL,
                                                        # and then the table goes into results/sharpness.json too

The sharpness κ of a step is the KL its update would have had at the schedule's whole learning rate. A control that is
to bound this step's KL has to predict log κ. The table says how much of its variance each set of predictors explains
(R² of a least squares fit over all steps but a run's first 20), what is left (standard deviation), and the 98 %
quantile of that: the factor by which one step in fifty would pass a bound. Predictors: the moving mean of past log κ
(memory 0.8), the last layer's predicted KL and the gradient's norm (each with its own moving mean), and whether there
is a gradient at all.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from capo_rl.testbed.bench import read_results

RESULTS = Path(__file__).parent.parent / "results"
FOLDERS = (RESULTS / "main", RESULTS / "budget")
STEERED = "next learning rate"  # in the names of their arms
SETS = {
    "the last steps' κ": ["past"],
    "and the last layer's prediction": ["past", "predicted", "past predicted"],
    "and the gradient's norm": ["past", "norm", "past norm", "none"],
    "and both": ["past", "predicted", "past predicted", "norm", "past norm", "none"],
}


def moving(values: np.ndarray, memory: float = 0.8) -> np.ndarray:
    """The moving mean of what came before each value."""
    before, mean = np.empty_like(values), values[0]
    for i, value in enumerate(values):
        before[i], mean = mean, memory * mean + (1 - memory) * value
    return before


def steps(curves: dict[str, Any]) -> dict[str, np.ndarray]:
    """log κ and its predictors at the steps of one run that have them, after the first 20."""

    def column(name: str) -> np.ndarray:
        return np.array([math.nan if value is None else value for value in curves[name]], dtype=float)

    scale, norm = column("capo/kl/fraction"), column("grad_norm")
    planned = np.r_[1.0, scale[:-1]]  # these runs planned a step at the last one's scale
    with np.errstate(all="ignore"):
        sharpness = np.log(column("capo/kl/measured") / scale**2)
        predicted = np.log(column("capo/kl/predicted") / planned**2)
    there = np.isfinite(sharpness) & np.isfinite(predicted)
    sharpness, predicted, norm = sharpness[there], predicted[there], norm[there]
    size = np.log(np.minimum(norm, 1.0) + 1e-3)  # as clipping leaves it
    found = {
        "sharpness": sharpness,
        "past": moving(sharpness),
        "predicted": predicted,
        "past predicted": moving(predicted),
        "norm": size,
        "past norm": moving(size),
        "none": (norm < 1e-6).astype(float),
    }
    return {name: values[20:] for name, values in found.items()}


def main(folders: list[str]) -> None:
    runs = [run for folder in folders or FOLDERS for run in read_results(folder) if STEERED in run["arm"]]
    each = [steps(run["curves"]) for run in runs]
    data = {name: np.concatenate([run[name] for run in each]) for name in each[0]}
    y = data["sharpness"]
    found: dict[str, Any] = {"runs": len(runs), "steps": len(y), "standard deviation": float(y.std()), "known": {}}
    print(f"{len(runs)} runs, {len(y)} steps, standard deviation of log κ {y.std():.2f}\n")
    print("| known before the step | R² | left, log | 98 % quantile of what is left |\n|---|---|---|---|")
    for name, predictors in SETS.items():
        x = np.column_stack([np.ones(len(y)), *(data[predictor] for predictor in predictors)])
        left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
        r2 = 1 - left.var() / y.var()
        factor = math.exp(np.quantile(left, 0.98))
        print(f"| {name} | {r2:.3f} | {left.std():.2f} | × {factor:.0f} |")
        found["known"][name] = {"r2": float(r2), "left": float(left.std()), "factor": factor}
    if not folders:
        (RESULTS / "sharpness.json").write_text(
            json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
