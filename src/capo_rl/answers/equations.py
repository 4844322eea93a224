"""What an equation says: the value behind `name =`, or a relation that is no value."""

from __future__ import annotations

import re

from capo_rl.answers.lists import cut
from capo_rl.answers.notation import bare, plain
from capo_rl.answers.numbers import Number, number
from capo_rl.answers.rule import Rule
from capo_rl.answers.units import scaled, without_unit, without_words

# What a text says besides one number: then what follows its last `=` is not the answer.
OTHER_RELATION = re.compile(
    r"[<>;]|\\(?:leq|geq|neq|approx|equiv|sim|in|to|lor|land|mid|pm|mp|iff|implies|Rightarrow|quad|cup|cap)(?![A-Za-z])"
    r"|\\\\|\n|\b(?:or|and)\b|\\text\s*\{[^{}]*\b(?:or|and)\b"
)
_LETTERS = re.compile(r"\\(?:text|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]")
_GREEK_LETTER = re.compile(r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega)$")
_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)|\^?\{?(?:'|\\prime)\}?")
_CALLED = re.compile(r"[A-Za-z |{}]+(?:\([^()=]*\))?|\(?[A-Za-z ]+(?:,[A-Za-z ]+)*\)?")
_OF_FUNCTION = re.compile(r"\\(?:frac|sqrt|sin|cos|tan|log|ln|exp)(?![A-Za-z])")


def value(text: str, strict: bool = False) -> str | None:
    r"""What follows the `=` of `name = value`, a text without `=` as it is, and `None` for another equation or several.

    An expression of several letters counts as a name as well, since problems ask for them, unless `strict`.

    >>> value("m + n = 204"), value("2 + 3 = 5"), value("x=4, x=5"), value("2x = 10"), value("x = 2, 3")
    ('204', '5', None, None, '2, 3')
    """
    left, *rest = cut_at_equals(text)
    if not rest:
        return text
    *middle, last = rest
    if OTHER_RELATION.search(left + "=".join(middle)) or any(len(cut(part)) != 1 for part in middle):
        return None
    if any(re.search(r"[0-9)}.]\s*(?:\\?[,;: ])*\s*[A-Za-z](?:_\w)?\s*$", part) for part in middle):
        return None  # `x=5 y=6`
    name = _SUBSCRIPT.sub("", left).strip(" $")
    letters = {found for found in _LETTERS.findall(name) if len(found) == 1 or _GREEK_LETTER.match(found)}
    if _OF_FUNCTION.search(name) or not _CALLED.fullmatch(_LETTERS.sub("a", name)):
        if letters and (strict or len(letters) == 1):
            return None
        known = [found for part in (left, *middle) if (found := number(part)) is not None]
        if not letters and known and (end := number(last)) is not None and any(k.value != end.value for k in known):
            return None
    return last.strip()


def cut_at_equals(text: str) -> list[str]:
    r"""The text cut at each `=` that is not in braces, as that of `\sum_{k=1}` is."""
    if "=" not in text or "{" not in text:
        return text.split("=")
    sides, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "=" and depth <= 0:
            sides.append(text[start:at])
            start = at + 1
    return [*sides, text[start:]]


_INDEX = r"_(?:\{[^{}]*\}|\w)"
_QUANTITY = rf"[A-Z](?:[A-Z]+|{_INDEX})"  # a segment or an area, `AB` or `S_{1}`, where x and y would be unknowns
_RATIO = re.compile(
    rf"[A-Za-z]+(?:{_INDEX})?\s*:\s*[A-Za-z]+(?:{_INDEX})?"
    rf"|\\frac\{{{_QUANTITY}\}}\{{{_QUANTITY}\}}|{_QUANTITY}\s*/\s*{_QUANTITY}"
)


def ratio(text: str) -> str | None:
    r"""The value of a ratio that is named before it.

    >>> ratio(r"S_{ABC}:S=7:32"), ratio(r"\frac{AB}{CD}=2"), ratio(r"\frac{x}{y}=2")
    ('7:32', '2', None)
    """
    left, *rest = cut_at_equals(text)
    return rest[0].strip() if len(rest) == 1 and _RATIO.fullmatch(left.strip(" $")) else None


_SAYS = re.compile(
    r"(?:the |my |our )?(?:final |correct |right )?(?:answer|result|value|total)(?: is|:|=)\s*", re.IGNORECASE
)
_ALL_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def unwrapped(answer: str) -> str:
    r"""The answer in a spelling, out of the `\text{...}` that holds all of it, and without `The answer is`."""
    text = bare(plain(answer))
    if (found := _ALL_TEXT.fullmatch(text)) and re.match(r"\s*(?:[-+$\\]?[0-9]|[Tt]he|[Aa]nswer)", found[1]):
        text = bare(plain(found[1]))
    return _SAYS.sub("", text, count=1) if _SAYS.match(text) else text


def as_number(answer: str, rule: Rule) -> Number | None:
    text = unwrapped(answer)
    if (found := number(text)) is not None:
        return found
    text = without_unit(scaled(text), rule.unit)
    if rule.kind != "math":
        right = value(text)
        if right is None:
            return None
        text = bare(right)
        if (found := number(text)) is not None:
            return found
        text = without_unit(text, rule.unit)
    return number(without_words(text, rule.kind != "math"))


def gold_number(gold: str, rule: Rule) -> Number | None:
    text = without_unit(scaled(plain(gold)), rule.unit)
    found = number(text)
    return found if found is not None or rule.kind == "math" else number(without_words(text, True))
