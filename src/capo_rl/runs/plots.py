"""Pictures of runs, drawn from their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_rl import statistics
from capo_rl.runs.records import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")

# What each panel shows, and how: its title and its axis.
PANELS: dict[str, dict[str, Any]] = {
    "reward": {"title": "mean reward", "ylim": (-0.02, 1.02)},
    "capo/rejection_rate": {"title": "share of tokens out of bounds", "ylim": (0, None)},
    "capo/kl/measured": {"title": "KL of each update (nats a token)", "yscale": "log"},
    "capo/batch/m_f": {"title": "m_F, of the policy", "yscale": "log"},
    "capo/batch/m_h": {"title": "m_H, of the objective", "yscale": "symlog"},
    "grad_norm": {"title": "gradient norm before clipping", "yscale": "log"},
}


def draw_run(entries: Metrics, path: Path, title: str) -> None:
    """One run: reward, rejections, KL, m_F, m_H and gradient norm against the completions generated so far, as far as
    they were logged."""
    figure, panels = _panels(title, [entries])
    axes = panels.get("reward")
    _line(axes, entries, "reward", GREY, "each step", alpha=0.35)
    _line(axes, smooth(entries, "reward"), "reward", BLUE, "smoothed")

    axes = panels.get("capo/rejection_rate")
    _line(axes, entries, "capo/rejection_rate/positive", GREEN, "A > 0", alpha=0.6)
    _line(axes, entries, "capo/rejection_rate/negative", ORANGE, "A < 0", alpha=0.6)
    _line(axes, entries, "capo/rejection_rate", BLUE, "all")

    axes = panels.get("capo/kl/measured")
    _line(axes, entries, "capo/kl/predicted", ORANGE, "predicted from the last layer", alpha=0.8)
    _line(axes, entries, "capo/kl/measured", BLUE, "measured")

    for symbol in ("m_f", "m_h"):
        axes = panels.get(f"capo/batch/{symbol}")
        _line(axes, entries, f"capo/token/{symbol}/q99", ORANGE, "tokens, 99 %", alpha=0.8)
        _line(axes, entries, f"capo/batch/{symbol}", BLUE, "batch")
        _line(axes, entries, f"capo/batch_accepted/{symbol}", GREEN, "batch, accepted tokens", alpha=0.8)

    _line(panels.get("grad_norm"), entries, "grad_norm", BLUE, "each step")
    _save(figure, panels, path)


def draw_comparison(runs: Mapping[str, Metrics], path: Path, title: str) -> None:
    """Several runs, by name, in the same panels."""
    figure, panels = _panels(title, runs.values())
    for at, (label, entries) in enumerate(runs.items()):
        for name, axes in panels.items():
            shown = smooth(entries, name) if name == "reward" else entries
            _line(axes, shown, name, PALETTE[at % len(PALETTE)], label, alpha=0.85)
    _save(figure, panels, path)


def smooth(entries: Metrics, name: str, weight: float = 0.9) -> Metrics:
    """The entries with an exponential moving average of one figure, unbiased at the start.

    >>> [entry["reward"] for entry in smooth([{"reward": 1.0}, {"reward": 1.0}], "reward")]
    [1.0, 1.0]
    """
    measured = [entry for entry in entries if entry.get(name) is not None]
    averages = statistics.smooth([entry[name] for entry in measured], weight)
    return [entry | {name: float(average)} for entry, average in zip(measured, averages, strict=True)]


def _panels(title: str, runs: Iterable[Metrics]) -> tuple[Any, dict[str, Axes]]:
    """A panel for the reward, and for what else any of the runs logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = {name for entries in runs for entry in entries for name in PANELS if entry.get(name) is not None}
    shown = [name for name in PANELS if name in logged | {"reward"}]
    rows = 1 if len(shown) <= 3 else 2
    figure = Figure(figsize=(13, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = list(figure.subplots(rows, -(-len(shown) // rows), squeeze=False).flat)
    for spare in axes[len(shown) :]:
        spare.remove()
    return figure, dict(zip(shown, axes, strict=False))


def _save(figure: Any, panels: dict[str, Axes], path: Path) -> None:
    for name, axes in panels.items():
        look = dict(PANELS[name])
        if look.pop("yscale", None) == "log":
            axes.set_yscale("log")
        elif PANELS[name].get("yscale") == "symlog":
            axes.set_yscale("symlog", linthresh=1e-4)
        axes.set(xlabel="completions", **look)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _line(axes: Axes | None, entries: Metrics, name: str, colour: str, label: str, alpha: float = 1.0) -> None:
    points = [
        (entry.get("capo/completions", entry["step"]), entry[name]) for entry in entries if entry.get(name) is not None
    ]
    if axes is not None and points:
        axes.plot(*zip(*points, strict=True), color=colour, alpha=alpha, label=label, linewidth=1.4)
