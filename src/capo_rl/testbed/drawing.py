"""What the figures of a bench share: their form, curves with a band over seeds, and bars of how arms ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capo_rl.runs.plots import PALETTE
from capo_rl.statistics import smooth
from capo_rl.testbed.arms import Arms, final_accuracy


def new_figure(columns: int, title: str) -> tuple[Any, list[Any]]:
    """An empty figure, and its axes beside one another."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    figure.suptitle(title, fontsize=11)
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def save(figure: Any, path: Path) -> Path:
    """Write a figure as SVG, with the look that all have."""
    import matplotlib

    for axes in figure.axes:
        _leave_out_what_a_logarithm_has_not(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    path = path.with_suffix(".svg")
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same picture is the same file
        figure.savefig(path, metadata={"Date": None, "Title": figure.get_suptitle()})
    return path


def _leave_out_what_a_logarithm_has_not(axes: Any) -> None:
    """A curve has a gap on a logarithmic axis where it is zero, and no plunge to the edge."""
    logarithmic = np.array([axes.get_xscale() == "log", axes.get_yscale() == "log"])
    for line in axes.get_lines():
        points = np.array(line.get_xydata(), dtype=float)
        shown = ((points > 0) | ~logarithmic).all(axis=1)
        line.set_data(*np.where(shown[:, None], points, np.nan).T)


def series(run: dict[str, Any], column: str, x: str, smoothed: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """One column of a run against another, smoothed if asked for."""
    source = run["test"] if column in ("accuracy", "perplexity") else run["curves"]
    y = np.array([np.nan if value is None else value for value in source[column]], dtype=float)
    return np.array(source[x], dtype=float), smooth(source[column]) if smoothed else y


def band(
    axes: Any, arms: Arms, names: Sequence[str], column: str, x: str = "capo/completions", smoothed: bool = False
) -> None:
    """Mean and standard error over seeds of one column, for each of the arms."""
    for at, name in enumerate(name for name in names if name in arms):
        curves = [series(run, column, x, smoothed) for run in arms[name]]
        length = min(len(y) for _, y in curves)
        xs = np.mean([x[:length] for x, _ in curves], axis=0)
        ys = np.array([y[:length] for _, y in curves])
        seeds = np.isfinite(ys).sum(0)
        mean = np.where(seeds > 0, np.nansum(ys, 0) / np.maximum(seeds, 1), np.nan)
        deviation = np.sqrt(np.nansum((ys - mean) ** 2, 0) / np.maximum(seeds - 1, 1))
        error = np.where(seeds > 1, deviation / np.sqrt(np.maximum(seeds, 1)), 0)
        colour = PALETTE[at % len(PALETTE)]
        axes.plot(xs, mean, color=colour, label=name, linewidth=1.3)
        axes.fill_between(xs, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel({"capo/completions": "completions", "capo/accepted_tokens": "accepted tokens"}[x])


def accuracy(
    title: str, names: Sequence[str], x: str = "capo/completions", logarithmic: bool = False
) -> Callable[[Arms, Path], Path | None]:
    """A figure of accuracy in training and on the held-out set."""

    def draw(arms: Arms, path: Path) -> Path | None:
        if not any(name in arms for name in names):
            return None
        tested = any(run["test"]["accuracy"] for name in names for run in arms.get(name, []))
        columns = 2 if x == "capo/completions" and tested else 1
        figure, axes = new_figure(columns, title)
        band(axes[0], arms, names, "reward", x, smoothed=True)
        axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
        if columns == 2:
            band(axes[1], arms, names, "accuracy")
            language = any("perplexity" in run["test"] for name in names for run in arms.get(name, []))
            axes[1].set(ylabel=f"TEST: {'held-out words' if language else '8 terms in place of 5'}", ylim=(-0.02, 1.02))
        if logarithmic:
            for each in axes:
                each.set_xscale("log")
        return save(figure, path)

    return draw


def bars(
    title: str, chosen: Callable[[str], bool], other: str, figure_of: Callable[[dict[str, Any]], float], scale: str
) -> Callable[[Arms, Path], Path | None]:
    """A figure with how each of the chosen arms ended, and beside it another figure of the run."""

    def draw(arms: Arms, path: Path) -> Path | None:
        names = [name for name in arms if chosen(name)]
        if not names:
            return None
        figure, axes = new_figure(2, title)
        figure.set_size_inches(11, 0.9 + 0.26 * len(names))
        where = range(len(names))
        for each, of, label in (
            (axes[0], final_accuracy, "accuracy at the end (each seed, and the mean)"),
            (axes[1], figure_of, other),
        ):
            values = [[of(run) for run in arms[name]] for name in names]
            each.barh(where, [np.mean(value) for value in values], color=PALETTE[0], alpha=0.6)
            for y, value in zip(where, values, strict=True):
                each.plot(value, [y] * len(value), ".", color="black", markersize=4)
            each.set(xlabel=label, yticks=where, ylim=(len(names) - 0.5, -0.5))
        axes[0].set(xlim=(0, 1.02))
        axes[0].set_yticklabels(names, fontsize=7)
        axes[1].set(xscale=scale)
        axes[1].set_yticklabels([])
        return save(figure, path)

    return draw
