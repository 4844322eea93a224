"""The shifts of the Adam step that each token alone would take: N·k·d square roots, the heaviest loop of CAPO.

A token with advantage A has the gradient g = A u hᵀ on its support. With the moments P and Q of a row so far,

    p = β₁ P + (1−β₁) g      q = β₂ Q + (1−β₂) g²      v = U h = α Σ_l h_l p_l / (√q_l + ε)

and s = uᵀv, c = Var_π(v) (Eq. 58, 63). In float32 each v differs from its exact value by at most

    E = (d + 16) 2⁻²⁴ α Σ_l |h_l| (β₁|P_l| + (1−β₁)|g_l|) / (√q_l + ε) + 2⁻¹²⁶ α Σ_l |h_l| / ε

where |A u| and |g| are below 1e19, so that squares are finite, and ε ≥ 1e-12, beside which a square that underflows is
nothing. Inputs in bfloat16 or float16 are taken as exact, and every sum is in float32.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from capo_rl.curvature.kernels import jit, tl, triton
from capo_rl.curvature.last_layer import compute_dtype, tile_elements, tiles

# A Triton program's tile: rows of a token's support, columns of them, and the warps that share it (at most, and powers
# of two). Of fourteen the fastest on an H200, or within 2 % of it, at three sizes (results/gpu/kernels.json).
ROWS, COLUMNS, WARPS = 16, 64, 4

# A tile of supports of different sizes, in the plain form: the least share of its largest support that another should
# have, and the part of a whole tile below which it takes smaller ones all the same.
ALIKE, SMALLEST = 0.85, 16


@dataclass(frozen=True)
class Adam:
    """U = α p / (√q + ε), the corrections for the moments' bias folded into α and ε."""

    lr: float
    beta1: float
    beta2: float
    eps: float


def square_root(q: Tensor) -> Tensor:
    """√q, in place of q: in two roundings, because torch's one takes a denormal number thirty times as long on a CPU.

    >>> square_root(torch.tensor([0.0, 4.0, float("inf")]))
    tensor([0., 2., inf])
    """
    return q.rsqrt_().reciprocal_()


@torch.no_grad()
def adam_direction(
    score: Tensor, hidden: Tensor, slots: Tensor, p: Tensor, q: Tensor, adam: Adam, sizes: Tensor | None = None
) -> Tensor:
    """v = U h [N, k] for each token's own gradient g = score hᵀ, a tile at a time.

    score [N, k], A u; hidden [N, d]; slots [N, k], where in p and q [R, d] the moments of the support's rows are.
    With `sizes` [N] only so many of the first entries of each token count, and v is left open at the others.
    """
    tokens, k = score.shape
    d = hidden.shape[1]
    dtype = torch.promote_types(score.dtype, p.dtype)
    if not adam.beta1:
        p = torch.zeros_like(p)
    if not adam.beta2:
        q = torch.zeros_like(q)
    # v = α β₁/√β₂ Σ h (P + a h) / (√(Q + b h²) + ε/√β₂): β times a tile would be one pass more for each moment.
    beta1, root_beta2 = adam.beta1 or 1.0, (adam.beta2 or 1.0) ** 0.5
    a = score.to(dtype) * ((1 - adam.beta1) / beta1)
    b = score.to(dtype).square() * ((1 - adam.beta2) / root_beta2**2)
    v = torch.zeros_like(a)
    budget = tile_elements(v.device)
    room = v.new_empty(2, min(max(budget, k), tokens * k * d))
    for some, rows in _parts(tokens, k, d, budget) if sizes is None else _parts_alike(sizes, d, budget):
        part_slots, part_a, part_b = slots[some, :rows], a[some, :rows, None], b[some, :rows, None]
        width = tiles(len(part_a), rows, d, budget)[1]
        for start in range(0, d, width):
            dims = slice(start, start + width)
            h = hidden[some, None, dims].to(dtype)
            tile_p = _gather(p[:, dims], part_slots, room[0])
            tile_q = _gather(q[:, dims], part_slots, room[1])
            root = square_root(tile_q.addcmul_(part_b, h.square())).add_(adam.eps / root_beta2)
            # A batched product of matrix and vector takes several times as long as this product and sum.
            v[some, :rows] += tile_p.addcmul_(part_a, h).div_(root).mul_(h).sum(-1)
    return v.mul_(adam.lr * beta1 / root_beta2).to(score.dtype)


def _parts(tokens: int, k: int, d: int, budget: int) -> Iterator[tuple[slice, int]]:
    """The tokens of each tile, and how many of their support's entries: all k."""
    block = tiles(tokens, k, d, budget)[0]
    for first in range(0, tokens, block):
        yield slice(first, first + block), k


