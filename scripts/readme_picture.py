"""Draw docs/collapse.png, the README's picture, from results/pretrained (docs/pretrained.md).

python scripts/readme_picture.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capo_rl.statistics import smooth
from capo_rl.testbed.bench import read_results

ROOT = Path(__file__).parents[1]
ARMS = {
    "default": ("capo-rl, as it comes", "#0b6bcb"),
    "GRPO (A)": ("GRPO", "#12967a"),
    "CAPO": ("CAPO's mask, as published", "#d9601a"),
}


def draw(out: Path) -> None:
    """Every seed a thin line, their mean a thick one."""
    results = read_results(ROOT / "results" / "pretrained")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, (name, colour) in ARMS.items():
        runs = [run["curves"] for run in results if run["arm"] == arm]
        curves = np.array([smooth(run["reward"]) for run in runs])
        x = runs[0]["capo/completions"]
        axes.plot(x, curves.T, color=colour, linewidth=0.7, alpha=0.45)
        axes.plot(x, curves.mean(0), color=colour, linewidth=2.4, label=f"{name} ({len(runs)} runs)")
    axes.set(xlabel="completions", ylabel="accuracy", ylim=(-0.02, 1.02), xlim=(0, None))
    axes.set_title("SmolLM2-135M at a learning rate of 1e-3, 96 completions a step", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.68, 0.29), fontsize=10)
    figure.savefig(out, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    draw(ROOT / "docs" / "collapse.png")
