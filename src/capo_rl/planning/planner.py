"""One optimizer step, planned: the selection over its micro-batches, its moments and its figures.

Free of any trainer: a loop hands in hidden states, logits and advantages (`plan`), then the weights the loss really
put on each token (`MicroBatch.watch`), then the clipping factor (`commit`), and applies the mask it gets.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_rl.curvature.head import Head
from capo_rl.curvature.last_layer import (
    LastLayer,
    SupportRows,
    check_tokens,
    last_layer,
    log_pi_of,
    logit_chunks,
    row_gradient,
    support_rows,
)
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds, accepted_mean, penalised, select, soft_weights, translated
from capo_rl.curvature.shifts import Shifts, shifts_along, subset_direction, subset_shifts_of, token_shifts_of
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import fit_of_optimizer, group_of
from capo_rl.planning.divergence import measured_kl
from capo_rl.planning.share import Share, squared_norms
from capo_rl.planning.telemetry import describe as shift_figures
from capo_rl.planning.telemetry import missing_mass, rejections, synchronise
from capo_rl.planning.trust_region import TrustRegion

logger = logging.getLogger(__name__)

# Another way to select than the thresholds: the keep-mask [n] of n tokens, from the last layer, advantages, shifts, and
# log π(a) under the policy that sampled them.
Rule = Callable[[LastLayer, Tensor, Shifts, Tensor], Tensor]

# Mean |difference| of log π(a) between the planner's and the loss's that is no rounding, not even of half precision.
_LOGP_TOLERANCE = 0.1

# What is counted from the start of a run.
_COUNTERS = ("accepted_tokens", "steps_skipped", "steps_nonfinite")


class Moved(NamedTuple):
    """How far a step moved the policy: the mean KL(π ‖ π') in nats a token, the same number in every process; each
    token's KL and its m_F, of all processes."""

    mean: float
    kl: Tensor
    m_f: Tensor


@dataclass
class MicroBatch:
    """The n tokens of one forward pass, with their verdicts.

    `used` [n] are the advantages to train with: those of the loss where `keep`, or what soft weights or a penalty made
    of them, and zero elsewhere. `masked` lays them out for a loss.
    `weights` [n] is −∂loss/∂log π(a), known after the backward pass (`watch`): ratio, clipping, denominators, KL term
    and the share of the micro-batch in the step are all in it. `whole` [n] is the same with nothing rejected, where
    that differs: every token has its own advantage, under the denominators of all tokens.
    """

    layer: LastLayer
    advantages: Tensor
    shifts: Shifts
    keep: Tensor
    used: Tensor
    weights: Tensor | None = None
    whole: Tensor | None = None
    processes: Processes = field(default_factory=Processes)

    def masked(self, advantages: Tensor, mask: Tensor, loss_type: str, loss_scale: float = 1.0) -> Tensor:
        """The advantages [B, T] for a loss to read in place of its own: zero for a rejected token, and the others
        multiplied so that the loss's mean over all tokens becomes that over the accepted ones.

        mask [B, T] marks the tokens; `loss_type` says which mean it is (`selection.accepted_mean`). What is returned
        takes a gradient, off which `whole` is read in the backward pass of a loss that was multiplied by `loss_scale`.
        """
        self._check_mask(mask)
        keep = mask.clone()
        keep[mask] = self.keep
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
        self._check_mask(mask)
        if not log_pi.requires_grad:
            raise ValueError(
                "log_pi takes no gradient, so the tokens' weights can't be read off it: give the log-probabilities "
                "that the loss is made of, with their graph"
            )

        error = (self.layer.log_pi_a - log_pi.detach()[mask]).abs()
        error = error[error.isfinite()]
        if len(error) and error.mean() > _LOGP_TOLERANCE:
            raise ValueError(
                f"log_pi differs by {error.mean():.3g} nats on average from what hidden states and head give: both "
                "have to be of the same tokens (the state before each), at the same temperature, with nothing between"
            )

        def watch(gradient: Tensor) -> None:
            self.weights = -gradient[mask] / loss_scale

        log_pi.register_hook(watch)

    def _check_mask(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool or int(mask.sum()) != len(self.keep):
            raise ValueError(
                f"mask marks {int(mask.sum())} tokens ({mask.dtype}) and {len(self.keep)} were planned: give the "
                "boolean mask by which they were chosen"
            )

    @cached_property
    def rows(self) -> SupportRows:
        """The vocabulary rows of its tokens: one sort for all gradients over them."""
        return support_rows(self.layer)


class Planner:
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
        self._over = False  # whether the step that is collected was committed or skipped
        self._count: int | None = None  # of processes, since the first token
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
    ) -> MicroBatch:
        """Predict every token's shift and accept or reject it; `subsets` [n] makes whole subsets stand or fall.

        The first after `commit` or `skip` begins the next step. Arguments as for `shifts.token_shifts`, or in place of
        the logits the `Head` that makes them; `sampled_log_pi` [n] where the rollouts are those of an earlier policy.
        """
        if self._over:
            self.clear()
        self._check_processes()
        if self._lr is not None:
            self.step.lr = self._lr()
        hidden, advantages = hidden.detach(), advantages.detach()  # what is kept must not keep a graph
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
            micro_batch = MicroBatch(layer, advantages, shifts, keep, used.where(keep, 0), processes=self.processes)
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
        micro-batch's weights, and where there is no step to commit; `ValueError` for weights of another shape.
        """
        self._check_open("commit")
        if not self.micro_batches:
            raise RuntimeError("commit came without a token: call plan for each micro-batch before it")
        self._check_weights()
        batch = self._whole_step()
        assert batch is not None
        if batch.weights is None:
            raise RuntimeError(
                "the loss's gradient never reached the log-probabilities CAPO watched, so its moments can't follow "
                "the optimizer: the loss has to be made of what `watch` was given, and its backward pass comes before "
                "commit; this version of a trainer may compute its loss another way"
            )
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
        self._check_open("skip")
        self._over = True
        self.steps_skipped += 1
        self.steps_nonfinite += nonfinite
        batch = self._whole_step()
        figures: dict[str, float] = {}
        if batch is not None:
            with self._timed(batch.keep.device):
                figures = self._figures(batch, None, describe)
        return figures | {"capo/accepted_tokens": float(self.accepted_tokens)}

    @torch.no_grad()
    def measured_kl(self, now: Callable[[int], Tensor], head: Head | None, sample: list[Tensor] | None = None) -> Moved:
        """How far the step just taken moved the policy at its tokens, or at a sample of them.

        `now(i)` [m, d] are the hidden states after the step of micro-batch i's tokens, or of those that `sample[i]` [n]
        marks, and `head` is the head after it; without a head they are the logits [m, V]. With random numbers in the
        forward pass (dropout) they have to be those of the loss's. Raises `RuntimeError` before `commit`.
        """
        if not self._over:
            raise RuntimeError("measured_kl came before commit: call commit before the optimizer's step")
        if sample is None:
            sample = [torch.ones_like(batch.keep) for batch in self.micro_batches]
        kls, m_fs = [], []
        for i, (batch, chosen) in enumerate(zip(self.micro_batches, sample, strict=True)):
            layer = batch.layer[chosen]
            log_pi = log_pi_of if head is None else head.log_pi
            kls.append(measured_kl(layer, log_pi(now(i), layer.support, self.temperature)))
            m_fs.append(batch.shifts.m_f[chosen])
        kl, m_f = self.processes.gather(torch.cat(kls)), self.processes.gather(torch.cat(m_fs))
        # processes of different machines may sum in another order, and must go back equally far
        mean = float(kl.double().mean()) if len(kl) else math.nan
        return Moved(self.processes.agreed(mean, kl.device), kl, m_f)

    def clear(self) -> float:
        """Forget the micro-batches of a step that is over, or broken off; returns the seconds spent on it."""
        seconds, self._seconds = self._seconds, 0.0
        self.micro_batches = []
        self._over = False
        return seconds

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

    def _check_open(self, call: str) -> None:
        """Raises `RuntimeError` where the step is over already."""
        self._check_processes()
        if self._over:
            raise RuntimeError(
                f"{call} came after commit or skip of the same step, and the moments would count it twice: call each "
                "once a step, and plan for the tokens of the next before it"
            )

    def _check_weights(self) -> None:
        for i, batch in enumerate(self.micro_batches):
            for name, each in (("weights", batch.weights), ("whole", batch.whole)):
                if each is not None and each.shape != batch.keep.shape:
                    raise ValueError(
                        f"{name} of micro-batch {i} has shape {tuple(each.shape)}, and {len(batch.keep)} tokens were "
                        f"planned: give one each, [{len(batch.keep)}], as `watch` and `masked` do"
                    )

    def _check_processes(self) -> None:
        count = self.processes.count
        if self._count not in (None, count):
            raise RuntimeError(
                f"the planner began with {self._count} processes and there are {count}: with another number make a "
                "new Planner, and give it this one's state_dict"
            )
        self._count = count

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
