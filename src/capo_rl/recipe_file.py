"""Whether a recipe is there: asked before the libraries load that read it, which takes seconds."""

from __future__ import annotations

import difflib
from pathlib import Path


class RecipeError(ValueError):
    """A recipe or an option on the command line that can't be used; the message names the field and the fix."""


def check_there(path: str) -> None:
    """Raises `RecipeError` for a path where no file is, naming the nearest recipe."""
    file = Path(path)
    if file.exists():
        return
    folder = file.parent if file.parent.is_dir() else Path("recipes")
    recipes = {str(each): each.name for each in sorted(folder.glob("*.yaml"))}
    near = difflib.get_close_matches(file.name, recipes.values(), n=1, cutoff=0.7)
    hint = f"; did you mean {folder / near[0]}?" if near else "; give the path of a YAML file"
    raise RecipeError(f"{path}: no such file{hint}")
