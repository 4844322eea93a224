"""Arithmetic with chains of thought, without end: the task of the quickstart and of the testbed.

A problem is a row of digits to be added and subtracted modulo 10. Its solution works from left to right, a step a line,
and after each result says a word that means nothing. The words follow Zipf's law (frequency ∝ 1/rank), so that most
of the vocabulary is rare, as in language, and no rare word changes an answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, product

_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvz", "aeiou", ("", "n", "r", "l", "s", "m", "k")

# 480 words of two syllables, in the order of their rank.
WORDS: tuple[str, ...] = tuple(
    random.Random(0).sample(
        [a + b + c + d + e for a, b, c, d, e in product(_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS)], 480
    )
)
_CUMULATIVE = list(accumulate(1 / rank for rank in range(1, len(WORDS) + 1)))


def problems(seed: int, terms: int = 5, slip: float = 0.0) -> Iterator[dict[str, str]]:
    r"""Problems of `terms` digits, endlessly and the same for the same seed: `problem`, `answer`, `solution`.

    The answer is always right; each step of the solution slips to a wrong digit with probability `slip`.

    Raises `ValueError` for fewer than two terms.

    >>> first = next(problems(seed=0))
    >>> first["problem"], first["answer"]
    ('Compute 6-6-0-4-8 mod 10.\n', '8')
    >>> first["solution"].splitlines()[-1]
    '\\boxed{8}'
    """
    if terms < 2:
        raise ValueError(f"terms={terms}: a sum has at least two")
    return _problems(random.Random(seed), terms, slip)


def _problems(rng: random.Random, terms: int, slip: float) -> Iterator[dict[str, str]]:
    while True:
        digits = [rng.randrange(10) for _ in range(terms)]
        signs = [rng.choice("+-") for _ in range(terms - 1)]
        text = str(digits[0]) + "".join(f"{sign}{digit}" for sign, digit in zip(signs, digits[1:], strict=True))
        answer = digits[0] + sum(
            digit if sign == "+" else -digit for sign, digit in zip(signs, digits[1:], strict=True)
        )
        solution, _ = chain(rng, digits, signs, slip)
        yield {"problem": f"Compute {text} mod 10.\n", "answer": str(answer % 10), "solution": solution}


def chain(rng: random.Random, digits: list[int], signs: list[str], slip: float = 0.0) -> tuple[str, int]:
    """A chain of thought and the answer it comes to; each step slips to a wrong digit with probability `slip`."""
    value, lines = digits[0], []
    for sign, digit in zip(signs, digits[1:], strict=True):
        result = (value + digit if sign == "+" else value - digit) % 10
        if rng.random() < slip:
            result = (result + rng.randrange(1, 10)) % 10
        (word,) = rng.choices(WORDS, cum_weights=_CUMULATIVE)
        lines.append(f"{value}{sign}{digit}={result} {word}")
        value = result
    return "\n".join([*lines, f"\\boxed{{{value}}}"]), value
