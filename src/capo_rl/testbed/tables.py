"""The paper's tables, and those beyond it, written from the results of `capo bench` as Markdown and as JSON.

Each is a function of the results by arm; `TABLES` names them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capo_rl.planning.defaults import KL_BUDGET
from capo_rl.statistics import (
    CompletionsToTarget,
    bootstrap_interval,
    completions_to_target,
    interval_to_target,
    iqm,
    mean_and_error,
    spearman,
)
from capo_rl.testbed.arms import (
    BUDGETS,
    LENGTHS,
    MAIN,
    STANDARD,
    TARGET,
    TUNED,
    Arms,
    Runs,
    by_rate,
    collapse,
    final_accuracy,
    finite,
    pairs_of,
    reached,
    usable_range,
)


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
    target = {name: completions_to_target(*reached(runs)) for name, runs in arms.items()}
    first = {name: at for at, name in enumerate((*MAIN, *LENGTHS, *BUDGETS))}
    rows = []
    for name, runs in sorted(arms.items(), key=lambda arm: (first.get(arm[0], len(first)), arm[0])):
        final = [final_accuracy(run) for run in runs]
        test = [run["test"]["accuracy"][-1] for run in runs if run["test"]["accuracy"]]
        low, high = bootstrap_interval([final])
        rejected = [np.mean(rates) for run in runs if (rates := finite(run["curves"]["capo/rejection_rate"]))]
        rows.append(
            [
                name,
                str(len(runs)),
                _plus_minus(final),
                f"{iqm(final):.3f} [{low:.3f}, {high:.3f}]" if len(final) > 1 else f"{iqm(final):.3f}",
                _plus_minus(test) if test else "–",
                f"{sum(collapse(run) is not None for run in runs)}/{len(runs)}",
                f"{target[name]}{_range(*interval_to_target(*reached(runs)))}",
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
        kl = [finite(run["curves"]["capo/kl/measured"]) for run in runs]
        rows.append(
            [
                name,
                str(len(runs)),
                f"{sum(collapse(run) is not None for run in runs)}/{len(runs)}",
                _plus_minus([final_accuracy(run) for run in runs]),
                _plus_minus([run["test"]["accuracy"][-1] for run in runs]),
                str(completions_to_target(*reached(runs))),
                f"{np.median([each[0] for each in perplexity]):.3g} → {np.median(after):.3g} "
                f"({min(after):.3g} to {max(after):.3g})",
                f"{np.median([np.median(each) for each in kl]):.2g}",
                f"{max(map(max, kl)):.2g}",
                f"{np.mean([np.mean(finite(run['curves']['capo/rejection_rate'])[:10]) for run in runs]):.0%}",
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
    methods = by_rate(arms)
    if not methods:
        return None
    rows = []
    for method, rates in methods.items():
        final = {rate: [final_accuracy(run) for run in runs] for rate, runs in rates.items()}
        usable = usable_range(final)
        for rate, runs in rates.items():
            rows.append(
                [
                    method,
                    f"{rate:g}" + (" ✓" if usable and usable[0] <= rate <= usable[1] else ""),
                    str(len(runs)),
                    _plus_minus(final[rate]),
                    f"{min(final[rate]):.3f}",
                    f"{sum(collapse(run) is not None for run in runs)}/{len(runs)}",
                    str(completions_to_target(*reached(runs))),
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
        final = {each: [final_accuracy(run) for run in arms[each]] for each in (name, *rivals)}
        dead = {each: sum(collapse(run) is not None for run in arms[each]) for each in final}
        best = max(rivals, key=lambda each: float(np.mean(final[each])))
        rows.append(
            [
                setting,
                _plus_minus(final[name]),
                f"{min(final[name]):.3f}",
                f"{dead[name]}/{len(final[name])}",
                str(completions_to_target(*reached(arms[name]))),
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


def _off_policy_table(arms: Arms, path: Path) -> Path | None:
    """Each method in each setting, of arms `METHOD, lag STEPS` and `METHOD, USES uses`, with or without `, lr RATE`."""

    def figures(name: str, figure: str) -> list[float]:
        return [value for run in arms[name] for value in finite(run["curves"].get(f"off_policy/{figure}", []))]

    if not any(figures(name, "kl") for name in arms):
        return None
    rows = []
    for name in arms:
        if (parts := re.fullmatch(r"(.+?), (lag \d+|\d+ uses)(, lr .+)?", name)) is None:
            continue
        away, rejected = figures(name, "kl"), figures(name, "rejected")
        final = [final_accuracy(run) for run in arms[name]]
        rows.append(
            [
                parts[2],
                parts[1],
                f"{float(arms[name][0]['settings'].get('learning_rate', 0)):g}",
                str(len(final)),
                _plus_minus(final),
                f"{min(final):.3f}",
                f"{sum(collapse(run) is not None for run in arms[name])}/{len(final)}",
                str(completions_to_target(*reached(arms[name]))),
                f"{np.median(away):.1e}" if away else "–",
                f"{max(away):.1e}" if away else "–",
                f"{np.mean(rejected):.2%}" if rejected and away else "–",
            ]
        )
    rows.sort(key=lambda row: ("uses" in row[0], int(re.findall(r"\d+", row[0])[0])))
    return _write(
        path,
        "Completions of another policy: every method in every setting",
        [
            "setting",
            "method",
            "learning rate",
            "seeds",
            "accuracy, mean ± s.e.",
            "worst seed",
            "collapsed",
            f"completions to {TARGET}",
            "KL of the policy from its sampler, median",
            "largest",
            "tokens rejected",
        ],
        rows,
        "KL(sampler ‖ policy) of each batch's tokens when it is sampled. The rejected share is known under a lag "
        "alone: of completions that are used again the results have the first use, when the policy is the sampler.",
    )


def _over_budget(runs: Runs) -> tuple[str, str]:
    """The share of the updates above twice the budget, and the largest over it, by what was measured on all tokens."""
    found = [kl for run in runs for kl in finite(run["curves"].get("capo/kl/whole", []))]
    if not found:
        return "–", "–"
    budget = float(runs[0]["settings"].get("capo_kl_budget") or KL_BUDGET)
    over = np.array(found) / budget
    return f"{np.mean(over > 2):.2%}", f"{over.max():.2f}"


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
        within = [float(np.mean(finite(run["curves"]["capo/kl/rank_correlation"]))) for run in arms[name]]
        rows.append([name, *(_plus_minus(values) for values in (across["token"], across["batch"], within))])
    return _write(
        path,
        "Table 5: Spearman's correlation of m_F with the measured KL of the update",
        ["arm", "mean token m_F, over steps", "batch m_F, over steps", "m_F of each token, within a step"],
        rows,
        "Mean ± s.e. over seeds. The paper reports 0.622 and 0.596 for GRPO, 0.459 and 0.498 for CAPO.",
    )


def _across_steps(run: dict[str, Any], column: str) -> float:
    return spearman(*zip(*pairs_of(run, column, "capo/kl/measured"), strict=True))


def _plus_minus(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}" if len(values) > 1 else f"{mean:.3f}"


TABLES: dict[str, Callable[[Arms, Path], Path | None]] = {
    "methods": _methods,
    "range": _range_table,
    "everywhere": _everywhere_table,
    "off_policy": _off_policy_table,
    "language": _language_table,
    "table1": _table1,
    "table5": _table5,
}
