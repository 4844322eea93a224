r"""Make `src/capo_rl/embedded`: a decoder small enough to ship and to train on a CPU, and good enough to improve.

    python scripts/make_embedded.py

It learns `capo_rl.tasks.arithmetic` by imitation of chains whose steps slip, so that it knows the arithmetic, trusts
it as little as the slips tell it to, and solves half of the problems when sampled: the base that reinforcement learning
wants. Longer and shorter chains than the five terms of the task are among those that it learns from.

About 10 minutes on one CPU core (the same weights each time with the same torch and CPU). Expect, on 4096 fresh
problems of 5 and of 8 terms: 0.503 and 0.327 at temperature 1.0, 0.640 and 0.459 at 0.9, 1.000 and 1.000 greedily.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from capo_rl.runs.models import load_model, load_tokenizer
from capo_rl.tasks.arithmetic import WORDS, problems

PAD, EOS = "<pad>", "<eos>"
FRAME = ["Compute ", " mod 10.\n", "\\boxed{", "}"]
SYMBOLS = [*"0123456789+-=\n"]
POSITIONS = 256
TERMS = range(2, 10)
FRESH = 2**32  # the seed of the problems for measurement, which no training stream has


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a digit, symbol, phrase or word with its space, so that decoding is concatenation.

    There is no token for the unknown: other text is an error, since the model could make nothing of it.
    """
    vocabulary = [PAD, EOS, *FRAME, *SYMBOLS, *(f" {word}" for word in WORDS)]
    words = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}))
    pattern = "|".join([*map(re.escape, FRAME), " [a-z]+", "[\\s\\S]"])
    words.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """A Llama with an output layer of its own, so that the gradient of the last layer is its alone."""
    special = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **special,
    )
    model = LlamaForCausalLM(config)
    # Plain sampling, said outright: where a file is silent, transformers keeps the 50 likeliest tokens only.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> None:
    """Cross-entropy of the solutions; a batch has problems of one length, and so needs no padding."""
    rng = random.Random(arguments.seed)
    streams = {terms: problems(rng.randrange(2**32), terms, arguments.slip) for terms in TERMS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, (1 + math.cos(math.pi * step / arguments.steps)) / 2)
    )
    model.train()
    progress = tqdm(range(arguments.steps), desc="train", unit="step")
    for step in progress:
        rows = list(islice(streams[rng.choice(TERMS)], arguments.batch))
        texts = [row["problem"] + row["solution"] + EOS for row in rows]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        start = len(tokenizer(rows[0]["problem"])["input_ids"])
        targets = ids[:, start:]
        logits = model(ids[:, :-1], logits_to_keep=targets.shape[1]).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, terms: int, temperature: float, count: int
) -> float:
    """The share of `count` fresh problems whose one box holds the answer; temperature 0 is greedy."""
    settings = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    rows = list(islice(problems(FRESH, terms), count))
    right = 0
    for first in range(0, count, 256):
        batch = rows[first : first + 256]
        prompts = tokenizer([row["problem"] for row in batch], return_tensors="pt")
        output = model.generate(**prompts, **settings, max_new_tokens=7 * terms)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            re.findall(r"\\boxed\{(.*?)\}", text) == [row["answer"]] for text, row in zip(texts, batch, strict=True)
        )
    return right / count


@torch.no_grad()
def calibration(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> tuple[float, float]:
    """The mean probability of a step's right digit, and the mean KL of the words from Zipf's law in nats."""
    rows = list(islice(problems(FRESH), count))
    ids = tokenizer([row["problem"] + row["solution"] for row in rows], return_tensors="pt")["input_ids"]
    log_probs = model(ids[:, :-1]).logits.log_softmax(-1)
    results = (ids == tokenizer.convert_tokens_to_ids("=")).nonzero() + torch.tensor([0, 1])
    row, column = results.unbind(1)
    right = log_probs[row, column - 1, ids[row, column]].exp().mean()
    law = 1 / torch.arange(1, len(WORDS) + 1)
    law /= law.sum()
    words = tokenizer.convert_tokens_to_ids([f" {word}" for word in WORDS])
    divergence = (law * (law.log() - log_probs[row, column][:, words])).sum(-1).mean()
    return right.item(), divergence.item()


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> str:
    """What the model is worth, as a table in Markdown."""
    torch.manual_seed(0)
    model.eval()
    lines = ["| decoding | 5 terms | 8 terms |", "|---|---|---|"]
    for name, temperature in (("temperature 1.0", 1.0), ("temperature 0.9", 0.9), ("greedy", 0.0)):
        shares = [f"{accuracy(model, tokenizer, terms, temperature, count):.3f}" for terms in (5, 8)]
        lines.append(f"| {' | '.join([name, *shares])} |")
    right, divergence = calibration(model, tokenizer, count)
    lines += ["", f"A right digit has probability {right:.3f}; the words are {divergence:.4f} nats from Zipf's law."]
    return "\n".join(lines)


CARD = """\
# The embedded model

A Llama of {parameters:,} parameters, which writes chains of thought for `capo_rl.tasks.arithmetic` and slips at some
steps as it was taught to: a base to train by reinforcement on a CPU. Load it with
`capo_rl.runs.models.load_model("embedded")`.
It reads and writes nothing but that task; other text is an error of its tokenizer.

Made by `scripts/make_embedded.py`: from random weights, imitation of {chains:,} made-up chains of 2 to 9 terms, each
step wrong with probability {slip}. The weights are bfloat16 on disk and load as float32.

The share of {count:,} fresh problems that it solves:

{table}

Licence: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("src/capo_rl/embedded"), help="folder to write (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="chains a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--slip", type=float, default=0.16, help="probability that a step is wrong (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the chains (%(default)s)")
    parser.add_argument("--problems", type=int, default=4096, help="fresh problems to measure on (%(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums in one order: the same weights each time, and no slower at this size
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.layers)
    train(model, tokenizer, arguments)

    model.to(torch.bfloat16).save_pretrained(arguments.out)
    model.config.dtype = torch.float32  # what `dtype="auto"`, the default, goes by
    model.config.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    # What is measured is what was written.
    table = measure(load_model(str(arguments.out)), load_tokenizer(str(arguments.out)), arguments.problems)
    print(table)
    card = CARD.format(
        parameters=model.num_parameters(),
        chains=arguments.steps * arguments.batch,
        slip=arguments.slip,
        count=arguments.problems,
        table=table,
    )
    (arguments.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
