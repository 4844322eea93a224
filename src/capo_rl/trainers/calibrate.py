"""`capo calibrate`: watch the first steps of a run, and choose its thresholds for a target that a user understands.

The steps are the recipe's own, in `capo_mode: monitor` and with its schedule, so that a learning rate that breaks the
run is reached as slowly as in training. Everything is then stated at the schedule's highest learning rate α*: a token's
planned step is proportional to α, so with ρ = α*/α

    m_F → ρ² m_F        m_H → A (ρ s + ½ ρ² (s² − c))        KL → ρ² KL

exactly for the shifts (Eq. 58, 63), to second order for the measured KL.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from capo_rl.curvature.selection import Thresholds
from capo_rl.curvature.step import AdamStep
from capo_rl.planning.planner import MicroBatch
from capo_rl.runs.plots import BLUE, GREEN, GREY, ORANGE
from capo_rl.runs.progress import Progress
from capo_rl.runs.records import written_whole
from capo_rl.settings.recipe import Recipe, read_recipe
from capo_rl.thresholds.kl_regression import Regression, regress
from capo_rl.thresholds.rejection_rate import bootstrap, factors_at, interval, rejected, scaled, severity

Array = NDArray[np.float64]

SHARE, FEWEST, MOST = 0.03, 7, 50  # steps: of the run, and the bounds that win over it
_EXPLAINS = 0.5  # the R², with slope one, below which a bound on m_F is not trusted to hold a KL
_ROUNDING = 1e-10  # nats: a measured KL below this is rounding

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


class CalibrationError(ValueError):
    """A recipe or a target for which no thresholds can be found; the message names the reason and the fix."""


@dataclass(frozen=True)
class Step:
    """A watched update, at α*: m_F and m_H [n] of its tokens, their batch m_F and measured KL, in nats."""

    m_f: Array
    m_h: Array
    batch_m_f: float
    kl: float


@dataclass(frozen=True)
class Choice:
    """Thresholds for a target, and what is known of them; `budget` is what to use where they won't do, in nats.

    intervals: 95 % of each bound, by the name of its field; remarks: lines for whoever reads the file.
    """

    thresholds: Thresholds
    intervals: dict[str, tuple[float, float]]
    remarks: list[str] = field(default_factory=list)
    budget: float | None = None


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


def watch(recipe: Recipe, steps: int | None = None) -> tuple[list[Step], int, float]:
    """Run a recipe's first steps; returns those that count, how many the whole run has, and the seconds they took.

    A step with a learning rate of zero doesn't count, nor does Adam's first, whose moments are empty. In processes but
    the main one none does.

    Raises `CalibrationError` where nothing can be learnt from the steps.
    """
    from capo_rl.trainers.train import make_trainer

    trainer, _ = make_trainer(recipe)
    watcher = _Watch(trainer, steps)
    trainer.add_callback(watcher)
    seconds = trainer.train().metrics["train_runtime"]
    if not trainer.is_world_process_zero():
        return [], watcher.total, seconds
    if not watcher.seen:
        raise CalibrationError(
            f"the learning rate was 0 in all of the {watcher.steps} steps, or they were Adam's first, so nothing "
            "moved: raise --steps beyond the start of the warm-up"
        )
    if not any(step.m_f.any() for step in watcher.seen):
        raise CalibrationError(
            f"every shift in {watcher.steps} steps is 0: all completions of a group got the same reward, so no "
            "advantage differs from 0; raise --steps, or train on problems that are solved sometimes"
        )
    return watcher.seen, watcher.total, seconds


def default_steps(total: int) -> int:
    """How many steps to watch of a run of `total`: 3 % of them, at least 7 and at most 50.

    A watched step takes longer than one of the run, since its KL is measured, and all of them are to take 5 % of it.
    Six steps that count are the fewest that hold a 95 % interval, and a first that doesn't comes before them; an
    interval narrows with the root of their number, while the policy moves on.

    >>> [default_steps(total) for total in (100, 300, 5000)]
    [7, 9, 50]
    """
    return min(MOST, max(FEWEST, int(SHARE * total)), total)


class _Watch(TrainerCallback):
    """Keeps what the planner knows of every step, and stops the run after the last that is to be watched."""

    def __init__(self, trainer: Any, steps: int | None) -> None:
        self.trainer, self.asked = trainer, steps
        self.steps, self.total = 0, 0
        self.seen: list[Step] = []
        self.tokens: list[MicroBatch] = []
        self.lr = 0.0
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.total = state.max_steps
        self.steps = default_steps(self.total) if self.asked is None else self.asked
        adam = isinstance(self.trainer.planner.step, AdamStep)
        fewest = FEWEST if adam else FEWEST - 1  # Adam's first does not count
        if self.total < fewest:
            raise CalibrationError(
                f"the run has {self.total} steps, and thresholds take at least {fewest}: give a larger --max_steps"
            )
        if not fewest <= self.steps <= self.total:
            raise CalibrationError(
                f"--steps {self.steps}: thresholds take at least {fewest}, and the run has {self.total}; give {fewest} "
                f"to {self.total}"
            )
        if state.is_world_process_zero:
            self.progress = Progress(self.steps, "calibrate", "step", shown=not args.disable_tqdm)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.tokens, self.lr = self.trainer.planner.micro_batches, self.trainer.planner.step.lr

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.update(state.global_step)
        control.should_training_stop |= state.global_step >= self.steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        cold = isinstance(self.trainer.planner.step, AdamStep) and state.global_step == 1
        if self.tokens and self.lr > 0 and not cold and logs and "capo/kl/measured" in logs:
            scale = args.learning_rate / self.lr
            m_f, m_h = at_scale(self.tokens, scale, args.capo_fisher)
            batch_m_f, kl = (scale**2 * logs[name] for name in ("capo/batch/m_f", "capo/kl/measured"))
            # what is lost in rounding says nothing of KL
            kl = kl if logs["capo/kl/measured"] > _ROUNDING else math.nan
            self.seen.append(Step(m_f, m_h, batch_m_f, kl))
        self.tokens = []

    def on_train_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.close()


def at_scale(tokens: Sequence[MicroBatch], scale: float, fisher: str = "sampled") -> tuple[Array, Array]:
    """m_F and m_H [n] of a step's tokens had the learning rate been `scale` times what it was; finite ones only."""

    def column(values: Sequence[Any]) -> Array:
        return np.concatenate([value.double().cpu().numpy() for value in values])

    s, c = (column([getattr(batch.shifts, of) for batch in tokens]) for of in ("s", "c"))
    advantages = column([batch.advantages for batch in tokens])
    with np.errstate(invalid="ignore", over="ignore"):
        s, c = scale * s, scale**2 * c
        m_f, m_h = 0.5 * (s**2 if fisher == "sampled" else c), advantages * (s + 0.5 * (s**2 - c))
    finite = np.isfinite(m_f) & np.isfinite(m_h)
    return m_f[finite], m_h[finite]


