"""The rule of a problem: how its answer is found and compared."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    "math": "any expression, compared by algebra",
    "number": "one number, perhaps with a currency, a unit, or `name =` before it",
    "integer": "one whole number, without tolerance",
    "letter": "the letter of a choice",
}


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
