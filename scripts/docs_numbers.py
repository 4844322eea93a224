"""The tables and numbers of README.md and docs/*.md that come from results/, by the names that the pages give them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from capo_rl.pages.doctor import FIGURES, moved
from capo_rl.statistics import completions_to_target, geometric_mean
from capo_rl.testbed.arms import Arms, Runs, by_rate, collapse, final_accuracy, finite, reached
from capo_rl.testbed.bench import read_results
from capo_rl.testbed.one_step import log_pi_change
from capo_rl.theory.checks import markdown as theory

RESULTS = Path(__file__).parents[1] / "results"
ACCURACY, TO_TARGET = "accuracy, mean ± s.e.", "completions to 0.9 [95 %]"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(
        [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    ).replace("|  ", "| ")


@cache
def arms(bench: str) -> Arms:
    """A bench's runs by arm, each arm's by seed."""
    found: Arms = {}
    for run in sorted(read_results(RESULTS / bench), key=lambda run: run["seed"]):
        found.setdefault(run["arm"], []).append(run)
    return found


@cache
def read(path: str) -> Any:
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def rows_of(bench: str, table: str) -> list[dict[str, str]]:
    """The rows of one of a bench's tables, by column; its first column names them."""
    found = read(f"{bench}/tables/{table}.json")
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def part(bench: str, table: str, columns: dict[str, str], names: dict[str, str] | None = None) -> str:
    """Some columns and rows of a bench's table, under other names; without `names` all rows as they are."""
    rows = rows_of(bench, table)
    key = next(iter(rows[0]))
    by_name = {row[key]: row for row in rows}
    chosen = rows if names is None else [by_name[name] | {key: shown} for name, shown in names.items()]
    return markdown(list(columns.values()), [[row[column] for column in columns] for row in chosen])


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def short(value: float) -> str:
    """One digit and the power of ten: 3e-4, 2e6."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def large(value: float) -> str:
    """A perplexity: three digits, or the power of ten."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1000 else short(value)


def dead(runs: Runs) -> int:
    return sum(collapse(run) is not None for run in runs)


def out_of(runs: Runs) -> str:
    return f"{dead(runs)} of {len(runs)}"


def ends(runs: Runs) -> str:
    """The accuracy at the end of each seed."""
    return ", ".join(f"{final_accuracy(run):.2f}{' (dead)' if collapse(run) is not None else ''}" for run in runs)


def mean_and_reach(runs: Runs) -> str:
    """The mean accuracy at the end, from the worst seed to the best, and how many are dead."""
    if not runs:
        return ""
    found = [final_accuracy(run) for run in runs]
    lost = f"; {out_of(runs)} dead" if dead(runs) else ""
    return f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f}{lost})"


def median_to_target(bench: str, *names: str) -> float:
    """The completions to the target, in the median of the runs of one arm or several."""
    median = completions_to_target(*reached([run for name in names for run in arms(bench)[name]])).median
    if median is None:
        raise ValueError(f"{bench}, {', '.join(names)}: half of the runs don't reach the target")
    return median


def perplexity(run: dict[str, Any]) -> float:
    return float(run["test"]["perplexity"][-1])


# README.md


