"""The folder of a run: what was asked for, what was measured at each step, and what came of it.

run.json        the settings that differ from their defaults, without secrets, and the versions of the libraries
metrics.jsonl   one JSON object a logged step (docs/metrics.md)
summary.json    written when the run is over
tokens/         with capo_tokens_every: what each token of a step got (`tokens`)
curves.png
README.md       the model card
.lock           held while a process writes here, and whose it is
checkpoint-N/   weights, optimizer, step model, random states
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capo_rl.curvature.step_model import fit_of_name
from capo_rl.runs.secrets import without_secrets

Metrics = list[dict[str, Any]]

LOCK = ".lock"  # whose run this is; it means nothing when that process is gone
_LIBRARIES = ("capo-rl", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "math-verify")


logger = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """An output folder that this run can't use; the message names the reason and the fix."""


def check_folder(folder: str | Path, settings: Mapping[str, Any]) -> int | None:
    """Whether a run with these settings may start, or go on, in this folder; writes nothing.

    Returns the `max_steps` of a run that is the same but shorter, which they make longer, else None. Raises
    `RunFolderError` for a folder that holds a run with other settings, or other things.
    """
    folder = Path(folder)
    # through JSON and back, as the settings of the earlier run went
    asked = json.loads(_json(settings))
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not place.is_dir():
        raise RunFolderError(f"output_dir={folder}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunFolderError(f"output_dir={folder}: {place} can't be written; give another folder, or its rights")
    if not folder.exists() or all(path.name == LOCK for path in folder.iterdir()):
        return None
    try:
        there = json.loads((folder / "run.json").read_text())["settings"]
        there = without_secrets(there)  # an earlier version wrote them
    except (OSError, ValueError, KeyError):
        raise RunFolderError(f"output_dir={folder}: not empty, and not a run of capo; choose another") from None
    # a step model may be named or left to `auto`, whichever was the default
    there, asked = ({**each, "capo_step": _step_model(each)} for each in (there, asked))
    if there == asked:
        return None
    other = sorted(name for name in there.keys() | asked.keys() if there.get(name) != asked.get(name))
    if other == ["max_steps"] and 0 < there.get("max_steps", -1) < asked.get("max_steps", -1):
        return there["max_steps"]
    raise RunFolderError(
        f"output_dir={folder}: holds a run with other settings ({', '.join(other)}); choose another folder, or "
        "remove this one. Only a larger max_steps may differ, and makes the run longer"
    )


def _step_model(settings: Mapping[str, Any]) -> str:
    if (named := settings.get("capo_step", "auto")) != "auto":
        return named
    return fit_of_name(settings.get("optim", "adamw_torch"), settings.get("optim_args")).model or "adam"


@contextmanager
def sole_writer(folder: str | Path, field: str = "") -> Iterator[None]:
    """Keep other processes from writing to the folder; the system ends that with this process, however it ends.

    Raises `RunFolderError`, naming the process that has it and the `field` that names the folder, or for a folder that
    can't be written to.
    """
    folder = Path(folder)
    named = f"{field}={folder}" if field else str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{named}: can't be written to ({error}); give another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunFolderError(
                f"{named}: {holder} is writing to it; wait for that one or stop it, or give another folder"
            ) from None
        except OSError as error:
            logger.warning("%s: can't be locked (%s), so see that only one run writes to it", named, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def start_run(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Write down what was asked for, and with which libraries it is run."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "summary.json").unlink(missing_ok=True)  # of a run that is made longer
    write_json(Path(folder) / "run.json", {"settings": settings, "versions": versions()})


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a run's folder; one that was being written when the run was killed is none.

    The trainer's own state is written last, so a checkpoint that has it has everything.
    """
    steps = []
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        try:
            steps.append((json.loads(state.read_text())["global_step"], str(state.parent)))
        except (OSError, ValueError, KeyError):
            continue
    return max(steps)[1] if steps else None


def write_metrics(path: Path, entries: Iterable[Mapping[str, Any]], *, append: bool = False) -> None:
    """Write logged steps as JSON Lines; NaN and infinities become null."""
    with path.open("a" if append else "w", encoding="utf-8") as file:
        for entry in entries:
            file.write(_json(entry) + "\n")


def read_metrics(folder: str | Path) -> Metrics:
    """The logged training steps of a run, in order.

    Raises `RunFolderError` if the folder has none.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise RunFolderError(f"{path}: no such file; give the folder of a run")
    if not (steps := logged_steps(folder)):
        raise RunFolderError(f"{path}: no training step is logged in it; train first (with logging_strategy: steps)")
    return steps


def logged_steps(folder: str | Path) -> Metrics:
    """The same, but none where there is none: a run may log nothing (`logging_strategy: no`)."""
    return [entry for entry in _entries(Path(folder) / "metrics.jsonl") if "reward" in entry]


def rewind_metrics(path: Path, step: int) -> None:
    """Leave out what was logged after a step: a resumed run logs it again."""
    write_metrics(path, [entry for entry in _entries(path) if entry["step"] <= step] if path.exists() else [])


def _entries(path: Path) -> Metrics:
    # the last line of a run that was killed may be half a line
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON file whole or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_text(_json(content, indent) + "\n", encoding="utf-8")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`: it takes that name when the block is over, and never half of it does."""
    unfinished = path.with_suffix(".tmp")
    yield unfinished
    os.replace(unfinished, path)


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summarize(entries: Metrics) -> dict[str, Any]:
    """What a run came to: its reward at both ends, what was rejected, how far its updates went, and its costs.

    `first` and `last` are means over a tenth of the logged steps; figures that the run did not log are left out.

    >>> steps = [{"step": i, "reward": i / 10, "capo/completions": 16 * i} for i in range(1, 11)]
    >>> summarize(steps)
    {'steps': 10, 'reward_first': 0.1, 'reward_last': 1.0, 'reward_best': 1.0, 'completions': 160}
    """
    tenth = max(1, len(entries) // 10)
    rewards = column(entries, "reward")
    summary: dict[str, Any] = {
        "steps": entries[-1]["step"] if entries else 0,
        "reward_first": _mean(rewards[:tenth]),
        "reward_last": _mean(rewards[-tenth:]),
        "reward_best": max((_mean(rewards[i : i + tenth]) for i in range(len(rewards) - tenth + 1)), default=math.nan),
    }
    for name, key, of in (
        ("completions", "capo/completions", max),
        ("accepted_tokens", "capo/accepted_tokens", max),
        ("steps_skipped", "capo/steps_skipped", max),
        ("rejection_rate", "capo/rejection_rate", _mean),
        ("rejection_rate_positive", "capo/rejection_rate/positive", _mean),
        ("rejection_rate_negative", "capo/rejection_rate/negative", _mean),
        ("missing_mass", "capo/missing_mass/mean", _mean),
        ("kl_measured_mean", "capo/kl/measured", _mean),
        ("kl_measured_max", "capo/kl/measured", max),
        ("grad_norm_max", "grad_norm", max),
        ("rewards_missing", "capo/rewards_missing", sum),
        ("grader_timeouts", "grader/timeouts", sum),
        ("seconds", "seconds", sum),
        ("seconds_curvature", "capo/seconds", sum),
        ("seconds_kl", "capo/kl/seconds", sum),
    ):
        if values := column(entries, key):
            summary[name] = of(values)
    return summary


def column(entries: Metrics, name: str) -> list[float]:
    """The values of one figure at the steps that have it."""
    return [entry[name] for entry in entries if entry.get(name) is not None]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _json(content: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(content), indent=indent, default=str, allow_nan=False)


def _finite(content: Any) -> Any:
    """The content with NaN and infinities as None, which JSON can say."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
