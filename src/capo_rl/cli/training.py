"""The commands that train: `capo train`, `capo calibrate` and `capo recipes`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

from capo_rl.cli.options import Commands, a_file


def add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a model by a recipe, or go on with a run that was stopped",
        usage="capo train RECIPE [--FIELD VALUE ...]",
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_TrainHelp, nargs=0)
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `capo recipes` lists")
    train.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="override the recipe")
    train.set_defaults(run=_train)


class _TrainHelp(argparse.Action):
    def __call__(self, *_: Any) -> None:
        from capo_rl.settings.train_help import train_help

        print(train_help(), end="")
        raise SystemExit(0)


def _train(options: argparse.Namespace) -> None:
    # What libraries say to one another about their next versions is not for someone who watches a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")

    if {"-h", "--help"} & set(options.overrides):
        from capo_rl.settings.train_help import train_help

        print(train_help(options.recipe), end="")
        return

    from capo_rl.settings.recipe_file import find_recipe, first_look

    named, options.recipe = options.recipe, find_recipe(options.recipe)
    if "--help-all" in options.overrides:
        options.overrides = ["--help"]
    else:
        first_look(options.recipe, options.overrides)

    from capo_rl.settings.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)

    from capo_rl.trainers.train import train

    summary = train(recipe)
    if summary:
        from capo_rl.pages.closing import closing

        rows, following = closing(recipe, named)
        _show(summary, recipe.training.output_dir, rows)
        print(f"next: {following}")


def add_calibrate(commands: Commands) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="choose thresholds for a rejection rate or a KL, from a few monitored steps",
        description="Watch a recipe's first steps without changing them, and choose thresholds for a target: a share "
        "of the tokens to reject (default: 0.05), or a KL of each update. Writes a YAML fragment for the recipe, and a "
        "picture beside it. Any field of the recipe can be given again, as for `capo train`.",
        usage="capo calibrate RECIPE [--rejection-rate R | --kl-nats X] [--steps N] [--out FILE] [--FIELD VALUE ...]",
        allow_abbrev=False,
    )
    calibrate.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `capo recipes` lists")
    target = calibrate.add_mutually_exclusive_group()
    target.add_argument("--rejection-rate", type=float, metavar="R", help="the share of the tokens to reject")
    target.add_argument("--kl-nats", type=float, metavar="X", help="nats a token that no update should pass")
    calibrate.add_argument("--steps", type=int, metavar="N", help="(default: 3 %% of the run's, in 7 to 50)")
    calibrate.add_argument(
        "--out",
        type=a_file,
        metavar="FILE",
        default="thresholds.yaml",
        help="the fragment to write (default: %(default)s)",
    )
    calibrate.set_defaults(run=run_calibrate)


def run_calibrate(options: argparse.Namespace) -> None:
    """`capo calibrate`, whose fields of the recipe stand among its own options."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")

    from pathlib import Path

    from capo_rl.settings.recipe_file import find_recipe, first_look

    options.recipe = find_recipe(options.recipe)
    first_look(options.recipe, options.overrides)

    from capo_rl.trainers.calibrate import calibrate

    target = {"rejection_rate": options.rejection_rate, "kl_nats": options.kl_nats}
    if set(target.values()) == {None}:
        target["rejection_rate"] = 0.05
    done = calibrate(options.recipe, options.overrides, steps=options.steps, out=options.out, **target)
    if done is not None:
        print(done.text, end="")
        print(f"# {options.out}, {Path(options.out).with_suffix('.png')}")
        print(f"# {done.watching:.1f} s of training steps, {done.choosing:.1f} s to choose")


def add_recipes(commands: Commands) -> None:
    recipes = commands.add_parser(
        "recipes",
        help="list the recipes that come with the package, or copy one to edit",
        description="List the recipes that come with the package; print one, or copy it to edit. `capo train NAME` "
        "takes them by name, and a file of that name goes first.",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    recipes.add_argument("--out", type=a_file, metavar="FILE", help="copy it there")
    recipes.set_defaults(run=_recipes)


def _recipes(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.settings.packaged import first_line, packaged
    from capo_rl.settings.recipe_file import RecipeError

    ours = packaged("recipes")
    if options.name is None:
        if options.out is not None:
            raise RecipeError("--out: which recipe? give a name of `capo recipes`")
        for name, file in ours.items():
            print(f"{name}\n    {first_line(file)}")
        return
    if options.name not in ours:
        raise RecipeError(f"{options.name}: not a recipe of the package; there are {', '.join(ours)}")
    text = ours[options.name].read_text(encoding="utf-8")
    if options.out is None:
        print(text, end="")
    elif Path(options.out).exists():
        raise RecipeError(f"{options.out}: is there already; give another name")
    else:
        Path(options.out).write_text(text, encoding="utf-8")
        print(options.out)


def _show(summary: dict[str, Any], folder: str, closing: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(*names: str) -> str:
        return " | ".join(f"{summary[name]:.1%}" if name in summary else "–" for name in names)

    def small(*names: str) -> str:
        return " | ".join(f"{summary[name]:.1e}" if name in summary else "–" for name in names)

    judged = [
        ("tokens rejected", percent("rejection_rate")),
        ("  of those with A > 0 | A < 0", percent("rejection_rate_positive", "rejection_rate_negative")),
    ]
    rows = [
        ("reward, first tenth → last tenth", f"{summary['reward_first']:.3f} → {summary['reward_last']:.3f}"),
        ("completions", f"{summary.get('completions', 0):,.0f}"),
        *(judged if "rejection_rate" in summary else []),
        (
            "KL of an update, mean | max",
            small("kl_measured_mean", "kl_measured_max"),
        ),
        ("time", f"{summary.get('seconds', 0):.0f} s"),
        ("  of it curvature", f"{summary.get('seconds_curvature', 0) / max(summary.get('seconds', 0), 1e-9):.1%}"),
    ]
    table = Table(title=folder, show_header=False, title_justify="left")
    for row in [*rows, *closing]:
        table.add_row(*row)
    Console().print(table)