def what_it_does() -> str:
    language, sizes, everywhere = arms("pretrained"), arms("paper_sizes"), rows_of("everywhere", "everywhere")
    methods = by_rate(arms("range"))

    def bold(name: str, text: str) -> str:
        return f"**{text}**" if name == "default" else text

    def rates_dead(method: str) -> str:
        rates = methods[method]
        runs = f"{sum(map(len, rates.values()))} runs" + (
            "" if len(rates) == len(methods["default"]) else f", up to {short(max(rates))}"
        )
        return bold(method, f"{sum(dead(each) > 0 for each in rates.values())} of {len(rates)}") + f" ({runs})"

    def spread(method: str) -> str:
        found = {
            name.split(", ")[1].removeprefix("lr "): runs
            for name, runs in arms("schedules").items()
            if name.startswith(f"{method}, ") and name.endswith(", constant")
        }
        final = [final_accuracy(run) for runs in found.values() for run in runs]
        best = ", its best" if method == "GRPO" else ""
        reach = bold(method, f"{min(final):.2f} to {max(final):.2f}")
        return f"{reach} at {', '.join(sorted(found, key=float))}{best} ({len(final)} runs)"

    def median_perplexity(name: str) -> str:
        return large(float(np.median([perplexity(run) for run in language[name]])))

    def mean_end(name: str, digits: int) -> str:
        mean = np.mean([final_accuracy(run) for run in sizes[name]])
        return f"{bold(name, f'{mean:.{digits}f}')} ({len(sizes[name])} runs)"

    def totals(column: str) -> str:
        pairs = [row[column].split("/") for row in everywhere]
        return f"{sum(int(one) for one, _ in pairs)} of {sum(int(all_) for _, all_ in pairs)}"

    before = language["default"][0]["test"]["perplexity"][0]
    tables = {
        bench: f"results/{bench}/tables" for bench in ("pretrained", "range", "schedules", "paper_sizes", "everywhere")
    }
    return markdown(
        ["", "default", "GRPO", "published mask"],
        [
            [
                f"[a pretrained model]({tables['pretrained']}/language.md) of 135M weights, lr 1e-3, 96 completions a "
                "step: collapsed",
                f"**{out_of(language['default'])}**",
                out_of(language["GRPO (A)"]),
                out_of(language["CAPO"]),
            ],
            [
                f"perplexity of what it used to say, {before:.1f} before (GRPO at its best rate: "
                f"{median_perplexity('GRPO tuned')})",
                f"**{median_perplexity('default')}**",
                median_perplexity("GRPO (A)"),
                median_perplexity("CAPO"),
            ],
            [
                f"[the testbed]({tables['range']}/methods.md), 16 a step, lr {short(min(methods['default']))} to "
                f"{short(max(methods['default']))}: rates at which a run collapsed",
                rates_dead("default"),
                rates_dead("GRPO"),
                rates_dead("published mask"),
            ],
            [
                f"[with a constant rate]({tables['schedules']}/methods.md) and no warm-up: accuracy at the end",
                spread("default"),
                spread("GRPO"),
                "",
            ],
            [
                f"[at the paper's 96 a step]({tables['paper_sizes']}/methods.md), lr 1e-3: accuracy at the end",
                mean_end("default", 3),
                mean_end("GRPO (A)", 2),
                mean_end("CAPO", 2),
            ],
            [
                f"[{len(everywhere)} other]({tables['everywhere']}/everywhere.md) losses, optimizers, models and "
                "tasks: collapsed",
                f"**{totals('collapsed')}**",
                f"{totals('at all its rates')} at two rates",
                "",
            ],
            [
                "[a sampler that lags](results/off_policy/tables/off_policy.md) by 1, 4 or 16 steps; GRPO at 3e-4, its "
                "best without a lag: collapsed",
                f"**{out_of(lagged('default'))}**",
                f"{out_of(lagged('GRPO'))}, {out_of(lagged('masked'))} with TRL's correction",
                "",
            ],
        ],
    )


# docs/pretrained.md


def pretrained() -> str:
    shown = {
        "default": "**default**: a trust region of 5e-3 nats",
        "GRPO (A)": "GRPO",
        "CAPO": "CAPO, the published mask",
        "GRPO tuned": "GRPO at its best rate",
    }
    of = {row["arm"]: row for row in rows_of("pretrained", "language")}
    rows = []
    for name, label in shown.items():
        runs = arms("pretrained")[name]
        after = [perplexity(run) for run in runs]
        row = of[name]
        rows.append(
            [
                label,
                short(runs[0]["settings"]["learning_rate"]),
                row["seeds"],
                row["collapsed"],
                row[ACCURACY],
                row["TEST"],
                f"{runs[0]['test']['perplexity'][0]:.1f} → {large(float(np.median(after)))} "
                f"({large(min(after))} to {large(max(after))})",
                row["largest"],
            ]
        )
    return markdown(
        [
            "arm",
            "learning rate",
            "seeds",
            "collapsed",
            "accuracy at the end",
            "on held-out words",
            "perplexity of its former answers",
            "largest update, nats a token",
        ],
        rows,
    )


def pretrained_rates() -> str:
    (rates,) = by_rate(arms("pretrained_rates")).values()
    return markdown(
        ["learning rate", *map(short, rates)],
        [
            ["collapsed", *(f"{dead(runs)}/{len(runs)}" for runs in rates.values())],
            ["accuracy at the end", *(f"{np.mean([*map(final_accuracy, runs)]):.3f}" for runs in rates.values())],
            [
                "perplexity at the end, each seed",
                *(", ".join(large(perplexity(run)) for run in runs) for runs in rates.values()),
            ],
        ],
    )


def pretrained_tasks() -> str:
    right = read("pretrained/tasks.json")["right"]
    return markdown(["task", "right"], [[name, f"{share:.3f}"] for name, share in right.items()])


@cache
def points() -> list[dict[str, Any]]:
    """The points whose next step was taken in several forms."""
    return [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / "pretrained_steps").glob("*.json"))
    ]


def pretrained_steps() -> str:
    shown = {
        "everything": "on all tokens",
        "masked": "on those within the paper's bounds",
        "random": "on as many at random",
        "shortened": "on all, times ρ",
        "masked_short": "on those in bounds, times ρ",
    }
    rows = []
    for at, rate in enumerate(each["learning_rate"] for each in points()[0]["rates"]):
        for form, label in shown.items():
            moved = [point["rates"][at][form] for point in points()]
            quantiles = (geometric_mean(each["kl_quantiles"][q] for each in moved) for q in ("q50", "q99"))
            signs = (np.mean([log_pi_change(each, sign) for each in moved]) for sign in ("positive", "negative"))
            rows.append(
                [short(rate), label, f"{geometric_mean(each['scale'] for each in moved):.2g}"]
                + [short(geometric_mean(each["kl"] for each in moved)), *map(short, quantiles)]
                + [f"{each:+.2g}" for each in signs]
                + [f"{np.mean([each['perplexity'] for each in moved]):.1f}"]
            )
    columns = ("learning rate", "the step", "length", "KL, nats a token", "median token", "99th percentile")
    return markdown([*columns, "log π(a), A > 0", "A < 0", "perplexity"], rows)


