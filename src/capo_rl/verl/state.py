"""What a checkpoint holds beside verl's own: moments, the share, what the budget's control has learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from capo_rl.runs.records import written_whole

STATE_FILE = "capo_state.safetensors"


def save_state(folder: str, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    """Write tensors and what JSON can say beside them; whole or not at all."""
    with written_whole(Path(folder) / STATE_FILE) as unfinished:
        save_file(
            {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()},
            unfinished,
            metadata={"counters": json.dumps(counters)},
        )


def load_state(folder: str, device: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_state` wrote, or None for a checkpoint without CAPO."""
    path = Path(folder) / STATE_FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt", device=device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, json.loads((file.metadata() or {}).get("counters", "{}"))


def check_workers(folder: str, workers: int) -> None:
    """Raises `ValueError` for a checkpoint of another number of workers, whose shards verl can't read."""
    names = [path.name for path in Path(folder).glob("model_world_size_*_rank_*.pt")]
    written = {int(name.split("_")[3]) for name in names}
    if written and workers not in written:
        raise ValueError(
            f"{folder} was written by {min(written)} workers, and these are {workers}: verl reads each "
            "worker's own shard, so go on with as many (trainer.n_gpus_per_node, trainer.nnodes); or start from "
            "its weights, merged by `python -m verl.model_merger merge`, as actor_rollout_ref.model.path"
        )