# ---- from steps to thresholds ---------------------------------------------------------------------------------------


def choose_for_rate(steps: Sequence[Step], thresholds: Thresholds, rate: float) -> Choice:
    """The bounds that reject `rate` of the tokens, each criterion alone as many as the other; open sides stay open.

    Raises `CalibrationError` for too few steps, no bound, or a rate that more tokens would have to have a shift for.
    """
    try:
        by_step = [severity(step.m_f, step.m_h, thresholds) for step in steps]
        drawn, rates = bootstrap(by_step, rate)
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    pooled = np.concatenate(by_step, axis=1)
    factors = factors_at(pooled, rate)
    if not factors.all():
        shifted = float((pooled[factors.argmin()] > 0).mean())
        raise CalibrationError(
            f"--rejection-rate {rate:.3g}: a bound would have to be 0, since only {shifted:.3g} of the tokens have a "
            "shift on its side: ask for less, or leave that bound open (null)"
        )
    chosen = scaled(thresholds, factors)
    low, high = (scaled(thresholds, end) for end in interval(drawn, len(steps)))
    at, (least, most) = float(np.median(rates)), np.quantile(rates, (0.025, 0.975))
    return Choice(
        chosen,
        _between(low, high),
        [
            f"these steps have {rejected(pooled, factors):.2%} out of bounds; steps that bounds were not chosen on "
            f"{at:.2%} [{least:.2%}, {most:.2%}]",
            *_about_kl(steps),
        ],
    )


def choose_for_kl(steps: Sequence[Step], kl: float) -> Choice:
    """The bound on m_F that holds updates to `kl` nats, by a regression of measured KL on batch m_F with slope one.

    m* is the batch m_F up to which the next update stays below `kl` with probability 0.95. δ_F is the largest bound at
    which no watched step's accepted tokens have a batch m_F above m*, where a step's batch m_F is taken to shrink as
    the mean m_F of its tokens does when some are left out. m_H says nothing of KL, so its bounds are open.

    Where m_F explains less than half of log KL (R² with slope one), no bound on it holds a KL: the choice is then a
    budget for the measured KL, and the bound is only a remark.

    Raises `CalibrationError` for too few steps, or a target that no bound holds.
    """
    if len(steps) < FEWEST - 1:
        raise CalibrationError(f"{len(steps)} steps count: intervals of 95 % need {FEWEST - 1}; raise --steps")
    try:
        line = regress([step.batch_m_f for step in steps], [step.kl for step in steps], slope=1.0)
    except ValueError as error:
        raise CalibrationError(f"{error} (--steps)") from error
    bound = fisher_bound(steps, line.shift_for(kl))
    interval = _bound_interval(steps, kl)
    tokens = np.concatenate([step.m_f for step in steps])
    remarks = _about_kl(steps)
    if line.r2 < _EXPLAINS:
        remarks.append(
            f"m_F explains too little of KL here for a bound on it to hold one (R² {line.r2:.2f} with slope 1, below "
            f"{_EXPLAINS}): use a budget for the measured KL. By the regression δ_F would be "
            f"{_number(bound)} [{_number(interval[0])}, {_number(interval[1])}]"
        )
        return Choice(Thresholds(None, (None, None)), {}, remarks, budget=kl)
    if not bound:
        raise CalibrationError(
            f"--kl-nats {kl:.3g}: a bound would have to be 0, since even the tokens that move least are too much "
            "for it: ask for more, or use a lower learning rate"
        )
    if math.isinf(bound):
        remarks.append("all watched steps keep within the target without a bound")
    else:
        remarks.append(f"these steps have {float((tokens > bound).mean()):.2%} out of bounds")
    return Choice(Thresholds(bound, (None, None)), {"capo_fisher_threshold": interval}, remarks)


