"""`capo calibrate`: watch the first steps of a run, and choose its thresholds for a target that a user understands.

The steps are the recipe's own, in `capo_mode: monitor` and with its schedule, so that a learning rate that breaks the
run is reached as slowly as in training.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capo_rl.runs.plots import BLUE, GREEN, GREY, ORANGE
from capo_rl.runs.records import written_whole
from capo_rl.settings.recipe import read_recipe
from capo_rl.thresholds.choice import (
    CalibrationError,
    Choice,
    Step,
    as_yaml,
    choose_for_kl,
    choose_for_rate,
    fields_of,
    kl_lines,
)
from capo_rl.trainers.watching import watch

# What calibrating changes of a recipe: it watches, measures every update, and leaves nothing behind.
_WATCHING = {
    "capo_mode": "monitor",
    "capo_kl_every": 1,
    "capo_kl_sample": 1.0,
    "capo_kl_budget": "null",
    "capo_tokens_every": "null",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "push_to_hub": "false",
}


class Calibration(NamedTuple):
    """The text of the file that was written, and the seconds of watching (training steps alone) and of choosing."""

    text: str
    watching: float
    choosing: float


def calibrate(
    path: str,
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    rejection_rate: float | None = None,
    kl_nats: float | None = None,
    out: str = "thresholds.yaml",
) -> Calibration | None:
    """Watch a recipe's first steps and write thresholds for one target to `out`, and a picture beside it.

    `steps` is by default 3 % of the run's, at least 7 and at most 50. The text is the same for the same call.
    None in all processes but the main one.

    Raises `CalibrationError`, and what `recipe.read_recipe` and `train.make_trainer` raise.
    """
    if (rejection_rate is None) == (kl_nats is None):
        raise CalibrationError("give one target: --rejection-rate or --kl-nats")
    if rejection_rate is not None and not 0 < rejection_rate < 1:
        raise CalibrationError(f"--rejection-rate {rejection_rate} is a share of the tokens: give it between 0 and 1")
    if kl_nats is not None and not kl_nats > 0:
        raise CalibrationError(f"--kl-nats {kl_nats} must be above 0")
    asked = read_recipe(path, list(overrides)).training
    if asked.capo_mode == "off":
        raise CalibrationError("capo_mode: off looks at no token, so it has no thresholds: give --capo_mode mask")
    if asked.capo_granularity != "token":
        raise CalibrationError(
            f"capo_granularity: {asked.capo_granularity}: thresholds are found for tokens, whose shifts say little "
            "of a subset's: give --capo_granularity token"
        )
    with tempfile.TemporaryDirectory() as scratch:
        watching = [f"--{name}={value}" for name, value in (_WATCHING | {"output_dir": scratch}).items()]
        recipe = read_recipe(path, [*overrides, *watching])
        watched, total, seconds = watch(recipe, steps)
    if not watched:
        return None
    start = time.perf_counter()
    choice = (
        choose_for_rate(watched, asked.thresholds, rejection_rate)
        if rejection_rate is not None
        else choose_for_kl(watched, kl_nats or math.nan)
    )
    tokens = sum(len(step.m_f) for step in watched)
    target = (
        f"{rejection_rate:.3g} of the tokens out of bounds"
        if rejection_rate is not None
        else f"{kl_nats:.3g} nats an update"
    )
    heading = [
        f"capo calibrate {' '.join([path, *overrides])}",
        f"target: {target}, at the highest learning rate, {asked.learning_rate:.3g}",
        f"from {len(watched)} of {total} steps, {tokens:,} tokens, seed {asked.seed}",
    ]
    text = fragment(choice, heading)
    with written_whole(Path(out)) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    draw(watched, choice, Path(out).with_suffix(".png"), target, kl_nats)
    return Calibration(text, seconds, time.perf_counter() - start)


def fragment(choice: Choice, heading: Sequence[str]) -> str:
    """The choice as fields of a recipe, with what is known of it in comments."""
    if choice.budget is None:
        fields = {name: as_yaml(value) for name, value in fields_of(choice.thresholds).items()}
    else:
        fields = {"capo_mode": "trust_region", "capo_kl_budget": as_yaml(choice.budget)}
    lines = [f"# {line}" for line in [*heading, *choice.remarks]]
    for name, value in fields.items():
        ends = choice.intervals.get(name)
        about = f"  # 95 %: {as_yaml(ends[0])} to {as_yaml(ends[1])}" if ends else ""
        lines.append(f"{name}: {value}{about}")
    return "\n".join(lines) + "\n"


def draw(steps: Sequence[Step], choice: Choice, path: Path, target: str, kl_nats: float | None = None) -> None:
    """Left, the share of tokens above each shift, with the bounds; right, measured KL against batch m_F."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{target}: {sum(len(step.m_f) for step in steps):,} tokens of {len(steps)} steps")
    left, right = figure.subplots(1, 2)

    m_f, m_h = (np.concatenate([getattr(step, of) for step in steps]) for of in ("m_f", "m_h"))
    low, high = choice.thresholds.hessian or (None, None)
    for values, bound, colour, name in (
        (m_f, choice.thresholds.fisher, BLUE, "m_F (nats)"),
        (m_h[m_h > 0], high, GREEN, "m_H above 0"),
        (-m_h[m_h < 0], None if low is None else -low, ORANGE, "−m_H above 0"),
    ):
        ordered = np.sort(values[values > 0])[::-1]
        if len(ordered):
            left.plot(ordered, np.arange(1, len(ordered) + 1) / len(m_f), color=colour, label=name, linewidth=1.4)
        if bound is not None and math.isfinite(bound):
            left.axvline(bound, color=colour, linestyle="--", linewidth=1)
    largest = max(m_f.max(initial=0), np.abs(m_h).max(initial=0))
    left.set(title="share of the tokens above a shift; bounds dashed", xscale="log", yscale="log", xlabel="shift")
    left.set_xlim(1e-9 * largest, 10 * largest)

    points = [(step.batch_m_f, step.kl) for step in steps if step.batch_m_f > 0 and math.isfinite(step.kl)]
    if points:
        right.scatter(*zip(*points, strict=True), color=BLUE, s=18, label="an update")
    if (lines := kl_lines(steps)) is not None:
        free, one = lines
        ends = [shift for shift, _ in points] + ([] if kl_nats is None else [one.shift_for(kl_nats)])
        x = np.geomspace(min(ends), max(ends))
        y = np.array([one.kl(shift) for shift in x])
        right.fill_between(
            x, y / one.margin(0.975), y * one.margin(0.975), color=GREY, alpha=0.15, label="95 % of updates"
        )
        right.plot(x, y, color=GREY, label=f"slope 1, R² {one.r2:.2f}")
        right.plot(
            x,
            [free.kl(shift) for shift in x],
            color=GREY,
            linestyle=":",
            label=f"slope {free.slope:.2f}, R² {free.r2:.2f}",
        )
    if kl_nats is not None:
        right.axhline(kl_nats, color=ORANGE, linestyle="--", linewidth=1, label="target")
    right.set(title="KL of an update (nats a token)", xlabel="batch m_F (nats)", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
