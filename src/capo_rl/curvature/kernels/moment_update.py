"""Adam's moments after one step: the last layer's sparse gradient, and P and Q moved along it.

    g = Σ_i w_i u_i h_iᵀ (Eq. 7)      P ← β₁ P + (1−β₁) g      Q ← β₂ Q + (1−β₂) g²

Rows without a gradient decay. Every sum runs in one fixed order, so the same tokens give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_rl.curvature.kernels import jit, tl, triton
from capo_rl.curvature.last_layer import RowGradient, blocks, tile_rows

# A Triton program's tile: tokens that are summed at a time, columns of their row, and the warps that share it (at most,
# and powers of two). Of nine the fastest on an H200 at two sizes of three (results/gpu/kernels.json).
ENTRIES, COLUMNS, WARPS = 64, 64, 4


@torch.no_grad()
def update_moments(
    p: Tensor, q: Tensor, slots: Tensor, gradient: RowGradient, scale: float, betas: tuple[float, float], seed: int
) -> None:
    """Move p and q [R, d] in place, a few rows at a time.

    slots [P]: where the moments of the gradient's rows are, -1 where another process has them; `scale` multiplies the
    gradient. Moments in bfloat16 are rounded at random with `seed`.
    """
    size = tile_rows(p.shape[1], p.device)
    chance = torch.Generator(p.device).manual_seed(seed)
    dtype = torch.promote_types(p.dtype, gradient.values.dtype)
    for moment, beta in ((p, betas[0]), (q, betas[1])):
        for part in moment.split(size):
            if moment.dtype == dtype:
                part.mul_(beta)
            else:
                part.copy_(_stored(part.to(dtype) * beta, moment.dtype, chance))
    for pairs in blocks(len(slots), size):
        g, at = gradient.part(pairs).mul_(scale), slots[pairs]
        if (at < 0).any():
            g, at = g[at >= 0], at[at >= 0]
        for moment, rest, change in ((p, 1 - betas[0], g), (q, 1 - betas[1], g.square())):
            new = moment.index_select(0, at).to(dtype).add_(change, alpha=rest)
            moment.index_copy_(0, at, _stored(new, moment.dtype, chance))


def fused_update_moments(
    p: Tensor,
    q: Tensor,
    slots: Tensor,
    gradient: RowGradient,
    scale: float,
    betas: tuple[float, float],
    tile: tuple[int, int, int] = (ENTRIES, COLUMNS, WARPS),
) -> None:
    """`update_moments` by Triton, for moments in float32: gradient, decay and update in one pass over P and Q.

    `tile`: `ENTRIES`, `COLUMNS` and `WARPS` of a program.
    """
    entries, columns, warps = tile
    stored, d = p.shape
    pair = torch.full((stored,), -1, dtype=torch.long, device=p.device)
    pair[slots] = torch.arange(len(slots), device=p.device)
    columns = min(columns, triton.next_power_of_2(d))
    _update_moments[(stored, triton.cdiv(d, columns))](
        p,
        q,
        pair,
        gradient.start,
        gradient.tokens,
        gradient.values,
        gradient.hidden.contiguous(),
        d,
        scale,
        betas[0],
        1 - betas[0],
        betas[1],
        1 - betas[1],
        ENTRIES=entries,
        COLUMNS=columns,
        num_warps=warps,
    )


@jit
def _update_moments(
    p,
    q,
    pair,
    starts,
    tokens,
    weights,
    hidden,
    d,
    scale,
    beta1,
    rest1,
    beta2,
    rest2,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A stored row and COLUMNS of it a program: the row's tokens are summed ENTRIES at a time, in order."""
    slot = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(pair + slot)
    touched = row >= 0
    start = tl.load(starts + row, mask=touched, other=0)
    stop = tl.load(starts + row + 1, mask=touched, other=0)
    g = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        token = tl.load(tokens + entry, mask=entry < stop, other=0)
        weight = tl.load(weights + entry, mask=entry < stop, other=0.0).to(tl.float32)
        inside = (entry < stop)[:, None] & (column < d)[None, :]
        h = tl.load(hidden + token[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
        g += tl.sum(weight[:, None] * h, axis=0)
    g *= scale
    at = slot * d + column
    tl.store(p + at, beta1 * tl.load(p + at, mask=column < d, other=0.0) + rest1 * g, mask=column < d)
    tl.store(q + at, beta2 * tl.load(q + at, mask=column < d, other=0.0) + rest2 * g * g, mask=column < d)


def _stored(values: Tensor, dtype: torch.dtype, chance: torch.Generator) -> Tensor:
    """The values in `dtype`; in bfloat16 rounded up or down at random such that the mean is right.

    To the nearest, Q would never decay: 1 − β₂ is less than half of what bfloat16 can tell apart.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.to(torch.float32).view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=chance)
    return bits.add_(noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)
