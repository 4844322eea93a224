"""Running the backbone of a step's micro-batches again, under the weights as they are now, to measure an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing

from capo_rl.planning.rerun import Sample, drew, random_numbers, random_state, reshard, sizes
from capo_rl.trainers.masking import tokens_of
from capo_rl.trainers.samplers import corrected

# Arguments of TRL's scoring that are not the model's.
_SCORING = {"logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss"}
# Where every process has the whole model, which can then run without its wrapper.
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class Forward:
    """A micro-batch's backbone, to run again: on some completions, whose tokens are `mask` [b, T] in the forward and
    `sample` [n] among the tokens of the micro-batch; from the `random` numbers it drew in the loss, if it drew any.
    Where no completion of it is in the sample, and no other process waits for this one, there is nothing to `run`."""

    run: Callable[[nn.Module], Any] | None
    mask: Tensor
    sample: Tensor
    random: list[Tensor] | None


class Measuring:
    """The forward passes of a `CAPOTrainer`'s coming step, each on the share of its completions to be measured."""

    def __init__(self, trainer: Any, share: float) -> None:
        self.trainer, self.share = trainer, share
        self.clear()
        self._generators: list[torch.device] | None = None  # the devices whose random numbers the model may draw

    def clear(self) -> None:
        """Begin with the next step."""
        self.forwards: list[Forward] = []
        self._sample = Sample(self.share)

    def random_state(self, model: Any) -> list[Tensor]:
        """Where the generators stand that the model may draw from."""
        return random_state(self._devices(model))

    def remember(self, score: partial[Any], mask: Tensor, advantages: Tensor, before: list[Tensor]) -> None:
        """Keep what it takes to run a micro-batch's backbone again, right after its forward pass in the loss.

        `before` is where the generators stood before that pass. If it drew from them (dropout, noise on embeddings, a
        router's jitter), the same numbers come again only to the same shapes, so then the whole micro-batch is run, and
        the sample is taken from its tokens.
        """
        trainer = self.trainer
        after = self.random_state(trainer.model_wrapped)
        random = before if drew(before, after) else None
        inputs = {name: score.keywords[name] for name in ("input_ids", "attention_mask")}
        more = sorted(name for name in score.keywords.keys() - inputs - _SCORING if score.keywords[name] is not None)
        whole = trainer.accelerator.distributed_type in _WHOLE
        # of more inputs it is not known which belong to a completion
        sample = Sample(1.0) if more else self._sample
        if sample.share < 1 and not self.forwards:
            self._look_ahead(mask, advantages)
        rows = sample.rows(mask, advantages)
        sampled = torch.zeros_like(mask)
        sampled[rows] = mask[rows]
        if not whole and not len(rows):
            rows = rows.new_zeros(1)  # for form's sake: with shards all processes take part in a forward pass
        run_on = sampled
        if sample.share < 1 and random is None:
            inputs = {name: value[rows] for name, value in inputs.items()}
            run_on = sampled[rows]
        run: Callable[[nn.Module], Any] | None
        if not len(rows):
            run = None
        elif more or is_peft_model(trainer.model) or not whole:
            # Through TRL's scoring, which knows what to do with more inputs, and the wrapper, which brings shards
            # together or may prepend the tokens of a tuned prompt.
            run = partial(score.func, **score.keywords | inputs | {"logits_to_keep": 1, "compute_entropy": False})
        else:
            run = partial(self._run_backbone, **inputs)
        self.forwards.append(Forward(run, run_on, sampled[mask], random))

    def _look_ahead(self, mask: Tensor, advantages: Tensor) -> None:
        """Tell the sample of all completions of the coming step, where they have been generated already: TRL keeps the
        micro-batches of a generation batch, in their order. `mask` and `advantages` [b, T] are the first one's."""
        trainer = self.trainer
        together, generated = trainer.current_gradient_accumulation_steps, trainer._buffered_inputs
        if together == 1 or generated is None:
            return
        first = trainer._step % len(generated)
        step = generated[first : first + together]
        if len(step) < together:
            return
        every = [sizes(of := tokens_of(inputs), corrected(trainer, inputs, of)) for inputs in step]
        # they differ where the loss drops sequences by what the policy has become since
        if torch.equal(every[0], sizes(mask, advantages)):
            self._sample.expect(torch.cat(every))

    def hidden_now(self, micro_batch: int) -> Tensor:
        """The hidden states of a micro-batch's sampled tokens under the weights as they are now."""
        trainer, forward = self.trainer, self.forwards[micro_batch]
        if forward.run is None:
            return trainer.backbone.head(trainer.model_wrapped).weight[:0].detach()
        with (
            random_numbers(self._devices(trainer.model_wrapped), forward.random),
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
            trainer.backbone.hidden_states(trainer.model_wrapped, forward.mask.shape[1]) as hidden,
        ):
            forward.run(trainer.model_wrapped)
        self.reshard()
        return hidden[0][forward.mask]

    def reshard(self) -> None:
        """Let go of gathered shards of weights that were moved (`rerun.reshard`)."""
        if self.trainer.accelerator.distributed_type == DistributedType.FSDP:
            reshard(self.trainer.model_wrapped)

    def _run_backbone(self, model: nn.Module, **inputs: Tensor) -> None:
        with self.trainer.accelerator.autocast():
            self.trainer.backbone.causal_lm(model).base_model(**inputs, use_cache=False)

    def _devices(self, model: Any) -> list[torch.device]:
        """Where the model's random numbers come from: the CPU's generator, and that of each device it lies on."""
        if self._generators is None:
            weights = self.trainer.backbone.causal_lm(model).parameters()
            used = {weight.device for weight in weights} | {self.trainer.accelerator.device}
            self._generators = [torch.device("cpu"), *(device for device in used if device.type not in ("cpu", "meta"))]
        return self._generators