def pretrained_rejected() -> str:
    shown = {
        "rate": "of all tokens",
        "rate_positive": "of those with A > 0",
        "rate_negative": "of those with A < 0",
        "energy": "of the score energy Σ A² ‖u‖² ‖h‖²",
        "share": "what is left of the gradient's length, ρ",
        "length_of_step": "what is left of the step's length",
        "cosine_of_steps": "cosine between the steps with and without",
    }
    rates = [each["learning_rate"] for each in points()[0]["rates"]]
    return markdown(
        ["rejected by the paper's bounds", *(f"lr {short(rate)}" for rate in rates)],
        [
            [label, *(f"{np.mean([p['rates'][i]['rejected'][name] for p in points()]):.3f}" for i in range(len(rates)))]
            for name, label in shown.items()
        ],
    )


def pretrained_kinds() -> str:
    rows = []
    for sign, said in (("positive", "A > 0"), ("negative", "A < 0")):
        for level, of in (("unsure", "π(a) < 0.5"), ("between", "0.5 to 0.9"), ("sure", "above 0.9")):
            cells = [f"{said}, {of}"]
            for form in ("everything", "masked"):
                kinds = [p["rates"][1][form]["by_kind"].get(f"{sign}, {level}") for p in points()]
                there = [kind for kind in kinds if kind is not None]
                count = sum(kind["tokens"] for kind in there)
                cells += [str(count)] if form == "everything" else []
                for name in ("kl", "log_pi", "entropy"):
                    mean = sum(kind["tokens"] * kind[name] for kind in there) / count
                    cells.append(f"{mean:.2g}" if name == "kl" else f"{mean:+.2f}")
            rows.append(cells)
    masked = ("KL, masked", "log π(a)", "entropy")
    return markdown(["tokens, lr 2e-4", "how many", "KL, all tokens", "log π(a)", "entropy", *masked], rows)


def pretrained_parts() -> str:
    names = [name for name in points()[0]["parts"] if name not in ("learning_rate", "all")]
    alone = [geometric_mean(p["parts"][name] / p["parts"]["all"] for p in points()) for name in names]
    predicted = geometric_mean(p["rates"][1]["everything"]["predicted"] / p["parts"]["all"] for p in points())
    return markdown(
        ["moved alone, lr 2e-4", *names, "predicted by the last layer"],
        [["its KL over the whole step's", *(f"{each:.1e}" for each in [*alone, predicted])]],
    )


# docs/scaling.md


def scaling_seconds() -> str:
    return markdown(
        ["n", "k", "d", "V", "seconds predicted", "measured", ""],
        [
            [f"{row[name]:,}" for name in ("n", "k", "d", "vocabulary")]
            + [f"{row['predicted']:.3f}", f"{row['measured']:.3f}", "" if row["fitted"] else "not fitted"]
            for row in read("scaling.json")["seconds"]
        ],
    )


def scaling_carried_on() -> str:
    runs = read("scaling.json")["carried on"]
    shown = {
        "tokens a process": ("tokens a process", "{:,.0f}"),
        "sharded training, GB": ("weights, gradient and Adam's state, sharded", "{:.1f} GB"),
        "default, held, GB": ("default: held", "{:.2f} GB"),
        "default, operations": ("default: operations", "{:.1%}"),
        "default, 16,384 tokens, operations": ("default measured on 16,384 tokens: operations", "{:.2%}"),
        "mask, held, GB": ("mask: held in a step", "{:.2f} GB"),
        "mask, moments, GB": ("mask: moments", "{:.1f} GB"),
        "mask, moments, spread, GB": ("mask: moments, spread over the processes", "{:.2f} GB"),
        "mask, fetched for a micro-batch": ("what comes then for each micro-batch, at most", "{:.1%}"),
        "mask, operations": ("mask: operations", "{:.1%}"),
        "mask, handed over": ("mask: handed over", "{:.1%}"),
    }
    return markdown(
        ["", *runs],
        [[label, *(form.format(run[name]) for run in runs.values())] for name, (label, form) in shown.items()],
    )


# docs/testbed.md


def range_() -> str:
    columns = ("method", "learning rate", "seeds", ACCURACY, "worst seed", "collapsed", "completions to 0.9")
    shown = {"updates above twice the budget": "above 2 B", "largest update over the budget": "largest / B"}
    return part("range", "range", same(*columns) | {ACCURACY: "accuracy"} | shown)


