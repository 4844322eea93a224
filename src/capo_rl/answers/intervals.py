"""Inequalities, sets with a condition and unions, as the intervals that they are."""

from __future__ import annotations

import re

from capo_rl.answers.lists import LISTED
from capo_rl.answers.notation import squeezed
from capo_rl.answers.numbers import number

_END = r"([^<>=\\]*(?:\\(?!leq|geq|neq|in(?![a-z])|mid|cup)[A-Za-z]+[^<>=\\]*)*)"
_LESS, _MORE = r"(<|\\leq)", r"(>|\\geq)"
_BELOW = re.compile(rf"{_END}{_LESS}\s*([A-Za-z])\s*(?:{_LESS}{_END})?")
_ABOVE = re.compile(rf"{_END}{_MORE}\s*([A-Za-z])\s*(?:{_MORE}{_END})?")
_FIRST_BELOW, _FIRST_ABOVE = (
    re.compile(rf"\s*([A-Za-z])\s*{_LESS}{_END}"),
    re.compile(rf"\s*([A-Za-z])\s*{_MORE}{_END}"),
)
_APART = re.compile(r"\s*([A-Za-z])\s*\\neq(?![A-Za-z])" + _END)
_BUILDER = re.compile(r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{R\}\s*)?(?:\\mid|\||:)(.*)\\\}", re.DOTALL)


def as_intervals(text: str) -> tuple[str | None, str] | None:
    r"""The variable, if it is named, and the intervals of an inequality, several, or a set of them; otherwise `None`.

    >>> as_intervals(r"x<-1 \text{ or } x \geq 2"), as_intervals(r"\{x \mid x > 3\}"), as_intervals("(1,2)")
    (('x', '(-\\infty,-1)\\cup[ 2,\\infty)'), ('x', '(3,\\infty)'), (None, '(1,2)'))
    >>> as_intervals("x > 3 and x < 5")
    ('x', '(3,5)')
    """
    text = squeezed(text)
    if built := _BUILDER.fullmatch(text):
        text = built[2]
    pieces = [_piece(piece.strip()) for piece in LISTED.sub("\0", text).split("\0")]
    if any(piece is None for piece in pieces):
        return None
    names = {name for name, _ in pieces if name}  # type: ignore[misc]
    if len(names) > 1:
        return None
    ranges = [where for _, where in pieces]  # type: ignore[misc]
    both = None if re.search(r"\bor\b", text) else _between(ranges)
    return (names.pop() if names else None), both or r"\cup".join(ranges)


def _between(ranges: list[str]) -> str | None:
    """`x > 3 and x < 5`: two half-lines that overlap are all numbers together, so what is meant is where both hold."""
    above, below = (
        [found for each in ranges if (found := re.fullmatch(half, each))]
        for half in (r"([(\[])(.+),\\infty\)", r"\(-\\infty,(.+)([)\]])")
    )
    if len(ranges) != 2 or len(above) != 1 or len(below) != 1:
        return None
    low, high = number(above[0][2]), number(below[0][1])
    if low is None or high is None or not low.value < high.value:
        return None
    return f"{above[0][1]}{above[0][2]},{below[0][1]}{below[0][2]}"


def _piece(text: str) -> tuple[str | None, str] | None:
    if found := re.fullmatch(r"([A-Za-z])\\in(?![A-Za-z])(.*)", text):
        inner = _piece(found[2].strip())
        return (found[1], inner[1]) if inner and inner[0] is None else None
    if not re.search(r"[<>]|\\(?:leq|geq|neq)(?![A-Za-z])", text):
        interval = r"[(\[][^()\[\]]*(?:\([^()\[\]]*\)[^()\[\]]*)*,[^()\[\]]*(?:\([^()\[\]]*\)[^()\[\]]*)*[)\]]"
        french = re.fullmatch(r"([\[\]])([^\[\]()]+,[^\[\]()]+)([\[\]])", text)
        if french:
            text = f"{'[' if french[1] == '[' else '('}{french[2]}{']' if french[3] == ']' else ')'}"
        found = re.fullmatch(rf"{interval}(?:\\cup{interval})*|\\mathbb\{{R\}}(?:\\setminus\\\{{.*\\\}})?", text)
        return (None, text) if found else None
    if found := _APART.fullmatch(text):
        return found[1], rf"(-\infty,{found[2]})\cup({found[2]},\infty)"
    if found := _FIRST_BELOW.fullmatch(text):
        return found[1], rf"(-\infty,{found[3]}{']' if 'leq' in found[2] else ')'}"
    if found := _FIRST_ABOVE.fullmatch(text):
        return found[1], rf"{'[' if 'geq' in found[2] else '('}{found[3]},\infty)"
    if (found := _BELOW.fullmatch(text)) and found[1].strip():
        end = rf"{found[5]}{']' if 'leq' in found[4] else ')'}" if found[4] else r"\infty)"
        return found[3], rf"{'[' if 'leq' in found[2] else '('}{found[1]},{end}"
    if (found := _ABOVE.fullmatch(text)) and found[1].strip():
        start = rf"{'[' if 'geq' in found[4] else '('}{found[5]}" if found[4] else r"(-\infty"
        return found[3], rf"{start},{found[1]}{']' if 'geq' in found[2] else ')'}"
    return None
