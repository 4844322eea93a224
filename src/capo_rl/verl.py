"""CAPO on verl: an FSDP engine whose gradient leaves out the tokens that the curvature model rejects.

Needs the extra `capo-rl[verl]`. Loading this module (`VERL_USE_EXTERNAL_MODULES=capo_rl.verl`) registers `CAPOEngine`
for this machine's accelerator, where verl's registry looks before it looks for verl's own; `CAPOActorConfig` in the
place of verl's actor config (`actor._target_`) carries the settings and switches it on. Nothing of verl is changed.

How it hooks in. verl's FSDP engine calls the output head as a module, so a forward hook there yields its input h and
its output W h, unsharded, before the temperature; nothing is projected twice. `prepare_model_outputs` makes of them the
log-probabilities that the loss reads; the shifts are computed there, and a hook on those log-probabilities reads off
the weight each token had in the loss. The loss itself is wrapped: it gets a copy of the micro-batch with the mask in
its advantages. `optimizer_step` returns the gradient's norm, hence the clipping factor. The mathematics is `planner`'s.

The seam (an engine subclass with an overridden `prepare_model_outputs` and a wrapped loss function) is that of verl's
own engines, verl/workers/engine.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    from verl.utils import tensordict_utils
    from verl.utils.device import get_device_name, get_vendor
    from verl.workers.config import FSDPActorConfig
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.padding import no_padding_2_padding, response_to_nested
except ImportError as error:
    raise ImportError(
        f"capo_rl.verl needs verl 0.9 and Ray, which the extra capo-rl[verl] installs ({error}); "
        "how to install it beside TRL is in docs/verl.md"
    ) from error

from capo_rl.curvature.last_layer import logit_rows
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds, accepted_mean, check_bounds
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.planning.planner import MicroBatch, Planner
from capo_rl.runs.models import check_head
from capo_rl.runs.records import written_whole

# Wherever TRL is installed, verl's FSDP engine changes a method of a class that TRL 1.16 no longer has: an empty one.
_trl = importlib.util.find_spec("trl")
if _trl and not any(Path(folder, "experimental", "ppo").exists() for folder in _trl.submodule_search_locations or ()):
    _ppo = types.ModuleType("trl.experimental.ppo")
    vars(_ppo)["AutoModelForCausalLMWithValueHead"] = type("AutoModelForCausalLMWithValueHead", (), {})
    sys.modules[_ppo.__name__] = _ppo

STATE_FILE = "capo_state.safetensors"

# The loss of `selection.accepted_mean` that has the denominator of each of verl's aggregations.
AGGREGATIONS = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum": "dr_grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "token-sum": "dr_grpo",
}

# Policy losses that are one term a token, proportional to its own advantage: an advantage of zero leaves the token out.
MASKABLE_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "gpg", "cispo")

_CHOICES = {"mode": ("off", "monitor", "mask"), "step": ("adam", "sgd"), "fisher": ("sampled", "expected")}

# As in `trl`: mean |difference| of log π(a) between the head's own output and what the loss reads.
_LOGP_TOLERANCE, _LOGP_TOLERANCE_HALF = 1e-3, 0.1


@dataclass(frozen=True)
class CAPOSettings:
    """The fields of `CAPOConfig` that verl's adapter has, under the same names and with the same defaults.

    Raises `ValueError`, naming the field and the fix, for a value out of range.
    """

    mode: str = "mask"
    fisher_threshold: float | None = 1e-4
    hessian_low: float | None = -1e-2
    hessian_high: float | None = 1e-2
    step: str = "adam"
    fisher: str = "sampled"
    top_k: int | None = 50
    top_p: float | None = None
    max_missing_mass: float = 0.1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"actor.capo.{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        names = ("actor.capo.fisher_threshold", "actor.capo.hessian_low", "actor.capo.hessian_high")
        check_bounds(self.fisher_threshold, self.hessian_low, self.hessian_high, names)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"actor.capo.top_k={self.top_k} must be at least 1, or null for the whole vocabulary")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"actor.capo.top_p={self.top_p} is a probability: give it in (0, 1], or null for all of top_k"
            )
        if not 0 <= self.max_missing_mass <= 1:
            raise ValueError(f"actor.capo.max_missing_mass={self.max_missing_mass} is a probability: give it in [0, 1]")

    @property
    def thresholds(self) -> Thresholds:
        """The bounds of Eq. 11 as one object."""
        return Thresholds(self.fisher_threshold, (self.hessian_low, self.hessian_high))

    @classmethod
    def of(cls, given: Any) -> CAPOSettings:
        """The settings written under `actor.capo`: a mapping, or nothing."""
        given = dict(given or {})
        if unknown := set(given) - {each.name for each in fields(cls)}:
            known = ", ".join(each.name for each in fields(cls))
            raise ValueError(f"actor.capo has no {', '.join(sorted(unknown))}: it has {known}")
        if given.get("mode") is False:  # how YAML reads a bare `off`
            given["mode"] = "off"
        return cls(**given)


@dataclass
class CAPOActorConfig(FSDPActorConfig):
    """verl's `FSDPActorConfig` with `capo`: name it in `actor_rollout_ref.actor._target_`.

    Raises `ValueError`, naming the field and the fix, for what the adapter cannot do.
    """

    _mutable_fields = FSDPActorConfig._mutable_fields | {"capo"}

    capo: Any = field(default_factory=CAPOSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.capo, CAPOSettings):
            self.capo = CAPOSettings.of(self.capo)
        if self.capo.mode == "off":
            return
        _refuse(self.strategy not in ("fsdp", "fsdp2"), f"strategy={self.strategy!r}", "is not FSDP", "use 'fsdp2'")
        chosen = EngineRegistry.get_engine_cls("language_model", self.strategy)
        _refuse(
            not issubclass(chosen, CAPOEngine),
            f"strategy={self.strategy!r}",
            f"selects verl's {chosen.__name__} here",
            "unset VERL_ENGINE_DEVICE and VERL_ENGINE_VENDOR",
        )
        split = max(self.ulysses_sequence_parallel_size, self.fsdp_config.ulysses_sequence_parallel_size)
        _refuse(split > 1, f"ulysses_sequence_parallel_size={split}", "splits a sequence over processes", "use 1")
        _refuse(self.use_fused_kernels, "use_fused_kernels=True", "hides the output head", "set it to false")
        _refuse(self.use_prefix_grouper, "use_prefix_grouper=True", "moves tokens between sequences", "set it to false")
        if self.capo.mode == "mask":
            _refuse(
                self.policy_loss.loss_mode not in MASKABLE_LOSSES,
                f"policy_loss.loss_mode={self.policy_loss.loss_mode!r}",
                "does not leave a token out when its advantage is zero",
                f"use one of {', '.join(MASKABLE_LOSSES)}, or capo.mode=monitor",
            )
            _refuse(
                self.loss_agg_mode not in AGGREGATIONS,
                f"loss_agg_mode={self.loss_agg_mode!r}",
                "has no mean over accepted tokens",
                f"use one of {', '.join(AGGREGATIONS)}, or capo.mode=monitor",
            )


def _refuse(condition: bool, setting: str, reason: str, fix: str) -> None:
    if condition:
        raise ValueError(f"actor.{setting} {reason}, which CAPO can't work with: {fix}")


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=get_device_name(), vendor=get_vendor()
)
class CAPOEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine with curvature-aware selection, for training with a `CAPOActorConfig`.

    Its only change to training, with `capo.mode=mask`: rejected tokens get an advantage of zero, and denominators count
    accepted tokens (`selection.accepted_mean`); a step with every token rejected is skipped. `monitor` computes and
    logs the same and changes nothing; `off`, evaluation and the reference policy are verl's own.

    Raises `RuntimeError` when the hooks do not see what the loss uses: a mask that silently does nothing is worse than
    a crash.
    """

    planner: Planner | None = None
    _actor: CAPOActorConfig | None = None  # of the loss that is being trained
    _head: list[tuple[Tensor, Tensor]] | None = None  # while training: what went through the output head, h and W h
    _planned: MicroBatch | None = None  # the micro-batch whose loss is still to come
    _figures: dict[str, float]
    _restored: dict[str, Tensor] | None = None

    # ---- one mini-batch, one optimizer step ----------------------------------------------------------------------

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        self._actor = _actor_config(loss_function)
        if self._actor.capo.mode == "off":
            return super().train_batch(data, loss_function)
        self._figures = {}
        outputs = super().train_batch(data, loss_function)
        outputs["metrics"] |= {name: [value] for name, value in self._figures.items()}
        return outputs

    def optimizer_step(self) -> float:
        planner = self.planner
        if planner is None or not planner.micro_batches:
            return super().optimizer_step()
        assert self._actor is not None
        if self._actor.capo.mode == "mask" and planner.rejects_everything:
            # Without gradients the optimizer leaves weights and moments alone; with zeros its momentum would act.
            self.optimizer_zero_grad()
            norm, figures = 0.0, planner.skip()
        else:
            norm = super().optimizer_step()
            if math.isfinite(norm):
                clip = min(1.0, self.optimizer_config.clip_grad / (norm + 1e-6))
                # FSDP takes the mean of the processes' gradients, and verl's losses have a factor to match.
                figures = planner.commit(clip / planner.processes.count)
            else:  # verl has skipped it
                figures = planner.skip(nonfinite=True)
        figures["capo/steps_skipped"] = float(planner.steps_skipped)
        figures["capo/steps_skipped/nonfinite"] = float(planner.steps_nonfinite)
        self._figures = figures | {"capo/seconds": planner.clear()}
        return norm

    # ---- one micro-batch: shifts and selection between the forward pass and the loss ------------------------------

    def forward_step(self, micro_batch: Any, loss_function: Callable[..., Any], forward_only: bool) -> Any:
        if forward_only or self._actor is None or self._actor.capo.mode == "off":
            return super().forward_step(micro_batch, loss_function, forward_only)
        with self._watched_head():
            return super().forward_step(micro_batch, partial(self._masked_loss, loss_function), forward_only)

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        if self._head is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if len(self._head) != 1:
            raise RuntimeError(
                f"the hook on the output head fired {len(self._head)} times in one forward pass instead of once: CAPO "
                "can't see the last layer of this model, and does not train on without it"
            )
        hidden, logits = self._head[0]
        rows, mask = _response_rows(micro_batch)
        with torch.autocast(hidden.device.type, enabled=False):  # shifts need more digits than a forward pass
            # before the engine's own work, which may scale the logits in place
            planned = self._plan(micro_batch, hidden, logits, rows, mask)
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        log_probs = model_output.get("log_probs")
        if log_probs is None:
            raise RuntimeError("this loss has no log-probabilities for CAPO to watch: set actor.capo.mode=off")
        self._check_log_probs(planned, log_probs.values().detach()[rows[mask]])
        self._watch(planned, log_probs, rows[mask])
        self._planned = planned
        return model_output

    def _masked_loss(self, loss_function: Callable[..., Any], model_output: Any, data: Any, dp_group: Any) -> Any:
        """verl's loss, on a copy of the micro-batch whose advantages hold the verdicts."""
        assert self._actor is not None
        assert self.planner is not None
        planned, self._planned = self._planned, None
        if planned is None:
            raise RuntimeError("the loss came before its log-probabilities: this version of verl is not supported")
        if self._actor.capo.mode == "mask":
            padded = data.select("response_mask", "advantages").to_padded_tensor()
            mask, advantages = padded["response_mask"].bool(), padded["advantages"]
            keep = mask.clone()
            keep[mask] = planned.keep
            # `where`, not a product: a rejected token's advantage may be infinite
            advantages = advantages.where(keep | ~mask, 0)
            advantages = advantages * accepted_mean(
                AGGREGATIONS[self._actor.loss_agg_mode], mask, keep, self.planner.processes
            )
            if data["advantages"].is_nested:
                advantages = response_to_nested(advantages, data["response_mask"])
            data = data.clone(recurse=False)
            data["advantages"] = advantages
        return loss_function(model_output=model_output, data=data, dp_group=dp_group)

    def _plan(self, micro_batch: Any, hidden: Tensor, logits: Tensor, rows: Tensor, mask: Tensor) -> MicroBatch:
        """The verdicts on a micro-batch's response tokens; hidden and logits as the head saw them, [B, S, ·]."""
        planner = self._planner_at(_temperature(micro_batch))
        input_ids = micro_batch["input_ids"]
        advantages = micro_batch.select("advantages").to_padded_tensor()["advantages"]
        at = _positions(micro_batch, hidden)[rows[mask]]
        hidden, logits = hidden.flatten(0, 1), logits.flatten(0, 1)
        return planner.plan(
            hidden[at],
            (logits[some] for some in at.split(logit_rows(logits.shape[-1], logits.device))),
            input_ids.values().roll(-1)[rows[mask]],
            advantages[mask],
        )

    def _watch(self, planned: MicroBatch, log_probs: Tensor, rows: Tensor) -> None:
        """Read the tokens' weights off the gradient of the log-probabilities in the backward pass."""
        assert self._actor is not None
        with_penalty = self._actor.use_kl_loss  # then a rejected token still has a gradient
        masked = self._actor.capo.mode == "mask"

        def watch(gradient: Tensor) -> None:
            scale = 1.0 if self.scaler is None else self.scaler.get_scale()
            planned.weights = -gradient.values()[rows] / scale
            if masked and not with_penalty and planned.weights[~planned.keep].any():
                raise RuntimeError(
                    "a rejected token still has a gradient, so the loss did not read the advantages CAPO wrote: "
                    "use another policy_loss.loss_mode, or capo.mode=monitor"
                )

        log_probs.register_hook(watch)

    def _check_log_probs(self, planned: MicroBatch, log_probs: Tensor) -> None:
        error = (planned.layer.log_pi_a - log_probs).abs()
        error = error[error.isfinite()]
        half = planned.layer.hidden.dtype.itemsize < 4 or log_probs.dtype.itemsize < 4
        if len(error) and error.mean() > (_LOGP_TOLERANCE_HALF if half else _LOGP_TOLERANCE):
            raise RuntimeError(
                f"the output head gives log-probabilities that differ from the loss's by {error.mean():.3g} nats on "
                "average: something lies between the head and the loss that CAPO does not model"
            )

    @contextmanager
    def _watched_head(self) -> Iterator[None]:
        """Collects what goes through the output head, and forgets it afterwards."""
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(module: Any, args: Any, output: Tensor) -> None:
            seen.append((args[0].detach(), output.detach()))

        handle = self.module.get_output_embeddings().register_forward_hook(keep)
        self._head = seen
        try:
            yield
        finally:
            handle.remove()
            self._head = None

    # ---- the planner ---------------------------------------------------------------------------------------------

    def _planner_at(self, temperature: float) -> Planner:
        """The planner, made at the first micro-batch, with the learning rate as it is now."""
        assert self._actor is not None
        settings, group = self._actor.capo, self.optimizer.param_groups[0]
        if self.planner is None:
            check_head(self.module, self.model_config.path)
            self.planner = Planner(
                _step(settings.step, group),
                settings.thresholds,
                temperature=temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                fisher=settings.fisher,
                max_missing_mass=settings.max_missing_mass,
                processes=Processes(self.get_data_parallel_group()),
            )
            if self._restored is not None:
                _restore(self.planner, self._restored)
                self._restored = None
        if temperature != self.planner.temperature:
            raise ValueError(
                f"the temperature went from {self.planner.temperature} to {temperature}: CAPO models one policy; keep "
                "rollout.temperature as it is"
            )
        self.planner.step.lr = group["lr"]
        return self.planner

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.planner is None or self.rank != 0:
            return
        tensors = {f"step.{name}": tensor for name, tensor in self.planner.step.state_dict().items()}
        tensors["accepted_tokens"] = torch.tensor(self.planner.accepted_tokens)
        tensors["steps_skipped"] = torch.tensor(self.planner.steps_skipped)
        tensors["steps_nonfinite"] = torch.tensor(self.planner.steps_nonfinite)
        with written_whole(Path(local_path) / STATE_FILE) as unfinished:
            save_file({name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()}, unfinished)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and the step model's moments where the folder has them; training without them raises."""
        path = Path(local_path) / STATE_FILE
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.engine_config.forward_only or self.optimizer is None:
            return
        self._restored = {}
        if path.exists():
            with safe_open(path, framework="pt", device=str(next(self.module.parameters()).device)) as file:
                self._restored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _actor_config(loss_function: Callable[..., Any]) -> CAPOActorConfig:
    """The settings that came with the loss, which verl hands over as `partial(ppo_loss, config=...)`."""
    config = getattr(loss_function, "keywords", {}).get("config")
    if not isinstance(config, CAPOActorConfig):
        raise RuntimeError(
            "capo_rl.verl is loaded, and the loss came without its settings: set "
            "actor_rollout_ref.actor._target_=capo_rl.verl.CAPOActorConfig, and +actor_rollout_ref.actor.capo.mode=off "
            "if this is to be a run without CAPO"
        )
    return config


