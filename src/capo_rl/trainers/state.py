"""What a checkpoint holds beside TRL's own: moments, counters, the state of the budget, and rollouts still in use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from capo_rl.runs.records import written_whole

STATE_FILE = "capo_state.safetensors"
# Rollouts that are still to be trained on, of each process its own.
ROLLOUTS_FILE = "capo_rollouts_{process}.safetensors"


def save_state(path: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Write tensors and what JSON can say beside them; whole or not at all."""
    with written_whole(path) as unfinished:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            unfinished,
            metadata={"counters": json.dumps(counters)},
        )


def load_state(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote."""
    with safe_open(path, framework="pt") as file:  # safetensors knows no "cpu:0", which is how Accelerate counts CPUs
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, json.loads(file.metadata()["counters"])


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
