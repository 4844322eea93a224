"""One HTML page about one optimizer step: its completions token by token, which were rejected, and why.

Completions are hostile text: a policy in training says anything. All of it is escaped, and characters that a browser
would obey or not show (controls, bidirectional overrides, zero widths) are spelled out.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capo_rl.pages.report import Section, html_page, html_table
from capo_rl.runs.records import last_checkpoint
from capo_rl.runs.tokens import StepTokens, most_rejected, read_step, recorded_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A character of UTF-8 has at most this many bytes, and so as many tokens that each decode to nothing whole.
_BYTES = 4
_LEVELS = 6  # colours of a shift: 3 up to its bound and 3 above it, a factor of ten each
_JUDGED = {
    "sequence": "judged by the mean of its sequence",
    "group": "judged by the mean of its group",
    "batch": "judged by the mean of its batch",
    "rule": "judged by a rule other than the bounds",
}


class ExplainError(ValueError):
    """A step that can't be explained; the message names the reason and the fix."""


def write_explanation(run: str | Path, step: int | None, out: str | Path) -> Path:
    """Write one HTML page about a recorded step of a run, by default its last.

    Raises `ExplainError` if the step was not recorded, its file can't be read, or there is no tokenizer to be had.
    """
    run, out = Path(run), Path(out)
    recorded = recorded_steps(run)
    if not recorded:
        raise ExplainError(
            f"{run}: no tokens were recorded there; train with `--capo_tokens_every 10` to record every tenth step's "
            "(and with `--capo_watch true` where capo_mode is trust_region)"
        )
    step = max(recorded) if step is None else step
    if step not in recorded:
        near = sorted(sorted(recorded, key=lambda other: abs(other - step))[:3])
        raise ExplainError(f"{run}: step {step} was not recorded; the nearest that were: {', '.join(map(str, near))}")
    page = _page(run, _read(recorded[step]), recorded, _tokenizer(run))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A character whose bytes are in several tokens is the last one's, and the others add nothing.
    """

    def decode(some: Sequence[int]) -> str:
        text = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    texts = []
    start = end = 0  # the last token whose text was whole: a decoder may drop a space at the start of what it is given
    for now in range(1, len(ids) + 1):
        before, text = decode(ids[start:end]), decode(ids[start:now])
        if text.endswith("�") and now < len(ids) and now - end < _BYTES:
            texts.append("")
            continue
        texts.append(text[len(before) :] if text.startswith(before) else decode(ids[end:now]))
        start, end = end, now
    return texts


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


def _page(run: Path, tokens: StepTokens, recorded: Mapping[int, Path], tokenizer: PreTrainedTokenizerBase) -> str:
    step, rejected = tokens.about["step"], int((~tokens.keep).sum())
    watched = tokens.about["mode"] != "mask"
    about = (
        f"Run {run.resolve().name}, optimizer step {step}: {rejected:,} of {len(tokens.keep):,} tokens "
        f"{'would have been rejected; the run was only watched (capo_mode: monitor)' if watched else 'were rejected'}."
    )
    return html_page(
        f"Step {step}: which tokens were rejected, and why",
        about,
        Section("step", "The step", _figures(tokens)),
        Section("run", "Most rejected tokens over the run", _over_the_run(recorded, tokenizer)),
        Section("completions", "Completions", _completions(tokens, tokenizer)),
        style=_STYLE + "\n".join(_shades()),
    )


def _figures(tokens: StepTokens) -> str:
    """What holds for the whole step, and how many tokens broke which bound."""
    about, rejected = tokens.about, ~tokens.keep
    rows: list[tuple[str, Any]] = [
        ("rejected", _of(rejected, np.ones_like(rejected))),
        ("rejected, A > 0", _of(rejected, tokens.advantage > 0)),
        ("rejected, A < 0", _of(rejected, tokens.advantage < 0)),
        *((f"tokens with {name}", int(out.sum())) for name, out in tokens.broken().items() if name != "not finite"),
        ("tokens whose shift is not finite", int(tokens.broken()["not finite"].sum())),
        ("bound on m_F", _interval(None, about["fisher"])),
        ("bounds on m_H", _interval(about["low"], about["high"])),
        ("temperature", about["temperature"]),
        ("completions", len(tokens.reward)),
    ]
    if len(rejected):
        mass = tokens.missing_mass
        rows.append(("missing mass, mean | max", f"{mass.mean():.3g} | {mass.max():.3g}"))
    judged = _JUDGED.get(about["judged"], "")
    note = f"A token may break more than one bound.{' Verdicts: ' if judged else ''}{judged}"
    return html_table(("", "value"), rows, note=note)


def _interval(low: float | None, high: float | None) -> str:
    parts = [*([f"≥ {low:g}"] if low is not None else []), *([f"≤ {high:g}"] if high is not None else [])]
    return ", ".join(parts) or "none"


def _of(some: NDArray[np.bool_], among: NDArray[np.bool_]) -> str:
    count, total = int((some & among).sum()), int(among.sum())
    return f"{count:,} of {total:,} ({count / total:.1%})" if total else "none"


def _over_the_run(recorded: Mapping[int, Path], tokenizer: PreTrainedTokenizerBase) -> str:
    """The ten most rejected tokens of each sign, over the steps that were recorded."""
    ranked = most_rejected(_read(path) for path in recorded.values())
    steps = f"1 recorded step, {min(recorded)}"
    if len(recorded) > 1:
        steps = f"{len(recorded)} recorded steps, {min(recorded)} to {max(recorded)}"
    body = f'<p class="note">Counted over {steps}.</p>\n<div class="pair">'
    for sign, title in ((1, "A &gt; 0"), (-1, "A &lt; 0")):
        rows = [
            (
                _cell_text(token_texts(tokenizer, [row.token])[0]),
                row.rejected,
                row.seen,
                f"{row.rejected / row.seen:.0%}",
            )
            for row in ranked[sign]
        ]
        table = html_table(("token", "rejected", "of", "share"), rows) if rows else "<p>None was rejected.</p>"
        body += f"<div><h3>{title}</h3>\n{table}</div>\n"
    return body + "</div>\n"


def _completions(tokens: StepTokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """A switch between the two shifts, and the completions under their prompts."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(tokens.prompt.tolist()):
        by_prompt.setdefault(tuple(token for token in prompt if token >= 0), []).append(number)
    drawn = _Drawn(tokens)
    body = drawn.switch()
    for at, (prompt, numbers) in enumerate(by_prompt.items(), start=1):
        said = "".join(map(_marked, token_texts(tokenizer, prompt)))
        body += f'<h3>Prompt {at}</h3>\n<div class="text prompt" dir="auto">{said}</div>\n'
        body += "".join(drawn.completion(number, tokenizer) for number in numbers)
    return body


