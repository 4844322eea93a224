"""Whether a long run leaks: the quickstart's trainer for an hour, its memory step after step, and a line through it.

    OMP_NUM_THREADS=1 python benchmarks/soak.py [--minutes 60] [--set capo_kl_control=learning_rate ...]

Everything that a run may do goes on: masks, a KL budget, records of tokens, checkpoints every 50 steps. Resident memory
of the process and of those it started is read between two steps. A straight line is fitted to what comes after the
warm-up, a sixth of the time. Writes results/soak/soak.json with every reading as it goes, so that a run that is cut off
leaves what it saw (`over` is false then).
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from capo_rl.runs.records import versions, write_json
from capo_rl.settings.recipe import read_recipe
from capo_rl.trainers.train import make_trainer

ROOT = Path(__file__).parents[1]
# A policy that hardly moves keeps its lengths, which are what the memory of a step depends on. Every logged step stays
# in the trainer's history, which is transformers' own growth: logged as often as TRL does by default.
STEADY = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "max_steps": 10**6, "logging_steps": 10}
RECORDS = {"capo_tokens_every": 100, "save_steps": 50, "save_total_limit": 2, "disable_tqdm": True}
MIB = 2**20


class Watch(TrainerCallback):
    """Reads the memory between steps, ends the run when its time is over, and writes down what it saw so far."""

    def __init__(self, out: Path, minutes: float, every: float, about: dict[str, Any]) -> None:
        self.out, self.minutes, self.every, self.about = out, minutes, every, about
        self.process = psutil.Process()
        self.readings: list[dict[str, float]] = []
        self.start = self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        over = now - self.start >= 60 * self.minutes
        if now - self.last >= self.every or over:
            self.last = now
            family = [self.process, *self.process.children(recursive=True)]
            self.readings.append(
                {
                    "minutes": (now - self.start) / 60,
                    "step": state.global_step,
                    "mib": sum(each.memory_info().rss for each in family) / MIB,
                    "open_files": self.process.num_fds(),
                }
            )
            self.write(over)
        control.should_training_stop |= over

    def after_warm_up(self) -> list[dict[str, float]]:
        return [each for each in self.readings if each["minutes"] >= self.minutes / 6]

    def write(self, over: bool) -> None:
        after = self.after_warm_up()
        found = line(after) if len(after) > 2 else {}
        content = {"over": over, "minutes_asked": self.minutes, "warm_up_minutes": self.minutes / 6, **self.about}
        write_json(self.out, content | {"found": found, "readings": self.readings})


def line(readings: list[dict[str, float]]) -> dict[str, float]:
    """A least-squares line through the memory against time, and how far the readings lie from one another."""
    hours = np.array([each["minutes"] for each in readings]) / 60
    values = np.array([each["mib"] for each in readings])
    tenth = max(1, len(values) // 10)
    return {
        "mib_per_hour": float(np.polyfit(hours, values, 1)[0]),
        "lowest": float(values.min()),
        "highest": float(values.max()),
        "first_tenth": float(values[:tenth].mean()),
        "last_tenth": float(values[-tenth:].mean()),
        "minutes": float(hours[-1] - hours[0]) * 60,
        "steps": readings[-1]["step"] - readings[0]["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Does a long run leak?")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=10, help="seconds between two readings")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "soak" / "soak.json")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fields = {name: str(value) for name, value in (STEADY | RECORDS).items()}
    fields |= dict(each.split("=", 1) for each in options.set)
    about = {"fields": fields, "threads": torch.get_num_threads(), "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"--{name}={value}" for name, value in (fields | {"output_dir": f"{folder}/run"}).items()]
        trainer, _ = make_trainer(read_recipe(str(ROOT / "recipes" / "quickstart.yaml"), overrides))
        watch = Watch(options.out, options.minutes, options.every, about | {"versions": versions()})
        trainer.add_callback(watch)
        trainer.train()
    found = line(watch.after_warm_up())
    print(
        f"{found['steps']:,} steps in {found['minutes']:.0f} minutes after the warm-up: {found['first_tenth']:.0f} to "
        f"{found['last_tenth']:.0f} MiB, {found['mib_per_hour']:+.1f} MiB an hour"
    )


if __name__ == "__main__":
    main()
