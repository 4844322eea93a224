"""What a checkpoint holds beside the engine's own, in one file: tensors, and counters that JSON can say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, device

from capo_rl.runs.records import written_whole

STATE_FILE = "capo_state.safetensors"


def save_state(path: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Write tensors and counters; whole or not at all."""
    with written_whole(path) as unfinished:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            unfinished,
            metadata={"counters": json.dumps(counters)},
        )


def load_state(path: Path, onto: device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote."""
    with safe_open(path, framework="pt") as file:  # safetensors knows no "cpu:0", which is how Accelerate counts CPUs
        tensors = {name: file.get_tensor(name).to(onto) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, json.loads((file.metadata() or {}).get("counters", "{}"))