def fisher_bound(steps: Sequence[Step], batch_m_f: float) -> float:
    """The largest δ_F at which every step's accepted tokens are taken to have a batch m_F of at most `batch_m_f`.

    In each step that is batch m_F times the mean m_F of the tokens with m_F ≤ δ_F over that of all. Infinite where
    nothing has to be rejected.
    """
    excluded = math.inf  # the smallest m_F that has to be rejected
    for step in steps:
        m_f = np.sort(step.m_f)
        if not m_f.any():
            continue
        means = np.cumsum(m_f) / np.arange(1, len(m_f) + 1)  # of the i smallest: it grows with i
        kept = int(np.searchsorted(step.batch_m_f * means / means[-1], batch_m_f, "right"))
        if kept < len(m_f):
            excluded = min(excluded, m_f[kept])
    if math.isinf(excluded):
        return math.inf
    return float(max(step.m_f[step.m_f < excluded].max(initial=0.0) for step in steps))


def _bound_interval(steps: Sequence[Step], kl: float, resamples: int = 1000) -> tuple[float, float]:
    """95 % of δ_F under a bootstrap over steps."""
    generator = np.random.default_rng(0)
    known = [step for step in steps if math.isfinite(step.kl)]
    bounds = []
    for _ in range(resamples):
        drawn = [known[i] for i in generator.integers(len(known), size=len(known))]
        line = regress([step.batch_m_f for step in drawn], [step.kl for step in drawn], slope=1.0)
        bounds.append(fisher_bound(drawn, line.shift_for(kl)))
    low, high = interval(np.array(bounds), len(known))
    return float(low), float(high)


def _lines(steps: Sequence[Step]) -> tuple[Regression, Regression] | None:
    """KL on batch m_F, with a free slope and with slope one."""
    shifts, kl = [step.batch_m_f for step in steps], [step.kl for step in steps]
    try:
        return regress(shifts, kl), regress(shifts, kl, slope=1.0)
    except ValueError:
        return None


def _about_kl(steps: Sequence[Step]) -> list[str]:
    kl = [step.kl for step in steps if math.isfinite(step.kl)]
    about = [f"KL of an update without a mask: median {np.median(kl):.2g} nats, largest {max(kl):.2g}"] if kl else []
    if (lines := _lines(steps)) is None:
        return [*about, "too few updates to say how KL goes with batch m_F"]
    free, one = lines
    return [
        *about,
        f"log KL on log batch m_F: slope {free.slope:.2f}, R² {free.r2:.2f}, residuals ×÷ {math.exp(free.spread):.2g}; "
        f"with slope 1, R² {one.r2:.2f}, residuals ×÷ {math.exp(one.spread):.2g}",
    ]


def _between(low: Thresholds, high: Thresholds) -> dict[str, tuple[float, float]]:
    return {name: (one, _fields(high)[name]) for name, one in _fields(low).items() if math.isfinite(one)}


def _fields(thresholds: Thresholds) -> dict[str, float]:
    low, high = thresholds.hessian or (None, None)
    return {
        "capo_fisher_threshold": math.inf if thresholds.fisher is None else thresholds.fisher,
        "capo_hessian_low": -math.inf if low is None else low,
        "capo_hessian_high": math.inf if high is None else high,
    }


# ---- what is written ------------------------------------------------------------------------------------------------


def fragment(choice: Choice, heading: Sequence[str]) -> str:
    """The choice as fields of a recipe, with what is known of it in comments."""
    if choice.budget is None:
        fields = {name: _number(value) for name, value in _fields(choice.thresholds).items()}
    else:
        fields = {"capo_mode": "trust_region", "capo_kl_budget": _number(choice.budget)}
    lines = [f"# {line}" for line in [*heading, *choice.remarks]]
    for name, value in fields.items():
        ends = choice.intervals.get(name)
        about = f"  # 95 %: {_number(ends[0])} to {_number(ends[1])}" if ends else ""
        lines.append(f"{name}: {value}{about}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """As YAML reads a float: with a point, and with null for no bound."""
    return "null" if math.isinf(value) else f"{value:.3e}"


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
    if (lines := _lines(steps)) is not None:
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
