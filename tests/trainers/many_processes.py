"""Started in N processes: a share of each batch in each of them, with completions that depend on their place alone.

    PYTHONPATH=tests torchrun --nproc-per-node=N many_processes.py FOLDER '{"name": "result", ...settings}'

Writes FOLDER/NAME-RANK.pt: weights, moments, the verdicts and shifts of each completion, the figures of every step.
With a list of such settings it makes one run after another, which saves starting.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from capo_rl import CAPOConfig, CAPOTrainer
from capo_rl.curvature.step import AdamStep
from conftest import PAPERS, SETTINGS, WORDS, make_model, make_tokenizer, prompts, wants_even_words


class SameCompletions(CAPOTrainer):
    """The i-th completion of a step is the same however many processes share the step."""

    lengths = range(1, SETTINGS["max_completion_length"] + 1)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        step = self.state.global_step
        completions = []
        for i in range(first, first + len(prompt_ids)):
            draw = torch.Generator().manual_seed(1000 * step + i)
            length = self.lengths[int(torch.randint(len(self.lengths), (1,), generator=draw))]
            completions.append(torch.randint(3, len(WORDS), (length,), generator=draw).tolist())
        return completions, None


def shard_on_a_cpu() -> None:
    """Accelerate takes FSDP for a matter of accelerators, and torch does not: tell it so."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    init = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def partition_on_a_cpu() -> None:
    """DeepSpeed's too, and it does not look for a CPU's backend."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def scale_on_a_cpu() -> None:
    """Accelerate leaves fp16 out on CPUs, without a word, though torch has both its parts there. At the scale that this
    one starts with every gradient overflows, and at the next one none does."""
    init = Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-37)

    Accelerator.__init__ = with_scaler


def main(folder: str, runs: list[dict]) -> None:
    if "fsdp" in runs[0]:
        shard_on_a_cpu()
    if "deepspeed" in runs[0]:
        partition_on_a_cpu()
    scale_on_a_cpu()
    for settings in runs:
        AcceleratorState._reset_state()  # another run may have another precision
        train(folder, settings)
    # An interpreter that takes its objects down one by one now and then aborts in gloo's threads ("terminate called
    # without an active exception"); what is tested is over.
    os._exit(0)


def held(trainer) -> int:
    """The bytes of the step model's moments in this process."""
    step = None if trainer.planner is None else trainer.planner.step
    return sum(each.nbytes for each in step.storage(0, torch.zeros(0))) if isinstance(step, AdamStep) else 0


def train(folder: str, settings: dict) -> None:
    name, world = settings.pop("name"), int(os.environ.get("WORLD_SIZE", "1"))
    completions = settings.pop("completions", 8)  # a step, of all processes
    poisoned = settings.pop("poisoned", None)  # the step at which the last process's loss is NaN
    blind = settings.pop("blind", False)  # TRL does not look at the gradient's norm, as older ones without clipping
    settings.setdefault("per_device_train_batch_size", completions // world)
    lora = settings.pop("lora", False)
    trainer = SameCompletions(
        model=make_model(),
        reward_funcs=wants_even_words,
        args=CAPOConfig(output_dir=folder, **(SETTINGS | PAPERS | {"gradient_accumulation_steps": 1} | settings)),
        train_dataset=prompts(),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, init_lora_weights=False) if lora else None,
    )
    verdicts: dict[tuple[int, ...], tuple[list[bool], list[float]]] = {}
    figures: list[dict[str, float]] = []
    select, record = trainer._select, trainer.record_figures

    def spy(model, inputs, mask, *rest):
        select(model, inputs, mask, *rest)
        if trainer.planner is None:
            return  # nothing is predicted
        planned = trainer.planner.micro_batches[-1]
        lengths = mask.sum(1).tolist()
        columns = (inputs["completion_ids"][mask], planned.keep, planned.shifts.m_f)
        for ids, keep, m_f in zip(*(column.split(lengths) for column in columns), strict=True):
            # TRL shuffles each process's completions, so they are told apart by what they say.
            verdicts[trainer.state.global_step, *ids.tolist()] = keep.tolist(), m_f.tolist()

    if blind:
        trainer._get_grad_norm = lambda model, grad_norm=None: grad_norm
    compute = trainer._compute_loss

    def compute_loss(*args):
        spoil = trainer.state.global_step == poisoned and trainer.accelerator.process_index == world - 1
        return compute(*args) * (float("nan") if spoil else 1.0)

    trainer._compute_loss = compute_loss
    sharded: list[bool] = []
    head = trainer.backbone.head

    def watched_head(model):
        found = head(model)
        # DeepSpeed's weight is empty until it is gathered
        sharded.append(isinstance(found.weight, DTensor) or not found.weight.numel())
        return found

    trainer.backbone.head = watched_head
    trainer._select = spy
    trainer.record_figures = lambda each: (figures.append(each), record(each))[1]
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    rank = trainer.accelerator.process_index
    torch.save(
        {
            "weights": {} if state is None else {key: value.detach().float() for key, value in state.items()},
            "moments": {} if trainer.planner is None else trainer.planner.step.state_dict(),
            "held": held(trainer),
            "verdicts": verdicts,
            "figures": figures,
            "sharded_head": any(sharded),
        },
        Path(folder, f"{name}-{rank}.pt"),
    )
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    main(sys.argv[1], asked if isinstance(asked, list) else [asked])
