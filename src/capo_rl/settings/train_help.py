"""`capo train RECIPE --help`: CAPO's own fields by what they are about, said without TRL, which loads for seconds."""

from __future__ import annotations

import argparse
from dataclasses import fields

from capo_rl.settings.own_fields import CAPOFields
from capo_rl.settings.recipe_file import find_recipe, read_mapping

GROUPS = {
    "the selection: which tokens are left out": (
        *("capo_mode", "capo_fisher_threshold", "capo_hessian_low", "capo_hessian_high", "capo_units"),
        *("capo_granularity", "capo_fisher", "capo_advantage", "capo_soft", "capo_penalty"),
    ),
    "the step: what the optimizer is about to do": (
        *("capo_step", "capo_share", "capo_top_k", "capo_top_p", "capo_moments", "capo_shard_moments"),
        "capo_max_missing_mass",
    ),
    "the budget: how far an update may move the policy": (
        *("capo_kl_budget", "capo_kl_control", "capo_kl_start", "capo_kl_sample", "capo_kl_every"),
    ),
    "the records": ("capo_watch", "capo_tokens_every"),
}


def train_help(recipe: str | None = None) -> str:
    """The help on CAPO's fields, with their defaults and, of a recipe, what it gives them.

    Raises `RecipeError` for a recipe that can't be read.
    """
    given = read_mapping(find_recipe(recipe)) if recipe is not None else {}
    parser = argparse.ArgumentParser(
        prog=f"capo train {recipe or 'RECIPE'}",
        usage="%(prog)s [--FIELD VALUE ...]",
        description="Train a model by a recipe: a YAML file, or a name that `capo recipes` lists. A run that was "
        "stopped goes on from its last checkpoint. Any field of the recipe can be given again on the command line.",
        epilog="Every field of data, model and TRL's training, such as --learning_rate, --max_steps and --output_dir: "
        "`capo train RECIPE --help-all`, which takes some seconds.",
        add_help=False,
    )
    own = {item.name: item for item in fields(CAPOFields)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            default = f"default: {_said(own[name].default)}"
            if name in given and given[name] != own[name].default:
                default += f", this recipe: {_said(given[name])}"
            choices = own[name].metadata.get("choices")
            group.add_argument(
                f"--{name}",
                metavar="VALUE" if choices is None else "{" + ",".join(choices) + "}",
                help=f"{own[name].metadata['help']} ({default})".replace("%%", "%").replace("%", "%%"),
            )
    return parser.format_help()


def _said(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
