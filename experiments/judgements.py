"""How wrong the trust region's control is about each step, with and without a judgement of that step (judgements.yaml).

    capo bench experiments/judgements.yaml && python experiments/judgements.py [results/judgements]

The surprise of a step is its KL over what the control expected of it, κ_t / κ̄: with κ_t = KL_t (f_t / lr_t)² and κ̄ the
control's moving mean of those before it. A judgement f that knows how long this step may be makes surprises smaller.
Printed for each arm, and written to tables/surprises.json: accuracy at the end of each seed, the standard deviation of
log surprises and their 98 % quantile over all steps but a run's first 20, and the updates above twice the budget
(measured on all completions).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from capo_rl.planning.trust_region import MEMORY
from capo_rl.runs.records import write_json
from capo_rl.testbed.arms import final_accuracy
from capo_rl.testbed.bench import read_results

RESULTS = Path(__file__).parent.parent / "results" / "judgements"
BUDGET = 5e-3


def learning_rates(run: dict[str, Any]) -> list[float]:
    """That of each step as it was taken; results that lack it have a cosine schedule with a warm-up."""
    curves, settings = run["curves"], run["settings"]
    if "capo/learning_rate" in curves:
        return [lr or 0.0 for lr in curves["capo/learning_rate"]]
    steps = len(curves["step"])
    warmup = math.ceil(settings["warmup_steps"] * steps)
    shares = [
        step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for step in range(steps)
    ]
    scales = [scale or 0.0 for scale in curves["capo/scale"]]
    return [settings["learning_rate"] * share * scale for share, scale in zip(shares, scales, strict=True)]


def surprises(run: dict[str, Any]) -> list[float]:
    """log κ_t / κ̄ of each step that has one."""
    curves = run["curves"]
    mean = weight = 0.0
    found = []
    for t, lr in enumerate(learning_rates(run)):
        kl, judged = (curves[name][t] for name in ("capo/kl/proposed", "capo/share"))
        if not kl or not lr or not curves["grad_norm"][t]:
            continue  # no step, or one of momentum alone, which the control does not learn from
        kappa = kl * ((1.0 if judged is None else judged) / lr) ** 2
        if weight and t >= 20:
            found.append(math.log(kappa * weight / mean))
        mean, weight = MEMORY * mean + kappa, MEMORY * weight + 1
    return found


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    arms: dict[str, list[dict[str, Any]]] = {}
    for result in read_results(folder):
        arms.setdefault(result["arm"], []).append(result)
    rows = []
    for name, runs in arms.items():
        logs = np.concatenate([surprises(run) for run in runs])
        whole = [kl for run in runs for kl in run["curves"]["capo/kl/whole"] if kl is not None]
        row = {
            "judgement": name,
            "accuracies": [final_accuracy(run) for run in runs],
            "log surprise, s.d.": float(logs.std()),
            "98 % quantile": float(np.exp(np.quantile(logs, 0.98))),
            "above 2 B": float(np.mean([kl > 2 * BUDGET for kl in whole])),
        }
        rows.append(row)
        print(json.dumps(row))
    (folder / "tables").mkdir(exist_ok=True)
    write_json(folder / "tables" / "surprises.json", {"arms": rows})


if __name__ == "__main__":
    main()
