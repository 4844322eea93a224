"""A training step of TRL's GRPO beside one of CAPO: off, monitor, and mask, in turn.

    python benchmarks/step.py recipes/quickstart.yaml [--steps 12] [--rounds 3] [--set dataset_name=FILE ...]

Thresholds are open and there is no budget, so all of them make the same updates on the same completions (bit for bit,
tests/test_trl.py): what differs is the work. Prints medians and ratios, and writes results/step/RECIPE.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from capo_rl.grading import accuracy_reward
from capo_rl.recipe import read_recipe
from capo_rl.records import versions, write_json
from capo_rl.train import make_trainer

# KL is measured at the steps that are logged: TRL's default, every tenth.
OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None, "capo_kl_budget": None}
MODES: dict[str, dict[str, Any] | None] = {
    "TRL's GRPOTrainer": None,
    "CAPO, off": {"capo_mode": "off"},
    "CAPO, monitor": {"capo_mode": "monitor", "capo_kl_every": 10},
    "CAPO, mask": {"capo_mode": "mask", "capo_kl_every": 10},
    "CAPO, mask, KL of every step": {"capo_mode": "mask", "capo_kl_every": 1},
}


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def steps(recipe_file: Path, mode: dict[str, Any] | None, overrides: dict[str, Any], count: int) -> list[float]:
    """The seconds of each of `count` steps, the first two left out, which warm caches up."""
    shared = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"output_dir": f"{folder}/run", "max_steps": count + 2, "save_strategy": "no", "disable_tqdm": True}
        fields = shared | overrides | OPEN | (mode or {}) | fixed
        (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        recipe = read_recipe(f"{folder}/recipe.yaml")
        trainer: GRPOTrainer
        trainer, _ = make_trainer(recipe)
        if mode is None:
            known = GRPOConfig.__dataclass_fields__.keys()
            trainer = GRPOTrainer(
                model=trainer.model,
                reward_funcs=accuracy_reward,
                args=GRPOConfig(**{name: getattr(recipe.training, name) for name in fields if name in known}),
                train_dataset=trainer.train_dataset,
                processing_class=trainer.processing_class,
            )
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step of TRL against one of CAPO.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="override the recipe")
    options = parser.parse_args()
    overrides = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in options.set)}

    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(options.rounds):
        once = {mode: steps(options.recipe, fields, overrides, options.steps) for mode, fields in MODES.items()}
        base = sum(once["TRL's GRPOTrainer"])
        for mode, taken in once.items():
            seconds[mode] += taken
            ratios[mode].append(sum(taken) / base)
        print(
            f"round {turn + 1}:", ", ".join(f"{mode} {values[-1]:.3f}" for mode, values in ratios.items()), flush=True
        )
    rows = [
        {
            "mode": mode,
            "seconds a step, median": median(seconds[mode]),
            "over TRL, median": median(ratios[mode]),
            "over TRL, each round": ratios[mode],
        }
        for mode in MODES
    ]
    for row in rows:
        print(f"{row['mode']:30s} {row['seconds a step, median']:8.3f} s   {row['over TRL, median']:.3f}")
    path = Path("results/step", f"{options.recipe.stem}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    about = {"recipe": str(options.recipe), "overrides": overrides, "steps": options.steps, "hardware": hardware}
    write_json(path, about | {"rows": rows, "versions": versions()})


if __name__ == "__main__":
    main()
