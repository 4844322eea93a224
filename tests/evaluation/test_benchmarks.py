"""The eight benchmarks: what they hold, what is refused, and that a secret question stays one."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from capo_rl.evaluation import benchmarks
from capo_rl.evaluation.benchmarks import BENCHMARKS, BenchmarkError, Problem, choice_order, load_benchmark
from capo_rl.rewards.grading import Grader
from conftest import ROOT

DATA = Path(os.environ.get("CAPO_DATA", ROOT / ".." / "shared" / "data")) / "eval"
NAMES = ["gsm8k", "math500", "olympiadbench", "minerva_math", "gpqa_diamond", "amc23", "aime24", "aime25"]
GOOD = {"id": "made/1", "problem": "What is 1+1?", "answer": "2"}
SECRET = {
    "id": "gpqa_diamond/rec1",
    "problem": "Why is the {sky} blue?",
    "choices": ["dust", "Rayleigh", "Mie", "paint"],
    "answer": "B",
}


@pytest.fixture
def small(monkeypatch):
    """Every benchmark has one problem."""
    for name, benchmark in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, replace(benchmark, count=1, folder_count=None))


def write(folder, name, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_table():
    assert list(BENCHMARKS) == NAMES
    assert [BENCHMARKS[name].count for name in NAMES] == [1319, 500, 674, 272, 198, 40, 30, 30]
    assert [name for name in NAMES if BENCHMARKS[name].gated] == ["gpqa_diamond"]
    for benchmark in BENCHMARKS.values():
        assert benchmark.prompt.format(problem="P", choices="C").startswith("P\n")
        assert "\\boxed{}" in benchmark.prompt.format(problem="P", choices="C")
        assert benchmark.rule.fallbacks
        assert (benchmark.samples >= 32) is (benchmark.count <= 40)  # a small set needs many samples


def test_a_problem_as_it_is_asked(small, tmp_path):
    odd = GOOD | {"problem": "A set {x} with a line\u2028break"}
    (problem,) = load_benchmark("gsm8k", write(tmp_path, "gsm8k", odd))
    assert problem == Problem(
        "gsm8k",
        "made/1",
        "A set {x} with a line\u2028break\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "2",
        BENCHMARKS["gsm8k"].rule,
    )


def test_a_problem_with_choices(small, tmp_path):
    (problem,) = load_benchmark("gpqa_diamond", write(tmp_path, "gpqa_diamond", SECRET))
    assert "Why is the {sky} blue?\n\nA. dust\nB. Rayleigh\nC. Mie\nD. paint\n" in problem.prompt
    assert (problem.gold, problem.secret, problem.rule.kind) == ("B", True, "letter")
    with Grader() as grader:
        assert grader.grade("It is Rayleigh's.\nAnswer: (B)", problem.gold, problem.rule).correct is True


def test_the_rule_of_a_problem(small, tmp_path):
    row = GOOD | {"answer": "4.2,3", "multiple": True, "unit": "%", "tolerance": "1e-1"}
    (problem,) = load_benchmark("olympiadbench", write(tmp_path, "olympiadbench", row))
    assert (problem.rule.multiple, problem.rule.unit, problem.rule.tolerance) == (True, "%", 0.1)
    row = GOOD | {"multiple": False, "unit": None, "tolerance": None}
    (problem,) = load_benchmark("olympiadbench", write(tmp_path, "olympiadbench", row))
    assert problem.rule == BENCHMARKS["olympiadbench"].rule


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [GOOD, GOOD | {"id": "made/2"}], "2 problems, not 1; a score on them would be of another set"),
        ("gsm8k", ["{"], "line 1: no JSON object"),
        ("gsm8k", ["[1]"], "line 1: no JSON object"),
        ("gsm8k", [GOOD | {"answer": 2}], "row 1: `answer` is no text"),
        ("gsm8k", [GOOD | {"problem": " "}], "row 1: `problem` is no text, or empty"),
        ("gsm8k", [{"problem": "?", "answer": "2"}], "row 1: `id` is no text"),
        ("olympiadbench", [GOOD | {"tolerance": "small"}], "row 1: `tolerance` is no number"),
        ("gpqa_diamond", [SECRET | {"choices": ["a"]}], "row 1: `choices` has to be four texts"),
        ("gpqa_diamond", [SECRET | {"answer": "E"}], "row 1: `answer` has to be one of A, B, C and D"),
    ],
)
def test_what_is_refused(small, tmp_path, name, rows, message):
    with pytest.raises(BenchmarkError, match=message) as caught:
        load_benchmark(name, write(tmp_path, name, *rows))
    assert "sky" not in str(caught.value)


def test_an_id_is_there_once(monkeypatch, tmp_path):
    monkeypatch.setitem(BENCHMARKS, "gsm8k", replace(BENCHMARKS["gsm8k"], count=2))
    with pytest.raises(BenchmarkError, match="an id is there twice"):
        load_benchmark("gsm8k", write(tmp_path, "gsm8k", GOOD, GOOD))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BenchmarkError, match=r"gsm8k\.jsonl: No such file"):
        load_benchmark("gsm8k", tmp_path)
    with pytest.raises(BenchmarkError, match=r"gated by its authors: accept its terms .*hf auth login"):
        load_benchmark("gpqa_diamond", tmp_path)


# --- GPQA's order of choices, and its secrecy


def test_the_order_of_choices_is_the_documented_rule():
    for record in ("rec06pnAkLOr2t2mp", "recMade", ""):
        digests = [hashlib.sha256(f"0:{record}:{n}".encode()).hexdigest() for n in range(4)]
        assert [digests[n] for n in choice_order(record)] == sorted(digests)
    letters = "".join("ABCD"[choice_order(f"rec{n}").index(0)] for n in range(400))
    assert all(70 < letters.count(name) < 130 for name in "ABCD")  # no letter is preferred


def test_a_secret_question_is_not_shown(small, tmp_path):
    (problem,) = load_benchmark("gpqa_diamond", write(tmp_path, "gpqa_diamond", SECRET))
    assert "sky" not in repr(problem) and "sky" not in f"{[problem]}" and "gold" not in repr(problem)
    (problem,) = load_benchmark("gsm8k", write(tmp_path, "gsm8k", GOOD))
    assert "1+1" in repr(problem)


# --- the hub

GPQA_ROW = {
    "Record ID": "rec1",
    "Question": "Why is the sky blue? ",
    "Correct Answer": "Rayleigh\n",
    "Incorrect Answer 1": "dust",
    "Incorrect Answer 2": "Mie",
    "Incorrect Answer 3": "paint",
}
OLYMPIAD_ROW = {"id": 7, "question": "Solve.", "final_answer": ["$1$, $2$"], "is_multiple_answer": True, "unit": None}
HUB_ROWS = {
    "gsm8k": ({"question": "1+1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}, "1002"),
    "math500": ({"problem": "1+1?", "answer": r"\frac{4}{2}", "unique_id": "test/algebra/1.json"}, r"\frac{4}{2}"),
    "olympiadbench": (OLYMPIAD_ROW | {"error": None}, "1, 2"),
    "minerva_math": ({"question": "1+1?", "answer": "2e0"}, "2e0"),
    "gpqa_diamond": (GPQA_ROW, "ABCD"[choice_order("rec1").index(0)]),
    "amc23": ({"id": 3, "question": "1+1?", "answer": 27.0}, "27"),
    "aime24": ({"id": 60, "problem": "1+1?", "answer": "033"}, "33"),
    "aime25": ({"id": "0", "problem": "1+1?", "answer": r"336^\circ"}, "336"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_hub(small, monkeypatch, name):
    asked = []

    def load_dataset(hub, config, *, split, revision):
        asked.append((hub, config, split, revision))
        return [HUB_ROWS[name][0]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = load_benchmark(name)
    benchmark = BENCHMARKS[name]
    assert asked == [(benchmark.hub, benchmark.config, benchmark.split, benchmark.revision)]
    assert problem.gold == HUB_ROWS[name][1] and problem.id.startswith("math/" if name == "math500" else name)
    assert problem.rule.multiple is (name == "olympiadbench")


def test_what_the_hub_refuses(small, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BenchmarkError, match=r"openai/gsm8k, split test: .*ConnectionError.*check the network"):
        load_benchmark("gsm8k")
    with pytest.raises(BenchmarkError, match=r"Idavidrein/gpqa, split train: .*gated.*hf auth login"):
        load_benchmark("gpqa_diamond")


def test_columns_that_have_changed_quote_no_question(small, monkeypatch):
    row = GPQA_ROW | {"Correct Answer": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [row])
    with pytest.raises(BenchmarkError, match="its columns have changed") as caught:
        load_benchmark("gpqa_diamond")
    assert caught.value.__suppress_context__ and "sky" not in str(caught.value)


def test_the_table_costs_no_heavy_import():
    heavy = "{'torch', 'transformers', 'datasets', 'sympy', 'math_verify'}"
    code = f"import sys, capo_rl.evaluation.benchmarks, capo_rl.rewards.grading; print({heavy} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


# --- the sets themselves


@pytest.mark.skipif(not DATA.exists(), reason="no shared data: set CAPO_DATA")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpqa_diamond"])
def test_every_reference_answer_is_equal_to_itself(name):
    problems = load_benchmark(name, DATA)
    assert benchmarks.BENCHMARKS[name].rule.kind == problems[0].rule.kind
    with Grader(workers=1) as grader:
        verdicts = grader.grade_all(
            [f"$\\boxed{{{p.gold}}}$" for p in problems], [p.gold for p in problems], [p.rule for p in problems]
        )
    assert [p.id for p, verdict in zip(problems, verdicts, strict=True) if verdict.correct is not True] == []
