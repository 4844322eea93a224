"""What a checkpoint holds beside verl's own: moments, the share, what the budget's control has learned; and whether it
is one for these workers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from capo_rl.planning.planner import Planner
from capo_rl.planning.trust_region import TrustRegion
from capo_rl.planning.updates import Updates
from capo_rl.runs.saved_state import STATE_FILE, load_state, save_state

logger = logging.getLogger(__name__)


def save_beside(
    folder: Path, updates: Updates, region: TrustRegion | None, counters: Mapping[str, Any], writes: bool
) -> None:
    """Write what it takes to go on, with the engine's `counters`, beside what verl has written into a folder.

    It is the same in every process, so one of them `writes`; of moments that are spread over them each has a part.
    """
    tensors = updates.state_dict(here=writes)
    if writes:
        known = {
            "engine": dict(counters),
            "region": {} if region is None else region.state_dict(),
            "predicts": isinstance(updates, Planner),
        }
        save_state(folder / STATE_FILE, tensors, known)


def load_beside(
    folder: Path, updates: Updates, region: TrustRegion | None, device: torch.device, decides: bool
) -> dict[str, Any]:
    """Go on from what `save_beside` wrote; returns the engine's counters.

    Raises `FileNotFoundError` for a checkpoint without it, and `ValueError` for one without moments where the mode
    `decides` by them.
    """
    if not (folder / STATE_FILE).exists():
        raise FileNotFoundError(
            f"the checkpoint has no {STATE_FILE}: it was not written with CAPO. To start from its weights without "
            "resuming, give the model's folder as actor_rollout_ref.model.path"
        )
    tensors, known = load_state(folder / STATE_FILE, torch.device("cpu"))  # of moments a process may want only a part
    if isinstance(updates, Planner) and not known["predicts"] and not decides:
        logger.warning("%s has no moments of a step model: they start from zero, and are off for a while", folder)
        Updates.load_state_dict(updates, tensors)
    else:
        updates.load_state_dict(tensors, device)
    if region is not None and known["region"]:
        region.load_state_dict(known["region"])
    return known["engine"]


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
