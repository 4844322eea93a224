"""What `capo train` says last: whether the run lives, what GRPO does in its place, and what to type next."""

from __future__ import annotations

import os
import shutil
import sys

from capo_rl.pages.doctor import diagnose
from capo_rl.pages.run_log import DoctorError, read_log
from capo_rl.settings.packaged import packaged
from capo_rl.settings.recipe import Recipe, read_recipe, settings

# The quickstart's learning rate and batch, from the committed results (tests/pages/test_closing.py computes it again).
GRPO_THERE = "4 of 5 runs collapse, at steps 32 to 51 (the repository's results/main/grpo-a)"

_MAY_DIFFER = {"output_dir", "run_name", "seed", "capo_watch"}  # none of which moves a weight but the seed


def closing(recipe: Recipe, path: str) -> tuple[list[tuple[str, str]], str]:
    """The last rows of the table about a run that is over, and the next command; `path` is how its recipe was named."""
    folder = recipe.training.output_dir
    quickstart = is_quickstart(recipe)
    try:
        collapsed = diagnose(read_log(folder)).collapsed
    except DoctorError as error:
        rows = [("alive", f"can't tell: {str(error).removeprefix(f'{folder}/metrics.jsonl: ')}")]
        dead = False
    else:
        dead = collapsed is not None
        rows = [("alive", f"no, it collapsed at step {collapsed}" if dead else "yes")]
    if quickstart:
        rows.append(("GRPO at this learning rate", GRPO_THERE))
    if dead:
        following = f"doctor {folder}"
    elif quickstart:
        following = f"train {path} --capo_mode monitor --output_dir runs/grpo    # GRPO itself"
    else:
        following = f"report {folder} --out report.html"
    return rows, f"{_command()} {following}"


def is_quickstart(recipe: Recipe) -> bool:
    """Whether a run is the quickstart's but for its folder and seed, so that results at its rate speak of it."""
    ours, this = settings(read_recipe(str(packaged("recipes")["quickstart"]))), settings(recipe)
    return {name for name in ours.keys() | this.keys() if ours.get(name) != this.get(name)} <= _MAY_DIFFER


def _command() -> str:
    """How `capo` is called from here: `make train` has it in a folder that the shell may not look into."""
    if shutil.which("capo"):
        return "capo"
    called = os.path.relpath(sys.argv[0])
    return called if os.path.basename(called) == "capo" else "python -m capo_rl.cli"