def schedules() -> str:
    rows, betas = [], ("β₂ 0.99", "β₂ 0.95")
    for method, label, each in (
        ("default", "default", "3e-4"),
        ("default", "default", "3e-3"),
        ("default", "default", "3e-2"),
        ("GRPO", "GRPO at its best rate", "3e-4"),
    ):
        name = f"{method}, lr {each}"
        others = [arms("schedules").get(f"{name}, {change}", []) for change in ("no warm-up", "constant", *betas)]
        rows.append([f"{label}, {each}", ends(arms("range")[name]), *map(ends, others)])
    columns = ["cosine, warm-up, β₂ 0.999 (above)", "no warm-up", "constant, no warm-up", *betas]
    return markdown(["", *columns], rows)


_METHODS = same("arm", "seeds") | {ACCURACY: "accuracy"} | same("TEST", "collapsed", TO_TARGET)


def paper_sizes() -> str:
    names = ("GRPO standard", "default", "shorten", "CAPO with the share", "Dr.CAPO with the share")
    names += ("ReinCAPO with the share", "CAPO", "Dr.CAPO", "ReinCAPO", "GRPO (A)", "Dr.GRPO (A)", "REINFORCE (A)")
    names += ("GRPO, lr 5e-4", "GRPO, lr 7e-4")
    return part("paper_sizes", "methods", _METHODS | same("fewer than GRPO standard", "out of bounds"), same(*names))


def everywhere() -> str:
    best = "GRPO's best rate"
    columns = ("setting", "default", "worst seed", "dead", "GRPO, its best rate", "dead at both its rates")
    return markdown(
        [*columns, "default / GRPO", "above 2 B", "largest / B"],
        [
            [
                row["setting"],
                row["default, mean ± s.e."],
                row["worst seed"],
                row["collapsed"],
                f"{row['GRPO there']} at {row[best]}",
                row["at all its rates"],
                row["default over GRPO's best"],
                row["updates above twice the budget"],
                row["largest update over the budget"],
            ]
            for row in rows_of("everywhere", "everywhere")
        ],
    )


def off_policy_runs() -> Arms:
    """The runs of the seeds that the bench has, and of other benches those without a lag and at 2 and 5 uses."""
    found = dict(arms("off_policy"))
    seeds = {run["seed"] for runs in found.values() for run in runs}
    for name, alone, used in (
        ("default, {}", "default, lr 1e-2", "default"),
        ("GRPO, {}", "GRPO, lr 3e-4", "GRPO 3e-4"),
        ("GRPO, {}, lr 1e-4", "GRPO, lr 1e-4", "GRPO 1e-4"),
    ):
        others = {"none": arms("range")[alone]}
        others |= {uses: arms("everywhere")[f"{used}, {uses}"] for uses in ("2 uses", "5 uses")}
        for setting, runs in others.items():
            found[name.format(setting)] = [run for run in runs if run["seed"] in seeds]
    return found


def off_policy() -> str:
    found = off_policy_runs()
    methods = ("default", "GRPO", "truncated", "masked", "TV mask", "rejected", "largest", "negative rejected")
    settings = ("none", "2 uses", "5 uses", "lag 1", "lag 4", "lag 16")
    rows = [
        [setting + rate, *(mean_and_reach(found.get(f"{method}, {setting}{rate}", [])) for method in methods)]
        for rate in ("", ", lr 1e-4", ", lr 1e-3")
        for setting in settings
    ]
    return markdown(["", *methods], [row for row in rows if any(row[1:])])


def off_policy_bounds() -> str:
    found, settings = arms("off_policy_bounds"), ("lag 4", "lag 16", "5 uses")
    rules = dict.fromkeys(name.split(", ")[1] for name in found)
    return markdown(
        ["rule and bound", *settings],
        [[rule, *(ends(found.get(f"{setting}, {rule}", [])) for setting in settings)] for rule in sorted(rules)],
    )


def off_policy_at(rate: float, default: bool = False) -> Runs:
    """The runs with a lag or several uses at a learning rate, of the default or of everything else."""
    return [
        run
        for name, runs in off_policy_runs().items()
        for run in runs
        if ", none" not in name
        and name.startswith("default") == default
        and float(run["settings"]["learning_rate"]) == rate
    ]


def lagged(method: str) -> Runs:
    """The runs of a method under every lag, at the rate that all have in common."""
    return [run for steps in (1, 4, 16) for run in arms("off_policy")[f"{method}, lag {steps}"]]


def away(name: str) -> str:
    """The median over an arm's steps of the KL of the policy from its sampler."""
    found = [kl for run in arms("off_policy")[name] for kl in finite(run["curves"]["off_policy/kl"])]
    return short(float(np.median(found)))


def units() -> str:
    return markdown(
        ["model", "lr", "lr ‖h‖₁", "mean 1 − π(a)", "rejected by the paper's bounds", "by the bounds translated"],
        [
            [
                row["model"],
                f"{row['lr']:g}",
                f"{row['scale']:.4f}",
                f"{row['1 - pi']:.3f}",
                f"{row['plain']:.1%}",
                f"{row['translated']:.1%}",
            ]
            for row in read("units.json")
        ],
    )


