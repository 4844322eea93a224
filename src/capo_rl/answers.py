r"""What an answer is: where it stands in a completion, and when it equals the reference answer.

Text and numbers are compared here and at once; the rest is algebra, which math-verify decides
(https://github.com/huggingface/Math-Verify). `grading` runs that algebra in processes that may die. The rules
follow what the sets' own graders do: several answers in any order and a stated tolerance, from OlympiadBench's
judge (https://github.com/OpenBMB/OlympiadBench); units, scientific notation and a relative tolerance, from
Minerva's normalisation in lm-evaluation-harness and from Qwen2.5-Math's evaluation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from capo_rl.formula import formula
from capo_rl.notation import plain
from capo_rl.units import changes, without_words

KINDS = {
    "math": "any expression, compared by algebra",
    "number": "one number, perhaps with a currency, a unit, or `name =` before it",
    "integer": "one whole number, without tolerance",
    "letter": "the letter of a choice",
}

TAIL = 16_384  # characters of a completion that are read, from its end: the answer comes last
LONGEST_ANSWER = 2_000  # the longest reference answer of MATH has 159 characters


@dataclass(frozen=True)
class Rule:
    """How an answer is found and compared.

    `kind` is a key of `KINDS`; `multiple`: several answers, in any order. `tolerance` is absolute, as the problem
    states it. `relative` is for reference answers that are rounded: a relative difference that still counts as
    equal; without either, decimals have to agree to 6 places (and to 1e-6 of their size, if that is smaller).
    `unit` is one that may follow the number. With `fallbacks`, a completion without a box may end in `#### 42`,
    `The answer is 42` or `Answer: 42`.

    Raises `ValueError` for an unknown kind.
    """

    kind: str = "math"
    multiple: bool = False
    tolerance: float | None = None
    relative: float | None = None
    unit: str | None = None
    fallbacks: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(KINDS)}")


# --- where the answer is

_BEFORE, _AFTER = " \t\r\n$", " \t\r\n$.,;:"  # what may surround an answer without changing it
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_STATED = re.compile(r"\banswer\b[\s*]*(?:is\b|:)[\s:*]*", re.IGNORECASE)
# Where what is stated ends before its line does: at a sentence, or at a clause that only explains it.
_STATED_END = re.compile(r"(?<=[.!?])\$*\s+(?=[A-Z])|(?<!\s),?\s+(?:because|since|which|where)\b")
_BOLD_END = re.compile(r"(?<=[^\s*])\*\*(?=[\s.,;:]|$)")
_DELIMITED = re.compile(r"\\[(\[]((?:(?!\\[()\[\]]).)*)\\[)\]][.,;:]?")


def final_text(completion: str) -> str:
    """What follows the reasoning: the text after the last `</think>`, up to a `<think>` that was never closed.

    >>> final_text("<think>2+2=4</think>It is 4.")
    'It is 4.'
    >>> final_text("<think>2+2=4, no wait")
    ''
    """
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}`, or `None`; linear in the length of the text.

    >>> extract_answer(r"First \boxed{1}, no: $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> extract_answer(r"so it is $\boxed 2$.")
    '2'
    >>> extract_answer(r"cut off: \boxed{\frac{1}{2")
    """
    start = None
    for box in _BOX.finditer(text):
        start = box.end()
    if start is None:
        return None
    if not text.startswith("{", start):
        token = re.compile(r"[^\s$]*").match(text, start)
        return (token[0].rstrip(".,;:") if token else "") or None
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # an escaped brace is matched with its backslash: 0
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None


def stated_answer(text: str) -> str | None:
    """The answer outside a box: after the last `####` that starts a line, else what the last line says it is.

    >>> stated_answer("3 * 14 = 42\\n#### 42"), stated_answer("Hence:\\n**Answer:** C"), stated_answer("I see 42.")
    ('42', 'C', None)
    >>> stated_answer("The answer is $2$. I hope it is correct."), stated_answer("The answer is 4, but it may be 5.")
    ('$2$.', '4, but it may be 5.')
    """
    if hashes := _HASHES.findall(text):
        answer = hashes[-1]
    else:
        _, *stated = _STATED.split(text.rstrip().rpartition("\n")[2])
        answer = stated[-1] if stated else ""
        if ended := _STATED_END.search(answer):
            answer = answer[: ended.start()]
    answer = _BOLD_END.sub("", answer).strip(" \t\r*")
    delimited = _DELIMITED.fullmatch(answer)
    return (delimited[1].strip() if delimited else answer) or None


