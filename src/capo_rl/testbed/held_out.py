"""What a run does to problems it never sees, measured while it trains: accuracy, and what is left of its language.

A run's own random numbers are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from transformers import TrainerCallback

from capo_rl.rewards.accuracy import accuracy_reward
from capo_rl.rewards.constraints import constraint_reward
from capo_rl.tasks import arithmetic
from capo_rl.tasks.sentences import QUESTIONS, sentences

_SEED = 2**31  # of the held-out problems; no training run has it
_REPLY_TOKENS = 48


class HeldOut(TrainerCallback):
    """Measures before the first step, every so many steps and at the end, into `found`, a list for each figure.

    accuracy    the share of so many `problems` whose sampled completion is right: arithmetic with `terms` terms,
                or sentences about nouns that training lacks
    perplexity  with sentences: exp of the mean negative log-probability of what the model said before the first step to
                questions that have nothing to do with the task; it starts at the exponential of its entropy, and grows
                with KL(model before ‖ model now)
    """

    def __init__(self, trainer: Any, task: str, problems: int, every: int, terms: int = 8) -> None:
        self.trainer, self.every, self.language = trainer, every, task == "sentences"
        made = sentences(_SEED, held_out=True) if self.language else arithmetic.problems(_SEED, terms)
        self.rows = list(islice(made, problems))
        self.found: dict[str, list[float]] = {"capo/completions": [], "accuracy": []}
        if self.language:
            self.found["perplexity"] = []
        self.tokens = trainer.args.max_completion_length if self.language else 64  # eight terms are longer
        self.replies: list[tuple[list[int], list[int]]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if self.language:
            asked = [{"problem": question} for question in QUESTIONS]
            self.replies = sampled(self.trainer.model, self.trainer.processing_class, asked, _REPLY_TOKENS)
        self.measure()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure()

    def measure(self) -> None:
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        self.found["capo/completions"].append(self.trainer.completions)
        self.found["accuracy"].append(sampled_accuracy(model, tokenizer, self.rows, self.tokens))
        if self.language:
            self.found["perplexity"].append(perplexity(model, self.replies))


def sampled_accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], max_new_tokens: int) -> float:
    """The share of rows whose completion, sampled at temperature 1, is right."""
    pairs = sampled(model, tokenizer, rows, max_new_tokens)
    return sum(rewards(tokenizer, rows, [reply for _, reply in pairs])) / len(rows)


def rewards(tokenizer: Any, rows: Sequence[dict[str, Any]], replies: Sequence[list[int]]) -> list[float]:
    """1 for each row whose reply, as ids, is right; 0 for one that is not, or can't be graded."""
    texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
    if "constraints" in rows[0]:
        found: list[Any] = constraint_reward(texts, [row["constraints"] for row in rows])
    else:
        found = accuracy_reward(texts, [row["answer"] for row in rows])
    return [reward or 0.0 for reward in found]


@torch.no_grad()
def sampled(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], max_new_tokens: int, temperature: float = 1.0
) -> list[tuple[list[int], list[int]]]:
    """The ids of each row's prompt and of one completion of it, up to and with the token that ends it."""
    texts = [row["problem"] for row in rows]
    if tokenizer.chat_template is not None:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    prompts = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=tokenizer.chat_template is None,
    ).to(model.device)
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model.generate(
            **prompts, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
        )
    model.train(training)
    width = prompts["input_ids"].shape[1]
    pairs = []
    for mask, ids in zip(prompts["attention_mask"].tolist(), output.tolist(), strict=True):
        reply = ids[width:]
        ends = [place for place, token in enumerate(reply) if token == tokenizer.eos_token_id]
        pairs.append((ids[width - sum(mask) : width], reply[: ends[0] + 1] if ends else reply))
    return pairs


@torch.no_grad()
def perplexity(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """exp(−mean log π(token | what stands before it)) over the replies' tokens; infinite where a logit isn't finite."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for prompt, reply in pairs:
        ids = torch.tensor([prompt + reply], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total -= float(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).double().sum())
        count += len(reply)
    model.train(training)
    mean = total / max(1, count)
    return math.exp(mean) if mean < 700 else math.inf