def main_lengths() -> str:
    names = (
        "GRPO standard",
        "GRPO tuned",
        "GRPO (A)",
        "REINFORCE (A)",
        "default",
        "shorten",
        "CAPO, the paper's bounds",
    )
    names += (
        "CAPO, the paper's bounds, with the share",
        "Dr.CAPO with the share",
        "ReinCAPO",
        "ReinCAPO with the share",
    )
    names += ("REINFORCE, shorten", "REINFORCE, default", "REINFORCE, default, lr 1e-2")
    return part("main", "methods", _METHODS | same("fewer than GRPO standard", "out of bounds"), same(*names))


def sharpness() -> str:
    return markdown(
        ["known before the step", "R²", "left, log", "98 % quantile of what is left"],
        [
            [name, f"{each['r2']:.3f}", f"{each['left']:.2f}", f"× {each['factor']:.0f}"]
            for name, each in read("sharpness.json")["known"].items()
        ],
    )


def choice() -> str:
    """The accuracies of other choices of tokens than CAPO's."""
    main, what = arms("main"), arms("what")
    bounds = main["CAPO, the paper's bounds, with the share"], main["ReinCAPO with the share"]
    rows = [["outside the paper's bounds, step times the share", *map(ends, bounds)]]
    for label, change in (
        ("as many, the least likely tokens", " with the share, low probability"),
        ("as many, at random", " with the share, random"),
        ("outside the bounds, A < 0 only", " with the share, negative only"),
        ("outside the bounds, A > 0 only", " with the share, positive only"),
        ("outside the bounds, A < 0 only, no share", ", negative only"),
        ("outside the bounds, A > 0 only, no share", ", positive only"),
        ("outside the bounds, and every layer's second moment has seen them", ", whole second moment"),
    ):
        rows.append([label, *(ends(what.get(method + change, [])) for method in ("CAPO", "ReinCAPO"))])
    return markdown(["what is left out, at 16 completions, lr 5e-4", "GRPO's advantage", "REINFORCE's"], rows)


def judgements() -> str:
    rows = [
        [
            row["judgement"],
            ", ".join(f"{accuracy:.2f}" for accuracy in row["accuracies"]),
            f"{np.mean(row['accuracies']):.3f}",
            f"{row['log surprise, s.d.']:.2f}",
            f"× {row['98 % quantile']:.0f}",
            f"{row['above 2 B']:.2%}",
        ]
        for row in read("judgements/tables/surprises.json")["arms"]
    ]
    columns = ["accuracy, seeds 1 to 3", "mean", "log surprise, s.d.", "98 % quantile", "above 2 B"]
    return markdown(["judgement of the step", *columns], rows)


def lengths() -> str:
    rows = []
    for method, label, own in (
        ("default", "default, lr 1e-2", arms("range")["default, lr 1e-2"]),
        ("shorten", "shorten, lr 5e-4", arms("main")["shorten"]),
    ):
        rows += [
            [label, "its own", ends(own)],
            ["", "those of another seed's run (yoked)", ends(arms("what")[f"{method}, yoked"])],
            ["", "at every step their mean", ends(arms("what")[f"{method}, constant"])],
        ]
    return markdown(["at 16 completions", "lengths of the steps", "accuracy of each seed"], rows)


def main_arms() -> str:
    names = ("GRPO standard", "GRPO tuned", "GRPO (A)", "Dr.GRPO (A)", "REINFORCE (A)", "CAPO", "Dr.CAPO", "ReinCAPO")
    names += ("GRPO (A), KL budget 3e-4, next learning rate", "GRPO (A), KL budget 1e-4")
    names += ("GRPO (A), KL budget 1e-4, predicted", "CAPO, KL budget 1e-4")
    fewer = {"fewer than GRPO standard": "fewer than standard", "fewer than GRPO tuned": "fewer than tuned"}
    return part("main", "methods", _METHODS | fewer, same(*names))


def regime() -> str:
    names = ["SGD, GRPO, lr 0.5", *(f"SGD, CAPO, lr 0.5, δ_F {bound}" for bound in ("10", "1", "1e-1", "1e-2"))]
    names += [f"64 completions, {method}, lr {each}" for each in ("5e-4", "1e-3") for method in ("GRPO", "CAPO")]
    names += [f"head only, GRPO, lr {each}" for each in ("2e-2", "5e-2")]
    names += [f"head only, CAPO, lr 5e-2, δ_F {bound}" for bound in ("1e-1", "1e-2", "1e-3")]
    names += ["head only, budget 1e-4, lr 5e-2"]
    columns = same("arm", "seeds") | {ACCURACY: "accuracy"} | same("collapsed", "out of bounds")
    return part("regime", "methods", columns, same(*names))