def bare(answer: str) -> str:
    r"""The answer without the dollars, spaces and punctuation around it; `\,` and `\$` stay whole."""
    answer = answer.lstrip(_BEFORE)
    kept = answer.rstrip(_AFTER)
    return answer[: len(kept) + 1] if kept.endswith("\\") else kept


# --- text

_SPACING = re.compile(r"(?<!\\)\\[,!;: ]|~")
_BRACED = re.compile(r"\{[^{}]*\}")
_UNNEEDED_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_TEXT = r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{(?:[^{}]|\{[^{}]*\})*\}"
_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\{\s*([A-Za-z][A-Za-z ]*[A-Za-z])[.\s]*\}|([A-Za-z]{2,})")
# Text after a number, with its power. No two parts of this can match the same space: it takes linear time.
_TEXT_UNIT = re.compile(
    rf"(?:(?: ?(?:\\cdot|/|\\[,;: ]|~) ?| )?(?:\\mu ?)?{_TEXT}(?:\^(?:\{{-?[0-9]\}}|-?[0-9]))?)+ ?$"
)
# Words that are a part of the number, or of a list.
_NO_UNIT = re.compile(r"hundred|dozen|\bor\b|\band\b|[a-z]\s*\{\s*(?:[0-9.]+|[ei])\s*\}", re.IGNORECASE)
_STYLED = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boldsymbol|mbox)\{([0-9().,-]+)\}")


def squeezed(text: str) -> str:
    r"""The text without what only changes how it looks.

    >>> squeezed(r"\left( 3,\, \dfrac{\pi}{2} \right)")
    '(3,\\frac{\\pi}{2})'
    """
    text = _UNNEEDED_SPACE.sub("", _SPACING.sub(" ", bare(plain(text))).replace("{,}", ","))
    while text.startswith("{") and _BRACED.fullmatch(text):
        text = text[1:-1]
    return bare(text)


def without_unit(text: str, unit: str | None = None) -> str:
    r"""The text without a unit behind it that is set as text, and without `unit`; a unit is not checked.

    >>> without_unit(r"864 \text{ inches}^2"), without_unit("45 minutes", "minute"), without_unit(r"\text{east}")
    ('864', '45', '\\text{east}')
    """
    text = re.sub(r"\s+", " ", text)
    found = _TEXT_UNIT.search(text)
    if found and text[: found.start()].strip() and not _NO_UNIT.search(found[0]) and not changes(found[0]):
        text = text[: found.start()].rstrip()
    plain = bare(unit or "").strip()
    if plain and (ended := re.search(rf"(?<![A-Za-z\\])\s*{re.escape(plain)}s?$", text)) and ended.start():
        text = text[: ended.start()].rstrip()
    return text


_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[0-9])[\s~]*(\\(?:text|mathrm|mbox)\s*\{{[\s~]*)?({'|'.join(_SCALES)})s?\b(?(1)[^{{}}]*\}})")


def _scaled(text: str) -> str:
    r"""The text with a power of ten where it says so in words.

    >>> _scaled(r"5 \text{ million}"), _scaled("5 million dollars")
    ('5\\times 10^{6}', '5\\times 10^{6} dollars')
    """
    return _SCALE.sub(lambda found: rf"\times 10^{{{_SCALES[found[2]]}}}", text)


def _words(text: str) -> str | None:
    """The letters of an answer that is words and not mathematics."""
    found = _WORDS.fullmatch(text)
    return (found[1] or found[2]).replace(" ", "").casefold() if found else None


def letter(text: str) -> str | None:
    r"""The choice that an answer names, or `None`.

    >>> letter(r"\text{(B)}"), letter("c"), letter("D) 3 eV"), letter("A dog"), letter("А")  # a Cyrillic one
    ('B', 'C', 'D', None, None)
    """
    text = re.sub(r"\\(?:text|textbf|mathbf|mathrm)\s*\{([^{}]*)\}", r"\1", bare(text)).strip(" *")
    text = re.sub(r"\\[,;: ]|~", " ", text)
    text = re.sub(r"(?i)^(?:(?:the |my )?(?:final |correct )?(?:answer|option|choice)(?: is)?[:\s]+){1,2}", "", text)
    text = re.sub(r"^\[([A-Za-z])\]$", r"\1", text.strip(" *."))
    found = re.fullmatch(r"\(?([A-Za-z])\)?|\(?([A-Za-z])(?:\)|[.:])\s.*", text, re.DOTALL)
    return (found[1] or found[2]).upper() if found else None


