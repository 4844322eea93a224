"""Checkpoints that are whole or not there, known to be as they were written, and one more when the scheduler says stop.

A checkpoint is written aside, with the size and SHA-256 of each of its files, and takes its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from transformers import TrainerCallback

from capo_rl.runs.records import RunFolderError, write_json
from capo_rl.runs.saved_state import STATE_FILE
from capo_rl.trainers.trl import CAPOTrainer

MANIFEST = "manifest.json"
ASIDE = ".unfinished"
_TELLING = (signal.SIGTERM, signal.SIGINT)


class CheckpointError(RunFolderError):
    """A checkpoint that can't be written or gone on from; the message names the file and the fix."""


class WholeCheckpoints(CAPOTrainer):
    """`CAPOTrainer` whose checkpoints never exist in part; the folder must be one that all processes share.

    Raises `CheckpointError`, and leaves the checkpoints that are there, when the disk is full.
    """

    _aside: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._aside = folder / ASIDE
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(self._aside / name)
                shutil.rmtree(folder / name, ignore_errors=True)
                os.replace(self._aside / name, folder / name)
                if self.args.save_total_limit is not None and self.args.save_total_limit > 0:  # as transformers has it
                    for old in list(checkpoints(folder).values())[self.args.save_total_limit :]:
                        shutil.rmtree(old)
        except Exception as error:
            if not _disk_is_the_cause(error, folder):
                raise
            raise CheckpointError(
                f"{folder / name}: not written ({error}); make room, or give another output_dir. {_advice(folder)}"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)
            self._aside = None


class StopWhenTold(TrainerCallback):
    """On SIGTERM or Ctrl-C: finish the step, write a checkpoint, end training; on a second one, die at once.

    Of several processes one may be told a step before the others, so they agree after each step.
    """

    def __init__(self) -> None:
        self.told = 0  # by which signal
        self._before: dict[signal.Signals, Any] = {}

    @property
    def status(self) -> int:
        """The exit status of a run that was told to stop, as shells give it."""
        return 128 + self.told

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = {number: signal.signal(number, self._tell) for number in _TELLING}

    def _tell(self, number: int, frame: Any) -> None:
        self.told = number
        for each in _TELLING:
            signal.signal(each, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            told = torch.tensor(self.told, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.told = int(told)
        if self.told:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, before in self._before.items():
            signal.signal(number, before)


class FiniteWeights(TrainerCallback):
    """Raises `CheckpointError` after a step that left weights that are not finite, before they are saved or used."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # of a sharded weight each process looks at its own part
        own = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.parameters())
        if not all(bool(weight.isfinite().all()) for weight in own):
            raise CheckpointError(
                f"{args.output_dir}: step {state.global_step} left weights that are not finite, since a loss or a "
                f"gradient was not, and they are not saved. {_advice(Path(args.output_dir))}"
            )


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, the newest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def resume_point(folder: str | Path) -> str | None:
    """The newest checkpoint of a run, None if there is none.

    Raises `CheckpointError` if it is not as it was written; the message names the file, and the checkpoint before it
    that is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in checkpoints(Path(folder)).values():
        if (damage := damage_of(checkpoint)) is None:
            if not damaged:
                return str(checkpoint)
            break
        damaged.append((checkpoint, damage))
    else:
        if not damaged:
            return None
        checkpoint = None
    remove = " and ".join(str(path) for path, _ in damaged)
    offer = f"go on from {checkpoint}, which is whole" if checkpoint else "begin again: there is no other"
    raise CheckpointError(f"{damaged[0][1]}; remove {remove} to {offer}")


def asked_point(checkpoint: str) -> str:
    """The checkpoint that `resume_from_checkpoint` names.

    Raises `CheckpointError` if it is none, or not as it was written.
    """
    if not Path(checkpoint).is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint={checkpoint}: no such folder; give a checkpoint-N of a run, or leave it out: a "
            "run goes on by itself from the newest in its output_dir"
        )
    if (damage := damage_of(Path(checkpoint))) is not None:
        raise CheckpointError(f"resume_from_checkpoint={checkpoint}: {damage}; give another checkpoint")
    return checkpoint


def check_resumable(checkpoint: str) -> None:
    """Raises `CheckpointError` for a checkpoint that has weights and nothing else."""
    if not Path(checkpoint, STATE_FILE).exists():
        raise CheckpointError(
            f"{checkpoint} was written with save_only_model: true and has no optimizer, so no run can go on from it; "
            "to start from its weights give it as model_name_or_path, with another output_dir"
        )


def seal(checkpoint: Path) -> None:
    """Write down the size and the SHA-256 of each file of a checkpoint, in the checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    write_json(checkpoint / MANIFEST, {str(path.relative_to(checkpoint)): _identity(path) for path in files})


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if each of its files is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{checkpoint / MANIFEST} is missing or not JSON, so nobody knows whether the checkpoint is whole"
    for name, written in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != written["bytes"]:
            return f"{path} has {size:,} of the {written['bytes']:,} bytes that were written"
        if _identity(path) != written:
            return f"{path} is not what was written (its SHA-256 differs)"
    return None


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _disk_is_the_cause(error: Exception, folder: Path) -> bool:
    # of a full disk torch says `RuntimeError`, and tokenizers say `Exception`
    return isinstance(error, OSError | SafetensorError) or shutil.disk_usage(folder).free < 2**20


def _advice(folder: Path) -> str:
    last = next(iter(checkpoints(folder).values()), None)
    if last is None:
        return "There is no earlier checkpoint"
    if not (last / STATE_FILE).exists():
        return f"{last} has weights and nothing to go on with, since save_only_model is true"
    return f"The same command goes on from {last}"