def extensions() -> str:
    beside = {
        "SGD, soft, δ_F 1": ("regime", "SGD, CAPO, lr 0.5, δ_F 1"),
        "SGD, soft, δ_F 10": ("regime", "SGD, CAPO, lr 0.5, δ_F 10"),
        "Adam, soft, δ_F 1e-4": ("thresholds", "CAPO, δ_F 1e-4, δ_H 1e-2"),
    }
    soft = {"SGD, soft, δ_F 1": "", "SGD, soft, δ_F 10": ""}
    penalties = {f"SGD, penalty {each}": "" for each in ("1e-2", "1e-1", "1")}
    adam = {"Adam, soft, δ_F 1e-4": ", δ_H 1e-2", "Adam, penalty 10": "", "Adam, penalty 100": ""}
    found = {row["arm"]: row for row in rows_of("extensions", "methods")}
    rows = []
    for name, more in (soft | penalties | adam).items():
        hard = ""
        if name in beside:
            bench, arm = beside[name]
            (row,) = (row for row in rows_of(bench, "methods") if row["arm"] == arm)
            hard = f"{row[ACCURACY]}, {row['collapsed']}"
        label = name.replace("SGD,", "SGD lr 0.5,").replace("Adam,", "Adam lr 5e-4,") + more
        rows.append([label, found[name]["seeds"], found[name][ACCURACY], found[name]["collapsed"], hard])
    return markdown(["in place of the mask", "seeds", "accuracy", "collapsed", "the hard mask at the same bound"], rows)


# docs/calibrate.md


def calibrated() -> str:
    measured = {row["arm"]: row for row in rows_of("calibrated", "methods")}
    by_hand = {row["arm"]: row for row in rows_of("main", "methods")}

    def bound(name: str) -> str:
        text = (RESULTS / "calibrated" / "thresholds" / f"{name}.yaml").read_text(encoding="utf-8")
        value = float(re.findall(r"^capo_fisher_threshold: (\S+)", text, re.MULTILINE)[0])
        return f"{value:,.0f}" if value >= 100 else f"{value:.1e}".replace("e-0", "e-")

    def line(label: str, threshold: str, row: dict[str, str]) -> list[str]:
        return [label, threshold, row[ACCURACY], row["collapsed"], row["out of bounds"] if threshold else ""]

    rows = [line("SGD lr 0.5, GRPO", "", measured["SGD, GRPO"]), line("SGD, by hand", "10", measured["SGD, by hand"])]
    for target, file in (("1 %", "sgd-1"), ("5 %", "sgd-5"), ("10 %", "sgd-10"), ("3e-4 nats", "sgd-kl")):
        rows.append(line(f"SGD, calibrated for {target}", bound(file), measured[f"SGD, {target}"]))
    for target, file in (("5 %", "sgd-5"), ("10 %", "sgd-10")):
        rows.append(line(f"SGD, adapting to {target}", f"from {bound(file)}", measured[f"SGD, adapting to {target}"]))
    rows.append(line("Adam lr 5e-4, GRPO (A)", "", by_hand["GRPO (A)"]))
    rows.append(line("Adam, by hand (CAPO)", "1e-3", by_hand["CAPO"]))
    for target, file in (("1 %", "adam-1"), ("5 %", "adam-5"), ("3e-4 nats", "adam-kl")):
        rows.append(line(f"Adam, calibrated for {target}", bound(file), measured[f"Adam, {target}"]))
    return markdown(["arm", "δ_F", "accuracy at the end", "collapsed", "out of bounds in the run"], rows)


# docs/monitor.md


def alarms(false_alarms: int) -> str:
    text = (RESULTS / "alarm" / "alarm.md").read_text(encoding="utf-8")
    evaluated = text.split(f"## Tuned to at most {false_alarms} per 1,000")[1].split("**Tuning")[0]
    return "\n".join(line for line in evaluated.splitlines() if line.startswith("|"))


def lower_lr() -> str:
    return (RESULTS / "alarm" / "lower_lr.md").read_text(encoding="utf-8").strip()


# docs/performance.md


def step() -> str:
    shown = {
        "CAPO, off": "CAPO, off",
        "CAPO, monitor": "CAPO, monitor, KL of every tenth step",
        "CAPO, mask, KL never measured": "CAPO, mask, KL never measured",
        "CAPO, mask": "CAPO, mask, KL of every tenth step",
        "CAPO, mask, KL of every step": "CAPO, mask, KL of every step",
    }
    found = [
        {row["mode"]: row["clock"] for row in read(f"step/{name}.json")["rows"]}
        for name in ("quickstart", "quickstart_logging_10", "smollm2_gsm8k_cpu")
    ]

    def cell(rows: dict[str, Any], mode: str) -> str:
        if mode not in rows:
            return ""
        each = rows[mode]["over TRL, each round"]
        return f"{rows[mode]['over TRL']:.2f} [{min(each):.2f}, {max(each):.2f}]"

    theirs = "TRL's GRPOTrainer"
    seconds = [f"{rows[theirs]['seconds a step, median']:.2f} s" for rows in found]
    return markdown(
        ["", "quickstart, every step logged", "quickstart, every tenth logged", "SmolLM2-135M, every step logged"],
        [
            ["TRL's step, median", *seconds],
            *([label, *(cell(rows, mode) for rows in found)] for mode, label in shown.items()),
        ],
    )


