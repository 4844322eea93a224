"""The paper's figures and tables, drawn from the results of `capo bench` without training anything.

Each figure is a function of the results by arm; `FIGURES` and `TABLES` name them as the paper does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capo_rl.planning.defaults import KL_BUDGET
from capo_rl.runs.plots import PALETTE
from capo_rl.statistics import (
    CompletionsToTarget,
    bootstrap_interval,
    collapsed,
    completions_to_target,
    interval_to_target,
    iqm,
    mean_and_error,
    reach,
    smooth,
    spearman,
)
from capo_rl.testbed.bench import read_results

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


def draw_results(folder: str | Path) -> list[Path]:
    """Draw every figure and table whose arms are there into `figures/` and `tables/` of a bench's results.

    Raises `BenchError` if there are no results.
    """
    folder = Path(folder)
    arms: Arms = {}
    for result in read_results(folder):
        arms.setdefault(result["arm"], []).append(result)
    drawn = []
    for kind, things in (("figures", FIGURES), ("tables", TABLES)):
        (folder / kind).mkdir(exist_ok=True)
        for name, thing in things.items():
            if (path := thing(arms, folder / kind / name)) is not None:
                drawn.append(path)
    return drawn


# ---- figures ------------------------------------------------------------------------------------------------------


def _figure(columns: int, title: str) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    figure.suptitle(title, fontsize=11)
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _save(figure: Any, path: Path) -> Path:
    import matplotlib

    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    path = path.with_suffix(".svg")
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same picture is the same file
        figure.savefig(path, metadata={"Date": None, "Title": figure.get_suptitle()})
    return path


def _curves(run: dict[str, Any], column: str, x: str, smoothed: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    source = run["test"] if column in ("accuracy", "perplexity") else run["curves"]
    y = np.array([np.nan if value is None else value for value in source[column]], dtype=float)
    return np.array(source[x], dtype=float), smooth(source[column]) if smoothed else y


def _band(
    axes: Any, arms: Arms, names: Sequence[str], column: str, x: str = "capo/completions", smoothed: bool = False
) -> None:
    """Mean and standard error over seeds of one column, for each of the arms."""
    for at, name in enumerate(name for name in names if name in arms):
        curves = [_curves(run, column, x, smoothed) for run in arms[name]]
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


def _accuracy(
    title: str, names: Sequence[str], x: str = "capo/completions", logarithmic: bool = False
) -> Callable[[Arms, Path], Path | None]:
    """A figure of accuracy in training and on the held-out set."""

    def draw(arms: Arms, path: Path) -> Path | None:
        if not any(name in arms for name in names):
            return None
        tested = any(run["test"]["accuracy"] for name in names for run in arms.get(name, []))
        columns = 2 if x == "capo/completions" and tested else 1
        figure, axes = _figure(columns, title)
        _band(axes[0], arms, names, "reward", x, smoothed=True)
        axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
        if columns == 2:
            _band(axes[1], arms, names, "accuracy")
            language = any("perplexity" in run["test"] for name in names for run in arms.get(name, []))
            axes[1].set(ylabel=f"TEST: {'held-out words' if language else '8 terms in place of 5'}", ylim=(-0.02, 1.02))
        if logarithmic:
            for each in axes:
                each.set_xscale("log")
        return _save(figure, path)

    return draw


def _fig3(arms: Arms, path: Path) -> Path | None:
    names = [*MAIN, "Dr.CAPO", "ReinCAPO"]
    if not any(name in arms for name in names):
        return None
    figure, axes = _figure(4, "Figure 3: policy and objective shifts through training, before selection")
    columns = {
        "token m_F": "token/m_f/mean",
        "batch m_F": "batch/m_f",
        "token m_H": "token/m_h/mean",
        "batch m_H": "batch/m_h",
    }
    for each, (label, column) in zip(axes, columns.items(), strict=True):
        _band(each, arms, names, f"capo/{column}")
        each.set_ylabel(label)
        if "m_F" in label:
            each.set_yscale("log")
        else:
            each.set_yscale("symlog", linthresh=1e-4)
    return _save(figure, path)


def _fig5(arms: Arms, path: Path) -> Path | None:
    names = [name for name in ("CAPO", "Dr.CAPO", "ReinCAPO") if name in arms]
    if not names:
        return None
    figure, axes = _figure(3, "Figure 5: share of tokens rejected")
    for each, sign in zip(axes, ("", "/positive", "/negative"), strict=True):
        _band(each, arms, names, f"capo/rejection_rate{sign}")
        each.set(ylabel={"": "of all", "/positive": "of those with A > 0", "/negative": "of those with A < 0"}[sign])
        each.set_ylim(bottom=0)
    return _save(figure, path)


def _fig8(arms: Arms, path: Path) -> Path | None:
    names = ["GRPO (A)", *(name for name in arms if ", β " in name)]
    if len(names) < 2:
        return None
    figure, axes = _figure(2, "Figure 8: regularisation towards the base model")
    _band(axes[0], arms, names, "reward", smoothed=True)
    axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
    largest = [mean_and_error([max(_finite(run["curves"]["grad_norm"])) for run in arms[name]]) for name in names]
    axes[1].bar(
        range(len(names)),
        [mean for mean, _ in largest],
        yerr=[error for _, error in largest],
        color=PALETTE[: len(names)],
        tick_label=[name.removeprefix("GRPO (A), ") for name in names],
    )
    axes[1].set(ylabel="largest gradient norm before clipping", yscale="log")
    return _save(figure, path)


def _fig9(arms: Arms, path: Path) -> Path | None:
    names = ("GRPO (A)", "CAPO")
    if not all(name in arms for name in names):
        return None
    figure, axes = _figure(2, "Figure 9: measured KL of each update, every seed")
    for each, name in zip(axes, names, strict=True):
        for at, run in enumerate(arms[name]):
            each.plot(*_curves(run, "capo/kl/measured", "capo/completions", False), color=PALETTE[at], linewidth=0.9)
        each.set(title=name, xlabel="completions", ylabel="nats a token", yscale="log", ylim=(1e-8, 5))
    return _save(figure, path)


def _learning_rates(arms: Arms, path: Path) -> Path | None:
    names = sorted((name for name in arms if name.startswith("GRPO, lr ")), key=lambda name: float(name.split()[-1]))
    if not names:
        return None
    figure, axes = _figure(2, "GRPO alone, 16 completions a step: accuracy and collapse against the learning rate")
    _band(axes[0], arms, names, "reward", smoothed=True)
    axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
    rates = [float(name.split()[-1]) for name in names]
    final = [mean_and_error([_final(run) for run in arms[name]]) for name in names]
    axes[1].errorbar(rates, [m for m, _ in final], [e for _, e in final], marker="o", label="final accuracy", capsize=3)
    share = [sum(_collapse(run) is not None for run in arms[name]) / len(arms[name]) for name in names]
    axes[1].plot(rates, share, marker="s", linestyle="--", label="share of seeds collapsed")
    axes[1].set(xlabel="learning rate", xscale="log", ylim=(-0.02, 1.05))
    return _save(figure, path)


def _language(arms: Arms, path: Path) -> Path | None:
    """Accuracy, and beside it what becomes of the rest of a language model, and why."""
    names = [name for name in LENGTHS if name in arms and "perplexity" in arms[name][0]["test"]]
    if not names:
        return None
    figure, axes = _figure(3, "A pretrained language model: accuracy, what is left of its language, its updates")
    _band(axes[0], arms, names, "reward", smoothed=True)
    axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
    for at, name in enumerate(names):
        for number, run in enumerate(arms[name]):
            line = {"color": PALETTE[at % len(PALETTE)], "linewidth": 1, "label": None if number else name}
            axes[1].plot(*_curves(run, "perplexity", "capo/completions", False), **line)
            axes[2].plot(*_curves(run, "capo/kl/measured", "capo/completions", False), **line)
    axes[1].set(ylabel="perplexity of its former answers", yscale="log", xlabel="completions")
    axes[2].set(ylabel="KL of each update, nats a token", yscale="log", ylim=(1e-6, 50), xlabel="completions")
    return _save(figure, path)


def _by_rate(arms: Arms) -> dict[str, dict[float, Runs]]:
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


def _range_figure(arms: Arms, path: Path) -> Path | None:
    methods = _by_rate(arms)
    if not methods:
        return None
    figure, axes = _figure(2, "Accuracy at the end, and the worst seed's, against the learning rate")
    for at, (method, rates) in enumerate(methods.items()):
        final = {rate: [_final(run) for run in runs] for rate, runs in rates.items()}
        mean = [float(np.mean(each)) for each in final.values()]
        axes[0].plot(list(final), mean, marker="o", markersize=3, color=PALETTE[at % len(PALETTE)], label=method)
        worst = [min(each) for each in final.values()]
        axes[1].plot(list(final), worst, marker="o", markersize=3, color=PALETTE[at % len(PALETTE)], label=method)
    for each, label in zip(axes, ("mean over seeds", "worst seed"), strict=True):
        each.set(xscale="log", xlabel="learning rate", ylabel=f"accuracy at the end, {label}", ylim=(-0.02, 1.02))
    return _save(figure, path)


def _last_layer_share(arms: Arms, path: Path) -> Path | None:
    """How much of each update's KL the last layer carries, by its own second-order prediction."""
    shares: dict[str, list[float]] = {}
    for name in [name for name in MAIN if name in arms] or sorted(arms):
        # under a budget the prediction is of the step that was proposed, the measurement of what was left of it
        settings = [run["settings"] for run in arms[name]]
        held = ["capo_kl_budget" in each or each.get("capo_mode") == "trust_region" for each in settings]
        runs = [run for run, budget in zip(arms[name], held, strict=True) if not budget]
        pairs = [pair for run in runs for pair in _pairs(run, "capo/kl/predicted", "capo/kl/measured")]
        # below 1e-7 nats the measured KL is rounding
        share = [predicted / measured for predicted, measured in pairs if predicted and measured > 1e-7]
        if share:
            shares[name] = share
    if not shares:
        return None
    figure, axes = _figure(1, "The last layer's predicted share of each update's KL")
    figure.set_size_inches(7, 1.2 + 0.24 * len(shares))
    axes[0].boxplot(list(shares.values()), tick_labels=list(shares), whis=(5, 95), sym="", orientation="horizontal")
    axes[0].set(xscale="log", xlabel="predicted / measured")
    axes[0].tick_params(axis="y", labelsize=7)
    axes[0].invert_yaxis()
    return _save(figure, path)


