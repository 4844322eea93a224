"""Constraints on a text that a program can check, as a reward: in the manner of IFEval (arXiv 2311.07911).

A row of the data says what its completion must satisfy, `{"contains": ["river"], "most_words": 12}`. Every check reads
the text once, so none needs a deadline.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_AROUND_WORDS = ".,;:!?\"'()[]{}*_`“”‘’–—…"


class ConstraintError(ValueError):
    """A constraint that can't be checked; the message names it and the fix."""


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without what stands around them.

    >>> words('"The River," she said.')
    ['the', 'river', 'she', 'said']
    """
    stripped = (word.strip(_AROUND_WORDS).lower() for word in text.split())
    return [word for word in stripped if word]


# What each constraint asks of a text, and the type of the value it takes.
CONSTRAINTS: dict[str, tuple[type, Callable[[str, Any], bool]]] = {
    "contains": (list, lambda text, asked: {word.lower() for word in asked} <= set(words(text))),
    "lacks": (list, lambda text, asked: {word.lower() for word in asked}.isdisjoint(words(text))),
    "first_word": (str, lambda text, word: words(text)[:1] == [word.lower()]),
    "last_word": (str, lambda text, word: words(text)[-1:] == [word.lower()]),
    "ends_with": (str, lambda text, end: text.rstrip().endswith(end)),
    "least_words": (int, lambda text, count: len(words(text)) >= count),
    "most_words": (int, lambda text, count: len(words(text)) <= count),
    "lower_case": (bool, lambda text, wanted: (text == text.lower()) == wanted),
}


def check_constraints(constraints: Mapping[str, Any]) -> None:
    """Raise `ConstraintError` unless every constraint is known and its value of its type; one that is None is not set.

    >>> check_constraints({"contain": ["river"]})
    Traceback (most recent call last):
        ...
    capo_rl.rewards.constraints.ConstraintError: there is no constraint 'contain'; did you mean 'contains'?
    """
    if not isinstance(constraints, Mapping):
        raise ConstraintError(f'constraints={constraints!r:.60}: write an object, {{"contains": ["river"]}}')
    if all(value is None for value in constraints.values()):
        raise ConstraintError(f"constraints={dict(constraints)!r:.60}: every text satisfies it; name at least one")
    for name, value in constraints.items():
        if name not in CONSTRAINTS:
            near = difflib.get_close_matches(str(name), CONSTRAINTS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CONSTRAINTS)}"
            raise ConstraintError(f"there is no constraint {name!r}; {hint}")
        wanted = CONSTRAINTS[name][0]
        if value is not None and type(value) is not wanted:
            raise ConstraintError(f"{name}={value!r:.60}: needs a value of type {wanted.__name__}")
        texts: Any = value if wanted is list else [value]
        if value is not None and wanted in (list, str) and not (texts and all(_said(text) for text in texts)):
            raise ConstraintError(
                f"{name}={value!r:.60}: an empty text or none; leave it out, or write words in quotes"
            )


def _said(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def broken(text: str, constraints: Mapping[str, Any]) -> list[str]:
    """The names of the constraints that a text breaks; an empty text breaks all of them.

    Raises `ConstraintError` as `check_constraints`.

    >>> broken("Is the river deep?", {"contains": ["river"], "ends_with": "?", "most_words": 3})
    ['most_words']
    """
    check_constraints(constraints)
    asked = {name: value for name, value in constraints.items() if value is not None}
    return [name for name, value in asked.items() if not text.strip() or not CONSTRAINTS[name][1](text, value)]


def constraint_reward(
    completions: Sequence[Any],
    constraints: Sequence[Mapping[str, Any]],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """TRL reward: 1.0 where a completion satisfies all of its row's `constraints`, 0.0 where it breaks one.

    Logs for each constraint the share of the completions that break it, among those of which it was asked.
    Raises `ConstraintError` as `check_constraints`.

    >>> constraint_reward(["A river.", [{"role": "assistant", "content": "A lake."}]], [{"contains": ["river"]}] * 2)
    [1.0, 0.0]
    """
    from capo_rl.rewards.accuracy import completion_text

    failed = [
        broken(completion_text(completion), asked) for completion, asked in zip(completions, constraints, strict=True)
    ]
    if log_metric is not None:
        for name in CONSTRAINTS:
            rows = [names for names, asked in zip(failed, constraints, strict=True) if asked.get(name) is not None]
            if rows:
                log_metric(f"constraints/broken/{name}", sum(name in names for names in rows) / len(rows))
    return [float(not names) for names in failed]
