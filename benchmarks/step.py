"""A training step of TRL's GRPO beside one of CAPO: off, monitor, mask, and the default, watched or not, taking turns.

    python benchmarks/step.py recipes/quickstart.yaml [--steps 60] [--rounds 4] [--set logging_steps=10 ...]

Thresholds are open and the default's budget is out of reach, so all make the same updates on the same completions
(bit for bit, tests/trainers/test_trl.py): what differs is the work. Each trainer is a process of its own and one at a
time moves, a few steps each and in an order drawn anew each time, so that what else the machine does hits all
alike. Where a trainer's tensors happen to lie makes it one or two in a hundred faster or slower for good, so each round
makes them all anew, in another order. Prints what all steps together, logging included, took over what TRL's did, by
the clock and in processor time, with the least and the most of a round, and writes results/step/NAME.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from capo_rl.curvature.last_layer import blocks
from capo_rl.rewards.accuracy import accuracy_reward
from capo_rl.rewards.grading import shared_grader
from capo_rl.runs.records import versions, write_json
from capo_rl.settings.recipe import read_recipe
from capo_rl.trainers.train import make_trainer

OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None, "capo_kl_budget": None}
FREE = {"capo_kl_budget": 1e9, "capo_kl_start": 1.0}  # a budget that is out of reach
TRL = "TRL's GRPOTrainer"
MODES: dict[str, dict[str, Any] | None] = {
    TRL: None,
    "CAPO, off": {"capo_mode": "off"},
    "CAPO, monitor": {"capo_mode": "monitor", "capo_kl_every": 10},
    "CAPO, mask, KL never measured": {"capo_mode": "mask", "capo_share": False, "capo_kl_every": 10**9},
    "CAPO, mask": {"capo_mode": "mask", "capo_share": False, "capo_kl_every": 10},  # as TRL logs by default
    "CAPO, mask with the share": {"capo_mode": "mask", "capo_kl_every": 10},
    "CAPO, default": {"capo_mode": "trust_region", "capo_watch": False, **FREE},
    "CAPO, default, watched": {"capo_mode": "trust_region", "capo_watch": True, **FREE},
}
UNITS = ("clock", "processor")
WARM_UP = 2  # steps that fill caches and moments
TURN = 5  # steps in a row: of one step most would find its tensors pushed out of the processor's cache, unlike in a run


class Turns(TrainerCallback):
    """Takes a step each time its pipe says so, and answers with the seconds that it took, in `UNITS`."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self._start: tuple[float, float] | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._hand_over()

    def on_train_end(self, args, state, control, **kwargs):
        self._hand_over()

    def _hand_over(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.pipe.send(None if self._start is None else [b - a for a, b in zip(self._start, now, strict=True)])
        self.pipe.recv()
        self._start = time.perf_counter(), time.process_time()


def drive(pipe: Connection, recipe_file: Path, mode: str, overrides: dict[str, Any], count: int, threads: int) -> None:
    """A process: the trainer of one mode takes `count` steps in turns, and sends the rewards that it logged."""
    torch.set_num_threads(threads)
    # Its processes start when first needed: not in a step.
    shared_grader().grade_all([r"\boxed{\sqrt{2} / 2}"] * 16, [r"\frac{1}{\sqrt{2}}"] * 16)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(recipe_file, MODES[mode], overrides, count, folder)
        trainer.add_callback(Turns(pipe))
        trainer.train()
    pipe.send([log["reward"] for log in trainer.state.log_history if "reward" in log])


def make(
    recipe_file: Path, mode: dict[str, Any] | None, overrides: dict[str, Any], count: int, folder: str
) -> GRPOTrainer:
    """The trainer of one mode, about to take `count` steps."""
    shared = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    fixed = {"output_dir": f"{folder}/run", "max_steps": count, "save_strategy": "no", "disable_tqdm": True}
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
    return trainer


def race(options: argparse.Namespace, modes: list[str], overrides: dict[str, Any]) -> dict[str, list[list[float]]]:
    """By mode, the seconds of each step in `UNITS`, of trainers made in the order of `modes`.

    Raises `SystemExit` if they did not do the same work.
    """
    shuffle = random.Random(0).shuffle
    spawn = multiprocessing.get_context("spawn")
    count = options.steps + WARM_UP
    pipes: dict[str, Connection] = {}
    processes = []
    for mode in modes:
        pipes[mode], end = spawn.Pipe()
        processes.append(
            spawn.Process(target=drive, args=(end, options.recipe, mode, overrides, count, options.threads))
        )
        processes[-1].start()
        end.close()  # so that a process that dies ends its pipe
        pipes[mode].recv()
    seconds: dict[str, list[list[float]]] = {mode: [] for mode in modes}
    order = list(modes)
    for part in blocks(count, TURN):
        shuffle(order)
        for mode in order:
            for _ in range(part.start, part.stop):
                pipes[mode].send("go on")
                seconds[mode].append(pipes[mode].recv())
        print(f"step {part.stop}:", ", ".join(f"{times[-1][0]:.2f}" for times in seconds.values()), "s", flush=True)
    rewards = []
    for pipe in pipes.values():
        pipe.send("go on")
        rewards.append(pipe.recv())
    for process in processes:  # the next round's memory is theirs until they end
        process.join()
    if any(of != rewards[0] for of in rewards):
        raise SystemExit("the modes did not get the same rewards, so they did different work: compare no times")
    return {mode: times[WARM_UP:] for mode, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step of TRL against one of CAPO.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="more than one makes processor time count waiting"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="beside TRL's, where memory is short"
    )
    parser.add_argument("--name", help="of the file in results/step, by default the recipe's")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="override the recipe")
    options = parser.parse_args()
    overrides = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in options.set)}

    modes = [mode for mode in MODES if mode == TRL or mode in options.modes]
    rounds = []
    for seed in range(options.rounds):
        print(f"round {seed + 1} of {options.rounds}", flush=True)
        rounds.append(race(options, random.Random(seed).sample(modes, len(modes)), overrides))

    rows = []
    print(f"{'':30s} {'seconds a step':>15s} {'over TRL by the clock':>28s} {'in processor time':>25s}")
    for mode in modes:
        row: dict[str, Any] = {"mode": mode}
        for i, unit in enumerate(UNITS):
            mine, its = ([sum(step[i] for step in times[of]) for times in rounds] for of in (mode, TRL))
            row[unit] = {
                "seconds a step, median": median(step[i] for times in rounds for step in times[mode]),
                "seconds of each round": mine,
                "over TRL": sum(mine) / sum(its),
                "over TRL, each round": [a / b for a, b in zip(mine, its, strict=True)],
            }
        rows.append(row)
        clock, processor = (
            "{:.3f} [{:.3f}, {:.3f}]".format(row[unit]["over TRL"], min(each), max(each))
            for unit, each in ((unit, row[unit]["over TRL, each round"]) for unit in UNITS)
        )
        print(f"{mode:30s} {row['clock']['seconds a step, median']:15.3f} {clock:>28s} {processor:>25s}")
    path = Path("results/step", f"{options.name or options.recipe.stem}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads"
    about = {"recipe": str(options.recipe), "overrides": overrides, "steps": options.steps, "hardware": hardware}
    write_json(path, about | {"rows": rows, "versions": versions()})


if __name__ == "__main__":
    main()
