"""`capo doctor`: what became of a run, in words, from its logged figures alone; no model and no torch is loaded.

Whether it collapsed is `statistics.collapsed` on its reward. What moved first is a rule on each figure's own past, over
the observations before the collapse (of a run that lives, over all):

    zₜ = (xₜ − median(x₁, …, xₖ)) / max(1.4826 · MAD(x₁, …, xₖ), least)        k: a third of them, and at least five

A figure has moved at the first of three observations in a row with z > 5; entropy and length, which go wrong either
way, with |z| > 5. `least` is 1 % of the median, and for the KL of an update 1e-3 nats, so that a rise from 1e-7 to
1e-5 is none. How often it speaks in runs that die and in runs that live is in docs/doctor.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import NamedTuple

from capo_rl.pages.advice import Change, as_yaml, budget_of, changes_for
from capo_rl.pages.run_log import DoctorError, Log, Series
from capo_rl.planning.defaults import KL_BUDGET


class Figure(NamedTuple):
    """A figure that may move before a run collapses: its names, by who logs it, and what counts as a move."""

    title: str
    names: tuple[str, ...]
    falls: bool = False  # whether a fall is a move too
    least: float = 0.0  # of the spread that z is measured in


# TRL's names and ours; verl's beside them.
REWARD = ("reward", "accuracy", "critic/rewards/mean")
KL = ("capo/kl/measured", "actor/ppo_kl")
FIGURES = (
    Figure("KL of the updates", KL, least=KL_BUDGET / 5),
    Figure("entropy", ("entropy", "actor/entropy"), falls=True),
    Figure("completion length", ("completions/mean_length", "completion_length", "response_length/mean"), falls=True),
    Figure("gradient norm", ("grad_norm", "actor/grad_norm")),
    Figure("m_F", ("capo/batch/m_f",)),
)
# What has to be a number at every step that logs it.
_NUMBERS = (
    ("reward", REWARD),
    ("loss", ("loss", "actor/pg_loss")),
    ("gradient", FIGURES[3].names),
    ("KL of an update, before any of it was taken back,", ("capo/kl/proposed",)),
)
_SIGNIFICANT, _IN_A_ROW, _BASELINE = 5.0, 3, 5
_FULL = 10  # rewards until the smoothed one spans as many as it should; of one more a fall can be seen
_LATE = 7  # rewards at zero that the smoothed one takes to halve


@dataclass(frozen=True)
class Diagnosis:
    """What became of a run: the step it collapsed at (None: it lives), what there is to say, what to try."""

    collapsed: int | None
    sentences: list[str]
    changes: list[Change] = field(default_factory=list)

    def diff(self) -> list[str]:
        """What to try, a line a field that goes or comes; a reason ends with the last of a change."""
        lines = []
        for change in self.changes:
            if change.before is not None:
                lines.append(f"-{change.name}: {as_yaml(change.before)}")
            if change.after is not None:
                lines.append(f"+{change.name}: {as_yaml(change.after)}")
            lines[-1] += f"    # {change.why}"
        return lines

    def __str__(self) -> str:
        return "\n".join([*self.sentences, *(["Try:", *self.diff()] if self.changes else [])])


def diagnose(log: Log) -> Diagnosis:
    """What became of a run, what moved first, how far its updates went, and what to change.

    Raises `DoctorError` where that can't be told: too few rewards, none above zero, or negative ones.
    """
    from capo_rl.statistics import collapsed, smooth

    name, rewards = _rewards(log)
    curve = [reward for _, reward in rewards]
    smoothed = smooth(curve)
    at = collapsed(curve)
    death = None if at is None else rewards[at][0]
    top = max(range(_FULL - 1, len(curve)), key=lambda i: smoothed[i])
    ends = f"it starts at {smoothed[_FULL - 1]:.3g}, is best at {smoothed[top]:.3g} (step {rewards[top][0]})"
    ends += f" and ends at {smoothed[-1]:.3g}"
    last = f"{len(curve):,} logged steps, the last is {rewards[-1][0]}"
    if death is None:
        sentences = [f"ALIVE ({last}): the smoothed {name} is not below half of its best for good; {ends}."]
        late = fmean(curve[-_LATE:])
        if late < smoothed[top] / 2:
            sentences.append(
                f"It may be dying: its last {_LATE} average {late:.3g}, and a fall takes the smoothed curve about as "
                "many to show."
            )
    else:
        sentences = [
            f"COLLAPSED at step {death} ({last}): from there the smoothed {name} is below half of its best; {ends}. "
            f"The fall itself began up to {_LATE} logged steps before."
        ]
    sentences.extend(_movement(log, death))
    sentences.extend(_not_finite(log))
    kl = log.series(KL)
    sentences.append(_length_of_updates(log, kl))
    changes = changes_for(log, death is not None, kl)
    if death is not None and not changes:
        sentences.append(
            "Nothing to try of CAPO's: its updates stayed short, so look at the reward function, its failures and the "
            "data first."
        )
    return Diagnosis(death, sentences, changes)


def _rewards(log: Log) -> tuple[str, Series]:
    """The reward that is judged and its name: an accuracy, where the reward goes below zero and one is logged."""
    names = {name for entry in log.entries for name in entry}
    accuracies = sorted(x for x in names if re.fullmatch(r"rewards/[\w./-]*accura[\w./-]*(?<!std)", x))
    rewards: Series = []
    for candidate in (*REWARD, *accuracies):
        series = log.series([candidate])
        rewards = rewards or series
        if series and min(x for _, x in series) >= 0:
            name, rewards = candidate, series
            break
    else:
        if not rewards:
            known = ", ".join(sorted(names - {"step"})[:8]) or "nothing"
            raise DoctorError(f"{log.source}: no reward is logged there ({known!r}); it takes a figure named `reward`")
        step, least = min(rewards, key=lambda pair: pair[1])
        raise DoctorError(
            f"{log.source}: the reward goes below zero ({least:.3g} at step {step}), where half of the best says "
            "nothing; log an accuracy beside it"
        )
    if len(rewards) <= _FULL:
        raise DoctorError(
            f"{log.source}: {len(rewards)} logged step{'s' * (len(rewards) > 1)} with a reward, and a collapse shows "
            f"in {_FULL + 1} or more; train on, or log each step (logging_steps: 1)"
        )
    if not any(x for _, x in rewards):
        raise DoctorError(
            f"{log.source}: no {name} is above zero in {len(rewards):,} logged steps, so there is nothing to lose yet; "
            "look at completions and the reward function"
        )
    return name, rewards


def moved(series: Series, falls: bool = False, least: float = 0.0) -> int | None:
    """The step from which a figure is far out of the range of the first third of its observations, or None.

    >>> calm = [(step, 1.0 + 0.01 * (step % 3)) for step in range(30)]
    >>> moved(calm), moved(calm + [(30 + i, 2.0) for i in range(3)])
    (None, 30)
    """
    first = max(_BASELINE, len(series) // 3)
    base = [x for _, x in series[:first]]
    centre = median(base) if base else 0.0
    spread = max(1.4826 * median(abs(x - centre) for x in base) if base else 0.0, 0.01 * abs(centre), least)
    row = 0
    for i, (_, x) in enumerate(series[first:], first):
        away = abs(x - centre) if falls else x - centre
        row = row + 1 if away > _SIGNIFICANT * spread else 0
        if row == _IN_A_ROW:
            return series[i - _IN_A_ROW + 1][0]
    return None


def _movement(log: Log, death: int | None) -> Iterator[str]:
    """What moved before the collapse, in order of time, and what can't be said."""
    found, still, missing = [], [], []
    for figure in FIGURES:
        series = [(step, x) for step, x in log.series(figure.names) if death is None or step < death]
        if not series:
            missing.append(figure.title)
        elif (step := moved(series, figure.falls, figure.least)) is None:
            still.append(figure.title)
        else:
            before = median(x for _, x in series[: max(_BASELINE, len(series) // 3)])
            now = median([x for at, x in series if at >= step][:_IN_A_ROW])
            found.append((step, f"{figure.title} from step {step} ({before:.2g} → {now:.2g})"))
    if found:
        words = "; then ".join(text for _, text in sorted(found))
        yield f"What moved first: {words}." if death is not None else f"Moved, and the reward held: {words}."
    elif still:
        yield "Nothing moved before the reward did." if death is not None else "Nothing else moved."
    if still and found:
        yield f"Did not move: {', '.join(still)}."
    if missing:
        yield f"Not logged: {', '.join(missing)}."


def _not_finite(log: Log) -> Iterator[str]:
    """Figures that were no numbers, and steps that were left out."""
    for title, names in _NUMBERS:
        wrong = [int(e["step"]) for e in log.entries if not all(math.isfinite(e.get(name, 0.0)) for name in names)]
        if wrong:
            yield f"The {title} was not finite at {len(wrong):,} logged steps, first at {wrong[0]}."
    skipped = [entry["capo/steps_skipped"] for entry in log.entries if entry.get("capo/steps_skipped", 0) > 0]
    if skipped:
        yield f"Steps that were skipped: {max(skipped):,.0f} (docs/metrics.md says why that may be)."


def _length_of_updates(log: Log, kl: Series) -> str:
    """How far the updates went, against the budget where it is known."""
    if not kl:
        return (
            'How far its updates went is not on record: capo_mode="monitor", or MonitorCallback on a stock '
            "GRPOTrainer, measures it and changes nothing."
        )
    budget, whose = budget_of(log), "its budget"
    if budget is None:
        budget, whose = KL_BUDGET, "the default trust region's; it had none"
        if log.settings is None and log.series(["capo/kl/proposed"]):
            whose = "the default; its own is not on record"
    step, largest = max(kl, key=lambda pair: pair[1])
    over = sum(x > budget for _, x in kl)
    return (
        f"KL of an update: {fmean(x for _, x in kl):.1e} nats a token on average, {largest:.1e} at most (step {step}); "
        f"{over:,} of {len(kl):,} above {budget:.1e} ({whose})."
    )
