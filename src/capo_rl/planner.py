"""One optimizer step, planned: the selection over its micro-batches, its moments and its figures.

Free of any trainer: an adapter hands in hidden states, logits and advantages (`plan`), then the weights the loss
really put on each token (`MicroBatch.weights`), then the clipping factor (`commit`), and applies the mask it gets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from capo_rl.divergence import measured_kl
from capo_rl.last_layer import (
    LastLayer,
    SupportRows,
    check_tokens,
    last_layer,
    logit_chunks,
    row_gradient,
    support_rows,
)
from capo_rl.selection import Thresholds, balanced, select
from capo_rl.shifts import Shifts, shifts_along, subset_direction, subset_shifts_of, token_shifts_of
from capo_rl.step import AdamStep, SGDStep
from capo_rl.telemetry import describe, missing_mass, rejections

logger = logging.getLogger(__name__)

# Another way to select than the thresholds: the keep-mask [n] of n tokens, from the last layer, advantages, shifts, and
# log π(a) under the policy that sampled them.
Rule = Callable[[LastLayer, Tensor, Shifts, Tensor], Tensor]


@dataclass
class MicroBatch:
    """The n tokens of one forward pass, with their verdicts.

    `weights` [n] is −∂loss/∂log π(a), known after the backward pass: ratio, clipping, denominators, KL term and the
    share of the micro-batch in the step are all in it.
    """

    layer: LastLayer
    advantages: Tensor
    shifts: Shifts
    keep: Tensor
    weights: Tensor | None = None


class Planner:
    """Plans optimizer steps one after another.

    Between two calls of `commit` (or `skip`) the micro-batches of one step are collected: for each token its hidden
    state, k support entries and a few scalars. `rule` takes the place of the thresholds where it is set.
    """

    def __init__(
        self,
        step: SGDStep | AdamStep,
        thresholds: Thresholds,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        fisher: str = "sampled",
        max_missing_mass: float = 1.0,
        balance: bool = False,
    ) -> None:
        self.step, self.thresholds = step, thresholds
        self.temperature, self.top_k, self.fisher = temperature, top_k, fisher
        self.max_missing_mass, self.balance = max_missing_mass, balance
        self.rule: Rule | None = None
        self.micro_batches: list[MicroBatch] = []
        self.accepted_tokens = 0
        self.steps_skipped = 0
        self._seconds = 0.0
        self._warned = False

    @torch.no_grad()
    def plan(
        self,
        hidden: Tensor,
        logits: Tensor | Iterable[Tensor],
        actions: Tensor,
        advantages: Tensor,
        subsets: Tensor | None = None,
        sampled_log_pi: Tensor | None = None,
    ) -> MicroBatch:
        """Predict every token's shift and accept or reject it; `subsets` [n] makes whole subsets stand or fall.

        Arguments as for `shifts.token_shifts`; `sampled_log_pi` [n] where the rollouts are those of an earlier policy.
        """
        with self._timed():
            check_tokens(hidden, actions, advantages, self.temperature)
            layer = LastLayer.cat(
                [
                    last_layer(hidden[at], chunk, actions[at], temperature=self.temperature, top_k=self.top_k)
                    for at, chunk in logit_chunks(logits, len(hidden))
                ]
            )
            shifts = token_shifts_of(layer, advantages, self.step, self.fisher)
            if self.rule is not None:
                before = layer.log_pi_a if sampled_log_pi is None else sampled_log_pi
                keep = self.rule(layer, advantages, shifts, before) & ~shifts.nonfinite
            elif self.balance:
                keep = balanced(shifts, self.thresholds, advantages)
            elif subsets is None:
                keep = select(shifts, self.thresholds)
            else:
                verdicts = select(subset_shifts_of(layer, advantages, self.step, subsets, self.fisher), self.thresholds)
                keep = verdicts[subsets] & ~shifts.nonfinite
            micro_batch = MicroBatch(layer, advantages, shifts, keep)
            self.micro_batches.append(micro_batch)
            return micro_batch

    @property
    def rejects_everything(self) -> bool:
        """Whether the step has tokens and none of them was accepted."""
        sizes = [len(batch.keep) for batch in self.micro_batches]
        return sum(sizes) > 0 and not any(bool(batch.keep.any()) for batch in self.micro_batches)

    @torch.no_grad()
    def commit(self, scale: float = 1.0) -> dict[str, float]:
        """The step is about to be taken, its gradient multiplied by `scale`: advance the moments, return the figures.

        Raises `RuntimeError` if the backward pass did not report a micro-batch's weights.
        """
        batch = self._whole_step()
        if batch is None:
            return {}
        if batch.weights is None:
            raise RuntimeError(
                "the loss's gradient never reached the log-probabilities CAPO watched, so its moments can't follow "
                "the optimizer: this version of the trainer computes its loss another way"
            )
        with self._timed():
            rows = support_rows(batch.layer)
            figures = self._figures(batch, rows)
            weights = scale * batch.weights
            planned = shifts_along(
                subset_direction(batch.layer, weights, self.step, rows), batch.layer, batch.advantages
            )
            figures["capo/kl/predicted"] = float(0.5 * planned.c.mean())
            # A token with no weight has no gradient, and its rows need no memory.
            counted = weights != 0
            if counted.all():
                self.step.update(row_gradient(batch.layer, weights, rows))
            else:
                self.step.update(row_gradient(batch.layer[counted], weights[counted]))
            self.accepted_tokens += int(batch.keep.sum())
        figures["capo/accepted_tokens"] = float(self.accepted_tokens)
        return figures

    @torch.no_grad()
    def skip(self) -> dict[str, float]:
        """The step is left out, since every token was rejected: count it, leave the moments, return the figures."""
        self.steps_skipped += 1
        batch = self._whole_step()
        with self._timed():
            return {} if batch is None else self._figures(batch, support_rows(batch.layer))

    @torch.no_grad()
    def measured_kl(self, sample: list[Tensor], logits: Callable[[int], Iterable[Tensor]]) -> tuple[Tensor, Tensor]:
        """How far the step just taken moved the policy at a sample of M tokens: KL(π ‖ π') in nats, and their m_F.

        `sample[i]` [n] marks tokens of micro-batch i, whose logits after the step are `logits(i)`.
        """
        tokens = list(zip(self.micro_batches, sample, strict=True))
        kl = [measured_kl(batch.layer[chosen], logits(i)) for i, (batch, chosen) in enumerate(tokens)]
        m_f = [batch.shifts.m_f[chosen] for batch, chosen in tokens]
        return (torch.cat(kl), torch.cat(m_f)) if tokens else (torch.zeros(0), torch.zeros(0))

    def clear(self) -> float:
        """Forget the micro-batches of the step that is over; returns the seconds spent on it."""
        seconds, self._seconds = self._seconds, 0.0
        self.micro_batches = []
        return seconds

    def _whole_step(self) -> MicroBatch | None:
        batches = self.micro_batches
        if not sum(len(batch.keep) for batch in batches):
            return None
        weights = [batch.weights for batch in batches if batch.weights is not None]
        return MicroBatch(
            LastLayer.cat([batch.layer for batch in batches]),
            torch.cat([batch.advantages for batch in batches]),
            Shifts.cat([batch.shifts for batch in batches]),
            torch.cat([batch.keep for batch in batches]),
            torch.cat(weights) if len(weights) == len(batches) else None,
        )

    def _figures(self, batch: MicroBatch, rows: SupportRows) -> dict[str, float]:
        """Shifts at token and batch level, before and after selection, and what was rejected."""
        keep = batch.keep
        finite = ~batch.shifts.nonfinite
        figures = describe("capo/token", batch.shifts) | describe("capo/token_accepted", batch.shifts[keep])
        for name, members in (("capo/batch", finite), ("capo/batch_accepted", keep)):
            level = self._step_of(members, batch, rows if finite.all() else None)
            for symbol in ("m_h", "m_f"):
                figures[f"{name}/{symbol}"] = float(getattr(level, symbol).mean())
        figures |= rejections(keep, batch.advantages)
        figures |= missing_mass(batch.layer.missing_mass, self.max_missing_mass)
        figures["capo/nonfinite_shifts"] = float((~finite).sum())
        if figures["capo/missing_mass/above_bound"] and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d tokens have more than %g of their probability outside the top k=%s: raise capo_top_k, or "
                "capo_max_missing_mass to accept it (said once; capo/missing_mass/above_bound goes on counting)",
                figures["capo/missing_mass/above_bound"],
                len(keep),
                self.max_missing_mass,
                self.top_k,
            )
        return figures

    def _step_of(self, members: Tensor, batch: MicroBatch, rows: SupportRows | None) -> Shifts:
        """The shifts at some of the tokens of the step that their mean gradient would take (Eq. 7).

        Without the step's `rows` the others are left out altogether: a weight of zero does not silence a NaN.
        """
        layer, advantages = batch.layer, batch.advantages
        if rows is None:
            layer, advantages, members = layer[members], advantages[members], members[members]
        weights = advantages.where(members, 0) / members.sum()
        v = subset_direction(layer, weights, self.step, rows)
        return shifts_along(v, layer, advantages, self.fisher)[members]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