# --- numbers

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,99}(?:\.[0-9]{0,300})?|[0-9]{1,300}(?:\.[0-9]{0,300})?|\.[0-9]{1,300})"
_POWER = r"10\^(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]))"
_NUMBER = re.compile(
    rf"([+-]?)(?:({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,3}}))?(?:(?:\\times|\\cdot|\*|x){_POWER})?|{_POWER})"
)
_LIST_OF_TWO = re.compile(r"[0-9],[\s~]+[0-9]")  # `32, 349`, not 32349; but `32,\! 349` is
_QUOTIENT = re.compile(
    rf"([+-]?)(?:\\frac(?:\{{(-?{_DECIMAL})\}}|([0-9]))(?:\{{({_DECIMAL})\}}|([0-9]))|({_DECIMAL})/({_DECIMAL}))"
)
_CURRENCY = re.compile(
    r"^([+-]?)(?:US)?(?:\\text\s*\{\s*)?(?:\\?\$|[€£¥₹₩¢]|(?:USD|EUR|GBP|Rs)\.?\s?)(?:\s*\})?|\\?\$$|[€£¥₹₩¢]$"
)
_DEGREES = re.compile(r"\^(?:\{\\circ\}|\\circ)$|\\degree$")
_NAME = re.compile(r"^\(?[A-Za-z](?:_(?:\w|\{\w+\}))?(?:, ?[A-Za-z](?:_(?:\w|\{\w+\}))?)*\)?\s*(?:=|\\in(?![A-Za-z]))")


@dataclass(frozen=True)
class Number:
    """A number as it was written: its value, whether it may be rounded, and whether it had a percent sign."""

    value: Fraction
    decimal: bool = False
    percent: bool = False


def number(text: str) -> Number | None:
    r"""The number that a text is, exactly, or `None`; what has more than 300 digits is left to algebra.

    >>> number(r"\$1,234.50").value, number(r"4.5 \times 10^{3}").value, number(r"-\frac{1}{2}").value
    (Fraction(2469, 2), Fraction(4500, 1), Fraction(-1, 2))
    >>> number("62.5\\%"), number("2k")
    (Number(value=Fraction(125, 2), decimal=True, percent=True), None)
    """
    if _LIST_OF_TWO.search(text):
        return None
    # Spaces go, but not between digits: `1 2` is no number.
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", _DEGREES.sub("", squeezed(text)))
    text = _CURRENCY.sub(lambda found: found[1] or "", _STYLED.sub(r"\1", text))
    text = re.sub(r"^\(([^(),]*)\)$", r"\1", text)
    kept = text.removesuffix("%").removesuffix("\\")
    percent = text.endswith("%")
    if not percent:
        kept = text
    if found := _NUMBER.fullmatch(kept):
        sign, digits, exponent, *powers = found.groups()
        value = Fraction((digits or "1").replace(",", "")) * Fraction(10) ** sum(
            int(power) for power in (exponent, *powers) if power
        )
        decimal = bool(exponent) or "." in (digits or "") or (bool(digits) and any(powers))
    elif found := _QUOTIENT.fullmatch(kept):
        sign, *rest = found.groups()
        above, below = [part.replace(",", "") for part in rest if part]
        if not Fraction(below):
            return None
        value = Fraction(above) / Fraction(below)
        decimal = "." in above.rstrip(".") or "." in below.rstrip(".")
    else:
        return None
    return Number(-value if sign == "-" else value, decimal, percent)


def close(a: Any, b: Any, rule: Rule) -> bool:
    """Whether two numbers, one of which may be rounded, are equal by the rule; they may be sympy's."""
    scale = max(abs(a), abs(b))
    if rule.tolerance is not None:
        return bool(abs(a - b) <= Fraction(str(rule.tolerance)))
    if rule.relative is not None:
        return bool(abs(a - b) <= Fraction(str(rule.relative)) * scale)
    return bool(abs(a - b) <= Fraction(1, 10**6) * min(1, scale))


