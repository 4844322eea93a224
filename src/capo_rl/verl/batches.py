"""Reading verl's packed micro-batches: which tokens are a response's, where they stand, and whose group they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.utils.padding import no_padding_2_padding


def groups(micro_batch: Any) -> Tensor:
    """The number of each sequence's group: those of one prompt have one `uid`."""
    uids = tensordict_utils.get(micro_batch, "uid")
    if uids is None:
        raise ValueError(
            "actor.capo.granularity='group' goes by the uid that verl's trainer gives a prompt's completions, and the "
            "batch has none: use 'sequence' or 'token'"
        )
    numbers: dict[Any, int] = {}
    device = micro_batch["input_ids"].device
    return torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids], device=device)


def temperature(micro_batch: Any) -> float:
    """The one sampling temperature of a micro-batch."""
    given = micro_batch["temperature"]
    if not isinstance(given, Tensor):
        return float(given)
    if (given != given.flatten()[0]).any():
        raise ValueError("sequences of one micro-batch were sampled at different temperatures: CAPO models one policy")
    return float(given.flatten()[0])


def weighed_advantages(micro_batch: Any) -> Tensor:
    """verl's advantages [B, T] as its loss weighs them by who sampled: times the importance weights of its rollout
    correction, where the batch has them."""
    fields = [name for name in ("advantages", "rollout_is_weights") if name in micro_batch]
    padded = micro_batch.select(*fields).to_padded_tensor()
    advantages: Tensor = padded["advantages"]
    return advantages * padded["rollout_is_weights"] if "rollout_is_weights" in padded else advantages


def response_mask(batch: Any) -> Tensor:
    """Which response tokens are in the loss [B, T]."""
    mask: Tensor = batch.select("response_mask").to_padded_tensor()["response_mask"]
    return mask.bool()


def response_rows(micro_batch: Any) -> tuple[Tensor, Tensor]:
    """For each response token [B, T]: which of the packed tokens predicts it, and whether it is in the loss."""
    packed = torch.arange(len(micro_batch["input_ids"].values()), device=micro_batch["input_ids"].device)
    return no_padding_2_padding(packed, micro_batch), response_mask(micro_batch)


def positions(micro_batch: Any, hidden: Tensor) -> Tensor:
    """Where each of the packed tokens stands in the head's input [B, S, d], flattened to [B·S]."""
    input_ids = micro_batch["input_ids"]
    if tensordict_utils.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
        return torch.arange(len(input_ids.values()), device=hidden.device)
    lengths = input_ids.offsets().diff().to(hidden.device)
    filled = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return filled.flatten().nonzero().squeeze(1)
