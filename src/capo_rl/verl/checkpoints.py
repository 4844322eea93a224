"""Whether a checkpoint of verl's is one for these workers."""

from __future__ import annotations

from pathlib import Path


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
