"""LoRA in a trust region: adapters are trained, the output head is frozen, and the budget holds all the same.

    python examples/lora.py [--max-steps 20]

KL is measured on the whole model, so what is trained does not matter to it. On the model inside the package.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig

from capo_rl import CAPOConfig, CAPOTrainer, accuracy_reward
from capo_rl.runs.data import as_prompts, load_problems
from capo_rl.runs.models import load_model, load_tokenizer


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--output-dir", default="runs/lora")
    options = parser.parse_args(arguments)
    trainer = CAPOTrainer(
        model=load_model("embedded"),
        reward_funcs=accuracy_reward,
        args=CAPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=5e-2,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=16,
            max_completion_length=48,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=as_prompts(load_problems("arithmetic"), conversational=False),
        processing_class=load_tokenizer("embedded"),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()  # the adapter alone
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in steps:
        print(f"step {entry['step']}: reward {entry['reward']:.2f}, KL {entry['capo/kl/measured']:.1e} nats a token")
    return steps


if __name__ == "__main__":
    main()
