"""What a run logged, of `capo train` or of another trainer: read from files that are not trusted, step by step."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_rl.runs.records import last_checkpoint

Entry = dict[str, float]
Series = list[tuple[int, float]]

_STEPS = ("global_step", "step", "_step")
_RUNS = ("run_name", "run", "run_id")


class DoctorError(ValueError):
    """Records that nothing can be said of; the message names the place and the fix."""


@dataclass(frozen=True)
class Log:
    """What a run logged: its figures step by step, where they were read, and its settings where they are on record."""

    source: Path
    entries: list[Entry]
    settings: Mapping[str, Any] | None = None

    def series(self, names: Iterable[str]) -> Series:
        """A figure at the steps that have it, under the first of its names that is there."""
        for name in names:
            if found := [(int(e["step"]), e[name]) for e in self.entries if math.isfinite(e.get(name, math.nan))]:
                return found
        return []


def read_log(path: str | Path) -> Log:
    """Read what a run logged.

    A folder: `metrics.jsonl` of `capo train`, else the `trainer_state.json` of any TRL run (the newest checkpoint's, if
    there is none in the folder itself), else TensorBoard's events. A file: one of these, a wandb or trackio export as
    CSV, JSON or JSON Lines, or a result of `capo bench`.

    Raises `DoctorError` for what is not there, cut, or of another format, and for an export of several runs.
    """
    path = Path(path)
    if not path.exists():
        raise DoctorError(f"{path}: no such file or folder; give the folder of a run")
    source = _inside(path) if path.is_dir() else path
    try:
        if source.name.startswith("events.out.tfevents."):
            return Log(source, _by_step(_events(source.parent)))
        reads = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv}
        if (read := reads.get(source.suffix.lower())) is None:
            raise DoctorError(
                f"{source}: not a format that is read here; give the folder of a run, a trainer_state.json, or an "
                "export as .jsonl, .json or .csv"
            )
        rows = list(read(source))
        if source.name == "metrics.jsonl":  # ours, where null is what JSON can't say: NaN or an infinity
            rows = [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]
        settings = _settings(source)
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError) as error:
        raise DoctorError(f"{source}: can't be read ({error}); give the folder of a run") from None
    if runs := {str(row[name]) for row in rows for name in _RUNS if isinstance(row.get(name), str)}:
        _one(source, runs)
    return Log(source, _by_step(rows), settings)


def _inside(folder: Path) -> Path:
    """The file in a folder that has a run's figures."""
    for name in ("metrics.jsonl", "trainer_state.json"):
        if (folder / name).is_file():
            return folder / name
    if (checkpoint := last_checkpoint(folder)) is not None:
        return Path(checkpoint, "trainer_state.json")
    if whole := sorted(folder.glob("checkpoint-*/trainer_state.json")):
        return whole[-1]  # cut, which reading it will say
    pattern = "events.out.tfevents.*"
    events = sorted(file for depth in ("", "*/", "*/*/") for file in folder.glob(depth + pattern))
    if len(folders := {file.parent for file in events}) > 1:
        some = ", ".join(sorted(map(str, folders))[:3])
        raise DoctorError(f"{folder}: TensorBoard events of {len(folders)} runs ({some}); give the folder of one")
    if events:
        return events[-1]
    raise DoctorError(
        f"{folder}: no metrics there (metrics.jsonl, trainer_state.json, checkpoint-N/trainer_state.json, TensorBoard "
        "events); give the folder of a run, or the file of an export"
    )


def _settings(source: Path) -> Mapping[str, Any] | None:
    """The settings that `capo train` wrote beside its metrics, or `capo bench` into its result."""
    of = source if source.suffix == ".json" and source.name != "trainer_state.json" else source.parent / "run.json"
    try:
        content = json.loads(of.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        return None
    # another's file: nothing of it reaches a terminal or a comparison but plain values
    plain = {name: x for name, x in found.items() if isinstance(x, bool | int | float | str) and str(x).isprintable()}
    return {name: x for name, x in plain.items() if name.startswith("capo_") or name == "learning_rate"}


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "{}")
        except ValueError as error:
            if number == len(lines):  # of a run that goes on, or was killed
                return
            raise DoctorError(f"{path}: line {number} is not JSON ({error}); remove it") from None
        if not isinstance(row, dict):
            raise DoctorError(f"{path}: line {number} is no JSON object; one object a step is read")
        yield row


def _json(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DoctorError(
            f"{path}: not whole JSON ({error}); if it was cut while being written, give an earlier checkpoint"
        ) from None
    rows = content
    if isinstance(content, dict) and isinstance(curves := content.get("curves"), dict):
        columns = {name: values for name, values in curves.items() if isinstance(values, list)}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]
    elif isinstance(content, dict):
        rows = content.get("log_history")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DoctorError(f"{path}: JSON, but not a trainer_state.json, a list of steps, or a result of `capo bench`")
    yield from rows


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        names = [name for name in rows.fieldnames or [] if not name.endswith(("__MIN", "__MAX"))]
        # wandb's charts have a column for each run: `RUN - train/reward`
        _one(path, {run for run, dash, _ in (name.rpartition(" - ") for name in names) if dash})
        for row in rows:
            yield {name.rpartition(" - ")[2]: row[name] for name in names}


def _events(folder: Path) -> Iterator[Mapping[str, Any]]:
    if importlib.util.find_spec("tensorboard") is None:
        raise DoctorError(f"{folder}: has TensorBoard events, and reading them takes `pip install tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            yield {"step": event.step, name: event.value}


def _one(source: Path, runs: set[str]) -> None:
    if len(runs) > 1:
        some = ", ".join(sorted(ascii(run) for run in runs)[:3])
        raise DoctorError(f"{source}: {len(runs)} runs in one export ({some}); export one")


def _by_step(rows: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The numbers of each step, in order; of what was logged twice, as after a resumption, the later."""
    steps: dict[int, Entry] = {}
    for number, row in enumerate(rows, 1):
        flat = _flat(row)
        step = next((flat[name] for name in _STEPS if math.isfinite(flat.get(name, math.nan))), number)
        entry = {name: x for name, x in flat.items() if name not in _STEPS}
        steps.setdefault(int(step), {"step": int(step)}).update(entry)
    return [steps[step] for step in sorted(steps)]


def _flat(row: Mapping[str, Any]) -> Entry:
    """A row's numbers, by TRL's names: `train/` goes, and so do the drawers that trackio and verl put them into."""
    flat: Entry = {}
    for name, value in row.items():
        if isinstance(value, str) and name == "metrics":
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if name in ("metrics", "data") and isinstance(value, Mapping):
            flat |= _flat(value)
        elif (number := as_number(value)) is not None:
            short = str(name).removeprefix("train/")
            flat[short.lower() if short.lower() in _STEPS else short] = number
    return flat


def as_number(value: Any) -> float | None:
    """A value as a float, None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
