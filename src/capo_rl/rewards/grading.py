"""Grade mathematical answers against a gold answer, without trusting the text that is graded.

`answers` says what an answer is and when it is right; its algebra runs here, in worker processes, since it
evaluates what a model wrote, and a model may write `\\boxed{10^{10^{10}}}`. Each answer has a deadline, in seconds of
its process's processor time, so that a busy machine changes no verdict; each worker has a memory limit. Both are kept
by the operating system. What cannot be graded is `None`: neither right nor wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_rl import answers
from capo_rl.answers import Rule
from capo_rl.answers import extract_answer as extract_answer

logger = logging.getLogger(__name__)

TIMED_OUT = "timed out"
OVERLOADED = "timed out on a busy machine"

_MEMORY = 2 << 30  # bytes of address space a worker may have; an idle one has about 0.1 GiB
_WORN = 256 << 20  # bytes in memory above which a worker is replaced: its parser's tables grow with every new text
_STARTUP = 120.0  # seconds of processor time to import sympy
# A process that gets less than a fiftieth of a processor, or that waits for what never comes, ends all the same.
_PATIENCE = 50.0  # seconds on the clock for each of processor time
_LEAST_PATIENCE = 60.0
# A worker's main program. The package may be known to this process's `sys.path` only; at its end, it hides nothing.
_WORKER = "import sys; sys.path.append(sys.argv[1]); from capo_rl.rewards.grading import _serve; _serve()"
_TRAINING = Rule()


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right (`None`: it could not be graded), why, and the answer that was read."""

    correct: bool | None
    reason: str
    extracted: str | None = None

    @property
    def reward(self) -> float | None:
        """1.0, 0.0, or `None`, which TRL leaves out of the group's baseline."""
        return None if self.correct is None else float(self.correct)


def _quick_verdict(completion: str, gold: str, rule: Rule) -> Verdict | str:
    """The verdict where no algebra is needed, else the answer that math-verify has to look at."""
    text = answers.final_text(completion)
    text = text[-answers.TAIL :]
    answer = answers.extract_answer(text)
    if rule.fallbacks and not answers.bare(answer or ""):  # an empty box repeats the question
        answer = answers.stated_answer(text) or answer
    if answer is None:
        reasoned = len(text) < len(completion) and answers.extract_answer(completion[-answers.TAIL :]) is not None
        return Verdict(False, "a boxed answer only in the reasoning" if reasoned else "no boxed answer")
    if not answers.bare(answer):
        return Verdict(False, "empty box", answer)
    if len(answer) > answers.LONGEST_ANSWER and answer != gold:
        reason = f"longer than {answers.LONGEST_ANSWER} characters"
        return Verdict(False, reason, answer[: answers.LONGEST_ANSWER])
    if rule.multiple and answers.squeezed(answer) != answers.squeezed(gold):
        return answer
    quick = answers.quick(answer, gold, rule)
    return Verdict(*quick, answer) if quick else answer