def _step(name: str, group: dict[str, Any]) -> AdamStep | SGDStep:
    """The model of the optimizer's step, with the optimizer's own constants."""
    if name == "sgd":
        return SGDStep(group["lr"])
    if not {"betas", "eps"} <= set(group):
        raise ValueError(
            "actor.capo.step='adam' models Adam, and actor.optim.optimizer has no betas and eps: use an Adam, or "
            "actor.capo.step=sgd"
        )
    return AdamStep(group["lr"], tuple(group["betas"]), group["eps"])


def _restore(planner: Planner, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        raise FileNotFoundError(
            f"the checkpoint has no {STATE_FILE}: it was not written with CAPO. To start from its weights without "
            "resuming, give the model's folder as actor_rollout_ref.model.path"
        )
    planner.accepted_tokens = int(tensors["accepted_tokens"])
    planner.steps_skipped = int(tensors["steps_skipped"])
    planner.steps_nonfinite = int(tensors.get("steps_nonfinite", 0))
    planner.step.load_state_dict(
        {name.removeprefix("step."): each for name, each in tensors.items() if name.startswith("step.")}
    )


def _temperature(micro_batch: Any) -> float:
    """The one sampling temperature of a micro-batch."""
    given = micro_batch["temperature"]
    if not isinstance(given, Tensor):
        return float(given)
    if (given != given.flatten()[0]).any():
        raise ValueError("sequences of one micro-batch were sampled at different temperatures: CAPO models one policy")
    return float(given.flatten()[0])


def _response_rows(micro_batch: Any) -> tuple[Tensor, Tensor]:
    """For each response token [B, T]: which of the packed tokens predicts it, and whether it is in the loss."""
    packed = torch.arange(len(micro_batch["input_ids"].values()), device=micro_batch["input_ids"].device)
    mask = micro_batch.select("response_mask").to_padded_tensor()["response_mask"].bool()
    return no_padding_2_padding(packed, micro_batch), mask


def _positions(micro_batch: Any, hidden: Tensor) -> Tensor:
    """Where each of the packed tokens stands in the head's input [B, S, d], flattened to [B·S]."""
    input_ids = micro_batch["input_ids"]
    if tensordict_utils.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
        return torch.arange(len(input_ids.values()), device=hidden.device)
    lengths = input_ids.offsets().diff().to(hidden.device)
    filled = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return filled.flatten().nonzero().squeeze(1)
