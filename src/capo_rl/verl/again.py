"""A step's micro-batches, kept to be run again on a sample of their completions when the update is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils

from capo_rl.planning.rerun import Sample, drew


@dataclass(frozen=True)
class Again:
    """A micro-batch to run again, or some of its completions: `sample` [n] marks those of its planned tokens that are
    measured, and `among` the same of those that are run; from the `random` numbers it drew in the loss, if any."""

    micro_batch: Any
    sample: Tensor
    among: Tensor
    random: list[Tensor] | None


def remembered(
    micro_batch: Any, mask: Tensor, advantages: Tensor, step: Sample, before: list[Tensor], after: list[Tensor]
) -> Again:
    """What it takes to run a micro-batch again on its part of a step's sample; without one on its first completion, for
    form's sake: FSDP has all workers take part in a forward pass.

    Its response tokens are `mask` [b, T], with `advantages` [b, T]; `before` and `after` is where the generators
    stood around its forward pass. With random numbers in that pass the same come again only to the same shapes, so then
    the whole micro-batch is run, and the sample is taken from its tokens.
    """
    rows = step.rows(mask, advantages)
    sampled = torch.zeros_like(mask)
    sampled[rows] = mask[rows]
    sample = sampled[mask]
    if drew(before, after):
        return Again(micro_batch, sample, sample, before)
    if not len(rows):
        rows = rows.new_zeros(1)
    if len(rows) < len(mask):
        micro_batch = tensordict_utils.index_select_tensor_dict(micro_batch, rows)
    return Again(micro_batch, sample, sampled[rows][mask[rows]], None)
