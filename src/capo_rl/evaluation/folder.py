"""The folder of an evaluation:

evaluation.json    the settings, and the versions of the libraries
BENCHMARK.jsonl    one JSON object a problem: id, prompt, gold answer, rule, and its graded completions
summary.json       the figures of each benchmark, and their mean
.lock              held while a process writes here, and whose it is

Of a secret benchmark (GPQA, whose authors ask that its text never be published) only ids, extracted letters and
verdicts are kept: no prompt and no completion. So `capo regrade`, which grades what is on disk again, can't do it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capo_rl.evaluation.benchmarks import BENCHMARKS

Line = dict[str, Any]  # of a benchmark's file: one problem
Evaluation = dict[str, list[Line]]  # the lines of each benchmark


class EvaluationError(ValueError):
    """An evaluation that can't be run or read; the message names the reason and the fix."""


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of an evaluation, its backend among them. Raises `EvaluationError` if the folder holds none."""
    try:
        return json.loads((Path(folder) / "evaluation.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        raise EvaluationError(f"{folder}: not the folder of an evaluation; give one that `capo eval` wrote") from None


def read_evaluation(folder: str | Path) -> Evaluation:
    """What an evaluation has of each benchmark, in the order of the benchmarks. Raises `EvaluationError` for none."""
    read_settings(folder)
    files = {name: Path(folder) / f"{name}.jsonl" for name in BENCHMARKS}
    evaluation = {name: lines for name, file in files.items() if file.exists() and (lines := read_lines(file))}
    if not evaluation:
        raise EvaluationError(f"{folder}: no problem has been completed yet; run `capo eval` on it again")
    return evaluation


def read_lines(path: Path) -> list[Line]:
    """The problems of a benchmark's file, without a last line that is not whole.

    Raises `EvaluationError` for a line that is no graded problem.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, text in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            line = json.loads(text)
            line["id"], line["completions"][0]["correct"]
        except (ValueError, TypeError, KeyError, IndexError):
            raise EvaluationError(f"{path}, line {number}: not a graded problem; remove the line") from None
        lines.append(line)
    return lines


def encoded(line: Line) -> bytes:
    """A line of a benchmark's file."""
    # In ASCII: no line break of Unicode's is in it, and half a surrogate pair comes back as it was.
    return json.dumps(line).encode() + b"\n"