def _why(arms: Arms, path: Path) -> Path | None:
    """Each explanation of experiments/why.yaml, with and without the mask."""
    conditions = [name.removeprefix("GRPO, ") for name in arms if name.startswith("GRPO, ")]
    conditions = [condition for condition in conditions if f"CAPO, {condition}" in arms]
    if not conditions:
        return None
    figure, axes = _figure(1, "Why: the aggressive regime with one thing changed")
    figure.set_size_inches(7, 1 + 0.34 * len(conditions))
    for at, method in enumerate(("GRPO", "CAPO")):
        final = [[_final(run) for run in arms[f"{method}, {condition}"]] for condition in conditions]
        where = np.arange(len(conditions)) + 0.36 * (at - 0.5)
        axes[0].barh(where, [np.mean(values) for values in final], 0.34, color=PALETTE[at], alpha=0.6, label=method)
        for y, values in zip(where, final, strict=True):
            axes[0].plot(values, [y] * len(values), ".", color="black", markersize=4)
    axes[0].set_yticks(range(len(conditions)), conditions, fontsize=7)
    axes[0].set(xlabel="accuracy at the end (each seed, and the mean)", xlim=(-0.02, 1.02))
    axes[0].invert_yaxis()
    return _save(figure, path)


def _bars(
    title: str, chosen: Callable[[str], bool], other: str, figure_of: Callable[[dict[str, Any]], float], scale: str
) -> Callable[[Arms, Path], Path | None]:
    """A figure with how each of the chosen arms ended, and beside it another figure of the run."""

    def draw(arms: Arms, path: Path) -> Path | None:
        names = [name for name in arms if chosen(name)]
        if not names:
            return None
        figure, axes = _figure(2, title)
        figure.set_size_inches(11, 0.9 + 0.26 * len(names))
        where = range(len(names))
        for each, of, label in (
            (axes[0], _final, "accuracy at the end (each seed, and the mean)"),
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
        return _save(figure, path)

    return draw


RIVALS = ("random", "low_probability", "score_norm", "stapo", "policy_shift")
RIVAL_ARMS = ("REINFORCE (A)", "ReinCAPO", "ReinCAPO, expected Fisher", *(f"rival: {name}" for name in RIVALS))
REUSE = (
    "REINFORCE (A), 5 uses",
    "ReinCAPO, 5 uses",
    *(f"5 uses, rival: {name}" for name in ("random", "policy_shift", "total_variation")),
)
FIGURES: dict[str, Callable[[Arms, Path], Path | None]] = {
    "fig2": _accuracy("Figures 1 and 2: accuracy against completions", MAIN, logarithmic=True),
    "fig3": _fig3,
    "fig4": _accuracy("Figure 4: selection on other methods", ("Dr.GRPO (A)", "Dr.CAPO", "REINFORCE (A)", "ReinCAPO")),
    "fig5": _fig5,
    "fig6": _accuracy("Figure 6: SGD or Adam as the model of the step", STEP_MODELS),
    "fig7": _accuracy(
        "Figure 7: PPO's clipping, rollouts used 2 and 5 times",
        ["GRPO (A)", *(f"GRPO (A), {t} uses, ε {e}" for t in (2, 5) for e in ("0.2", "0.05", "0.01"))],
    ),
    "fig8": _fig8,
    "fig9": _fig9,
    "fig10": _accuracy("Figure 10: accuracy against accepted tokens", MAIN, x="capo/accepted_tokens", logarithmic=True),
    "fig_range": _range_figure,
    "fig_language": _language,
    "fig_lengths": _accuracy("Beyond the paper: the length of the step", LENGTHS),
    "fig_budget": _accuracy("Beyond the paper: a budget for the KL of the whole step", BUDGETS),
    "fig_rivals": _accuracy("Beyond the paper: rival masks on REINFORCE, at ReinCAPO's rejection rate", RIVAL_ARMS),
    "fig_reuse": _accuracy("Beyond the paper: masks on rollouts that are used five times", REUSE),
    "fig_controls": _bars(
        "Beyond the paper: the aggressive regime under a KL budget, and under other selections",
        lambda name: name.startswith("budget ") or ", balanced" in name or name.endswith(" nats"),
        "share of the time spent measuring KL",
        lambda run: run["seconds"]["kl"] / run["seconds"]["total"],
        "linear",
    ),
    "fig_regime": _bars(
        "Where the mask holds: SGD, larger batches, and the head alone",
        lambda name: name.startswith(("SGD, GRPO", "SGD, CAPO", "64 completions, ", "head only, ")),
        "largest KL of an update, nats a token",
        lambda run: max(_finite(run["curves"]["capo/kl/measured"])),
        "log",
    ),
    "fig_extensions": _bars(
        "Beyond the paper: soft weights and a penalty in place of the mask",
        lambda name: ", soft, " in name or ", penalty " in name,
        "largest KL of an update, nats a token",
        lambda run: max(_finite(run["curves"]["capo/kl/measured"])),
        "log",
    ),
    "fig_calibrated": _bars(
        "Thresholds by hand, and found by a calibration",
        lambda name: name.startswith(("SGD, ", "Adam, ")) and name.endswith((" by hand", " %", " nats")),
        "largest KL of an update, nats a token",
        lambda run: max(_finite(run["curves"]["capo/kl/measured"])),
        "log",
    ),
    "fig_last_layer_share": _last_layer_share,
    "fig_why": _why,
    "fig_learning_rate": _learning_rates,
}


# ---- tables -------------------------------------------------------------------------------------------------------


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _pairs(run: dict[str, Any], one: str, other: str) -> list[tuple[float, float]]:
    """Two figures at the steps that have both."""
    both = zip(run["curves"][one], run["curves"][other], strict=True)
    return [(x, y) for x, y in both if x is not None and y is not None]


def _final(run: dict[str, Any]) -> float:
    """The smoothed accuracy in training at the end."""
    return float(smooth(run["curves"]["reward"])[-1])


def _collapse(run: dict[str, Any]) -> int | None:
    return collapsed(run["curves"]["reward"])


def _write(path: Path, title: str, columns: list[str], rows: list[list[str]], note: str) -> Path | None:
    if not rows:
        return None
    table = {"name": path.stem, "title": title, "columns": columns, "rows": rows, "note": note}
    lines = [f"**{title}**", "", *(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))]
    path.with_suffix(".md").write_text("\n".join([*lines, "", note, ""]), encoding="utf-8")
    path = path.with_suffix(".json")
    path.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def _methods(arms: Arms, path: Path) -> Path | None:
    target = {name: completions_to_target(*_reached(runs)) for name, runs in arms.items()}
    first = {name: at for at, name in enumerate((*MAIN, *LENGTHS, *BUDGETS))}
    rows = []
    for name, runs in sorted(arms.items(), key=lambda arm: (first.get(arm[0], len(first)), arm[0])):
        final = [_final(run) for run in runs]
        test = [run["test"]["accuracy"][-1] for run in runs if run["test"]["accuracy"]]
        low, high = bootstrap_interval([final])
        rejected = [np.mean(rates) for run in runs if (rates := _finite(run["curves"]["capo/rejection_rate"]))]
        rows.append(
            [
                name,
                str(len(runs)),
                _plus_minus(final),
                f"{iqm(final):.3f} [{low:.3f}, {high:.3f}]" if len(final) > 1 else f"{iqm(final):.3f}",
                _plus_minus(test) if test else "–",
                f"{sum(_collapse(run) is not None for run in runs)}/{len(runs)}",
                f"{target[name]}{_range(*interval_to_target(*_reached(runs)))}",
                _times_fewer(target.get(STANDARD), target[name]),
                _times_fewer(target.get(TUNED), target[name]),
                f"{np.mean(rejected):.2%}" if rejected else "–",
            ]
        )
    return _write(
        path,
        "Every arm: accuracy at the end, collapses, completions to the target",
        [
            "arm",
            "seeds",
            "accuracy, mean ± s.e.",
            "IQM [95 %]",
            "TEST",
            "collapsed",
            f"completions to {TARGET} [95 %]",
            f"fewer than {STANDARD}",
            f"fewer than {TUNED}",
            "out of bounds",
        ],
        rows,
        "Accuracy: of sampled completions in training, smoothed, at the last step. Out of bounds: the share of tokens "
        "outside the thresholds, which masked arms reject and the others only count.",
    )


