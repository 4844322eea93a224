"""verl's FSDP engine with CAPO in it.

How it hooks in. verl's FSDP engine calls the output head as a module, so a forward hook there yields its input h and
its output W h, unsharded, before the temperature; nothing is projected twice. `prepare_model_outputs` makes of them the
log-probabilities that the loss reads; the shifts are computed there, and a hook on those log-probabilities reads off
the weight each token had in the loss. The loss itself is wrapped: with `mask` it gets a copy of the micro-batch with
the mask in its advantages. `optimizer_step` is where the step is committed, taken at the learning rate it may have,
measured by the head's logits in another forward pass, and taken back in part.

The seam (an engine subclass with an overridden `prepare_model_outputs` and a wrapped loss function) is that of verl's
own engines, verl/workers/engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id, get_device_name, get_vendor
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import response_to_nested

from capo_rl.curvature.last_layer import logit_rows
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import subset_numbers
from capo_rl.curvature.step_model import DECIDING
from capo_rl.planning.micro_batch import MicroBatch, Seen, check_hooked, check_left_out
from capo_rl.planning.planner import Planner
from capo_rl.planning.rerun import Sample, random_numbers, random_state, reshard, sizes
from capo_rl.planning.telemetry import rank_correlation, synchronise
from capo_rl.planning.trust_region import TrustRegion
from capo_rl.planning.updates import Moved, Updates
from capo_rl.runs.models import check_head
from capo_rl.verl.actor import AGGREGATIONS, CAPOActorConfig, actor_config
from capo_rl.verl.again import Again, remembered
from capo_rl.verl.batches import groups, positions, response_mask, response_rows, temperature, weighed_advantages
from capo_rl.verl.checkpoints import check_workers, load_beside, save_beside
from capo_rl.verl.planners import updates_and_region
from capo_rl.verl.settings import CAPOSettings

# Of the engine's own, what a checkpoint holds.
_COUNTERS = ("_steps", "_noise_known")


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

    updates: Updates | None = None
    region: TrustRegion | None = None  # of the modes that change the run
    _actor: CAPOActorConfig | None = None  # of the loss that is being trained
    _head: list[tuple[Tensor, Tensor]] | None = None  # while training: what went through the output head, h and W h
    _planned: MicroBatch | Seen | None = None  # the micro-batch whose loss is still to come
    _random: list[Tensor] | None = None  # where the generators stood before the forward pass
    _again: list[Again] | None = None  # to measure an update: the step's micro-batches
    _sample: Sample  # of them
    _measured: Again | None = None  # the one that runs to be measured
    _logits: Tensor | None = None  # what came of it
    _moved: Moved | None = None  # how far the step went, when last measured
    _steps = 0  # trained, those that were skipped included
    _noise_known = False  # whether the KL of no step was measured
    _figures: dict[str, float]
    _restored: Path | None = None  # the checkpoint to go on from

    @property
    def planner(self) -> Planner | None:
        """What predicts the coming step, where anything does (`CAPOSettings.predicts`)."""
        return self.updates if isinstance(self.updates, Planner) else None

    # ---- one mini-batch, one optimizer step ----------------------------------------------------------------------

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        self._actor = actor_config(loss_function)
        if self._actor.capo.capo_mode == "off":
            return super().train_batch(data, loss_function)
        if self.updates is not None:
            self.updates.clear()  # of a step that was broken off
        self._figures, self._again, self._sample = {}, [], Sample(self._actor.capo.capo_kl_sample)
        if self._sample.share < 1:
            self._sample.expect(sizes(response_mask(data), weighed_advantages(data)))
        outputs = super().train_batch(data, loss_function)
        self._again = None
        outputs["metrics"] |= {name: [value] for name, value in self._figures.items()}
        return outputs

    def optimizer_step(self) -> float:
        updates, planner, region = self.updates, self.planner, self.region
        if updates is None or not updates.micro_batches:
            return super().optimizer_step()
        assert self._actor is not None
        settings: CAPOSettings = self._actor.capo
        bounded = region is not None and region.control is not None
        norm = self._gradient_norm()
        finite = math.isfinite(norm)
        # Without a token there is no KL to hold to a budget, but momentum would move the weights.
        left_out = finite and (
            (settings.capo_mode == "mask" and planner is not None and planner.rejects_everything)
            or (bounded and updates.is_empty)
        )
        share, informative = 1.0, True
        if left_out or not finite:
            figures = updates.skip(nonfinite=not finite)
        else:
            clip = min(1.0, self.optimizer_config.clip_grad / (norm + 1e-6))
            # FSDP takes the mean of the processes' gradients, and verl's losses have a factor to match.
            figures = updates.commit(clip / updates.processes.count)
            if planner is not None and region is not None:
                share = planner.shared(figures)
            informative = not bounded or updates.has_gradient
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
        figures |= updates.counts()
        if updates.processes.count > 1:
            figures["capo/bytes"] = float(updates.processes.take_bytes())
        self._figures = figures | {"capo/seconds": updates.clear()}
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
        self._moved = None
        figures: dict[str, float] = {}
        if region is not None:
            update = region.after_step(self._measure_kl, informative)
            if update is not None:
                figures |= update.figures()
        if not bounded and self._due() and self._measurable():
            figures["capo/kl/measured"] = self._measure_kl()
        if self._moved is not None:
            if self._moved.m_f is not None:
                figures["capo/kl/rank_correlation"] = rank_correlation(self._moved.kl, self._moved.m_f)
            figures["capo/kl/seconds"] = time.perf_counter() - start
        return figures

    def _due(self) -> bool:
        """Whether the KL of the coming step is measured where no budget asks for it: verl logs every step."""
        assert self._actor is not None
        return (self._steps + 1) % (self._actor.capo.capo_kl_every or 1) == 0

    def _measurable(self) -> bool:
        assert self.updates is not None
        return not self.updates.is_empty

    def _measure_kl(self) -> float:
        """The mean KL over the sampled tokens from the policy before the step to that of the weights now."""
        assert self.updates is not None
        assert self._again is not None
        reshard(self.module)
        if self.planner is None:
            self._moved = self.updates.measured_kl(self._logits_now, None)
        else:
            self._moved = self.planner.measured_kl(self._logits_now, None, [each.sample for each in self._again])
        return self._moved.mean

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
        rows, mask = response_rows(micro_batch)
        if self._measured is not None:
            at = positions(micro_batch, hidden)[rows[mask]]
            self._logits = logits.flatten(0, 1)[at[self._measured.among]]
            return {}
        with torch.autocast(hidden.device.type, enabled=False):  # shifts need more digits than a forward pass
            # before the engine's own work, which may scale the logits in place
            planned = self._plan(micro_batch, hidden, logits, rows, mask)
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        log_probs = model_output.get("log_probs")
        if log_probs is None:
            raise RuntimeError("this loss has no log-probabilities for CAPO to watch: set actor.capo.mode=off")
        read = log_probs.values().detach()[rows[mask]]
        if isinstance(planned, Seen):
            read = read[planned.sample]
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
        if isinstance(planned, MicroBatch) and self._actor.capo.capo_mode == "mask":
            padded = data.select("response_mask", "advantages").to_padded_tensor()
            mask, loss_type = padded["response_mask"].bool(), AGGREGATIONS[self._actor.loss_agg_mode]
            advantages = planned.masked(padded["advantages"], mask, loss_type, self._loss_scale())
            if data["advantages"].is_nested:
                advantages = response_to_nested(advantages, data["response_mask"])
            data = data.clone(recurse=False)
            data["advantages"] = advantages
        return loss_function(model_output=model_output, data=data, dp_group=dp_group)

    def _plan(self, micro_batch: Any, hidden: Tensor, logits: Tensor, rows: Tensor, mask: Tensor) -> MicroBatch | Seen:
        """What is known of a micro-batch's response tokens; hidden and logits as the head saw them, [B, S, ·]."""
        updates = self._updates_at(temperature(micro_batch))
        assert self._actor is not None
        at = positions(micro_batch, hidden)[rows[mask]]
        actions = micro_batch["input_ids"].values().roll(-1)[rows[mask]]
        advantages = weighed_advantages(micro_batch)
        hidden, logits = hidden.flatten(0, 1), logits.flatten(0, 1)
        self._remember(micro_batch, mask, advantages)

        def chunks(at: Tensor) -> Iterator[Tensor]:
            return (logits[some] for some in at.split(logit_rows(logits.shape[-1], logits.device)))

        if not isinstance(updates, Planner):
            assert self._again is not None
            sample = self._again[-1].sample
            return updates.look(hidden[at[sample]], chunks(at[sample]), actions[sample], sample)
        granularity = self._actor.capo.capo_granularity
        subsets = subset_numbers(granularity, mask, groups(micro_batch) if granularity == "group" else None)
        return updates.plan(hidden[at], chunks(at), actions, advantages[mask], subsets)

    def _watch(self, planned: MicroBatch | Seen, log_probs: Any, rows: Tensor) -> Tensor:
        """The log-probabilities, for the loss to be made of: their gradient tells the tokens' weights."""
        assert self._actor is not None
        values = log_probs.values()
        mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        mask[rows] = True  # in the order of the rows: a response's tokens follow one another, and so do sequences
        planned.watch(values, mask, self._loss_scale())

        # a KL penalty gives a rejected token a gradient
        if isinstance(planned, MicroBatch) and self._actor.capo.capo_mode == "mask" and not self._actor.use_kl_loss:
            rejected, fix = ~planned.keep, "use another policy_loss.loss_mode, or capo.mode=monitor"
            values.register_hook(lambda gradient: check_left_out(gradient[mask][rejected], fix))
        return torch.nested.nested_tensor_from_jagged(values, log_probs.offsets())

    def _remember(self, micro_batch: Any, mask: Tensor, advantages: Tensor) -> None:
        """Keep what it takes to run the micro-batch again, where its update will be measured."""
        assert self._again is not None
        assert self._random is not None
        if self._due() or (self.region is not None and self.region.control is not None):
            after = random_state(self._devices())
            self._again.append(remembered(micro_batch, mask, advantages, self._sample, self._random, after))

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

    # ---- what is known of updates ----------------------------------------------------------------------------------

    def _updates_at(self, temperature: float) -> Updates:
        """Made with the trust region at the first micro-batch, and with the learning rate as it is now."""
        if self.updates is None:
            assert self._actor is not None
            check_head(self.module, self.model_config.path)
            processes = Processes(self.get_data_parallel_group())
            self.updates, self.region = updates_and_region(
                self._actor.capo, self.optimizer, self.optimizer_config.lr, temperature, processes
            )
            if self._restored is not None:
                decides = self._actor.capo.capo_mode in DECIDING
                counters = load_beside(self._restored, self.updates, self.region, self._device(), decides)
                for name in _COUNTERS:
                    setattr(self, name, counters[name])
                self._restored = None
        if temperature != self.updates.temperature:
            raise ValueError(
                f"the temperature went from {self.updates.temperature} to {temperature}: CAPO models one policy; keep "
                "rollout.temperature as it is"
            )
        if self.planner is not None:
            self.planner.step.lr = self.optimizer.param_groups[0]["lr"] if self.region is None else self.region.lr()
        return self.updates

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.updates is not None:
            counters = {name: getattr(self, name) for name in _COUNTERS}
            save_beside(Path(local_path), self.updates, self.region, counters, writes=self.rank == 0)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and what CAPO has learned where the folder has it; training without it raises.

        Raises `ValueError` for a checkpoint of another number of workers.
        """
        check_workers(local_path, torch.distributed.get_world_size())
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.engine_config.forward_only or self.optimizer is None:
            return
        self.updates = self.region = None  # made anew, from what was saved
        self._restored = Path(local_path)
