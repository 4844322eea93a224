"""YAML in which a key that stands twice is an error: in plain YAML the last one wins, and the first is ignored."""

from __future__ import annotations

from typing import Any

import yaml


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key.value}` stands twice, in lines {seen[key.value]} and {line}: leave one of them"
                )
            if isinstance(key.value, str):
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """What a YAML text says. Raises `yaml.YAMLError`, also for a key that stands twice.

    >>> load_yaml("a: 1\\nb: 2")
    {'a': 1, 'b': 2}
    >>> load_yaml("a: 1\\na: 2")
    Traceback (most recent call last):
        ...
    yaml.constructor.ConstructorError: `a` stands twice, in lines 1 and 2: leave one of them
    """
    return yaml.load(text, Loader=_Strict)
