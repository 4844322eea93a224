"""What of a run's settings is never written down nor shown: secrets, by their name or their form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HIDDEN = "(not shown)"
_SECRET = (
    r"(?:token|secret|password|passwd|passphrase|credentials?|authorization|(?:api|access|private|secret)[_-]?key)"
)
_SECRET_NAME = re.compile(rf"(?:.*[_.-])?{_SECRET}", re.IGNORECASE)
# A secret by its form, wherever it stands: what services give out, user and password of an address, NAME=VALUE.
_SECRET_VALUE = re.compile(
    r"\b(?:hf_|sk-|gh[oprsu]_|github_pat_|glpat-|xox[abp]-|AKIA|AIza)[\w-]{8,}"
    r"|(?<=Bearer )\S+"
    r"|(?<=://)[^/\s@]+(?=@)"
    rf"|(?<![a-z]){_SECRET}[\"']?\s*[=:]\s*[\"']?[^\s\"'&,}}]+",
    re.IGNORECASE,
)


def without_secrets(value: Any, field: str = "") -> Any:
    """A setting's value, or a mapping of settings, with what is a secret by its `field`'s name or its form replaced.

    >>> without_secrets({"hub_token": "abc", "max_tokens": 5, "dataset_name": "https://me:pw@host/a?api_key=1&b=2"})
    {'hub_token': '(not shown)', 'max_tokens': 5, 'dataset_name': 'https://(not shown)@host/a?(not shown)&b=2'}
    """
    if value is None:
        return None
    if _SECRET_NAME.fullmatch(field):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {_SECRET_VALUE.sub(_HIDDEN, str(key)): without_secrets(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return _SECRET_VALUE.sub(_HIDDEN, value) if isinstance(value, str) else value
