"""Where a recipe is: asked before the libraries load that read it, which takes seconds."""

from __future__ import annotations

import difflib
from pathlib import Path

from capo_rl.packaged import packaged


class RecipeError(ValueError):
    """A recipe or an option on the command line that can't be used; the message names the field and the fix."""


def find_recipe(name: str) -> str:
    """The path of a recipe: a file, or one of the package's by its name.

    Raises `RecipeError` where there is neither, naming the nearest.
    """
    if Path(name).exists():
        return name
    ours = packaged("recipes")
    if name in ours:
        return str(ours[name])
    file = Path(name)
    there = {str(each): each.name for each in sorted(file.parent.glob("*.yaml"))} if file.parent.is_dir() else {}
    near = difflib.get_close_matches(file.name, there.values(), n=1, cutoff=0.7)
    if near:
        raise RecipeError(f"{name}: no such file; did you mean {file.parent / near[0]}?")
    near = difflib.get_close_matches(name.removeprefix("recipes/").removesuffix(".yaml"), ours, n=1, cutoff=0.7)
    if near:
        raise RecipeError(f"{name}: no such file; did you mean `{near[0]}`, which comes with the package?")
    raise RecipeError(f"{name}: no such file; give the path of a YAML file, or a name that `capo recipes` lists")
