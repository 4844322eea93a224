r"""Formulas of integers, letters, roots and powers, read at once: most of what math-verify takes long to read.

What is not surely one of them is `None`, and left to math-verify: decimals, functions, `1/2x`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

_TOKEN = re.compile(
    r"\s*(?:([0-9]{1,300})(?![0-9.,!])|([A-DF-Za-z])(?![A-Za-z(_!'])|(\\(?:frac|sqrt|pi|cdot|times)(?![A-Za-z])|[-+*/^(){}\[\]]))"
)


class _Unknown(Exception):
    pass


@functools.lru_cache(maxsize=4096)  # a benchmark compares many samples with the same reference answer
def formula(latex: str) -> Any | None:
    r"""The sympy expression of a formula, or `None`.

    >>> formula(r"\frac{3\sqrt{2}}{2}"), formula("2x(x+1)"), formula("0.5x")
    (3*sqrt(2)/2, None, None)
    """
    tokens, at = [], 0
    for found in _TOKEN.finditer(latex):
        if found.start() != at:
            return None
        tokens.append(found[1] or found[2] or found[3])
        at = found.end()
    if latex[at:].strip() or not 0 < len(tokens) <= 200:
        return None
    try:
        reader = _Reader(tokens)
        expression = reader.sum()
        reader.end()
    except (MemoryError, RecursionError):
        raise
    except Exception:  # no such formula, or one that sympy has no value for
        return None
    return expression


class _Reader:
    """A recursive descent over the tokens, with a sympy expression for each part."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*tokens, ""]
        self._at = 0

    def _peek(self) -> str:
        return self._tokens[self._at]

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if not token or (wanted and token not in wanted):
            raise _Unknown
        self._at += 1
        return token

    def end(self) -> None:
        if self._peek():
            raise _Unknown

    def sum(self) -> Any:
        total = self._product(self._signed())
        while self._peek() in ("+", "-"):
            sign = self._take()
            term = self._product(self._power())
            total = total + term if sign == "+" else total - term
        return total

    def _signed(self) -> Any:
        if self._peek() in ("+", "-"):
            return -self._product(self._power()) if self._take() == "-" else self._product(self._power())
        return self._power()

    def _product(self, left: Any) -> Any:
        divided = False
        while (token := self._peek()) and token not in "+-)}]":
            if token in ("*", "/", r"\cdot", r"\times"):
                self._take()
                right = self._power()
                left = left / right if token == "/" else left * right
                divided = token == "/"
            elif divided or token.isdigit() or (token == r"\frac" and self._tokens[self._at - 1].isdigit()):
                raise _Unknown  # `1/2x`, `2 3`, a mixed number
            else:
                left = left * self._power()
        return left

    def _power(self) -> Any:
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        if self._peek() == "{":
            return base ** self._group("{", "}")
        token = self._take()
        from sympy import Integer, Symbol

        if token.isdigit():  # TeX takes the first digit only, a writer means them all: both or neither
            if len(token) > 1:
                raise _Unknown
            return base ** Integer(token)
        if token.isalpha() and token not in "ie":
            return base ** Symbol(token)
        raise _Unknown

    def _group(self, opening: str, closing: str) -> Any:
        self._take(opening)
        inside = self.sum()
        self._take(closing)
        return inside

    def _atom(self) -> Any:
        from sympy import E, I, Integer, Symbol, pi, root, sqrt

        token = self._peek()
        if token == "(":
            return self._group("(", ")")
        if token == "{":
            return self._group("{", "}")
        self._take()
        if token.isdigit():
            return Integer(token)
        if token.isalpha():
            return {"i": I, "e": E}.get(token) or Symbol(token)
        if token == r"\pi":
            return pi
        if token == r"\frac":
            above, below = self._group("{", "}"), self._group("{", "}")
            if below == 0:
                raise _Unknown
            return above / below
        if token == r"\sqrt":
            degree = self._group("[", "]") if self._peek() == "[" else None
            inside = self._group("{", "}")
            return sqrt(inside) if degree is None else root(inside, degree)
        raise _Unknown
