"""CAPO on TRL: `GRPOTrainer` whose gradient leaves out the tokens that the curvature model rejects.

Change two names in a script, `GRPOConfig` to `CAPOConfig` and `GRPOTrainer` to `CAPOTrainer`.

How it hooks in. TRL fuses the output head into the loss, so neither logits nor a call of `lm_head` is to be seen.
The backbone is a module, and runs once for each loss; a forward hook there yields the hidden states. TRL computes
the log-probabilities first and reads `inputs["advantages"]` afterwards, and takes an advantage for each token, so
the mask is written between the two, into a copy of the inputs. No loss body is copied, and the weights each token
really had in the loss (ratio, clipping, denominators, KL term) are read off the gradient of the log-probabilities.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from capo_rl.curvature.head import Head
from capo_rl.curvature.last_layer import LastLayer
from capo_rl.curvature.selection import subset_numbers
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import DECIDING, Fit, choose, fit_of_class, fit_of_name, fit_of_optimizer, group_of
from capo_rl.planning.micro_batch import check_hooked, marked
from capo_rl.planning.planner import Planner
from capo_rl.planning.telemetry import rank_correlation, synchronise
from capo_rl.planning.trust_region import TrustRegion, check_recomputable, way_back
from capo_rl.planning.updates import Moved, Updates
from capo_rl.rewards.guarded import Guarded, guarded
from capo_rl.runs.model_card import model_card
from capo_rl.runs.models import check_head
from capo_rl.runs.records import versions
from capo_rl.runs.tokens import rewind_steps, step_tokens, write_step
from capo_rl.settings.config import CAPOConfig
from capo_rl.settings.own import control_of, planner_of, step_of, updates_of
from capo_rl.trainers.measuring import Measuring
from capo_rl.trainers.rounding import RoundedAway
from capo_rl.trainers.state import ROLLOUTS_FILE, STATE_FILE, load_rollouts, load_state, save_rollouts, save_state

logger = logging.getLogger(__name__)

# What `optim` may be where Adam's step is recomputed.
_RECOMPUTED = ("adamw_torch", "adamw_torch_fused")
# Figures that count from the start of the run.
_TOTALS = {"capo/steps_skipped", "capo/steps_skipped/nonfinite", "capo/completions", "capo/accepted_tokens"}
# How much of a token's gradient may, by rounding, not be that of its own advantage.
_OWN_ADVANTAGE = 0.05
# Batches one after another without any reward that end the run.
_UNREWARDED = 3
# What TRL passes to reward functions itself, beside the columns of the data.
_PASSED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


class CAPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with curvature-aware selection; arguments are the same, `args` is a `CAPOConfig`.

    Its only change to training is the length of the step and, with `capo_mode="mask"`, what is in it:

        trust_region   the step is as long as `capo_kl_budget` allows (`trust_region.TrustRegion`); nothing is predicted
                       unless `capo_watch` asks for it
        mask           rejected tokens get an advantage of zero, and denominators count accepted tokens
                       (`selection.accepted_mean`); a step with every token rejected is skipped; with `capo_share` the
                       step is multiplied by the accepted tokens' share (`share.Share`)
        shorten        no token is left out, and the step is multiplied by that share
        monitor        computes and logs the same as `mask` and changes nothing
        off            TRL

    In the modes that change the run a step whose gradient is not finite is skipped. In every mode a reward function
    that fails on a batch loses that batch and not the run (`rewards.guarded`), unless no completion of three batches in
    a row has any reward.

    Raises `RuntimeError` when the hook does not see what the loss uses: a mask that silently does nothing is worse
    than a crash.
    """

    _name = "CAPO"
    base_model: str | None = None  # as the user named it, where that is not in its config
    _unscored_told = False
    _unrewarded: dict[str, int] | None = None  # batches in a row; a stock trainer that is watched has no such limit

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: CAPOConfig | None = None, *more: Any, **kwargs: Any
    ) -> None:
        if args is not None and not isinstance(args, CAPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}: CAPOTrainer takes a CAPOConfig, which has the same fields"
            )
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = CAPOConfig(f"{name.split('/')[-1]}-CAPO")
        # By name, since other trainers between this one and GRPOTrainer may take them in no other way.
        named = inspect.signature(GRPOTrainer.__init__).bind_partial(self, model, None, None, *more).arguments
        placed = dict(list(named.items())[4:])
        _check_columns(*({**placed, **kwargs}.get(name) for name in ("train_dataset", "eval_dataset")))
        super().__init__(model, reward_funcs=reward_funcs, args=args, **placed, **kwargs)
        # Those that an environment brings among them; a reward model that raises ends the run.
        given: list[Any] = self.reward_funcs  # type: ignore[has-type]
        self.reward_funcs = [each if isinstance(each, nn.Module | Guarded) else guarded(each) for each in given]
        self._unrewarded = {"train": 0, "eval": 0}
        self._watch()

    def _watch(self) -> None:
        """Set up what selection needs beside TRL's own."""
        args = self.args
        self.updates: Updates | None = None  # none in `off`
        self._completions = 0
        self._coming = _Coming()
        self._unplanned: dict[str, Any] | None = None  # the inputs of a loss whose log-probs are still to come
        self._measuring = Measuring(self, args.capo_kl_sample)
        # DeepSpeed keeps the weights that count to itself, so there is no way back along its steps.
        self._budget = control_of(args, args.learning_rate, None if self.is_deepspeed_enabled else way_back)
        self._recomputes = self._budget is not None and args.capo_kl_control == "optimizer"
        self._region: TrustRegion | None = None  # of the modes that change the run, when there is an optimizer
        self._lr_ratio = 1.0  # of the last layer's learning rate to the first group's
        self._noise_known = False  # whether the KL of no step was measured
        self._unwrapped: tuple[Any, Any] | None = None  # a model, and the causal language model inside it
        self._check_loss()
        entropy = getattr(args, "entropy_coef", 0.0) != 0 or getattr(args, "use_adaptive_entropy", False)
        if entropy and args.capo_mode in ("monitor", *DECIDING) and self.is_world_process_zero():
            logger.warning(
                "%s: the gradient of the entropy bonus does not go through log pi(a), so the step model's moments are "
                "without it, and m_H, m_F, the share and the predicted KL are those of the rest of the loss "
                "(docs/algorithm.md); capo_mode='trust_region' measures whole steps",
                "use_adaptive_entropy" if getattr(args, "use_adaptive_entropy", False) else "entropy_coef",
            )
        if args.capo_mode != "off":
            causal_lm = self._causal_lm(self.model)
            check_head(causal_lm, type(causal_lm).__name__)
            if args.predicts:
                self._fit = self._known_fit()
                step = self._step_model(choose(args.capo_step, args.capo_mode, self._fit))
                self.updates = planner_of(args, step, args.temperature)
            else:
                self.updates = updates_of(args, args.temperature)
            self.add_callback(_AroundTheStep(self))
        self.add_callback(RoundedAway(self))  # after the other, which gives the step its learning rate
        if self._recomputes and self.optimizer is not None:
            check_recomputable(self._optimizer())
        elif self._recomputes and self.optimizer_cls_and_kwargs is None and args.optim not in _RECOMPUTED:
            name = getattr(args.optim, "value", args.optim)
            raise ValueError(
                f"capo_kl_control='optimizer' recomputes the step of torch's AdamW, and optim={name!r} is "
                f"another: use optim={_RECOMPUTED[0]!r}, or capo_kl_control='copy'"
            )
        if self.is_deepspeed_enabled:
            self._check_deepspeed()

    @property
    def planner(self) -> Planner | None:
        """What predicts the coming step, where anything does (`CAPOConfig.predicts`)."""
        return self.updates if isinstance(self.updates, Planner) else None

    def _check_loss(self) -> None:
        """A mask is written into the advantages, one a token, which only GRPOTrainer's own loss is known to read."""
        classes = type(self).__mro__
        loss = next(each for each in classes[classes.index(CAPOTrainer) + 1 :] if "_compute_loss" in vars(each))
        if self.args.capo_mode == "mask" and loss is not GRPOTrainer:
            raise TypeError(
                f"capo_mode='mask' gives each token its own advantage, and the loss is {loss.__name__}'s, which may "
                "take one for a sequence: use capo_mode='trust_region', 'shorten' or 'monitor', which leave them alone"
            )

    def _known_fit(self) -> Fit:
        """Which step model fits, as far as it is known before the optimizer is made."""
        if self.optimizer is not None:
            return fit_of_optimizer(self.optimizer)
        if self.optimizer_cls_and_kwargs is not None:
            return fit_of_class(*self.optimizer_cls_and_kwargs)
        return fit_of_name(self.args.optim, self.args.optim_args)

    def _follow_optimizer(self) -> None:
        """Take the step model's constants from the optimizer that was made, and see that it is what it was to be."""
        if self.planner is None:
            return
        args, step, optimizer = self.args, self.planner.step, self._optimizer()
        if self.is_deepspeed_enabled:
            return  # its optimizer is a wrapper of its own kind
        fit = fit_of_optimizer(optimizer)
        if fit.model != self._fit.model:  # made by a subclass
            self._fit = fit
            if not isinstance(step, type(self._step_model(choose(args.capo_step, args.capo_mode, fit)))):
                raise ValueError(
                    f"the optimizer is {fit.name} and optim={getattr(args.optim, 'value', args.optim)!r}, by which "
                    f"capo_step='auto' chose: set capo_step={fit.model or 'adam'!r}"
                )
        at = group_of(optimizer, self._causal_lm(self.model).get_output_embeddings().weight)
        first, own = (optimizer.param_groups[i] for i in (0, at))
        if at and first.get("initial_lr"):
            self._lr_ratio = own["initial_lr"] / first["initial_lr"]
        if isinstance(step, AdamStep) and fit.model == "adam":
            step.betas = (float(own["betas"][0]), float(own["betas"][1]))
            step.eps = float(own["eps"])
            if self.planner.share is not None:
                self.planner.share.beta2 = step.betas[1]

    def _step_model(self, model: str) -> AdamStep | SGDStep:
        """The model of the optimizer's step, with the constants of `args`."""
        args = self.args
        return step_of(args, model, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)

    def _check_deepspeed(self) -> None:
        """DeepSpeed takes its step inside the backward pass, before anything of the step is known but its rollouts."""
        args = self.args
        if args.kl_budget is not None and args.capo_kl_control != "learning_rate":
            raise ValueError(
                f"capo_kl_control={args.capo_kl_control!r} moves weights of a step that DeepSpeed has taken already: "
                "use 'learning_rate', which sets the coming step's"
            )
        if args.capo_mode == "shorten" or (args.capo_mode == "mask" and args.capo_share):
            raise ValueError(
                f"capo_mode={args.capo_mode!r} with the accepted tokens' share shortens a step that DeepSpeed has "
                "taken already: use capo_mode='trust_region', or capo_mode='mask' with capo_share=False"
            )

    # ---- rollouts: REINFORCE's advantage, group numbers, counts -------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._rewards_per_func = rewards
        missing = rewards.isnan().all(dim=1)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["capo/rewards_missing"].append(missing.sum().item())
        if self._unrewarded is not None:
            self._unrewarded[mode] = self._unrewarded[mode] + 1 if missing.all() else 0
            if self._unrewarded[mode] == _UNREWARDED:
                raise RuntimeError(self._no_rewards())
        return rewards

    def _no_rewards(self) -> str:
        named = zip(self.reward_func_names, self.reward_funcs, strict=True)
        errors = "; ".join(
            f"{name}: {getattr(reward, 'error', None) or 'None or NaN for every completion'}" for name, reward in named
        )
        return (
            f"no completion of {_UNREWARDED} batches in a row has a reward, so nothing is trained: {errors}. The "
            "traceback of a reward function that raised is in the log where it first did; mend it, and go on"
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "importance_sampling_ratio" in output:
            self._tell_unscored(output)
        local = len(inputs)
        first = self.accelerator.process_index * local
        weights = self.reward_weights.to(self._rewards_per_func.device)
        rewards = (self._rewards_per_func * weights).nansum(dim=1)  # a completion without a reward gets 0
        if self.args.capo_tokens_every is not None:
            missing = self._rewards_per_func.isnan().all(dim=1)
            output["capo_reward"] = rewards.where(~missing, math.nan)[first : first + local]
        if self.args.capo_advantage == "reward":
            output["advantages"] = rewards[first : first + local]
            for _ in range(len(rewards)):
                self._logs["advantages"].pop()
            self._logs["advantages"].extend(rewards.tolist())
        if self.args.capo_granularity == "group":
            generations = self.num_generations if self.model.training else self.num_generations_eval
            output["capo_group"] = torch.arange(first, first + local, device=output["advantages"].device) // generations
        if self.model.training:
            self._completions += local * self.accelerator.num_processes
        return output

    def _tell_unscored(self, output: dict[str, Any]) -> None:
        """Count the tokens whose log-probability the sampler could not say, and say so once; collective."""
        mask = output["completion_mask"].bool()
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        unscored = (output["sampling_per_token_logps"].isnan() & mask).sum()
        some, tokens = self.accelerator.reduce(torch.stack([unscored, mask.sum()])).tolist()
        self._metrics["train" if self.model.training else "eval"]["capo/unscored_tokens"].append(float(some))
        if some and not self._unscored_told and self.is_world_process_zero():
            self._unscored_told = True
            logger.warning(
                "of %d of %d sampled tokens the server gave NaN for the log-probability, so how far its policy is from "
                "the trainer's is not known there, and TRL counts them with a ratio of 1: look for what overflows in "
                "the server, as half precision may (said once; capo/unscored_tokens goes on counting)",
                some,
                tokens,
            )

    # ---- the loss: shifts and selection between log-probabilities and advantages --------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.updates is None or not self.model.training:
            return super()._compute_loss(model, inputs)
        self._unplanned = inputs = dict(inputs)  # buffered inputs are used again when num_iterations > 1
        loss = super()._compute_loss(model, inputs)
        if self._unplanned is not None:
            raise RuntimeError(
                "the loss never asked for its log-probabilities through `_get_per_token_logps_and_entropies`, so no "
                "token was selected: this version of TRL is not supported"
            )
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        score = partial(
            super()._get_per_token_logps_and_entropies,
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        inputs, self._unplanned = self._unplanned, None
        if inputs is None:
            return score(model)
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        self._coming.to_log, self._coming.to_measure = self._due()
        measured = self._coming.to_measure or self._budget is not None
        before = self._measuring.random_state(model) if measured else []
        with self._hidden_states(model, logits_to_keep) as hidden:
            logps, entropies, aux_loss = score(model)
        if measured:
            self._measuring.remember(score, mask, self._weighed(inputs, mask, logps), before)
        self._select(model, inputs, mask, hidden[0], logps)
        if self.args.capo_tokens_every is not None:
            self._coming.rollouts.append((inputs, mask))
        return logps, entropies, aux_loss

    def _select(self, model: nn.Module, inputs: dict[str, Any], mask: Tensor, hidden: Tensor, logps: Tensor) -> None:
        """Plan the micro-batch, write its verdicts into `inputs`, and watch for the weights the loss gives it."""
        assert self.updates is not None
        planner, head = self.planner, self._head(model)
        if planner is None:
            sample = self._measuring.forwards[-1].sample
            sampled = marked(mask, sample)
            seen = self.updates.look(hidden[sampled], head, inputs["completion_ids"][sampled], sample)
            self._check_log_probs(seen.layer, logps.detach()[sampled], hidden.dtype)
            seen.watch(logps, mask, self._loss_scale())
            return
        planner.step.lr = self._get_learning_rate() * self._lr_ratio * self._coming.scale
        planned = planner.plan(
            hidden[mask],
            head,
            inputs["completion_ids"][mask],
            self._weighed(inputs, mask, logps)[mask],
            subset_numbers(self.args.capo_granularity, mask, inputs.get("capo_group")),
            None if (before := self._sampled_log_pi(inputs, logps)) is None else before[mask],
            # as where nothing is predicted, and the KL is the same number
            self._measuring.forwards[-1].sample if self.args.capo_mode == "trust_region" else None,
        )
        self._check_log_probs(planned.layer, logps.detach()[mask], hidden.dtype)

        planned.watch(logps, mask, self._loss_scale())
        if self.args.capo_mode != "mask":
            return
        written = planned.masked(self._advantages(inputs, mask), mask, self.loss_type, self._loss_scale())
        inputs["advantages"] = written
        gradients: dict[str, Tensor] = {}

        def check_written(gradient: Tensor) -> None:
            gradients["advantage"] = (written.detach() * gradient)[mask]
            self._check_own_advantages(**gradients)

        def check_rejected(gradient: Tensor) -> None:
            # With a KL term a rejected token still has a gradient, and with a loss of NaN all have one.
            left = gradient[mask][~planned.keep]
            if self.beta == 0.0 and (left[left.isfinite()] != 0).any():
                raise RuntimeError(
                    "a rejected token still has a gradient, so the loss did not read the advantages CAPO wrote: "
                    "this version of TRL is not supported"
                )
            gradients["log_prob"] = gradient[mask]
            self._check_own_advantages(**gradients)

        written.register_hook(check_written)
        logps.register_hook(check_rejected)

    @staticmethod
    def _advantages(inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """TRL's, one for each token [B, T]."""
        advantages = inputs["advantages"]
        return (advantages[:, None] if advantages.dim() == 1 else advantages).expand(mask.shape)

    def _weighed(self, inputs: dict[str, Any], mask: Tensor, logps: Tensor) -> Tensor:
        """The same as the loss weighs them by who sampled: times the ratio that corrects for a sampler with another
        policy (vLLM's), and zero in a sequence that `off_policy_mask_threshold` drops. With the ratio the mean of
        A u hᵀ over the sampler's tokens is that over the policy's own; a token without one has no advantage.
        """
        advantages, ratio = self._advantages(inputs, mask), inputs.get("importance_sampling_ratio")
        if ratio is not None and self.loss_type != "vespo":  # which has it in another place
            advantages = advantages * ratio
        if self.off_policy_mask_threshold is None:
            return advantages
        sampled = self._sampled_log_pi(inputs, logps)
        kept = self.get_off_policy_mask(
            advantages=advantages,
            per_token_logps=logps,
            sampling_per_token_logps=logps.detach() if sampled is None else sampled,
            mask=mask.long(),
            off_policy_threshold=self.off_policy_mask_threshold,
        )
        return advantages * kept

    @staticmethod
    def _sampled_log_pi(inputs: dict[str, Any], logps: Tensor) -> Tensor | None:
        """log π(a) [B, T] under the policy that sampled, or the present one's where it could not say; None where it is
        the present one."""
        sampled = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        return None if sampled is None else sampled.where(~sampled.isnan(), logps.detach())

    def _check_own_advantages(self, advantage: Tensor | None = None, log_prob: Tensor | None = None) -> None:
        """Raises `RuntimeError` where a loss spread a token's advantage over others, as one that takes an advantage for
        each sequence would: where a ratio is not clipped, A ∂L/∂A and ∂L/∂log π(a) are the same."""
        if advantage is None or log_prob is None or self.beta != 0.0 or self.importance_sampling_level != "token":
            return
        moved = (log_prob != 0) & advantage.isfinite() & log_prob.isfinite()
        difference = (advantage - log_prob)[moved].norm()
        if difference > _OWN_ADVANTAGE * log_prob[moved].norm():
            raise RuntimeError(
                "a token's gradient is not that of its own advantage, so the loss did not read the advantages CAPO "
                "wrote as one a token: use a loss that does, or capo_mode='trust_region', which writes none"
            )

    def _check_log_probs(self, layer: LastLayer, logps: Tensor, dtype: torch.dtype) -> None:
        half = dtype.itemsize < 4 or self.accelerator.mixed_precision != "no"
        check_hooked(layer, logps, half, "the hooked hidden states give", "the backbone and the head")

    # ---- hidden states and logits ---------------------------------------------------------------------------------

    def _causal_lm(self, model: Any) -> Any:
        """The causal language model inside its wrappers, looked for once: Accelerate takes milliseconds to unwrap."""
        if self._unwrapped is None or self._unwrapped[0] is not model:
            causal_lm = self.accelerator.unwrap_model(model)
            self._unwrapped = model, causal_lm.get_base_model() if is_peft_model(causal_lm) else causal_lm
        return self._unwrapped[1]

    @contextmanager
    def _hidden_states(self, model: nn.Module, logits_to_keep: int) -> Iterator[list[Tensor]]:
        """Collects the hidden states [B, T, d] that predict the last `logits_to_keep` tokens in a forward pass.

        Raises `RuntimeError` unless the backbone ran exactly once.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0].detach()[:, :-1][:, -logits_to_keep:])

        handle = self._causal_lm(model).base_model.register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()
        if len(seen) != 1:
            raise RuntimeError(
                f"the hook on the backbone fired {len(seen)} times in one forward pass instead of once: CAPO can't "
                "see the hidden states of this model, and does not train on without them"
            )

    def _head(self, model: nn.Module) -> Head:
        causal_lm = self._causal_lm(model)
        head = causal_lm.get_output_embeddings()
        return Head(head.weight, head.bias, _logit_scale(causal_lm), self.accelerator.autocast)

    # ---- around the optimizer's step -----------------------------------------------------------------------------

    def _due(self) -> tuple[bool, bool]:
        """Whether the figures of the coming step will be logged, and whether its KL is to be measured."""
        args, step = self.args, self.state.global_step + 1
        if args.logging_strategy == "steps":
            logged = step % self.state.logging_steps == 0
        else:  # the dataloader knows its end one batch ahead, and a step's batches are fetched before the first is used
            last = self.accelerator.gradient_state.end_of_dataloader or step >= self.state.max_steps
            logged = args.logging_strategy == "epoch" and last
        logged = logged or (step == 1 and args.logging_first_step)
        return logged, step % args.capo_kl_every == 0 if args.capo_kl_every else logged

    def _loss_scale(self) -> float:
        """The factor of mixed-precision loss scaling, which the optimizer takes out again."""
        scaler = getattr(self.accelerator, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._coming.norm = None if norm is None else float(norm)
        return norm

    def _begin_step(self) -> None:
        """Before the first micro-batch: what of the schedule's learning rate the coming step may have."""
        self._coming = _Coming()
        if self._region is not None:
            if self.is_deepspeed_enabled:
                self._region.before_step()
            self._coming.scale = self._region.scale

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # which computes it where nothing is clipped
        self._coming.norm = None if norm is None else float(norm)
        return norm

    def _gradient_is_finite(self) -> bool:
        """Whether the coming step's gradient has neither NaN nor infinity, in any process."""
        assert self.updates is not None
        if self.is_deepspeed_enabled:
            return not self.accelerator.optimizer_step_was_skipped  # it looked by itself, and has taken the step
        if self._coming.norm is not None:
            finite = math.isfinite(self._coming.norm)
        else:
            self.accelerator.unscale_gradients()  # as clipping would have
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            shards = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
            norms = [torch.linalg.vector_norm(shard, dtype=torch.float32).to(self.args.device) for shard in shards]
            finite = not norms or bool(torch.stack(norms).isfinite().all())
        return not self.updates.processes.total(torch.tensor(float(not finite), device=self.args.device)).item()

    def _clip(self, finite: bool) -> float:
        """What clipping multiplied the gradient by, as the optimizer's moments see it."""
        if not finite:
            return math.nan
        if self._coming.norm is None or not self.args.max_grad_norm > 0:
            return 1.0
        return min(1.0, self.args.max_grad_norm / (self._coming.norm + 1e-6))

    def _before_step(self) -> None:
        """Advance the step model, or skip a step that has nothing left in it, or whose gradient is not finite."""
        updates, planner = self.updates, self.planner
        assert updates is not None
        if not updates.micro_batches:
            raise RuntimeError(
                f"{type(self).__name__}'s loss went around CAPOTrainer's, so no token was looked at: call "
                "`super()._compute_loss`, or use capo_mode='off'"
            )
        finite = self._gradient_is_finite()
        changes, share = self.args.changes_the_run, 1.0
        # A loss scaler leaves such a step out by itself. Without one it is TRL's to take, and the moments are NaN.
        unusable = not finite and (changes or self._has_scaler())
        # DeepSpeed has taken the step already, with a gradient of zero, and the step model follows it.
        masks = not unusable and self.args.capo_mode == "mask" and not self.is_deepspeed_enabled
        rejected = masks and planner is not None and planner.rejects_everything
        # Without a token there is no KL to measure and none to hold to a budget, but momentum would move the weights.
        self._coming.empty = (self._coming.to_measure or self._budget is not None) and updates.is_empty
        unbounded = self._coming.empty and self._budget is not None and not self.is_deepspeed_enabled
        self._coming.skipped = unusable or rejected or unbounded
        if self._coming.skipped:
            if changes and not self.is_deepspeed_enabled:
                # Without gradients the optimizer leaves weights and moments alone; with zeros its momentum would act.
                self.model.zero_grad(set_to_none=True)
            figures = updates.skip(self._coming.to_log, nonfinite=unusable)
        else:
            # Gradients are averaged over processes after the weights were read off.
            figures = updates.commit(self._clip(finite) / self.accelerator.num_processes, self._coming.to_log)
            if planner is not None and changes:
                share = planner.shared(figures)
            # asked only where a control learns from it: it costs a reduction over processes
            self._coming.informative = self._budget is None or updates.has_gradient
        if self._region is not None:
            if not self._coming.skipped and not self.is_deepspeed_enabled:
                if self._budget is not None and not self._noise_known:
                    self._noise_known = True
                    figures["capo/kl/noise"] = self._region.check_noise(lambda: self._measure_kl().mean)
                self._coming.scale = self._region.before_step(share)
            figures["capo/learning_rate"] = self._region.lr()
        self._record(figures | updates.counts() | {"capo/completions": float(self._completions)})

    def _after_optimizer(self) -> None:
        """Give the learning rate back before the scheduler looks at it."""
        if self._region is not None:
            self._region.restore()

    def _start(self) -> None:
        """Forget what a training that was broken off in the middle of a step has left."""
        assert self.updates is not None
        if self._recomputes:
            check_recomputable(self._optimizer())
        self._follow_optimizer()
        if self._region is not None:
            self._region.restore()
        self._region = TrustRegion(self._optimizer(), self._budget) if self.args.changes_the_run else None
        self.updates.clear()
        self._measuring.forwards.clear()
        self._coming, self._unplanned = _Coming(), None

    def _end(self) -> None:
        """Say so where most of the run's steps were left out."""
        updates, steps = self.updates, self.state.global_step
        assert updates is not None
        if 2 * updates.steps_skipped > steps and self.is_world_process_zero():
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

    def _has_scaler(self) -> bool:
        return self.is_deepspeed_enabled or getattr(self.accelerator, "scaler", None) is not None

    def _after_step(self) -> None:
        """Measure the KL of the update where it is to be logged or bounded, and start afresh."""
        updates = self.updates
        assert updates is not None
        if self._budget is not None or self._coming.to_measure:
            synchronise(self.accelerator.device)  # the optimizer's step is not part of the measurement
        start = time.perf_counter()
        moved: Moved | None = None  # when last measured

        def measure_kl() -> float:
            nonlocal moved
            moved = self._measure_kl()
            return moved.mean

        figures: dict[str, float] = {}
        if self.args.changes_the_run:
            figures["capo/scale"] = self._coming.scale
        if self._coming.skipped or self._coming.empty:
            pass  # the policy is where it was, or nothing is known of it
        elif self._budget is not None:
            assert self._region is not None
            update = self._region.after_step(measure_kl, self._coming.informative)
            assert update is not None
            figures |= update.figures()
        elif self._coming.to_measure:
            figures["capo/kl/measured"] = measure_kl()
        if moved is not None:
            if moved.m_f is not None:
                figures["capo/kl/rank_correlation"] = rank_correlation(moved.kl, moved.m_f)
            figures["capo/kl/seconds"] = time.perf_counter() - start
        self._record_tokens()
        if updates.processes.count > 1:
            figures["capo/bytes"] = float(updates.processes.take_bytes())
        self._record(figures | {"capo/seconds": updates.clear()})
        self._measuring.forwards.clear()

    def _measure_kl(self) -> Moved:
        """How far the weights as they are now are from the policy before the step, on the sampled tokens."""
        assert self.updates is not None
        self._measuring.reshard()
        head = self._head(self.model_wrapped)
        if self.planner is None:
            return self.updates.measured_kl(self._measuring.hidden_now, head)
        return self.planner.measured_kl(
            self._measuring.hidden_now, head, [forward.sample for forward in self._measuring.forwards]
        )

    def _record_tokens(self) -> None:
        """Write what each token of the step got, where that is asked for; a resumed run writes the same again."""
        args, step = self.args, self.state.global_step
        every = args.capo_tokens_every
        if every is not None and step % every == 0 and self.is_world_process_zero():
            judged_by = {"mode": args.capo_mode, "granularity": args.capo_granularity}
            assert self.planner is not None
            write_step(args.output_dir, step_tokens(step, self.planner, self._coming.rollouts, **judged_by))

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it

    def _record(self, figures: dict[str, float]) -> None:
        metrics = self._metrics["train"]
        for name, value in figures.items():
            # TRL logs the mean since it last logged; of a total that is running the last is meant
            metrics[name] = [value] if name in _TOTALS else [*metrics[name], value]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the run's folder: the model, CAPO and what to cite (`model_card`)."""
        if not self.is_world_process_zero():
            return
        known = get_config_model_id(self.model.config) or "a model"
        on_hub = self.base_model is None and not Path(known).exists()
        given = self.base_model or (known if on_hub else Path(known).name)
        text = model_card(
            model_name or Path(self.args.output_dir).name,
            given,
            self.args.capo_mode,
            versions(),
            on_hub=on_hub,
            dataset=dataset_name,
            tags=sorted({*self._tag_names, "capo", *([tags] if isinstance(tags, str) else tags or [])}),
        )
        Path(self.args.output_dir, "README.md").write_text(text, encoding="utf-8")

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        process = self.accelerator.process_index
        # In the middle of a generation batch the rest of it is still to be trained on.
        if self._buffered_inputs is not None and self._step % (self.args.steps_per_generation * self.num_iterations):
            path = Path(output_dir, ROLLOUTS_FILE.format(process=process))
            if lost := save_rollouts(path, self._buffered_inputs):
                logger.warning(
                    "%s: completions that are still to be trained on have %s, which a checkpoint can't hold: a run "
                    "that goes on from here generates them anew",
                    output_dir,
                    ", ".join(lost),
                )
        if not self.args.should_save:
            return
        # The same in every process, so one of them writes it.
        tensors: dict[str, Tensor] = {}
        counters: dict[str, Any] = {
            "completions": self._completions,
            "micro_steps": self._step,
            "processes": self.accelerator.num_processes,
            "predicts": self.planner is not None,
        }
        if self.updates is not None:
            counters |= {
                "steps_skipped": self.updates.steps_skipped,
                "steps_nonfinite": self.updates.steps_nonfinite,
                "budget": {} if self._budget is None else self._budget.state_dict(),
                "noise_known": self._noise_known,
            }
        if self.planner is not None:
            tensors = self.planner.step.state_dict()
            counters |= {
                "accepted_tokens": self.planner.accepted_tokens,
                "share": {} if self.planner.share is None else self.planner.share.state_dict(),
            }
        save_state(Path(output_dir, STATE_FILE), tensors, counters)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if not path.exists():
            if self.args.capo_mode == "monitor":
                logger.warning("%s is missing: the step model's moments start from zero, and are off for a while", path)
                return
            raise FileNotFoundError(
                f"{path} is missing: {checkpoint} is not a checkpoint of CAPOTrainer. To start from its weights "
                "without resuming, pass the folder as the model"
            )
        tensors, counters = load_state(path, self.accelerator.device)
        self._completions, self._step = counters["completions"], counters["micro_steps"]
        if self.updates is not None:
            self.updates.steps_skipped = counters.get("steps_skipped", 0)
            self.updates.steps_nonfinite = counters.get("steps_nonfinite", 0)
            self._noise_known = counters.get("noise_known", False)
            if self._budget is not None and (kept := counters.get("budget")):
                self._budget.load_state_dict(kept)
        predicted = counters.get("predicts", True)
        if self.planner is not None and not predicted and self.args.capo_mode not in DECIDING:
            logger.warning("%s has no moments of a step model: they start from zero, and are off for a while", path)
        elif self.planner is not None:
            self.planner.accepted_tokens = counters.get("accepted_tokens", 0)
            if self.planner.share is not None and (kept := counters.get("share")):
                self.planner.share.load_state_dict(kept)
            self.planner.step.load_state_dict(tensors)
        if counters["processes"] != self.accelerator.num_processes:
            self._step = 0  # a generation batch starts here
            logger.warning(
                "%s was written by %d processes and goes on with %d: weights, moments and counters are the same; "
                "completions that were not trained on yet are generated anew, and random numbers differ",
                checkpoint,
                counters["processes"],
                self.accelerator.num_processes,
            )
            return
        path = Path(checkpoint, ROLLOUTS_FILE.format(process=self.accelerator.process_index))
        if path.exists():
            self._buffered_inputs = load_rollouts(path, self.accelerator.device)


@dataclass
class _Coming:
    """What is known of one optimizer step; each has its own."""

    to_log: bool = True  # whether its figures will be
    to_measure: bool = True  # whether its KL is
    scale: float = 1.0  # of the schedule's learning rate
    norm: float | None = None  # of its gradient, before clipping
    skipped: bool = False  # whether it was left out
    empty: bool = False  # whether it has no tokens to measure its KL on
    informative: bool = True  # whether it has a gradient of its own
    rollouts: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)  # each micro-batch's inputs and mask


class _AroundTheStep(TrainerCallback):
    """Calls the trainer before and after each optimizer step, and the whole training."""

    def __init__(self, trainer: CAPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._start()
        if args.capo_tokens_every is not None and state.is_world_process_zero:
            rewind_steps(args.output_dir, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._begin_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._end()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._after_optimizer()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._after_step()


def _check_columns(*datasets: Any) -> None:
    """Raises `ValueError` for a column that a reward function would get twice, or not at all."""
    for dataset in datasets:
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if taken := [name for name in getattr(part, "column_names", None) or () if name in _PASSED]:
                raise ValueError(
                    f"the data has a column `{taken[0]}`, and TRL passes something of its own by that name to reward "
                    "functions: rename the column, or remove it"
                )


def _logit_scale(causal_lm: Any) -> float:
    """The factor between W h and the logits, as TRL's fused head reads it from the model's config."""
    config = causal_lm.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