class _Drawn:
    """The tokens of a step as HTML: each with its colours, its verdict, and what to say of it."""

    def __init__(self, tokens: StepTokens) -> None:
        self.tokens = tokens
        self.broken = tokens.broken()
        self.scales = {
            "f": _scale(tokens.about["fisher"], tokens.m_f),
            "n": _scale(tokens.about["low"], tokens.m_h[tokens.m_h < 0]),
            "p": _scale(tokens.about["high"], tokens.m_h[tokens.m_h >= 0]),
        }
        self.by_f = _levels(tokens.m_f, self.scales["f"])
        negative = tokens.m_h < 0
        self.by_h = np.where(
            negative, _levels(tokens.m_h, self.scales["n"]), _levels(tokens.m_h, self.scales["p"])
        ).tolist()
        self.side = np.where(negative, "n", "p").tolist()

    def switch(self) -> str:
        """Two radio buttons that change the colours, with what the colours mean."""
        f, n, p = (self.legend(letter) for letter in "fnp")
        rejected = "rejected" if self.tokens.about["mode"] == "mask" else "would have been rejected"
        return f"""<div class="bar">
<span class="nowrap">Colour by <label><input type="radio" name="by" id="by-f" checked> m_F</label>
<label><input type="radio" name="by" id="by-h"> m_H</label></span>
<span class="nowrap">· <span class="text"><del>boxed</del></span>: {rejected}</span>
<div class="of-f">m_F up to {f}</div>
<div class="of-h">m_H below 0, down to {n}</div>
<div class="of-h">m_H above 0, up to {p}</div>
</div>
<p class="note">Hover over a token for its values; those of the rejected ones are also in a list below each completion.
From one shade to the next is a factor of ten.</p>
"""

    def legend(self, letter: str) -> str:
        """The shades of one shift, each with the value it goes up to."""
        scale, sign = self.scales[letter], "−" if letter == "n" else ""
        names = [*(f"{sign}{scale * 10.0 ** (level - _LEVELS // 2):.3g}" for level in range(_LEVELS)), "beyond"]
        bound = self.tokens.about[{"f": "fisher", "n": "low", "p": "high"}[letter]]
        names[_LEVELS // 2] += " (bound)" if bound else " (largest)"
        shades = (f'<span class="{letter}{level}">{name}</span>' for level, name in enumerate(names))
        return f'<span class="text">{" ".join(shades)}</span>'

    def completion(self, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """One completion: a line about it, its text, and a list of what was rejected in it."""
        tokens = self.tokens
        members = (tokens.completion == number).nonzero()[0].tolist()
        texts = token_texts(tokenizer, tokens.token[members].tolist())
        spans, rows = "", []
        for position, (at, text) in enumerate(zip(members, texts, strict=True), start=1):
            tag = "span" if tokens.keep[at] else "del"
            classes = f"f{self.by_f[at]} {self.side[at]}{self.by_h[at]}"
            shown = _marked(text) or "<i>…</i>"
            spans += f'<{tag} class="{classes}" title="{escape(self.told(at, text))}">{shown}</{tag}>'
            if tag == "del":
                values = (tokens.m_f[at], tokens.m_h[at], tokens.log_pi[at])
                rows.append((position, _cell_text(text), self.why(at), *(f"{value:.2g}" for value in values)))
        reward = tokens.reward[number]
        facts = [
            f"Completion {number + 1}",
            _advantage(tokens.advantage[members]),
            "no reward" if math.isnan(reward) else f"reward {reward:.3g}",
            f"{len(rows)} of {len(members)} rejected",
        ]
        details = ""
        if rows:
            listed = html_table(("at", "token", "why", "m_F", "m_H", "log π(a)"), rows)
            details = f"<details><summary>Rejected tokens</summary>{listed}</details>\n"
        head = f'<p class="head">{escape(" · ".join(facts))}</p>'
        return f'<article>{head}\n<div class="text" dir="auto">{spans}</div>\n{details}</article>\n'

    def told(self, at: int, text: str) -> str:
        """What a token's tooltip says."""
        tokens = self.tokens
        verdict = "kept" if tokens.keep[at] else "rejected"
        why = self.why(at)
        return "\n".join(
            (
                f"‘{_spelled(text)}’ (id {tokens.token[at]})" if text else f"id {tokens.token[at]}: no text of its own",
                f"m_F {tokens.m_f[at]:.3g}",
                f"m_H {tokens.m_h[at]:.3g}",
                f"log π(a) {tokens.log_pi[at]:.3g}",
                f"A {tokens.advantage[at]:.3g}",
                f"missing mass {tokens.missing_mass[at]:.2g}",
                f"{verdict}: {why}" if why else verdict,
            )
        )

    def why(self, at: int) -> str:
        """The bounds that a token breaks, and what else its verdict hangs on."""
        bounds = [name for name, out in self.broken.items() if out[at]]
        judged = _JUDGED.get(self.tokens.about["judged"])
        return "; ".join([*([", ".join(bounds)] if bounds else []), *([judged] if judged else [])])


def _scale(bound: float | None, values: NDArray[np.floating]) -> float:
    """What a shift is measured against: its bound, or else the largest of the step."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if len(finite) else 0.0
    return abs(bound) if bound else largest or 1.0


def _levels(values: NDArray[np.floating], scale: float) -> list[int]:
    """The colours of shifts: 0 up to a thousandth of the scale, 3 up to the scale, 6 above a hundred times it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(np.abs(values.astype(np.float64)) / scale)
    level = _LEVELS // 2 + np.ceil(decades - 1e-6)  # single precision may round a value at its bound to just above it
    return np.nan_to_num(level, nan=_LEVELS, posinf=_LEVELS, neginf=0).clip(0, _LEVELS).astype(int).tolist()


def _advantage(advantages: NDArray[np.floating]) -> str:
    if not len(advantages):
        return "no token"
    low, high = float(advantages.min()), float(advantages.max())
    return f"A = {low:.3g}" if low == high else f"A = {low:.3g} to {high:.3g}"


def _name(character: str) -> str:
    """What to show in place of a character that would be obeyed or not seen; empty for all others."""
    if character in "\n\t":
        return "↵" if character == "\n" else "⇥"
    hidden = unicodedata.category(character)[0] == "C" or character in "\u2028\u2029"
    return f"U+{ord(character):04X}" if hidden else ""


def _cell_text(text: str) -> str:
    """A token's text as a table shows it: with its spaces, and never empty."""
    return _spelled(text).replace(" ", "␣") or "…"


def _spelled(text: str) -> str:
    """Text on one line, with what can't be seen by its name; not escaped.

    >>> _spelled("a\\x00b\\n\\u202e")
    'aU+0000b↵U+202E'
    """
    return "".join(_name(character) or character for character in text)


def _marked(text: str) -> str:
    """Text as HTML, with what can't be seen by its name, set apart.

    >>> _marked("<b>\\x1b")
    '&lt;b&gt;<i>U+001B</i>'
    """
    parts = (f"<i>{name}</i>" if (name := _name(character)) else escape(character) for character in text)
    return "".join(parts).replace("<i>↵</i>", "<i>↵</i>\n")


def _shades() -> Iterator[str]:
    """The rules for the colours of shifts: how much of it each level has."""
    for level in range(1, _LEVELS + 1):
        alpha = (0.1, 0.2, 0.32, 0.5, 0.65, 0.8)[level - 1]
        yield f".f{level} {{ --f: {alpha}; }} .p{level}, .n{level} {{ --h: {alpha}; }}"


_STYLE = """
.text { font-family: ui-monospace, monospace; font-size: .9rem; white-space: pre-wrap; overflow: hidden; }
div.text { line-height: 1.9; }
.text > * { unicode-bidi: isolate; border-radius: 2px; background: rgb(214 96 0 / var(--f, 0)); padding: .15em 0; }
.text del { font-weight: 700; text-decoration: none; outline: 2px solid; margin: 0 .25em; padding: .15em .2em; }
.text i { font-size: .7em; font-style: normal; color: var(--soft); border: 1px solid; border-radius: 3px; }
.text i { padding: 0 .2em; }
.prompt { color: var(--soft); }
.bar { position: sticky; top: 0; z-index: 1; background: Canvas; padding: .5rem 0; font-size: .875rem; }
.bar { border-bottom: 1px solid var(--line); }
.bar label { padding: .25rem .5rem .25rem 0; }
.bar .text { overflow: visible; }
.bar .text > * { padding: .15em .3em; white-space: nowrap; }
.nowrap { white-space: nowrap; }
.of-h, body:has(#by-h:checked) .of-f { display: none; }
body:has(#by-h:checked) .of-h { display: block; }
body:has(#by-h:checked) .text > * { background: rgb(var(--hue, 0 0 0) / var(--h, 0)); }
.p1, .p2, .p3, .p4, .p5, .p6 { --hue: 0 138 92; }
.n1, .n2, .n3, .n4, .n5, .n6 { --hue: 128 60 200; }
.pair { display: flex; flex-wrap: wrap; gap: 0 4rem; }
.pair > div { min-width: 0; max-width: 100%; }
.pair h3 { margin: .5rem 0; }
article { margin: 1rem 0 1.5rem; }
.head { margin: 0; font-weight: 600; font-size: .875rem; }
summary { color: var(--link); font-size: .875rem; cursor: pointer; }
@media print {
  .bar { position: static; }
  .text > * { print-color-adjust: exact; }
  article { break-inside: avoid; }
}
"""
