"""CAPO on TRL: `GRPOTrainer` whose gradient leaves out the tokens that the curvature model rejects.

Change two names in a script, `GRPOConfig` to `CAPOConfig` and `GRPOTrainer` to `CAPOTrainer`.

How it hooks in. A hook on the backbone (`backbone`) yields the hidden states of the loss's own forward pass. TRL
computes the log-probabilities first and reads `inputs["advantages"]` afterwards, and takes an advantage for each token,
so the mask (`masking`) is written between the two, into a copy of the inputs. No loss body is copied, and the weights
each token really had in the loss (ratio, clipping, denominators, KL term) are read off the gradient of the
log-probabilities. What happens around the optimizer's step is `optimizer_steps`.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from capo_rl.curvature.last_layer import LastLayer
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import subset_numbers
from capo_rl.planning.micro_batch import check_hooked, marked
from capo_rl.planning.planner import Planner
from capo_rl.planning.updates import Updates
from capo_rl.rewards.guarded import Guarded, guarded
from capo_rl.runs.model_card import model_card
from capo_rl.runs.models import check_head
from capo_rl.runs.records import versions
from capo_rl.settings.config import CAPOConfig
from capo_rl.settings.own import planner_of, updates_of
from capo_rl.trainers.backbone import Backbone
from capo_rl.trainers.checks import check_columns, check_deepspeed, check_loss, warn_of_entropy
from capo_rl.trainers.masking import tokens_of, write_verdicts
from capo_rl.trainers.measuring import Measuring
from capo_rl.trainers.optimizer_steps import OptimizerSteps
from capo_rl.trainers.rollouts import Unrewarded, amend
from capo_rl.trainers.rounding import RoundedAway
from capo_rl.trainers.samplers import Unscored, sampled_log_pi, weighed
from capo_rl.trainers.state import load_beside, save_beside
from capo_rl.trainers.step_choice import known_fit, step_model

# Figures that count from the start of the run.
_TOTALS = {"capo/steps_skipped", "capo/steps_skipped/nonfinite", "capo/completions", "capo/accepted_tokens"}


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
    completions: int  # generated since the run began
    updates: Updates | None  # none in `off`
    backbone: Backbone
    measuring: Measuring
    optimizer_steps: OptimizerSteps | None  # none in `off`
    _unrewarded: Unrewarded | None = None  # a stock trainer that is watched has no such limit

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
        check_columns(*({**placed, **kwargs}.get(name) for name in ("train_dataset", "eval_dataset")))
        super().__init__(model, reward_funcs=reward_funcs, args=args, **placed, **kwargs)
        # Those that an environment brings among them; a reward model that raises ends the run.
        given: list[Any] = self.reward_funcs  # type: ignore[has-type]
        self.reward_funcs = [each if isinstance(each, nn.Module | Guarded) else guarded(each) for each in given]
        self._unrewarded = Unrewarded()
        self.prepare_selection()

    def prepare_selection(self) -> None:
        """Set up what selection needs beside TRL's own; the constructor has done so."""
        args = self.args
        self.completions = 0
        self.updates, self.optimizer_steps = None, None
        self.backbone, self.measuring = Backbone(self), Measuring(self, args.capo_kl_sample)
        self._unscored = Unscored()
        check_loss(self, CAPOTrainer)
        if self.is_world_process_zero():
            warn_of_entropy(args)
        if args.capo_mode != "off":
            causal_lm = self.backbone.causal_lm(self.model)
            check_head(causal_lm, type(causal_lm).__name__)
            fit = known_fit(self) if args.predicts else None
            if fit is None:
                self.updates = updates_of(args, args.temperature)
            else:
                processes = Processes()
                self.updates = planner_of(args, step_model(args, fit, processes), args.temperature, processes)
            self.optimizer_steps = OptimizerSteps(self, fit)
            self.add_callback(self.optimizer_steps)
        self.add_callback(RoundedAway(self))  # after the other, which gives the step its learning rate
        if self.is_deepspeed_enabled:
            check_deepspeed(args)

    @property
    def planner(self) -> Planner | None:
        """What predicts the coming step, where anything does (`CAPOConfig.predicts`)."""
        return self.updates if isinstance(self.updates, Planner) else None

    # ---- rollouts ------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._rewards_per_func = rewards
        missing = rewards.isnan().all(dim=1)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["capo/rewards_missing"].append(missing.sum().item())
        if self._unrewarded is not None:
            self._unrewarded.count(self, mode, bool(missing.all()))
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "importance_sampling_ratio" in output:
            self._unscored.count(self, output)
        amend(self, output, len(inputs), self._rewards_per_func)
        if self.model.training:
            self.completions += len(inputs) * self.accelerator.num_processes
        return output

    # ---- the loss: shifts and selection between log-probabilities and advantages --------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.updates is None or not self.model.training:
            return super()._compute_loss(model, inputs)
        assert self.optimizer_steps is not None
        coming = self.optimizer_steps.coming
        coming.unplanned = inputs = dict(inputs)  # buffered inputs are used again when num_iterations > 1
        loss = super()._compute_loss(model, inputs)
        if coming.unplanned is not None:
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
        steps = self.optimizer_steps
        if steps is None or (inputs := steps.coming.unplanned) is None:
            return score(model)
        steps.coming.unplanned = None
        mask = tokens_of(inputs)
        steps.look_ahead()
        before = self.measuring.random_state(model) if steps.measures else []
        with self.backbone.hidden_states(model, logits_to_keep) as hidden:
            logps, entropies, aux_loss = score(model)
        if steps.measures:
            self.measuring.remember(score, mask, weighed(self, inputs, mask, logps), before)
        self._select(model, inputs, mask, hidden[0], logps)
        if self.args.capo_tokens_every is not None:
            steps.coming.rollouts.append((inputs, mask))
        return logps, entropies, aux_loss

    def _select(self, model: nn.Module, inputs: dict[str, Any], mask: Tensor, hidden: Tensor, logps: Tensor) -> None:
        """Plan the micro-batch, write its verdicts into `inputs`, and watch for the weights the loss gives it."""
        assert self.updates is not None and self.optimizer_steps is not None
        planner, steps, head, loss_scale = self.planner, self.optimizer_steps, self.backbone.head(model), self._scale()
        if planner is None:
            sample = self.measuring.forwards[-1].sample
            sampled = marked(mask, sample)
            seen = self.updates.look(hidden[sampled], head, inputs["completion_ids"][sampled], sample)
            self._check_log_probs(seen.layer, logps.detach()[sampled], hidden.dtype)
            seen.watch(logps, mask, loss_scale)
            return
        planner.step.lr = self._get_learning_rate() * steps.lr_ratio * steps.coming.scale
        planned = planner.plan(
            hidden[mask],
            head,
            inputs["completion_ids"][mask],
            weighed(self, inputs, mask, logps)[mask],
            subset_numbers(self.args.capo_granularity, mask, inputs.get("capo_group")),
            None if (by := sampled_log_pi(inputs, logps)) is None else by[mask],
            # as where nothing is predicted, and the KL is the same number
            self.measuring.forwards[-1].sample if self.args.capo_mode == "trust_region" else None,
        )
        self._check_log_probs(planned.layer, logps.detach()[mask], hidden.dtype)
        planned.watch(logps, mask, loss_scale)
        if self.args.capo_mode == "mask":
            write_verdicts(
                inputs,
                planned,
                mask,
                logps,
                loss_type=self.loss_type,
                loss_scale=loss_scale,
                kl_term=self.beta != 0.0,
                by_token=self.importance_sampling_level == "token",
            )

    def _check_log_probs(self, layer: LastLayer, logps: Tensor, dtype: torch.dtype) -> None:
        half = dtype.itemsize < 4 or self.accelerator.mixed_precision != "no"
        check_hooked(layer, logps, half, "the hooked hidden states give", "the backbone and the head")

    def _scale(self) -> float:
        """The factor of mixed-precision loss scaling, which the optimizer takes out again."""
        scaler = getattr(self.accelerator, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    # ---- around the optimizer's step -----------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._noted(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._noted(super()._get_grad_norm(model, grad_norm=grad_norm))  # computed where nothing is clipped

    def _noted(self, norm: Any) -> Any:
        if self.optimizer_steps is not None:
            # With shards it is a sum still to be made; before torch 2.10 its float() is this process's part of it.
            whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self.optimizer_steps.coming.norm = None if whole is None else float(whole)
        return norm

    def record_figures(self, figures: dict[str, float]) -> None:
        """Have figures of a step logged when TRL logs next."""
        metrics = self._metrics["train"]
        for name, value in figures.items():
            # TRL logs the mean since it last logged; of a total that is running the last is meant
            metrics[name] = [value] if name in _TOTALS else [*metrics[name], value]

    # ---- what is left on disk --------------------------------------------------------------------------------------

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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_beside(self, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_beside(self, Path(checkpoint))
