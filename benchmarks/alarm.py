"""Tune and measure the alarm on the curves of runs that are already there; or train with it, to see what acting does.

    python benchmarks/alarm.py [--results results] [--out results/alarm]      no training, two minutes
    python benchmarks/alarm.py --act      GRPO in the aggressive regime, the learning rate lowered at each alarm

The first writes alarm.json and alarm.md; docs/monitor.md has the tables. The grid, the criterion, and which runs are
for tuning (seeds 1 to 3) and which for the evaluation (seeds 11 to 15) are the same for every signal. Runs that are
step for step those of another arm count once. The second writes lower_lr.json and lower_lr.md.

A collapse is that of `statistics.collapsed`, at the optimizer step of that index. The first alarm in the `HORIZON`
steps before it detects it, and the steps between are the lead. Stable steps are those of runs that did not collapse,
and those more than `HORIZON` before a collapse; an alarm there is false. After a collapse nothing counts.

The smoothed accuracy that defines a collapse is late by some seven steps, so an alarm may lead and still come when the
reward has gone. So it is also counted how many come before the fall: before the accuracy is below `FALL` of its best
for good. And a run that comes back has not collapsed, so an alarm in it is false: counted is how many of these runs
were hurt, their accuracy below half of its best at some step after the alarm.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from capo_rl.runs.records import versions, write_json
from capo_rl.statistics import collapsed, smooth, wilson_interval
from capo_rl.testbed.bench import read_results
from capo_rl.trainers.alarm import Alarm, AlarmCallback, Watch

TUNING, EVALUATION = ("learning_rate", "budget", "thresholds", "why", "regime"), ("main",)
HORIZON = 50  # optimizer steps: an alarm further ahead of a collapse did not foresee it
LEAD = 5  # the steps ahead that tuning asks for: below, nothing can be done any more
MOST_FALSE = (1.0, 5.0)  # alarms per 1,000 stable steps: the criterion, and a looser one to see what it costs
FALL = 0.9
GRID: dict[str, tuple[Any, ...]] = {
    "floor": (None, 0.5, 0.9, 0.99),  # quantiles of the signal over the stable steps of the tuning runs; none at all
    "window": (10, 20, 40),
    "factor": (1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0),
    "patience": (1, 2, 3, 5),
    "warmup": (5, 10),
}

M_F, TAIL = "capo/batch/m_f", "capo/token/m_f/q99"
# What the rows of the table watch, and how. A signal that falls is watched by its reciprocal, which rises.
RULES: dict[str, tuple[tuple[str, ...], str]] = {
    "batch m_F and its token tail": ((M_F, TAIL), "all"),
    "batch m_F or its token tail": ((M_F, TAIL), "any"),
    "batch m_F": ((M_F,), "any"),
    "token m_F, 99th percentile": ((TAIL,), "any"),
    "predicted KL": (("capo/kl/predicted",), "any"),
    "measured KL": (("capo/kl/measured",), "any"),
    "measured KL, no floor": (("capo/kl/measured",), "any"),
    "gradient norm": (("grad_norm",), "any"),
    "entropy, rising": (("entropy",), "any"),
    "entropy, falling": (("1/entropy",), "any"),
    "reward, falling": (("1/reward",), "any"),
}
SIGNALS = sorted({name for names, _ in RULES.values() for name in names})


@dataclass(frozen=True)
class Run:
    """A run's steps, its signals at each of them, the steps of its collapse and of the fall before it.

    `low` is the last step at which its smoothed accuracy is below half of its best so far.
    """

    steps: list[int]
    signals: dict[str, list[float | None]]
    collapse: int | None
    fall: int | None
    low: int | None

    @property
    def stable(self) -> int:
        """How many optimizer steps it has that no alarm should be raised in."""
        return self.steps[-1] if self.collapse is None else max(0, self.collapse - HORIZON - 1)


@dataclass(frozen=True)
class Outcome:
    """What a rule did on some runs."""

    leads: list[int]  # of the collapses that were detected
    before_fall: int  # of these
    collapses: int
    false: int
    stable: int  # steps
    alarmed: int  # of the runs that did not collapse, those with a false alarm
    hurt: int  # of these
    runs: int  # that did not collapse

    @property
    def rate(self) -> float:
        return 1000 * self.false / self.stable


def read_runs(results: Path, benches: Sequence[str]) -> list[Run]:
    """Every distinct run of some benches."""
    runs: list[tuple[list[Any], Run]] = []
    for bench in benches:
        for result in read_results(results / bench):
            curves = result["curves"]
            trace = [result["seed"], *zip(curves["reward"], curves["entropy"], curves["grad_norm"], strict=True)]
            if any(trace[: len(other)] == other[: len(trace)] for other, _ in runs):
                continue
            steps = [int(step) for step in curves["step"]]
            at, fall = collapsed(curves["reward"]), collapsed(curves["reward"], FALL)
            signals = {name: _signal(curves, name) for name in SIGNALS}
            ends = [None if each is None or at is None else steps[each] for each in (at, fall)]
            y = smooth(curves["reward"])
            low = [step for step, half in zip(steps, y < np.maximum.accumulate(y) / 2, strict=True) if half]
            runs.append((trace, Run(steps, signals, ends[0], ends[1], max(low, default=None))))
    return [run for _, run in runs]


def _signal(curves: dict[str, list[float | None]], name: str) -> list[float | None]:
    if not name.startswith("1/"):
        return curves[name]
    return [None if x is None else 1 / x if x else math.inf for x in curves[name.removeprefix("1/")]]


Ratios = list[list[tuple[int, dict[str, float]]]]  # of each run, at each of its observations, with the step


def ratios(alarm: Alarm, runs: Sequence[Run]) -> Ratios:
    """What the rule compares with its factor, up to the collapse; neither factor nor patience is part of it."""
    found = []
    for run in runs:
        watch = Watch(alarm)
        steps = [(t, step) for t, step in enumerate(run.steps) if run.collapse is None or step < run.collapse]
        series = [(step, watch.ratios({name: run.signals[name][t] for name in alarm.signals})) for t, step in steps]
        found.append([(step, observed) for step, observed in series if observed])
    return found


def outcome(alarm: Alarm, runs: Sequence[Run], found: Ratios) -> Outcome:
    """Apply the rule to every run, given its ratios."""
    leads, before_fall, false, alarmed, hurt = [], 0, 0, 0, 0
    for run, series in zip(runs, found, strict=True):
        watch = Watch(alarm)
        raised = [step for step, observed in series if watch.decide(observed)]
        if run.collapse is None or run.fall is None:
            false += len(raised)
            alarmed += bool(raised)
            hurt += bool(raised) and run.low is not None and run.low >= raised[0]
            continue
        ahead = [step for step in raised if run.collapse - step <= HORIZON]
        false += len(raised) - len(ahead)
        if ahead:
            leads.append(run.collapse - ahead[0])
            before_fall += ahead[0] < run.fall
    stable = sum(run.collapse is None for run in runs)
    steps = sum(run.stable for run in runs)
    return Outcome(leads, before_fall, len(runs) - stable, false, steps, alarmed, hurt, stable)


def tune(
    names: tuple[str, ...], combine: str, floors: Sequence[float | None], runs: Sequence[Run]
) -> dict[float, tuple[Alarm, Outcome]]:
    """For each bound on false alarms the cell of the grid that detects most collapses `LEAD` steps ahead.

    Ties: the longer median lead, then fewer false alarms, then the earlier cell.
    """
    best: dict[float, tuple[tuple[float, ...], Alarm, Outcome]] = {}
    for floor, window, warmup in product(floors, GRID["window"], GRID["warmup"]):
        signals = {name: 0.0 if floor is None else level(name, floor, runs) for name in names}
        shared = Alarm(signals, combine, window=window, warmup=warmup, patience=1)
        found = ratios(shared, runs)
        for factor, patience in product(GRID["factor"], GRID["patience"]):
            alarm = replace(shared, factor=factor, patience=patience)
            result = outcome(alarm, runs, found)
            in_time = sum(lead >= LEAD for lead in result.leads)
            score = (in_time, float(np.median(result.leads)) if result.leads else 0.0, -result.rate)
            for most in MOST_FALSE:
                if result.rate <= most and (most not in best or score > best[most][0]):
                    best[most] = score, alarm, result
    return {most: (alarm, result) for most, (_, alarm, result) in best.items()}


def level(name: str, quantile: float, runs: Sequence[Run]) -> float:
    """A quantile of a signal over the stable steps of runs, to two digits."""
    values = [
        x
        for run in runs
        for step, x in zip(run.steps, run.signals[name], strict=True)
        if x is not None and 0 < x < math.inf and step <= run.stable
    ]
    return float(f"{np.quantile(values, quantile):.2g}")


def poisson_interval(count: int, level: float = 0.95) -> tuple[float, float]:
    """Garwood's exact interval of a Poisson mean, given one count: its low and high end.

    The ends are the means under which so many, or so few, have a chance of (1 − level)/2.

    >>> [round(end, 3) for end in poisson_interval(0)], [round(end, 3) for end in poisson_interval(5)]
    ([0.0, 3.689], [1.623, 11.668])
    """
    tail = (1 - level) / 2

    def at_most(k: int, mean: float) -> float:
        return sum(math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(k + 1)) if mean else 1.0

    def solve(too_low: Callable[[float], bool]) -> float:
        low, high = 0.0, 10.0 + 4 * count
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return low

    lower = solve(lambda mean: 1 - at_most(count - 1, mean) < tail) if count else 0.0
    return lower, solve(lambda mean: at_most(count, mean) > tail)


def described(result: Outcome) -> dict[str, Any]:
    """The outcome in numbers, with 95 % intervals that take runs and alarms as independent."""
    in_time = sum(lead >= LEAD for lead in result.leads)
    low, high = poisson_interval(result.false)
    return {
        "collapses": result.collapses,
        "detected": len(result.leads),
        "in_time": in_time,
        "in_time_interval": wilson_interval(in_time / result.collapses, result.collapses),
        "before_fall": result.before_fall,
        "lead_quartiles": np.quantile(result.leads, [0.25, 0.5, 0.75]).tolist() if result.leads else None,
        "false": result.false,
        "stable_steps": result.stable,
        "false_per_1000": result.rate,
        "false_per_1000_interval": (1000 * low / result.stable, 1000 * high / result.stable),
        "stable_runs": result.runs,
        "stable_runs_alarmed": result.alarmed,
        "of_these_hurt": result.hurt,
    }


def table(rows: dict[str, dict[str, Any]], which: str) -> list[str]:
    """One set of runs as a Markdown table."""
    some = next(iter(rows.values()))[which]
    collapses, runs, stable = some["collapses"], some["stable_runs"], some["stable_steps"]
    lines = [
        f"| signal | {LEAD} steps ahead or more, of {collapses} [95 %] | any lead | before the fall "
        f"| lead: median (quartiles) | false alarms in {stable:,} stable steps | per 1,000 [95 %] "
        f"| stable runs alarmed, of {runs} (of these hurt) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        of = row[which]
        low, high = of["in_time_interval"]
        quartiles = of["lead_quartiles"]
        lead = "–" if quartiles is None else "{1:.0f} ({0:.0f} to {2:.0f})".format(*quartiles)
        few, many = of["false_per_1000_interval"]
        lines.append(
            f"| {name} | {of['in_time']} [{low:.0%}, {high:.0%}] | {of['detected']} | {of['before_fall']} | {lead} "
            f"| {of['false']} | {of['false_per_1000']:.2f} [{few:.2f}, {many:.2f}] "
            f"| {of['stable_runs_alarmed']} ({of['of_these_hurt']}) |"
        )
    return lines


def settings(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What tuning chose."""
    lines = ["| signal | floor | factor | window | patience | warm-up |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        rule = row["alarm"]
        floors = ", ".join(f"{floor:g}" if floor else "none" for floor in rule["signals"].values())
        lines.append(
            f"| {name} | {floors} | "
            + " | ".join(f"{rule[x]:g}" for x in ("factor", "window", "patience", "warmup"))
            + " |"
        )
    return lines


def act(results: Path, out: Path) -> None:
    """Train `GRPO (A)` of the main comparison again, the learning rate lowered at each alarm; finished runs are kept.

    The rules are those that tuning chose for the measured KL, by the first part of this script.
    """
    chosen = json.loads((out / "alarm.json").read_text())["at_most_false_per_1000"]
    without = {run["seed"]: run["curves"] for run in read_results(results / "main") if run["arm"] == "GRPO (A)"}
    path = out / "lower_lr.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    torch.set_num_threads(1)
    for most, seed in tqdm(list(product(chosen, sorted(without))), desc="lower_lr"):
        if str(seed) not in runs.setdefault(most, {}):
            runs[most][str(seed)] = _train(Alarm(**chosen[most]["measured KL"]["alarm"]), seed)
            write_json(path, {"versions": versions(), "runs": runs}, indent=None)
    lines = [
        "| seed | without: collapse | accuracy at the end "
        + "".join(f"| at most {most} per 1,000: alarms | collapse | accuracy at the end " for most in chosen)
        + "|",
        "|---|---|---" + "|---|---|---" * len(chosen) + "|",
    ]
    for seed, before in sorted(without.items()):
        cells = [str(seed), *_end(before)]
        for most in chosen:
            run = runs[most][str(seed)]
            alarms = [f"{step:.0f}" for step, raised in zip(run["step"], run["capo/alarm"], strict=True) if raised]
            cells += [", ".join(alarms) or "–", *_end(run)]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "lower_lr.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(*lines, sep="\n")


def _train(alarm: Alarm, seed: int) -> dict[str, list[float | None]]:
    """The curves of one run in the aggressive regime that lowers its learning rate at each alarm."""
    from capo_rl.settings.recipe import read_recipe
    from capo_rl.trainers.train import make_trainer

    with tempfile.TemporaryDirectory() as folder:
        asked = {"seed": seed, "learning_rate": 5e-4, "output_dir": folder, "save_strategy": "no"}
        options = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
        trainer, _ = make_trainer(read_recipe("experiments/recipe.yaml", options))
        AlarmCallback(alarm, ("lower_lr",)).attach(trainer)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    names = ("step", "reward", "entropy", "capo/kl/measured", "capo/alarm", "learning_rate")
    return {name: [_short(entry.get(name)) for entry in entries] for name in names}


def _short(value: float | None) -> float | None:
    """Four digits, as in the other results."""
    return None if value is None else float(f"{value:.4g}")


def _end(curves: dict[str, list[float | None]]) -> tuple[str, str]:
    """The step of the collapse, and the smoothed accuracy at the end."""
    at = collapsed(curves["reward"])
    return "–" if at is None else f"{curves['step'][at]:.0f}", f"{smooth(curves['reward'])[-1]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("results/alarm"))
    parser.add_argument("--act", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.act:
        act(options.results, options.out)
        return
    sets = {"tuning": read_runs(options.results, TUNING), "evaluation": read_runs(options.results, EVALUATION)}
    found: dict[float, dict[str, dict[str, Any]]] = {most: {} for most in MOST_FALSE}
    for name, (names, combine) in tqdm(RULES.items(), desc="tuning"):
        floors = (None,) if name.endswith("no floor") else GRID["floor"]
        for most, (alarm, tuned) in tune(names, combine, floors, sets["tuning"]).items():
            evaluated = outcome(alarm, sets["evaluation"], ratios(alarm, sets["evaluation"]))
            found[most][name] = {
                "alarm": asdict(alarm),
                "tuning": described(tuned),
                "evaluation": described(evaluated),
            }
    lines = ["# The alarm, measured", "", "Written by benchmarks/alarm.py; docs/monitor.md says how to read it."]
    for most, rows in found.items():
        lines += ["", f"## Tuned to at most {most:g} per 1,000 stable steps"]
        for title, some in (
            ("Evaluation: `results/main`, seeds 11 to 15", table(rows, "evaluation")),
            ("Tuning: the other benches, seeds 1 to 3", table(rows, "tuning")),
            ("What tuning chose", settings(rows)),
        ):
            lines += ["", f"**{title}**", "", *some]
    write_json(
        options.out / "alarm.json",
        {
            "grid": GRID,
            "horizon": HORIZON,
            "lead": LEAD,
            "fall": FALL,
            "benches": {"tuning": TUNING, "evaluation": EVALUATION},
            "at_most_false_per_1000": {f"{most:g}": rows for most, rows in found.items()},
        },
    )
    (options.out / "alarm.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
