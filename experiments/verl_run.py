"""verl's own trainer on a CPU: the default, killed and resumed on the way, and GRPO, both at one high learning rate.

    python experiments/verl_run.py

Real: the recipe's `run.sh` and with it `verl.trainer.main_ppo`, its task runner, transfer queue, agent loop, reward
workers, actor worker (FSDP, as `capo_rl.verl.CAPOEngine`), weight updates, MATH reward, validation and checkpoints.
Stood in for: the accelerator (tests/verl_cpu.py) and vLLM (tests/verl_rollout.py). The model is the one inside the
package, its task arithmetic, 16 completions a step. GRPO is `monitor`, which is verl bit for bit and measures the KL of
each update. Needs what docs/verl.md installs; writes results/verl/trainer.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_cpu,capo_rl.verl"}
warnings.simplefilter("ignore")

import verl  # noqa: E402, F401 (which loads capo_rl.verl by its own setting)

from verl_cpu import run_trainer, small_run  # noqa: E402

ARMS = {"default": "trust_region", "GRPO": "monitor"}
SAVE_EVERY = 25
KEPT = {  # verl's name, without actor/capo/, and ours
    "critic/score/mean": "reward",
    "response_length/mean": "length",
    "actor/entropy": "entropy",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "lr",
    "training/rollout_probs_diff_max": "rollout_probs_diff_max",
    "timing_s/step": "seconds",
    "timing_s/gen": "seconds/rollout",
    "timing_s/update_actor": "seconds/update",
} | {
    f"actor/capo/{name}": f"capo/{name}"
    for name in (
        *("learning_rate", "scale", "kl/measured", "kl/proposed", "kl/fraction", "kl/predicted", "kl/noise"),
        *("kl/rank_correlation", "kl/seconds", "seconds", "rejection_rate", "token/m_f/mean", "token/m_h/mean"),
        *("steps_skipped", "accepted_tokens"),
    )
}


def main(steps: int, workers: int, lr: float, kill_after: int, out: Path) -> None:
    arms = {}
    for name, mode in ARMS.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = small_run(Path(folder), workers) | {
                "actor_rollout_ref.actor.capo.mode": mode,
                "actor_rollout_ref.actor.optim.lr": lr,
                "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
                "trainer.total_training_steps": steps,
                "trainer.save_freq": SAVE_EVERY,
                "trainer.max_actor_ckpt_to_keep": 1,
                "trainer.test_freq": steps,
            }
            killed = run_trainer(settings, Path(folder), "killed", kill_after) if mode == "trust_region" else []
            rows = run_trainer(settings, Path(folder), "whole")
        first = rows[0]["step"]
        arms[name] = {"accuracy": accuracy(rows), "by_step": columns([*killed[: first - 1], *rows])}
        if killed:
            arms[name] |= {"killed_after": killed[-1]["step"], "resumed_from": first - 1}
            arms[name]["lost"] = columns(killed[first - 1 :])
    packages = {name: version(name) for name in ("verl", "ray", "torch", "transformers", "tensordict", "transferqueue")}
    setting = {"steps": steps, "workers": workers, "lr": lr, "completions": 16}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(written({"versions": packages, "setting": setting}, arms))


def accuracy(rows: list[dict]) -> float:
    """Of verl's own validation after the last step, on problems that were not trained on."""
    (value,) = (value for name, value in rows[-1].items() if name.startswith("val-core/") and "mean@1" in name)
    return value


def columns(rows: list[dict]) -> dict[str, list[float | None]]:
    figures = {ours: [significant(row.get(theirs)) for row in rows] for theirs, ours in KEPT.items()}
    return {"step": [row["step"] for row in rows]} | {
        name: column for name, column in figures.items() if any(each is not None for each in column)
    }


def significant(value: float | None) -> float | None:
    """Four digits, or a count; nothing where there is no number."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.4g}")


def written(head: dict, arms: dict) -> str:
    """JSON, a line for each figure."""
    lines = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    for name, arm in arms.items():
        parts = []
        for part, value in arm.items():
            text = json.dumps(value)
            if isinstance(value, dict):
                text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "}"
            parts.append(f'"{part}": {text}')
        lines.append(f'"{name}": {{' + ",\n ".join(parts) + "}")
    return "{" + ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kill-after", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "verl" / "trainer.json")
    main(**vars(parser.parse_args()))
