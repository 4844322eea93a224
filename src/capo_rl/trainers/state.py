"""What a checkpoint holds beside TRL's own: moments, counters, the state of the budget, and rollouts still in use."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capo_rl.curvature.step_model import DECIDING
from capo_rl.runs.saved_state import STATE_FILE, load_state, save_state

logger = logging.getLogger(__name__)

# Rollouts that are still to be trained on, of each process its own.
ROLLOUTS_FILE = "capo_rollouts_{process}.safetensors"

# Several processes on CPUs are on "cpu:0" to accelerate. Transformers before 5.18 asks torch to load the optimizer's
# moments there, and torch knows the place as "cpu" alone.
torch.serialization.register_package(
    priority=11, tagger=lambda storage: None, deserializer=lambda storage, to: storage if to == "cpu:0" else None
)


def save_beside(trainer: Any, folder: Path) -> None:
    """Write what a `CAPOTrainer` needs to go on, beside what TRL has written into a checkpoint's folder."""
    process = trainer.accelerator.process_index
    # In the middle of a generation batch the rest of it is still to be trained on.
    rollouts, batch = trainer._buffered_inputs, trainer.args.steps_per_generation * trainer.num_iterations
    if (
        rollouts is not None
        and trainer._step % batch
        and (lost := save_rollouts(folder / ROLLOUTS_FILE.format(process=process), rollouts))
    ):
        logger.warning(
            "%s: completions that are still to be trained on have %s, which a checkpoint can't hold: a run "
            "that goes on from here generates them anew",
            folder,
            ", ".join(lost),
        )
    # The same in every process, so one of them writes it; of moments that are spread over processes each has a part.
    writes: bool = trainer.args.should_save
    tensors = {} if trainer.planner is None else trainer.planner.step.state_dict(here=writes)
    if not writes:
        return
    updates, planner, steps = trainer.updates, trainer.planner, trainer.optimizer_steps
    counters: dict[str, Any] = {
        "completions": trainer.completions,
        "micro_steps": trainer._step,
        "processes": trainer.accelerator.num_processes,
        "predicts": planner is not None,
    }
    if updates is not None:
        counters |= {
            "steps_skipped": updates.steps_skipped,
            "steps_nonfinite": updates.steps_nonfinite,
            "budget": {} if steps.budget is None else steps.budget.state_dict(),
            "noise_known": steps.noise_known,
        }
    if planner is not None:
        counters |= {
            "accepted_tokens": planner.accepted_tokens,
            "share": {} if planner.share is None else planner.share.state_dict(),
        }
    save_state(folder / STATE_FILE, tensors, counters)


def load_beside(trainer: Any, checkpoint: Path) -> None:
    """Go on from what `save_beside` wrote.

    Raises `FileNotFoundError` for a checkpoint without it, unless the trainer only watches.
    """
    path = checkpoint / STATE_FILE
    if not path.exists():
        if trainer.args.capo_mode == "monitor":
            logger.warning("%s is missing: the step model's moments start from zero, and are off for a while", path)
            return
        raise FileNotFoundError(
            f"{path} is missing: {checkpoint} is not a checkpoint of CAPOTrainer. To start from its weights "
            "without resuming, pass the folder as the model"
        )
    tensors, counters = load_state(path, torch.device("cpu"))  # of moments a process may want only a part
    updates, planner, steps = trainer.updates, trainer.planner, trainer.optimizer_steps
    trainer.completions, trainer._step = counters["completions"], counters["micro_steps"]
    if updates is not None:
        updates.steps_skipped = counters.get("steps_skipped", 0)
        updates.steps_nonfinite = counters.get("steps_nonfinite", 0)
        steps.noise_known = counters.get("noise_known", False)
        if steps.budget is not None and (kept := counters.get("budget")):
            steps.budget.load_state_dict(kept)
    predicted = counters.get("predicts", True)
    if planner is not None and not predicted and trainer.args.capo_mode not in DECIDING:
        logger.warning("%s has no moments of a step model: they start from zero, and are off for a while", path)
    elif planner is not None:
        planner.accepted_tokens = counters.get("accepted_tokens", 0)
        if planner.share is not None and (kept := counters.get("share")):
            planner.share.load_state_dict(kept)
        planner.step.load_state_dict(tensors, trainer.accelerator.device)
    if counters["processes"] != trainer.accelerator.num_processes:
        trainer._step = 0  # a generation batch starts here
        logger.warning(
            "%s was written by %d processes and goes on with %d: weights, moments and counters are the same; "
            "completions that were not trained on yet are generated anew, and random numbers differ",
            checkpoint,
            counters["processes"],
            trainer.accelerator.num_processes,
        )
        return
    path = checkpoint / ROLLOUTS_FILE.format(process=trainer.accelerator.process_index)
    if path.exists():
        trainer._buffered_inputs = load_rollouts(path, trainer.accelerator.device)


def save_rollouts(path: Path, rollouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the inputs of each micro-batch, or nothing where some are neither tensors nor what JSON gives back as it
    was; returns the names of those."""
    parts = {f"{i}.{name}": value for i, inputs in enumerate(rollouts) for name, value in inputs.items()}
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in parts.items() if name not in tensors}
    lost = sorted({name.split(".", 1)[1] for name, value in others.items() if not _is_plain(value)})
    if not lost:
        save_state(path, tensors, others)
    return lost


def load_rollouts(path: Path, device: torch.device) -> list[dict[str, Any]]:
    """What `save_rollouts` wrote."""
    rollouts: dict[int, dict[str, Any]] = {}
    tensors, others = load_state(path, device)
    for name, value in (tensors | others).items():
        i, key = name.split(".", 1)
        rollouts.setdefault(int(i), {})[key] = value
    return [rollouts[i] for i in sorted(rollouts)]


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back as it was."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
