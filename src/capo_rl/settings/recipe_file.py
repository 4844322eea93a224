"""What can be said of a recipe before the libraries load that read it, which takes seconds."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from capo_rl.settings.fields import check_types
from capo_rl.settings.own_fields import CHOICES, CAPOFields
from capo_rl.settings.packaged import packaged
from capo_rl.settings.strict_yaml import load_yaml


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


def first_look(path: str, overrides: Sequence[str]) -> None:
    """Check what needs neither TRL nor torch: CAPO's own fields, and whether the model and the data are there.

    Raises `RecipeError`, `ModelError` or `DataError`, as they would be raised later.
    """
    from capo_rl.runs import data, models

    content, own = read_mapping(path), typing.get_type_hints(CAPOFields)
    given = given_options(overrides)
    for name in content:
        if str(name).startswith("capo_"):
            check_field(str(name), own, place=path)
    for name in given:
        if name.startswith("capo_"):
            check_field(name, own, place="on the command line")
    try:
        check_types({name: value for name, value in content.items() if name in own}, own)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    fields = content | given
    for name, choices in CHOICES.items():
        if isinstance(value := fields.get(name), str) and value not in choices:
            raise RecipeError(f"{path}: {name}={value!r} is not one of {', '.join(choices)}")
    if isinstance(dataset := fields.get("dataset_name"), str):
        data.check_there(dataset)
    if isinstance(model := fields.get("model_name_or_path"), str):
        models.locate(model)


def given_options(overrides: Sequence[str]) -> dict[str, str]:
    """The options of a command line by field, as text; a bare one is "true".

    >>> given_options(["--capo_mode", "off", "--seed=3", "--use-peft"])
    {'capo_mode': 'off', 'seed': '3', 'use_peft': 'true'}
    """
    given: dict[str, str] = {}
    last = None
    for word in overrides:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            last = name.replace("-", "_")
            given[last] = value if equals else "true"
        elif last is not None and given[last] == "true":
            given[last] = word
    return given


def read_mapping(path: str) -> dict[str, object]:
    """The fields of a recipe as they stand in its file. Raises `RecipeError` for a file that is no mapping."""
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read ({error}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if content is None:
        raise RecipeError(f"{path}: empty; write one `field: value` a line, as in recipes/quickstart.yaml")
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a YAML {type(content).__name__}; write one `field: value` a line")
    return content


def check_field(name: str, known: Collection[str], place: str) -> None:
    """Raises `RecipeError` for a field that is not among the known, naming the nearest one that is."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`capo train RECIPE --help-all` lists all"
        raise RecipeError(f"{place}: there is no field `{name}`; {hint}")
