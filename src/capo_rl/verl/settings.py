"""CAPO's own settings as verl's config has them, under `actor.capo`, and errors in those words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from capo_rl.settings.own import OwnSettings, check_own, check_units

# Fields of CAPO's that are verl's own business here, and where to set it.
_NOT_HERE = {
    "advantage": "algorithm.adv_estimator and algorithm.norm_adv_by_std_in_grpo say what an advantage is",
    "tokens_every": "only TRL's adapter records tokens",
}


@dataclass
class CAPOSettings(OwnSettings):
    """What `CAPOConfig` has beside TRL's settings, but for what verl chooses itself; under `actor.capo` the names are
    without `capo_`.

    Raises `ValueError`, naming the field and the fix, for a value out of range, or two that contradict one another.
    """

    def __post_init__(self) -> None:
        with in_verls_words():
            check_own(self)
            if self.capo_step != "auto":
                check_units(self, self.capo_step)

    @classmethod
    def of(cls, given: Any) -> CAPOSettings:
        """The settings written under `actor.capo`: a mapping, or nothing."""
        given = dict(given or {})
        known = [name for each in fields(cls) if (name := each.name.removeprefix("capo_")) not in _NOT_HERE]
        if refused := [name for name in given if name in _NOT_HERE]:
            raise ValueError(f"actor.capo.{refused[0]} is not for verl: {_NOT_HERE[refused[0]]}; leave it out")
        if unknown := set(given) - set(known):
            raise ValueError(f"actor.capo has no {', '.join(sorted(unknown))}: it has {', '.join(known)}")
        if given.get("mode") is False:  # how YAML reads a bare `off`
            given["mode"] = "off"
        return cls(**{f"capo_{name}": value for name, value in given.items()})


@contextmanager
def in_verls_words() -> Iterator[None]:
    """Errors about CAPO's settings name them as they are written here."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bcapo_(?!rl\b)", "actor.capo.", str(error))
        raise ValueError(text.replace("optim='adamw_torch'", "actor.optim.optimizer=AdamW")) from None