def _parts_alike(sizes: Tensor, d: int, budget: int) -> Iterator[tuple[Tensor, int]]:
    """The tokens of each tile, and how many of their support's entries, for supports of different `sizes` [N].

    A tile has the tokens next in size, and ends where they get much smaller than its largest unless it is small still.
    """
    descending, order = sizes.sort(descending=True, stable=True)
    ascending = descending.neg().tolist()
    first = 0
    while first < len(order):
        rows = -ascending[first]
        block = tiles(len(order) - first, rows, d, budget)[0]
        alike = bisect_right(ascending, -ALIKE * rows) - first
        some = order[first : first + min(block, max(alike, block // SMALLEST, 1))]
        yield some, rows
        first += len(some)


def momentum_direction(hidden: Tensor, slots: Tensor, p: Tensor, q: Tensor, adam: Adam) -> Tensor:
    """v = U h [N, k] for tokens without a gradient, as without an advantage: they share the step U, and are multiplied
    with all R rows of it. hidden [N, d], slots [N, k], p and q [R, d].
    """
    dtype = torch.promote_types(p.dtype, compute_dtype(hidden.dtype))
    step = (adam.lr * adam.beta1 * p.to(dtype)).div_(square_root(adam.beta2 * q.to(dtype)).add_(adam.eps))
    return (hidden.to(dtype) @ step.T).gather(1, slots)


def adam_shifts(
    advantages: Tensor,
    u: Tensor,
    pi: Tensor,
    missing_mass: Tensor,
    hidden: Tensor,
    slots: Tensor,
    p: Tensor,
    q: Tensor,
    adam: Adam,
    sizes: Tensor | None = None,
    tile: tuple[int, int, int] = (ROWS, COLUMNS, WARPS),
) -> tuple[Tensor, Tensor]:
    """s and Var_π(v), two [N] tensors in float32, by Triton: what `adam_direction` and `shifts_along` come to.

    advantages [N]; u, pi and slots [N, k]; missing_mass [N], the rest of π, where v counts as 0. Writes only [N].
    sizes [N]: how many of the first entries of each token count; None: all.
    `tile`: `ROWS`, `COLUMNS` and `WARPS` of a program.
    """
    tokens, k = u.shape
    s = torch.empty(tokens, dtype=torch.float32, device=u.device)
    c = torch.empty_like(s)
    rows, columns, warps = tile
    if tokens:
        _adam_shifts[(tokens,)](
            *(tensor.contiguous() for tensor in (advantages, u, pi, missing_mass, hidden, slots, p, q)),
            u if sizes is None else sizes.contiguous(),
            s,
            c,
            k,
            hidden.shape[1],
            adam.lr,
            adam.beta1,
            1 - adam.beta1,
            adam.beta2,
            1 - adam.beta2,
            adam.eps,
            RAGGED=sizes is not None,
            ROWS=min(rows, triton.next_power_of_2(k)),
            COLUMNS=min(columns, triton.next_power_of_2(hidden.shape[1])),
            num_warps=warps,
        )
    return s, c


@jit
def _adam_shifts(
    advantages,
    u,
    pi,
    missing_mass,
    hidden,
    slots,
    p,
    q,
    sizes,
    s_out,
    c_out,
    k,
    d,
    lr,
    beta1,
    rest1,  # 1 − β₁, from the host: in float32 the difference 1 − 0.999 has lost three digits
    beta2,
    rest2,
    eps,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token a program: ROWS of its support at a time, each over all columns."""
    token = tl.program_id(0).to(tl.int64)
    advantage = tl.load(advantages + token).to(tl.float32)
    s = 0.0
    # The variance by Chan's merge of parts. The first part is what lies outside the support: one outcome with v = 0.
    mass = tl.load(missing_mass + token).to(tl.float32)
    mean = 0.0
    spread = 0.0
    size = tl.load(sizes + token) if RAGGED else k
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        entry = token * k + row
        u_row = tl.load(u + entry, mask=row < size, other=0.0).to(tl.float32)
        pi_row = tl.load(pi + entry, mask=row < size, other=0.0).to(tl.float32)
        base = tl.load(slots + entry, mask=row < size, other=0).to(tl.int64) * d
        score = advantage * u_row
        v = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            h = tl.load(hidden + token * d + column, mask=column < d, other=0.0).to(tl.float32)
            at = base[:, None] + column[None, :]
            inside = (row < size)[:, None] & (column < d)[None, :]
            g = score[:, None] * h[None, :]
            p_new = beta1 * tl.load(p + at, mask=inside, other=0.0).to(tl.float32) + rest1 * g
            q_new = beta2 * tl.load(q + at, mask=inside, other=0.0).to(tl.float32) + rest2 * g * g
            v += tl.sum(p_new / (tl.sqrt(q_new) + eps) * h[None, :], axis=1)
        v *= lr
        s += tl.sum(u_row * v)
        part = tl.sum(pi_row)
        part_mean = tl.sum(pi_row * v) / tl.where(part > 0, part, 1.0)
        share = part / tl.where(mass + part > 0, mass + part, 1.0)
        apart = part_mean - mean
        spread += tl.sum(pi_row * (v - part_mean) * (v - part_mean)) + apart * apart * mass * share
        mean += apart * share
        mass += part
    tl.store(s_out + token, s)
    tl.store(c_out + token, spread)


def _gather(moments: Tensor, slots: Tensor, room: Tensor) -> Tensor:
    """The moments' rows at `slots` [n, k] in a part of `room`, [n, k, width]."""
    shape = (*slots.shape, moments.shape[1])
    rows = room[: slots.numel() * shape[-1]].view(-1, shape[-1])
    if moments.dtype == room.dtype:
        torch.index_select(moments, 0, slots.reshape(-1), out=rows)
    else:
        rows.copy_(moments.index_select(0, slots.reshape(-1)))
    return rows.view(shape)
