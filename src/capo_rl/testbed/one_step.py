"""One step from a point of a run, taken at several lengths and in several forms, and where it takes the policy.

    everything    the step on all tokens
    masked        on those within the paper's bounds, denominators of the accepted tokens, as published
    masked_short  the same, multiplied by ρ = ‖g_acc‖ / ‖g_all‖ of this step
    shortened     on all tokens, multiplied by that ρ
    random        on as many tokens as `masked` has, drawn at random

Nothing is sampled: the KL is that of the whole vocabulary at each sampled token, and the change of the held-out reward
is an estimate by importance weights on completions that were sampled before the step.

The gradient is that of Σ_i A_i log π(a_i) / N over all N tokens (`loss_type: dapo` on fresh rollouts), clipped, and the
step is Adam's with the run's moments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capo_rl.curvature.head import Head
from capo_rl.curvature.selection import Thresholds
from capo_rl.curvature.step import AdamStep
from capo_rl.planning.planner import Planner
from capo_rl.testbed.points import Point, Texts

# The bounds of Table 4.
BOUNDS = Thresholds(fisher=1e-4, hessian=(-1e-2, 1e-2))
FORMS = ("everything", "masked", "masked_short", "shortened", "random")
_ROWS = 12  # of a forward pass
_CONFIDENT = (0.5, 0.9)  # divides the tokens by π(a)
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What the policy is at n tokens: hidden states [n, d] and log π [n, V]."""

    hidden: Tensor
    log_pi: Tensor
    actions: Tensor

    @property
    def of_actions(self) -> Tensor:
        return self.log_pi.gather(1, self.actions[:, None]).squeeze(1)

    @property
    def entropy(self) -> Tensor:
        return -(self.log_pi.exp() * self.log_pi).sum(1)


def study(model: nn.Module, point: Point, rates: list[float], parts_at: float) -> dict[str, Any]:
    """Every form of the step at every rate; and at `parts_at` that on all tokens, one part of the model at a time."""
    put(model, point.weights)
    temperature = float(point.about["temperature"])
    before = {name: look(model, getattr(point, name), temperature) for name in ("batch", "held_out")}
    batch = before["batch"]
    advantages = point.batch.values[:, None].expand(point.batch.mask.shape)[point.batch.mask]
    everyone = advantages / len(advantages)
    planned = {rate: _planned(model, point, batch, advantages, everyone, rate) for rate in rates}
    generator = torch.Generator().manual_seed(point.steps)
    sets = {"everything": everyone}
    for rate, (keep, _) in planned.items():
        drawn = torch.zeros_like(keep)
        drawn[torch.randperm(len(keep), generator=generator)[: int(keep.sum())]] = True
        sets |= {f"rejected {rate}": everyone.where(~keep, 0), f"left out {rate}": everyone.where(~drawn, 0)}
    raw = gradients(model, point.batch, list(sets.values()), temperature)
    g = dict(zip(sets, raw, strict=True))
    whole = direction(clipped(g["everything"], point), point)
    found: dict[str, Any] = {
        "about": point.about,
        "tokens": len(advantages),
        "completions": len(point.batch.values),
        "gradient_norm": norm(g["everything"]),
        "reward_held_out": float(point.held_out.values.mean()),
        "perplexity": _perplexity(model, point.replies),
        "entropy": float(batch.entropy.mean()),
        "rates": [],
    }
    for rate, (keep, predicted) in planned.items():
        row: dict[str, Any] = {"learning_rate": rate, "scale": rate * float(batch.hidden.abs().sum(1).mean())}
        row["rejected"] = _rejected(batch, advantages, everyone, keep, g["everything"], g[f"rejected {rate}"])
        rho = row["rejected"]["share"]
        again = len(keep) / max(1, int(keep.sum()))  # the mean over the accepted tokens
        steps = {
            name: direction(clipped(_less(g["everything"], g[f"{kind} {rate}"], again), point), point)
            for name, kind in (("masked", "rejected"), ("random", "left out"))
        }
        row["rejected"] |= {
            "cosine_of_steps": cosine(steps["masked"], whole),
            "length_of_step": norm(steps["masked"]) / norm(whole),
        }
        lengths = {"everything": 1.0, "masked": 1.0, "masked_short": rho, "shortened": rho, "random": 1.0}
        steps |= {"everything": whole, "shortened": whole, "masked_short": steps["masked"]}
        for form in FORMS:
            put(model, point.weights, steps[form], rate * lengths[form])
            row[form] = _moved(model, point, before, advantages, keep)
            row[form]["scale"] = lengths[form]
        row["everything"]["predicted"] = predicted["everything"]
        row["masked"]["predicted"] = predicted["masked"]
        found["rates"].append(row)
    found["parts"] = {"learning_rate": parts_at} | _by_part(model, point, batch, whole, parts_at)
    put(model, point.weights)
    return found


