"""A point of a run: all it takes to take its next step again, in other ways, without generating anything.

Weights, Adam's moments and the planner's, the rollouts of the coming step, and beside them completions of held-out
problems and replies to questions that the task is not about, all under the policy as it is before that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from capo_rl.runs.models import ModelError
from capo_rl.runs.saved_state import load_state, save_state
from capo_rl.testbed.held_out import rewards, sampled

Row = dict[str, Any]

_REPLY_TOKENS = 32
_TRAINED_ON = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


@dataclass(frozen=True)
class Texts:
    """Prompts with their completions: `ids` [B, L] and `attention` [B, L], `mask` [B, L] the completions' tokens, and
    `values` [B] what each is worth: an advantage, a reward, or nothing."""

    ids: Tensor
    attention: Tensor
    mask: Tensor
    values: Tensor


@dataclass(frozen=True)
class Point:
    """What is known before a step; `about` says of which run: model, seed, step and the constants of its optimizer."""

    about: dict[str, Any]
    weights: dict[str, Tensor]
    first: dict[str, Tensor]  # Adam's moments, by weight
    second: dict[str, Tensor]
    planner: dict[str, Tensor]  # `Planner.state_dict`
    batch: Texts
    held_out: Texts
    replies: Texts

    @property
    def steps(self) -> int:
        """How many steps the moments have seen."""
        return int(self.about["step"])


class Points(TrainerCallback):
    """Writes the points before some `steps` of a trainer's run to FOLDER/SEED-STEP.safetensors.

    `rows` are held-out problems and `questions` those of another kind. For a run in the mode `monitor`, of one
    micro-batch a step.
    """

    def __init__(
        self, trainer: Any, model: str, folder: Path, steps: Sequence[int], rows: list[Row], questions: list[Row]
    ) -> None:
        self.trainer, self.model, self.folder, self.steps = trainer, model, folder, steps
        self.rows, self.questions = rows, questions
        self.inputs: dict[str, Any] = {}
        loss = trainer._compute_loss

        def remembered(model: Any, inputs: dict[str, Any]) -> Tensor:
            self.inputs = inputs
            return loss(model, inputs)

        trainer._compute_loss = remembered

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step in self.steps:
            self.before = self._state(optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step - 1
        if step in self.steps:  # the rollouts are known by now
            self._write(step)

    def _state(self, optimizer: Any) -> dict[str, Tensor]:
        trainer = self.trainer
        named = dict(trainer.model.named_parameters())
        state = getattr(optimizer, "optimizer", optimizer).state
        parts = {f"weights/{name}": weight for name, weight in named.items()}
        for name, weight in named.items():
            moments = state.get(weight) or {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            parts |= {f"first/{name}": moments["exp_avg"], f"second/{name}": moments["exp_avg_sq"]}
        parts |= {f"planner/{name}": tensor for name, tensor in trainer.planner.state_dict().items()}
        model, tokenizer = trainer.model, trainer.processing_class
        pairs = sampled(model, tokenizer, self.rows, trainer.args.max_completion_length, trainer.temperature)
        parts |= _named("held_out", laid_out(pairs, rewards(tokenizer, self.rows, [reply for _, reply in pairs])))
        pairs = sampled(model, tokenizer, self.questions, _REPLY_TOKENS)
        parts |= _named("replies", laid_out(pairs, [0.0] * len(pairs)))
        return {name: tensor.detach().clone() for name, tensor in parts.items()}

    def _write(self, step: int) -> None:
        args, given = self.trainer.args, {name: self.inputs[name] for name in _TRAINED_ON}
        batch = Texts(
            torch.cat([given["prompt_ids"], given["completion_ids"]], 1),
            torch.cat([given["prompt_mask"], given["completion_mask"]], 1).bool(),
            torch.cat([torch.zeros_like(given["prompt_mask"]), given["completion_mask"]], 1).bool(),
            given["advantages"],
        )
        about = {
            "model": self.model,
            "seed": args.seed,
            "step": step,
            "learning_rate": args.learning_rate,
            "temperature": args.temperature,
            "betas": [args.adam_beta1, args.adam_beta2],
            "eps": args.adam_epsilon,
            "max_grad_norm": args.max_grad_norm,
            "top_k": args.capo_top_k,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{args.seed}-{step}.safetensors"
        save_state(path, self.before | _named("batch", batch), about)
        self.before = {}


def read_point(path: Path, model: nn.Module, name: str) -> Point:
    """The point that a run of the model called `name` has written.

    Raises `ModelError` for a file of another model.
    """
    tensors, about = load_state(path, torch.device("cpu"))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, rest = key.split("/", 1)
        parts.setdefault(part, {})[rest] = tensor
    own = {key: weight.shape for key, weight in model.named_parameters()}
    if about["model"] != name or own != {key: weight.shape for key, weight in parts["weights"].items()}:
        raise ModelError(
            f"{path}: a point of a run of {about['model']}, and the model is {name}: give the one it is of"
        )
    texts = {key: Texts(**parts[key]) for key in ("batch", "held_out", "replies")}
    return Point(about, parts["weights"], parts["first"], parts["second"], parts["planner"], **texts)


def laid_out(pairs: Sequence[tuple[list[int], list[int]]], values: Sequence[float]) -> Texts:
    """Prompts and replies as rows of one length, a prompt's end before its reply.

    >>> laid_out([([5, 6], [7]), ([5], [8, 9])], [1.0, 0.0]).mask.int()
    tensor([[0, 0, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    before, after = (max(len(pair[i]) for pair in pairs) for i in (0, 1))
    ids = torch.zeros(len(pairs), before + after, dtype=torch.long)
    attention, mask = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(pairs):
        ids[row, before - len(prompt) : before + len(reply)] = torch.tensor(prompt + reply)
        attention[row, before - len(prompt) : before + len(reply)] = True
        mask[row, before : before + len(reply)] = True
    return Texts(ids, attention, mask, torch.tensor(values, dtype=torch.float32))


def _named(part: str, texts: Texts) -> dict[str, Tensor]:
    return {f"{part}/{name}": value for name, value in vars(texts).items()}
