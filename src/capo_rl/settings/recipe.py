"""Recipes: one YAML file that says everything of a run, read into the dataclasses that the trainer takes."""

# No `from __future__ import annotations` here: the HF argument parser reads the annotations at run time.
import typing
from dataclasses import dataclass, field, fields

from trl import ModelConfig, TrlParser

from capo_rl.runs.secrets import without_secrets
from capo_rl.settings.config import CAPOConfig
from capo_rl.settings.fields import check_fields, check_types
from capo_rl.settings.recipe_file import RecipeError, check_field, find_recipe, read_mapping


@dataclass
class DataConfig:
    """The problems to train on, and how they are put to the model; names as in `trl.ScriptArguments`."""

    dataset_name: str = field(
        default="",
        metadata={
            "help": "`arithmetic` or `sentences` (made up here), a JSON Lines file, or a hub id; it needs the columns "
            "`problem` and `answer`, or `constraints` in its place."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "The configuration of a hub dataset; of `arithmetic`, the number of terms (null: 5)."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "The split of a hub dataset to train on."})
    dataset_limit: int | None = field(
        default=None, metadata={"help": "Train on this many problems, drawn with `seed`; null: on all."}
    )
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Leave out problems whose prompt has more tokens (Table 2); null: none."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Said before each problem."})
    prompt_suffix: str = field(default="", metadata={"help": "Said after each problem, in the same message."})


@dataclass(frozen=True)
class Recipe:
    """A run as it was asked for: its data, its model, its training."""

    data: DataConfig
    model: ModelConfig
    training: CAPOConfig


_SECTIONS = (DataConfig, ModelConfig, CAPOConfig)


def read_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; `overrides` are options as on the command line, `["--learning_rate", "1e-5"]`.

    `path` is a file, or the name of one of the package's.

    Raises `RecipeError` for a file that is missing or no mapping, a field that does not exist (naming the nearest one
    that does), one that would be ignored (`fields`), and values of another type, out of range, or that contradict one
    another.
    """
    path, overrides = find_recipe(path), list(overrides or [])
    parser = TrlParser(_SECTIONS, prog=f"capo train {path}", usage="%(prog)s [--FIELD VALUE ...]", allow_abbrev=False)
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    content = read_mapping(path)
    for name in content:
        if name != "env":
            check_field(str(name), known, place=path)
    for option in overrides:
        if option.startswith("--"):
            check_field(option[2:].split("=")[0], known, place="on the command line")
    try:
        for section in _SECTIONS:
            check_types(content, typing.get_type_hints(section))
        data, model, training = parser.parse_args_and_config(["--config", path, *overrides])
        check_fields((data, model, training))
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if not model.model_name_or_path:
        raise RecipeError(f"{path}: model_name_or_path is missing: give a hub id, a folder, or package:NAME")
    if not data.dataset_name:
        raise RecipeError(f"{path}: dataset_name is missing: give a hub id, a .jsonl file, `arithmetic` or `sentences`")
    return Recipe(data, model, training)


def settings(recipe: Recipe) -> dict[str, object]:
    """Every field of the recipe that differs from its default, by name and without secrets; what makes a run the run it
    is, and is written into its folder."""
    changed: dict[str, object] = {}
    for section in (recipe.data, recipe.model, recipe.training):
        defaults = {item.name: item.default for item in fields(section)}
        asked = section.to_dict() if isinstance(section, CAPOConfig) else vars(section)
        changed |= {name: value for name, value in asked.items() if name in defaults and value != defaults[name]}
    return without_secrets(changed)