def _language_table(arms: Arms, path: Path) -> Path | None:
    rows = []
    for name in (name for name in LENGTHS if name in arms):
        runs = [run for run in arms[name] if "perplexity" in run["test"]]
        if not runs:
            continue
        perplexity = [run["test"]["perplexity"] for run in runs]
        after = [each[-1] for each in perplexity]
        kl = [_finite(run["curves"]["capo/kl/measured"]) for run in runs]
        rows.append(
            [
                name,
                str(len(runs)),
                f"{sum(_collapse(run) is not None for run in runs)}/{len(runs)}",
                _plus_minus([_final(run) for run in runs]),
                _plus_minus([run["test"]["accuracy"][-1] for run in runs]),
                str(completions_to_target(*_reached(runs))),
                f"{np.median([each[0] for each in perplexity]):.3g} → {np.median(after):.3g} "
                f"({min(after):.3g} to {max(after):.3g})",
                f"{np.median([np.median(each) for each in kl]):.2g}",
                f"{max(map(max, kl)):.2g}",
                f"{np.mean([np.mean(_finite(run['curves']['capo/rejection_rate'])[:10]) for run in runs]):.0%}",
            ]
        )
    if not rows:
        return None
    return _write(
        path,
        "A pretrained language model: accuracy, and what is left of its language",
        [
            "arm",
            "seeds",
            "collapsed",
            "accuracy, mean ± s.e.",
            "TEST",
            f"completions to {TARGET}",
            "perplexity, before → after (least to most)",
            "KL of an update, median",
            "largest",
            "out of bounds, first ten steps",
        ],
        rows,
        "Perplexity: of what the model itself answered to other questions before training, median over seeds.",
    )


