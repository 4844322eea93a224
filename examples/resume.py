"""A run that stops and goes on ends with the weights of one that did not stop, bit for bit.

    python examples/resume.py [--max-steps 8]

A checkpoint of `CAPOTrainer` has all that takes: moments of the step model, what the budget has learned, and rollouts
that are still to be trained on. `capo train` resumes by itself. On the model inside the package.
"""

from __future__ import annotations

import argparse

import torch

from capo_rl import CAPOConfig, CAPOTrainer, accuracy_reward
from capo_rl.runs.data import as_prompts, load_problems
from capo_rl.runs.models import load_model, load_tokenizer


def run(folder: str, max_steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
    """Train up to a step, from the last checkpoint in the folder if asked to; returns the weights."""
    trainer = CAPOTrainer(
        model=load_model("embedded"),
        reward_funcs=accuracy_reward,
        args=CAPOConfig(
            output_dir=folder,
            max_steps=max_steps,
            learning_rate=1e-2,
            lr_scheduler_type="constant",  # others follow max_steps, which is how this run is stopped
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=16,
            max_completion_length=48,
            save_steps=1,
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=as_prompts(load_problems("arithmetic"), conversational=False),
        processing_class=load_tokenizer("embedded"),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=8)
    parser.add_argument("--output-dir", default="runs/resume")
    options = parser.parse_args(arguments)
    whole = run(f"{options.output_dir}/whole", options.max_steps)
    run(f"{options.output_dir}/stopped", options.max_steps // 2)
    resumed = run(f"{options.output_dir}/stopped", options.max_steps, resume=True)
    same = all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    print(f"the resumed run's weights are {'' if same else 'not '}those of the run that never stopped")
    return same


if __name__ == "__main__":
    main()
