"""The processes that share one optimizer step: totals, tokens and gradient rows over all of them.

Every method is collective: all processes must call it, in the same order. With one process each returns its argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Processes:
    """The data-parallel processes of a run: those of `group`, by default all.

    `bytes` counts what this process has handed in.
    """

    group: ProcessGroup | None = None
    bytes: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def number(self) -> int:
        """Which of them this one is, from 0."""
        return dist.get_rank(self.group) if self.count > 1 else 0

    def take_bytes(self) -> int:
        """What was handed in since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken

    def total(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over processes of a tensor that has the same shape in each."""
        return self._reduced(values.clone(), dist.ReduceOp.SUM) if self.count > 1 else values

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        return int(self._reduced(torch.tensor(value, device=device), dist.ReduceOp.MAX)) if self.count > 1 else value

    def agreed(self, value: float, device: torch.device) -> float:
        """The first process's number, bit for bit, in all."""
        if self.count == 1:
            return value
        sent = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(sent, 0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group)
        self.bytes += sent.nbytes
        return float(sent)

    def gather(self, values: Shaped[Tensor, "own *rest"]) -> Shaped[Tensor, "all *rest"]:
        """The entries of all processes, another number in each, after one another in the processes' order."""
        if self.count == 1:
            return values
        lengths = self.total(self._mine(torch.tensor(len(values), device=values.device)))
        padded = values.new_zeros(int(lengths.max()), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        self.bytes += padded.nbytes
        return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)])

    def union(self, rows: Int[Tensor, "own"]) -> Int[Tensor, "all"]:
        """The vocabulary rows, ascending in each process, that at least one process has; one byte a row travels."""
        if self.count == 1:
            return rows
        has = torch.zeros(
            self.largest(int(rows[-1]) + 1 if len(rows) else 0, rows.device), dtype=torch.uint8, device=rows.device
        )
        has[rows] = 1
        return self._reduced(has, dist.ReduceOp.MAX).nonzero().squeeze(1)

    def _mine(self, value: Tensor) -> Tensor:
        """Zeros for every process, and the value at this one's place."""
        values = value.new_zeros(self.count)
        values[self.number] = value
        return values

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(values, operation, group=self.group)
        self.bytes += values.nbytes
        return values
