"""The model of the last layer: from hidden states and logits to (h, support, π, u) at each token.

Logits are z = W h / T, the policy is π = softmax(z), and for a sampled token a the score of W is u hᵀ with
u = (e_a − π) / T (Eq. 7, 33; the paper has T = 1). Everything the curvature model needs of a token is its hidden
state and these few numbers; W itself is never read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from capo_rl.curvature.processes import Processes

# Elements of the largest temporary: small enough for a CPU's cache, large enough to fill a GPU.
_TILE = {"cpu": 2**19}
_TILE_ELSEWHERE = 2**24

# On a CPU, up to so many rows of the vocabulary for each one wanted, numpy's quickselect takes less time than torch's
# search, whose time grows with k: at V = 500 and k = 50 a third.
_QUICKSELECT = 512

# With at most so many rows for each row of a support, a product of all rows with all tokens beats a gather for each
# entry: on a CPU one of the gather's costs about as much as 20 of the product's.
SHARED_ROWS = 16


def tile_elements(device: torch.device) -> int:
    """How many elements a temporary may have on `device`."""
    return _TILE.get(device.type, _TILE_ELSEWHERE)


def tile_rows(width: int, device: torch.device) -> int:
    """How many rows of `width` elements a temporary on `device` may have."""
    return max(1, tile_elements(device) // max(1, width))


def logit_rows(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits may exist at once on `device`.

    Working copies of a block (its float form, its exponentials) stay a small part of the input, and with a small
    vocabulary in the cache.
    """
    tile = tile_elements(device)
    return max(1, min(8 * tile // max(1, vocabulary), tile // 2048))


def tiles(tokens: int, k: int, d: int, budget: int) -> tuple[int, int]:
    """How many tokens and how many columns fit in [block, k, width] of `budget` elements."""
    width = max(1, min(d, budget // max(1, k)))
    return max(1, min(tokens, budget // max(1, k * width))), width


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LastLayer:
    """The last layer at N tokens, on the k vocabulary rows that carry probability there.

    hidden         h, the input of the output head
    support        vocabulary rows: the top k of π and the sampled token (Section 4.1), or all of them
    pi             π on the support
    u              (e_a − π) / T on the support
    missing_mass   1 − Σ_support π: the probability the support leaves out
    log_pi_a       log π(a)
    temperature    T
    sizes          how many entries each token's support has, where they differ: those first in its row, likeliest
                   before others; behind them stands the sampled row with π = u = 0, which adds nothing to any sum
    """

    hidden: Float[Tensor, "tokens d"]
    support: Int[Tensor, "tokens k"]
    pi: Float[Tensor, "tokens k"]
    u: Float[Tensor, "tokens k"]
    missing_mass: Float[Tensor, "tokens"]
    log_pi_a: Float[Tensor, "tokens"]
    temperature: float
    sizes: Int[Tensor, "tokens"] | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def entries(self) -> Bool[Tensor, "tokens k"] | None:
        """Which entries of the supports are more than filling; None: all."""
        if self.sizes is None:
            return None
        return torch.arange(self.support.shape[1], device=self.sizes.device) < self.sizes[:, None]

    def __getitem__(self, tokens: Bool[Tensor, "tokens"] | Int[Tensor, "some"]) -> LastLayer:
        """The same model at some of the tokens: a boolean mask or indices."""
        return LastLayer(
            self.hidden[tokens],
            self.support[tokens],
            self.pi[tokens],
            self.u[tokens],
            self.missing_mass[tokens],
            self.log_pi_a[tokens],
            self.temperature,
            None if self.sizes is None else self.sizes[tokens],
        )

    @staticmethod
    def cat(layers: list[LastLayer]) -> LastLayer:
        """The tokens of several models after one another. All share k, temperature, and whether sizes differ."""
        sizes = [layer.sizes for layer in layers if layer.sizes is not None]
        return LastLayer(
            torch.cat([layer.hidden for layer in layers]),
            torch.cat([layer.support for layer in layers]),
            torch.cat([layer.pi for layer in layers]),
            torch.cat([layer.u for layer in layers]),
            torch.cat([layer.missing_mass for layer in layers]),
            torch.cat([layer.log_pi_a for layer in layers]),
            layers[0].temperature,
            torch.cat(sizes) if sizes else None,
        )


def check_tokens(hidden: Tensor, actions: Tensor, advantages: Tensor, temperature: float) -> None:
    """Raises `ValueError` where the shapes or the temperature cannot be those of N tokens."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: flatten it to [N, d]")
    for name, tensor in (("actions", actions), ("advantages", advantages)):
        if tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; hidden has {len(hidden)} tokens: give [N]")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: the model differentiates the sampled softmax")


def logit_chunks(
    logits: Float[Tensor, "tokens vocabulary"] | Iterable[Tensor], tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """The logits a few rows at a time, each with the tokens it belongs to.

    A tensor is cut into blocks of bounded size; an iterable of tensors [n, V], whose rows follow one another,
    is taken as it comes, so that a caller who projects on the fly never holds [N, V].

    Raises `ValueError` if the rows do not add up to the number of tokens.
    """
    if isinstance(logits, Tensor):
        logits = logits.split(logit_rows(logits.shape[-1], logits.device))
    start = 0
    for chunk in logits:
        stop = start + len(chunk)
        if stop > tokens:
            raise ValueError(f"logits have more rows than there are tokens: {stop} for {tokens}")
        yield slice(start, stop), chunk
        start = stop
    if start != tokens:
        raise ValueError(f"logits have fewer rows than there are tokens: {start} for {tokens}")


def last_layer(
    hidden: Float[Tensor, "tokens d"],
    logits: Float[Tensor, "tokens vocabulary"],
    actions: Int[Tensor, "tokens"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> LastLayer:
    """The last layer at N tokens on its support: the `top_k` likeliest rows and the sampled one.

    The logits are those before temperature. With `top_k` None or at least V the support is the whole vocabulary.
    Otherwise it has k + 1 columns; where the sampled token is among the top k already, its second entry carries
    π = u = 0, which adds nothing to any sum.

    With `top_p` below 1 it is the fewest of those rows that have so much probability, and the sampled one:

    >>> z = torch.tensor([[0.1, 0.6, 0.3], [0.98, 0.01, 0.01]]).log()
    >>> layer = last_layer(torch.ones(2, 1), z, torch.tensor([0, 0]), top_p=0.6)
    >>> [rows[:size] for rows, size in zip(layer.support.tolist(), layer.sizes)]
    [[1, 0], [0]]
    """
    vocabulary = logits.shape[-1]
    z = logits.to(compute_dtype(logits.dtype)) / temperature
    k = vocabulary if top_k is None else min(top_k, vocabulary)
    whole = k == vocabulary
    if whole:
        top, support = z, torch.arange(vocabulary, device=z.device).expand(len(z), -1)
    else:
        top, support = likeliest(z, k)
    z_action = z.gather(1, actions[:, None]).squeeze(1)
    return on_support(hidden, support, top, z_action, z.logsumexp(-1), actions, temperature, whole, top_p)


@torch.no_grad()
def log_pi_of(
    logits: Float[Tensor, "tokens vocabulary"] | Iterable[Tensor],
    rows: Int[Tensor, "tokens k"],
    temperature: float = 1.0,
) -> Float[Tensor, "tokens k"]:
    """log π at some vocabulary rows of each token, from its logits.

    >>> log_pi_of(torch.zeros(1, 2), torch.tensor([[1]])).exp()
    tensor([[0.5000]])
    """
    parts = []
    for some, z in logit_chunks(logits, len(rows)):
        z = z.to(compute_dtype(z.dtype)) / temperature
        parts.append(z.gather(1, rows[some]) - z.logsumexp(-1, keepdim=True))
    return torch.cat(parts)


def likeliest(
    z: Float[Tensor, "tokens vocabulary"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """The k largest of each row of z and their columns, in no order; a NaN is larger than all.

    >>> likeliest(torch.tensor([[1.0, 3.0, 2.0]]), 1)
    (tensor([[3.]]), tensor([[1]]))
    """
    vocabulary = z.shape[-1]
    if z.device.type == "cpu" and k and vocabulary < _QUICKSELECT * k:
        ranked = np.argpartition(z.detach().numpy(), vocabulary - k, axis=-1)
        support = torch.from_numpy(ranked[:, vocabulary - k :].copy())
        return z.gather(-1, support), support
    top, support = z.topk(k, dim=-1, sorted=False)
    return top, support


def on_support(
    hidden: Float[Tensor, "tokens d"],
    support: Int[Tensor, "tokens k"],
    top: Float[Tensor, "tokens k"],
    z_action: Float[Tensor, "tokens"],
    log_normaliser: Float[Tensor, "tokens"],
    actions: Int[Tensor, "tokens"],
    temperature: float,
    whole: bool,
    top_p: float | None = None,
) -> LastLayer:
    """The last layer from the logits over T at the likeliest rows, at the action, and log Σ exp of them all.

    `support` and `top` are the k likeliest rows, or with `whole` all of them, and their logits. A `top_p` of 1 takes
    them all, whatever they sum to when rounded.
    """
    sizes = None
    top_p = None if top_p == 1 else top_p
    if top_p is not None:
        top, order = top.sort(dim=-1, descending=True)
        support = support.gather(1, order)
    pi = (top - log_normaliser[:, None]).exp_()
    is_action = support == actions[:, None]
    if top_p is not None:
        # Not `<`: a token with a NaN keeps every row, and with them the NaN.
        kept = ~(pi.cumsum(-1) - pi >= top_p)
        is_action &= kept
        last = kept.sum(-1, keepdim=True)
        outside = ~is_action.any(-1, keepdim=True)
        pi_action = (z_action - log_normaliser).exp_()[:, None].where(outside, 0)
        support = torch.cat([support.where(kept, actions[:, None]), actions[:, None]], dim=-1)
        pi = functional.pad(pi.where(kept, 0), (0, 1)).scatter_(1, last, pi_action)
        is_action = functional.pad(is_action, (0, 1)).scatter_(1, last, outside)
        sizes = (last + outside).squeeze(1)
        missing_mass = (1 - pi.sum(-1)).clamp(min=0)
    elif whole:
        # Over the whole vocabulary what is left is rounding, not missing mass.
        missing_mass = pi.new_zeros(len(pi))
    else:
        repeated = is_action.any(-1, keepdim=True)
        pi_action = (z_action - log_normaliser).exp_()[:, None].where(~repeated, 0)
        support = torch.cat([support, actions[:, None]], dim=-1)
        pi = torch.cat([pi, pi_action], dim=-1)
        is_action = torch.cat([is_action, ~repeated], dim=-1)
        missing_mass = (1 - pi.sum(-1)).clamp(min=0)
    # 1 − π_a as the mass of all others: for a token that is almost certain the difference would be all rounding.
    others = pi.where(~is_action, 0).sum(-1) + missing_mass
    return LastLayer(
        hidden=hidden,
        support=support,
        pi=pi,
        u=torch.where(is_action, others[:, None], -pi) / temperature,
        missing_mass=missing_mass,
        log_pi_a=z_action - log_normaliser,
        temperature=temperature,
        sizes=sizes,
    )


@dataclass(frozen=True)
class SupportRows:
    """Which vocabulary rows the tokens of each subset support: one sort, shared by every gradient over these tokens.

    rows          the vocabulary row of each (subset, row) pair that some token of the subset supports
    pair          which pair a token's support entry belongs to; 0 for one that only fills
    order         the support entries sorted by pair, and start, where each pair begins among them
    processes     whose tokens these are: this one's own (None), or its share of those of several
    """

    rows: Int[Tensor, "pairs"]
    pair: Int[Tensor, "tokens k"]
    order: Int[Tensor, "entries"]
    start: Int[Tensor, "pairs+1"]
    processes: Processes | None = None

    def over(self, processes: Processes) -> SupportRows:
        """The rows of one subset of tokens that is spread over several processes; those of others have no entry here.

        Collective, and so is every `RowGradient.part` on what it returns.
        """
        if processes.count == 1:
            return self
        rows = processes.union(self.rows)
        at = torch.searchsorted(rows, self.rows)
        counts = self.start.new_zeros(len(rows)).index_copy_(0, at, self.start.diff())
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SupportRows(rows, at[self.pair], self.order, start, processes)


def support_rows(layer: LastLayer, subsets: Int[Tensor, "tokens"] | None = None) -> SupportRows:
    """The rows of each subset of tokens; `subsets` holds each token's subset number, None means one of all tokens."""
    key = layer.support
    vocabulary = 0
    if subsets is not None and key.numel():
        vocabulary = int(key.max()) + 1
        key = key + vocabulary * subsets[:, None]
    key = key.flatten()
    if layer.entries is None:
        ascending, order = _sorted(key)
    else:
        entries = layer.entries.flatten().nonzero().squeeze(1)
        ascending, order = _sorted(key[entries])
        order = entries[order]
    pairs, inverse, counts = torch.unique_consecutive(ascending, return_inverse=True, return_counts=True)
    pair = torch.zeros_like(key).scatter_(0, order, inverse).view_as(layer.support)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SupportRows(pairs % vocabulary if vocabulary else pairs, pair, order, start)


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of 0 or more [N], ascending, and where each was; equal ones keep their order."""
    if keys.device.type == "cpu" and keys.numel() and int(keys.max()) < 2**16:
        # Numpy sorts 16 bits by their digits, in a third of the time that torch takes.
        order = torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), kind="stable"))
        return keys[order], order
    return keys.sort(stable=True)


@dataclass(frozen=True)
class RowGradient:
    """A last-layer gradient for each subset of tokens, Σ_i w_i u_i h_iᵀ, by vocabulary row and a few rows at a time.

    rows             the vocabulary row of each pair of `SupportRows`
    start            where each pair begins among the entries
    tokens           the token i of each entry, and values, its w_i u_ij
    hidden           h of each token
    processes        over which the sum over i runs; None for this one alone
    """

    rows: Int[Tensor, "pairs"]
    start: Int[Tensor, "pairs+1"]
    tokens: Int[Tensor, "entries"]
    values: Float[Tensor, "entries"]
    hidden: Float[Tensor, "tokens d"]
    processes: Processes | None = None

    def part(self, pairs: slice) -> Float[Tensor, "some d"]:
        """The gradient at some of the pairs."""
        own = self._own(pairs)
        return own if self.processes is None else self.processes.total(own)

    def _own(self, pairs: slice) -> Tensor:
        start = self.start[pairs.start : pairs.stop + 1]
        entries = slice(int(start[0]), int(start[-1]))
        # A bag of tokens for each row: on a CPU several times as fast as a product with a sparse matrix.
        return functional.embedding_bag(
            self.tokens[entries],
            self.hidden.to(self.values.dtype),
            start - start[0],
            mode="sum",
            per_sample_weights=self.values[entries],
            include_last_offset=True,
        )


def row_gradient(layer: LastLayer, weights: Float[Tensor, "tokens"], rows: SupportRows | None = None) -> RowGradient:
    """Σ_i w_i u_i h_iᵀ over the tokens of each subset (Eq. 7 with w = A / |b|), in sparse form.

    `rows`: the subsets' rows, by default those of one subset of all tokens. The dense gradient has V·d
    entries a subset; this keeps the E ≤ N·k weights and lets the caller take a few rows.
    """
    rows = support_rows(layer) if rows is None else rows
    values = (weights.to(layer.u.dtype)[:, None] * layer.u).flatten()[rows.order]
    tokens = rows.order // max(1, layer.support.shape[1])
    return RowGradient(rows.rows, rows.start, tokens, values, layer.hidden, rows.processes)


def blocks(length: int, size: int, first: int = 0) -> Iterator[slice]:
    """The numbers from `first` to `length` in slices of at most `size`."""
    for start in range(first, length, size):
        yield slice(start, min(start + size, length))