def _range_table(arms: Arms, path: Path) -> Path | None:
    methods = _by_rate(arms)
    if not methods:
        return None
    rows = []
    for method, rates in methods.items():
        final = {rate: [_final(run) for run in runs] for rate, runs in rates.items()}
        usable = usable_range(final)
        for rate, runs in rates.items():
            rows.append(
                [
                    method,
                    f"{rate:g}" + (" ✓" if usable and usable[0] <= rate <= usable[1] else ""),
                    str(len(runs)),
                    _plus_minus(final[rate]),
                    f"{min(final[rate]):.3f}",
                    f"{sum(_collapse(run) is not None for run in runs)}/{len(runs)}",
                    str(completions_to_target(*_reached(runs))),
                    *_over_budget(runs),
                ]
            )
    return _write(
        path,
        "The range: every method against the learning rate",
        [
            "method",
            "learning rate",
            "seeds",
            "accuracy, mean ± s.e.",
            "worst seed",
            "collapsed",
            f"completions to {TARGET}",
            "updates above twice the budget",
            "largest update over the budget",
        ],
        rows,
        "✓: the usable range, neighbouring rates at which every seed ends within 5 % of the method's best mean. "
        "Updates are those that were left, measured on all completions (`capo/kl/whole`), not on the control's sample.",
    )


