"""A stock `GRPOTrainer` watched by one line: what CAPO would have left out, and how far each update moved the policy.

    python examples/monitor_callback.py [--max-steps 20]

The run is TRL's bit for bit. On the model inside the package, a minute on 2 CPU cores.
"""

from __future__ import annotations

import argparse

import torch
from trl import GRPOConfig, GRPOTrainer

from capo_rl import MonitorCallback, accuracy_reward
from capo_rl.runs.data import as_prompts, load_problems
from capo_rl.runs.models import load_model, load_tokenizer


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--output-dir", default="runs/monitor_callback")
    options = parser.parse_args(arguments)
    trainer = GRPOTrainer(
        model=load_model("embedded"),
        reward_funcs=accuracy_reward,
        args=GRPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=2e-4,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=16,
            max_completion_length=48,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=as_prompts(load_problems("arithmetic"), conversational=False),
        processing_class=load_tokenizer("embedded"),
    )
    trainer.add_callback(MonitorCallback(trainer))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in steps:
        print(
            f"step {entry['step']}: reward {entry['reward']:.2f}, the mask would leave out "
            f"{entry['capo/rejection_rate']:.1%}, the update moved the policy by {entry['capo/kl/measured']:.1e} nats"
        )
    return steps


if __name__ == "__main__":
    main()
