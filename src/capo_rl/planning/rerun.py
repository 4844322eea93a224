"""Running a micro-batch once more, to measure an update: with the loss's random numbers, on some of its completions,
and with shards as they are now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

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


def sizes(
    mask: Bool[Tensor, "sequences time"], advantages: Float[Tensor, "sequences time"]
) -> Float[Tensor, "sequences"]:
    """The largest |A| of each completion's tokens, a NaN being larger than any; -1 where it has no token. On the CPU,
    where the choice between a few numbers waits for a GPU once."""
    return advantages.abs().float().nan_to_num(nan=math.inf, posinf=math.inf).where(mask, -1).amax(dim=1).cpu()


class Sample:
    """Which of a step's completions to measure its update on: a share of those that have tokens, counted over the step.

    The gradient moves most what it was made of, so those with the largest advantages are taken: the estimate is rather
    too large than too small. Where all of a step are known beforehand (`expect`), these are the largest of the step.
    Otherwise each micro-batch gives its largest, as many as are missing to ⌈share · completions so far⌉.

    >>> mask = torch.tensor([[True, True], [True, False], [False, False]])
    >>> sample = Sample(share=0.5)
    >>> sample.rows(mask, torch.tensor([[0.5, 0.5], [-2.0, 0.0], [9.0, 9.0]]))
    tensor([1])
    >>> sample.expect(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> [sample.rows(mask[:1], torch.full((1, 2), size)).tolist() for size in (1.0, 2.0, 3.0, 4.0)]
    [[], [], [0], [0]]
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._completions = self._taken = 0
        self._least: float | None = None  # the size of the smallest that are taken, and how many of that size
        self._ties = 0

    def expect(self, every: Float[Tensor, "completions"]) -> None:
        """The `sizes` of all completions of the micro-batches that come next."""
        there = every[every >= 0].sort(descending=True).values
        if len(there):
            wanted = self._wanted(len(there))
            self._least = float(there[wanted - 1])
            self._ties = wanted - int((there > self._least).sum())

    def rows(
        self, mask: Bool[Tensor, "sequences time"], advantages: Float[Tensor, "sequences time"]
    ) -> Int[Tensor, "rows"]:
        """Those of the coming micro-batch, whose tokens are `mask`, ascending; it may have none."""
        if self.share >= 1:
            return torch.arange(len(mask), device=mask.device)
        size = sizes(mask, advantages)
        largest = size.argsort(descending=True, stable=True)[: int((size >= 0).sum())]
        self._completions += len(largest)
        if self._least is None:
            wanted = self._wanted(self._completions) - self._taken
        else:
            above, tied = int((size > self._least).sum()), int((size == self._least).sum())
            wanted = above + min(tied, self._ties)
            self._ties -= wanted - above
        chosen = largest[:wanted].sort().values
        self._taken += len(chosen)
        return chosen.to(mask.device)

    def _wanted(self, completions: int) -> int:
        return math.ceil(self.share * completions - 1e-9)  # 0.1 · 30 is a little above 3


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
