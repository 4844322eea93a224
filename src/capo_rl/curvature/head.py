"""The output head: support and policy of N tokens in one pass over the vocabulary, from hidden states and W.

Logits exist a few tokens and a few rows at a time, so [N, V] is never held; and where W is sharded over processes, W
is not either: each process's rows visit all others in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import linear

from capo_rl.curvature.last_layer import LastLayer, blocks, compute_dtype, likeliest, logit_rows, on_support


@dataclass(frozen=True)
class Head:
    """Logits z = scale · (W h + b), before temperature.

    Weight and bias are plain, sharded by rows (FSDP2), or partitioned by DeepSpeed (ZeRO-3, where they are empty until
    they are gathered). A sharded head makes `last_layer` and `log_pi` collective. The projection runs in the weight's
    dtype, within `autocast`.
    """

    weight: Float[Tensor, "vocabulary d"]
    bias: Float[Tensor, "vocabulary"] | None = None
    scale: float = 1.0
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @torch.no_grad()
    def last_layer(
        self,
        hidden: Float[Tensor, "tokens d"],
        actions: Int[Tensor, "tokens"],
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> LastLayer:
        """`last_layer.last_layer` for the logits of `hidden`."""
        tokens = len(hidden)
        vocabulary = getattr(self.weight, "ds_shape", self.weight.shape)[0]  # DeepSpeed's partitioned weight is empty
        k = vocabulary if top_k is None else min(top_k, vocabulary)
        whole = k == vocabulary
        dtype = compute_dtype(self.weight.dtype)
        log_normaliser = torch.full((tokens,), -torch.inf, dtype=dtype, device=hidden.device)
        z_action = torch.zeros_like(log_normaliser)
        top = torch.full((tokens, k), -torch.inf, dtype=dtype, device=hidden.device)
        support = torch.zeros((tokens, k), dtype=torch.long, device=hidden.device)
        for some, first, z in self._logits(hidden, temperature):
            stop = first + z.shape[1]
            log_normaliser[some] = torch.logaddexp(log_normaliser[some], z.logsumexp(-1))
            here = (actions[some] >= first) & (actions[some] < stop)
            z_tile = z.gather(1, (actions[some] - first).clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
            z_action[some] = torch.where(here, z_tile, z_action[some])
            if whole:
                top[some, first:stop] = z
                continue
            best, at = likeliest(z, min(k, z.shape[1]))
            rows = at + first
            if z.shape[1] < vocabulary:  # the best of the tiles so far and of this one
                best, rows = torch.cat([top[some], best], dim=-1), torch.cat([support[some], rows], dim=-1)
                best, at = likeliest(best, k)
                rows = rows.gather(1, at)
            top[some], support[some] = best, rows
        if whole:
            support = torch.arange(vocabulary, device=hidden.device).expand(tokens, -1)
        return on_support(hidden, support, top, z_action, log_normaliser, actions, temperature, whole, top_p)

    @torch.no_grad()
    def log_pi(
        self, hidden: Float[Tensor, "tokens d"], rows: Int[Tensor, "tokens k"], temperature: float = 1.0
    ) -> Float[Tensor, "tokens k"]:
        """log π at some vocabulary rows of each token."""
        dtype = compute_dtype(self.weight.dtype)
        log_normaliser = torch.full((len(hidden),), -torch.inf, dtype=dtype, device=hidden.device)
        z_rows = torch.zeros(rows.shape, dtype=log_normaliser.dtype, device=hidden.device)
        for some, first, z in self._logits(hidden, temperature):
            log_normaliser[some] = torch.logaddexp(log_normaliser[some], z.logsumexp(-1))
            here = (rows[some] >= first) & (rows[some] < first + z.shape[1])
            z_tile = z.gather(1, (rows[some] - first).clamp(0, z.shape[1] - 1))
            z_rows[some] = torch.where(here, z_tile, z_rows[some])
        return z_rows - log_normaliser[:, None]

    def _logits(self, hidden: Tensor, temperature: float) -> Iterator[tuple[slice, int, Tensor]]:
        """The logits over T [n, v] of some tokens at some rows, with the tokens and the first of the rows."""
        for first, weight, bias in self._tiles():
            for some in blocks(len(hidden), logit_rows(len(weight), hidden.device)):
                with self.autocast():  # as the loss projects them
                    z = linear(hidden[some].to(weight.dtype), weight, bias).mul_(self.scale)
                yield some, first, z.to(compute_dtype(z.dtype)).div_(temperature)

    def _tiles(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The head's rows in parts, each with its first row."""
        weight, bias = self.weight, self.bias
        if isinstance(weight, DTensor):
            yield from _visiting(weight, bias)
        elif hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([each for each in (weight, bias) if each is not None]):
                yield 0, weight, bias
        else:
            yield 0, weight, bias


def _visiting(weight: DTensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Each process's rows of a sharded head, broadcast by it to all others."""
    mesh = weight.device_mesh
    if mesh.ndim > 1 or weight.placements != (Shard(0),):
        yield 0, weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else bias
        return
    group = mesh.get_group()
    bias = bias.full_tensor() if isinstance(bias, DTensor) else bias
    own = weight.to_local().detach()
    first = 0
    for rank, rows in enumerate(_shard_lengths(weight)):
        tile = own.contiguous() if rank == dist.get_rank(group) else own.new_empty(rows, weight.shape[1])
        dist.broadcast(tile, group_src=rank, group=group)
        yield first, tile, None if bias is None else bias[first : first + rows]
        first += rows


def _shard_lengths(weight: DTensor) -> list[int]:
    """How many rows each process has that has any: torch.chunk's split, which leaves the last ones short."""
    return [len(part) for part in torch.arange(weight.shape[0]).chunk(weight.device_mesh.size())]
