"""One optimizer step, planned: the selection over its micro-batches, its moments and its figures.

Free of any trainer: a loop hands in hidden states, logits and advantages (`plan`), then the weights the loss really
put on each token (`MicroBatch.watch`), then the clipping factor (`commit`), and applies the mask it gets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capo_rl.curvature.head import Head
from capo_rl.curvature.last_layer import LastLayer, check_tokens, row_gradient, support_rows
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds, penalised, select, soft_weights, translated
from capo_rl.curvature.shifts import Shifts, subset_shifts_of, token_shifts_of
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import fit_of_optimizer, group_of
from capo_rl.planning.micro_batch import MicroBatch, joined
from capo_rl.planning.share import Share, squared_norms
from capo_rl.planning.step_figures import Everyone, batch_figures, token_figures, verdict_figures
from capo_rl.planning.trust_region import TrustRegion
from capo_rl.planning.updates import Moved, Updates

logger = logging.getLogger(__name__)

# Another way to select than the thresholds: the keep-mask [n] of n tokens, from the last layer, advantages, shifts, and
# log π(a) under the policy that sampled them.
Rule = Callable[[LastLayer, Tensor, Shifts, Tensor], Tensor]


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
    collective. So are `plan` and `state_dict` where the step's moments are spread over them: all plan equally often,
    with no token where they have none. Losses are those of one process, and the gradients' mean over processes is part
    of `commit`'s scale.

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
        spread = step.processes if isinstance(step, AdamStep) else None
        if spread is not None and processes is not None and processes is not spread:
            raise ValueError(
                "the step's moments are spread over other processes than those that plan it: give Planner the same "
                "Processes as AdamStep"
            )
        super().__init__(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_missing_mass=max_missing_mass,
            processes=processes or spread,
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
    def of(
        cls,
        region: TrustRegion,
        weight: Float[Tensor, "vocabulary d"],
        thresholds: Thresholds | None = None,
        **settings: Any,
    ) -> Planner:
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
        hidden: Float[Tensor, "tokens d"],
        logits: Float[Tensor, "tokens vocabulary"] | Iterable[Tensor] | Head,
        actions: Int[Tensor, "tokens"],
        advantages: Float[Tensor, "tokens"],
        subsets: Int[Tensor, "tokens"] | None = None,
        sampled_log_pi: Float[Tensor, "tokens"] | None = None,
        sample: Bool[Tensor, "tokens"] | None = None,
    ) -> MicroBatch:
        """Predict every token's shift and accept or reject it; `subsets` makes whole subsets stand or fall.

        The first after `commit` or `skip` begins the next step. Arguments as for `shifts.token_shifts`, or in place of
        the logits the `Head` that makes them; `sampled_log_pi` where the rollouts are those of an earlier policy.
        With a `Head`, the tokens that `sample` marks are projected by themselves, as `Updates.look` does: a product
        rounds by its shape, and a KL measured on them must not depend on whether the others are looked at.
        """
        self._begin()
        if self._lr is not None:
            self.step.lr = self._lr()
        hidden, advantages = hidden.detach(), advantages.detach()  # what is kept must not keep a graph
        with self._timed(hidden.device):
            check_tokens(hidden, actions, advantages, self.temperature)
            if isinstance(logits, Head) and sample is not None:
                parts = [self._layer(hidden[at], logits, actions[at]) for at in (sample, ~sample)]
                layer = LastLayer.cat(parts)[(~sample).argsort(stable=True).argsort()]
            else:
                layer = self._layer(hidden, logits, actions)
            step = self.step.at(layer.support)
            shifts = token_shifts_of(layer, advantages, step, self.fisher)
            judged = shifts
            if self.translated:
                judged = translated(shifts, self.step.lr * hidden.abs().sum(-1, dtype=shifts.m_f.dtype))
            if self.rule is not None:
                before = layer.log_pi_a if sampled_log_pi is None else sampled_log_pi
                keep = self.rule(layer, advantages, shifts, before) & ~shifts.nonfinite
            elif subsets is None:
                keep = select(judged, self.thresholds)
            else:
                verdicts = select(subset_shifts_of(layer, advantages, step, subsets, self.fisher), self.thresholds)
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
        batch = joined(self.micro_batches)
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

    def shared(self, figures: dict[str, float]) -> float:
        """The share ρ of the step just committed, by which the loop will multiply it; 1 where none is kept. The KL
        predicted in the step's `figures` becomes that of the step as it will be taken."""
        share = 1.0 if self.share is None else self.share.value
        if "capo/kl/predicted" in figures:
            figures["capo/kl/predicted"] *= share**2
        return share

    @torch.no_grad()
    def skip(self, describe: bool = True, nonfinite: bool = False) -> dict[str, float]:
        """The step is left out, since every token was rejected or its gradient is `nonfinite`: count it, leave the
        moments, return the figures."""
        self._count_skipped(nonfinite)
        batch = joined(self.micro_batches)
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

    def state_dict(self, here: bool = True) -> dict[str, Tensor]:
        """The moments, the share and the counters after a step, as tensors by name.

        Collective where moments are spread over processes; without `here` this one takes part and gets nothing.
        """
        moments = self.step.state_dict(here)
        if not here:
            return {}
        share = {} if self.share is None else self.share.state_dict()
        return (
            {f"step.{name}": tensor for name, tensor in moments.items()}
            | {f"share.{name}": torch.tensor(value, dtype=torch.float64) for name, value in share.items()}
            | {"accepted_tokens": torch.tensor(self.accepted_tokens)}
            | super().state_dict()
        )

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Go on from what `state_dict` gave, bit for bit, with moments on `device` or where they are. Raises
        `ValueError` for the state of another planner."""
        expected = {"accepted_tokens", *(() if self.share is None else ("share.accepted", "share.everyone"))}
        if missing := expected - state.keys():
            raise ValueError(f"the state of a Planner lacks {sorted(missing)}: it is another's, or had no share")
        self.step.load_state_dict(
            {name.removeprefix("step."): tensor for name, tensor in state.items() if name.startswith("step.")}, device
        )
        if self.share is not None:
            self.share.load_state_dict({name: float(state[f"share.{name}"]) for name in ("accepted", "everyone")})
        self.accepted_tokens = int(state["accepted_tokens"])
        super().load_state_dict(state)

    def _check_committed(self, *step: Any) -> None:
        if self.micro_batches and not self._over:
            raise RuntimeError(
                "the optimizer steps, and what was planned was not committed: call planner.commit(clip) before "
                "optimizer.step(), or planner.skip() and leave the step out (planner.clear() where it was only a look)"
            )

    def _figures(self, batch: MicroBatch, weights: Tensor | None, describe: bool) -> dict[str, float]:
        """What was rejected, over the tokens of all processes; and if asked, their shifts before and after."""
        everyone = Everyone.of(batch, self.processes)
        weighed = self.soft or self.penalty is not None
        figures = verdict_figures(everyone, self.max_missing_mass, weighed)
        if describe:
            figures |= token_figures(everyone)
            figures |= batch_figures(batch, weights, everyone, self.step, self.fisher, weighed, self.processes)
        if weights is not None:  # else the step is left out
            self.accepted_tokens += int(everyone.keep.sum())
        self._warn_of_missing_mass(figures.get("capo/missing_mass/above_bound", 0.0), len(everyone.keep))
        return figures
