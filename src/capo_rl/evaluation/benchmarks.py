"""The eight benchmarks of the evaluation: where each comes from, how it is asked, and how it is graded.

"TEST" is the mean over all eight. A set is read from the hub at a fixed revision, or from a folder with one JSON
Lines file for each (`gsm8k.jsonl`, ...; one object a line with `id`, `problem` and `answer`; OlympiadBench also
`multiple`, `unit` and `tolerance`; GPQA `choices` in the order of the letters).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capo_rl.answers import Rule, number

_BOX = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_LIST = (
    "{problem}\n\nPlease reason step by step, and put all final answers, separated by commas, within one \\boxed{{}}."
)
_LETTER = "{problem}\n\n{choices}\n\nPlease reason step by step, and put the letter of your choice within \\boxed{{}}."

_MATH = Rule("math", fallbacks=True)
_NUMBER = Rule("number", fallbacks=True)
_INTEGER = Rule("integer", fallbacks=True)


class BenchmarkError(ValueError):
    """A benchmark that can't be loaded as it was published; the message says what to do."""


@dataclass(frozen=True)
class Problem:
    """One question as it is asked, its reference answer and its rule; the text of a `secret` one is never written."""

    benchmark: str
    id: str
    prompt: str
    gold: str
    rule: Rule
    secret: bool = False

    def __repr__(self) -> str:  # a traceback or a log must not show a secret question
        shown = "" if self.secret else f", prompt={self.prompt!r}, gold={self.gold!r}"
        return f"Problem({self.benchmark!r}, {self.id!r}{shown})"


@dataclass(frozen=True)
class Benchmark:
    """A row of the table.

    `hub`, `revision`, `config` and `split` name the data set on the hub, of which `read` takes a row and its number
    into the folder's columns. `count` problems are expected there, and `folder_count` in a folder, where the copy in
    use has another number. `samples` completions a problem are drawn for each score, at `temperature` and `top_p`.
    A `gated` set has to be asked for on the hub, and its questions are secret.
    """

    name: str
    title: str
    hub: str
    revision: str
    config: str | None
    split: str
    count: int
    rule: Rule
    read: Callable[[dict[str, Any], int], dict[str, Any]]
    prompt: str = _BOX
    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    gated: bool = False
    folder_count: int | None = None


def choice_order(record: str) -> list[int]:
    """GPQA's choices in the order of the letters; choice 0 is the right one.

    The four are sorted by the hexadecimal SHA-256 of `0:<record id>:<number>`, so that the order depends on nothing
    but the record: not on a random state, the row's place, or the machine.

    >>> choice_order("rec0"), choice_order("rec1")
    ([2, 1, 3, 0], [0, 1, 2, 3])
    """
    return sorted(range(4), key=lambda n: hashlib.sha256(f"0:{record}:{n}".encode()).hexdigest())


# --- a row of the hub's data set in the folder's columns


def _gsm8k(row: dict[str, Any], at: int) -> dict[str, Any]:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"id": f"gsm8k/test/{at}", "problem": row["question"], "answer": answer}


def _math500(row: dict[str, Any], at: int) -> dict[str, Any]:
    return {
        "id": "math/" + row["unique_id"].removesuffix(".json"),
        "problem": row["problem"],
        "answer": row["answer"],
    }


def _olympiadbench(row: dict[str, Any], at: int) -> dict[str, Any]:
    return {
        "id": f"olympiadbench/{row['id']}",
        "problem": row["question"],
        "answer": ",".join(row["final_answer"]).replace("$", "").strip(),
        "multiple": row["is_multiple_answer"],
        "unit": row["unit"],
        "tolerance": row["error"],
    }


def _minerva_math(row: dict[str, Any], at: int) -> dict[str, Any]:
    return {"id": f"minerva_math/{at}", "problem": row["question"], "answer": str(row["answer"])}


def _gpqa(row: dict[str, Any], at: int) -> dict[str, Any]:
    record = row["Record ID"]
    choices = [row["Correct Answer"], *(row[f"Incorrect Answer {n}"] for n in (1, 2, 3))]
    order = choice_order(record)
    return {
        "id": f"gpqa_diamond/{record}",
        "problem": row["Question"].strip(),
        "choices": [choices[n].strip() for n in order],
        "answer": "ABCD"[order.index(0)],
    }


def _whole(answer: Any) -> str:
    r"""`336^\circ` and `27.0` as whole numbers, without what the copies of these sets add.

    >>> _whole(27.0), _whole(r"336^\circ"), _whole("033")
    ('27', '336', '33')
    """
    found = number(str(answer))
    if found is None or found.value.denominator != 1:
        raise ValueError("an answer that is no whole number")
    return str(found.value)


def _amc23(row: dict[str, Any], at: int) -> dict[str, Any]:
    return {"id": f"amc23/{row['id']}", "problem": row["question"], "answer": _whole(row["answer"])}


def _aime(name: str) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    def read(row: dict[str, Any], at: int) -> dict[str, Any]:
        return {"id": f"{name}/{at}", "problem": row["problem"], "answer": _whole(row["answer"])}

    return read


