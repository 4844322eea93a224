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
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id

from capo_rl.curvature.head import Head
from capo_rl.curvature.selection import subset_numbers
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import DECIDING, Fit, choose, fit_of_class, fit_of_name, fit_of_optimizer, group_of
from capo_rl.planning.planner import MicroBatch, Planner
from capo_rl.planning.rerun import drew, random_numbers, random_state, reshard, sampled_rows
from capo_rl.planning.telemetry import rank_correlation, synchronise
from capo_rl.planning.trust_region import TrustRegion, check_recomputable, way_back
from capo_rl.rewards.guarded import Guarded, guarded
from capo_rl.runs.model_card import model_card
from capo_rl.runs.models import check_head
from capo_rl.runs.records import versions, written_whole
from capo_rl.runs.tokens import rewind_steps, step_tokens, write_step
from capo_rl.settings.config import CAPOConfig
from capo_rl.settings.own import control_of, planner_of, step_of

STATE_FILE = "capo_state.safetensors"
# Rollouts that are still to be trained on, of each process its own.
ROLLOUTS_FILE = "capo_rollouts_{process}.safetensors"

logger = logging.getLogger(__name__)

# Arguments of TRL's scoring that are not the model's.
_SCORING = {"logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss"}
# What `optim` may be where Adam's step is recomputed.
_RECOMPUTED = ("adamw_torch", "adamw_torch_fused")
# Figures that count from the start of the run.
_TOTALS = {"capo/steps_skipped", "capo/steps_skipped/nonfinite", "capo/completions", "capo/accepted_tokens"}
# Where every process has the whole model, which can then run without its wrapper.
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

# Mean |difference| of log π(a) between the hooked hidden states and the loss's own, above which they are not the same
# thing: in single precision, and where half precision may round the two projections differently.
_LOGP_TOLERANCE, _LOGP_TOLERANCE_HALF = 1e-3, 0.1
# How much of a token's gradient may, by rounding, not be that of its own advantage.
_OWN_ADVANTAGE = 0.05
# Batches one after another without any reward that end the run.
_UNREWARDED = 3
# What TRL passes to reward functions itself, beside the columns of the data.
_PASSED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


class CAPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with curvature-aware selection; arguments are the same, `args` is a `CAPOConfig`.

    Its only change to training is the length of the step and, with `capo_mode="mask"`, what is in it:

        trust_region   the step is as long as `capo_kl_budget` allows (`trust_region.TrustRegion`)
        mask           rejected tokens get an advantage of zero, and denominators count accepted tokens
                       (`selection.accepted_mean`); a step with every token rejected is skipped; with `capo_share` the
                       step is multiplied by the accepted tokens' share (`share.Share`)
        shorten        no token is left out, and the step is multiplied by that share
        monitor        computes and logs the same and changes nothing
        off            TRL

    In the modes that change the run a step whose gradient is not finite is skipped. In every mode a reward function
    that fails on a batch loses that batch and not the run (`rewards.guarded`), unless no completion of three batches in
    a row has any reward.

    Raises `RuntimeError` when the hook does not see what the loss uses: a mask that silently does nothing is worse
    than a crash.
    """

    _name = "CAPO"
    base_model: str | None = None  # as the user named it, where that is not in its config
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
        self.planner: Planner | None = None
        self._completions = 0
        self._norm: float | None = None  # of the coming step's gradient, before clipping
        self._unplanned: dict[str, Any] | None = None  # the inputs of a loss whose log-probs are still to come
        self._forwards: list[_Forward] = []  # to measure an update
        self._rollouts: list[tuple[dict[str, Any], Tensor]] = []  # to record tokens: each micro-batch's inputs and mask
        # DeepSpeed keeps the weights that count to itself, so there is no way back along its steps.
        self._budget = control_of(args, args.learning_rate, None if self.is_deepspeed_enabled else way_back)
        self._recomputes = self._budget is not None and args.capo_kl_control == "optimizer"
        self._region: TrustRegion | None = None  # of the modes that change the run, when there is an optimizer
        self._scale = 1.0  # of the step's learning rate
        self._lr_ratio = 1.0  # of the last layer's learning rate to the first group's
        self._skipped = False  # whether the last step was left out
        self._empty = False  # whether it has no tokens to measure its KL on
        self._noise_known = False  # whether the KL of no step was measured
        self._informative = True  # whether the coming step has a gradient of its own
        self._to_log = self._to_measure = True  # whether the coming step is
        self._unwrapped: tuple[Any, Any] | None = None  # a model, and the causal language model inside it
        self._generators: list[torch.device] | None = None  # the devices whose random numbers the model may draw
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
            self._fit = self._known_fit()
            step = self._step_model(choose(args.capo_step, args.capo_mode, self._fit))
            self.planner = planner_of(args, step, args.temperature)
            self.add_callback(_AroundTheStep(self))
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
        assert self.planner is not None
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

    # ---- the loss: shifts and selection between log-probabilities and advantages --------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.planner is None or not self.model.training:
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
        self._to_log, self._to_measure = self._due()
        measured = self._to_measure or self._budget is not None
        before = random_state(self._devices(model)) if measured else []
        with self._hidden_states(model, logits_to_keep) as hidden:
            logps, entropies, aux_loss = score(model)
        after = random_state(self._devices(model)) if measured else []
        self._select(model, inputs, mask, hidden[0], logps)
        if measured:
            self._remember(score, mask, before if drew(before, after) else None)
        if self.args.capo_tokens_every is not None:
            self._rollouts.append((inputs, mask))
        return logps, entropies, aux_loss

    def _select(self, model: nn.Module, inputs: dict[str, Any], mask: Tensor, hidden: Tensor, logps: Tensor) -> None:
        """Plan the micro-batch, write its verdicts into `inputs`, and watch for the weights the loss gives it."""
        assert self.planner is not None
        advantages = inputs["advantages"]
        advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).expand(mask.shape)
        self.planner.step.lr = self._get_learning_rate() * self._lr_ratio * self._scale
        planned = self.planner.plan(
            hidden[mask],
            self._head(model),
            inputs["completion_ids"][mask],
            advantages[mask],
            subset_numbers(self.args.capo_granularity, mask, inputs.get("capo_group")),
            None if (old := inputs.get("old_per_token_logps")) is None else old[mask],
        )
        self._check_log_probs(planned, logps.detach()[mask], hidden.dtype)

        planned.watch(logps, mask, self._loss_scale())
        if self.args.capo_mode != "mask":
            return
        written = planned.masked(advantages, mask, self.loss_type, self._loss_scale())
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

    def _check_log_probs(self, planned: MicroBatch, logps: Tensor, dtype: torch.dtype) -> None:
        error = (planned.layer.log_pi_a - logps).abs()
        error = error[error.isfinite()]
        half = dtype.itemsize < 4 or self.accelerator.mixed_precision != "no"
        if len(error) and error.mean() > (_LOGP_TOLERANCE_HALF if half else _LOGP_TOLERANCE):
            raise RuntimeError(
                f"the hooked hidden states give log-probabilities that differ from the loss's by {error.mean():.3g} "
                "nats on average: something lies between the backbone and the head that CAPO does not model"
            )

    # ---- hidden states and logits ---------------------------------------------------------------------------------

    def _causal_lm(self, model: Any) -> Any:
        """The causal language model inside its wrappers, looked for once: Accelerate takes milliseconds to unwrap."""
        if self._unwrapped is None or self._unwrapped[0] is not model:
            causal_lm = self.accelerator.unwrap_model(model)
            self._unwrapped = model, causal_lm.get_base_model() if is_peft_model(causal_lm) else causal_lm
        return self._unwrapped[1]

    def _devices(self, model: Any) -> list[torch.device]:
        """Where the model's random numbers come from: the CPU's generator, and that of each device it lies on."""
        if self._generators is None:
            used = {weight.device for weight in self._causal_lm(model).parameters()} | {self.accelerator.device}
            self._generators = [torch.device("cpu"), *(device for device in used if device.type not in ("cpu", "meta"))]
        return self._generators

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
        self._norm = None if norm is None else float(norm)
        return norm

    def _begin_step(self) -> None:
        """Before the first micro-batch: what of the schedule's learning rate the coming step may have."""
        if self._region is not None:
            if self.is_deepspeed_enabled:
                self._region.before_step()
            self._scale = self._region.scale

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # which computes it where nothing is clipped
        self._norm = None if norm is None else float(norm)
        return norm

    def _gradient_is_finite(self) -> bool:
        """Whether the coming step's gradient has neither NaN nor infinity, in any process."""
        assert self.planner is not None
        if self.is_deepspeed_enabled:
            return not self.accelerator.optimizer_step_was_skipped  # it looked by itself, and has taken the step
        if self._norm is not None:
            finite = math.isfinite(self._norm)
        else:
            self.accelerator.unscale_gradients()  # as clipping would have
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            shards = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
            norms = [torch.linalg.vector_norm(shard, dtype=torch.float32).to(self.args.device) for shard in shards]
            finite = not norms or bool(torch.stack(norms).isfinite().all())
        return not self.planner.processes.total(torch.tensor(float(not finite), device=self.args.device)).item()

    def _clip(self, finite: bool) -> float:
        """What clipping multiplied the gradient by, as the optimizer's moments see it."""
        if not finite:
            return math.nan
        if self._norm is None or not self.args.max_grad_norm > 0:
            return 1.0
        return min(1.0, self.args.max_grad_norm / (self._norm + 1e-6))

    def _before_step(self) -> None:
        """Advance the step model, or skip a step that has nothing left in it, or whose gradient is not finite."""
        planner = self.planner
        assert planner is not None
        if not planner.micro_batches:
            raise RuntimeError(
                f"{type(self).__name__}'s loss went around CAPOTrainer's, so no token was looked at: call "
                "`super()._compute_loss`, or use capo_mode='off'"
            )
        finite = self._gradient_is_finite()
        changes, share = self.args.changes_the_run, 1.0
        # A loss scaler leaves such a step out by itself. Without one it is TRL's to take, and the moments are NaN.
        unusable = not finite and (changes or self._has_scaler())
        # DeepSpeed has taken the step already, with a gradient of zero, and the step model follows it.
        masked = self.args.capo_mode == "mask"
        rejected = not unusable and masked and not self.is_deepspeed_enabled and planner.rejects_everything
        # Without a token there is no KL to measure and none to hold to a budget, but momentum would move the weights.
        self._empty = (self._to_measure or self._budget is not None) and planner.is_empty
        unbounded = self._empty and self._budget is not None and not self.is_deepspeed_enabled
        self._skipped = unusable or rejected or unbounded
        if self._skipped:
            if changes and not self.is_deepspeed_enabled:
                # Without gradients the optimizer leaves weights and moments alone; with zeros its momentum would act.
                self.model.zero_grad(set_to_none=True)
            figures = planner.skip(self._to_log, nonfinite=unusable)
        else:
            # Gradients are averaged over processes after the weights were read off.
            figures = planner.commit(self._clip(finite) / self.accelerator.num_processes, self._to_log)
            if planner.share is not None and changes:
                share = planner.share.value
                if "capo/kl/predicted" in figures:  # of the step as it will be taken
                    figures["capo/kl/predicted"] *= share**2
            # asked only where a control learns from it: it costs a reduction over processes
            self._informative = self._budget is None or planner.has_gradient
        self._norm = None
        if self._region is not None:
            if not self._skipped and not self.is_deepspeed_enabled:
                if self._budget is not None and not self._noise_known:
                    self._noise_known = True
                    figures["capo/kl/noise"] = self._region.check_noise(lambda: self._measure_kl()[0])
                self._scale = self._region.before_step(share)
            figures["capo/learning_rate"] = self._region.lr()
        figures["capo/steps_skipped"] = float(planner.steps_skipped)
        figures["capo/steps_skipped/nonfinite"] = float(planner.steps_nonfinite)
        figures["capo/completions"] = float(self._completions)
        self._record(figures)

    def _after_optimizer(self) -> None:
        """Give the learning rate back before the scheduler looks at it."""
        if self._region is not None:
            self._region.restore()

    def _start(self) -> None:
        """Forget what a training that was broken off in the middle of a step has left."""
        assert self.planner is not None
        if self._recomputes:
            check_recomputable(self._optimizer())
        self._follow_optimizer()
        if self._region is not None:
            self._region.restore()
        self._region = TrustRegion(self._optimizer(), self._budget) if self.args.changes_the_run else None
        self.planner.clear()
        self._forwards.clear()
        self._rollouts.clear()
        self._unplanned = self._norm = None

    def _end(self) -> None:
        """Say so where most of the run's steps were left out."""
        planner, steps = self.planner, self.state.global_step
        assert planner is not None
        if 2 * planner.steps_skipped > steps and self.is_world_process_zero():
            logger.warning(
                "%d of %d steps were skipped, %d of them for a gradient that was not finite and the others since every "
                "token that had an advantage was rejected (or, under a KL budget, all completions were masked out), so "
                "most of this run trained nothing: raise "
                "capo_fisher_threshold, capo_hessian_low and capo_hessian_high (`capo calibrate` finds them), or lower "
                "learning_rate; capo_mode='monitor' shows what would be rejected and changes nothing",
                planner.steps_skipped,
                steps,
                planner.steps_nonfinite,
            )

    def _has_scaler(self) -> bool:
        return self.is_deepspeed_enabled or getattr(self.accelerator, "scaler", None) is not None

    def _after_step(self) -> None:
        """Measure the KL of the update where it is to be logged or bounded, and start afresh."""
        planner = self.planner
        assert planner is not None
        if self._budget is not None or self._to_measure:
            synchronise(self.accelerator.device)  # the optimizer's step is not part of the measurement
        start = time.perf_counter()
        tokens: tuple[Tensor, Tensor] | None = None  # KL and m_F of each, when last measured

        def measure_kl() -> float:
            nonlocal tokens
            kl, tokens = self._measure_kl()
            return kl

        figures: dict[str, float] = {}
        if self.args.changes_the_run:
            figures["capo/scale"] = self._scale
        if self._skipped or self._empty:
            pass  # the policy is where it was, or nothing is known of it
        elif self._budget is not None:
            assert self._region is not None
            update = self._region.after_step(measure_kl, self._informative)
            assert update is not None
            figures["capo/kl/measured"] = update.measured
            figures["capo/kl/proposed"] = update.proposed
            figures["capo/kl/fraction"] = update.fraction
        elif self._to_measure:
            figures["capo/kl/measured"] = measure_kl()
        if tokens is not None:
            figures["capo/kl/rank_correlation"] = rank_correlation(*tokens)
            figures["capo/kl/seconds"] = time.perf_counter() - start
        self._record_tokens(planner)
        if planner.processes.count > 1:
            figures["capo/bytes"] = float(planner.processes.take_bytes())
        self._record(figures | {"capo/seconds": planner.clear()})
        self._forwards.clear()

    def _measure_kl(self) -> tuple[float, tuple[Tensor, Tensor]]:
        """The mean KL over the sampled tokens from the policy before the step to that of the weights now; and each
        token's KL and m_F."""
        assert self.planner is not None
        self._reshard()
        sample = [forward.sample for forward in self._forwards]
        mean, *tokens = self.planner.measured_kl(self._hidden_now, self._head(self.model_wrapped), sample)
        return mean, (tokens[0], tokens[1])

    def _record_tokens(self, planner: Planner) -> None:
        """Write what each token of the step got, where that is asked for; a resumed run writes the same again."""
        args, step = self.args, self.state.global_step
        every = args.capo_tokens_every
        if every is not None and step % every == 0 and self.is_world_process_zero():
            judged_by = {"mode": args.capo_mode, "granularity": args.capo_granularity}
            write_step(args.output_dir, step_tokens(step, planner, self._rollouts, **judged_by))
        self._rollouts.clear()

    def _remember(self, score: partial[Any], mask: Tensor, random: list[Tensor] | None) -> None:
        """Keep what it takes to run a micro-batch's backbone again, on the sample of its completions to be measured.

        `random` is where the generators stood before the loss's forward, if that drew from them (dropout, noise on
        embeddings, a router's jitter). The same numbers come again only to the same shapes, so then the whole
        micro-batch is run, and the sample is taken from its tokens.
        """
        assert self.planner is not None
        inputs = {name: score.keywords[name] for name in ("input_ids", "attention_mask")}
        more = sorted(name for name in score.keywords.keys() - inputs - _SCORING if score.keywords[name] is not None)
        # of more inputs it is not known which belong to a completion
        sample = 1.0 if more else self.args.capo_kl_sample
        rows = sampled_rows(mask, self.planner.micro_batches[-1].advantages, sample)
        sampled = torch.zeros_like(mask)
        sampled[rows] = mask[rows]
        run_on = sampled
        if sample < 1 and random is None:
            inputs = {name: value[rows] for name, value in inputs.items()}
            run_on = mask[rows]
        if more or is_peft_model(self.model) or self.accelerator.distributed_type not in _WHOLE:
            # Through TRL's scoring, which knows what to do with more inputs, and the wrapper, which brings shards
            # together or may prepend the tokens of a tuned prompt.
            run = partial(score.func, **score.keywords | inputs | {"logits_to_keep": 1, "compute_entropy": False})
        else:
            run = partial(self._run_backbone, **inputs)
        self._forwards.append(_Forward(run, run_on, sampled[mask], random))

    def _run_backbone(self, model: nn.Module, **inputs: Tensor) -> None:
        with self.accelerator.autocast():
            self._causal_lm(model).base_model(**inputs, use_cache=False)

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it

    def _hidden_now(self, micro_batch: int) -> Tensor:
        """The hidden states of a micro-batch's tokens under the weights as they are now."""
        forward = self._forwards[micro_batch]
        with (
            random_numbers(self._devices(self.model_wrapped), forward.random),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._hidden_states(self.model_wrapped, forward.mask.shape[1]) as hidden,
        ):
            forward.run(self.model_wrapped)
        self._reshard()
        return hidden[0][forward.mask]

    def _reshard(self) -> None:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            reshard(self.model_wrapped)

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
            parts = {f"{i}.{name}": v for i, inputs in enumerate(self._buffered_inputs) for name, v in inputs.items()}
            tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
            others = {name: value for name, value in parts.items() if name not in tensors}
            if lost := sorted({name.split(".", 1)[1] for name, value in others.items() if not _is_plain(value)}):
                logger.warning(
                    "%s: completions that are still to be trained on have %s, which a checkpoint can't hold: a run "
                    "that goes on from here generates them anew",
                    output_dir,
                    ", ".join(lost),
                )
            else:
                _save(Path(output_dir, ROLLOUTS_FILE.format(process=process)), tensors, others)
        if not self.args.should_save:
            return
        # The same in every process, so one of them writes it.
        tensors = {}
        counters: dict[str, Any] = {
            "completions": self._completions,
            "micro_steps": self._step,
            "processes": self.accelerator.num_processes,
        }
        if self.planner is not None:
            tensors = self.planner.step.state_dict()
            counters |= {
                "accepted_tokens": self.planner.accepted_tokens,
                "steps_skipped": self.planner.steps_skipped,
                "steps_nonfinite": self.planner.steps_nonfinite,
                "budget": {} if self._budget is None else self._budget.state_dict(),
                "noise_known": self._noise_known,
                "share": {} if self.planner.share is None else self.planner.share.state_dict(),
            }
        _save(Path(output_dir, STATE_FILE), tensors, counters)

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
        tensors, counters = _load(path, self.accelerator.device)
        self._completions, self._step = counters["completions"], counters["micro_steps"]
        if self.planner is not None:
            self.planner.accepted_tokens = counters.get("accepted_tokens", 0)
            self.planner.steps_skipped = counters.get("steps_skipped", 0)
            self.planner.steps_nonfinite = counters.get("steps_nonfinite", 0)
            self._noise_known = counters.get("noise_known", False)
            if self._budget is not None and (kept := counters.get("budget")):
                self._budget.load_state_dict(kept)
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
            rollouts: dict[int, dict[str, Any]] = {}
            tensors, others = _load(path, self.accelerator.device)
            for name, value in (tensors | others).items():
                i, key = name.split(".", 1)
                rollouts.setdefault(int(i), {})[key] = value
            self._buffered_inputs = [rollouts[i] for i in sorted(rollouts)]


@dataclass(frozen=True)
class _Forward:
    """A micro-batch's backbone, to run again: on some completions, whose tokens are `mask` [b, T] in the forward and
    `sample` [n] among the tokens of the micro-batch; from the `random` numbers it drew in the loss, if it drew any."""

    run: Callable[[nn.Module], Any]
    mask: Tensor
    sample: Tensor
    random: list[Tensor] | None


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


def _save(path: Path, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    with written_whole(path) as unfinished:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            unfinished,
            metadata={"counters": json.dumps(counters)},
        )


def _load(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:  # safetensors knows no "cpu:0", which is how Accelerate counts CPUs
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, json.loads(file.metadata()["counters"])


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back as it was."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


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
