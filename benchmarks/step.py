"""A training step of TRL's GRPO beside one of CAPO: off, monitor, and mask, taking turns step by step.

    python benchmarks/step.py recipes/quickstart.yaml [--steps 60] [--rounds 4] [--set logging_steps=10 ...]

Thresholds are open and there is no budget, so all of them make the same updates on the same completions (bit for bit,
tests/test_trl.py): what differs is the work. Each trainer lives in a thread of its own and only one of them moves at
a time, a few steps each and in an order drawn anew each time, so that what else the machine does hits all alike. Where
a trainer's tensors happen to lie makes it one or two in a hundred faster or slower for good, so each round makes them
all anew, in another order. Prints what all steps together took over what TRL's did, by the clock and in processor time,
with the least and the most of a round, and writes results/step/NAME.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
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
from capo_rl.last_layer import blocks
from capo_rl.recipe import read_recipe
from capo_rl.records import versions, write_json
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
TURN = 5  # steps in a row: of one step most would find its tensors pushed out of the processor's cache, unlike in a run


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
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def move(self) -> None:
        """Let the trainer take a step, and wait until it has."""
        self._mine.release()
        self._over.acquire()
        if self._failed is not None:
            raise self._failed

    def end(self) -> list[float]:
        """Let the trainer finish; returns the rewards that it logged."""
        self.move()
        self._thread.join()
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


def race(options: argparse.Namespace, modes: list[str], overrides: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The seconds of each step, by mode and unit, of trainers made in the order of `modes`.

    Raises `SystemExit` if they did not do the same work.
    """
    shuffle = random.Random(0).shuffle  # not the trainers' own random numbers
    with tempfile.TemporaryDirectory() as folder:
        turns = {mode: make(options.recipe, MODES[mode], overrides, options.steps, folder) for mode in modes}
        order = list(turns.values())
        for part in blocks(options.steps + WARM_UP, TURN):
            shuffle(order)
            for turn in order:
                for _ in range(part.start, part.stop):
                    turn.move()
            print(f"step {part.stop}:", ", ".join(f"{turn.clock[-1]:.2f}" for turn in turns.values()), "s", flush=True)
        rewards = [turn.end() for turn in turns.values()]
    if any(of != rewards[0] for of in rewards):
        raise SystemExit("the modes did not get the same rewards, so they did different work: compare no times")
    return {
        mode: {"clock": turn.clock[WARM_UP:], "processor": turn.processor[WARM_UP:]} for mode, turn in turns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step of TRL against one of CAPO.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
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

    modes = [mode for mode in MODES if mode == TRL or mode in options.modes]
    rounds = []
    for seed in range(options.rounds):
        print(f"round {seed + 1} of {options.rounds}", flush=True)
        rounds.append(race(options, random.Random(seed).sample(modes, len(modes)), overrides))
        gc.collect()  # trainers hold on to one another in circles

    rows = []
    print(f"{'':30s} {'seconds a step':>15s} {'over TRL by the clock':>28s} {'in processor time':>25s}")
    for mode in modes:
        row: dict[str, Any] = {"mode": mode}
        for unit in ("clock", "processor"):
            mine, its = ([sum(times[of][unit]) for times in rounds] for of in (mode, TRL))
            seconds = [times[mode][unit] for times in rounds]
            row[unit] = {
                "seconds a step, median": median(itertools.chain(*seconds)),
                "over TRL": sum(mine) / sum(its),
                "over TRL, each round": [a / b for a, b in zip(mine, its, strict=True)],
                "seconds of each step": seconds,
            }
        rows.append(row)
        clock, processor = (
            "{:.3f} [{:.3f}, {:.3f}]".format(row[unit]["over TRL"], min(each), max(each))
            for unit, each in ((unit, row[unit]["over TRL, each round"]) for unit in ("clock", "processor"))
        )
        print(f"{mode:30s} {row['clock']['seconds a step, median']:15.3f} {clock:>28s} {processor:>25s}")
    path = Path("results/step", f"{options.name or options.recipe.stem}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    about = {"recipe": str(options.recipe), "overrides": overrides, "steps": options.steps, "hardware": hardware}
    write_json(path, about | {"rows": rows, "versions": versions()})


if __name__ == "__main__":
    main()
