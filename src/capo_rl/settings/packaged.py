"""The recipes and the grids of `capo bench` that travel with the package, by name; a file that is there goes first."""

from __future__ import annotations

from pathlib import Path


def packaged(kind: str) -> dict[str, Path]:
    """The YAML files of `recipes` or `experiments`, by their names without the ending.

    >>> packaged("recipes")["quickstart"].name
    'quickstart.yaml'
    """
    installed = Path(__file__).parents[1] / kind
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / kind  # at the top of a checkout
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def first_line(file: Path) -> str:
    """What a file says of itself: its first line of comment."""
    with file.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")
