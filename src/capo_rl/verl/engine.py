"""CAPO on verl: an FSDP engine whose gradient leaves out the tokens that the curvature model rejects.

Needs the extra `capo-rl[verl]`. Loading this module (`VERL_USE_EXTERNAL_MODULES=capo_rl.verl`) registers `CAPOEngine`
for this machine's accelerator, where verl's registry looks before it looks for verl's own; `CAPOActorConfig` in the
place of verl's actor config (`actor._target_`) carries the settings and switches it on. Nothing of verl is changed.

How it hooks in. verl's FSDP engine calls the output head as a module, so a forward hook there yields its input h and
its output W h, unsharded, before the temperature; nothing is projected twice. `prepare_model_outputs` makes of them the
log-probabilities that the loss reads; the shifts are computed there, and a hook on those log-probabilities reads off
the weight each token had in the loss. The loss itself is wrapped: with `mask` it gets a copy of the micro-batch with
the mask in its advantages. `optimizer_step` is where the step is committed, taken at the learning rate it may have,
measured by the head's logits in another forward pass, and taken back in part. The mathematics is `planner`'s and
`trust_region`'s, the settings are `own_fields`'.

The seam (an engine subclass with an overridden `prepare_model_outputs` and a wrapped loss function) is that of verl's
own engines, verl/workers/engine.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
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
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

try:
    from verl.utils import tensordict_utils
    from verl.utils.device import get_device_id, get_device_name, get_vendor
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
from capo_rl.curvature.selection import subset_numbers
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import choose, fit_of_optimizer
from capo_rl.planning.micro_batch import MicroBatch, check_hooked
from capo_rl.planning.planner import Planner
from capo_rl.planning.rerun import drew, random_numbers, random_state, reshard, sampled_rows
from capo_rl.planning.telemetry import rank_correlation, synchronise
from capo_rl.planning.trust_region import TrustRegion, check_recomputable
from capo_rl.runs.models import check_head
from capo_rl.runs.records import written_whole
from capo_rl.settings.own import OwnSettings, check_own, check_units, control_of, planner_of, step_of

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

# Those of them that have log π(a) in a ratio alone: how they lean on an advantage says what a rejected token would have
# weighed, which the share of the step needs.
SHAREABLE_LOSSES = ("vanilla",)

# Fields of CAPO's that are verl's own business here, and where to set it.
_NOT_HERE = {
    "advantage": "algorithm.adv_estimator and algorithm.norm_adv_by_std_in_grpo say what an advantage is",
    "tokens_every": "only TRL's adapter records tokens",
    "watch": "shifts are predicted in every mode but `off`",
}


@dataclass
class CAPOSettings(OwnSettings):
    """What `CAPOConfig` has beside TRL's settings, but for what verl chooses itself; under `actor.capo` the names are
    without `capo_`.

    Raises `ValueError`, naming the field and the fix, for a value out of range, or two that contradict one another.
    """

    def __post_init__(self) -> None:
        with _in_verls_words():
            check_own(self)
            if self.capo_step != "auto":
                check_units(self, self.capo_step)

    @classmethod
    def of(cls, given: Any) -> CAPOSettings:
        """The settings written under `actor.capo`: a mapping, or nothing."""
        given = dict(given or {})
        known = [name for each in fields(cls) if (name := each.name.removeprefix("capo_")) not in _NOT_HERE]
        if refused := [name for name in given if name in _NOT_HERE]:
            raise ValueError(f"actor.capo.{refused[0]} is not for verl: {_NOT_HERE[refused[0]]}; leave it out")
        if unknown := set(given) - set(known):
            raise ValueError(f"actor.capo has no {', '.join(sorted(unknown))}: it has {', '.join(known)}")
        if given.get("mode") is False:  # how YAML reads a bare `off`
            given["mode"] = "off"
        return cls(**{f"capo_{name}": value for name, value in given.items()})


@contextmanager
def _in_verls_words() -> Iterator[None]:
    """Errors about CAPO's settings name them as they are written here."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bcapo_(?!rl\b)", "actor.capo.", str(error))
        raise ValueError(text.replace("optim='adamw_torch'", "actor.optim.optimizer=AdamW")) from None


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
        if self.capo.capo_mode == "off":
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
        qat = getattr(self.fsdp_config, "qat", None)
        _refuse(
            self.capo.kl_budget is not None and bool(getattr(qat, "enable", False)),
            "fsdp_config.qat.enable=True",
            "keeps the scales of weights that a KL budget may take back",
            "set it to false, or capo.kl_budget=null with another capo.mode",
        )
        if self.capo.capo_mode == "mask":
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
            _refuse(
                self.capo.capo_share and self.policy_loss.loss_mode not in SHAREABLE_LOSSES,
                f"policy_loss.loss_mode={self.policy_loss.loss_mode!r}",
                "does not say what a rejected token would have weighed, and the share of the step asks for it",
                f"use one of {', '.join(SHAREABLE_LOSSES)}, or capo.share=false, the paper's mask",
            )


