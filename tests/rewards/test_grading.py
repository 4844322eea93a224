"""Grading: hostile text, deadlines, and rewards that are missing rather than wrong."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import capo_rl
from capo_rl.answers import Rule, number
from capo_rl.rewards import grading
from capo_rl.rewards.accuracy import accuracy_reward
from capo_rl.rewards.grading import TIMED_OUT, Grader, Verdict, extract_answer
from conftest import ROOT

DATA = Path(os.environ.get("CAPO_DATA", ROOT / ".." / "shared" / "data"))


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline=1.0) as grader:
        yield grader


def processes(grader):
    return [worker._process for worker in grader._started]


# --- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{2}", "2"),
        (r"\boxed{1} then \fbox{ 2 }", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and more}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed {7}", "7"),
        ("\\boxed\n{7}", "7"),
        (r"$\boxed 2$", "2"),
        (r"it is \boxed 12.", "12"),
        (r"\boxed\frac12$", r"\frac12"),
        (r"\boxed{}", ""),
        (r"\boxed{1}, but \boxedx", "1"),
        (r"\boxed", None),
        (r"\boxed $", None),
        (r"\boxed{1", None),
        (r"the answer is 2", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


balanced = st.recursive(
    st.text(alphabet="0123456789abc+-^ ,", max_size=5),
    lambda inner: st.tuples(inner, inner).map(lambda pair: f"{pair[0]}{{{pair[1]}}}"),
    max_leaves=8,
)


@given(before=st.text(max_size=30), content=balanced, after=st.text(max_size=30))
def test_a_balanced_box_comes_back_whole(before, content, after):
    after = after.replace("box", "")
    assert extract_answer(f"{before} \\boxed{{{content}}}{after}") == content.strip()


@pytest.mark.parametrize("unit", ["{", "}", "\\boxed{", "\\boxed", "\\", "\\boxed ", "\\boxed{{}", "\0"])
def test_extraction_is_linear(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    extract_answer(text)
    assert time.process_time() - start < 3  # a quadratic scan of 1 MB takes minutes


# --- verdicts


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("42", "42", True),
        ("$42$", " 42 ", True),
        ("1,234", "1234", True),
        ("007", "7", True),
        ("-3", "3", False),
        ("9" * 200, "9" * 201, False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        (r"\frac{1}{3}", "0.5", False),
        ("(3,4)", "(3, 4)", True),
        ("(4,3)", "(3,4)", False),
        ("3,1,2", "1,2,3", True),
        ("1+x^2", "x^2+1", True),
        (r"\text{Tuesday}", "Tuesday", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix} ", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "[1,2]", False),
        (r"x \in [1,2)", "[1,2)", True),
        (r"-\frac53", r"-\frac{5}{3}.", True),
        (r"\frac{1}{5}", r"\frac{7}{5} + \frac{1}{5} i.", False),
        (r"}{ \frac{1}{2}", r"\frac{1}{2}", False),
        (r"a+b+c)", "a+b+c", False),
        (r"5\,", "5", True),
        ("5.", "$5$", True),
        (r"10^{100}", "10^{100}+1", False),
        ("", "", False),
        (" $ ", "3", False),
    ],
)
def test_verdicts(grader, answer, gold, correct):
    verdict = grader.grade(f"so \\boxed{{{answer}}}", gold)
    assert verdict.correct is correct, verdict
    assert verdict.reason


@given(a=st.integers(-(10**20), 10**20), b=st.integers(-(10**20), 10**20))
@settings(max_examples=50)
def test_integers_need_no_process(a, b):
    grader = Grader()
    assert grader.grade(f"\\boxed{{{a:,}}}", str(b)).correct is (a == b)
    assert grader.grade(f"\\boxed{{{a}}}", f"{a:,}").correct is True
    assert not processes(grader)


def test_no_box_is_wrong_and_says_so():
    assert Grader().grade("The answer is 4.", "4") == Verdict(False, "no boxed answer")


def test_grade_all_keeps_the_order(grader):
    golds = [f"\\frac{{{n}}}{{7}}" for n in range(1, 7)] * 4
    answers = [f"\\boxed{{{n}/7}}" for n in (1, 2, 0, 4, 5, 0)] * 4
    assert [v.correct for v in grader.grade_all(answers, golds)] == [True, True, False, True, True, False] * 4
    with pytest.raises(ValueError, match="24 completions but 1 gold"):
        grader.grade_all(answers, golds[:1])
    rules = [Rule(), Rule("letter")]
    assert [v.correct for v in grader.grade_all([r"\boxed{c}"] * 2, ["C"] * 2, rules, progress=True)] == [True, True]
    with pytest.raises(ValueError, match="24 gold answers but 2 rules"):
        grader.grade_all(answers, golds, rules)


HOSTILE = runpy.run_path(str(ROOT / "benchmarks" / "grading.py"))["HOSTILE"]


@pytest.mark.parametrize("case", HOSTILE, ids=list(HOSTILE))
def test_hostile_text_ends_in_a_verdict(grader, case):
    text, gold = HOSTILE[case]
    start = time.process_time()  # what is done here, beside the processes that have a deadline
    verdict = grader.grade(text, gold)
    assert verdict.correct is not True and verdict.reason
    assert time.process_time() - start < 3


def test_hostile_text_is_no_choice():
    rule = Rule("letter", fallbacks=True)
    golds = ["E"] * len(HOSTILE)  # no text says this
    verdicts = Grader().grade_all([text for text, _ in HOSTILE.values()], golds, [rule] * len(HOSTILE))
    assert [verdict for verdict in verdicts if verdict.correct is not False or not verdict.reason] == []


@given(text=st.text(max_size=40), gold=st.sampled_from(["1", r"\frac{1}{2}", "x+1", r"\text{no}"]))
@settings(max_examples=60)
def test_any_text_gets_a_verdict(grader, text, gold):
    verdict = grader.grade(f"\\boxed{{{text}}}", gold)
    assert verdict.correct in (True, False, None) and verdict.reason


CASES = [
    (path.stem, case)
    for path in sorted((ROOT / "tests" / "cases").glob("*.jsonl"))
    for case in map(json.loads, path.read_text(encoding="utf-8").splitlines())
]


@pytest.mark.parametrize("name", ["grading", "kinds"])
def test_what_models_write(name):
    """`grading`: pairs from public reports of graders; `kinds`: more of each kind, with answers that are wrong."""
    cases = [case for stem, case in CASES if stem == name]
    rules = [Rule(**{key: case[key] for key in ("kind", "multiple", "relative", "fallbacks")}) for case in cases]
    with Grader(workers=2) as patient:
        verdicts = patient.grade_all([c["completion"] for c in cases], [c["gold"] for c in cases], rules)
    assert len(cases) > 200
    assert [(c, v) for c, v in zip(cases, verdicts, strict=True) if v.correct is not c["expected"]] == []


# --- deadlines, memory, and processes


def test_what_hangs_sympy_is_a_time_out_and_the_others_are_graded():
    with Grader(workers=1, deadline=1.0) as grader:
        grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "1/2")  # the process starts outside the measured time
        verdicts = grader.grade_all(
            [r"\boxed{10^{10^{10}}}", r"\boxed{\frac{\sqrt{4}}{4}}", r"\boxed{9}"], ["10", "1/2", "8"]
        )
    assert [v.correct for v in verdicts] == [None, True, False]
    assert verdicts[0].reason == TIMED_OUT and verdicts[0].reward is None
    assert verdicts[0].extracted == "10^{10^{10}}"


def test_a_deadline_is_processor_time_and_behind_it_is_the_clock(monkeypatch):
    # A process that is stopped gets no processor: its time-out is the machine's, not the answer's.
    monkeypatch.setattr(
        grading,
        "_WORKER",
        "import sys, time; sys.path.append(sys.argv[1])\n"
        "from capo_rl import answers; from capo_rl.rewards import grading;"
        "grading._LEAST_PATIENCE, grading._PATIENCE = 0.5, 1e-3;"
        "answers.judge = lambda *a, judge=answers.judge: time.sleep(60) if a[0] == 'x+1' else judge(*a);"
        "grading._STARTUP = 1e6; grading._serve()",
    )
    with Grader(workers=1, deadline=300.0) as grader:
        verdict = grader.grade(r"\boxed{x+1}", "x+2")
        assert (verdict.correct, verdict.reason, grader.overloaded) == (None, grading.OVERLOADED, 1)
        grader.deadline = 1e6  # and a thousand seconds on the clock
        assert grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "1/2").correct is True


def test_the_start_of_a_process_does_not_count_against_the_deadline():
    with Grader(workers=1, deadline=0.3) as grader:  # importing sympy alone takes longer than this
        assert grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "1/2").correct is True


def test_memory_is_bounded(grader):
    grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "1/2")
    for process in processes(grader):
        if Path(f"/proc/{process.pid}/limits").exists():
            limits = Path(f"/proc/{process.pid}/limits").read_text()
            assert f"Max address space         {2 << 30}" in limits


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc to see how large a process is")
def test_a_process_that_has_grown_is_replaced_after_its_answer(monkeypatch):
    def two_answers():
        with Grader(workers=1) as grader:
            for _ in range(2):
                assert grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "1/2").correct is True
                yield processes(grader)[0]

    first, second = two_answers()
    assert first is second
    monkeypatch.setattr(grading, "_WORN", 1 << 20)
    first, second = two_answers()
    assert first is not second and first.poll() is not None


def test_a_killed_process_costs_one_answer_at_most(grader):
    grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "1/2")
    for process in processes(grader):
        process.send_signal(signal.SIGKILL)
    verdicts = [grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "1/2") for _ in range(3)]
    assert verdicts[-1].correct is True
    assert all(v.correct is True or "died" in v.reason for v in verdicts)


def test_close_ends_the_processes_and_the_next_answer_starts_them_again():
    grader = Grader(workers=2)
    assert not processes(grader)  # lazy
    assert (
        grader.grade_all([r"\boxed{\frac{\sqrt{4}}{4}}"] * 2, ["0.5"] * 2)
        == [Verdict(True, "equal by math-verify", r"\frac{\sqrt{4}}{4}")] * 2
    )
    started = processes(grader)
    assert started and all(process.poll() is None for process in started)
    grader.close()
    assert all(process.poll() is not None for process in started)
    with grader:
        assert grader.grade(r"\boxed{\frac{\sqrt{4}}{4}}", "0.5").correct is True


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc to see which processes run")
@pytest.mark.parametrize("answer", [r"\frac{\sqrt{4}}{4}", "10^{10^{10}}"], ids=["idle", "busy"])
def test_workers_die_with_their_parent_and_ignore_its_main_script(tmp_path, answer):
    # No __main__ guard: with multiprocessing, each worker would run this script again.
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, threading, time\n"
        "from capo_rl.rewards.grading import Grader\n"
        "grader = Grader(workers=1, deadline=2.0)\n"
        "grader.grade(r'\\boxed{\\frac{\\sqrt{4}}{4}}', '0.5')\n"
        f"threading.Thread(target=grader.grade, args=(r'\\boxed{{{answer}}}', '10')).start()\n"
        "time.sleep(0.2)\n"
        "print(*(w._process.pid for w in grader._started), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    with parent:
        (pid,) = map(int, parent.stdout.readline().split())
        assert is_running(pid)
        parent.kill()
    while is_running(pid):  # for ever, if it is not at its end: then the time-out of the test ends this
        time.sleep(0.05)


def test_a_process_that_cannot_start_is_an_error_not_a_verdict(monkeypatch, capfd):
    monkeypatch.setattr(grading, "_WORKER", "import no_such_module")
    with Grader(workers=1) as grader, pytest.raises(RuntimeError, match="could not start"):
        grader.grade(r"\boxed{\pi/2}", "0.5")
    assert "no_such_module" in capfd.readouterr().err


@pytest.mark.parametrize("deadline", [0, -1, math.inf, math.nan])
def test_a_deadline_is_finite(deadline):
    with pytest.raises(ValueError, match="deadline="):
        Grader(deadline=deadline)


# --- gold answers


def test_ungradable_gold_answers(grader):
    assert grader.ungradable(["1", "1,000", r"\frac12", "", "  ", "}{", "x+1", r"\text{no}", "x^"]) == {
        3,
        4,
        5,
        8,
    }


@pytest.mark.skipif(not (DATA / "math_train12k.jsonl").exists(), reason="no shared data: set CAPO_DATA")
def test_every_tenth_gold_answer_of_math_equals_itself(grader):
    lines = (DATA / "math_train12k.jsonl").read_text(encoding="utf-8").split("\n")
    golds = [json.loads(line)["answer"] for line in lines[::10] if line]
    golds = [gold for gold in golds if number(gold) is None]
    assert len(golds) > 200
    assert [gold for gold in golds if not grader._algebra(gold, gold, Rule()).correct] == []


# --- rewards


def test_accuracy_reward_in_both_formats_with_time_outs_counted_apart(monkeypatch, grader):
    monkeypatch.setattr(grading, "shared_grader", lambda: grader)
    completions = [r"\boxed{4}", r"\boxed{5}", "none", r"\boxed{10^{10^{10}}}", r"\boxed{7}"]
    answer = ["4", "4", "4", "10", "x^"]
    rewards = [1.0, 0.0, 0.0, None, None]
    conversations = [[{"role": "assistant", "content": text}] for text in completions]
    for batch in (completions, conversations):
        logged = {}
        assert accuracy_reward(batch, answer, log_metric=logged.__setitem__, prompts=None) == rewards
        assert logged == {"grader/timeouts": 1.0, "grader/overloaded": 0.0, "grader/ungradable": 2.0}


def test_an_answer_is_wrong_only_if_the_gold_answer_is_known(grader):
    assert grader.grade(r"\boxed{x^ }", "x^").correct is True  # the same text all the same
    assert grader.grade(r"\boxed{2}", "x^") == Verdict(None, "the gold answer does not parse", "2")


def test_the_reward_is_where_scripts_import_it_from():
    assert capo_rl.accuracy_reward is accuracy_reward
    with pytest.raises(AttributeError, match="no_such"):
        capo_rl.no_such  # noqa: B018


def test_a_message_without_text_is_an_answer_without_box():
    assert accuracy_reward([[{"role": "assistant", "content": None}], []], ["1", "1"]) == [0.0, 0.0]
