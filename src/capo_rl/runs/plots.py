"""Pictures of runs, drawn from their metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
    "capo/kl/measured": {"title": "KL of each update (nats a token)", "yscale": "log"},
    "capo/scale": {"title": "share of the learning rate that was used", "ylim": (0, None)},
    "entropy": {"title": "entropy (nats a token)", "ylim": (0, None)},
    "completions/mean_length": {"title": "completion length (tokens)", "ylim": (0, None)},
    "grad_norm": {"title": "gradient norm before clipping", "yscale": "log"},
    "frac_reward_zero_std": {"title": "share of groups with one and the same reward", "ylim": (-0.02, 1.02)},
    "capo/rejection_rate": {"title": "share of tokens out of bounds", "ylim": (0, None)},
    "capo/batch/m_f": {"title": "m_F, of the policy", "yscale": "log"},
    "capo/batch/m_h": {"title": "m_H, of the objective", "yscale": "symlog"},
}
_COLUMNS = 3
_RANGE = 1e8  # of a logarithmic axis: what is smaller than the largest by more tells nobody anything


def draw_run(entries: Metrics, path: Path, title: str) -> None:
    """One run in one picture: what it logged of the panels, against the completions generated so far."""
    figure, panels = _panels(title, [entries])
    for name, axes in panels.items():
        _draw(axes, name, entries)
    _save(figure, panels, path)


def draw_panels(entries: Metrics, folder: Path, collapsed: int | None = None) -> dict[str, Path]:
    """The same as a picture a panel, without titles, each small enough for a phone; the step of a collapse is marked.

    Returns the SVG files in `folder` by the panel's name.
    """
    from matplotlib.figure import Figure

    at = next((_completions(entry) for entry in entries if entry["step"] == collapsed), None)
    drawn = {}
    for name in _logged([entries]):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        _draw(axes, name, entries)
        _look(axes, name, title="")
        if at is not None:
            axes.axvline(at, color=GREY, linestyle="--", linewidth=1.2)
        drawn[name] = Path(folder) / f"{name.replace('/', '-')}.svg"
        figure.savefig(drawn[name])
    return drawn


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


def _logged(runs: Iterable[Metrics]) -> list[str]:
    """The panels that have something to show, and the reward's."""
    logged = {name for entries in runs for entry in entries for name in PANELS if entry.get(name) is not None}
    return [name for name in PANELS if name in logged | {"reward"}]


def _panels(title: str, runs: Iterable[Metrics]) -> tuple[Any, dict[str, Axes]]:
    """A panel for the reward, and for what else any of the runs logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _logged(runs)
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(13, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = list(figure.subplots(rows, min(len(shown), _COLUMNS), squeeze=False).flat)
    for spare in axes[len(shown) :]:
        spare.remove()
    return figure, dict(zip(shown, axes, strict=False))


def _draw(axes: Axes, name: str, entries: Metrics) -> None:
    """What one run logged of a panel."""
    if name == "reward":
        _line(axes, entries, "reward", GREY, "each step", alpha=0.35)
        _line(axes, smooth(entries, "reward"), "reward", BLUE, "smoothed")
    elif name == "capo/rejection_rate":
        _line(axes, entries, "capo/rejection_rate/positive", GREEN, "A > 0", alpha=0.6)
        _line(axes, entries, "capo/rejection_rate/negative", ORANGE, "A < 0", alpha=0.6)
        _line(axes, entries, "capo/rejection_rate", BLUE, "all")
    elif name == "capo/kl/measured":
        _line(axes, entries, "capo/kl/predicted", ORANGE, "predicted from the last layer", alpha=0.8)
        _line(axes, entries, "capo/kl/measured", BLUE, "measured")
    elif name in ("capo/batch/m_f", "capo/batch/m_h"):
        symbol = name[-3:]
        _line(axes, entries, f"capo/token/{symbol}/q99", ORANGE, "tokens, 99 %", alpha=0.8)
        _line(axes, entries, f"capo/batch/{symbol}", BLUE, "batch")
        _line(axes, entries, f"capo/batch_accepted/{symbol}", GREEN, "batch, accepted tokens", alpha=0.8)
    else:
        _line(axes, entries, name, BLUE, "each step")


def _save(figure: Any, panels: dict[str, Axes], path: Path) -> None:
    for name, axes in panels.items():
        _look(axes, name, PANELS[name]["title"])
    figure.savefig(path, dpi=110)


def _look(axes: Axes, name: str, title: str) -> None:
    look = dict(PANELS[name])
    scale = look.pop("yscale", None)
    if scale == "log":
        _logarithmic(axes)
    elif scale == "symlog":
        axes.set_yscale("symlog", linthresh=1e-4)
    axes.set(xlabel="completions", **look | {"title": title})
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if set(axes.get_legend_handles_labels()[1]) - {"each step"}:
        axes.legend(frameon=False, fontsize=8)


def _logarithmic(axes: Axes) -> None:
    """Make the axis logarithmic; what it can't show, zeros above all, is a mark on its lower edge and no plunge."""
    lines = [(line, np.array(line.get_xydata(), dtype=float)) for line in axes.get_lines()]
    positive = [y for _, points in lines for y in points[:, 1] if y > 0]
    if not positive:
        return
    least = max(positive) / _RANGE
    axes.set_yscale("log")
    told = "zero, or off the scale"
    for line, points in lines:
        shown = points[:, 1] >= least
        line.set_data(points[shown, 0], points[shown, 1])
        if not shown.all():
            below = points[~shown, 0]
            look: dict[str, Any] = {"color": line.get_color(), "marker": 6, "markersize": 4, "linestyle": ""}
            axes.plot(below, 0 * below, label=told, transform=axes.get_xaxis_transform(), clip_on=False, **look)
            told = "_" + told
    axes.relim()
    axes.autoscale_view()


def _completions(entry: Mapping[str, Any]) -> float:
    return entry.get("capo/completions", entry["step"])


def _line(axes: Axes, entries: Metrics, name: str, colour: str, label: str, alpha: float = 1.0) -> None:
    """One figure at the steps that have it; NaN and infinities, which a metrics file has as null, are none."""
    points = [
        (_completions(entry), entry[name])
        for entry in entries
        if entry.get(name) is not None and math.isfinite(entry[name])
    ]
    if points:
        marker = "." if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), color=colour, alpha=alpha, label=label, linewidth=1.4, marker=marker)
