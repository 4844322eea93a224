"""A TRL script with the README's two changed lines, on the model inside the package: two minutes on 2 CPU cores.

    python examples/trl_script.py [--learning-rate 5e-4] [--max-steps 300] [--stock]

`--stock` is the script before the change. Everything but batch, lengths and the learning rate is TRL's default. Prints
the reward of the first and of the last tenth of the run.
"""

from __future__ import annotations

import argparse

import torch
from trl import GRPOConfig, GRPOTrainer

from capo_rl import CAPOConfig, CAPOTrainer
from capo_rl.rewards.accuracy import accuracy_reward
from capo_rl.runs.data import as_prompts, load_problems
from capo_rl.runs.models import load_model, load_tokenizer


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="TRL's own trainer")
    parser.add_argument("--output-dir", default="runs/trl_script")
    options = parser.parse_args(arguments)
    trainer_class, config = (GRPOTrainer, GRPOConfig) if options.stock else (CAPOTrainer, CAPOConfig)
    problems = load_problems("arithmetic", seed=options.seed)
    trainer = trainer_class(
        model=load_model("embedded"),
        reward_funcs=accuracy_reward,
        args=config(
            output_dir=options.output_dir,
            learning_rate=options.learning_rate,
            max_steps=options.max_steps,
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=16,
            max_completion_length=48,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=as_prompts(problems, conversational=False),
        processing_class=load_tokenizer("embedded"),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    tenth = max(1, len(rewards) // 10)
    first, last = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
    print(f"reward of the first tenth {first:.3f}, of the last {last:.3f}")
    return first, last


if __name__ == "__main__":
    main()
