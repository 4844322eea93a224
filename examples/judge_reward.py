"""A judge as the reward: a service that gives marks, and fails now and then. A failure costs a batch and not the run.

    python examples/judge_reward.py [--max-steps 8]

A batch on which it raises is left out of the gradient; so is a completion for which it returns None. Both are counted
in `capo/rewards_missing`, and three batches in a row without any reward end the run.
"""

from __future__ import annotations

import argparse

import torch

from capo_rl import CAPOConfig, CAPOTrainer
from capo_rl.runs.data import as_prompts, load_problems
from capo_rl.runs.models import load_model, load_tokenizer


def judge(completions, answer, **columns):
    """The stub of one, which can't be reached at its second call."""
    judge.calls += 1
    if judge.calls == 2:
        raise TimeoutError("the judge did not answer")
    return [0.2 + 0.8 * (f"{{{right}}}" in text) for text, right in zip(completions, answer, strict=True)]


judge.calls = 0


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=8)
    parser.add_argument("--output-dir", default="runs/judge_reward")
    options = parser.parse_args(arguments)
    trainer = CAPOTrainer(
        model=load_model("embedded"),
        reward_funcs=judge,
        args=CAPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=1e-2,
            use_cpu=not torch.cuda.is_available(),
            max_completion_length=48,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=as_prompts(load_problems("arithmetic"), conversational=False),
        processing_class=load_tokenizer("embedded"),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in steps:
        print(f"step {entry['step']}: reward {entry['reward']}, {entry['capo/rewards_missing']:.0f} without one")
    return steps


if __name__ == "__main__":
    main()
