"""`capo explain`: one page about a run's recorded steps, which opens on the one with the most rejections.

The other steps are on the same page, out of sight until a link leads to them, as far as there is room.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from capo_rl.pages.completions import JUDGED, STYLE, SWITCH, html_completions, of, rejected, shades
from capo_rl.pages.page import Link, html_folded, html_page, html_table
from capo_rl.pages.token_text import cell_text, token_texts
from capo_rl.runs.records import last_checkpoint
from capo_rl.runs.tokens import Rejections, StepTokens, most_rejected, read_step, recorded_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROOM = 40_000  # tokens on a page, of 150 bytes or so each


class ExplainError(ValueError):
    """A step that can't be explained; the message names the reason and the fix."""


class _Step(NamedTuple):
    """The numbers of a recorded step."""

    step: int
    tokens: int
    rejected: int
    of_each: tuple[str, ...]  # of all, of those with A > 0, with A < 0
    reward: float


def write_explanation(run: str | Path, step: int | None, out: str | Path) -> Path:
    """Write one HTML page that opens on a recorded step of a run, by default the one with the most rejections.

    Raises `ExplainError` if the step was not recorded, its file can't be read, or there is no tokenizer to be had.
    """
    run, out = Path(run), Path(out)
    recorded = recorded_steps(run)
    if not recorded:
        raise ExplainError(
            f"{run}: no tokens were recorded there; train with `--capo_tokens_every 10` to record every tenth step's "
            "(and with `--capo_watch true` where capo_mode is trust_region)"
        )
    if step is not None and step not in recorded:
        near = sorted(sorted(recorded, key=lambda other: abs(other - step))[:3])
        raise ExplainError(f"{run}: step {step} was not recorded; the nearest that were: {', '.join(map(str, near))}")
    page = _page(run, step, recorded, _survey(recorded), _tokenizer(run))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _read(path: Path) -> StepTokens:
    try:
        return read_step(path)
    except ValueError as error:
        raise ExplainError(str(error)) from None


