"""One optimizer step, planned: the selection over its micro-batches, its moments and its figures.

Free of any trainer: a loop hands in hidden states, logits and advantages (`plan`), then the weights the loss really
put on each token (`MicroBatch.watch`), then the clipping factor (`commit`), and applies the mask it gets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from capo_rl.curvature.head import Head
from capo_rl.curvature.last_layer import (
    LastLayer,
    SupportRows,
    check_tokens,
    last_layer,
    logit_chunks,
    row_gradient,
    support_rows,
)
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds, accepted_mean, penalised, select, soft_weights, translated
from capo_rl.curvature.shifts import Shifts, shifts_along, subset_direction, subset_shifts_of, token_shifts_of
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import fit_of_optimizer, group_of
from capo_rl.planning.share import Share, squared_norms
from capo_rl.planning.telemetry import describe as shift_figures
from capo_rl.planning.telemetry import missing_mass, rejections
from capo_rl.planning.trust_region import TrustRegion
from capo_rl.planning.updates import Moved, Updates, check_log_pi, check_mask, marked

logger = logging.getLogger(__name__)

# Another way to select than the thresholds: the keep-mask [n] of n tokens, from the last layer, advantages, shifts, and
# log π(a) under the policy that sampled them.
Rule = Callable[[LastLayer, Tensor, Shifts, Tensor], Tensor]

# What is counted from the start of a run.
_COUNTERS = ("accepted_tokens", "steps_skipped", "steps_nonfinite")


@dataclass
class MicroBatch:
    """The n tokens of one forward pass, with their verdicts.

    `used` [n] are the advantages to train with: those of the loss where `keep`, or what soft weights or a penalty made
    of them, and zero elsewhere. `masked` lays them out for a loss.
    `weights` [n] is −∂loss/∂log π(a), known after the backward pass (`watch`): ratio, clipping, denominators, KL term
    and the share of the micro-batch in the step are all in it. `whole` [n] is the same with nothing rejected, where
    that differs: every token has its own advantage, under the denominators of all tokens. `sample` [n] marks those on
    which the update will be measured, where it is known already.
    """

    layer: LastLayer
    advantages: Tensor
    shifts: Shifts
    keep: Tensor
    used: Tensor
    weights: Tensor | None = None
    whole: Tensor | None = None
    sample: Tensor | None = None
    processes: Processes = field(default_factory=Processes)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.keep)

    def masked(self, advantages: Tensor, mask: Tensor, loss_type: str, loss_scale: float = 1.0) -> Tensor:
        """The advantages [B, T] for a loss to read in place of its own: zero for a rejected token, and the others
        multiplied so that the loss's mean over all tokens becomes that over the accepted ones.

        mask [B, T] marks the tokens; `loss_type` says which mean it is (`selection.accepted_mean`). What is returned
        takes a gradient, off which `whole` is read in the backward pass of a loss that was multiplied by `loss_scale`.
        """
        check_mask(mask, self.tokens)
        keep = marked(mask, self.keep)
        advantages = advantages.clone()
        advantages[mask] = self.used
        written = advantages * accepted_mean(loss_type, mask, keep, self.processes)

        def watch(gradient: Tensor) -> None:
            own = self.advantages.where(~self.shifts.nonfinite, 0)
            self.whole = -own * gradient[mask] / loss_scale

        # A loss is linear in a token's advantage, so its gradient there says what the token's own weighs.
        written.requires_grad_().register_hook(watch)
        return written

    def watch(self, log_pi: Tensor, mask: Tensor, loss_scale: float = 1.0) -> None:
        """Read `weights` off the gradient of log π(a) [B, T] in the backward pass; `mask` marks the tokens.

        It has to be the tensor that the loss is made of, and the loss still to be made. `loss_scale` is what it is
        multiplied by before the backward pass (mixed precision). Raises `ValueError` for another number of tokens,
        log-probabilities without a gradient, or others than the planner makes of the hidden states.
        """
        check_mask(mask, self.tokens)
        check_log_pi(self.layer, log_pi, mask)

        def watch(gradient: Tensor) -> None:
            self.weights = -gradient[mask] / loss_scale

        log_pi.register_hook(watch)

    @cached_property
    def rows(self) -> SupportRows:
        """The vocabulary rows of its tokens: one sort for all gradients over them."""
        return support_rows(self.layer)


class Planner(Updates):
    """Plans optimizer steps one after another: for each token whether it may take part, and the moments of the step.

    In a loop of one's own, for a model whose logits are W h with W [V, d] (`model.lm_head.weight`):

        planner = Planner.of(TrustRegion(optimizer), W)                 # once
        ...
        planned = planner.plan(hidden[mask], Head(W), actions[mask], advantages[mask])      # each micro-batch
        advantages = planned.masked(advantages, mask, "dapo")           # [B, T]; to leave rejected tokens out
        planned.watch(log_pi, mask)                                     # [B, T]; what the loss is made of
        loss(log_pi, advantages).backward()
        ...
        planner.commit(clip)                                            # each step; what clipping multiplied by
        optimizer.step()

    `plan` predicts, `commit` says that the step is taken, or `skip` that it is left out (where `rejects_everything`, or
    the gradient is not finite), and the next `plan` begins the next step. After the optimizer's step `measured_kl` says
    how far it moved the policy. `state_dict` is what a checkpoint needs. Between two commits each token's hidden state,
    k support entries and a few scalars are held. A planner that was made in another way than by `of` wants to be told
    the learning rate of each coming step (`step.lr`).

    With `translated` the thresholds are for shifts at the paper's scale (`selection.translated`). With `share` the
    share ρ of the accepted tokens (`share.Share`) is kept too, which is the loop's to apply
    (`TrustRegion.before_step`). `rule` takes the place of the thresholds where it is set.

    Each of several `processes` plans its own tokens. Moments and figures are those of all tokens together, and so is
    the decision to skip: `rejects_everything`, `is_empty`, `has_gradient`, `commit`, `skip` and `measured_kl` are
    collective. Losses are those of one process, and the gradients' mean over processes is part of `commit`'s scale.

    Raises `RuntimeError`, naming the call that is missing or too many, for a loop that commits twice, or not before
    the optimizer's step (known to `of`), or whose number of processes changes; `ValueError` for shapes that don't fit.

    >>> weight = torch.nn.Parameter(torch.zeros(3, 2))
    >>> region = TrustRegion(torch.optim.SGD([weight], lr=1.0), budget=None)
    >>> planner = Planner.of(region, weight, Thresholds(fisher=0.3, hessian=None))
    >>> hidden, mask = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[True, True]])
    >>> log_pi = (hidden @ weight.T).log_softmax(-1)[:, 0][None]
    >>> planned = planner.plan(hidden, Head(weight), torch.tensor([0, 0]), torch.tensor([1.0, 1.0]))
    >>> planned.keep                                        # m_F = ½ (‖h‖² ‖u‖²)² = ½ (⅔ ‖h‖²)²
    tensor([ True, False])
    >>> planned.watch(log_pi, mask)
    >>> (-log_pi * planned.masked(torch.ones(1, 2), mask, "dapo")).mean().backward()
    >>> planned.weights                                     # the mean over one token
    tensor([1., 0.])
    >>> figures = planner.commit()
    >>> figures["capo/rejection_rate"]
    0.5
    """

    def __init__(
        self,
        step: SGDStep | AdamStep,
        thresholds: Thresholds,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        fisher: str = "sampled",
        max_missing_mass: float = 1.0,
        soft: bool = False,
        penalty: float | None = None,
        translated: bool = False,
        share: bool = False,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature, top_k=top_k, top_p=top_p, max_missing_mass=max_missing_mass, processes=processes
        )
        self.step, self.thresholds, self.fisher = step, thresholds, fisher
        self.soft, self.penalty, self.translated = soft, penalty, translated
        # An SGD step is shorter already by what was left out of its gradient.
        self.share = Share(step.betas[1]) if share and isinstance(step, AdamStep) else None
        self.rule: Rule | None = None
        self.micro_batches: list[MicroBatch] = []
        self.accepted_tokens = 0
        self._lr: Callable[[], float] | None = None  # the optimizer's, where it is known

    @classmethod
    def of(cls, region: TrustRegion, weight: Tensor, thresholds: Thresholds | None = None, **settings: Any) -> Planner:
        """A planner for the steps of a region's optimizer, Adam or SGD without momentum, with the constants and the
        learning rate it has for a head's weight.

        A step of the optimizer raises `RuntimeError` while tokens are planned and not committed. Raises `ValueError`
        for an optimizer whose step is neither.
        """
        optimizer = region.optimizer
        fit = fit_of_optimizer(optimizer)
        if fit.model is None:
            raise ValueError(
                f"Planner.of knows the steps of Adam and of SGD without momentum, and {fit.name} is neither: use one "
                "of them; or where a TrustRegion alone decides, which measures steps, Planner(AdamStep(lr), "
                "Thresholds())"
            )
        if fit.without is not None:
            logger.warning("%s: %s", fit.name, fit.without)
        group = optimizer.param_groups[group_of(optimizer, weight)]
        lr = float(group["lr"])
        if fit.model == "adam":
            beta1, beta2 = group["betas"]
            step: AdamStep | SGDStep = AdamStep(lr, (float(beta1), float(beta2)), float(group["eps"]))
        else:
            step = SGDStep(lr)
        planner = cls(step, thresholds or Thresholds(), **settings)
        planner._lr = partial(region.lr, weight)
        optimizer.register_step_pre_hook(planner._check_committed)
        return planner

    @torch.no_grad()
    def plan(
        self,
        hidden: Tensor,
        logits: Tensor | Iterable[Tensor] | Head,
        actions: Tensor,
        advantages: Tensor,
        subsets: Tensor | None = None,
        sampled_log_pi: Tensor | None = None,
        sample: Tensor | None = None,
    ) -> MicroBatch:
        """Predict every token's shift and accept or reject it; `subsets` [n] makes whole subsets stand or fall.

        The first after `commit` or `skip` begins the next step. Arguments as for `shifts.token_shifts`, or in place of
        the logits the `Head` that makes them; `sampled_log_pi` [n] where the rollouts are those of an earlier policy.
        With a `Head`, the tokens that `sample` [n] marks are projected by themselves, as `Updates.look` does: a product
        rounds by its shape, and a KL measured on them must not depend on whether the others are looked at.
        """
        self._begin()
        if self._lr is not None:
            self.step.lr = self._lr()
        hidden, advantages = hidden.detach(), advantages.detach()  # what is kept must not keep a graph
        with self._timed(hidden.device):
            check_tokens(hidden, actions, advantages, self.temperature)
            settings: Any = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            if isinstance(logits, Head) and sample is not None:
                parts = [logits.last_layer(hidden[at], actions[at], **settings) for at in (sample, ~sample)]
                layer = LastLayer.cat(parts)[(~sample).argsort(stable=True).argsort()]
            elif isinstance(logits, Head):
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
            micro_batch = MicroBatch(
                layer, advantages, shifts, keep, used.where(keep, 0), sample=sample, processes=self.processes
            )
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

    @torch.no_grad()
    def commit(self, scale: float = 1.0, describe: bool = True) -> dict[str, float]:
        """The step is about to be taken, its gradient multiplied by `scale`: advance the moments, return the figures.

        `scale` holds clipping, and 1/n where the gradients of n processes are averaged. Without `describe` the dearer
        figures, those of the shifts, are left out. Raises `RuntimeError` if the backward pass did not report a
        micro-batch's weights, and where there is no step to commit; `ValueError` for weights of another shape.
        """
        self._check_commit()
        batch = self._whole_step()
        assert batch is not None and batch.weights is not None
        self._over = True
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
        self._count_skipped(nonfinite)
        batch = self._whole_step()
        figures: dict[str, float] = {}
        if batch is not None:
            with self._timed(batch.keep.device):
                figures = self._figures(batch, None, describe)
        return figures | {"capo/accepted_tokens": float(self.accepted_tokens)}

    @torch.no_grad()
    def measured_kl(self, now: Callable[[int], Tensor], head: Head | None, sample: list[Tensor] | None = None) -> Moved:
        """How far the step just taken moved the policy at its tokens, or at a sample of them.

        `now(i)` [m, d] are the hidden states after the step of micro-batch i's tokens, or of those that `sample[i]`
        [n] marks (by default the sample it was planned with, if any), and `head` is the head after it; without a head
        they are the logits [m, V]. With random numbers in the forward pass (dropout) they have to be those of the
        loss's. Raises `RuntimeError` before `commit`.
        """
        samples = [batch.sample for batch in self.micro_batches] if sample is None else sample
        at = [
            (batch, torch.ones_like(batch.keep) if marks is None else marks)
            for batch, marks in zip(self.micro_batches, samples, strict=True)
        ]
        moved = self._moved([batch.layer[marks] for batch, marks in at], now, head)
        return moved._replace(m_f=self.processes.gather(torch.cat([batch.shifts.m_f[marks] for batch, marks in at])))

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, the share and the counters after a step, as tensors by name."""
        share = {} if self.share is None else self.share.state_dict()
        return (
            {f"step.{name}": tensor for name, tensor in self.step.state_dict().items()}
            | {f"share.{name}": torch.tensor(value, dtype=torch.float64) for name, value in share.items()}
            | {name: torch.tensor(getattr(self, name)) for name in _COUNTERS}
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave, bit for bit. Raises `ValueError` for the state of another planner."""
        expected = {*_COUNTERS, *(() if self.share is None else ("share.accepted", "share.everyone"))}
        if missing := expected - state.keys():
            raise ValueError(f"the state of a Planner lacks {sorted(missing)}: it is another's, or had no share")
        self.step.load_state_dict(
            {name.removeprefix("step."): tensor for name, tensor in state.items() if name.startswith("step.")}
        )
        if self.share is not None:
            self.share.load_state_dict({name: float(state[f"share.{name}"]) for name in ("accepted", "everyone")})
        for name in _COUNTERS:
            setattr(self, name, int(state[name]))

    def _check_committed(self, *step: Any) -> None:
        if self.micro_batches and not self._over:
            raise RuntimeError(
                "the optimizer steps, and what was planned was not committed: call planner.commit(clip) before "
                "optimizer.step(), or planner.skip() and leave the step out (planner.clear() where it was only a look)"
            )

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