@torch.no_grad()
def put(model: nn.Module, weights: Weights, step: Weights | None = None, length: float = 0.0) -> None:
    """Give the model its weights, less `length` times a step."""
    for name, weight in model.named_parameters():
        weight.copy_(weights[name])
        if step is not None:
            weight.sub_(step[name], alpha=length)


def direction(gradient: Weights, point: Point) -> Weights:
    """Adam's step at a learning rate of one, from the point's moments; without weight decay."""
    beta1, beta2 = point.about["betas"]
    n = point.steps + 1
    root = math.sqrt(1 - beta2**n)
    found = {}
    for name, g in gradient.items():
        p = point.first[name].lerp(g, 1 - beta1)
        q = beta2 * point.second[name] + (1 - beta2) * g.square()
        found[name] = p.div_(1 - beta1**n).div_(q.sqrt_().div_(root).add_(float(point.about["eps"])))
    return found


def clipped(gradient: Weights, point: Point) -> Weights:
    factor = min(1.0, float(point.about["max_grad_norm"]) / (norm(gradient) + 1e-6))
    return {name: factor * g for name, g in gradient.items()}


def gradients(model: nn.Module, texts: Texts, sets: list[Tensor], temperature: float) -> list[Weights]:
    """−∇ Σ_i w_i log π(a_i) for each set of weights w [n]: one forward pass, a backward pass for each set."""
    named = dict(model.named_parameters())
    sums = [{name: torch.zeros_like(weight) for name, weight in named.items()} for _ in sets]
    first = 0
    for ids, attention, mask in _rows(texts):
        log_pi = _log_pi(model, _hidden(model, ids, attention, mask), temperature)
        chosen = log_pi.gather(1, ids[mask][:, None]).squeeze(1)
        here = slice(first, first + len(chosen))
        first += len(chosen)
        for weights, total in zip(sets, sums, strict=True):
            if weights[here].any():
                parts = torch.autograd.grad((weights[here] * chosen).sum(), list(named.values()), retain_graph=True)
                for name, part in zip(named, parts, strict=True):
                    total[name] -= part
    return sums


@torch.no_grad()
def look(model: nn.Module, texts: Texts, temperature: float, head: Tensor | None = None) -> Seen:
    """The policy at the completions' tokens; `head` [V, d] in place of the model's own."""
    hidden = torch.cat([_hidden(model, *rows) for rows in _rows(texts)])
    return Seen(hidden, _log_pi(model, hidden, temperature, head), texts.ids[texts.mask])


def norm(weights: Weights) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in weights.values()))


def cosine(one: Weights, other: Weights) -> float:
    inner = sum(float((one[name].double() * other[name].double()).sum()) for name in one)
    length = norm(one) * norm(other)
    return inner / length if length else math.nan


def _less(everything: Weights, part: Weights, factor: float) -> Weights:
    return {name: factor * (g - part[name]) for name, g in everything.items()}


def _rows(texts: Texts) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from zip(texts.ids.split(_ROWS), texts.attention.split(_ROWS), texts.mask.split(_ROWS), strict=True)


