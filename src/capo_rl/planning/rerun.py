"""Running a micro-batch once more, to measure an update: with the loss's random numbers, on some of its completions,
and with shards as they are now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def random_state(devices: list[torch.device]) -> list[Tensor]:
    """Where each device's generator stands."""
    return [
        torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        for device in devices
    ]


def drew(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether a forward pass between two `random_state`s drew from them (dropout, noise on embeddings, a router's
    jitter)."""
    return any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


@contextmanager
def random_numbers(devices: list[torch.device], start: list[Tensor] | None) -> Iterator[None]:
    """Draw from `start` on, or from wherever the generators stand, and leave them as they were: a measurement must not
    move the random numbers that training draws from."""
    before = random_state(devices)
    try:
        if start is not None:
            _set_random_state(devices, start)
        yield
    finally:
        _set_random_state(devices, before)


@dataclass
class Sample:
    """Which of a step's completions to measure its update on: a share of those that have tokens, counted over the step.

    Each micro-batch, of whatever size, gives what is missing to ⌈share · completions so far⌉, so the first gives one at
    least. The gradient moves most what it was made of, so of a micro-batch those with the largest advantages are taken:
    the estimate is rather too large than too small.

    >>> mask = torch.tensor([[True, True], [True, False], [False, False]])
    >>> sample = Sample(share=0.5)
    >>> sample.rows(mask, torch.tensor([0.5, 0.5, -2.0]))
    tensor([1])
    >>> sample.rows(mask[:1], torch.tensor([1.0, 1.0])), sample.rows(mask[:1], torch.tensor([1.0, 1.0]))
    (tensor([0]), tensor([], dtype=torch.int64))
    """

    share: float
    completions: int = 0
    taken: int = 0

    def rows(
        self, mask: Bool[Tensor, "sequences time"], advantages: Float[Tensor, "tokens"], least: int = 0
    ) -> Int[Tensor, "rows"]:
        """Those of the coming micro-batch, whose tokens are `mask`, ascending.

        `least`: so many at least, and the first where none has tokens; with shards all processes have to take part in
        each forward pass.
        """
        rows = torch.arange(len(mask), device=mask.device)
        if self.share >= 1:
            return rows
        there = rows[mask.any(dim=1)]
        self.completions += len(there)
        wanted = math.ceil(self.share * self.completions - 1e-9)  # 0.1 · 30 is a little above 3
        size = torch.zeros(mask.shape, device=mask.device)
        size[mask] = advantages.abs().float()
        largest = size.amax(dim=1)[there].argsort(descending=True, stable=True)
        chosen = there[largest[: max(least, wanted - self.taken)]].sort().values
        self.taken += len(chosen)
        return chosen if len(chosen) else rows[:least]


def reshard(model: nn.Module) -> None:
    """Let go of weights that FSDP has gathered: a module that stays together after its forward pass, as the root does,
    would answer the next one, and show its head, with the weights as they were before they were moved."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and (handle := module._handle) is not None:
            handle.reshard(handle.uses_sharded_strategy)


def _set_random_state(devices: list[torch.device], states: list[Tensor]) -> None:
    for device, state in zip(devices, states, strict=True):
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
