"""GRPO in a loop of plain PyTorch, with CAPO in the lines that say so, on the model inside the package.

    python examples/own_loop.py [--steps 60] [--mode trust_region] [--learning-rate 1e-2] [--seed 0]

The modes are those of `CAPOTrainer`: in `trust_region` updates are held to a budget of KL, in `mask` tokens out of
bounds are left out, in `shorten` none is; the last two multiply the step by the accepted tokens' share, and want a
lower learning rate. What each line is for is in docs/own_loop.md.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from capo_rl import Head, Planner, TrustRegion  # CAPO
from capo_rl.runs.models import load_model, load_tokenizer
from capo_rl.tasks.arithmetic import problems

PROMPTS, GROUP, LENGTH, CLIP = 2, 8, 48, 1.0


@dataclass(frozen=True)
class Rollouts:
    """B completions of T tokens behind their prompts: ids and attention [B, P + T], mask [B, T], advantages [B]."""

    ids: Tensor
    attention: Tensor
    mask: Tensor
    advantages: Tensor
    reward: float = math.nan


class Loop:
    """A model, its optimizer and the step."""

    def __init__(self, model, learning_rate: float, mode: str = "trust_region", total: int | None = None) -> None:
        self.model, self.mode, self.head = model, mode, model.lm_head.weight
        self.optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1.0 if total is None else max(0.0, 1 - step / total)
        )
        self.region = TrustRegion(self.optimizer, 5e-3 if mode == "trust_region" else None)  # CAPO
        self.planner = Planner.of(self.region, self.head, top_k=50, share=True)  # CAPO

    def step(self, rollouts: Rollouts):
        """One step of GRPO on rollouts of the policy as it is; returns figures, and what became of the update."""
        model, head, mode, mask = self.model, self.head, self.mode, rollouts.mask
        region, planner = self.region, self.planner  # CAPO
        length = mask.shape[1]
        actions = rollouts.ids[:, -length:]
        advantages = rollouts.advantages[:, None].expand(mask.shape)

        def now(micro_batch: int = 0) -> Tensor:
            """The hidden states [n, d] that predict the completions' tokens, under the weights as they are."""
            out = model.model(input_ids=rollouts.ids, attention_mask=rollouts.attention, use_cache=False)
            return out.last_hidden_state[:, -1 - length : -1][mask]

        hidden = now()
        log_policy = model.lm_head(hidden).log_softmax(-1)
        log_pi = hidden.new_zeros(mask.shape).masked_scatter(mask, log_policy.gather(1, actions[mask][:, None]))

        planned = planner.plan(hidden, Head(head), actions[mask], advantages[mask])  # CAPO
        planned.watch(log_pi, mask)  # CAPO
        advantages = planned.masked(advantages, mask, "dapo") if mode == "mask" else advantages  # CAPO

        ratio = (log_pi - log_pi.detach()).exp()
        loss = -(ratio * advantages)[mask].sum() / mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        norm = float(clip_grad_norm_(model.parameters(), CLIP))
        update = None
        if not math.isfinite(norm) or (mode == "mask" and planner.rejects_everything):  # CAPO
            figures = planner.skip(nonfinite=not math.isfinite(norm))  # CAPO
        else:
            figures = planner.commit(min(1.0, CLIP / (norm + 1e-6)))  # CAPO
            region.before_step(1.0 if mode == "trust_region" else planner.share.value)  # CAPO
            self.optimizer.step()
            update = region.after_step(lambda: planner.measured_kl(now, Head(head)).mean, planner.has_gradient)  # CAPO
        self.schedule.step()
        return figures, update


@torch.no_grad()
def roll_out(model, tokenizer, batch: list[dict[str, str]]) -> Rollouts:
    """GROUP completions of each problem, and their advantages: the reward, 1 or 0, relative to its group's."""
    texts = [problem["problem"] for problem in batch for _ in range(GROUP)]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(**prompts.to(model.device), do_sample=True, max_new_tokens=LENGTH, top_k=0)
    completions = ids[:, prompts["input_ids"].shape[1] :]
    ended = (completions == tokenizer.eos_token_id).int()
    mask = ended.cumsum(1) - ended == 0  # up to the first end, which counts
    answers = [re.search(r"\\boxed\{(.*?)\}", text) for text in tokenizer.batch_decode(completions)]
    right = [problem["answer"] for problem in batch for _ in range(GROUP)]
    rewards = torch.tensor([float(bool(a) and a[1] == b) for a, b in zip(answers, right, strict=True)])
    groups = rewards.view(-1, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    attention = torch.cat([prompts["attention_mask"], mask.long()], dim=1)
    return Rollouts(ids, attention, mask, advantages.flatten(), float(rewards.mean()))


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--mode", choices=["trust_region", "mask", "shorten"], default="trust_region")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    loop = Loop(model, options.learning_rate, options.mode, options.steps)
    data = problems(options.seed)
    rewards: list[float] = []
    for step in range(1, options.steps + 1):
        rollouts = roll_out(model, tokenizer, list(islice(data, PROMPTS)))
        figures, update = loop.step(rollouts)
        rewards.append(rollouts.reward)
        recent = sum(rewards[-10:]) / len(rewards[-10:])
        kl = "" if update is None else f", KL {update.measured:.1e} nats, {update.fraction:.0%} of the update left"
        print(
            f"step {step}/{options.steps}: reward {recent:.2f}, {figures['capo/rejection_rate']:.1%} out of bounds{kl}"
        )
    return rewards


if __name__ == "__main__":
    main()