def _tokenizer(run: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the run's last checkpoint; without one, that of the model it was trained from."""
    from capo_rl.runs.models import ModelError, ModelSource, load_tokenizer, locate

    checkpoint = last_checkpoint(run)
    if checkpoint is not None and (Path(checkpoint) / "tokenizer_config.json").exists():
        return load_tokenizer(ModelSource(checkpoint))
    try:
        settings = json.loads((run / "run.json").read_text("utf-8"))["settings"]
        return load_tokenizer(locate(str(settings["model_name_or_path"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ModelError) else "no checkpoint, and no run.json that names a model"
        raise ExplainError(f"{run}: no tokenizer to read its tokens with ({reason})") from None


def _page(
    run: Path,
    step: int | None,
    recorded: Mapping[int, Path],
    survey: tuple[list[_Step], dict[int, list[Rejections]]],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    steps, ranked = survey
    opened = next(
        (each for each in steps if each.step == step), max(steps, key=lambda each: (each.rejected, each.step))
    )
    here = _with_room(steps, opened)
    shown = {each: _read(recorded[each]) for each in here}
    body = SWITCH + '<div class="pair">' + html_folded(f"Recorded steps: {len(steps)}", _listed(steps, here))
    body += html_folded("Most rejected tokens", _over_the_run(steps, ranked, tokenizer)) + "</div>\n"
    body += "".join(_of_step(each, tokens, here, tokenizer) for each, tokens in shown.items())
    return html_page(
        f"Run {run.resolve().name}: which tokens were rejected, and why",
        _opening(opened, step is None, shown[opened.step].about["mode"]),
        body=body,
        style=STYLE + "\n".join(shades()) + _only(opened.step),
    )


def _opening(opened: _Step, most: bool, mode: str) -> str:
    """Why the page opens on a step."""
    if most and not opened.rejected:
        said = f"In no recorded step a token is out of bounds; this is the last, {opened.step}."
    elif most:
        said = f"Of the recorded steps, {opened.step} has the most rejections."
    else:
        said = f"Step {opened.step}, as asked for."
    return said if mode == "mask" else f"{said} No token was left out of the gradient: capo_mode is {mode}."


def _survey(recorded: Mapping[int, Path]) -> tuple[list[_Step], dict[int, list[Rejections]]]:
    """The numbers of every recorded step, and the most rejected tokens of all of them."""
    steps = []

    def each() -> Iterator[StepTokens]:
        for step, path in recorded.items():
            tokens = _read(path)
            out, known = ~tokens.keep, tokens.reward[np.isfinite(tokens.reward)]
            signs = (np.ones_like(out), tokens.advantage > 0, tokens.advantage < 0)
            of_each = tuple(of(out, among) for among in signs)
            steps.append(_Step(step, len(out), int(out.sum()), of_each, known.mean() if len(known) else np.nan))
            yield tokens

    ranked = most_rejected(each())
    return steps, ranked


def _with_room(steps: Sequence[_Step], opened: _Step) -> list[int]:
    """The steps that are on the page, in order: the one that it opens on, and those with the most rejections."""
    here, room = [opened.step], _ROOM - opened.tokens
    for each in sorted(steps, key=lambda each: (-each.rejected, -each.step)):
        if each is not opened and each.tokens <= room:
            here.append(each.step)
            room -= each.tokens
    return sorted(here)


def _listed(steps: Sequence[_Step], here: Sequence[int]) -> str:
    """All recorded steps, with links to those that are on the page."""
    rows = [
        (
            Link(str(each.step), f"step-{each.step}") if each.step in here else each.step,
            *each.of_each,
            None if np.isnan(each.reward) else f"{each.reward:.3g}",
        )
        for each in steps
    ]
    note = "" if len(here) == len(steps) else "For a step without a link: capo explain RUN --step N."
    return html_table(("step", "rejected", "A > 0", "A < 0", "mean reward"), rows, note=note)


def _only(step: int) -> str:
    """The rules by which one step is seen: the one that a link led to, or else this."""
    none = "body:not(:has(.step:target))"
    return f"\n.step {{ display: none; }}\n.step:target, {none} #step-{step} {{ display: block; }}\n"


def _of_step(step: int, tokens: StepTokens, here: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """One step: how much of it was rejected, the way to the steps beside it, and its completions."""
    out, at = ~tokens.keep, here.index(step)
    links = [
        *([f'<a rel="prev" href="#step-{here[at - 1]}">← step {here[at - 1]}</a>'] if at else []),
        *([f'<a rel="next" href="#step-{here[at + 1]}">step {here[at + 1]} →</a>'] if at + 1 < len(here) else []),
    ]
    nav = f'<nav aria-label="Steps"><ul><li>{"</li><li>".join(links)}</li></ul></nav>\n' if links else ""
    facts = (
        f"{of(out, np.ones_like(out))} tokens {rejected(tokens)}; with A > 0 {of(out, tokens.advantage > 0)}, "
        f"with A < 0 {of(out, tokens.advantage < 0)}."
    )
    return (
        f'<section class="step" id="step-{step}">\n<h2>Step {step}</h2>\n'
        f"{nav}"
        f"<p>{escape(facts)}</p>\n{html_folded('Bounds, and what broke them', _figures(tokens))}"
        f"{html_completions(tokens, tokenizer)}</section>\n"
    )


def _figures(tokens: StepTokens) -> str:
    """What holds for the whole step, and how many tokens broke which bound."""
    about = tokens.about
    rows: list[tuple[str, Any]] = [
        *((f"tokens with {name}", int(out.sum())) for name, out in tokens.broken().items() if name != "not finite"),
        ("tokens whose shift is not finite", int(tokens.broken()["not finite"].sum())),
        ("bound on m_F", _interval(None, about["fisher"])),
        ("bounds on m_H", _interval(about["low"], about["high"])),
        ("temperature", about["temperature"]),
        ("completions", len(tokens.reward)),
    ]
    if len(tokens.keep):
        mass = tokens.missing_mass
        rows.append(("missing mass, mean | max", f"{mass.mean():.3g} | {mass.max():.3g}"))
    judged = JUDGED.get(about["judged"], "")
    note = (
        f"A token may break more than one bound.{f' Verdicts: {judged}.' if judged else ''} Hover over a token for its "
        "values; those of the rejected ones are also in a list below each completion. From one shade to the next is a "
        "factor of ten."
    )
    return html_table(("", "value"), rows, note=note)


def _interval(low: float | None, high: float | None) -> str:
    parts = [*([f"≥ {low:g}"] if low is not None else []), *([f"≤ {high:g}"] if high is not None else [])]
    return ", ".join(parts) or "none"


def _over_the_run(
    steps: Sequence[_Step], ranked: Mapping[int, Sequence[Rejections]], tokenizer: PreTrainedTokenizerBase
) -> str:
    """The ten most rejected tokens of each sign, over the steps that were recorded."""
    over = f"1 recorded step, {steps[0].step}"
    if len(steps) > 1:
        over = f"{len(steps)} recorded steps, {steps[0].step} to {steps[-1].step}"
    body = f'<p class="note">Counted over {over}.</p>\n<div class="pair">'
    for sign, title in ((1, "A &gt; 0"), (-1, "A &lt; 0")):
        rows = [
            (
                cell_text(token_texts(tokenizer, [row.token])[0]),
                row.rejected,
                row.seen,
                f"{row.rejected / row.seen:.0%}",
            )
            for row in ranked[sign]
        ]
        table = html_table(("token", "rejected", "of", "share"), rows) if rows else "<p>None was rejected.</p>"
        body += f"<div><h3>{title}</h3>\n{table}</div>\n"
    return body + "</div>\n"
