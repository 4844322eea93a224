"""The paper's figures, and those beyond it, drawn from the results of `capo bench` without training anything.

Each is a function of the results by arm; `FIGURES` names them as the paper does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from capo_rl.runs.plots import PALETTE
from capo_rl.statistics import mean_and_error
from capo_rl.testbed.arms import (
    BUDGETS,
    LENGTHS,
    MAIN,
    REUSE,
    RIVAL_ARMS,
    STEP_MODELS,
    Arms,
    by_rate,
    collapse,
    final_accuracy,
    finite,
    pairs_of,
)
from capo_rl.testbed.drawing import accuracy, band, bars, new_figure, save, series


def _fig3(arms: Arms, path: Path) -> Path | None:
    names = [*MAIN, "Dr.CAPO", "ReinCAPO"]
    if not any(name in arms for name in names):
        return None
    figure, axes = new_figure(4, "Figure 3: policy and objective shifts through training, before selection")
    columns = {
        "token m_F": "token/m_f/mean",
        "batch m_F": "batch/m_f",
        "token m_H": "token/m_h/mean",
        "batch m_H": "batch/m_h",
    }
    for each, (label, column) in zip(axes, columns.items(), strict=True):
        band(each, arms, names, f"capo/{column}")
        each.set_ylabel(label)
        if "m_F" in label:
            each.set_yscale("log")
        else:
            each.set_yscale("symlog", linthresh=1e-4)
    return save(figure, path)


def _fig5(arms: Arms, path: Path) -> Path | None:
    names = [name for name in ("CAPO", "Dr.CAPO", "ReinCAPO") if name in arms]
    if not names:
        return None
    figure, axes = new_figure(3, "Figure 5: share of tokens rejected")
    for each, sign in zip(axes, ("", "/positive", "/negative"), strict=True):
        band(each, arms, names, f"capo/rejection_rate{sign}")
        each.set(ylabel={"": "of all", "/positive": "of those with A > 0", "/negative": "of those with A < 0"}[sign])
        each.set_ylim(bottom=0)
    return save(figure, path)


def _fig8(arms: Arms, path: Path) -> Path | None:
    names = ["GRPO (A)", *(name for name in arms if ", β " in name)]
    if len(names) < 2:
        return None
    figure, axes = new_figure(2, "Figure 8: regularisation towards the base model")
    band(axes[0], arms, names, "reward", smoothed=True)
    axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
    largest = [mean_and_error([max(finite(run["curves"]["grad_norm"])) for run in arms[name]]) for name in names]
    axes[1].bar(
        range(len(names)),
        [mean for mean, _ in largest],
        yerr=[error for _, error in largest],
        color=PALETTE[: len(names)],
        tick_label=[name.removeprefix("GRPO (A), ") for name in names],
    )
    axes[1].set(ylabel="largest gradient norm before clipping", yscale="log")
    return save(figure, path)


def _fig9(arms: Arms, path: Path) -> Path | None:
    names = ("GRPO (A)", "CAPO")
    if not all(name in arms for name in names):
        return None
    figure, axes = new_figure(2, "Figure 9: measured KL of each update, every seed")
    for each, name in zip(axes, names, strict=True):
        for at, run in enumerate(arms[name]):
            each.plot(*series(run, "capo/kl/measured", "capo/completions", False), color=PALETTE[at], linewidth=0.9)
        each.set(title=name, xlabel="completions", ylabel="nats a token", yscale="log", ylim=(1e-8, 5))
    return save(figure, path)


def _learning_rates(arms: Arms, path: Path) -> Path | None:
    alone = [name for name in arms if re.fullmatch(r"GRPO, lr [\d.e+-]+", name)]
    names = sorted(alone, key=lambda name: float(name.split()[-1]))
    if not names:
        return None
    figure, axes = new_figure(2, "GRPO alone, 16 completions a step: accuracy and collapse against the learning rate")
    band(axes[0], arms, names, "reward", smoothed=True)
    axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
    rates = [float(name.split()[-1]) for name in names]
    final = [mean_and_error([final_accuracy(run) for run in arms[name]]) for name in names]
    axes[1].errorbar(rates, [m for m, _ in final], [e for _, e in final], marker="o", label="final accuracy", capsize=3)
    share = [sum(collapse(run) is not None for run in arms[name]) / len(arms[name]) for name in names]
    axes[1].plot(rates, share, marker="s", linestyle="--", label="share of seeds collapsed")
    axes[1].set(xlabel="learning rate", xscale="log", ylim=(-0.02, 1.05))
    return save(figure, path)


def _language(arms: Arms, path: Path) -> Path | None:
    """Accuracy, and beside it what becomes of the rest of a language model, and why."""
    names = [name for name in LENGTHS if name in arms and "perplexity" in arms[name][0]["test"]]
    if not names:
        return None
    figure, axes = new_figure(3, "A pretrained language model: accuracy, what is left of its language, its updates")
    band(axes[0], arms, names, "reward", smoothed=True)
    axes[0].set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
    for at, name in enumerate(names):
        for number, run in enumerate(arms[name]):
            line = {"color": PALETTE[at % len(PALETTE)], "linewidth": 1, "label": None if number else name}
            axes[1].plot(*series(run, "perplexity", "capo/completions", False), **line)
            axes[2].plot(*series(run, "capo/kl/measured", "capo/completions", False), **line)
    axes[1].set(ylabel="perplexity of its former answers", yscale="log", xlabel="completions")
    axes[2].set(ylabel="KL of each update, nats a token", yscale="log", ylim=(1e-6, 50), xlabel="completions")
    return save(figure, path)


def _range_figure(arms: Arms, path: Path) -> Path | None:
    methods = by_rate(arms)
    if not methods:
        return None
    figure, axes = new_figure(2, "Accuracy at the end, and the worst seed's, against the learning rate")
    for at, (method, rates) in enumerate(methods.items()):
        final = {rate: [final_accuracy(run) for run in runs] for rate, runs in rates.items()}
        mean = [float(np.mean(each)) for each in final.values()]
        axes[0].plot(list(final), mean, marker="o", markersize=3, color=PALETTE[at % len(PALETTE)], label=method)
        worst = [min(each) for each in final.values()]
        axes[1].plot(list(final), worst, marker="o", markersize=3, color=PALETTE[at % len(PALETTE)], label=method)
    for each, label in zip(axes, ("mean over seeds", "worst seed"), strict=True):
        each.set(xscale="log", xlabel="learning rate", ylabel=f"accuracy at the end, {label}", ylim=(-0.02, 1.02))
    return save(figure, path)


def _off_policy(arms: Arms, path: Path) -> Path | None:
    """A sampler whose weights are those of 16 steps ago: accuracy, and how far the policy is from it."""
    methods = ("default", "GRPO", "truncated", "masked", "TV mask", "rejected", "largest")
    names = [name for method in methods if (name := f"{method}, lag 16") in arms]
    if not names:
        return None
    figure, (left, right) = new_figure(2, "Completions sampled by the weights of 16 steps ago")
    band(left, arms, names, "reward", smoothed=True)
    left.set(ylabel="accuracy in training (smoothed)", ylim=(-0.02, 1.02))
    band(right, arms, names, "off_policy/kl", smoothed=True)
    right.set(ylabel="KL(μ ‖ π), nats a token (smoothed)", yscale="log", ylim=(1e-5, None))
    return save(figure, path)


def _last_layer_share(arms: Arms, path: Path) -> Path | None:
    """How much of each update's KL the last layer carries, by its own second-order prediction."""
    shares: dict[str, list[float]] = {}
    for name in [name for name in MAIN if name in arms] or sorted(arms):
        # under a budget the prediction is of the step that was proposed, the measurement of what was left of it
        settings = [run["settings"] for run in arms[name]]
        held = ["capo_kl_budget" in each or each.get("capo_mode") == "trust_region" for each in settings]
        runs = [run for run, budget in zip(arms[name], held, strict=True) if not budget]
        pairs = [pair for run in runs for pair in pairs_of(run, "capo/kl/predicted", "capo/kl/measured")]
        # below 1e-7 nats the measured KL is rounding
        share = [predicted / measured for predicted, measured in pairs if predicted and measured > 1e-7]
        if share:
            shares[name] = share
    if not shares:
        return None
    figure, axes = new_figure(1, "The last layer's predicted share of each update's KL")
    figure.set_size_inches(7, 1.2 + 0.24 * len(shares))
    axes[0].boxplot(list(shares.values()), tick_labels=list(shares), whis=(5, 95), sym="", orientation="horizontal")
    axes[0].set(xscale="log", xlabel="predicted / measured")
    axes[0].tick_params(axis="y", labelsize=7)
    axes[0].invert_yaxis()
    return save(figure, path)


