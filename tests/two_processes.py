"""Started by torchrun, twice: train on half of each batch, and write what the other process must agree on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from capo_rl import CAPOConfig, CAPOTrainer
from conftest import SETTINGS, make_model, make_tokenizer, prompts, wants_even_words


def main(folder: str, settings: dict) -> None:
    data: Dataset = prompts()
    trainer = CAPOTrainer(
        model=make_model(),
        reward_funcs=wants_even_words,
        args=CAPOConfig(output_dir=folder, **(SETTINGS | settings)),
        train_dataset=data,
        processing_class=make_tokenizer(),
    )
    figures: list[dict[str, float]] = []
    record = trainer._record
    trainer._record = lambda each: (figures.append(each), record(each))[1]
    trainer.train()
    weights = {name: weight.detach().double().sum().item() for name, weight in trainer.model.named_parameters()}
    kl = [{name: each[name] for name in each if name.startswith("capo/kl/")} for each in figures]
    rank = trainer.accelerator.process_index
    Path(folder, f"result-{rank}.json").write_text(json.dumps({"rank": rank, "weights": weights, "kl": kl}))
    torch.distributed.barrier()
    # An interpreter that takes its objects down one by one now and then aborts in gloo's threads ("terminate called
    # without an active exception"); what is tested is over.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