class Grader:
    r"""Grades answers in `workers` processes, each answer within `deadline` seconds of processor time and 2 GiB.

    Behind that is a limit on the clock, of 50 times as much and at least a minute: an answer that meets it is graded
    once more, and `overloaded` counts these.

    The processes start when an answer needs one (equal text and plain integers don't), and end with
    `close()`, with the `with` block, or with this process. After `close()` the next answer starts them again.

    Raises `ValueError` for a deadline that is not positive, and, on the first answer that needs a process,
    `RuntimeError` if none can start (say, math-verify is not installed).

    >>> with Grader(workers=1) as grader:
    ...     grader.grade(r"Thus $\boxed{\sqrt{2} / 2}$.", r"\frac{1}{\sqrt{2}}")
    Verdict(correct=True, reason='equal by math-verify', extracted='\\sqrt{2} / 2')
    """

    def __init__(self, *, workers: int | None = None, deadline: float = 5.0) -> None:
        if not 0 < deadline < math.inf:
            raise ValueError(f"deadline={deadline}: give each answer a finite number of seconds above 0")
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.deadline = deadline
        self.overloaded = 0
        # A slot is a worker, or None where one has yet to start; last in, first out, so that grading one
        # answer at a time keeps using the same process.
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._slots.put(None)
        self._started: set[_Worker] = set()
        self._close = weakref.finalize(self, _stop_all, self._started)  # runs at exit as well

    def grade(self, completion: str, gold: str, rule: Rule = _TRAINING) -> Verdict:
        """The verdict on one completion."""
        quick = _quick_verdict(completion, gold, rule)
        return quick if isinstance(quick, Verdict) else self._algebra(quick, gold, rule)

    def grade_all(
        self,
        completions: Sequence[str],
        golds: Sequence[str],
        rules: Sequence[Rule] | None = None,
        progress: bool = False,
    ) -> list[Verdict]:
        """The verdicts on all completions, in their order, `workers` at a time.

        Raises `ValueError` if there are not as many gold answers, or rules, as completions.
        """
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions but {len(golds)} gold answers")
        if rules is None:
            rules = [_TRAINING] * len(golds)
        elif len(rules) != len(golds):
            raise ValueError(f"{len(golds)} gold answers but {len(rules)} rules")
        with ThreadPoolExecutor(self.workers) as threads:
            verdicts: Iterable[Verdict] = threads.map(self.grade, completions, golds, rules)
            return list(_shown(verdicts, len(golds), "grading") if progress else verdicts)

    def ungradable(self, golds: Iterable[str], *, progress: bool = False) -> set[int]:
        """Positions of the gold answers that are no numbers and that math-verify can't parse in time."""
        golds = list(golds)
        unknown = {gold for gold in golds if answers.number(gold) is None}
        with ThreadPoolExecutor(self.workers) as threads:
            parsed: Iterable[bool] = threads.map(self._parses, unknown)
            if progress:
                parsed = _shown(parsed, len(unknown), "checking the gold answers")
            bad = {gold for gold, good in zip(unknown, parsed, strict=True) if not good}
        return {row for row, gold in enumerate(golds) if gold in bad}

    def close(self) -> None:
        """End the worker processes now."""
        _stop_all(self._started)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _algebra(self, answer: str, gold: str, rule: Rule) -> Verdict:
        reply = self._ask({"gold": gold, "answer": answer, "rule": dataclasses.asdict(rule)})
        return Verdict(reply["correct"], reply["reason"], answer)

    def _parses(self, gold: str) -> bool:
        return self._ask({"gold": gold})["correct"] is True

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        reply = self._ask_once(question)
        if reply["reason"] == OVERLOADED:
            self.overloaded += 1
            reply = self._ask_once(question)
        return reply

    def _ask_once(self, question: dict[str, Any]) -> dict[str, Any]:
        worker = self._slots.get()
        try:
            if worker is not None and not worker.alive:
                worker.stop()
                self._started.discard(worker)
                worker = None
            if worker is None:
                worker = _Worker()
                self._started.add(worker)
            reply = worker.ask(question | {"deadline": self.deadline})
            if reply.pop("resident", 0) > _WORN:
                worker.stop()
            return reply
        finally:
            self._slots.put(worker)


def _shown(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    from tqdm.auto import tqdm

    # None: only on a terminal
    return tqdm(items, total=total, desc=what, leave=False, disable=None if total else True)


class _Worker:
    """One process that answers questions, one line of JSON each, until its standard input ends.

    Not `multiprocessing` (nor a pool on top of it): a spawned child imports the caller's main script again,
    and a training script without a `__main__` guard would start a second training. This process imports neither
    that script nor torch.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", _WORKER, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not self._readline():  # the imports are over, and the first deadline can run
            code = self._process.wait()
            self.stop()
            raise RuntimeError(f"a grading process could not start (exit code {code}); its error is above")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The worker's reply; a worker that died is asked nothing again."""
        assert self._process.stdin is not None
        line = json.dumps(question).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply = self._readline()
        except (OSError, ValueError):  # it died, or was stopped, between two questions
            reply = b""
        if reply:
            return json.loads(reply)
        code = self._process.wait()
        self.stop()
        late = {-signal.SIGPROF: TIMED_OUT, -signal.SIGALRM: OVERLOADED}
        return {"correct": None, "reason": late.get(code, f"the grading process died (exit code {code})")}

    def stop(self) -> None:
        """Kill the process and close both pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a question that nobody will read
                    pipe.close()

    def _readline(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return line if line.endswith(b"\n") else b""


def _stop_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().stop()


def _serve() -> None:
    """A worker's life. The kernel ends it at a deadline: its signals kill even inside a C multiplication."""
    import resource

    for late in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(late, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {late})  # a mask is inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _allow(_STARTUP)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply

    logging.disable()  # math-verify warns that its own time-outs are off, which is the point
    # Imports, and compiles math-verify's patterns.
    answers.judge(r"\frac{\pi}{2}", r"\pi", _TRAINING)
    replies.write("ready\n")
    for line in sys.stdin.buffer:
        question = json.loads(line)
        _allow(question["deadline"])
        try:
            if "answer" in question:
                correct, reason = answers.judge(question["answer"], question["gold"], Rule(**question["rule"]))
            else:
                correct, reason = answers.readable(question["gold"]), "whether the gold answer parses"
        except (MemoryError, RecursionError) as error:
            correct, reason = None, f"out of memory ({type(error).__name__})"
        _allow(0)
        replies.write(json.dumps({"correct": correct, "reason": reason, "resident": _resident()}) + "\n")


def _resident() -> int:
    """The bytes that this process has in memory, or 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _allow(seconds: float) -> None:
    """Give this process so much processor time, and a generous time on the clock; with 0, take the limits away."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, max(_PATIENCE * seconds, _LEAST_PATIENCE) if seconds else 0)


@functools.cache
def shared_grader() -> Grader:
    """The one grader of this process that the reward function uses."""
    return Grader()