# A reference answer of MinervaMath is rounded, in a way that its question need not state.
_TABLE = (
    Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "main", "main", "test", 1319, _NUMBER, _gsm8k),
    Benchmark("math500", "MATH500", "HuggingFaceH4/MATH-500", "main", None, "test", 500, _MATH, _math500),
    Benchmark(
        "olympiadbench",
        "OlympiadBench",
        "Hothan/OlympiadBench",
        "main",
        "OE_TO_maths_en_COMP",
        "train",
        674,
        _MATH,
        _olympiadbench,
        prompt=_LIST,
        folder_count=675,  # of Qwen2.5-Math
    ),
    Benchmark(
        "minerva_math",
        "MinervaMath",
        "math-ai/minervamath",
        "main",
        None,
        "test",
        272,
        replace(_MATH, relative=1e-4),
        _minerva_math,
    ),
    Benchmark(
        "gpqa_diamond",
        "GPQA:Diamond",
        "Idavidrein/gpqa",
        "main",
        "gpqa_diamond",
        "train",
        198,
        Rule("letter", fallbacks=True),
        _gpqa,
        prompt=_LETTER,
        samples=8,
        gated=True,
    ),
    Benchmark("amc23", "AMC23", "math-ai/amc23", "main", None, "test", 40, _INTEGER, _amc23, samples=32),
    Benchmark(
        "aime24", "AIME24", "HuggingFaceH4/aime_2024", "main", None, "train", 30, _INTEGER, _aime("aime24"), samples=32
    ),
    Benchmark("aime25", "AIME25", "math-ai/aime25", "main", None, "test", 30, _INTEGER, _aime("aime25"), samples=32),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def load_benchmark(name: str, folder: str | Path | None = None) -> list[Problem]:
    """The problems of a benchmark, from `folder`'s `<name>.jsonl`, or from the hub.

    Raises `BenchmarkError` for an unknown name, a missing or malformed file, a data set that can't be downloaded,
    and a number of problems other than the expected one.

    >>> load_benchmark("aime26")
    Traceback (most recent call last):
        ...
    capo_rl.evaluation.benchmarks.BenchmarkError: aime26: no such benchmark; choose one of gsm8k, math500, \
olympiadbench, minerva_math, gpqa_diamond, amc23, aime24, aime25
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"{name}: no such benchmark; choose one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    place = Path(folder).expanduser() / f"{name}.jsonl" if folder is not None else None
    rows = _read(place, benchmark) if place is not None else _download(benchmark)
    source = str(place or f"{benchmark.hub}, split {benchmark.split}")
    expected = benchmark.count if place is None else benchmark.folder_count or benchmark.count
    if len(rows) != expected:
        raise BenchmarkError(f"{source}: {len(rows)} problems, not {expected}; a score on them would be of another set")
    problems = [_problem(row, benchmark, f"{source}, row {at}") for at, row in enumerate(rows, start=1)]
    if len({problem.id for problem in problems}) != len(problems):
        raise BenchmarkError(f"{source}: an id is there twice; give each problem its own")
    return problems


def _problem(row: dict[str, Any], benchmark: Benchmark, place: str) -> Problem:
    for column in ("id", "problem", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise BenchmarkError(f"{place}: `{column}` is no text, or empty; fill it in")  # never the value: a secret
    choices: Sequence[str] = ()
    if benchmark.rule.kind == "letter":
        choices = row.get("choices") or ()
        if len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
            raise BenchmarkError(f"{place}: `choices` has to be four texts")
        if row["answer"] not in "ABCD":
            raise BenchmarkError(f"{place}: `answer` has to be one of A, B, C and D")
    try:
        tolerance = float(row["tolerance"]) if row.get("tolerance") else None
    except (TypeError, ValueError):
        raise BenchmarkError(f"{place}: `tolerance` is no number") from None
    rule = replace(
        benchmark.rule, multiple=bool(row.get("multiple")), unit=row.get("unit") or None, tolerance=tolerance
    )
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip("ABCD", choices, strict=False))
    prompt = benchmark.prompt.format(problem=row["problem"], choices=listed)
    return Problem(benchmark.name, row["id"], prompt, row["answer"], rule, secret=benchmark.gated)


def _read(path: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().rstrip().split(b"\n")  # not `splitlines`: GSM8K has U+2028 inside a string
    except OSError as error:
        ask = f"; {_ask_for(benchmark)}, then leave the folder out" if benchmark.gated else ""
        raise BenchmarkError(f"{path}: {error.strerror}; {benchmark.title} is read from there{ask}") from None
    rows = []
    for at, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise BenchmarkError(f"{path}, line {at}: no JSON object; write one whole object a line")
        rows.append(row)
    return rows


def _download(benchmark: Benchmark) -> list[dict[str, Any]]:
    import datasets

    place = f"{benchmark.hub}, split {benchmark.split}"
    try:
        rows = datasets.load_dataset(
            benchmark.hub, benchmark.config, split=benchmark.split, revision=benchmark.revision
        )
    except Exception as error:  # hub, network, cache and parsing errors have no class in common
        advice = _ask_for(benchmark) if benchmark.gated else "check the network, or give a folder with the JSON Lines"
        raise BenchmarkError(f"{place}: it can't be loaded ({type(error).__name__}); {advice}") from error
    try:
        return [benchmark.read(row, at) for at, row in enumerate(rows)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Without the cause: it might quote a question.
        raise BenchmarkError(f"{place}: its columns have changed ({type(error).__name__}); pin a revision") from None


def _ask_for(benchmark: Benchmark) -> str:
    return (
        f"{benchmark.title} is gated by its authors: accept its terms on the hub's page of {benchmark.hub}, signed in, "
        "run `hf auth login` here with a token of that account, and try again"
    )
