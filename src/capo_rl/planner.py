"""One optimizer step, planned: the selection over its micro-batches, its moments and its figures.

Free of any trainer: an adapter hands in hidden states, logits and advantages (`plan`), then the weights the loss
really put on each token (`MicroBatch.weights`), then the clipping factor (`commit`), and applies the mask it gets.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from capo_rl.divergence import measured_kl
from capo_rl.head import Head
from capo_rl.last_layer import (
    LastLayer,
    SupportRows,
    check_tokens,
    last_layer,
    logit_chunks,
    row_gradient,
    support_rows,
)
from capo_rl.processes import Processes
from capo_rl.selection import Thresholds, penalised, select, soft_weights, translated
from capo_rl.share import Share, squared_norms
from capo_rl.shifts import Shifts, shifts_along, subset_direction, subset_shifts_of, token_shifts_of
from capo_rl.step import AdamStep, SGDStep
from capo_rl.telemetry import describe as shift_figures
from capo_rl.telemetry import missing_mass, rejections, synchronise

logger = logging.getLogger(__name__)

# Another way to select than the thresholds: the keep-mask [n] of n tokens, from the last layer, advantages, shifts, and
# log π(a) under the policy that sampled them.
Rule = Callable[[LastLayer, Tensor, Shifts, Tensor], Tensor]


@dataclass
class MicroBatch:
    """The n tokens of one forward pass, with their verdicts.

    `used` [n] are the advantages to train with: those of the loss where `keep`, or what soft weights or a penalty made
    of them, and zero elsewhere.
    `weights` [n] is −∂loss/∂log π(a), known after the backward pass: ratio, clipping, denominators, KL term and the
    share of the micro-batch in the step are all in it. `whole` [n] is the same with nothing rejected, where that
    differs: every token has its own advantage, under the denominators of all tokens.
    """

    layer: LastLayer
    advantages: Tensor
    shifts: Shifts
    keep: Tensor
    used: Tensor
    weights: Tensor | None = None
    whole: Tensor | None = None

    @cached_property
    def rows(self) -> SupportRows:
        """The vocabulary rows of its tokens: one sort for all gradients over them."""
        return support_rows(self.layer)


class Planner:
    """Plans optimizer steps one after another.

    With `translated` the thresholds are for shifts at the paper's scale (`selection.translated`).
    With `share` the share ρ of the accepted tokens (`share.Share`) is kept too, which is the trainer's to apply.
    Between two calls of `commit` (or `skip`) the micro-batches of one step are collected: for each token its hidden
    state, k support entries and a few scalars. `rule` takes the place of the thresholds where it is set.

    Each of several `processes` plans its own tokens. Moments and figures are those of all tokens together, and so is
    the decision to skip: `rejects_everything`, `is_empty`, `commit`, `skip` and `measured_kl` are collective.
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
        soft: bool = False,
        penalty: float | None = None,
        translated: bool = False,
        share: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.step, self.thresholds = step, thresholds
        self.processes = processes or Processes()
        self.temperature, self.top_k, self.fisher = temperature, top_k, fisher
        self.max_missing_mass = max_missing_mass
        self.soft, self.penalty, self.translated = soft, penalty, translated
        # An SGD step is shorter already by what was left out of its gradient.
        self.share = Share(step.betas[1]) if share and isinstance(step, AdamStep) else None
        self.rule: Rule | None = None
        self.micro_batches: list[MicroBatch] = []
        self.accepted_tokens = 0
        self.steps_skipped = 0
        self.steps_nonfinite = 0  # those of the skipped whose gradient was not finite
        self._seconds = 0.0
        self._warned = False

    @torch.no_grad()
    def plan(
        self,
        hidden: Tensor,
        logits: Tensor | Iterable[Tensor] | Head,
        actions: Tensor,
        advantages: Tensor,
        subsets: Tensor | None = None,
        sampled_log_pi: Tensor | None = None,
    ) -> MicroBatch:
        """Predict every token's shift and accept or reject it; `subsets` [n] makes whole subsets stand or fall.

        Arguments as for `shifts.token_shifts`, or in place of the logits the `Head` that makes them; `sampled_log_pi`
        [n] where the rollouts are those of an earlier policy.
        """
        with self._timed(hidden.device):
            check_tokens(hidden, actions, advantages, self.temperature)
            settings: Any = {"temperature": self.temperature, "top_k": self.top_k}
            if isinstance(logits, Head):
                layer = logits.last_layer(hidden, actions, **settings)
            else:
                chunks = logit_chunks(logits, len(hidden))
                layer = LastLayer.cat([last_layer(hidden[at], z, actions[at], **settings) for at, z in chunks])
            shifts = token_shifts_of(layer, advantages, self.step, self.fisher)
            judged = shifts
            if self.translated:
                judged = translated(shifts, self.step.lr * hidden.abs().sum(-1, dtype=shifts.m_f.dtype))
            if self.rule is not None:
                before = layer.log_pi_a if sampled_log_pi is None else sampled_log_pi
                keep = self.rule(layer, advantages, shifts, before) & ~shifts.nonfinite
            elif subsets is None:
                keep = select(judged, self.thresholds)
            else:
                verdicts = select(subset_shifts_of(layer, advantages, self.step, subsets, self.fisher), self.thresholds)
                keep = verdicts[subsets] & ~shifts.nonfinite
            if self.soft:
                keep = ~shifts.nonfinite
                used = advantages * soft_weights(judged, self.thresholds).to(advantages.dtype)
            elif self.penalty is not None:
                keep = ~shifts.nonfinite
                used = penalised(advantages, shifts, self.penalty)
            else:
                used = advantages
            # `where`, not a product: a rejected token's advantage may be infinite
            micro_batch = MicroBatch(layer, advantages, shifts, keep, used.where(keep, 0))
            self.micro_batches.append(micro_batch)
            return micro_batch

    @property
    def rejects_everything(self) -> bool:
        """Whether the step has tokens with an advantage and none of them was accepted, in any process.

        Tokens without one have no gradient of their own, and moments would move the weights by themselves. Where no
        token has an advantage nothing was taken away, and the step is what it is without selection.
        """
        if not self.micro_batches:
            return False
        counts = [torch.stack([(batch.advantages != 0).sum(), (batch.used != 0).sum()]) for batch in self.micro_batches]
        some, left = self.processes.total(torch.stack(counts).sum(0)).tolist()
        return some > 0 and not left

    @property
    def is_empty(self) -> bool:
        """Whether the step has no token at all, in any process."""
        if not self.micro_batches:
            return True
        device = self.micro_batches[0].keep.device
        return not self.processes.total(torch.tensor(sum(len(each.keep) for each in self.micro_batches), device=device))

    @property
    def has_gradient(self) -> bool:
        """Whether any token of the step has a weight in its gradient, in any process."""
        weighed = [batch.weights.any() for batch in self.micro_batches if batch.weights is not None]
        return bool(weighed) and bool(self.processes.total(torch.stack(weighed).sum()))

    @torch.no_grad()
    def commit(self, scale: float = 1.0, describe: bool = True) -> dict[str, float]:
        """The step is about to be taken, its gradient multiplied by `scale`: advance the moments, return the figures.

        `scale` holds clipping, and 1/n where the gradients of n processes are averaged. Without `describe` the dearer
        figures, those of the shifts, are left out. Raises `RuntimeError` if the backward pass did not report a
        micro-batch's weights.
        """
        batch = self._whole_step()
        if batch is None:
            return {}
        if batch.weights is None:
            raise RuntimeError(
                "the loss's gradient never reached the log-probabilities CAPO watched, so its moments can't follow "
                "the optimizer: this version of the trainer computes its loss another way"
            )
        with self._timed(batch.weights.device):
            weights = scale * batch.weights
            figures = self._figures(batch, weights, describe)
            if self.share is not None:
                whole = weights if batch.whole is None else scale * batch.whole
                accepted_and_all = torch.stack([whole.where(batch.keep, 0), whole])
                rows = batch.rows.over(self.processes)
                self.share.update(*squared_norms(batch.layer, accepted_and_all, rows).tolist())
                figures["capo/share"] = self.share.value
            # A token with no weight has no gradient, and its rows need no memory.
            counted = weights != 0
            if counted.all():
                layer, rows = batch.layer, batch.rows
            else:  # a part is faster sorted anew than found in the whole
                layer = batch.layer[counted]
                rows = support_rows(layer)
            self.step.update(row_gradient(layer, weights[counted], rows.over(self.processes)))
        figures["capo/accepted_tokens"] = float(self.accepted_tokens)
        return figures

    @torch.no_grad()
    def skip(self, describe: bool = True, nonfinite: bool = False) -> dict[str, float]:
        """The step is left out, since every token was rejected or its gradient is `nonfinite`: count it, leave the
        moments, return the figures."""
        self.steps_skipped += 1
        self.steps_nonfinite += nonfinite
        batch = self._whole_step()
        figures: dict[str, float] = {}
        if batch is not None:
            with self._timed(batch.keep.device):
                figures = self._figures(batch, None, describe)
        return figures | {"capo/accepted_tokens": float(self.accepted_tokens)}

    @torch.no_grad()
    def measured_kl(self, sample: list[Tensor], hidden: Callable[[int], Tensor], head: Head) -> tuple[Tensor, Tensor]:
        """How far the step just taken moved the policy at a sample of M tokens: KL(π ‖ π') in nats, and their m_F.

        `sample[i]` [n] marks tokens of micro-batch i; `hidden(i)` [m, d] are their hidden states after the step, and
        `head` is the head after it. Returns the tokens of all processes.
        """
        kl, m_f = [], []
        for i, (batch, chosen) in enumerate(zip(self.micro_batches, sample, strict=True)):
            layer = batch.layer[chosen]
            kl.append(measured_kl(layer, head.log_pi(hidden(i), layer.support, self.temperature)))
            m_f.append(batch.shifts.m_f[chosen])
        return self.processes.gather(torch.cat(kl)), self.processes.gather(torch.cat(m_f))

    def clear(self) -> float:
        """Forget the micro-batches of the step that is over; returns the seconds spent on it."""
        seconds, self._seconds = self._seconds, 0.0
        self.micro_batches = []
        return seconds

    def _whole_step(self) -> MicroBatch | None:
        """The micro-batches as one, or None before the first."""
        batches = self.micro_batches
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

    def _figures(self, batch: MicroBatch, weights: Tensor | None, describe: bool) -> dict[str, float]:
        """What was rejected, over the tokens of all processes; and if asked, their shifts before and after."""
        shifts, keep, advantages, used = _everyones(batch, self.processes)
        finite = ~shifts.nonfinite
        figures = rejections(keep, advantages) | missing_mass(shifts.missing_mass, self.max_missing_mass)
        figures["capo/nonfinite_shifts"] = float((~finite).sum())
        if self.soft or self.penalty is not None:
            figures["capo/weight"] = _mean_weight(advantages, used)
        if describe:
            figures |= shift_figures("capo/token", shifts) | shift_figures("capo/token_accepted", shifts[keep])
            figures |= self._step_figures(batch, weights, len(keep), int(keep.sum()), int(finite.sum()))
        if weights is not None:  # else the step is left out
            self.accepted_tokens += int(keep.sum())
        self._warn_of_missing_mass(figures.get("capo/missing_mass/above_bound", 0), len(keep))
        return figures

    def _step_figures(
        self, batch: MicroBatch, weights: Tensor | None, tokens: int, accepted: int, finite: int
    ) -> dict[str, float]:
        """The shifts of three steps, planned in one pass: all tokens' mean gradient (Eq. 7), that of the accepted ones,
        and the loss's own. Counts are of all processes; a token whose shifts are not finite takes no part.
        """
        layer, advantages, keep, used = batch.layer, batch.advantages, batch.keep, batch.used
        if finite < tokens:  # a weight of zero would not silence a NaN
            some = ~batch.shifts.nonfinite
            layer, advantages, keep, used = layer[some], advantages[some], keep[some], used[some]
            weights = None if weights is None else weights[some]
        gradients = [advantages / max(1, finite)]
        altered = accepted < finite or self.soft or self.penalty is not None
        if altered:
            gradients.append(used / max(1, accepted))
        if weights is not None:
            gradients.append(weights)
        stacked = torch.stack([gradient.to(layer.u.dtype) for gradient in gradients])
        rows = batch.rows if layer is batch.layer else support_rows(layer)
        v = subset_direction(layer, stacked, self.step, rows.over(self.processes))
        everyone = shifts_along(v[0], layer, advantages, self.fisher)
        chosen = shifts_along(v[1], layer, advantages, self.fisher)[keep] if altered else everyone
        means = {
            "capo/batch/m_h": (everyone.m_h, finite),
            "capo/batch/m_f": (everyone.m_f, finite),
            "capo/batch_accepted/m_h": (chosen.m_h, accepted),
            "capo/batch_accepted/m_f": (chosen.m_f, accepted),
        }
        if weights is not None:
            means["capo/kl/predicted"] = (0.5 * shifts_along(v[-1], layer, advantages).c, finite)
        sums = self.processes.total(torch.stack([values.double().sum() for values, _ in means.values()])).tolist()
        return {
            name: total / count if count else math.nan
            for (name, (_, count)), total in zip(means.items(), sums, strict=True)
        }

    def _warn_of_missing_mass(self, above: float, tokens: int) -> None:
        if above and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d tokens have more than %g of their probability outside the top k=%s: raise capo_top_k, or "
                "capo_max_missing_mass to accept it (said once; capo/missing_mass/above_bound goes on counting)",
                above,
                tokens,
                self.max_missing_mass,
                self.top_k,
            )

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        synchronise(device)
        start = time.perf_counter()
        yield
        synchronise(device)
        self._seconds += time.perf_counter() - start


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    """The parts after one another, or None if one is missing."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def _everyones(batch: MicroBatch, processes: Processes) -> tuple[Shifts, Tensor, Tensor, Tensor]:
    """The shifts, verdicts, advantages and used advantages of the tokens of all processes."""
    if processes.count == 1:
        return batch.shifts, batch.keep, batch.advantages, batch.used
    columns = [getattr(batch.shifts, field.name) for field in fields(Shifts)]
    columns += [each.to(columns[0].dtype) for each in (batch.keep, batch.advantages, batch.used)]
    *shifts, keep, advantages, used = processes.gather(torch.stack(columns, dim=1)).unbind(1)
    return Shifts(*shifts), keep.bool(), advantages, used


def _mean_weight(advantages: Tensor, used: Tensor) -> float:
    """What is left of the advantages on average, over tokens that have one."""
    some = (advantages != 0) & advantages.isfinite()
    return float((used[some] / advantages[some]).mean()) if some.any() else math.nan