def same_number(a: Number, b: Number, rule: Rule) -> bool:
    """Whether the numbers are equal; with a percent sign on one side only, 50% is both 50 and 1/2."""
    pairs = [(a.value, b.value)]
    if a.percent != b.percent:
        pairs.append((a.value / 100, b.value) if a.percent else (a.value, b.value / 100))
    exact = rule.kind == "integer" or (rule.tolerance is None and not (a.decimal or b.decimal))
    return any(x == y if exact else close(x, y, rule) for x, y in pairs)


# --- equality of one answer with one reference answer, as far as no algebra is needed


def quick(answer: str, gold: str, rule: Rule) -> tuple[bool, str] | None:
    r"""The verdict and its reason, or `None` where only algebra can tell.

    >>> quick("1/2", "0.5", Rule()), quick(r"\frac{\pi}{2}", "1.57", Rule())
    ((True, 'the same number'), None)
    """
    if rule.kind == "letter":
        named = letter(answer)
        if named is None:
            return False, "not a letter"
        return (True, "the same letter") if named == letter(gold) else (False, "another letter")
    text, gold_text = squeezed(answer), squeezed(gold)
    if text == gold_text:
        return True, "the same text"
    a, b = _as_number(answer, rule), _gold_number(gold, rule)
    if a is not None and b is not None:
        return _compared(a, b, rule)
    # What follows would be read as numbers, products or points by an algebra that knows nothing of it.
    times = _clock(answer), _clock(gold)
    if times[0] is not None and times[1] is not None:
        return (True, "the same time") if _same_time(times[0], times[1]) else (False, "another time")
    bases = _based(answer), _based(gold)
    if bases[0] is not None and bases[1] is not None:
        return (True, "the same number") if bases[0] == bases[1] else (False, "another number")
    if any(bases) and (a is not None or b is not None):
        return False, "a number that names its base against one that does not"
    brackets = _bracketed(answer), _bracketed(gold)
    if all(brackets) and brackets[0] != brackets[1]:
        return False, "another kind of brackets"
    words, gold_words = _words(text), _words(gold_text)
    if words is not None and gold_words is not None and ("\\" in text[:1] + gold_text[:1] or _spelt(words, gold_words)):
        return (True, "the same words") if words == gold_words else (False, "other words")
    if rule.kind != "math" and b is not None and ("," in _unwrapped(answer) or _OTHER_RELATION.search(plain(answer))):
        return False, "not one number"
    return None


def _compared(a: Number, b: Number, rule: Rule) -> tuple[bool, str]:
    """The verdict on two numbers, which tells a rounded answer from one that is more precise than the reference."""
    what = "integer" if not (a.decimal or b.decimal) and a.value.denominator == b.value.denominator == 1 else "number"
    if same_number(a, b, rule):
        return True, f"the same {what}"
    if a.decimal != b.decimal and a.value and b.value and abs(a.value - b.value) <= abs(b.value) / 100:
        return False, "less precise than the gold answer" if a.decimal else "more precise than the gold answer"
    return False, f"another {what}"


def _gold_number(gold: str, rule: Rule) -> Number | None:
    text = without_unit(_scaled(plain(gold)), rule.unit)
    found = number(text)
    return found if found is not None or rule.kind == "math" else number(without_words(text, True))


# What a text says besides one number: then what follows its last `=` is not the answer.
_OTHER_RELATION = re.compile(
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
    left, *rest = _sides(text)
    if not rest:
        return text
    *middle, last = rest
    if _OTHER_RELATION.search(left + "=".join(middle)) or any(len(_cut(part)) != 1 for part in middle):
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


def _sides(text: str) -> list[str]:
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


_SAYS = re.compile(
    r"(?:the |my |our )?(?:final |correct |right )?(?:answer|result|value|total)(?: is|:|=)\s*", re.IGNORECASE
)
_ALL_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def _unwrapped(answer: str) -> str:
    r"""The answer in a spelling, out of the `\text{...}` that holds all of it, and without `The answer is`."""
    text = bare(plain(answer))
    if (found := _ALL_TEXT.fullmatch(text)) and re.match(r"\s*(?:[-+$\\]?[0-9]|[Tt]he|[Aa]nswer)", found[1]):
        text = bare(plain(found[1]))
    return _SAYS.sub("", text, count=1) if _SAYS.match(text) else text


def _as_number(answer: str, rule: Rule) -> Number | None:
    text = _unwrapped(answer)
    if (found := number(text)) is not None:
        return found
    text = without_unit(_scaled(text), rule.unit)
    if rule.kind != "math":
        right = value(text)
        if right is None:
            return None
        text = bare(right)
        if (found := number(text)) is not None:
            return found
        text = without_unit(text, rule.unit)
    return number(without_words(text, rule.kind != "math"))


_TIME = re.compile(
    r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:\\text\s*\{\s*)?([ap])?\.?\s*(?:m\.?)?\s*\}?", re.IGNORECASE
)