# docs/vllm.md


def vllm_lag() -> str:
    """Each arm of a server that lags, by method: means over the second half of its steps."""
    runs = [read(f"vllm/{path.name}") for path in (RESULTS / "vllm").glob("*.json")]

    def late(run: dict[str, Any], name: str, form: str) -> str:
        values = [
            value
            for value in run["by_step"].get(name, [])[-(len(run["by_step"]["reward"]) // 2) :]
            if value is not None
        ]
        return format(float(np.mean(values)), form) if values else ""

    rows = [
        [
            run["method"] if run["lag"] is None else "",
            "its own" if run["lag"] is None else f"a server, lag {run['lag']}",
            late(run, "reward", ".2f"),
            late(run, "capo/rejection_rate", ".3f"),
            late(run, "capo/share", ".2f"),
            late(run, "capo/kl/measured", ".1e").replace("e-0", "e-"),
            late(run, "sampling/sampling_logp_difference/mean", ".1e").replace("e-0", "e-"),
            late(run, "sampling/importance_sampling_ratio/mean", ".3f"),
        ]
        for run in sorted(runs, key=lambda run: (run["method"], -1 if run["lag"] is None else run["lag"]))
    ]
    columns = [
        "",
        "generation",
        "reward",
        "out of bounds",
        "ρ",
        "KL an update",
        "nats between the log π(a)",
        "mean ratio",
    ]
    return markdown(columns, rows)


# docs/doctor.md


@cache
def doctor() -> dict[str, Any]:
    """How often each of the doctor's figures moves in the testbed's runs, before a collapse if there is one."""
    dead, alive, nothing = 0, 0, 0
    spoke: dict[str, dict[str, int]] = {figure.title: {"dead": 0, "alive": 0, "first": 0} for figure in FIGURES}
    for path in RESULTS.glob("*/*/*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "reward" not in run.get("curves", ()):
            continue
        at = collapse(run)
        dead, alive, steps = dead + (at is not None), alive + (at is None), {}
        for figure in FIGURES:
            values = run["curves"].get(figure.names[0]) or []
            series = [(i, x) for i, x in enumerate(values[:at]) if x is not None]
            if (step := moved(series, figure.falls, figure.least)) is not None:
                steps[figure.title] = step
                spoke[figure.title]["alive" if at is None else "dead"] += 1
        if at is not None and steps:
            spoke[min(steps, key=lambda title: steps[title])]["first"] += 1
        nothing += at is not None and not steps
    return {"dead": dead, "alive": alive, "nothing": nothing, "spoke": spoke}


def doctor_figures() -> str:
    rows = [
        [title, *(str(count) for count in counts.values())]
        for title, counts in doctor()["spoke"].items()
        if title != "completion length"  # which benches do not keep
    ]
    return markdown(["figure", "moved before the collapse", "moved in a run that lives", "moved first"], rows)


def verl_trainer() -> str:
    """Quarters of the runs of verl's own trainer."""
    default, grpo = (read("verl/trainer.json")[arm]["by_step"] for arm in ("default", "GRPO"))
    rows = []
    for steps in np.array_split(range(len(default["step"])), 4):
        cells = [f"{default['step'][steps[0]]} to {default['step'][steps[-1]]}"]
        for run in (default, grpo):
            kl = finite([run["capo/kl/measured"][step] for step in steps])
            cells += [
                f"{np.mean([run['reward'][step] for step in steps]):.2f}",
                *(short(each) for each in (np.mean(kl), max(kl))),
                short(float(np.mean([run["capo/learning_rate"][step] for step in steps]))) if run is default else "",
            ]
        rows.append(cells[:-1])
    figures = ("reward", "KL of an update, mean", "largest", "learning rate")
    columns = ["steps", *(f"default: {name}" for name in figures), *(f"GRPO: {name}" for name in figures[:3])]
    return markdown(columns, rows)


TABLES: dict[str, Callable[[], str]] = {
    "what-it-does": what_it_does,
    "pretrained": pretrained,
    "pretrained-rates": pretrained_rates,
    "pretrained-tasks": pretrained_tasks,
    "pretrained-steps": pretrained_steps,
    "pretrained-rejected": pretrained_rejected,
    "pretrained-kinds": pretrained_kinds,
    "pretrained-parts": pretrained_parts,
    "scaling-seconds": scaling_seconds,
    "scaling-carried-on": scaling_carried_on,
    "range": range_,
    "schedules": schedules,
    "paper-sizes": paper_sizes,
    "everywhere": everywhere,
    "off-policy": off_policy,
    "off-policy-bounds": off_policy_bounds,
    "units": units,
    "main-lengths": main_lengths,
    "sharpness": sharpness,
    "choice": choice,
    "judgements": judgements,
    "lengths": lengths,
    "main": main_arms,
    "regime": regime,
    "extensions": extensions,
    "calibrated": calibrated,
    "alarms-1": lambda: alarms(1),
    "alarms-5": lambda: alarms(5),
    "lower-lr": lower_lr,
    "step": step,
    "verl-trainer": verl_trainer,
    "doctor": doctor_figures,
    "vllm-lag": vllm_lag,
    "theory-statements": lambda: theory(read("theory/checks.json")["Statements"]),
    "theory-theorem": lambda: theory(read("theory/checks.json")["Theorem 5.1"]),
    "theory-orders": lambda: theory(read("theory/checks.json")["Order of the error in ‖Δθ‖"]),
    "theory-counterexamples": lambda: theory(read("theory/checks.json")["Counterexamples"]),
    "theory-horizons": lambda: theory(read("theory/checks.json")["Horizons"]),
}


# Single numbers of the text


def _updates(name: str) -> list[list[float]]:
    return [finite(run["curves"]["capo/kl/measured"]) for run in arms("pretrained")[name]]


def _default_at_16() -> float:
    """The default's completions to the target over the rates at which the schedule is not the limit."""
    names = [name for name in arms("range") if name.startswith("default, lr ") and not name.endswith(" 1e-4")]
    return median_to_target("range", *names)


def _fewer(completions: float) -> str:
    return f"{median_to_target('paper_sizes', 'GRPO standard') / completions:.0f}"


NUMBERS: dict[str, Callable[[], str]] = {
    "pretrained/default/completions": lambda: f"{median_to_target('pretrained', 'default'):,.0f}",
    "pretrained/tuned/completions": lambda: f"{median_to_target('pretrained', 'GRPO tuned'):,.0f}",
    "pretrained/slower": lambda: (
        f"{median_to_target('pretrained', 'default') / median_to_target('pretrained', 'GRPO tuned'):.1f}"
    ),
    "pretrained/default/kl": lambda: short(float(np.mean([np.mean(each) for each in _updates("default")]))),
    "pretrained/default/largest": lambda: short(max(map(max, _updates("default")))),
    "pretrained/tuned/kl": lambda: short(float(np.mean([np.mean(each) for each in _updates("GRPO tuned")]))),
    "pretrained/points": lambda: str(len(points())),
    "fewer/REINFORCE": lambda: _fewer(median_to_target("main", "REINFORCE, default")),
    "fewer/96": lambda: _fewer(median_to_target("paper_sizes", "default")),
    "fewer/16": lambda: _fewer(_default_at_16()),
    "off-policy/default/dead": lambda: str(dead(off_policy_at(1e-2, default=True))),
    "off-policy/default/runs": lambda: str(len(off_policy_at(1e-2, default=True))),
    "off-policy/default/kl": lambda: away("default, lag 16"),
    "off-policy/GRPO/kl": lambda: away("GRPO, lag 16"),
    **{
        f"off-policy/lags/{method.replace(' ', '-')}": lambda method=method: str(dead(lagged(method)))
        for method in ("GRPO", "truncated", "masked", "TV mask", "rejected", "largest")
    },
    "off-policy/lags/runs": lambda: str(len(lagged("TV mask"))),
    "off-policy/3e-4/dead": lambda: str(dead(off_policy_at(3e-4))),
    "off-policy/3e-4/runs": lambda: str(len(off_policy_at(3e-4))),
    "off-policy/1e-3/dead": lambda: str(dead(off_policy_at(1e-3))),
    "off-policy/1e-3/runs": lambda: str(len(off_policy_at(1e-3))),
    "off-policy/1e-4/dead": lambda: str(dead(off_policy_at(1e-4))),
    "off-policy/1e-4/runs": lambda: str(len(off_policy_at(1e-4))),
    "doctor/dead": lambda: str(doctor()["dead"]),
    "doctor/alive": lambda: str(doctor()["alive"]),
    "doctor/nothing": lambda: str(doctor()["nothing"]),
    "verl/default": lambda: f"{read('verl/trainer.json')['default']['accuracy']:.2f}",
    "verl/GRPO": lambda: f"{read('verl/trainer.json')['GRPO']['accuracy']:.2f}",
    "verl/killed": lambda: str(read("verl/trainer.json")["default"]["killed_after"]),
    "verl/resumed": lambda: str(read("verl/trainer.json")["default"]["resumed_from"]),
    "verl/apart": lambda: short(
        max(max(read("verl/trainer.json")[arm]["by_step"]["rollout_probs_diff_max"]) for arm in ("default", "GRPO"))
    ),
    "sharpness/runs": lambda: str(read("sharpness.json")["runs"]),
    "sharpness/steps": lambda: f"{read('sharpness.json')['steps']:,}",
}
