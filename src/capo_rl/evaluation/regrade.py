"""`capo regrade`: the completions of an evaluation graded again, and which verdicts are others now."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from capo_rl.answers import Rule
from capo_rl.evaluation.benchmarks import BENCHMARKS
from capo_rl.evaluation.folder import EvaluationError, encoded, read_evaluation, read_settings
from capo_rl.evaluation.summary import summarize
from capo_rl.rewards.grading import Grader
from capo_rl.runs.records import sole_writer, write_json, written_whole


@dataclass(frozen=True)
class Change:
    """A verdict that is another one now: the answer that was read, and the verdict and its reason before and after."""

    problem: str
    answer: str | None
    gold: str
    before: tuple[bool | None, str]
    after: tuple[bool | None, str]


@dataclass(frozen=True)
class Regraded:
    """How many completions were graded again, how many verdicts changed, to right and from right, and what can't be.

    `changes` are these verdicts; one that stayed, with another reason, is none.
    """

    completions: int
    changed: int
    now_right: int
    no_longer_right: int
    secret: tuple[str, ...]
    changes: tuple[Change, ...] = ()


def regrade(folder: str | Path) -> Regraded:
    """Grade the completions of an evaluation again, from its files alone, and write the new verdicts and summary.

    Raises `EvaluationError` if the folder holds no evaluation, or one whose rules this version does not know, and
    `RunFolderError` for one that another process writes to.
    """
    folder = Path(folder)
    read_settings(folder)
    completions = 0
    secret = []
    changes: list[Change] = []
    with sole_writer(folder), Grader() as grader:
        evaluation = read_evaluation(folder)
        for name, lines in evaluation.items():
            if BENCHMARKS[name].gated:
                secret.append(name)
                continue
            pairs = [(line, answer) for line in lines for answer in line["completions"]]
            completions += len(pairs)
            try:
                rules = [Rule(**line["rule"]) for line, _ in pairs]
            except (TypeError, ValueError) as error:
                raise EvaluationError(f"{folder}, {name}: rules of another version of capo ({error})") from None
            verdicts = grader.grade_all(
                [answer["text"] for _, answer in pairs], [line["gold"] for line, _ in pairs], rules, progress=True
            )
            for (line, answer), verdict in zip(pairs, verdicts, strict=True):
                if verdict.correct is not answer["correct"]:
                    old, new = (answer["correct"], answer["reason"]), (verdict.correct, verdict.reason)
                    changes.append(Change(f"{name} {line['id']}", verdict.extracted, line["gold"], old, new))
                answer |= dataclasses.asdict(verdict)
            with written_whole(folder / f"{name}.jsonl") as unfinished:
                unfinished.write_bytes(b"".join(map(encoded, lines)))
        write_json(folder / "summary.json", summarize(evaluation))
    now_right = sum(change.after[0] is True for change in changes)
    no_longer = sum(change.before[0] is True for change in changes)
    return Regraded(completions, len(changes), now_right, no_longer, tuple(secret), tuple(changes))