def _everywhere_table(arms: Arms, path: Path) -> Path | None:
    """The default beside the best of GRPO's learning rates in each setting, of arms `default, SETTING`."""
    rows = []
    for name in arms:
        setting = name.removeprefix("default, ")
        rivals = [each for each in arms if each.startswith("GRPO ") and each.endswith(f", {setting}")]
        if setting == name or not rivals:
            continue
        final = {each: [_final(run) for run in arms[each]] for each in (name, *rivals)}
        dead = {each: sum(_collapse(run) is not None for run in arms[each]) for each in final}
        best = max(rivals, key=lambda each: float(np.mean(final[each])))
        rows.append(
            [
                setting,
                _plus_minus(final[name]),
                f"{min(final[name]):.3f}",
                f"{dead[name]}/{len(final[name])}",
                str(completions_to_target(*_reached(arms[name]))),
                best.removeprefix("GRPO ").removesuffix(f", {setting}"),
                _plus_minus(final[best]),
                f"{dead[best]}/{len(final[best])}",
                f"{sum(dead[each] for each in rivals)}/{sum(len(final[each]) for each in rivals)}",
                f"{np.mean(final[name]) / np.mean(final[best]):.2f}",
                *_over_budget(arms[name]),
            ]
        )
    return _write(
        path,
        "One setting everywhere: the default, and GRPO at the better of its learning rates",
        [
            "setting",
            "default, mean ± s.e.",
            "worst seed",
            "collapsed",
            f"completions to {TARGET}",
            "GRPO's best rate",
            "GRPO there",
            "collapsed there",
            "at all its rates",
            "default over GRPO's best",
            "updates above twice the budget",
            "largest update over the budget",
        ],
        rows,
        "GRPO's rate is picked on these very seeds, in its favour. Updates as in the table of the range.",
    )


