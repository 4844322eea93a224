"""The completions of a step token by token: colours for shifts, a box for the rejected, a hover with why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capo_rl.pages.page import html_folded, html_table
from capo_rl.pages.token_text import cell_text, marked, spelled, token_texts
from capo_rl.runs.tokens import StepTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEVELS = 6  # colours of a shift: 3 up to its bound and 3 above it, a factor of ten each
JUDGED = {
    "sequence": "judged by the mean of its sequence",
    "group": "judged by the mean of its group",
    "batch": "judged by the mean of its batch",
    "rule": "judged by a rule other than the bounds",
}
# One switch for the whole page; its labels stand in every step's bar.
SWITCH = """<input type="radio" name="by" id="by-f" aria-label="Colour by m_F" checked>
<input type="radio" name="by" id="by-h" aria-label="Colour by m_H">
"""


def html_completions(tokens: StepTokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The completions of a step under their prompts, those with the most rejected tokens first."""
    counts = np.bincount(tokens.completion[~tokens.keep], minlength=len(tokens.reward))
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(tokens.prompt.tolist()):
        by_prompt.setdefault(tuple(token for token in prompt if token >= 0), []).append(number)
    drawn = Drawn(tokens)
    body = drawn.bar()
    for prompt, numbers in sorted(by_prompt.items(), key=lambda item: -counts[item[1]].sum()):
        said = "".join(map(marked, token_texts(tokenizer, prompt)))
        at = list(by_prompt).index(prompt) + 1
        body += f'<h3>Prompt {at}</h3>\n<p class="head">{escape(_of_prompt(tokens, numbers))}</p>\n'
        body += f'<div class="text prompt" dir="auto">{said}</div>\n'
        body += "".join(
            drawn.completion(number, tokenizer) for number in sorted(numbers, key=lambda number: -counts[number])
        )
    return body


def _of_prompt(tokens: StepTokens, numbers: list[int]) -> str:
    """The numbers of a prompt: its completions, their rewards, and how many of their tokens were rejected."""
    its = np.isin(tokens.completion, numbers)
    rewards = tokens.reward[numbers]
    known = rewards[np.isfinite(rewards)]
    reward = f"reward {known.mean():.3g} on average" if len(known) else "no reward"
    if 0 < len(known) < len(rewards):
        reward += f" ({len(known)} of {len(rewards)} have one)"
    completions = f"{len(numbers)} completion{'s' * (len(numbers) > 1)}"
    return f"{completions} · {reward} · {of(~tokens.keep, its)} tokens {rejected(tokens)}"


def rejected(tokens: StepTokens) -> str:
    """What became of a token that is out: only the mask rejects."""
    return "rejected" if tokens.about["mode"] == "mask" else "would have been rejected"


def of(some: NDArray[np.bool_], among: NDArray[np.bool_]) -> str:
    """How many, of how many."""
    count, total = int((some & among).sum()), int(among.sum())
    return f"{count:,} of {total:,} ({count / total:.1%})" if total else "none"


class Drawn:
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

    def bar(self) -> str:
        """The labels of the page's switch, and what the colours mean in this step."""
        f, n, p = (self.legend(letter) for letter in "fnp")
        return f"""<div class="bar">
<span class="nowrap">Colour by <label for="by-f">m_F</label> <label for="by-h">m_H</label></span>
<span class="nowrap">· <span class="text"><del>boxed</del></span>: {rejected(self.tokens)}</span>
<div class="of-f">m_F up to {f}</div>
<div class="of-h">m_H below 0, down to {n}</div>
<div class="of-h">m_H above 0, up to {p}</div>
</div>
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
            shown = marked(text) or "<i>…</i>"
            spans += f'<{tag} class="{classes}" title="{escape(self.told(at, text))}">{shown}</{tag}>'
            if tag == "del":
                values = (tokens.m_f[at], tokens.m_h[at], tokens.log_pi[at])
                rows.append((position, cell_text(text), self.why(at), *(f"{value:.2g}" for value in values)))
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
            details = html_folded("Rejected tokens", listed)
        head = f'<p class="head">{escape(" · ".join(facts))}</p>'
        return f'<article>{head}\n<div class="text" dir="auto">{spans}</div>\n{details}</article>\n'

    def told(self, at: int, text: str) -> str:
        """What a token's tooltip says."""
        tokens = self.tokens
        verdict = "kept" if tokens.keep[at] else "rejected"
        why = self.why(at)
        return "\n".join(
            (
                f"‘{spelled(text)}’ (id {tokens.token[at]})" if text else f"id {tokens.token[at]}: no text of its own",
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
        judged = JUDGED.get(self.tokens.about["judged"])
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


def shades() -> Iterator[str]:
    """The rules for the colours of shifts: how much of it each level has."""
    for level in range(1, _LEVELS + 1):
        alpha = (0.1, 0.2, 0.32, 0.5, 0.65, 0.8)[level - 1]
        yield f".f{level} {{ --f: {alpha}; }} .p{level}, .n{level} {{ --h: {alpha}; }}"


STYLE = """
.text { font-family: ui-monospace, monospace; font-size: .9rem; white-space: pre-wrap; overflow: hidden; }
div.text { line-height: 1.9; }
.text > * { unicode-bidi: isolate; border-radius: 2px; background: rgb(214 96 0 / var(--f, 0)); padding: .15em 0; }
.text del { font-weight: 700; text-decoration: none; outline: 2px solid; margin: 0 .25em; padding: .15em .2em; }
.text i { font-size: .7em; font-style: normal; color: var(--soft); border: 1px solid; border-radius: 3px; }
.text i { padding: 0 .2em; }
.prompt { color: var(--soft); }
.bar { position: sticky; top: 0; z-index: 1; background: Canvas; padding: .5rem 0; font-size: .875rem; }
.bar { border-bottom: 1px solid var(--line); }
.bar label { padding: .25rem .5rem; color: var(--link); cursor: pointer; }
#by-f, #by-h { position: fixed; opacity: 0; pointer-events: none; }
body:has(#by-f:checked) label[for="by-f"], body:has(#by-h:checked) label[for="by-h"] {
  color: inherit; font-weight: 700; outline: 1px solid; border-radius: 4px;
}
body:has(#by-f:focus-visible) label[for="by-f"], body:has(#by-h:focus-visible) label[for="by-h"] {
  outline: 3px solid var(--link);
}
.bar .text { overflow: visible; }
.bar .text > * { padding: .15em .3em; white-space: nowrap; }
.nowrap { white-space: nowrap; }
.of-h, body:has(#by-h:checked) .of-f { display: none; }
body:has(#by-h:checked) .of-h { display: block; }
body:has(#by-h:checked) .text > * { background: rgb(var(--hue, 0 0 0) / var(--h, 0)); }
.p1, .p2, .p3, .p4, .p5, .p6 { --hue: 0 138 92; }
.n1, .n2, .n3, .n4, .n5, .n6 { --hue: 128 60 200; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.step h2 { margin: 1rem 0 .5rem; }
.step nav ul, .step > p { margin: .5rem 0; }
.pair > * { min-width: 0; max-width: 100%; }
.pair h3 { margin: .5rem 0; }
article { margin: 1rem 0 1.5rem; }
.head { margin: 0; font-weight: 600; font-size: .875rem; }
article summary { font-size: .875rem; }
@media print {
  .bar { position: static; }
  .text > * { print-color-adjust: exact; }
  article { break-inside: avoid; }
}
"""