def _hidden(model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
    """The states before the tokens that `mask` [B, L] marks, [n, d]. Rows with the same prompt share its pass."""
    start = int(mask.any(0).nonzero()[0])  # of the completions
    prompts, at = torch.unique(
        torch.cat([ids, attention.long()], 1)[:, _prompt(ids, start)], dim=0, return_inverse=True
    )
    before = model.base_model(input_ids=prompts[:, :start], attention_mask=prompts[:, start:], use_cache=True)
    before.past_key_values.batch_select_indices(at)
    after = model.base_model(
        input_ids=ids[:, start:],
        attention_mask=attention.long(),
        past_key_values=before.past_key_values,
        use_cache=True,
    )
    states = torch.cat([before[0][at, -1:], after[0][:, :-1]], 1)
    return states[mask[:, start:]]


def _prompt(ids: Tensor, start: int) -> list[int]:
    """The columns of the prompts in ids and attention side by side."""
    return [*range(start), *range(ids.shape[1], ids.shape[1] + start)]


def _log_pi(model: Any, hidden: Tensor, temperature: float, head: Tensor | None = None) -> Tensor:
    weight = model.get_output_embeddings().weight if head is None else head
    return (hidden @ weight.T / temperature).log_softmax(-1)


def _planned(
    model: Any, point: Point, batch: Seen, advantages: Tensor, everyone: Tensor, rate: float
) -> tuple[Tensor, dict[str, float]]:
    """The paper's verdicts on a step of this rate, and the KL that the last layer's model predicts of it."""
    head = Head(model.get_output_embeddings().weight)
    predicted = {}
    for form in ("everything", "masked"):
        step = AdamStep(rate, tuple(point.about["betas"]), point.about["eps"])
        planner = Planner(step, BOUNDS, temperature=point.about["temperature"], top_k=point.about["top_k"])
        planner.load_state_dict(point.planner)
        step.lr = rate
        micro = planner.plan(batch.hidden, head, batch.actions, advantages)
        accepted = everyone.where(micro.keep, 0) * len(micro.keep) / micro.keep.sum().clamp(min=1)
        micro.weights = accepted if form == "masked" else everyone
        predicted[form] = planner.commit()["capo/kl/predicted"]
    return micro.keep, predicted


def _rejected(
    batch: Seen, advantages: Tensor, everyone: Tensor, keep: Tensor, whole: Weights, rejected: Weights
) -> dict[str, float]:
    """How much of the step the rejected tokens are."""
    energy = everyone.square() * (1 - 2 * batch.of_actions.exp() + batch.log_pi.exp().square().sum(1))
    energy = energy * batch.hidden.square().sum(1)
    accepted = {name: g - rejected[name] for name, g in whole.items()}
    return {
        "rate": float((~keep).float().mean()),
        "rate_positive": float((~keep)[advantages > 0].float().mean()),
        "rate_negative": float((~keep)[advantages < 0].float().mean()),
        "energy": float(energy[~keep].sum() / energy.sum()),
        "norm": norm(rejected) / norm(whole),
        "cosine": cosine(rejected, accepted),
        "share": min(1.0, norm(accepted) / norm(whole)),
    }


def _moved(model: nn.Module, point: Point, before: dict[str, Seen], advantages: Tensor, keep: Tensor) -> dict[str, Any]:
    """How far the policy is from where it was, and what of the tokens, the reward and the language."""
    temperature = float(point.about["temperature"])
    was, now = before["batch"], look(model, point.batch, temperature)
    kl, less = divergence(was, now), now.entropy - was.entropy
    ordered = kl.sort(descending=True).values
    found: dict[str, Any] = {
        "kl": float(kl.mean()),
        "kl_quantiles": {f"q{q}": float(kl.quantile(q / 100)) for q in (50, 90, 99)} | {"max": float(kl.max())},
        "kl_of_top_percent": float(ordered[: math.ceil(len(ordered) / 100)].sum() / ordered.sum()),
        "kl_rejected": float(kl[~keep].mean()) if (~keep).any() else None,
        "kl_accepted": float(kl[keep].mean()) if keep.any() else None,
        "entropy": float(less.mean()),
        "by_kind": {},
    }
    pi = was.of_actions.exp()
    sure = torch.bucketize(pi, torch.tensor(_CONFIDENT))
    for sign, with_sign in (("positive", advantages > 0), ("negative", advantages < 0)):
        for level, name in enumerate(("unsure", "between", "sure")):
            some = with_sign & (sure == level)
            if some.any():
                found["by_kind"][f"{sign}, {name}"] = {
                    "tokens": int(some.sum()),
                    "kl": float(kl[some].mean()),
                    "log_pi": float((now.of_actions - was.of_actions)[some].mean()),
                    "entropy": float(less[some].mean()),
                }
    found["held_out"] = _held_out(point.held_out, before["held_out"], look(model, point.held_out, temperature))
    found["perplexity"] = _perplexity(model, point.replies)
    return found


def divergence(was: Seen, now: Seen) -> Tensor:
    """KL(π ‖ π') [n] over the whole vocabulary, as Σ π (e^δ − 1 − δ) with δ = log π'/π, which keeps its digits."""
    delta = now.log_pi - was.log_pi
    return (was.log_pi.exp() * (delta.expm1() - delta)).sum(1)


def log_pi_change(form: dict[str, Any], sign: str) -> float:
    """The mean change of log π(a) of the tokens whose advantage is `positive` or `negative`, of one form in a study."""
    kinds = [kind for name, kind in form["by_kind"].items() if name.startswith(sign)]
    return sum(kind["tokens"] * kind["log_pi"] for kind in kinds) / sum(kind["tokens"] for kind in kinds)


def _held_out(texts: Texts, was: Seen, now: Seen) -> dict[str, float]:
    """The change of the expected reward, Σ (w − 1)(r − r̄) / n with w = π'(y) / π(y) of whole completions, its standard
    error, and the effective number of completions."""
    rows = texts.mask.nonzero()[:, 0]
    logs = torch.zeros(len(texts.values)).index_add_(0, rows, now.of_actions - was.of_actions)
    ratio = logs.double().clamp(max=50).exp()
    each = (ratio - 1) * (texts.values - texts.values.mean())
    return {
        "change": float(each.mean()),
        "standard_error": float(each.std() / math.sqrt(len(each))),
        "effective": float(ratio.sum().square() / ratio.square().sum() / len(ratio)),
    }


def _perplexity(model: nn.Module, replies: Texts) -> float:
    return math.exp(min(700.0, float(-look(model, replies, 1.0).of_actions.double().mean())))


def _by_part(model: Any, point: Point, before: Seen, step: Weights, rate: float) -> dict[str, float]:
    """The mean KL of the step on all tokens when only some of the weights take it.

    Where embeddings are tied, `head` is their part as output alone, with the hidden states that were, and `embedding`
    their part as input.
    """
    temperature = float(point.about["temperature"])
    output = next(name for name, weight in model.named_parameters() if weight is model.get_output_embeddings().weight)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    old = point.weights[output]
    head = old - rate * step[output]
    moved = Seen(before.hidden, _log_pi(model, before.hidden, temperature, head), before.actions)
    found = {"all": math.nan, "head": float(divergence(before, moved).mean())}
    blocks = 1 + max(int(match[1]) for name in point.weights if (match := re.search(r"layers\.(\d+)\.", name)))
    thirds = [range(blocks * i // 3, blocks * (i + 1) // 3) for i in range(3)]
    groups = {f"blocks {part.start + 1} to {part.stop}": part for part in thirds} | {
        "last block": range(blocks - 1, blocks)
    }
    sets = {"all": set(step)}
    for name, part in groups.items():
        sets[name] = {each for each in step if (m := re.search(r"layers\.(\d+)\.", each)) and int(m[1]) in part}
    if tied:
        sets["embedding"] = {output}
    for name, some in sets.items():
        put(model, point.weights, {each: step[each] if each in some else torch.zeros(()) for each in step}, rate)
        now = look(model, point.batch, temperature, None if name == "all" else old)
        found[name] = float(divergence(before, now).mean())
    return found
