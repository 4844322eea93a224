"""`capo eval`: completions of benchmark problems, graded; an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_rl.answers import letter
from capo_rl.evaluation.benchmarks import BENCHMARKS, Problem, load_benchmark
from capo_rl.evaluation.folder import (
    Evaluation,
    EvaluationError,
    Line,
    encoded,
    read_evaluation,
    read_lines,
    read_settings,
)
from capo_rl.evaluation.generation import (
    Completion,
    Generator,
    Sampling,
    choose_backend,
    encode,
    load_generator,
    seed_of,
)
from capo_rl.evaluation.summary import is_right, summarize
from capo_rl.rewards.grading import Grader
from capo_rl.runs.progress import Progress
from capo_rl.runs.records import LOCK, sole_writer, versions, write_json


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
    lines = read_lines(path)
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
                file.write(b"".join(map(encoded, lines)))
                file.flush()
                os.fsync(file.fileno())
                there |= whole.keys()
                written += len(lines) * samples
                right += sum(is_right(answer) for line in lines for answer in line["completions"])
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
