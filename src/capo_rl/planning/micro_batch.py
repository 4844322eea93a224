"""The tokens of one forward pass: their verdicts, and the weights they have in its loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capo_rl.curvature.last_layer import LastLayer, SupportRows, support_rows
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import accepted_mean
from capo_rl.curvature.shifts import Shifts

# Mean |difference| of log π(a) between what hidden states and head give and the loss's own, above which they are not
# the same thing: in single precision, and where half precision may round the two projections differently.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.1


@dataclass
class Seen:
    """The tokens of one forward pass, and the last layer at those of them that `sample` marks, where the update will be
    measured. `weights` is as in `MicroBatch`."""

    layer: LastLayer
    sample: Bool[Tensor, "tokens"]
    weights: Float[Tensor, "tokens"] | None = None

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.sample)

    def watch(self, log_pi: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch"], loss_scale: float = 1.0) -> None:
        """Read `weights` off the gradient of log π(a) in the backward pass, as `MicroBatch.watch`."""
        check_mask(mask, self.tokens)
        _watch(self, log_pi, mask, marked(mask, self.sample), loss_scale)


@dataclass
class MicroBatch:
    """The tokens of one forward pass, with their verdicts.

    `advantages` are those they were planned with, and `used` what is left of them: the same where `keep`, or what soft
    weights or a penalty made of them, and zero elsewhere. `masked` leaves as much of the loss's own.
    `weights` is −∂loss/∂log π(a), known after the backward pass (`watch`): ratio, clipping, denominators, KL term
    and the share of the micro-batch in the step are all in it. `whole` is the same with nothing rejected, where
    that differs: every token has its own advantage, under the denominators of all tokens. `sample` marks those on
    which the update will be measured, where it is known already.
    """

    layer: LastLayer
    advantages: Float[Tensor, "tokens"]
    shifts: Shifts
    keep: Bool[Tensor, "tokens"]
    used: Float[Tensor, "tokens"]
    weights: Float[Tensor, "tokens"] | None = None
    whole: Float[Tensor, "tokens"] | None = None
    sample: Bool[Tensor, "tokens"] | None = None
    processes: Processes = field(default_factory=Processes)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.keep)

    def masked(
        self,
        advantages: Float[Tensor, "sequences time"],
        mask: Bool[Tensor, "sequences time"],
        loss_type: str,
        loss_scale: float = 1.0,
    ) -> Float[Tensor, "sequences time"]:
        """The advantages for a loss to read in place of its own: zero for a rejected token, and the others
        multiplied so that the loss's mean over all tokens becomes that over the accepted ones.

        `mask` marks the tokens; `loss_type` says which mean it is (`selection.accepted_mean`). They are the loss's own,
        which may differ from those the tokens were planned with by a factor that the loss brings in by itself. What is
        returned takes a gradient, off which `whole` is read in the backward pass of a loss that was multiplied by
        `loss_scale`.
        """
        check_mask(mask, self.tokens)
        keep = marked(mask, self.keep)
        own = advantages[mask].where(~self.shifts.nonfinite, 0)
        left = (self.used / self.advantages).where(self.advantages != 0, 1)
        advantages = advantages.clone()
        advantages[mask] = (own * left).where(self.keep, 0)
        written = advantages * accepted_mean(loss_type, mask, keep, self.processes)

        def watch(gradient: Tensor) -> None:
            self.whole = -own.where(self.advantages != 0, 0) * gradient[mask] / loss_scale

        # A loss is linear in a token's advantage, so its gradient there says what the token's own weighs.
        written.requires_grad_().register_hook(watch)
        return written

    def watch(self, log_pi: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch"], loss_scale: float = 1.0) -> None:
        """Read `weights` off the gradient of log π(a) in the backward pass; `mask` marks the tokens, in rows or packed.

        It has to be the tensor that the loss is made of, and the loss still to be made. `loss_scale` is what it is
        multiplied by before the backward pass (mixed precision). Raises `ValueError` for another number of tokens,
        log-probabilities without a gradient, or others than the planner makes of the hidden states.
        """
        check_mask(mask, self.tokens)
        _watch(self, log_pi, mask, mask, loss_scale)

    @cached_property
    def rows(self) -> SupportRows:
        """The vocabulary rows of its tokens: one sort for all gradients over them."""
        return support_rows(self.layer)


def joined(batches: list[MicroBatch]) -> MicroBatch | None:
    """The micro-batches of a step as one, or None where there is none."""
    if len(batches) < 2:
        return replace(batches[0]) if batches else None  # what it keeps for the step is gone with it
    return MicroBatch(
        LastLayer.cat([batch.layer for batch in batches]),
        torch.cat([batch.advantages for batch in batches]),
        Shifts.cat([batch.shifts for batch in batches]),
        torch.cat([batch.keep for batch in batches]),
        torch.cat([batch.used for batch in batches]),
        _cat([batch.weights for batch in batches]),
        _cat([batch.whole for batch in batches]),
    )


def marked(mask: Bool[Tensor, "*batch"], some: Bool[Tensor, "tokens"]) -> Bool[Tensor, "*batch"]:
    """The mask of some of the tokens that `mask` marks.

    >>> marked(torch.tensor([[True, False], [True, True]]), torch.tensor([True, False, True]))
    tensor([[ True, False],
            [False,  True]])
    """
    of = mask.clone()
    of[mask] = some
    return of


def check_mask(mask: Bool[Tensor, "*batch"], tokens: int) -> None:
    """Raises `ValueError` for a mask that is not of so many tokens."""
    if mask.dtype != torch.bool or int(mask.sum()) != tokens:
        raise ValueError(
            f"mask marks {int(mask.sum())} tokens ({mask.dtype}) and {tokens} were planned: give the boolean mask by "
            "which they were chosen"
        )


def check_hooked(layer: LastLayer, log_pi: Float[Tensor, "tokens"], half: bool, seen: str, between: str) -> None:
    """Raises `RuntimeError` where the loss's log π(a) are not those of what a trainer's hooks have seen: `seen`
    says what that is, and `between` where something else may lie."""
    error = _difference(layer, log_pi)
    if error > (_TOLERANCE_HALF if half else _TOLERANCE):
        raise RuntimeError(
            f"{seen} log-probabilities that differ from the loss's by {error:.3g} nats on average: something lies "
            f"between {between} that CAPO does not model"
        )


def check_left_out(gradient: Float[Tensor, "rejected"], fix: str) -> None:
    """Raises `RuntimeError`, ending in the `fix`, where rejected tokens have a gradient of log π(a): the loss has not
    read the advantages it was given. With a loss of NaN all tokens have one."""
    if (gradient[gradient.isfinite()] != 0).any():
        raise RuntimeError(
            f"a rejected token still has a gradient, so the loss did not read the advantages CAPO wrote: {fix}"
        )


def _watch(batch: Seen | MicroBatch, log_pi: Tensor, mask: Tensor, seen: Tensor, loss_scale: float) -> None:
    """Have the backward pass tell the weights of the tokens that `mask` [B, T] marks; `seen` marks the layer's.

    Raises `ValueError` for log-probabilities without a gradient, and for others than the layer's own.
    """
    if not log_pi.requires_grad:
        raise ValueError(
            "log_pi takes no gradient, so the tokens' weights can't be read off it: give the log-probabilities "
            "that the loss is made of, with their graph"
        )
    error = _difference(batch.layer, log_pi.detach()[seen])
    if error > _TOLERANCE_HALF:  # in a loop of one's own, whose precision is not known
        raise ValueError(
            f"log_pi differs by {error:.3g} nats on average from what hidden states and head give: both "
            "have to be of the same tokens (the state before each), at the same temperature, with nothing between"
        )

    def watch(gradient: Tensor) -> None:
        batch.weights = -gradient[mask] / loss_scale

    log_pi.register_hook(watch)


def _difference(layer: LastLayer, log_pi: Tensor) -> float:
    """The mean |difference| of log π(a) between the layer's own and others [n], of those that are finite."""
    error = (layer.log_pi_a - log_pi).abs()
    error = error[error.isfinite()]
    return float(error.mean()) if len(error) else 0.0


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    """The parts after one another, or None if one is missing."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None