def _why(arms: Arms, path: Path) -> Path | None:
    """Each explanation of experiments/why.yaml, with and without the mask."""
    conditions = [name.removeprefix("GRPO, ") for name in arms if name.startswith("GRPO, ")]
    conditions = [condition for condition in conditions if f"CAPO, {condition}" in arms]
    if not conditions:
        return None
    figure, axes = new_figure(1, "Why: the aggressive regime with one thing changed")
    figure.set_size_inches(7, 1 + 0.34 * len(conditions))
    for at, method in enumerate(("GRPO", "CAPO")):
        final = [[final_accuracy(run) for run in arms[f"{method}, {condition}"]] for condition in conditions]
        where = np.arange(len(conditions)) + 0.36 * (at - 0.5)
        axes[0].barh(where, [np.mean(values) for values in final], 0.34, color=PALETTE[at], alpha=0.6, label=method)
        for y, values in zip(where, final, strict=True):
            axes[0].plot(values, [y] * len(values), ".", color="black", markersize=4)
    axes[0].set_yticks(range(len(conditions)), conditions, fontsize=7)
    axes[0].set(xlabel="accuracy at the end (each seed, and the mean)", xlim=(-0.02, 1.02))
    axes[0].invert_yaxis()
    return save(figure, path)


FIGURES: dict[str, Callable[[Arms, Path], Path | None]] = {
    "fig2": accuracy("Figures 1 and 2: accuracy against completions", MAIN, logarithmic=True),
    "fig3": _fig3,
    "fig4": accuracy("Figure 4: selection on other methods", ("Dr.GRPO (A)", "Dr.CAPO", "REINFORCE (A)", "ReinCAPO")),
    "fig5": _fig5,
    "fig6": accuracy("Figure 6: SGD or Adam as the model of the step", STEP_MODELS),
    "fig7": accuracy(
        "Figure 7: PPO's clipping, rollouts used 2 and 5 times",
        ["GRPO (A)", *(f"GRPO (A), {t} uses, ε {e}" for t in (2, 5) for e in ("0.2", "0.05", "0.01"))],
    ),
    "fig8": _fig8,
    "fig9": _fig9,
    "fig10": accuracy("Figure 10: accuracy against accepted tokens", MAIN, x="capo/accepted_tokens", logarithmic=True),
    "fig_range": _range_figure,
    "fig_language": _language,
    "fig_lengths": accuracy("Beyond the paper: the length of the step", LENGTHS),
    "fig_budget": accuracy("Beyond the paper: a budget for the KL of the whole step", BUDGETS),
    "fig_rivals": accuracy("Beyond the paper: rival masks on REINFORCE, at ReinCAPO's rejection rate", RIVAL_ARMS),
    "fig_reuse": accuracy("Beyond the paper: masks on rollouts that are used five times", REUSE),
    "fig_controls": bars(
        "Beyond the paper: the aggressive regime under a KL budget, and under other selections",
        lambda name: name.startswith("budget ") or ", balanced" in name or name.endswith(" nats"),
        "share of the time spent measuring KL",
        lambda run: run["seconds"]["kl"] / run["seconds"]["total"],
        "linear",
    ),
    "fig_regime": bars(
        "Where the mask holds: SGD, larger batches, and the head alone",
        lambda name: name.startswith(("SGD, GRPO", "SGD, CAPO", "64 completions, ", "head only, ")),
        "largest KL of an update, nats a token",
        lambda run: max(finite(run["curves"]["capo/kl/measured"])),
        "log",
    ),
    "fig_extensions": bars(
        "Beyond the paper: soft weights and a penalty in place of the mask",
        lambda name: ", soft, " in name or ", penalty " in name,
        "largest KL of an update, nats a token",
        lambda run: max(finite(run["curves"]["capo/kl/measured"])),
        "log",
    ),
    "fig_calibrated": bars(
        "Thresholds by hand, and found by a calibration",
        lambda name: name.startswith(("SGD, ", "Adam, ")) and name.endswith((" by hand", " %", " nats")),
        "largest KL of an update, nats a token",
        lambda run: max(finite(run["curves"]["capo/kl/measured"])),
        "log",
    ),
    "fig_off_policy": _off_policy,
    "fig_last_layer_share": _last_layer_share,
    "fig_why": _why,
    "fig_learning_rate": _learning_rates,
}
