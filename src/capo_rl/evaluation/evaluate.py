"""`capo eval`: completions of benchmark problems, graded, and what they come to. The folder of an evaluation:

evaluation.json    the settings, and the versions of the libraries
BENCHMARK.jsonl    one JSON object a problem: id, prompt, gold answer, rule, and its graded completions
summary.json       the figures of each benchmark, and their mean
.lock              held while a process writes here, and whose it is

Of a secret benchmark (GPQA, whose authors ask that its text never be published) only ids, extracted letters and
verdicts are kept: no prompt and no completion. So `capo regrade`, which grades what is on disk again, can't do it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capo_rl.answers import Rule, letter
from capo_rl.evaluation.benchmarks import BENCHMARKS, Problem, load_benchmark
from capo_rl.evaluation.generation import (
    Completion,
    Generator,
    Sampling,
    choose_backend,
    encode,
    load_generator,
    seed_of,
)
from capo_rl.rewards.grading import TIMED_OUT, Grader
from capo_rl.runs.progress import Progress
from capo_rl.runs.records import LOCK, sole_writer, versions, write_json, written_whole
from capo_rl.statistics import (
    bootstrap_interval,
    paired_bootstrap,
    pass_at_k,
    probability_above_zero,
    wilson_interval,
)

Line = dict[str, Any]  # of a benchmark's file: one problem
Evaluation = dict[str, list[Line]]  # the lines of each benchmark


class EvaluationError(ValueError):
    """An evaluation that can't be run or read; the message names the reason and the fix."""


@dataclass(frozen=True)
class Settings:
    """What an evaluation's completions depend on; `None` for a benchmark's own value, or the backend's.

    limit       so many problems of each benchmark, the same ones for every model and seed
    batch_size  completions at a time; part of the settings because it decides what is rounded together
    """

    model: str
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int = 1024  # the paper's longest completion in training (Table 2)
    limit: int | None = None
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"{name}={value}: must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise EvaluationError(f"temperature={self.temperature}: must be at least 0, which is greedy decoding")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise EvaluationError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.temperature == 0 and (self.samples or 1) > 1:
            raise EvaluationError(f"samples={self.samples} at temperature=0: greedy completions are all the same")


def evaluate(
    settings: Settings, names: Sequence[str], folder: str | Path, *, data: str | Path | None = None
) -> Evaluation:
    """Complete and grade the problems of these benchmarks that the folder has not yet, and return what it holds then.

    Batches are made before the first is run, and each is seeded by what is in it: an evaluation that was stopped comes
    to the same completions, except on vLLM, as one that was not. `data` is a folder with the benchmarks' files.

    Raises `EvaluationError` for a folder that holds another evaluation, or completions longer than the model can read;
    `BenchmarkError` and `ModelError` for benchmarks and models that can't be loaded; `RunFolderError` for a folder that
    another process writes to.
    """
    folder = Path(folder)
    backend = choose_backend(settings.model)
    _check_folder(folder, settings, backend)
    problems = {name: _chosen(load_benchmark(name, data), settings.limit) for name in names}
    with sole_writer(folder):
        there = {name: _finished(folder / f"{name}.jsonl", problems[name]) for name in problems}
        if any(len(there[name]) < len(problems[name]) for name in problems):
            generator = load_generator(settings.model, backend)
            batches = {name: _batches(name, problems[name], generator, settings) for name in problems}
            if not (folder / "evaluation.json").exists():  # nothing is left that can be wrong with the settings
                write_json(folder / "evaluation.json", _description(settings, backend))
            for name in problems:
                _run(name, batches[name], there[name], folder / f"{name}.jsonl", generator, settings)
        evaluation = read_evaluation(folder)
        write_json(folder / "summary.json", summarize(evaluation))
    return evaluation


def _check_folder(folder: Path, settings: Settings, backend: str) -> None:
    if folder.is_file():
        raise EvaluationError(f"{folder}: is a file; give another --out")
    if not folder.exists() or all(path.name == LOCK for path in folder.iterdir()):
        return
    there, asked = read_settings(folder), _description(settings, backend)["settings"]
    if other := sorted(name for name in there.keys() | asked.keys() if there.get(name) != asked.get(name)):
        raise EvaluationError(
            f"{folder}: holds an evaluation with other settings ({', '.join(other)}); give another --out, or remove it"
        )


def _description(settings: Settings, backend: str) -> dict[str, Any]:
    return {"settings": dataclasses.asdict(settings) | {"backend": backend}, "versions": versions()}


