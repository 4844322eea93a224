"""Numbers as they are written: exact, rounded, with a percent sign, in another base, or as a time of day."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from capo_rl.answers.notation import bare, plain, squeezed
from capo_rl.answers.rule import Rule

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,99}(?:\.[0-9]{0,300})?|[0-9]{1,300}(?:\.[0-9]{0,300})?|\.[0-9]{1,300})"
_POWER = r"10\^(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]))"
_NUMBER = re.compile(
    rf"([+-]?)(?:({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,3}}))?(?:(?:\\times|\\cdot|\*|x){_POWER})?|{_POWER})"
)
_LIST_OF_TWO = re.compile(r"[0-9],[\s~]+[0-9]")  # `32, 349`, not 32349; but `32,\! 349` is
_QUOTIENT = re.compile(
    rf"([+-]?)(?:\\frac(?:\{{(-?{_DECIMAL})\}}|([0-9]))(?:\{{({_DECIMAL})\}}|([0-9]))|({_DECIMAL})/({_DECIMAL}))"
)
_STYLED = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boldsymbol|mbox)\{([0-9().,-]+)\}")
_CURRENCY = re.compile(
    r"^([+-]?)(?:US)?(?:\\text\s*\{\s*)?(?:\\?\$|[€£¥₹₩¢]|(?:USD|EUR|GBP|Rs)\.?\s?)(?:\s*\})?|\\?\$$|[€£¥₹₩¢]$"
)
_DEGREES = re.compile(r"\^(?:\{\\circ\}|\\circ)$|\\degree$")


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


def compared(a: Number, b: Number, rule: Rule) -> tuple[bool, str]:
    """The verdict on two numbers, which tells a rounded answer from one that is more precise than the reference."""
    what = "integer" if not (a.decimal or b.decimal) and a.value.denominator == b.value.denominator == 1 else "number"
    if same_number(a, b, rule):
        return True, f"the same {what}"
    if a.decimal != b.decimal and a.value and b.value and abs(a.value - b.value) <= abs(b.value) / 100:
        return False, "less precise than the gold answer" if a.decimal else "more precise than the gold answer"
    return False, f"another {what}"


_TIME = re.compile(
    r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:\\text\s*\{\s*)?([ap])?\.?\s*(?:m\.?)?\s*\}?", re.IGNORECASE
)


def clock(text: str) -> tuple[int, int, int, str] | None:
    found = _TIME.fullmatch(bare(re.sub(r"\\[,;: ]|~", " ", plain(text))))
    return (int(found[1]), int(found[2]), int(found[3] or 0), (found[4] or "").lower()) if found else None


def same_time(a: tuple[int, int, int, str], b: tuple[int, int, int, str]) -> bool:
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


def based(text: str) -> tuple[str, str] | None:
    """The digits and the base of a number that names its base; nobody converts it."""
    found = _BASED.fullmatch(bare(plain(text)))
    if found is None:
        return None
    base = _BASE_WORDS.get(found[2], found[2])
    return (found[1].lstrip("0"), base) if base.isdigit() else None