def _over_budget(runs: Runs) -> tuple[str, str]:
    """The share of the updates above twice the budget, and the largest over it, by what was measured on all tokens."""
    found = [kl for run in runs for kl in _finite(run["curves"].get("capo/kl/whole", []))]
    if not found:
        return "–", "–"
    budget = float(runs[0]["settings"].get("capo_kl_budget") or KL_BUDGET)
    over = np.array(found) / budget
    return f"{np.mean(over > 2):.2%}", f"{over.max():.2f}"


def _reached(runs: Runs) -> tuple[list[float | None], list[float]]:
    """The completions at which each run reached the target, and its budget."""
    curves = [run["curves"] for run in runs]
    return (
        [reach(each["capo/completions"], each["reward"], TARGET) for each in curves],
        [each["capo/completions"][-1] for each in curves],
    )


def _range(low: float, high: float) -> str:
    """The interval of a median, where some of the draws have one."""
    if not math.isfinite(low):
        return ""
    return f" [{low:,.0f}, {high:,.0f}]" if math.isfinite(high) else f" [{low:,.0f}, –]"


def _times_fewer(reference: CompletionsToTarget | None, mine: CompletionsToTarget) -> str:
    """The ratio of two medians, where both are known."""
    if reference is None or reference.median is None or mine.median is None:
        return "–"
    return f"{reference.median / mine.median:.1f}×"


