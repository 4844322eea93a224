"""MATH as verl reads it: data/math/{train,test}.parquet with a prompt, its source and its answer.

    python recipes/verl/prepare_data.py                        # nlile/hendrycks-MATH-benchmark from the hub
    python recipes/verl/prepare_data.py train.jsonl test.jsonl # JSON Lines with `problem` and `answer`

Prompt and answer are those of the TRL recipes; `data_source` makes verl grade with its own MATH reward.
"""

import sys
from pathlib import Path

from datasets import load_dataset

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def row(example: dict[str, str], index: int) -> dict:
    return {
        "data_source": "DigitalLearningGmbH/MATH-lighteval",
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": example["problem"]}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": example["answer"]},
        "extra_info": {"index": index},
    }


def main(*files: str) -> None:
    folder = Path("data/math")
    folder.mkdir(parents=True, exist_ok=True)
    if files:
        data = load_dataset("json", data_files=dict(zip(("train", "test"), files, strict=True)))
    else:
        data = load_dataset("nlile/hendrycks-MATH-benchmark")
    for split in ("train", "test"):
        rows = data[split].map(row, with_indices=True, remove_columns=data[split].column_names)
        rows.to_parquet(folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {len(data[split])} problems")


if __name__ == "__main__":
    main(*sys.argv[1:])
