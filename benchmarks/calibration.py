"""What `capo calibrate` costs beside the run it is for.

    python benchmarks/calibration.py [recipes/quickstart.yaml] [--rounds 3] [--set FIELD=VALUE ...]

Calibrates for 5 % of the tokens and trains, in turn. Prints the seconds of both, training steps alone and without what
starting a process takes, and their ratio; writes results/calibrated/cost.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path
from statistics import median

import torch

from capo_rl.runs.records import versions, write_json
from capo_rl.settings.recipe import read_recipe
from capo_rl.trainers.calibrate import calibrate
from capo_rl.trainers.train import make_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a calibration beside its run.")
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="override the recipe")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rounds = []
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                f"--{each}"
                for each in (*options.set, f"output_dir={folder}/run", "save_strategy=no", "disable_tqdm=true")
            ]
            done = calibrate(options.recipe, overrides, rejection_rate=0.05, out=f"{folder}/thresholds.yaml")
            assert done is not None
            trainer, _ = make_trainer(read_recipe(options.recipe, overrides))
            run = trainer.train().metrics["train_runtime"]
        share = (done.watching + done.choosing) / run
        rounds.append({"watching": done.watching, "choosing": done.choosing, "run": run, "share": share})
        print(
            f"round {number}: {done.watching:.1f} s of watched steps and {done.choosing:.1f} s to choose, beside a run "
            f"of {run:.1f} s: {share:.1%}",
            flush=True,
        )
    print(f"median: {median(each['share'] for each in rounds):.1%}")
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads"
    about = {"recipe": options.recipe, "overrides": options.set, "hardware": hardware, "versions": versions()}
    write_json(Path("results/calibrated/cost.json"), about | {"rounds": rounds})


if __name__ == "__main__":
    main()