def _clock(text: str) -> tuple[int, int, int, str] | None:
    found = _TIME.fullmatch(bare(re.sub(r"\\[,;: ]|~", " ", plain(text))))
    return (int(found[1]), int(found[2]), int(found[3] or 0), (found[4] or "").lower()) if found else None


def _same_time(a: tuple[int, int, int, str], b: tuple[int, int, int, str]) -> bool:
    """Whether the hours are, of one that says am or pm and one that may count to 24 or not."""

    def hours(time: tuple[int, int, int, str]) -> set[int]:
        return {time[0] % 12 + (12 if time[3] == "p" else 0)} if time[3] else {time[0]}

    same = hours(a) & hours(b) or (bool(a[3]) != bool(b[3]) and a[0] == b[0])
    return bool(same) and a[1:3] == b[1:3]


_BASE_WORDS = {
    word: str(n)
    for n, word in enumerate(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], 2
    )
} | {"sixteen": "16"}
_BASED = re.compile(
    r"\(?([0-9A-F]+)\)?\s*(?:_\s*\{?\s*\(?|\\?[,;: ]*(?:\\text\s*\{\s*)?\(?\s*(?=(?:in )?base))"
    r"(?:\\text\s*\{\s*)?(?:(?:in )?base[\s}]*)?([0-9]{1,2}|[a-z]+)[\s)}]*"
)


def _based(text: str) -> tuple[str, str] | None:
    """The digits and the base of a number that names its base; nobody converts it."""
    found = _BASED.fullmatch(bare(plain(text)))
    if found is None:
        return None
    base = _BASE_WORDS.get(found[2], found[2])
    return (found[1].lstrip("0"), base) if base.isdigit() else None


