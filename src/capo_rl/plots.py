"""Pictures of a run, drawn from its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from capo_rl.records import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def draw_curves(entries: Metrics, path: Path, title: str) -> None:
    """Reward, rejections, KL, m_F, m_H and gradient norm of a run against the completions generated so far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    reward, rejected, kl, policy, objective, norm = figure.subplots(2, 3).flat
    figure.suptitle(title)

    _line(reward, entries, "reward", GREY, "each step", alpha=0.35)
    _line(reward, _smooth(entries, "reward"), "reward", BLUE, "smoothed")
    reward.set(title="mean reward", ylim=(-0.02, 1.02))

    _line(rejected, entries, "capo/rejection_rate/positive", GREEN, "A > 0", alpha=0.6)
    _line(rejected, entries, "capo/rejection_rate/negative", ORANGE, "A < 0", alpha=0.6)
    _line(rejected, entries, "capo/rejection_rate", BLUE, "all")
    rejected.set(title="share of tokens out of bounds", ylim=(0, None))

    _line(kl, entries, "capo/kl/measured", BLUE, "measured")
    _line(kl, entries, "capo/kl/predicted", ORANGE, "predicted from the last layer", alpha=0.8)
    kl.set(title="KL of each update (nats a token)", yscale="log")

    for axes, symbol, name in (
        (policy, "m_f", "m_F, of the policy"),
        (objective, "m_h", "m_H, of the objective"),
    ):
        _line(axes, entries, f"capo/token/{symbol}/q99", ORANGE, "tokens, 99 %", alpha=0.8)
        _line(axes, entries, f"capo/batch/{symbol}", BLUE, "batch")
        _line(axes, entries, f"capo/batch_accepted/{symbol}", GREEN, "batch, accepted tokens", alpha=0.8)
        axes.set(title=name)
    policy.set_yscale("log")
    objective.set_yscale("symlog", linthresh=1e-4)

    _line(norm, entries, "grad_norm", BLUE, "before clipping")
    norm.set(title="gradient norm", yscale="log")

    for axes in (reward, rejected, kl, policy, objective, norm):
        axes.set_xlabel("completions")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _line(axes: Axes, entries: Metrics, name: str, colour: str, label: str, alpha: float = 1.0) -> None:
    points = [
        (entry.get("capo/completions", entry["step"]), entry[name]) for entry in entries if entry.get(name) is not None
    ]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, alpha=alpha, label=label, linewidth=1.4)


def _smooth(entries: Metrics, name: str, weight: float = 0.9) -> Metrics:
    """The entries with an exponential moving average of one figure, unbiased at the start."""
    total, mass, smoothed = 0.0, 0.0, []
    for entry in entries:
        if entry.get(name) is not None:
            total = weight * total + (1 - weight) * entry[name]
            mass = weight * mass + (1 - weight)
            smoothed.append(entry | {name: total / mass})
    return smoothed