def _refuse(condition: bool, setting: str, reason: str, fix: str) -> None:
    if condition:
        raise ValueError(f"actor.{setting} {reason}, which CAPO can't work with: {fix}")


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=get_device_name(), vendor=get_vendor()
)
class CAPOEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine with curvature-aware selection, for training with a `CAPOActorConfig`.

    Its only change to training is that of `CAPOTrainer`, by `capo.mode`: `trust_region` makes the step as long as
    `capo.kl_budget` allows, `mask` gives rejected tokens an advantage of zero and counts accepted tokens in the
    denominators, `shorten` multiplies the step by the accepted tokens' share, and so does `mask` with `capo.share`.
    `monitor` computes and logs the same and changes nothing; `off`, evaluation and the reference policy are verl's own.

    Raises `RuntimeError` when the hooks do not see what the loss uses: a mask that silently does nothing is worse than
    a crash.
    """

    planner: Planner | None = None
    region: TrustRegion | None = None  # of the modes that change the run
    _actor: CAPOActorConfig | None = None  # of the loss that is being trained
    _head: list[tuple[Tensor, Tensor]] | None = None  # while training: what went through the output head, h and W h
    _planned: MicroBatch | None = None  # the micro-batch whose loss is still to come
    _random: list[Tensor] | None = None  # where the generators stood before the forward pass
    _again: list[_Again] | None = None  # to measure an update: the step's micro-batches
    _measured: _Again | None = None  # the one that runs to be measured
    _logits: Tensor | None = None  # what came of it
    _tokens: tuple[Tensor, Tensor] | None = None  # KL and m_F of each, when last measured
    _steps = 0  # trained, those that were skipped included
    _noise_known = False  # whether the KL of no step was measured
    _figures: dict[str, float]
    _restored: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    # ---- one mini-batch, one optimizer step ----------------------------------------------------------------------

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        self._actor = _actor_config(loss_function)
        if self._actor.capo.capo_mode == "off":
            return super().train_batch(data, loss_function)
        if self.planner is not None:
            self.planner.clear()  # of a step that was broken off
        self._figures, self._again = {}, []
        outputs = super().train_batch(data, loss_function)
        self._again = None
        outputs["metrics"] |= {name: [value] for name, value in self._figures.items()}
        return outputs

    def optimizer_step(self) -> float:
        planner, region = self.planner, self.region
        if planner is None or not planner.micro_batches:
            return super().optimizer_step()
        assert self._actor is not None
        settings: CAPOSettings = self._actor.capo
        bounded = region is not None and region.control is not None
        norm = self._gradient_norm()
        finite = math.isfinite(norm)
        # Without a token there is no KL to hold to a budget, but momentum would move the weights.
        left_out = finite and (
            (settings.capo_mode == "mask" and planner.rejects_everything) or (bounded and planner.is_empty)
        )
        share, informative = 1.0, True
        if left_out or not finite:
            figures = planner.skip(nonfinite=not finite)
        else:
            clip = min(1.0, self.optimizer_config.clip_grad / (norm + 1e-6))
            # FSDP takes the mean of the processes' gradients, and verl's losses have a factor to match.
            figures = planner.commit(clip / planner.processes.count)
            if region is not None:
                share = planner.shared(figures)
            informative = not bounded or planner.has_gradient
            if bounded and not self._noise_known:
                assert region is not None
                self._noise_known = True
                figures["capo/kl/noise"] = region.check_noise(self._measure_kl)
        if region is not None:
            figures["capo/scale"] = region.scale if left_out or not finite else region.before_step(share)
            figures["capo/learning_rate"] = region.lr()
        if left_out:
            # Without gradients the optimizer leaves weights and moments alone; with zeros its momentum would act.
            self.optimizer_zero_grad()
            norm = 0.0
        elif finite:
            super().optimizer_step()
            figures |= self._measured_step(informative)
        else:
            super().optimizer_step()  # which leaves it out
        figures |= planner.counts()
        if planner.processes.count > 1:
            figures["capo/bytes"] = float(planner.processes.take_bytes())
        self._figures = figures | {"capo/seconds": planner.clear()}
        self._steps += 1
        return norm

    def _gradient_norm(self) -> float:
        """The norm that verl clips by, before it does: verl clips and steps in one go."""
        if isinstance(self.module, FullyShardedDataParallel):
            norm = self.module.clip_grad_norm_(math.inf)
        else:
            norm = torch.nn.utils.get_total_norm(
                [each.grad for each in self.module.parameters() if each.grad is not None]
            )
        norm = norm.to(get_device_id())  # of weights that are kept on the CPU
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return norm.item() / self._loss_scale()

    def _measured_step(self, informative: bool) -> dict[str, float]:
        """The KL of the update that was taken, and what is left of it under a budget."""
        assert self._actor is not None
        region = self.region
        bounded = region is not None and region.control is not None
        synchronise(self._device())  # the optimizer's step is not part of the measurement
        start = time.perf_counter()
        self._tokens = None
        figures: dict[str, float] = {}
        if region is not None:
            update = region.after_step(self._measure_kl, informative)
            if update is not None:
                figures |= update.figures()
        if not bounded and self._due() and self._measurable():
            figures["capo/kl/measured"] = self._measure_kl()
        if self._tokens is not None:
            figures["capo/kl/rank_correlation"] = rank_correlation(*self._tokens)
            figures["capo/kl/seconds"] = time.perf_counter() - start
        return figures

    def _due(self) -> bool:
        """Whether the KL of the coming step is measured where no budget asks for it: verl logs every step."""
        assert self._actor is not None
        return (self._steps + 1) % (self._actor.capo.capo_kl_every or 1) == 0

    def _measurable(self) -> bool:
        assert self.planner is not None
        return not self.planner.is_empty

    def _measure_kl(self) -> float:
        """The mean KL over the sampled tokens from the policy before the step to that of the weights now."""
        assert self.planner is not None
        assert self._again is not None
        reshard(self.module)
        moved = self.planner.measured_kl(self._logits_now, None, [each.sample for each in self._again])
        assert moved.m_f is not None
        self._tokens = (moved.kl, moved.m_f)
        return moved.mean

    @torch.no_grad()
    def _logits_now(self, micro_batch: int) -> Tensor:
        """The logits of a micro-batch's sampled tokens under the weights as they are now."""
        assert self._again is not None
        self._measured = again = self._again[micro_batch]
        try:
            with random_numbers(self._devices(), again.random), self._watched_head():
                super().forward_step(again.micro_batch, None, True)
        finally:
            self._measured = None
        reshard(self.module)
        logits, self._logits = self._logits, None
        assert logits is not None
        return logits

    # ---- one micro-batch: shifts and selection between the forward pass and the loss ------------------------------

    def forward_step(self, micro_batch: Any, loss_function: Callable[..., Any], forward_only: bool) -> Any:
        if forward_only or self._actor is None or self._actor.capo.capo_mode == "off":
            return super().forward_step(micro_batch, loss_function, forward_only)
        self._random = random_state(self._devices())
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
        if self._measured is not None:
            at = _positions(micro_batch, hidden)[rows[mask]]
            self._logits = logits.flatten(0, 1)[at if self._measured.among is None else at[self._measured.among]]
            return {}
        with torch.autocast(hidden.device.type, enabled=False):  # shifts need more digits than a forward pass
            # before the engine's own work, which may scale the logits in place
            planned = self._plan(micro_batch, hidden, logits, rows, mask)
        self._remember(micro_batch, planned, mask)
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        log_probs = model_output.get("log_probs")
        if log_probs is None:
            raise RuntimeError("this loss has no log-probabilities for CAPO to watch: set actor.capo.mode=off")
        read = log_probs.values().detach()[rows[mask]]
        half = planned.layer.hidden.dtype.itemsize < 4 or read.dtype.itemsize < 4
        check_hooked(planned.layer, read, half, "the output head gives", "the head and the loss")
        model_output["log_probs"] = self._watch(planned, log_probs, rows[mask])
        self._planned = planned
        return model_output

    def _masked_loss(self, loss_function: Callable[..., Any], model_output: Any, data: Any, dp_group: Any) -> Any:
        """verl's loss, with `mask` on a copy of the micro-batch whose advantages hold the verdicts."""
        assert self._actor is not None
        planned, self._planned = self._planned, None
        if planned is None:
            raise RuntimeError("the loss came before its log-probabilities: this version of verl is not supported")
        if self._actor.capo.capo_mode == "mask":
            padded = data.select("response_mask", "advantages").to_padded_tensor()
            mask, loss_type = padded["response_mask"].bool(), AGGREGATIONS[self._actor.loss_agg_mode]
            advantages = planned.masked(padded["advantages"], mask, loss_type, self._loss_scale())
            if data["advantages"].is_nested:
                advantages = response_to_nested(advantages, data["response_mask"])
            data = data.clone(recurse=False)
            data["advantages"] = advantages
        return loss_function(model_output=model_output, data=data, dp_group=dp_group)

    def _plan(self, micro_batch: Any, hidden: Tensor, logits: Tensor, rows: Tensor, mask: Tensor) -> MicroBatch:
        """The verdicts on a micro-batch's response tokens; hidden and logits as the head saw them, [B, S, ·]."""
        planner = self._planner_at(_temperature(micro_batch))
        assert self._actor is not None
        granularity = self._actor.capo.capo_granularity
        input_ids = micro_batch["input_ids"]
        advantages = micro_batch.select("advantages").to_padded_tensor()["advantages"]
        at = _positions(micro_batch, hidden)[rows[mask]]
        hidden, logits = hidden.flatten(0, 1), logits.flatten(0, 1)
        return planner.plan(
            hidden[at],
            (logits[some] for some in at.split(logit_rows(logits.shape[-1], logits.device))),
            input_ids.values().roll(-1)[rows[mask]],
            advantages[mask],
            subset_numbers(granularity, mask, _groups(micro_batch) if granularity == "group" else None),
        )

    def _watch(self, planned: MicroBatch, log_probs: Any, rows: Tensor) -> Tensor:
        """The log-probabilities, for the loss to be made of: their gradient tells the tokens' weights."""
        assert self._actor is not None
        values = log_probs.values()
        mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        mask[rows] = True  # in the order of the rows: a response's tokens follow one another, and so do sequences
        planned.watch(values, mask, self._loss_scale())

        def check_rejected(gradient: Tensor) -> None:
            # With a KL penalty a rejected token still has a gradient, and with a loss of NaN all have one.
            left = gradient[mask][~planned.keep]
            if (left[left.isfinite()] != 0).any():
                raise RuntimeError(
                    "a rejected token still has a gradient, so the loss did not read the advantages CAPO wrote: "
                    "use another policy_loss.loss_mode, or capo.mode=monitor"
                )

        if self._actor.capo.capo_mode == "mask" and not self._actor.use_kl_loss:
            values.register_hook(check_rejected)
        return torch.nested.nested_tensor_from_jagged(values, log_probs.offsets())

    def _remember(self, micro_batch: Any, planned: MicroBatch, mask: Tensor) -> None:
        """Keep what it takes to run the micro-batch again, on the sample of its completions to be measured.

        With random numbers in the forward pass the same come again only to the same shapes, so then the whole
        micro-batch is run, and the sample is taken from its tokens.
        """
        assert self._again is not None
        assert self._actor is not None
        assert self._random is not None
        if not self._due() and (self.region is None or self.region.control is None):
            return
        rows = sampled_rows(mask, planned.advantages, self._actor.capo.capo_kl_sample)
        sampled = torch.zeros_like(mask)
        sampled[rows] = mask[rows]
        sample = sampled[mask]
        if drew(self._random, random_state(self._devices())):
            self._again.append(_Again(micro_batch, sample, sample, self._random))
        elif len(rows) == len(mask):
            self._again.append(_Again(micro_batch, sample, None, None))
        else:
            some = tensordict_utils.index_select_tensor_dict(micro_batch, rows)
            self._again.append(_Again(some, sample, None, None))

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

    def _loss_scale(self) -> float:
        """The factor of mixed-precision loss scaling, which the optimizer takes out again."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def _device(self) -> torch.device:
        return torch.device(get_device_id())

    def _devices(self) -> list[torch.device]:
        """Where the model's random numbers come from."""
        own = self._device()
        return [torch.device("cpu"), *([own] if own.type != "cpu" else [])]

    # ---- the planner ---------------------------------------------------------------------------------------------

    def _planner_at(self, temperature: float) -> Planner:
        """The planner, made with its trust region at the first micro-batch, with the learning rate as it is now."""
        if self.planner is None:
            self.planner = self._first_planner(temperature)
        if temperature != self.planner.temperature:
            raise ValueError(
                f"the temperature went from {self.planner.temperature} to {temperature}: CAPO models one policy; keep "
                "rollout.temperature as it is"
            )
        self.planner.step.lr = self.optimizer.param_groups[0]["lr"] if self.region is None else self.region.lr()
        return self.planner

    def _first_planner(self, temperature: float) -> Planner:
        assert self._actor is not None
        settings: CAPOSettings = self._actor.capo
        check_head(self.module, self.model_config.path)
        with _in_verls_words():
            model = choose(settings.capo_step, settings.capo_mode, fit_of_optimizer(self.optimizer))
            check_units(settings, model)
            if settings.kl_budget is not None and settings.capo_kl_control == "optimizer":
                check_recomputable(self.optimizer)
        step = _step(settings, model, self.optimizer.param_groups[0])
        planner = planner_of(settings, step, temperature, Processes(self.get_data_parallel_group()))
        if settings.changes_the_run:
            self.region = TrustRegion(self.optimizer, control_of(settings, self.optimizer_config.lr))
        if self._restored is not None:
            self._restore(planner, *self._restored)
            self._restored = None
        return planner

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.planner is None or self.rank != 0:
            return  # the same in every process, so one of them writes it
        region = {} if self.region is None else self.region.state_dict()
        counters = {"region": region, "steps": self._steps, "noise_known": self._noise_known}
        tensors = self.planner.state_dict()
        with written_whole(Path(local_path) / STATE_FILE) as unfinished:
            save_file(
                {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()},
                unfinished,
                metadata={"counters": json.dumps(counters)},
            )

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and what CAPO has learned where the folder has it; training without it raises.

        Raises `ValueError` for a checkpoint of another number of workers, whose shards verl can't read.
        """
        names = [path.name for path in Path(local_path).glob("model_world_size_*_rank_*.pt")]
        written, workers = {int(name.split("_")[3]) for name in names}, torch.distributed.get_world_size()
        if written and workers not in written:
            raise ValueError(
                f"{local_path} was written by {min(written)} workers, and these are {workers}: verl reads each "
                "worker's own shard, so go on with as many (trainer.n_gpus_per_node, trainer.nnodes); or start from "
                "its weights, merged by `python -m verl.model_merger merge`, as actor_rollout_ref.model.path"
            )
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.engine_config.forward_only or self.optimizer is None:
            return
        self.planner = self.region = None  # made anew, from what was saved
        self._restored = {}, {}
        path = Path(local_path) / STATE_FILE
        if path.exists():
            with safe_open(path, framework="pt", device=str(next(self.module.parameters()).device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                self._restored = tensors, json.loads((file.metadata() or {}).get("counters", "{}"))

    def _restore(self, planner: Planner, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        if not tensors:
            raise FileNotFoundError(
                f"the checkpoint has no {STATE_FILE}: it was not written with CAPO. To start from its weights without "
                "resuming, give the model's folder as actor_rollout_ref.model.path"
            )
        planner.load_state_dict(tensors)
        if self.region is not None and counters.get("region"):
            self.region.load_state_dict(counters["region"])
        self._steps = counters.get("steps", 0)
        self._noise_known = counters.get("noise_known", False)


@dataclass(frozen=True)
class _Again:
    """A micro-batch to run again, or some of its completions: `sample` [n] marks those of its planned tokens that are
    measured, and `among` the same where more are run; from the `random` numbers it drew in the loss, if it drew any."""

    micro_batch: Any
    sample: Tensor
    among: Tensor | None
    random: list[Tensor] | None


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


def _step(settings: CAPOSettings, model: str, group: dict[str, Any]) -> AdamStep | SGDStep:
    """The model of the optimizer's step, with the optimizer's own constants."""
    if model == "adam" and not {"betas", "eps"} <= set(group):
        raise ValueError(
            "actor.capo.step='adam' models Adam, and actor.optim.optimizer has no betas and eps: use an Adam, or "
            "actor.capo.step=sgd"
        )
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    return step_of(settings, model, float(group["lr"]), (float(beta1), float(beta2)), float(group.get("eps", 0.0)))


def _groups(micro_batch: Any) -> Tensor:
    """The number of each sequence's group: those of one prompt have one `uid`."""
    uids = tensordict_utils.get(micro_batch, "uid")
    if uids is None:
        raise ValueError(
            "actor.capo.granularity='group' goes by the uid that verl's trainer gives a prompt's completions, and the "
            "batch has none: use 'sequence' or 'token'"
        )
    numbers: dict[Any, int] = {}
    device = micro_batch["input_ids"].device
    return torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids], device=device)


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