def _bracketed(text: str) -> str | None:
    """The brackets around a list of several, by which a set differs from a point or an interval."""
    text = squeezed(re.sub(r"^[^=({\[]*(?:\([^()]*\))?=", "", plain(text)))
    inner = text[2:-2] if text.startswith(r"\{") and text.endswith(r"\}") else text[1:-1]
    opening = text[: (len(text) - len(inner)) // 2]
    if opening not in ("(", "[", r"\{") or text[-1:] not in ")]}" or len(_cut(inner)) < 2:
        return None
    depth = 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
    return opening + text[-1]


def _spelt(a: str, b: str) -> bool:
    """Whether letters are a word, of which the order counts, and no product of variables."""
    if sorted(a) != sorted(b):
        return False
    return bool(re.search("[eiou]", a)) or (len(a) > 2 and "a" in a and not re.fullmatch("[a-dxyz]+", a))


# --- several answers

_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")
_LISTED = re.compile(r"(?:, ?|\b| )(?:\\(?:text|mathrm) ?\{ ?(?:and|or) ?\}|(?:and|or)\b)|;")


def parts(text: str, expected: int | None = None) -> list[str]:
    r"""The answers of a list, cut at its outer commas, with `\pm` written out.

    Where this doesn't give the `expected` number, commas inside numbers such as `1,350` don't count.

    >>> parts(r"(1,2), (3,4)"), parts(r"x = \pm 2 \text{ or } 5"), parts("2,400, 864", 2)
    (['(1,2)', '(3,4)'], ['+2', '-2', '5'], ['2400', '864'])
    """
    text = re.sub(r"\s+", " ", _SPACING.sub(" ", bare(plain(text)).replace("{,}", "").replace(r",\!", "")))
    text = _NAME.sub("", text, count=1).strip()
    if text.startswith(r"\{") and text.endswith(r"\}") and text.count(r"\{") == 1:
        text = text[2:-2]
    text = _LISTED.sub(", ", text)
    found = _cut(text)
    if expected is not None and len(found) != expected:
        found = _cut(_THOUSANDS.sub(lambda grouped: grouped[0].replace(",", ""), text))
    return found


def _cut(text: str) -> list[str]:
    pieces, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == ",":
            pieces.append(text[start:at])
            start = at + 1
    pieces.append(text[start:])
    return _expanded([piece for piece in map(bare, pieces) if piece])


def _expanded(pieces: list[str]) -> list[str]:
    both = (
        [piece.replace(r"\pm", sign).replace("±", sign).replace("+ ", "+").replace("- ", "-") for sign in "+-"]
        if r"\pm" in piece or "±" in piece
        else [piece]
        for piece in pieces
    )
    return [_NAME.sub("", piece, count=1).strip() for pair in both for piece in pair]


def matched(answers: Sequence[str], golds: Sequence[str], equal: Callable[[str, str], bool]) -> bool:
    """Whether the answers are the reference answers in some order, each of them once."""
    if len(answers) != len(golds):
        return False
    left = list(answers)
    for gold in golds:
        found = next((i for i, answer in enumerate(left) if equal(answer, gold)), None)
        if found is None:
            return False
        del left[found]
    return True


# --- algebra; only a process that may die calls what is below


def judge(answer: str, gold: str, rule: Rule) -> tuple[bool | None, str]:
    """The verdict where `quick` has none: `None` if the reference answer can't be read."""
    answer, gold = plain(answer), plain(gold)
    golds = parts(gold) if rule.multiple else [gold]
    answers = parts(answer, len(golds)) if rule.multiple else [answer]
    if rule.multiple and len(answers) != len(golds):
        return False, f"{len(answers)} answers, not {len(golds)}"

    def equal(answer: str, gold: str) -> bool:
        verdict = quick(answer, gold, rule)
        return verdict[0] if verdict else _same(answer, gold, rule)

    if matched(answers, golds, equal):
        return True, "equal by math-verify"
    if not all(readable(part) for part in golds):
        return None, "the gold answer does not parse"  # other texts may well mean the same
    read = all(_parse(part) for part in answers)
    return False, "different by math-verify" if read else "the answer does not parse"


def _same(answer: str, gold: str, rule: Rule) -> bool:
    """Equality by algebra, of what the two say: intervals for inequalities, and all of an equation."""
    ranges = _range(answer), _range(gold)
    if all(ranges):
        (name, answer), (gold_name, gold) = ranges  # type: ignore[misc]
        if name and gold_name and name != gold_name:
            return False
    sides, gold_sides = _sides(answer), _sides(gold)
    equations = [
        len(each) > 1 and not _OTHER_RELATION.search(text) and len(_cut(text)) == 1
        for each, text in ((sides, answer), (gold_sides, gold))
    ]
    if equations[0] and equations[1]:
        left, right, gold_left, gold_right = sides[0], sides[-1], gold_sides[0], gold_sides[-1]
        if left.strip() != gold_left.strip() and not re.search("[A-Za-z]", right + gold_right):
            names = [left.strip(), gold_left.strip()]
            if all(re.fullmatch("[A-Za-z]", name) for name in names):
                return False  # x=2 against y=2
        called = [re.fullmatch(r"\s*[A-Za-z]\([A-Za-z]\)\s*", name) for name in (left, gold_left)]
        if len(sides) == len(gold_sides) == 2 and sum(map(bool, called)) == 1:
            named, name = (gold_left, left) if called[1] else (left, gold_left)
            if re.fullmatch(r"\s*[A-Za-z]\s*", name) and name.strip() not in named:
                return _equal(right, gold_right, rule)  # y = 2x and f(x) = 2x
    elif (equations[0] and value(answer) is None) or (equations[1] and value(gold, strict=True) is None):
        return False
    return _equal(answer, gold, rule)


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


def _range(text: str) -> tuple[str | None, str] | None:
    r"""The variable, if it is named, and the intervals of an inequality, several, or a set of them; otherwise `None`.

    >>> _range(r"x<-1 \text{ or } x \geq 2"), _range(r"\{x \mid x > 3\}"), _range("(1,2)")
    (('x', '(-\\infty,-1)\\cup[ 2,\\infty)'), ('x', '(3,\\infty)'), (None, '(1,2)'))
    """
    text = squeezed(text)
    if built := _BUILDER.fullmatch(text):
        text = built[2]
    pieces = [_piece(piece.strip()) for piece in _LISTED.sub("\0", text).split("\0")]
    if any(piece is None for piece in pieces):
        return None
    names = {name for name, _ in pieces if name}  # type: ignore[misc]
    if len(names) > 1:
        return None
    return (names.pop() if names else None), r"\cup".join(where for _, where in pieces)  # type: ignore[misc]


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


def readable(gold: str) -> bool:
    """Whether a reference answer can be compared with anything but its own text."""
    return (
        number(without_unit(squeezed(gold))) is not None
        or letter(gold) is not None
        or any(not isinstance(reading, str) for reading in _parse(gold))
    )


def _equal(answer: str, gold: str, rule: Rule) -> bool:
    if rule.tolerance is None and rule.relative is None:
        a, b = formula(_latex(answer)), formula(_latex(gold))
        if a is not None and b is not None and _attempted(_identical, a, b):
            return True
        if a is not None and b is not None and _differ(a, b, rule):
            return False
    return any(
        _attempted(_readings_equal, reading, gold_reading, rule)
        for gold_reading in _parse(gold)
        for reading in _parse(answer)
    )


def _attempted(equal: Callable[..., bool], *of: Any) -> bool:
    """Whether they are equal; what sympy can't compare, say a matrix with an interval, differs."""
    try:
        return equal(*of)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return False


def _readings_equal(reading: Any, gold: Any, rule: Rule) -> bool:
    from math_verify import verify

    if _identical(reading, gold):
        return True
    if (_vanishing(reading) and not _vanishing(gold)) or _differ(reading, gold, rule):
        return False
    equal = verify(gold, reading, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    near = _near(reading, gold, rule)
    # math-verify rounds to 6 places, which makes 1e-8 equal to 2e-8.
    rounded = rule.tolerance is not None or rule.relative is not None or _has_decimals(reading, gold)
    return (equal and near is not False) or bool(rounded and near) or (not equal and _where_real(reading, gold))


def _where_real(a: Any, b: Any) -> bool:
    """Whether two expressions are equal for positive variables, and for others wherever they are real: √(1/n), 1/√n."""
    from itertools import product

    from sympy import Dummy, Expr, N, Pow, Rational, simplify

    if not all(isinstance(x, Expr) and x.has(Pow) for x in (a, b)):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not 0 < len(symbols) <= 3 or len(str(a)) + len(str(b)) > 200:
        return False
    for signs in product((1, -1), repeat=len(symbols)):
        point = {
            symbol: sign * Rational(7 + 3 * i, 5 + i)
            for i, (symbol, sign) in enumerate(zip(symbols, signs, strict=True))
        }
        x, y = complex(N(a.subs(point))), complex(N(b.subs(point)))
        if abs(x - y) > 1e-9 * abs(x) and (abs(x.imag) < 1e-12 or abs(y.imag) < 1e-12):
            return False
    positive = {symbol: Dummy(positive=True) for symbol in symbols}
    return bool(simplify(a.doit().subs(positive) - b.doit().subs(positive)) == 0)


def _identical(a: Any, b: Any) -> bool:
    """Whether two expressions are one as soon as sympy has put them in order, which is most of those that are equal."""
    from sympy import Expr, Float, Symbol

    if not all(isinstance(x, Expr) and not isinstance(x, Symbol) and not x.has(Float) for x in (a, b)):
        return False
    return bool(a == b or a.doit() == b.doit())


def _vanishing(reading: Any) -> bool:
    """Whether this is an equation like `x + 2y = 0`; math-verify takes the right side for a value, 0."""
    from sympy import Add, Eq

    return isinstance(reading, Eq) and reading.rhs == 0 and isinstance(reading.lhs, Add)


def _differ(a: Any, b: Any, rule: Rule) -> bool:
    """Whether two expressions have clearly other values where their variables have some: no need to simplify them."""
    from sympy import Expr, N, Rational, Symbol, UnevaluatedExpr

    if rule.tolerance is not None:
        return False
    if any(not isinstance(x, Expr) or isinstance(x, Symbol) or x.has(UnevaluatedExpr) for x in (a, b)):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {symbol: Rational(7 + 3 * i, 5 + i) for i, symbol in enumerate(symbols)}
    try:
        x, y = complex(N(a.subs(point))), complex(N(b.subs(point)))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # an unknown function, or a value without bounds
        return False
    return abs(x - y) > max(1e-3 * max(abs(x), abs(y)), 1e-9)  # sums that should be 0 are not, quite


def _near(a: Any, b: Any, rule: Rule) -> bool | None:
    """Whether two values are close, or `None` if they aren't both real numbers without a percent sign."""
    from sympy import Expr, N, UnevaluatedExpr

    if not all(isinstance(x, Expr) and x.is_number and not x.has(UnevaluatedExpr) for x in (a, b)):
        return None
    exact = rule.tolerance is None and rule.relative is None and not _has_decimals(a, b)
    a, b = (N(_exactly(x).doit(), 60) for x in (a, b))
    (x, y), (u, v) = a.as_real_imag(), b.as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in (x, y, u, v)):
        return None
    if exact:  # math-verify takes two that agree to 15 places for equal
        return bool(max(abs(x - u), abs(y - v)) <= Fraction(1, 10**40) * max(abs(x), abs(y), abs(u), abs(v), 1e-300))
    return close(x, u, rule) and close(y, v, rule)


def _exactly(reading: Any) -> Any:
    """An expression with the fractions that its decimals are, so that 10^20 + 0.5 is not 10^20."""
    from sympy import Float, Rational

    return reading.xreplace({decimal: Rational(str(decimal)) for decimal in reading.atoms(Float)})


def _has_decimals(*readings: Any) -> bool:
    from sympy import Basic, Float

    return any(isinstance(reading, Basic) and reading.has(Float) for reading in readings)


@functools.lru_cache(maxsize=4096)  # a benchmark compares many samples with the same reference answer
def _parse(answer: str) -> list[Any]:
    """What math-verify reads in an answer: an expression and its text, only the text, or nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # The box and nothing else. By default math-verify goes on to search an answer that it can't parse, and
    # takes the last fraction or number in it: it reads `\frac{7}{5} + \frac{1}{5} i.`, from MATH, as 1/5.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    box_only = LatexExtractionConfig(
        boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=normalization
    )
    latex = _latex(answer)
    readings = parse(f"\\boxed{{{latex}}}", [box_only], extraction_mode="first_match", parsing_timeout=None)
    if "i" not in latex or re.search(r"_\s*\{?\s*i(?![A-Za-z])", latex):  # an index
        return readings
    from sympy import Basic, I

    def complex_(reading: Any) -> Any:
        try:
            return reading.subs({s: I for s in reading.free_symbols if str(s) == "i"})
        except (MemoryError, RecursionError):
            raise
        except Exception:  # an interval has no complex ends, and nothing complex is above anything
            return reading

    return [complex_(reading) if isinstance(reading, Basic) else reading for reading in readings]


def _latex(answer: str) -> str:
    r"""The answer in the LaTeX that math-verify reads.

    >>> _latex(r"np.arcsin(10/13)"), _latex(r"y^{\prime}+\frac{d v}{d t}")
    ('\\arcsin (10/13)', '\\dot{y}+\\dot{v}')
    """
    answer = without_unit(_scaled(bare(plain(bare(answer)))))
    answer = re.sub(r"\\dot\s+([A-Za-z])", r"\\dot{\1}", answer)
    # A product: math-verify takes `3 (1/3)` for a mixed number.
    answer = re.sub(r"(?<![_^.0-9])([0-9]+)\s*(?=(?:\\left)?\()", r"\1 \\cdot ", answer)
    answer = re.sub(r"\bnp\.\\?", r"\\", answer)  # MinervaMath has Python in one reference answer
    answer = re.sub(r"^[a-z](?=\([^()\[\]]*\]$)", "", answer)  # OlympiadBench has an interval `t(0,4]`
    answer = re.sub(r"_(?:\\odot|\{\\odot\})", "_{o}", answer)
    answer = re.sub(r"_\{\\(max|min) *\}", r"_{\1}", answer)
    answer = re.sub(r"(?<![A-Za-z\\])E(?=_)", r"\\varepsilon", answer)  # an energy; E alone is Euler's number
    answer = re.sub(r"\\frac\{d ?([A-Za-z])\}\{d ?[xt]\}", r"\\dot{\1}", answer)  # one symbol for a derivative
    return re.sub(r"([A-Za-z])(?:'|\^\{?\\prime\}?)(?!')", r"\\dot{\1}", answer)
