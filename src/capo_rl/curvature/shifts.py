"""What a planned step would do: the objective shift m_H and the policy shift m_F (Eq. 10, 58, 63).

A step ΔW = U changes the logits of a token by v = U h (times 1/T). With u = (e_a − π)/T and F = (diag π − ππᵀ)/T²,

    s = uᵀ v       the first-order change of log π(a)
    c = vᵀ F v     the variance of v under π, over T²; ½c is the predicted KL at that state

and for a token with advantage A

    m_F = ½ s²                    the paper's estimator, with the sampled-action Fisher (Eq. 58)
    m_F = ½ c                     the same with the expectation over actions taken exactly
    m_H = A (s + ½ (s² − c))      Eq. 10 with Eq. 63, since gᵀΔψ = A s for the token's own gradient

For a subset b of tokens g is their mean (Eq. 7), there is one U, and m_F and m_H are the means of the same
expressions over b, because gᵀΔψ = mean_b A s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capo_rl.curvature.kernels import uses_triton
from capo_rl.curvature.kernels.adam_shifts import adam_shifts
from capo_rl.curvature.last_layer import (
    SHARED_ROWS,
    LastLayer,
    SupportRows,
    blocks,
    check_tokens,
    compute_dtype,
    last_layer,
    logit_chunks,
    row_gradient,
    support_rows,
    tile_rows,
)
from capo_rl.curvature.step import AdamStep, SGDStep

FISHERS = ("sampled", "expected")


@dataclass(frozen=True)
class Shifts:
    """Predicted shifts, one entry for each token, or for each subset (then s and c are means over it).

    m_h            objective shift m_H (Eq. 10), in units of the objective
    m_f            policy shift m_F (Eq. 10), in nats
    s              first-order change of log π(a), in nats
    c              vᵀFv, in nats; ½c is the predicted KL
    missing_mass   probability outside the support
    """

    m_h: Float[Tensor, "entries"]
    m_f: Float[Tensor, "entries"]
    s: Float[Tensor, "entries"]
    c: Float[Tensor, "entries"]
    missing_mass: Float[Tensor, "entries"]

    @property
    def nonfinite(self) -> Bool[Tensor, "entries"]:
        """Where m_H or m_F is NaN or infinite: such a token is never kept."""
        return ~(self.m_h.isfinite() & self.m_f.isfinite())

    def __getitem__(self, which: Bool[Tensor, "entries"] | Int[Tensor, "some"]) -> Shifts:
        """The shifts at some entries: a boolean mask or indices."""
        return Shifts(*(getattr(self, field.name)[which] for field in fields(self)))

    @staticmethod
    def cat(parts: list[Shifts]) -> Shifts:
        """The entries of several `Shifts` after one another."""
        return Shifts(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Shifts)))


def token_shifts(
    hidden: Float[Tensor, "tokens d"],
    logits: Float[Tensor, "tokens vocabulary"] | Iterable[Tensor],
    actions: Int[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    step: SGDStep | AdamStep,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    fisher: str = "sampled",
) -> Shifts:
    """m_H and m_F of the step each token would take alone: its own gradient g = A u hᵀ, N = 1 in Eq. 58 and 63.

    The logits are those before temperature, or an iterable of [n, V] chunks in the order of the tokens. `top_k=None`
    takes the whole vocabulary. With `SGDStep` and no `top_k` the closed form of `sgd_token_shifts` is used. No tensor
    of N·k·d or N·V·d elements is built.

    Raises `ValueError` for shapes that do not fit and for an unknown `fisher`.

    >>> h, z = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    >>> shifts = token_shifts(h, z, torch.tensor([0]), torch.tensor([1.0]), SGDStep(lr=0.1))
    >>> shifts.s                      # α A ‖h‖² ‖u‖² = 0.1 · 5 · ½
    tensor([0.2500])
    """
    check_tokens(hidden, actions, advantages, temperature)
    _check_fisher(fisher)
    parts = []
    for tokens, chunk in logit_chunks(logits, len(hidden)):
        if isinstance(step, SGDStep) and (top_k is None or top_k >= chunk.shape[-1]):
            shifts = sgd_token_shifts(
                hidden[tokens], chunk, actions[tokens], advantages[tokens], step.lr, temperature, fisher
            )
        else:
            layer = last_layer(hidden[tokens], chunk, actions[tokens], temperature=temperature, top_k=top_k)
            shifts = token_shifts_of(layer, advantages[tokens], step, fisher)
        parts.append(shifts)
    return Shifts.cat(parts) if parts else _no_shifts(hidden)


def token_shifts_of(
    layer: LastLayer, advantages: Float[Tensor, "tokens"], step: SGDStep | AdamStep, fisher: str = "sampled"
) -> Shifts:
    """`token_shifts` for a last layer that is already at hand."""
    if isinstance(step, AdamStep) and uses_triton(layer.hidden) and layer.u.dtype == torch.float32:
        s, variance = adam_shifts(
            advantages,
            layer.u,
            layer.pi,
            layer.missing_mass,
            layer.hidden,
            step.slots(layer.support),
            *step.storage(layer.hidden.shape[1], layer.u),
            step.planned,
            layer.sizes,
        )
        return _token_shifts(s, variance / layer.temperature**2, advantages.to(s.dtype), layer.missing_mass, fisher)
    return shifts_along(token_direction(layer, advantages, step), layer, advantages, fisher)


def subset_shifts(
    hidden: Float[Tensor, "tokens d"],
    logits: Float[Tensor, "tokens vocabulary"] | Iterable[Tensor],
    actions: Int[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    step: SGDStep | AdamStep,
    subsets: Int[Tensor, "tokens"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    fisher: str = "sampled",
) -> Shifts:
    """m_H and m_F of the step each subset of tokens would take: g is the mean over its tokens (Eq. 7, Algorithm 1).

    Arguments as for `token_shifts`; `subsets` holds each token's subset number in 0..B−1: sequences, groups, or
    all zero for the whole batch. Returns one entry for each subset; a number that no token has gives NaN.

    Raises `ValueError` as `token_shifts` does, and for negative subset numbers.
    """
    check_tokens(hidden, actions, advantages, temperature)
    _check_fisher(fisher)
    layers = [
        last_layer(hidden[tokens], chunk, actions[tokens], temperature=temperature, top_k=top_k)
        for tokens, chunk in logit_chunks(logits, len(hidden))
    ]
    return subset_shifts_of(LastLayer.cat(layers), advantages, step, subsets, fisher) if layers else _no_shifts(hidden)


def subset_shifts_of(
    layer: LastLayer,
    advantages: Float[Tensor, "tokens"],
    step: SGDStep | AdamStep,
    subsets: Int[Tensor, "tokens"],
    fisher: str = "sampled",
) -> Shifts:
    """`subset_shifts` for a last layer that is already at hand."""
    if subsets.shape != advantages.shape or (len(subsets) and int(subsets.min()) < 0):
        raise ValueError("subsets must hold a number of 0 or more for each token")
    advantages = advantages.to(layer.u.dtype)
    count = torch.bincount(subsets).to(advantages.dtype)
    v = subset_direction(layer, advantages / count[subsets], step, support_rows(layer, subsets))
    tokens = shifts_along(v, layer, advantages, fisher)

    def mean(values: Tensor) -> Tensor:
        return torch.zeros_like(count).index_add_(0, subsets, values) / count

    return Shifts(*(mean(getattr(tokens, field.name)) for field in fields(Shifts)))


def token_direction(
    layer: LastLayer, advantages: Float[Tensor, "tokens"], step: SGDStep | AdamStep
) -> Float[Tensor, "tokens k"]:
    """v = U h on the support, for the step U that each token alone would take."""
    score = advantages.to(layer.u.dtype)[:, None] * layer.u  # g = score hᵀ
    return step.direction(score, layer.hidden, layer.support, layer.sizes)


def subset_direction(
    layer: LastLayer,
    weights: Float[Tensor, "*steps tokens"],
    step: SGDStep | AdamStep,
    rows: SupportRows | None = None,
) -> Float[Tensor, "*steps tokens k"]:
    """v = U h on the support, for the step U of the gradient Σ w_i u_i h_iᵀ of each token's subset.

    As weights A / |b| gives Eq. 7; the loss's own weights give the update that the optimizer is about to make.
    Several sets of weights give a v each, for little more than one of them costs.
    `rows`: the subsets' rows, by default those of one subset of all tokens.
    """
    rows = support_rows(layer) if rows is None else rows
    gradients = [row_gradient(layer, each, rows) for each in (weights if weights.dim() == 2 else weights[None])]
    # A tile is the step of some pairs: whole rows, which are read fastest. Its size is the same in every process, which
    # reduce their gradients a tile at a time.
    size = tile_rows(layer.hidden.shape[1], layer.u.device)

    def planned(pairs: slice) -> list[Tensor]:
        some = rows.rows[pairs]
        here = step if rows.processes is None else step.at(some, alike=True)
        return [here.plan(gradient.part(pairs), some) for gradient in gradients]

    tiles = ((pairs, planned(pairs)) for pairs in blocks(len(rows.rows), size))
    shared = len(rows.rows) * len(layer) <= SHARED_ROWS * len(rows.order)
    v = layer.u.new_zeros(len(gradients), *layer.support.shape)
    (_multiply_all if shared else _multiply_own)(v, layer.hidden, rows, tiles)
    if layer.entries is not None:
        v = v.where(layer.entries, 0)  # what fills belongs to no row, and an overflow of another's is not its own
    return v.view(*weights.shape[:-1], *layer.support.shape)


def _multiply_all(v: Tensor, hidden: Tensor, rows: SupportRows, tiles: Iterable[tuple[slice, list[Tensor]]]) -> None:
    """Fill v [M, N, k] with U h, for each of M steps U: all rows with all tokens, of which each takes its own."""
    planned = [step_rows for _, step_rows in tiles]
    for m in range(len(v) if planned else 0):
        step_rows = torch.cat([tile[m] for tile in planned])
        for some in blocks(len(hidden), tile_rows(len(step_rows), v.device)):
            v[m, some] = (hidden[some].to(step_rows.dtype) @ step_rows.T).gather(1, rows.pair[some]).to(v.dtype)


def _multiply_own(v: Tensor, hidden: Tensor, rows: SupportRows, tiles: Iterable[tuple[slice, list[Tensor]]]) -> None:
    """Fill v [M, N, k] with U h, for each of M steps U: every token with its own rows, a tile of entries at a time."""
    k = v.shape[2]
    flat, pair = v.view(len(v), -1), rows.pair.flatten()
    size = tile_rows(hidden.shape[1], v.device)
    for pairs, planned in tiles:
        for some in blocks(int(rows.start[pairs.stop]), size, int(rows.start[pairs.start])):
            entries = rows.order[some]
            at = pair[entries] - pairs.start
            h = hidden.index_select(0, entries // k).to(v.dtype)
            for m, step_rows in enumerate(planned):
                flat[m, entries] = step_rows.index_select(0, at).mul_(h).sum(-1).to(v.dtype)


def shifts_along(
    v: Float[Tensor, "tokens k"], layer: LastLayer, advantages: Float[Tensor, "tokens"], fisher: str = "sampled"
) -> Shifts:
    """The shifts of each token along a step that changes its logits on the support by v."""
    advantages = advantages.to(v.dtype)
    mean = (layer.pi * v).sum(-1)
    # Σπv² − (Σπv)² without its cancellation; the second term is the share of the rows outside the support, where
    # v counts as zero.
    variance = (layer.pi * (v - mean[:, None]).square()).sum(-1) + layer.missing_mass * mean.square()
    return _token_shifts(
        s=(layer.u * v).sum(-1),
        c=variance / layer.temperature**2,
        advantages=advantages,
        missing_mass=layer.missing_mass,
        fisher=fisher,
    )


def sgd_token_shifts(
    hidden: Float[Tensor, "tokens d"],
    logits: Float[Tensor, "tokens vocabulary"],
    actions: Int[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    lr: float,
    temperature: float = 1.0,
    fisher: str = "sampled",
) -> Shifts:
    """Token shifts of an SGD step over the whole vocabulary, from four scalars a token: 1−π_a, Σπ², Σπ³ and ‖h‖².

    U = α A u hᵀ, so v = α A ‖h‖² u, s = α A ‖h‖² ‖u‖² and c = (α A ‖h‖²)² uᵀFu. With the sampled token taken out of
    the sums, q = 1 − π_a, σ₂ = Σ_{j≠a} π², σ₃ = Σ_{j≠a} π³ and at T = 1

        ‖u‖² = q² + σ₂        uᵀFu = π_a q³ + 2 π_a q σ₂ + σ₃ − σ₂²

    which has none of the cancellation of 1 − 2π_a + Σπ² near π_a = 1.
    """
    z = logits.to(compute_dtype(logits.dtype)) / temperature
    pi = z.softmax(-1)
    pi_a = pi.gather(1, actions[:, None]).squeeze(1)
    others = pi.scatter(1, actions[:, None], 0.0)
    q = others.sum(-1)
    sigma2 = others.square().sum(-1)
    sigma3 = others.pow(3).sum(-1)
    norm2 = q.square() + sigma2
    quadratic = pi_a * q**3 + 2 * pi_a * q * sigma2 + sigma3 - sigma2.square()
    advantages = advantages.to(z.dtype)
    scale = lr * advantages * hidden.to(z.dtype).square().sum(-1)
    return _token_shifts(
        s=scale * norm2 / temperature**2,
        c=scale.square() * quadratic / temperature**4,
        advantages=advantages,
        missing_mass=torch.zeros_like(scale),
        fisher=fisher,
    )


def _token_shifts(s: Tensor, c: Tensor, advantages: Tensor, missing_mass: Tensor, fisher: str) -> Shifts:
    return Shifts(
        m_h=advantages * (s + 0.5 * (s.square() - c)),
        m_f=0.5 * (s.square() if fisher == "sampled" else c),
        s=s,
        c=c,
        missing_mass=missing_mass,
    )


def _check_fisher(fisher: str) -> None:
    if fisher not in FISHERS:
        raise ValueError(f"fisher={fisher!r} is not one of {', '.join(FISHERS)}")


def _no_shifts(hidden: Tensor) -> Shifts:
    empty = hidden.new_zeros(0, dtype=compute_dtype(hidden.dtype))
    return Shifts(empty, empty, empty, empty, empty)