def _chosen(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """The first `limit` in the order of a hash: benchmarks are sorted, and a seed must not change the problems."""
    return sorted(problems, key=lambda problem: seed_of(problem.id))[:limit]


def _finished(path: Path, problems: Sequence[Problem]) -> set[str]:
    """The ids of the problems that the file has; a line that was being written when the run was killed is cut off."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    prompts = {problem.id: problem.prompt for problem in problems}
    lines = _read(path)
    for line in lines:
        if line["id"] not in prompts or line.get("prompt", prompts[line["id"]]) != prompts[line["id"]]:
            raise EvaluationError(f"{path}: {line['id']!r} is another problem in the benchmark; give another --out")
    return {line["id"] for line in lines}


@dataclass(frozen=True)
class _Row:
    """One completion to come: the tokens of its prompt, and the seed that is its own."""

    problem: Problem
    ids: list[int]
    seed: int


def _run(
    name: str, batches: Sequence[Sequence[_Row]], there: set[str], path: Path, generator: Generator, settings: Settings
) -> None:
    """Complete and grade a benchmark; a problem is appended to the file with the batch that has the last of it."""
    samples, sampling = _sampling(name, settings)
    unwritten: dict[str, list[Completion]] = defaultdict(list)
    right = written = 0
    done = samples * len(there)
    progress = Progress(sum(map(len, batches)), name, "completion", done=done)
    with Grader() as grader, path.open("ab") as file, contextlib.closing(progress):
        for batch in batches:
            if missing := sum(row.problem.id not in there for row in batch):
                completions = generator.generate([row.ids for row in batch], [row.seed for row in batch], sampling)
                for row, completion in zip(batch, completions, strict=True):
                    unwritten[row.problem.id].append(completion)
                # What a problem lacks may come with the next batch, and what is there already came before a kill.
                whole = {row.problem.id: row.problem for row in batch if len(unwritten[row.problem.id]) == samples}
                new = [problem for problem in whole.values() if problem.id not in there]
                lines = _graded(new, unwritten, generator, grader)
                file.write(b"".join(map(_encoded, lines)))
                file.flush()
                os.fsync(file.fileno())
                there |= whole.keys()
                written += len(lines) * samples
                right += sum(_right(answer) for line in lines for answer in line["completions"])
                done += missing
                progress.update(done, f"right {right / written:.1%}" if written else "")


def _sampling(name: str, settings: Settings) -> tuple[int, Sampling]:
    """Samples a problem, and how they are drawn: the benchmark's own where the settings leave it open."""
    benchmark = BENCHMARKS[name]
    temperature = benchmark.temperature if settings.temperature is None else settings.temperature
    top_p = benchmark.top_p if settings.top_p is None else settings.top_p
    samples = settings.samples or (benchmark.samples if temperature else 1)
    return samples, Sampling(temperature, top_p, settings.max_new_tokens)


def _batches(name: str, problems: Sequence[Problem], generator: Generator, settings: Settings) -> list[list[_Row]]:
    """All completions of a benchmark in batches, prompts of like length together, the longest first."""
    samples, _ = _sampling(name, settings)
    texts = encode(generator.tokenizer, [problem.prompt for problem in problems])
    longest = max(map(len, texts)) + settings.max_new_tokens
    if generator.context is not None and longest > generator.context:
        raise EvaluationError(
            f"{name}: its longest prompt and max_new_tokens={settings.max_new_tokens} make {longest} tokens, and the "
            f"model reads {generator.context}; give fewer max_new_tokens"
        )
    rows = [
        _Row(problem, ids, seed_of(settings.seed, name, problem.id, sample))
        for problem, ids in zip(problems, texts, strict=True)
        for sample in range(samples)
    ]
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    size = settings.batch_size or generator.batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _graded(
    problems: Sequence[Problem], completions: Mapping[str, Sequence[Completion]], generator: Generator, grader: Grader
) -> list[Line]:
    """The lines of these problems."""
    decode = generator.tokenizer.decode
    pairs = [(problem, completion) for problem in problems for completion in completions[problem.id]]
    texts = [decode(completion.ids, skip_special_tokens=True) for _, completion in pairs]
    golds, rules = [problem.gold for problem, _ in pairs], [problem.rule for problem, _ in pairs]
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (problem, completion), text, verdict in zip(pairs, texts, grader.grade_all(texts, golds, rules), strict=True):
        answer = {"text": text, "tokens": len(completion.ids), "truncated": completion.truncated}
        answer |= dataclasses.asdict(verdict)
        answers[problem.id].append(_without_text(answer) if problem.secret else answer)
    lines = []
    for problem in problems:
        asked = {"prompt": problem.prompt, "gold": problem.gold, "rule": dataclasses.asdict(problem.rule)}
        lines.append({"id": problem.id} | ({} if problem.secret else asked) | {"completions": answers[problem.id]})
    return lines


def _without_text(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A graded completion without a word of it: a box can hold a copy of the question, so only a letter is kept."""
    kept = {name: answer[name] for name in ("tokens", "truncated", "correct", "reason")}
    return kept | {"extracted": answer["extracted"] and letter(answer["extracted"])}


def _encoded(line: Line) -> bytes:
    # In ASCII: no line break of Unicode's is in it, and half a surrogate pair comes back as it was.
    return json.dumps(line).encode() + b"\n"


def _right(answer: Mapping[str, Any]) -> bool:
    return answer["correct"] is True  # what can't be graded is not right


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
    evaluation = {name: lines for name, file in files.items() if file.exists() and (lines := _read(file))}
    if not evaluation:
        raise EvaluationError(f"{folder}: no problem has been completed yet; run `capo eval` on it again")
    return evaluation


def _read(path: Path) -> list[Line]:
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


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of each benchmark, and the mean of their accuracies.

    accuracy     the mean over problems of the share of right samples, which is pass@1, and Wilson's 95 % interval; that
                 of the mean adds the squares of their halves (Zou and Donner 2008, "MOVER")
    pass@k       for k = 1, 2, 4, ... up to the number of samples
    tokens       per completion
    truncated    completions; so are timed_out and ungraded, time-outs among them, and none of those counts as right
    test         whether the mean is the paper's TEST: of all problems of all eight benchmarks
    """
    rows = {name: _figures(lines) for name, lines in evaluation.items()}
    counts = {name: {benchmark.count, benchmark.folder_count} for name, benchmark in BENCHMARKS.items()}
    whole = rows.keys() == counts.keys() and all(rows[name]["problems"] in counts[name] for name in rows)
    mean = float(np.mean([row["accuracy"] for row in rows.values()]))
    below = math.hypot(*(row["accuracy"] - row["low"] for row in rows.values())) / len(rows)
    above = math.hypot(*(row["high"] - row["accuracy"] for row in rows.values())) / len(rows)
    return {"benchmarks": rows, "mean": {"accuracy": mean, "low": mean - below, "high": mean + above, "test": whole}}


def _figures(lines: Sequence[Line]) -> dict[str, Any]:
    answers = [answer for line in lines for answer in line["completions"]]
    samples = min(len(line["completions"]) for line in lines)
    accuracy = float(np.mean(_accuracies(lines)))
    low, high = wilson_interval(accuracy, len(lines))
    counts = [(len(line["completions"]), sum(map(_right, line["completions"]))) for line in lines]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return {
        "problems": len(lines),
        "samples": samples,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "pass@k": {str(k): float(np.mean([pass_at_k(n, c, k) for n, c in counts])) for k in ks},
        "tokens": float(np.mean([answer["tokens"] for answer in answers])),
        "truncated": sum(answer["truncated"] for answer in answers),
        "timed_out": sum(answer["reason"] == TIMED_OUT for answer in answers),
        "ungraded": sum(answer["correct"] is None for answer in answers),
    }


def _accuracies(lines: Sequence[Line]) -> list[float]:
    return [float(np.mean([_right(answer) for answer in line["completions"]])) for line in lines]


def _mean_of_means(groups: Sequence[Sequence[float]]) -> Any:
    """The statistic that weighs groups, not values, alike: for the bootstrap, which draws them one after the other."""
    weights = np.concatenate([np.full(len(group), 1 / len(group) / len(groups)) for group in groups])
    return lambda values: float(values @ weights)


@dataclass(frozen=True)
class Difference:
    """How far one evaluation is above another on the problems of both, from a paired bootstrap over these.

    above      the probability that the difference is above zero
    problems   how many both have; apart: how many only one of them has
    """

    name: str
    difference: float
    low: float
    high: float
    above: float
    problems: int
    apart: int


def compare(evaluation: Evaluation, baseline: Evaluation) -> list[Difference]:
    """The differences in accuracy, evaluation less baseline, of each benchmark that both have, and of their mean.

    Raises `EvaluationError` if they have no problem in common.
    """
    differences, groups = [], []
    for name in (name for name in evaluation if name in baseline):
        ours, theirs = (
            dict(zip((line["id"] for line in lines), _accuracies(lines), strict=True))
            for lines in (evaluation[name], baseline[name])
        )
        both = sorted(ours.keys() & theirs.keys())
        if both:
            a, b = [ours[id] for id in both], [theirs[id] for id in both]
            groups.append([x - y for x, y in zip(a, b, strict=True)])
            above = probability_above_zero(groups[-1:])
            apart = len(ours.keys() ^ theirs.keys())
            differences.append(Difference(name, *paired_bootstrap(a, b), above, len(both), apart))
    if not groups:
        raise EvaluationError("the two evaluations have no problem in common")
    if len(groups) > 1:
        mean = _mean_of_means(groups)
        ends = bootstrap_interval(groups, mean)
        problems, apart = sum(d.problems for d in differences), sum(d.apart for d in differences)
        value = mean(np.concatenate(groups))
        differences.append(Difference("mean", value, *ends, probability_above_zero(groups, mean), problems, apart))
    return differences


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
                unfinished.write_bytes(b"".join(map(_encoded, lines)))
        write_json(folder / "summary.json", summarize(evaluation))
    now_right = sum(change.after[0] is True for change in changes)
    no_longer = sum(change.before[0] is True for change in changes)
    return Regraded(completions, len(changes), now_right, no_longer, tuple(secret), tuple(changes))
