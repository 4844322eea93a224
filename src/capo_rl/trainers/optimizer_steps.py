"""The optimizer's steps of a trainer: which are left out, how long each is, and how far it moved the policy."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from capo_rl.curvature.step_model import Fit
from capo_rl.planning.planner import Planner
from capo_rl.planning.telemetry import rank_correlation, synchronise
from capo_rl.planning.trust_region import TrustRegion, check_recomputable, way_back
from capo_rl.planning.updates import Moved, Updates
from capo_rl.runs.tokens import rewind_steps, step_tokens, write_step
from capo_rl.settings.own import control_of
from capo_rl.trainers.step_choice import check_recomputes, follow_optimizer, torch_optimizer

logger = logging.getLogger(__name__)


@dataclass
class Coming:
    """What is known of one optimizer step; each has its own."""

    unplanned: dict[str, Any] | None = None  # the inputs of a loss whose log-probs are still to come
    to_log: bool = True  # whether its figures will be
    to_measure: bool = True  # whether its KL is
    scale: float = 1.0  # of the schedule's learning rate
    norm: float | None = None  # of its gradient, before clipping
    skipped: bool = False  # whether it was left out
    empty: bool = False  # whether it has no tokens to measure its KL on
    informative: bool = True  # whether it has a gradient of its own
    rollouts: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)  # each micro-batch's inputs and mask


class OptimizerSteps(TrainerCallback):
    """Called by a `CAPOTrainer` before and after each optimizer step, and the whole training.

    Before a step it advances the step model, or leaves the step out where nothing is left in it or its gradient is not
    finite, and gives it its length. After it the KL of the update is measured, where that is to be logged or bounded.
    """

    def __init__(self, trainer: Any, fit: Fit | None) -> None:
        args = trainer.args
        self.trainer = trainer
        self.fit = fit  # of a step model, as far as it was known before there was an optimizer
        self.coming = Coming()
        # DeepSpeed keeps the weights that count to itself, so there is no way back along its steps.
        self.budget = control_of(args, args.learning_rate, None if trainer.is_deepspeed_enabled else way_back)
        self.recomputes = self.budget is not None and args.capo_kl_control == "optimizer"
        self.region: TrustRegion | None = None  # of the modes that change the run, when there is an optimizer
        self.lr_ratio = 1.0  # of the last layer's learning rate to the first group's
        self.noise_known = False  # whether the KL of no step was measured
        if self.recomputes:
            check_recomputes(trainer)

    @property
    def updates(self) -> Updates:
        """The trainer's, which it has in every mode but `off`."""
        return self.trainer.updates

    @property
    def planner(self) -> Planner | None:
        """The trainer's, where anything is predicted."""
        return self.trainer.planner

    @property
    def measures(self) -> bool:
        """Whether the coming step's KL will be measured."""
        return self.coming.to_measure or self.budget is not None

    # ---- a training ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget what a training that was broken off in the middle of a step has left."""
        trainer, optimizer = self.trainer, torch_optimizer(self.trainer)
        if self.recomputes:
            check_recomputable(optimizer)
        if self.planner is not None and self.fit is not None:
            self.lr_ratio = follow_optimizer(trainer, self.planner, self.fit)
        if self.region is not None:
            self.region.restore()
        self.region = TrustRegion(optimizer, self.budget) if args.changes_the_run else None
        self.updates.clear()
        trainer.measuring.clear()
        self.coming = Coming()
        if args.capo_tokens_every is not None and state.is_world_process_zero:
            rewind_steps(args.output_dir, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Say so where most of the run's steps were left out."""
        updates, steps = self.updates, state.global_step
        if 2 * updates.steps_skipped > steps and state.is_world_process_zero:
            logger.warning(
                "%d of %d steps were skipped, %d of them for a gradient that was not finite and the others since every "
                "token that had an advantage was rejected (or, under a KL budget, all completions were masked out), so "
                "most of this run trained nothing: raise "
                "capo_fisher_threshold, capo_hessian_low and capo_hessian_high (`capo calibrate` finds them), or lower "
                "learning_rate; capo_mode='monitor' shows what would be rejected and changes nothing",
                updates.steps_skipped,
                steps,
                updates.steps_nonfinite,
            )

    # ---- a step ----------------------------------------------------------------------------------------------------

    def on_step_begin(self, args, state, control, **kwargs):
        """Before the first micro-batch: what of the schedule's learning rate the coming step may have."""
        self.coming = Coming()
        if self.region is not None:
            if self.trainer.is_deepspeed_enabled:
                self.region.before_step()
            self.coming.scale = self.region.scale

    def look_ahead(self) -> None:
        """Find out whether the figures of the coming step will be logged, and whether its KL is to be measured."""
        args, state, step = self.trainer.args, self.trainer.state, self.trainer.state.global_step + 1
        if args.logging_strategy == "steps":
            logged = step % state.logging_steps == 0
        else:  # the dataloader knows its end one batch ahead, and a step's batches are fetched before the first is used
            last = self.trainer.accelerator.gradient_state.end_of_dataloader or step >= state.max_steps
            logged = args.logging_strategy == "epoch" and last
        self.coming.to_log = logged = logged or (step == 1 and args.logging_first_step)
        self.coming.to_measure = step % args.capo_kl_every == 0 if args.capo_kl_every else logged

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Advance the step model, or skip a step that has nothing left in it, or whose gradient is not finite."""
        trainer, updates, planner, coming = self.trainer, self.updates, self.planner, self.coming
        if not updates.micro_batches:
            raise RuntimeError(
                f"{type(trainer).__name__}'s loss went around CAPOTrainer's, so no token was looked at: call "
                "`super()._compute_loss`, or use capo_mode='off'"
            )
        finite = self._gradient_is_finite()
        changes, share = args.changes_the_run, 1.0
        # A loss scaler leaves such a step out by itself. Without one it is TRL's to take, and the moments are NaN.
        scales = trainer.is_deepspeed_enabled or getattr(trainer.accelerator, "scaler", None) is not None
        unusable = not finite and (changes or scales)
        # DeepSpeed has taken the step already, with a gradient of zero, and the step model follows it.
        masks = not unusable and args.capo_mode == "mask" and not trainer.is_deepspeed_enabled
        rejected = masks and planner is not None and planner.rejects_everything
        # Without a token there is no KL to measure and none to hold to a budget, but momentum would move the weights.
        coming.empty = self.measures and updates.is_empty
        unbounded = coming.empty and self.budget is not None and not trainer.is_deepspeed_enabled
        coming.skipped = unusable or rejected or unbounded
        if coming.skipped:
            if changes and not trainer.is_deepspeed_enabled:
                # Without gradients the optimizer leaves weights and moments alone; with zeros its momentum would act.
                trainer.model.zero_grad(set_to_none=True)
            figures = updates.skip(coming.to_log, nonfinite=unusable)
        else:
            # Gradients are averaged over processes after the weights were read off.
            factor = self.clipped_by(finite) / trainer.accelerator.num_processes
            figures = updates.commit(factor, coming.to_log)
            if planner is not None and changes:
                share = planner.shared(figures)
            # asked only where a control learns from it: it costs a reduction over processes
            coming.informative = self.budget is None or updates.has_gradient
        if self.region is not None:
            if not coming.skipped and not trainer.is_deepspeed_enabled:
                if self.budget is not None and not self.noise_known:
                    self.noise_known = True
                    figures["capo/kl/noise"] = self.region.check_noise(lambda: self.measure_kl().mean)
                coming.scale = self.region.before_step(share)
            figures["capo/learning_rate"] = self.region.lr()
        trainer.record_figures(figures | updates.counts() | {"capo/completions": float(trainer.completions)})

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Give the learning rate back before the scheduler looks at it."""
        if self.region is not None:
            self.region.restore()

    def on_step_end(self, args, state, control, **kwargs):
        """Measure the KL of the update where it is to be logged or bounded, and start afresh."""
        trainer, updates, coming = self.trainer, self.updates, self.coming
        if self.measures:
            synchronise(trainer.accelerator.device)  # the optimizer's step is not part of the measurement
        start = time.perf_counter()
        moved: Moved | None = None  # when last measured

        def measure_kl() -> float:
            nonlocal moved
            moved = self.measure_kl()
            return moved.mean

        figures: dict[str, float] = {}
        if args.changes_the_run:
            figures["capo/scale"] = coming.scale
        if coming.skipped or coming.empty:
            pass  # the policy is where it was, or nothing is known of it
        elif self.budget is not None:
            assert self.region is not None
            update = self.region.after_step(measure_kl, coming.informative)
            assert update is not None
            figures |= update.figures()
        elif coming.to_measure:
            figures["capo/kl/measured"] = measure_kl()
        if moved is not None:
            if moved.m_f is not None:
                figures["capo/kl/rank_correlation"] = rank_correlation(moved.kl, moved.m_f)
            figures["capo/kl/seconds"] = time.perf_counter() - start
        self._write_tokens()
        if updates.processes.count > 1:
            figures["capo/bytes"] = float(updates.processes.take_bytes())
        trainer.record_figures(figures | {"capo/seconds": updates.clear()})
        trainer.measuring.clear()

    def measure_kl(self) -> Moved:
        """How far the weights as they are now are from the policy before the step, on the sampled tokens."""
        measuring = self.trainer.measuring
        measuring.reshard()
        head = self.trainer.backbone.head(self.trainer.model_wrapped)
        if self.planner is None:
            return self.updates.measured_kl(measuring.hidden_now, head)
        samples = [forward.sample for forward in measuring.forwards]
        return self.planner.measured_kl(measuring.hidden_now, head, samples)

    def clipped_by(self, finite: bool) -> float:
        """What clipping multiplied the gradient by, as the optimizer's moments see it."""
        largest = self.trainer.args.max_grad_norm
        if not finite:
            return math.nan
        if self.coming.norm is None or not largest > 0:
            return 1.0
        return min(1.0, largest / (self.coming.norm + 1e-6))

    def _gradient_is_finite(self) -> bool:
        """Whether the coming step's gradient has neither NaN nor infinity, in any process."""
        trainer, device = self.trainer, self.trainer.args.device
        if trainer.is_deepspeed_enabled:
            return not trainer.accelerator.optimizer_step_was_skipped  # it looked by itself, and has taken the step
        if self.coming.norm is not None:
            finite = math.isfinite(self.coming.norm)
        else:
            trainer.accelerator.unscale_gradients()  # as clipping would have
            gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
            shards = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
            norms = [torch.linalg.vector_norm(shard, dtype=torch.float32).to(device) for shard in shards]
            finite = not norms or bool(torch.stack(norms).isfinite().all())
        return not self.updates.processes.total(torch.tensor(float(not finite), device=device)).item()

    def _write_tokens(self) -> None:
        """Write what each token of the step got, where that is asked for; a resumed run writes the same again."""
        args, state = self.trainer.args, self.trainer.state
        every = args.capo_tokens_every
        if every is not None and state.global_step % every == 0 and state.is_world_process_zero:
            judged_by = {"mode": args.capo_mode, "granularity": args.capo_granularity}
            assert self.planner is not None
            rollouts = self.coming.rollouts
            write_step(args.output_dir, step_tokens(state.global_step, self.planner, rollouts, **judged_by))
