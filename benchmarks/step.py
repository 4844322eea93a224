"""A training step of TRL's GRPO beside one of CAPO: off, monitor, and mask, taking turns step by step.

    python benchmarks/step.py recipes/quickstart.yaml [--steps 30] [--set logging_steps=10 ...]

Thresholds are open and there is no budget, so all of them make the same updates on the same completions (bit for bit,
tests/test_trl.py): what differs is the work. Each trainer lives in a thread of its own and only one of them moves at
a time, one step each and in an order drawn anew each time, so that what else the machine does hits all alike. Prints
what all steps together took over what TRL's did, by the clock and in processor time, and writes results/step/NAME.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from capo_rl.grading import accuracy_reward, shared_grader
from capo_rl.recipe import read_recipe
from capo_rl.records import versions, write_json
from capo_rl.statistics import bootstrap_interval
from capo_rl.train import make_trainer

OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None, "capo_kl_budget": None}
TRL = "TRL's GRPOTrainer"
MODES: dict[str, dict[str, Any] | None] = {
    TRL: None,
    "CAPO, off": {"capo_mode": "off"},
    "CAPO, monitor": {"capo_mode": "monitor", "capo_kl_every": 10},
    "CAPO, mask, KL never measured": {"capo_mode": "mask", "capo_kl_every": 10**9},
    "CAPO, mask": {"capo_mode": "mask", "capo_kl_every": 10},  # every tenth step, as TRL logs by default
    "CAPO, mask, KL of every step": {"capo_mode": "mask", "capo_kl_every": 1},
}
WARM_UP = 2  # steps that fill caches and moments


class Turn(TrainerCallback):
    """One trainer in its thread: moves one step for each `move`, and keeps the seconds of each."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.clock: list[float] = []
        self.processor: list[float] = []
        self._mine, self._over = threading.Semaphore(0), threading.Semaphore(0)
        self._failed: BaseException | None = None
        self._random = _random_state()
        self.trainer = trainer
        trainer.add_callback(self)
        threading.Thread(target=self._train, daemon=True).start()

    def move(self) -> None:
        """Let the trainer take a step, and wait until it has."""
        self._mine.release()
        self._over.acquire()
        if self._failed is not None:
            raise self._failed

    def rewards(self) -> list[float]:
        """What it logged of its completions, to compare."""
        return [log["reward"] for log in self.trainer.state.log_history if "reward" in log]

    def _train(self) -> None:
        try:
            self._wait()
            self.trainer.train()
        except BaseException as error:
            self._failed = error
        self._over.release()

    def _wait(self) -> None:
        self._mine.acquire()
        _set_random_state(self._random)

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.append(time.perf_counter() - self._start[0])
        self.processor.append(time.process_time() - self._start[1])
        self._random = _random_state()
        self._over.release()
        self._wait()


def _random_state() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (what trainers draw from)


def _set_random_state(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])


def make(recipe_file: Path, mode: dict[str, Any] | None, overrides: dict[str, Any], count: int, folder: str) -> Turn:
    """The trainer of one mode, about to take `count` steps and as many as warm up."""
    shared = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    fixed = {"output_dir": f"{folder}/run", "max_steps": count + WARM_UP, "save_strategy": "no", "disable_tqdm": True}
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
    set_seed(recipe.training.seed)
    return Turn(trainer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step of TRL against one of CAPO.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="more than one makes processor time count waiting")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="beside TRL's, where memory is short"
    )
    parser.add_argument("--name", help="of the file in results/step, by default the recipe's")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="override the recipe")
    options = parser.parse_args()
    overrides = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in options.set)}
    torch.set_num_threads(options.threads)

    # Its processes start when first needed: not in the turn of whoever needs them first.
    shared_grader().grade_all([r"\boxed{\sqrt{2} / 2}"] * 16, [r"\frac{1}{\sqrt{2}}"] * 16)
    with tempfile.TemporaryDirectory() as folder:
        turns = {
            mode: make(options.recipe, fields, overrides, options.steps, folder)
            for mode, fields in MODES.items()
            if mode == TRL or mode in options.modes
        }
        order, shuffle = list(turns.values()), random.Random(0).shuffle  # not the trainers' own random numbers
        for step in range(options.steps + WARM_UP):
            shuffle(order)
            for turn in order:
                turn.move()
            print(f"step {step + 1}:", ", ".join(f"{turn.clock[-1]:.2f}" for turn in turns.values()), "s", flush=True)
    rewards = {mode: turn.rewards() for mode, turn in turns.items()}
    if any(of != rewards[TRL] for of in rewards.values()):
        raise SystemExit("the modes did not get the same rewards, so they did different work: compare no times")

    rows = []
    print(f"{'':30s} {'seconds a step':>15s} {'over TRL by the clock':>28s} {'in processor time':>25s}")
    for mode, turn in turns.items():
        row: dict[str, Any] = {"mode": mode}
        for unit in ("clock", "processor"):
            seconds, base = (np.array(getattr(each, unit)[WARM_UP:]) for each in (turn, turns[TRL]))

            def over(steps: np.ndarray, mine: np.ndarray = seconds, its: np.ndarray = base) -> float:
                steps = steps.astype(int)
                return float(mine[steps].sum() / its[steps].sum())

            row[unit] = {
                "seconds a step, median": median(seconds.tolist()),
                "over TRL": over(np.arange(options.steps)),
                "95 % interval": bootstrap_interval([range(options.steps)], statistic=over),
                "seconds of each step": seconds.tolist(),
            }
        rows.append(row)
        clock, processor = (
            "{:.3f} [{:.3f}, {:.3f}]".format(row[unit]["over TRL"], *row[unit]["95 % interval"])
            for unit in ("clock", "processor")
        )
        print(f"{mode:30s} {row['clock']['seconds a step, median']:15.3f} {clock:>28s} {processor:>25s}")
    path = Path("results/step", f"{options.name or options.recipe.stem}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    about = {"recipe": str(options.recipe), "overrides": overrides, "steps": options.steps, "hardware": hardware}
    write_json(path, about | {"rows": rows, "versions": versions()})


if __name__ == "__main__":
    main()
