"""Answers that are words, or the letter of a choice."""

from __future__ import annotations

import re

from capo_rl.answers.notation import bare

_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\{\s*([A-Za-z][A-Za-z ]*[A-Za-z])[.\s]*\}|([A-Za-z]{2,})")


def spelling(text: str) -> str | None:
    """The letters of an answer that is words and not mathematics."""
    found = _WORDS.fullmatch(text)
    return (found[1] or found[2]).replace(" ", "").casefold() if found else None


def is_word(a: str, b: str) -> bool:
    """Whether letters are a word, of which the order counts, and no product of variables."""
    if sorted(a) != sorted(b):
        return False
    return bool(re.search("[eiou]", a)) or (len(a) > 2 and "a" in a and not re.fullmatch("[a-dxyz]+", a))


_SYMBOL = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\w+)?|[A-Za-z]{2}|[A-DX-Za-dx-z]{3,}")


def other_case(a: str, b: str) -> bool:
    r"""Whether these are variables, or products of them, that differ in capitals alone; words may, and A to E.

    >>> other_case("M", "m"), other_case("x_{1}", "X_1"), other_case("No", "no"), other_case("C", "c")  # a choice
    (True, True, False, False)
    """
    a, b = (re.sub(r"\\mathrm|[{} ]", "", text) for text in (a, b))
    if a == b or a.casefold() != b.casefold() or re.fullmatch("[A-Ea-e]", a) or r"\text" in a:
        return False
    word = len(a) > 1 and a.isalpha() and is_word(a.casefold(), b.casefold())
    return bool(_SYMBOL.fullmatch(a) and _SYMBOL.fullmatch(b)) and not word


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