def _table1(arms: Arms, path: Path) -> Path | None:
    rows = []
    for name in ("CAPO", "ReinCAPO", "CAPO, KL budget 1e-4", "GRPO (A), KL budget 3e-4, next learning rate"):
        runs = arms.get(name, [])
        if not runs:
            continue
        steps = sum(len(run["curves"]["step"]) for run in runs)
        total = sum(run["seconds"]["total"] for run in runs)
        parts = {
            "learning iteration": total,
            "generation and grading": sum(run["seconds"]["generation"] for run in runs),
            "curvature: shifts, selection, moments, figures": sum(run["seconds"]["curvature"] for run in runs),
            "measuring the KL of the update": sum(run["seconds"]["kl"] for run in runs),
        }
        rows += [[name, part, f"{s / steps:.4f}", f"{s / total:.2%}"] for part, s in parts.items()]
    return _write(
        path,
        "Table 1: seconds by part of a step",
        ["arm", "part", "seconds a step", "share"],
        rows,
        "On one core each, two runs at a time, accuracy on the held-out set included in the total.",
    )


def _table5(arms: Arms, path: Path) -> Path | None:
    rows = []
    for name in ("GRPO (A)", "CAPO", "REINFORCE (A)", "ReinCAPO", "GRPO standard", "GRPO (A), KL budget 3e-4"):
        if name not in arms:
            continue
        across = {
            level: [_across_steps(run, column) for run in arms[name]]
            for level, column in (("token", "capo/token/m_f/mean"), ("batch", "capo/batch/m_f"))
        }
        within = [float(np.mean(_finite(run["curves"]["capo/kl/rank_correlation"]))) for run in arms[name]]
        rows.append([name, *(_plus_minus(values) for values in (across["token"], across["batch"], within))])
    return _write(
        path,
        "Table 5: Spearman's correlation of m_F with the measured KL of the update",
        ["arm", "mean token m_F, over steps", "batch m_F, over steps", "m_F of each token, within a step"],
        rows,
        "Mean ± s.e. over seeds. The paper reports 0.622 and 0.596 for GRPO, 0.459 and 0.498 for CAPO.",
    )


def _across_steps(run: dict[str, Any], column: str) -> float:
    return spearman(*zip(*_pairs(run, column, "capo/kl/measured"), strict=True))


def _plus_minus(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}" if len(values) > 1 else f"{mean:.3f}"


TABLES: dict[str, Callable[[Arms, Path], Path | None]] = {
    "methods": _methods,
    "range": _range_table,
    "everywhere": _everywhere_table,
    "language": _language_table,
    "table1": _table1,
    "table5": _table5,
}
