r"""Equality by algebra: sympy's and math-verify's (https://github.com/huggingface/Math-Verify).

Only a process that may die calls this.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from capo_rl.answers.formula import formula
from capo_rl.answers.notation import bare, plain
from capo_rl.answers.numbers import close
from capo_rl.answers.rule import Rule
from capo_rl.answers.units import scaled, without_unit


def equal(answer: str, gold: str, rule: Rule) -> bool:
    a, b = formula(_latex(answer)), formula(_latex(gold))
    if a is not None and b is not None:
        if a == b or _attempted(_identical, a, b):
            return True
        if rule.tolerance is None and rule.relative is None and _differ(a, b, rule):
            return False
    return any(
        _attempted(_readings_equal, reading, gold_reading, rule)
        for gold_reading in readings(gold)
        for reading in readings(answer)
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
def readings(answer: str) -> list[Any]:
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
    found = parse(f"\\boxed{{{latex}}}", [box_only], extraction_mode="first_match", parsing_timeout=None)
    if "i" not in latex or re.search(r"_\s*\{?\s*i(?![A-Za-z])", latex):  # an index
        return found
    from sympy import Basic, I

    def complex_(reading: Any) -> Any:
        try:
            return reading.subs({s: I for s in reading.free_symbols if str(s) == "i"})
        except (MemoryError, RecursionError):
            raise
        except Exception:  # an interval has no complex ends, and nothing complex is above anything
            return reading

    return [complex_(reading) if isinstance(reading, Basic) else reading for reading in found]


def _latex(answer: str) -> str:
    r"""The answer in the LaTeX that math-verify reads.

    >>> _latex(r"np.arcsin(10/13)"), _latex(r"y^{\prime}+\frac{d v}{d t}")
    ('\\arcsin (10/13)', '\\dot{y}+\\dot{v}')
    """
    answer = without_unit(scaled(bare(plain(bare(answer)))))
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
