"""What an evaluation comes to: accuracies with intervals, pass@k and counts, and how far it is above another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capo_rl.evaluation.benchmarks import BENCHMARKS
from capo_rl.evaluation.folder import Evaluation, EvaluationError, Line
from capo_rl.rewards.grading import TIMED_OUT
from capo_rl.statistics import (
    bootstrap_interval,
    paired_bootstrap,
    pass_at_k,
    probability_above_zero,
    wilson_interval,
)


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of each benchmark, and the mean of their accuracies.

    accuracy     the mean over problems of the share of right samples, which is pass@1, and Wilson's 95 % interval; that
                 of the mean adds the squares of their halves (Zou and Donner 2008, "MOVER")
    pass@k       for k = 1, 2, 4, ... up to the number of samples
    tokens       per completion
    truncated    completions; so are timed_out and ungraded, time-outs among them, and none of those counts as right
    test         whether the mean is the paper's TEST: of all problems of all eight benchmarks
    """
    rows = {name: _figures(lines) for name, lines in evaluation.items()}
    counts = {name: {benchmark.count, benchmark.folder_count} for name, benchmark in BENCHMARKS.items()}
    whole = rows.keys() == counts.keys() and all(rows[name]["problems"] in counts[name] for name in rows)
    mean = float(np.mean([row["accuracy"] for row in rows.values()]))
    below = math.hypot(*(row["accuracy"] - row["low"] for row in rows.values())) / len(rows)
    above = math.hypot(*(row["high"] - row["accuracy"] for row in rows.values())) / len(rows)
    return {"benchmarks": rows, "mean": {"accuracy": mean, "low": mean - below, "high": mean + above, "test": whole}}


def _figures(lines: Sequence[Line]) -> dict[str, Any]:
    answers = [answer for line in lines for answer in line["completions"]]
    samples = min(len(line["completions"]) for line in lines)
    accuracy = float(np.mean(_accuracies(lines)))
    low, high = wilson_interval(accuracy, len(lines))
    counts = [(len(line["completions"]), sum(map(is_right, line["completions"]))) for line in lines]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return {
        "problems": len(lines),
        "samples": samples,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "pass@k": {str(k): float(np.mean([pass_at_k(n, c, k) for n, c in counts])) for k in ks},
        "tokens": float(np.mean([answer["tokens"] for answer in answers])),
        "truncated": sum(answer["truncated"] for answer in answers),
        "timed_out": sum(answer["reason"] == TIMED_OUT for answer in answers),
        "ungraded": sum(answer["correct"] is None for answer in answers),
    }


@dataclass(frozen=True)
class Difference:
    """How far one evaluation is above another on the problems of both, from a paired bootstrap over these.

    above      the probability that the difference is above zero
    problems   how many both have; apart: how many only one of them has
    """

    name: str
    difference: float
    low: float
    high: float
    above: float
    problems: int
    apart: int


def compare(evaluation: Evaluation, baseline: Evaluation) -> list[Difference]:
    """The differences in accuracy, evaluation less baseline, of each benchmark that both have, and of their mean.

    Raises `EvaluationError` if they have no problem in common.
    """
    differences, groups = [], []
    for name in (name for name in evaluation if name in baseline):
        ours, theirs = (
            dict(zip((line["id"] for line in lines), _accuracies(lines), strict=True))
            for lines in (evaluation[name], baseline[name])
        )
        both = sorted(ours.keys() & theirs.keys())
        if both:
            a, b = [ours[id] for id in both], [theirs[id] for id in both]
            groups.append([x - y for x, y in zip(a, b, strict=True)])
            above = probability_above_zero(groups[-1:])
            apart = len(ours.keys() ^ theirs.keys())
            differences.append(Difference(name, *paired_bootstrap(a, b), above, len(both), apart))
    if not groups:
        raise EvaluationError("the two evaluations have no problem in common")
    if len(groups) > 1:
        mean = _mean_of_means(groups)
        ends = bootstrap_interval(groups, mean)
        problems, apart = sum(d.problems for d in differences), sum(d.apart for d in differences)
        value = mean(np.concatenate(groups))
        differences.append(Difference("mean", value, *ends, probability_above_zero(groups, mean), problems, apart))
    return differences


def _mean_of_means(groups: Sequence[Sequence[float]]) -> Any:
    """The statistic that weighs groups, not values, alike: for the bootstrap, which draws them one after the other."""
    weights = np.concatenate([np.full(len(group), 1 / len(group) / len(groups)) for group in groups])
    return lambda values: float(values @ weights)


def _accuracies(lines: Sequence[Line]) -> list[float]:
    return [float(np.mean([is_right(answer) for answer in line["completions"]])) for line in lines]


def is_right(answer: Mapping[str, Any]) -> bool:
    """Whether a completion is right; one that can't be graded is not."""
    return answer["correct"] is True
