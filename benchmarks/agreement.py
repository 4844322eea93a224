r"""Compare the grader's verdicts with those of lm-evaluation-harness and math-verify on the same completions.

    python benchmarks/agreement.py [EVALUATION ...] --harness PYTHON [--data FOLDER] [--tests FOLDER] [--keep FILE]

An EVALUATION is a folder that `capo eval` wrote. PYTHON belongs to an environment of its own, with `pip install
'lm-eval[math]'`, which needs another antlr4 than this project. The data folder (default: $CAPO_DATA) holds
`gsm8k_train.jsonl`, `math_train.jsonl` and `eval/math500.jsonl`, with reference solutions. The folder of tests is that
of a copy of github.com/huggingface/Math-Verify. FILE keeps the others' replies, so that a run that was stopped goes
on; it holds completions: keep it out of the repository. The numbers in docs/evaluation.md are what this prints.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE = 30.0  # seconds for one of the others; math-verify and the harness stop themselves after 5 or 10
MADE = 300  # completions of each kind made from reference answers


@dataclass(frozen=True)
class Case:
    """A completion to grade; `solution` is the reference solution, from which the harness takes its answer.

    `right` is what the verdict has to be, where the completion was made so that this is known.
    """

    source: str
    kind: str  # gsm8k or math: whose graders it is given to
    completion: str
    gold: str
    solution: str
    right: bool | None = None
    what: str = ""


# --- completions


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().rstrip().split(b"\n")]


def real(folder: Path, math500: dict[str, str]) -> Iterator[Case]:
    """The completions of an evaluation."""
    for name in ("gsm8k", "math500"):
        if (path := folder / f"{name}.jsonl").exists():
            for row in rows(path):
                gold = row["gold"]
                solution = f"#### {gold}" if name == "gsm8k" else math500[row["id"]]
                for completion in row["completions"]:
                    kind = name.removesuffix("500")
                    yield Case(f"model, {name}", kind, completion["text"], gold, solution)


GSM8K_ENDINGS = (
    "We add them up step by step.\n#### {}",
    "Let's go through it step by step. In the end we have the total. The answer is {}.",
    "Adding these amounts gives the result, so the final answer is $\\boxed{{{}}}$.",
)
MATH_ENDINGS = (
    "Thus the value we were asked for is $\\boxed{{{}}}$.",
    "Simplifying both sides leads to the result.\nFinal Answer: The final answer is ${}$. I hope it is correct.",
    "Substituting $t$ back, we find\n\\[\\boxed{{{}}}.\\]",
    "Since $t > 0$, only one case is left. The answer is ${}$.",
)


def made(data: Path) -> Iterator[Case]:
    """Completions from reference solutions and reference answers."""
    from grading import forms

    from capo_rl.answers import number
    from capo_rl.evaluation.benchmarks import BENCHMARKS

    rng = random.Random(0)
    gsm8k = rng.sample(rows(data / "gsm8k_train.jsonl"), 3 * MADE)
    maths = [row for row in rows(data / "math_train.jsonl") if "\\boxed" in row["solution"]]
    maths = rng.sample(maths, 3 * MADE)
    for name, sample in (("gsm8k", gsm8k), ("math", maths)):

        def solution(row: dict[str, Any], name: str = name) -> str:
            return row["solution"] if name == "math" else f"{row['solution']}\n#### {row['answer']}"

        def reference(row: dict[str, Any], name: str = name) -> str:
            return row["solution"] if name == "math" else f"#### {row['answer']}"

        for row, other in zip(sample[:MADE], sample[MADE : 2 * MADE], strict=True):
            gold = row["answer"]
            yield Case(f"solutions, {name}", name, solution(row), gold, reference(row), right=True)
            same = gold == other["answer"] or None if number(gold) is None else number(gold) == number(other["answer"])
            yield Case(f"another's gold, {name}", name, solution(row), other["answer"], reference(other), right=same)
        rule = BENCHMARKS["gsm8k" if name == "gsm8k" else "math500"].rule
        changed = [(row, *form) for row in sample for form in dict.fromkeys(forms(row["answer"], rule))]
        endings = GSM8K_ENDINGS if name == "gsm8k" else MATH_ENDINGS
        for at, (row, what, answer, right) in enumerate(rng.sample(changed, 2 * MADE)):
            completion = endings[at % len(endings)].format(answer)
            source = f"{'equal forms' if right else 'near misses'}, {name}"
            yield Case(source, name, completion, row["answer"], reference(row), right=right, what=what)


_MATH = re.compile(r"\$\$?(.*?)\$\$?|\\\((.*?)\\\)|\\\[(.*?)\\\]", re.DOTALL)


def undelimited(text: str) -> str | None:
    """The inside of a text that is one formula, or `None`."""
    found = _MATH.fullmatch(text.strip())
    inside = next((part for part in found.groups() if part is not None), "") if found else text.strip()
    return None if "$" in inside.replace(r"\$", "") or re.search(r"[A-Za-z]{3,} [A-Za-z]{2,}", inside) else inside


def math_verify_tests(folder: Path) -> Iterator[tuple[str, str, bool, str | None, str]]:
    """The pairs of math-verify's tests: gold, answer, the expected verdict; and gold and completion for our grader.

    Our gold is `None` for a pair of other things: an answer in prose without a box, or several boxes.
    """
    from capo_rl.answers import extract_answer

    for path in sorted(folder.glob("test_*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "parametrize"):
                continue
            names = ast.literal_eval(call.args[0])
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            if names[:2] != ["gold", "pred"]:
                continue
            for element in call.args[1].elts:
                try:
                    values = ast.literal_eval(element)
                except ValueError:  # the test computes it
                    continue
                row = dict(zip(names, values, strict=True))
                gold, answer = row["gold"], row["pred"]
                gold = extract_answer(gold) if gold.count("\\boxed{") == 1 else undelimited(gold)
                if "boxed{" not in answer:
                    inside = undelimited(answer)
                    answer = f"\\boxed{{{inside}}}" if inside else ""
                if answer.count("boxed{") != 1 or (gold and "boxed{" in gold):
                    gold = None
                expected = bool(row.get("expected", row.get("result")))
                yield row["gold"], row["pred"], expected, gold or None, answer


# --- verdicts


def ours(cases: Sequence[Case], deadline: float) -> list[Any]:
    from capo_rl.evaluation.benchmarks import BENCHMARKS
    from capo_rl.rewards.grading import Grader

    rules = [BENCHMARKS["gsm8k" if case.kind == "gsm8k" else "math500"].rule for case in cases]
    with Grader(workers=2, deadline=deadline) as grader:
        return grader.grade_all([c.completion for c in cases], [c.gold for c in cases], rules, progress=True)


def judge() -> None:
    """What runs in the harness's environment: a case a line in, a line of `{grader: [verdict, seconds]}` out."""
    import logging

    import yaml
    from lm_eval import tasks
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks.hendrycks_math import utils as hendrycks
    from lm_eval.tasks.minerva_math import utils as minerva
    from math_verify import parse, verify

    logging.disable()
    task = yaml.safe_load((Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text())
    (metric,) = task["metric_list"]
    options = {k: metric[k] for k in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    filters = {
        f["name"]: RegexFilter(**{k: v for k, v in f["filter"][0].items() if k != "function"})
        for f in task["filter_list"]
    }

    def matches(name: str, case: dict[str, Any]) -> bool:
        found = filters[name].apply([[case["completion"]]], [{}])[0][0]
        return bool(exact_match_hf_evaluate([found], [case["solution"]], **options)["exact_match"])

    def box(text: str) -> str | None:
        found = minerva.last_boxed_only_string(text)
        return None if found is None else minerva.remove_boxed(found.replace("\\fbox", "\\boxed"))

    def boxed_equal(case: dict[str, Any], equal: Any) -> bool:
        answer, gold = box(case["completion"]), box(case["solution"])
        return answer is not None and bool(equal(answer, gold))

    def minerva_doc(case: dict[str, Any]) -> dict[str, Any]:
        return {"solution": case["solution"], "answer": minerva.normalize_final_answer(box(case["solution"]))}

    def normalized(a: str, b: str) -> bool:
        return minerva.is_equiv(minerva.normalize_final_answer(a), minerva.normalize_final_answer(b))

    graders = {
        "gsm8k": {
            "strict-match": lambda c: matches("strict-match", c),
            "flexible-extract": lambda c: matches("flexible-extract", c),
            "math-verify": lambda c: verify(parse(c["gold"]), parse(c["completion"])),
        },
        "math": {
            "minerva_math": lambda c: minerva.process_results(minerva_doc(c), [c["completion"]]),
            "hendrycks_math exact_match": lambda c: hendrycks.process_results(c, [c["completion"]])["exact_match"],
            "minerva_math is_equiv on the box": lambda c: boxed_equal(c, normalized),
            "hendrycks_math is_equiv on the box": lambda c: boxed_equal(c, hendrycks.is_equiv),
            "math-verify": lambda c: verify(parse(f"${c['gold']}$"), parse(c["completion"])),
        },
    }
    normalized(r"\frac{1}{2}", "0.5"), verify(parse(r"$\frac{\pi}{2}$"), parse("$1.5$"))  # sympy is loaded
    print("ready", flush=True)
    for line in sys.stdin:
        case = dict(zip(("kind", "completion", "gold", "solution"), json.loads(line), strict=True))
        reply = {}
        for name, grade in graders[case["kind"]].items():
            start = time.perf_counter()
            try:
                verdict = grade(case)
            except Exception as error:  # of the harness: it would end the evaluation
                verdict = type(error).__name__
            seconds = time.perf_counter() - start
            verdicts = {f"{name} {k}": v for k, v in verdict.items()} if isinstance(verdict, dict) else {name: verdict}
            for key, value in verdicts.items():
                reply[key] = [value if isinstance(value, str) else bool(value), seconds]
        print(json.dumps(reply), flush=True)


def theirs(
    cases: Sequence[Case], python: str, keep: Path | None = None, workers: int = 2
) -> list[dict[str, list[Any]] | None]:
    """Replies of `judge`; `None` where a process had to be killed at the deadline."""
    from tqdm.auto import tqdm

    kept = {tuple(row["case"]): row["reply"] for row in rows(keep)} if keep and keep.exists() else {}
    questions = [(case.kind, case.completion, case.gold, case.solution) for case in cases]
    left = [question for question in dict.fromkeys(questions) if question not in kept]
    bar = tqdm(total=len(left), desc="lm-eval and math-verify", leave=False)

    def start() -> subprocess.Popen[str]:
        command = [python, "-W", "ignore", __file__, "--judge"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            sys.exit(f"{python} can't import the harness; install it there: pip install 'lm-eval[math]'")
        return process

    def run(questions: Sequence[tuple[str, ...]]) -> None:
        process = start() if questions else None
        for question in questions:
            timer = threading.Timer(DEADLINE, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            timer.cancel()
            kept[question] = json.loads(line) if line else None
            if keep:
                with keep.open("a") as file:
                    file.write(json.dumps({"case": question, "reply": kept[question]}) + "\n")
            if not line:
                process = start()
            bar.update()
        if process is not None:
            process.stdin.close()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, [left[first::workers] for first in range(workers)]))
    return [kept[question] for question in questions]


# --- agreement


def outcome(our: bool | None, their: bool | str) -> str:
    if our is None:
        return "timed out"
    return (
        ("both right" if their is True else "only ours") if our else ("only theirs" if their is True else "both wrong")
    )


def why(grader: str, case: Case, their: bool | str) -> str:
    """The class of a disagreement."""
    text = case.completion
    if isinstance(their, str):
        return f"it raises {their}"
    if their:
        if case.right:
            return "our grader is wrong"
        if case.right is None:
            return "it takes a number in the text for the answer, where none is stated"
        if "math-verify" in grader or "math_verify" in grader or grader == "strict-match":
            return f"it reads one number of the answer ({case.what})"
        return f"it cuts the answer ({case.what})"
    if grader == "strict-match":
        found = re.search(r"#### (-?[0-9.,]+)", text)
        return "it compares as text" if found else "no `#### ` and a number"
    if grader == "flexible-extract":
        (*_, last) = re.finditer(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
        if not re.search("[0-9]", last[0]):
            return "it takes the punctuation `$.` for a number"
        value = last[0].strip("$.").replace(",", "")
        return "it compares as text" if float(value) == float(case.gold) else "its last number is a part of the answer"
    if grader == "minerva_math exact_match":
        form = "Final Answer: The final answer is"
        return f"it does not read it as equal ({case.what})" if form in text else f"no `{form}`"
    if grader == "hendrycks_math exact_match":
        alone = text.count("$") == 2 and "\\boxed" not in text
        return "it compares as text" if alone else "what is between the first and the last `$` is not the answer alone"
    if "on the box" in grader and "\\boxed" not in text:
        return "no box"
    if grader == "hendrycks_math is_equiv on the box":
        return "it compares as text"
    if case.source.startswith("solutions"):
        return "it takes another number of the text for the answer"
    return f"it does not read it as equal ({case.what})"


def report(cases: Sequence[Case], verdicts: Sequence[Any], replies: Sequence[dict[str, list[Any]] | None]) -> None:
    table: Counter[tuple[str, str, str]] = Counter()
    classes: Counter[tuple[str, str, str]] = Counter()
    wrong: Counter[str] = Counter()
    for case, verdict, reply in zip(cases, verdicts, replies, strict=True):
        if case.right is not None and verdict.correct is not case.right:
            wrong[case.source] += 1
            print(f"our grader is wrong: {case.source}, {case.what}: {verdict}, not {case.right}")
        for grader, (their, seconds) in (reply or {"all": [None, DEADLINE]}).items():
            late = their is None or (not their and seconds >= 4.9)  # their own limit is 5 s
            found = "timed out" if late else outcome(verdict.correct, their)
            table[grader, case.source, found] += 1
            if found.startswith("only"):
                classes[grader, found, why(grader, case, their)] += 1
    outcomes = ("both right", "both wrong", "only ours", "only theirs", "timed out")
    print(f"\n| grader | completions | n | {' | '.join(outcomes)} |\n|{'---|' * 8}")
    for grader, source in dict.fromkeys(key[:2] for key in table):
        counts = [table[grader, source, each] for each in outcomes]
        print(f"| {grader} | {source} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    print("\nDisagreements:")
    for (grader, found, reason), n in sorted(classes.items(), key=lambda item: (item[0][:2], -item[1])):
        print(f"    {n:4} {grader}, {found}: {reason}")
    known, model = sum(c.right is not None for c in cases), sum(c.source.startswith("model") for c in cases)
    print(f"\n{len(cases)} completions, {model} of them a model's")
    print(f"{sum(wrong.values())} of {known} verdicts of our grader are wrong, where it is known which one is right")


def report_tests(folder: Path, deadline: float) -> None:
    from capo_rl.answers import Rule, parts
    from capo_rl.rewards.grading import Grader

    rows = list(math_verify_tests(folder))
    mapped = [row for row in rows if row[3] is not None]
    rules = [Rule(multiple=len(parts(row[3])) > 1) for row in mapped]
    with Grader(workers=2, deadline=deadline) as grader:
        verdicts = grader.grade_all([row[4] for row in mapped], [row[3] for row in mapped], rules)
    differ = [(r, v) for r, v in zip(mapped, verdicts, strict=True) if v.correct is not r[2]]
    print(
        f"\nmath-verify's tests: {len(rows)} pairs, {len(mapped)} map to an answer and a reference answer; "
        f"on {len(differ)} our verdict is not the expected one:"
    )
    for (gold, answer, expected, *_), verdict in differ:
        print(f"    expected {expected}, got {verdict.correct} ({verdict.reason}): {answer!r} for {gold!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="*", type=Path, metavar="EVALUATION")
    parser.add_argument("--harness", required=True, metavar="PYTHON")
    parser.add_argument("--data", type=Path, default=os.environ.get("CAPO_DATA"), metavar="FOLDER")
    parser.add_argument("--tests", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", type=Path, metavar="FILE")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds for our grader; more on a busy machine")
    args = parser.parse_args()
    if args.data is None:
        parser.error("give the data folder: --data FOLDER, or set CAPO_DATA")
    math500 = {row["id"]: row["solution"] for row in rows(args.data / "eval" / "math500.jsonl")}
    cases = [case for folder in args.evaluations for case in real(folder, math500)] + list(made(args.data))
    verdicts = ours(cases, args.deadline)
    report(cases, verdicts, theirs(cases, args.harness, args.keep))
    if args.tests is not None:
        report_tests(args.tests, args.deadline)


if __name__ == "__main__":
    if sys.argv[1:] == ["--judge"]:
        judge()
    else:
        main()
